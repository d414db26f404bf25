import dataclasses
import errno
import json
import re

import pytest

from experiments import cifar10, cli, digits, imagenette, svhn
from experiments.protocol.config import Config
from experiments.reporting import paper
from tests.experiments.helpers import TINY, check_report

FILES = {"config.json", "results.json", "report.md", "figure1.png", "alpha.png", "stages"}


def test_a_run_ends_with_its_report_and_says_where_it_lies(tmp_path, capsys):
    # The name of the folder is no markup, and no pattern.
    folder = tmp_path / "a[/b] lr=[1e-3]"
    results = cli.main("digits", "", {"tiny": TINY}, ["--out-dir", str(folder), "--seeds", "0"])
    assert json.loads((folder / "config.json").read_text())["seeds"] == [0]
    report = check_report(folder, results, *FILES)
    printed = capsys.readouterr().out
    for name in ("4 GLUE (SPSA)", "5 Gauss-Newton (ours)"):
        assert f"| {name} |" in report
        assert name in printed
    assert "Config 5, Gauss-Newton, is ours" in report
    assert "coefficients: 3 Configs x 1 seeds x at most 5; fine-tuning: 5 Configs x 1 seeds x 4" in printed
    assert "forward passes" in printed
    assert re.search(
        r"time, from a few steps measured here: \d.*experts \d.*coefficients, at most \d.*tuning \d", printed
    )
    assert printed.rstrip().splitlines()[-1] == f"report: {folder / 'report.md'}"


def test_every_field_of_a_config_is_an_option_over_its_preset():
    presets = {"paper": Config(), "quick": TINY}
    parsed = cli._parse("x", "", presets, ["--preset", "quick", "--radius", "0.5", "--initialization", "separate"])
    assert parsed.config == dataclasses.replace(TINY, radius=0.5, initialization="separate")
    assert str(parsed.out_dir) == "runs/x-quick"
    assert cli._parse("x", "", presets, []).config == Config()
    assert str(cli._parse("x", "", presets, []).out_dir) == "runs/x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--radius", "zero"], "zero"),
        (["--vit-depth", "4"], "vit_depth is 4, but the network is resnet20"),
        (["--radius", "0"], "radius is 0.0; expected a finite number above 0"),
        (["--radius", "-1"], "radius is -1.0; expected a finite number above 0"),
        (["--radiuss", "1"], "radiuss"),
    ],
)
def test_a_bad_command_line_is_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli._parse("x", "", {"paper": Config()}, arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert message.lower() in (printed.err + printed.out).lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-experts", "1"], "num_experts is 1; expected at least 2"),
        (["--dataset", "mnist"], "dataset is 'mnist'"),
        (["--network", "vgg"], "network is 'vgg'"),
        (["--test-examples", "5000"], "test_examples is 5000, but the test split has"),
    ],
)
def test_a_bad_value_ends_with_one_clear_line(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        cli.main("digits", "", {"tiny": TINY}, ["--out-dir", str(tmp_path), *arguments])
    assert message in str(stopped.value.code)


def test_a_disk_that_is_full_at_the_report_ends_with_one_line_and_is_gone_on_from(tmp_path, monkeypatch):
    words = ["--out-dir", str(tmp_path), "--seeds", "0"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.reporting.presentation.write_whole", full)
        with pytest.raises(SystemExit, match="no space is left to write") as stopped:
            cli.main("digits", "", {"tiny": TINY}, words)
    assert f"finished stages are kept in {tmp_path}" in str(stopped.value.code)
    monkeypatch.setattr("experiments.protocol.expert_training.train", None)
    monkeypatch.setattr("experiments.protocol.fine_tuning.train", None)
    cli.main("digits", "", {"tiny": TINY}, words)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_title_names_what_differs_from_the_preset():
    assert cli._title("x", "quick", TINY, dataclasses.replace(TINY, radius=0.5)) == "x, preset quick, radius 0.5"


def test_the_papers_numbers_are_the_defaults():
    # Section 5 of the paper.
    config = cifar10.PRESETS["paper"]
    assert next(iter(cifar10.PRESETS)) == "paper"
    assert (config.dataset, config.network, config.num_experts) == ("cifar10", "resnet20", 10)
    assert (config.expert_examples, config.concentration, config.expert_epochs) == (2000, 0.5, 40)
    assert (config.expert_batch_size, config.expert_learning_rate) == (64, 1e-3)
    assert (config.expert_b1, config.expert_b2) == (0.9, 0.999)
    assert (config.target_examples, config.num_directions, len(config.seeds)) == (10_000, 1, 3)
    assert (config.alpha_learning_rate, config.alpha_b1, config.alpha_b2) == (1e-2, 0.9, 0.99)
    assert config.test_examples is None


@pytest.mark.parametrize("experiment", [cifar10, digits, imagenette, svhn], ids=lambda module: module.__name__)
def test_every_experiment_has_a_quick_preset_on_the_same_data(experiment):
    first = next(iter(experiment.PRESETS.values()))
    quick = experiment.PRESETS["quick"]
    for field in ("dataset", "network", "image_size", "augmentation"):
        assert getattr(quick, field) == getattr(first, field)


def test_the_papers_pairs_of_data_set_and_network_are_the_experiments():
    presets = {"cifar10": cifar10.PRESETS, "svhn": svhn.PRESETS, "imagenette": imagenette.PRESETS}
    for name, pair in paper.EXPERIMENTS.items():
        config = presets[name]["paper"]
        assert (config.dataset, config.network) == pair
        assert paper.is_at_its_scale(dataclasses.asdict(config))
    # House numbers are not to be mirrored.
    assert svhn.PRESETS["paper"].augmentation == "crop"
