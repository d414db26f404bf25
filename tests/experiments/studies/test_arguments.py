"""Each command refuses what it cannot follow in one clear message, before any work."""

import pytest

from experiments import digits
from experiments.studies import budget, last_checkpoints, similarity, target_size
from experiments.studies.ablation import __main__ as ablation
from experiments.studies.cost import __main__ as cost
from experiments.studies.cost import tpu
from experiments.studies.variance import __main__ as variance
from tests.experiments.helpers import TINY


@pytest.mark.parametrize(
    ("module", "words", "message"),
    [
        (ablation, "--recipes magic", "recipes has 'magic'; expected part of one of"),
        (ablation, "--epochs -1", "epochs is -1; expected at least 0"),
        (ablation, "--initializations common common", "each given once"),
        (ablation, "--experiment nowhere", "experiment is 'nowhere'; expected a module of experiments with PRESETS"),
        (ablation, "--experiment stages", "experiment is 'stages'; expected"),
        (ablation, "--preset huge", "preset is 'huge'; expected one of ('quick',)"),
        (budget, "--ways Newtons", "ways has 'Newtons'"),
        (budget, "--passes 0", "passes is 0"),
        (budget, "--rate -1", "rate is -1"),
        (budget, "--sharing free free", "each given once"),
        (cost, "--repetitions 0", "repetitions is 0; expected at least 1"),
        (cost, "--networks vgg", "network is 'vgg'; expected one of"),
        (cost, "--batch-sizes 64 0", "batch_size is 0; expected at least 1"),
        (cost, "--num-experts 10 -1", "num_experts is -1; expected at least 1"),
        (cost, "--num-directions 0", "num_directions is 0; expected at least 1"),
        (cost, "--batch-sizes", "batch_sizes is empty; expected at least one"),
        (cost, "--repetition few", "repetition"),
        (tpu, "--networks vgg", "network is 'vgg'; expected one of"),
        (tpu, "--batch-sizes 0", "batch_size is 0; expected at least 1"),
        (tpu, "--networks", "networks or batch_sizes is empty"),
        (last_checkpoints, "--decays 1.0", "decays are (1.0,); expected at least one, each between 0 and 1"),
        (last_checkpoints, "--ways best none", "ways has 'none'; expected part of one of"),
        (last_checkpoints, "--num-experts 9 --expert-epochs 8", "num_experts is 9, and expert_epochs is 8; expected"),
        (target_size, "--sizes 30 30", "sizes are (30, 30)"),
        (target_size, "--sizes 19", "sizes are (19,)"),
        (target_size, "--sizes 2000", "there are 1328 images to draw from"),
        (target_size, "--epochs 0", "epochs is 0"),
        (target_size, "--starts Newtons", "starts has 'Newtons'"),
        (similarity, "--barriers 1", "barriers is 1; expected 0, or at least 2 experts"),
        (similarity, "--barriers -1", "barriers is -1; expected 0, or at least 2 experts"),
        (similarity, "--num-experts 1", "num_experts is 1; expected at least 2 for this command"),
        (similarity, "--run-dir out", "out_dir is out, which is run_dir: expected another folder"),
        (similarity, "--run-dir a/../out", "which is run_dir"),
        (variance, "--examples 0", "examples is 0; expected at least 1"),
        (variance, "--averaged", "averaged is (); expected numbers of directions"),
        (variance, "--averaged 0 1", "averaged is (0, 1)"),
        (variance, "--subsets 1", "subsets is (1,); expected numbers of experts, each at least 2"),
        (variance, "--measuring-seed -1", "measuring_seed is -1; expected at least 0"),
        (variance, "--examples 65", "examples is 65, but there are 64 target images"),
        (
            variance,
            "--num-experts 3 --averaged 1 30 --probes 64",
            "probes is 64; expected at least 66 for m = 30 and K = 3",
        ),
    ],
)
def test_a_bad_command_line_is_refused_before_any_work(module, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(digits.PRESETS, "quick", TINY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        module.main(["--out-dir", "out", *words.split()])
    code, printed = stopped.value.code, capsys.readouterr()
    said = printed.err.replace("│", " ") if code == 2 else str(code)
    assert message in " ".join(said.split())
    assert code == 2 or module not in (cost, tpu)
    assert not list(tmp_path.iterdir())
