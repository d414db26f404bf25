import dataclasses
import errno
import io
import json
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import glue_jax
from experiments.protocol import coefficients, fine_tuning, passes
from experiments.protocol import expert_training as experts
from experiments.protocol import run as protocol
from experiments.protocol.config import CONFIGS, Config
from experiments.protocol.context import prepare
from experiments.protocol.expert_training import _stage_of, describe_missing, initialize, measurement, train_experts
from experiments.runtime import checkpoints, sources, stages
from experiments.runtime.locks import LockedError
from experiments.runtime.progress import ProgressBars
from experiments.runtime.stages import DamagedStageError, Stages
from tests.experiments.helpers import ONE_SEED, TINY, flip, killed_after, prepare_quietly, run_quietly, without_times
from tests.helpers import compilations


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return run_quietly(TINY, digits, folder), folder


def _of(results, number, seed=0):
    return next(run for run in results["runs"] if (run["config"], run["seed"]) == (number, seed))


def test_results_hold_each_seed_and_config_and_are_json(done):
    results, _ = done
    assert [(run["seed"], run["config"]) for run in results["runs"]] == [(s, c) for s in (0, 1) for c in CONFIGS]
    assert json.loads(json.dumps(results)) == results | {"config": results["config"] | {"seeds": [0, 1]}}
    for run in results["runs"]:
        assert len(run["test_accuracy"]) == len(run["test_loss"]) == 1 + TINY.fine_tuning_epochs
        assert sum(run["alpha"]) == pytest.approx(1, abs=1e-5)


def test_config_1_is_uniform_and_config_2_proportional_to_validation_accuracy(done):
    results, _ = done
    np.testing.assert_allclose(_of(results, 1)["alpha"], [0.5, 0.5])
    accuracy = np.array([row["validation_accuracy"] for row in results["experts"]])
    np.testing.assert_allclose(_of(results, 2)["alpha"], accuracy / accuracy.sum(), rtol=1e-6)


def test_the_learned_configs_keep_their_best_by_validation(done):
    results, _ = done
    for seed in (0, 1):
        for number, steps in {3: [0, 2, 4, 5], 4: [0, 2, 4, 5], 5: [0, 5]}.items():
            run = _of(results, number, seed)
            assert run["validation_steps"] == steps
            best = run["validation_steps"][int(np.argmin(run["validation_loss"]))]
            np.testing.assert_allclose(run["alpha"], run["alphas"][run["alpha_steps"].index(best)])


def test_the_prior_of_each_config_has_its_passes_and_seconds(done):
    results, _ = done
    # 2 experts, 20 validation images; 5 steps of 16 images, validated 4 times, by Config 5 twice.
    took = {1: (0, 0), 2: (2 * 20, 0), 3: (5 * 16 + 4 * 20, 5 * 16), 4: (2 * 5 * 16 + 4 * 20, 0)}
    took[5] = (3 * 5 * 16 + 2 * 20, 0)
    for run in results["runs"]:
        assert (run["forward_passes"], run["backward_passes"]) == took[run["config"]]
    for number in (3, 4, 5):
        total = sum(run["prior_seconds"] for run in results["runs"] if run["config"] == number)
        assert total == pytest.approx(results["seconds"][f"Coefficients, Config {number}"])
    assert _of(results, 1)["prior_seconds"] == 0
    # Of 20 + 64 + 30 images that the experts are measured on.
    assert _of(results, 2)["prior_seconds"] == pytest.approx(results["seconds"]["Experts' accuracies"] * 20 / 114)


def test_more_directions_are_more_passes_of_config_4_alone():
    config, weights = dataclasses.replace(TINY, num_directions=3), {"validation_steps": [0, 2, 4, 5]}
    forward = [passes.passes_of(config, 20, number, weights)[0] for number in (3, 4, 5)]
    assert forward == [80 + 80, 6 * 80 + 80, 3 * 80 + 80]


def test_gauss_newton_falls_further_than_the_others_in_as_many_steps(digits, tmp_path):
    experts = {"num_experts": 4, "expert_examples": 60, "expert_epochs": 20, "validation_examples": 200}
    config = dataclasses.replace(TINY, **experts, alpha_steps=20, alpha_batch_size=64, patience=100, seeds=(0,))
    results = run_quietly(config, digits, tmp_path)
    falls = {}
    for number in (3, 4, 5):
        losses = _of(results, number)["validation_loss"]
        falls[number] = losses[0] - min(losses)
    # 0.030, 0.019 and 0.106 nats.
    assert falls[5] > 2 * max(falls[3], falls[4]) > 0


def test_the_learned_configs_differ_by_their_step_and_its_settings_alone_and_learn_in_full_precision(
    digits, tmp_path, monkeypatch
):
    calls = []
    learn = glue_jax.learn

    def spy(key, experts, data, **words):
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        calls.append((precision, jax.random.key_data(key).tolist(), words.pop("step_fn"), data, words))
        del words["callback"]
        return learn(key, experts, data, step_fn=calls[-1][2], **words)

    monkeypatch.setattr(glue_jax, "learn", spy)
    run_quietly(dataclasses.replace(TINY, seeds=(5,)), digits, tmp_path)
    (_, key, full_gradient, data, words), (_, _, spsa, _, spsa_words), (_, _, gauss_newton, _, own_words) = calls
    assert {precision for precision, *_ in calls} == {"highest"}
    assert [other for _, other, *_ in calls] == [key] * 3
    for _, _, _, others, _ in calls:
        np.testing.assert_array_equal(data.images, others.images)
    assert full_gradient is glue_jax.full_gradient_step
    assert (spsa.func, gauss_newton.func) == (glue_jax.spsa_step, glue_jax.gauss_newton_step)
    assert gauss_newton.keywords == {"matmul_precision": "highest"}
    assert words == spsa_words
    assert own_words == words | {"optimizer": None, "validate_every": 5}


def test_the_prior_is_the_blend_tested_before_fine_tuning(done, digits):
    results, folder = done
    network = prepare_quietly(TINY, digits, folder).problem
    like = jax.eval_shape(network.network.init, jax.random.key(0))
    places = [
        next(path for path in (folder / "experts").iterdir() if path.is_dir() and path.name.startswith(f"{index}-"))
        for index in range(2)
    ]
    experts = glue_jax.stack_experts([checkpoints.load(place, like) for place in places])
    run = _of(results, 3, 1)
    prior = glue_jax.blend(experts, jnp.array(run["alpha"]))
    test = jax.tree.map(lambda array: jnp.asarray(array[:30]), digits.test)
    logits = network.network.apply(prior, network.normalize(test.images))
    assert run["test_accuracy"][0] == pytest.approx(float(jnp.mean(jnp.argmax(logits, -1) == test.labels)))


def test_a_repeated_run_does_nothing_and_ends_with_the_same_results(done, digits, monkeypatch):
    results, folder = done
    monkeypatch.setattr(Stages, "write", lambda *_: pytest.fail("a stage was done again"))
    assert run_quietly(TINY, digits, folder) == results


@pytest.mark.parametrize("together", [False, True])
def test_a_run_killed_anywhere_ends_with_the_same_results(done, digits, tmp_path, monkeypatch, together):
    if together:
        monkeypatch.setattr("experiments.protocol.context.on_cpu", lambda tree: False)
        expected = run_quietly(TINY, digits, tmp_path / "whole")
    else:
        expected, _ = done
    for count in (0, 1, 2, 3, 5):
        with killed_after(count), pytest.raises(KeyboardInterrupt):
            run_quietly(TINY, digits, tmp_path / "killed")
    again = run_quietly(TINY, digits, tmp_path / "killed")
    assert without_times(again) == without_times(expected)


ALL = {"experts", "accuracies", "coefficients", "fine-tuning"}


@pytest.mark.parametrize(
    ("module", "name", "before", "after", "anew"),
    [
        ("experiments.protocol.coefficients", "_MOST_ALPHAS", "201", "101", {"coefficients"}),
        ("glue_jax.steps", "spsa_step", "step", "stop", {"coefficients"}),
        ("glue_jax.gauss_newton", "_quadratic", "curved", "bent", {"coefficients"}),
        ("experiments.protocol.coefficients", "make_steps", "5", "6", {"coefficients"}),
        ("experiments.protocol.training", "output_loss", "loss", "worth", {"coefficients"}),
        ("experiments.protocol.passes", "passes_of", "2", "3", set()),
        ("experiments.protocol.fine_tuning", "fine_tune", "append", "extend", {"fine-tuning"}),
        (
            "experiments.protocol.training",
            "_EVALUATION_BATCH",
            "256",
            "255",
            {"accuracies", "coefficients", "fine-tuning"},
        ),
        ("experiments.protocol.training", "_MINIBATCHES", "2", "3", ALL),
        ("experiments.protocol.splits", "draw_splits", "0", "1", ALL),
        ("experiments.models.convnet", "ConvNet", "conv1", "conv3", ALL),
        # Nothing of this run.
        ("experiments.models.vit", "ViT", "patches", "pieces", set()),
        ("experiments.reporting.run_report", "config_table", "prior", "blend", set()),
        ("experiments.runtime.stages", "machine", "CPU", "cpu", set()),
    ],
)
def test_changed_source_does_anew_what_it_touches(digits, tmp_path, change_source, module, name, before, after, anew):
    context = prepare_quietly(TINY, digits, tmp_path)

    def places():
        stages = {
            "experts": _stage_of(context, 0),
            "accuracies": measurement(context),
            "coefficients": coefficients.coefficients_stage(context, 4, 0),
            "fine-tuning": fine_tuning.fine_tuning_stage(context, 4, 0, [0.5, 0.5]),
        }
        return {(kind, context.stages.path(*stage)) for kind, stage in stages.items()}

    unchanged = places()
    assert places() == unchanged
    change_source(module, name, before, after)
    assert {kind for kind, _ in places() - unchanged} == anew


def _kind(name):
    """The kind of a stage, by its name: each Config that learns coefficients has a step of its own."""
    first, _, rest = name.partition("/")
    return {"experts": rest, "coefficients": name}.get(first, first)


def _definition_of(code):
    """The definition of this repository that a piece of code is of, as digests name it; None for other code."""
    folder = str(pathlib.Path(protocol.__file__).parents[2]) + os.sep
    path, line = code.co_filename.removeprefix(folder), code.co_firstlineno
    if path == code.co_filename or not path.startswith(("experiments", "glue_jax")):
        return None
    module = path.removesuffix(".py").replace(os.sep, ".").removesuffix(".__init__")
    for name, statements in sources._parse(module).definitions.items():
        for statement in statements:
            first = min(node.lineno for node in (statement, *getattr(statement, "decorator_list", [])))
            if name != sources._AT_IMPORT and first <= line <= statement.end_lineno:
                return f"{module}:{name}"
    return None


def test_all_functions_that_run_in_a_stage_are_of_its_digest(digits, tmp_path, monkeypatch):
    digest, run, train = sources.digest, Stages.run, experts._train_experts
    begun, ran = {}, {}

    def recorded(*names, leaving_out=()):
        found = digest(*names, leaving_out=leaving_out)
        begun[found] = names, leaving_out
        return found

    def watched(kind, code, compute):
        if kind in ran:
            return compute()
        # What was traced before runs no more.
        jax.clear_caches()
        seen = set()
        before = sys.gettrace()
        sys.settrace(lambda frame, *_: seen.add(frame.f_code))
        try:
            return compute()
        finally:
            sys.settrace(before)
            ran[kind] = code.partition(",")[0], set(map(_definition_of, seen)) - {None}

    monkeypatch.setattr("experiments.protocol.context.digest", recorded)
    monkeypatch.setattr(
        Stages,
        "run",
        lambda self, name, depends_on, compute, *rest: run(
            self, name, depends_on, lambda: watched(_kind(name), depends_on["code"], compute), *rest
        ),
    )
    monkeypatch.setattr(
        experts,
        "_train_experts",
        lambda context, *rest: watched("experts", context.expert_fields["code"], lambda: train(context, *rest)),
    )
    monkeypatch.setattr(protocol, "CONFIGS", (4, 5))
    run_quietly(ONE_SEED, digits, tmp_path)
    learned = {"coefficients/seed0-config4", "coefficients/seed0-config5"}
    assert ran.keys() == {"experts", "accuracies", "fine-tuning", *learned}
    for kind, (code, found) in ran.items():
        names, leaving_out = begun[code]
        reached = sources._reached(names, leaving_out)[1].keys() - set(leaving_out)
        assert len(found) > 10, kind
        assert {name for name in found if name.partition(":")[0] not in sources._DECIDE_NOTHING} <= reached, kind


@pytest.mark.parametrize("change", [{"num_classes": 11}, {"train": (1348, 4, 16, 1)}])
def test_what_the_checksum_of_the_data_does_not_see_counts(change, digits, tmp_path):
    context = prepare_quietly(TINY, digits, tmp_path)
    if "train" in change:
        change = {"train": digits.train._replace(images=digits.train.images.reshape(change["train"]))}
    other = context._replace(dataset=digits._replace(**change))
    assert other.dataset.checksum == context.dataset.checksum
    assert other.expert_fields != context.expert_fields


def test_experts_that_other_source_trained_are_taken_where_they_are_accepted(
    done, digits, tmp_path, monkeypatch, change_source
):
    results, folder = done
    copied = shutil.copytree(folder, tmp_path / "run")
    change_source("experiments.protocol.training", "_MINIBATCHES", "2", "3")
    context = prepare_quietly(TINY, digits, copied)
    assert "2 of them are kept, but other source computed them" in describe_missing(context)
    output = io.StringIO()
    progress = ProgressBars(Console(file=output, width=200))
    accepting = prepare(TINY, digits, copied, progress, accept_stages=["experts"])
    assert describe_missing(accepting) == "experts to train first: 0 of 2"
    assert output.getvalue().count("is taken for this source's") == 2
    # Nothing else is.
    assert protocol.remaining(accepting)["coefficients"] == [3, 4, 5, 3, 4, 5]
    monkeypatch.setattr("experiments.protocol.expert_training.train", None)
    assert (
        train_experts(prepare_quietly(TINY, digits, copied))[1][0]["training_loss"]
        == results["experts"][0]["training_loss"]
    )


def test_a_damaged_expert_is_named_and_made_again_once_it_is_deleted(done, digits, tmp_path):
    results, folder = done
    copied = shutil.copytree(folder, tmp_path / "run")
    expert = next(path for path in (copied / "experts").iterdir() if path.is_dir())
    flip(expert)
    with pytest.raises(DamagedStageError, match=f"{expert} is damaged .*delete it"):
        run_quietly(TINY, digits, copied)
    shutil.rmtree(expert)
    assert without_times(run_quietly(TINY, digits, copied)) == without_times(results)


def test_a_disk_that_was_full_anywhere_is_gone_on_from(done, digits, tmp_path, monkeypatch):
    expected, _ = done
    write, save = stages.write_json, checkpoints.save

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    def after(count, function):
        """Lets some calls through."""
        calls = []

        def limited(*arguments):
            calls.append(None)
            return function(*arguments) if len(calls) <= count else full()

        return limited

    for saved, written in ((0, 0), (1, 1), (9, 1), (9, 2), (9, 9)):
        monkeypatch.setattr(checkpoints, "save", after(saved, save))
        monkeypatch.setattr(stages, "write_json", after(written, write))
        with pytest.raises(OSError, match="No space left"):
            run_quietly(TINY, digits, tmp_path)
    monkeypatch.setattr(checkpoints, "save", save)
    monkeypatch.setattr(stages, "write_json", write)
    assert without_times(run_quietly(TINY, digits, tmp_path)) == without_times(expected)


def test_experts_are_trained_into_a_folder_by_one_process_at_a_time(digits, tmp_path):
    context = prepare_quietly(TINY, digits, tmp_path)
    with context.stages.lock(), pytest.raises(LockedError, match=f"process {os.getpid()} works in {tmp_path}"):
        train_experts(prepare_quietly(TINY, digits, tmp_path))


def test_another_radius_does_anew_what_the_radius_touches(done, digits, written):
    _, folder = done
    run_quietly(dataclasses.replace(TINY, radius=0.5, seeds=(0,)), digits, folder)
    # The fine-tuning is of new coefficients, unless the best ones are the start as before.
    assert set(written) - {"fine-tuning/seed0-config4"} == {"coefficients/seed0-config4"}


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({"radius": 0.5}, {4}),
        ({"num_directions": 2}, {4}),
        ({"directions": "rademacher"}, {4}),
        ({"alpha_learning_rate": 0.1}, {3, 4}),
        ({"alpha_b1": 0.5}, {3, 4}),
        ({"alpha_b2": 0.5}, {3, 4}),
        ({"validate_every": 3}, {3, 4}),
        ({"patience": 4}, {3, 4, 5}),
        ({"alpha_steps": 6}, {3, 4, 5}),
        ({"alpha_batch_size": 8}, {3, 4, 5}),
        ({"matmul_precision": "high"}, {3, 4, 5}),
        ({"target_examples": 63}, {3, 4, 5}),
    ],
)
def test_coefficients_are_learned_anew_for_a_setting_that_their_config_uses(digits, tmp_path, change, numbers):
    def places(config):
        context = prepare_quietly(config, digits, tmp_path)
        return {
            number: context.stages.path(*coefficients.coefficients_stage(context, number, 0)) for number in (3, 4, 5)
        }

    before, after = places(TINY), places(dataclasses.replace(TINY, **change))
    assert {number for number in before if before[number] != after[number]} == numbers


def test_a_run_of_the_papers_four_configs_is_taken_up_and_only_config_5_is_done(done, digits, tmp_path, monkeypatch):
    results, folder = done
    copied = shutil.copytree(folder, tmp_path / "run")
    for path in copied.glob("*/seed*-config5-*"):
        path.unlink()
    assert protocol.remaining(prepare_quietly(TINY, digits, copied)) == {"coefficients": [5, 5], "fine-tuning": [5, 5]}
    assert without_times(run_quietly(TINY, digits, copied)) == without_times(results)


def test_separate_initialisations_differ_and_common_ones_do_not(digits, tmp_path):
    def spread(initialization):
        config = dataclasses.replace(TINY, initialization=initialization, expert_learning_rate=1e-9, seeds=(0,))
        context = prepare_quietly(config, digits, tmp_path / initialization)
        experts, _ = train_experts(context)
        kernels = [expert["params"]["conv2"]["kernel"] for expert in experts]
        return float(jnp.abs(kernels[0] - kernels[1]).max())

    assert spread("common") < 1e-6 < 1e-2 < spread("separate")


def test_experts_one_after_another_share_the_compiled_initialisation(digits, tmp_path, caplog):
    context = prepare_quietly(TINY, digits, tmp_path)
    first = initialize(context.problem, TINY, [0])
    with compilations(caplog) as names:
        second = initialize(context.problem, TINY, [1])
    assert names == []
    assert not np.array_equal(first["params"]["head"]["kernel"], second["params"]["head"]["kernel"])


def test_all_experts_at_once_are_those_of_one_after_another(done, digits, tmp_path, monkeypatch):
    results, _ = done
    monkeypatch.setattr("experiments.protocol.context.on_cpu", lambda tree: False)
    context = prepare_quietly(TINY, digits, tmp_path)
    _, records = train_experts(context)
    for record, row in zip(records, results["experts"], strict=True):
        np.testing.assert_allclose(record["training_loss"], row["training_loss"], rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_batch_size": 25}, "expert_batch_size is 25, but there are 24 images"),
        ({"fine_tuning_batch_size": 65}, "fine_tuning_batch_size is 65, but there are 64"),
        ({"alpha_batch_size": 65}, "alpha_batch_size is 65, but there are 64"),
        ({"expert_examples": 1400}, "exceed the 1348 training images"),
    ],
)
def test_a_config_that_does_not_fit_the_data_is_refused_before_training(digits, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_quietly(dataclasses.replace(TINY, **changes), digits, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_stops_with_its_stage_and_step(digits, tmp_path):
    config = dataclasses.replace(TINY, alpha_learning_rate=3e38, patience=100, seeds=(1,))
    with pytest.raises(FloatingPointError, match=r"coefficients/seed1-config3: the .* is (nan|inf) at step \d"):
        run_quietly(config, digits, tmp_path)


def test_an_expert_whose_losses_alone_are_finite_is_named_and_not_kept(digits, tmp_path, monkeypatch):
    train = experts.train

    def diverged(*arguments, **words):
        for state, loss in train(*arguments, **words):
            yield state._replace(variables=jax.tree.map(lambda leaf: leaf * jnp.inf, state.variables)), loss

    monkeypatch.setattr(experts, "train", diverged)
    with pytest.raises(FloatingPointError, match="experts/0: it has weights or statistics that are not finite"):
        run_quietly(TINY, digits, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0; expected at least 1"),
        ({"num_directions": 10**12}, "num_directions is 1000000000000; expected at least 1 and below 2147483648"),
        ({"radius": 0.0}, "radius is 0.0; expected a finite number above 0"),
        ({"radius": float("nan")}, "radius is nan"),
        ({"expert_b1": 1.0}, "expert_b1 is 1.0; expected a number of at least 0 and below 1"),
        ({"augmentation": "blur"}, "augmentation is 'blur'; expected one of"),
        ({"directions": "east"}, "directions is 'east'; expected one of"),
        ({"directions": "simplex_orthogonal", "num_experts": 1}, "nothing to probe"),
        ({"seeds": ()}, r"seeds are \(\); expected at least one"),
        ({"seeds": (1, 1)}, r"seeds are \(1, 1\); expected .* given once"),
        ({"expert_seed": -1}, "expert_seed is -1; expected at least 0"),
        ({"expert_seed": 2**32}, "expert_seed is 4294967296; expected at least 0 and below 4294967296"),
        # It would share its keys with seed 0.
        ({"seeds": (0, 2**32)}, r"seeds are \(0, 4294967296\); expected .* below 4294967296"),
        ({"seeds": (99999999999999999999,)}, r"seeds are \(9+,\); expected .* below 4294967296"),
    ],
)
def test_a_config_refuses_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
