"""Each remedy alone and with others, at a tiny scale."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from experiments.protocol import presets
from experiments.protocol import run as protocol
from experiments.protocol.expert_training import train_experts
from experiments.runtime.stages import Stages
from experiments.studies.ablation import __main__ as ablation
from experiments.studies.ablation import ablation_report as report
from experiments.studies.ablation import trials as measurement
from experiments.studies.ablation.prerequisites import Measured
from experiments.studies.ablation.recipes import Recipe, recipes
from tests.experiments.helpers import ONE_SEED, check_report, folder_options, prepare_quietly
from tests.helpers import ROOT

RESULTS = ROOT / "experiments" / "results"
ALL = {recipe.name: recipe for recipe in recipes(ONE_SEED)}


@pytest.fixture
def context(digits, tmp_path):
    return prepare_quietly(ONE_SEED, digits, tmp_path)


def run(folder, *words):
    return ablation.main([*folder_options(folder), "--epochs", "1", *words])


def test_every_recipe_gives_a_model_of_the_experts_architecture(context, tmp_path):
    found = measurement.measure(context, list(ALL.values()), 0, Stages(tmp_path / "out"))
    assert [row["recipe"] for row in found["rows"]] == list(ALL)
    rows = {row["recipe"]: row for row in found["rows"]}
    assert np.isfinite([row["test_loss"] for row in rows.values()]).all()
    average = glue_jax.blend(glue_jax.stack_experts(train_experts(context)[0]), jnp.full(2, 0.5))
    measures = context.evaluate(average, context.test)
    uniform = rows["1 data size (uniform)"]
    assert (uniform["test_loss"], uniform["test_accuracy"]) == ([measures["loss"]], [measures["accuracy"]])
    # Nothing to learn, nothing looked at.
    assert rows["1 data size (uniform)"]["forward_passes"] == 0
    # 5 steps of two probes of 16 images, validated at step 0, 2, 4, 5 on 20.
    assert rows["4 GLUE"]["forward_passes"] == 5 * 2 * 16 + 4 * 20
    assert rows["3 full gradient"]["forward_passes"] == 5 * 16 + 4 * 20
    # And statistics of all 64 target images.
    assert rows["GLUE, refreshed"]["forward_passes"] == rows["4 GLUE"]["forward_passes"] + 64
    # Two experts are judged on 20 images; the first alone again, and with the second, which joins it or not.
    assert rows["best expert"]["forward_passes"] == 2 * 20
    assert rows["greedy soup"]["forward_passes"] == 2 * 20 + 2 * 20
    assert rows["Fisher-weighted"]["forward_passes"] == 2 * 20
    # Each expert on all 64 target images; and statistics of them.
    assert rows["RegMean"]["forward_passes"] == 2 * 64
    assert rows["RegMean, refreshed"]["forward_passes"] == 2 * 64 + 64
    # 5 steps of d + 2 blends, validated at step 0 and 5. Two coefficients are one dimension under a softmax.
    assert rows["5 Gauss-Newton"]["forward_passes"] == 5 * 3 * 16 + 2 * 20
    of_model = 5 * 4 * 16 + 2 * 20
    assert rows["Gauss-Newton, free coefficients"]["forward_passes"] == of_model + 64
    # Four groups of two.
    of_layers = 5 * 10 * 16 + 2 * 20
    assert rows["Gauss-Newton, free coefficients, by layer"]["forward_passes"] == of_model + of_layers + 64
    # Three starts, which two experts' losses gave.
    assert rows["GLUE from three starts"]["forward_passes"] == 2 * 20 + 3 * (5 * 2 * 16 + 4 * 20)
    assert rows["GLUE, refreshed"]["alpha"] == rows["4 GLUE"]["alpha"]
    assert np.shape(rows["GLUE, by layer"]["alpha"]) == (5, 2)
    # A step of Adam moves the logarithm of the temperature by its learning rate at most.
    moved = abs(np.log(rows["GLUE, temperature"]["temperature"])) / ONE_SEED.alpha_learning_rate
    assert 0.5 < moved < 5.5
    best = max(found["experts"], key=lambda row: -row["validation_loss"])
    assert rows["best expert"]["test_accuracy"][0] == pytest.approx(best["test_accuracy"])


def test_a_command_line_comes_to_its_report_and_has_nothing_to_do_again(tiny, tmp_path, monkeypatch, capsys):
    words = ("--recipes", "4 GLUE", "task vectors")
    first = run(tmp_path, *words)
    assert [found["config"]["initialization"] for found in first["sets"]] == ["common", "separate"]
    # Separate initialisations have no origin.
    assert [[row["recipe"] for row in found["rows"]] for found in first["sets"]] == [
        ["4 GLUE", "task vectors"],
        ["4 GLUE"],
    ]
    text = check_report(tmp_path / "out", first, "ablation.png")
    assert "| 4 GLUE |" in text
    assert "Experts of separate initialisation" in text
    assert first["title"] in text
    monkeypatch.setattr(measurement, "_model", None)
    again = run(tmp_path, *words)
    assert again["sets"] == first["sets"]
    assert "report:" in capsys.readouterr().out


def test_the_report_says_what_its_recipes_are():
    results = json.loads((RESULTS / "ablation-digits" / "results.json").read_text())
    (row, *_) = results["sets"][0]["rows"]
    for name in ("4 GLUE", "RegMean, refreshed", "5 Gauss-Newton"):
        one = {**results["sets"][0], "rows": [{**row, "recipe": name}]}
        text = report.present({**results, "sets": [one]}).markdown
        assert ("RegMean: each layer" in text) == ("RegMean" in name)
        assert ("Gauss-Newton, ours" in text) == ("Gauss-Newton" in name)


def test_a_recipe_is_chosen_by_its_name_and_several_by_a_word():
    def names(*words):
        parsed = presets.parse(ablation.Arguments, "ablation", "", ["--recipes", *words])
        return [recipe.name for recipe in parsed.chosen()]

    assert names("free coefficients") == ["free coefficients"]
    assert names("GLUE, by", "aligned to") == [
        "uniform, aligned to the first",
        "GLUE, by block",
        "GLUE, by layer",
        "uniform, aligned to the first, refreshed",
    ]


def test_an_interrupted_fine_tuning_finds_the_coefficients_learned(context, tmp_path, monkeypatch):
    def interrupted(*arguments, **words):
        raise KeyboardInterrupt

    chosen = [ALL["GLUE from three starts"], ALL["minibatch, temperature, by block"]]
    folder = Stages(tmp_path / "out")
    alone = measurement.measure(context, chosen, 1, Stages(tmp_path / "alone"))["rows"]
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "fine_tune", interrupted)
        for recipe in chosen:
            with pytest.raises(KeyboardInterrupt):
                measurement.measure(context, [recipe], 1, folder)
    monkeypatch.setattr(measurement, "_learn", None)
    rows = measurement.measure(context, chosen, 1, folder)["rows"]
    for row in (*alone, *rows):
        assert row.pop("prior_seconds") > 0
        del row["seconds"]
    assert rows == alone


def test_what_the_experiment_has_done_of_the_papers_configs_is_taken_from_there(context, tmp_path, monkeypatch):
    paper = [recipe for recipe in ALL.values() if recipe.part == "the paper"]
    anew = measurement.measure(context, paper, 1, Stages(tmp_path / "anew"))["rows"]
    protocol.run(context)
    monkeypatch.setattr(measurement, "_model", None)
    taken = measurement.measure(context, paper, 1, Stages(tmp_path / "taken"))["rows"]
    assert len(taken) == 4
    for row in (*anew, *taken):
        del row["prior_seconds"]
        row.pop("seconds", None)
        # Where nothing is learned there is no such machine.
        row["learned_on"] = row.get("learned_on")
    assert taken == anew
    # What it has done itself comes first.
    monkeypatch.setattr(measurement, "kept", None)
    assert len(measurement.measure(context, paper, 1, Stages(tmp_path / "anew"))["rows"]) == 4


def test_longer_fine_tuning_than_the_experiments_is_done_anew(context, tmp_path):
    protocol.run(context)
    epochs = ONE_SEED.fine_tuning_epochs + 1
    (row,) = measurement.measure(context, [ALL["1 data size (uniform)"]], epochs, Stages(tmp_path / "out"))["rows"]
    assert len(row["test_accuracy"]) == 1 + epochs


def test_a_network_without_batch_norm_has_every_way(digits, tmp_path):
    config = dataclasses.replace(ONE_SEED, network="vit", vit_patch_size=4, vit_depth=1, vit_width=12, vit_mlp_width=24)
    context = prepare_quietly(config, digits, tmp_path)
    chosen = [ALL[name] for name in ("GLUE, minibatch", "uniform, refreshed", "aligned, free coefficients, by layer")]
    rows = measurement.measure(context, chosen, 0, Stages(tmp_path / "out"))["rows"]
    assert len(rows) == 3
    assert np.isfinite([row["test_loss"] for row in rows]).all()


@pytest.mark.parametrize("parts", [{"link_fn": glue_jax.unconstrained}, {"task_vectors": True}])
def test_coefficients_outside_the_hull_with_blended_statistics_are_refused_with_the_reason(parts):
    with pytest.raises(
        ValueError, match=r"x: statistics is 'blended'; expected 'minibatch' .* variance can be negative"
    ):
        Recipe(name="x", part="remedies", **parts)


def test_several_starts_go_with_groups_and_a_temperature(context, tmp_path):
    recipe = dataclasses.replace(
        ALL["GLUE from three starts"], grouping="layer", temperature=True, statistics="minibatch"
    )
    (row,) = measurement.measure(context, [recipe], 0, Stages(tmp_path / "out"))["rows"]
    assert np.shape(row["alpha"]) == (5, 2)
    assert abs(np.log(row["temperature"])) > ONE_SEED.alpha_learning_rate / 2


def test_groups_start_where_one_vector_for_the_model_ended(context, tmp_path):
    first = ALL["free coefficients, temperature"]
    # A start of its own is not asked for.
    fine = dataclasses.replace(ALL["free coefficients, by layer"], first=first, temperature=True, start=None)
    # A rate that moves nothing keeps the start.
    still = dataclasses.replace(fine, name="still", learning_rate=1e-30)
    rows = measurement.measure(context, [first, fine, still], 0, Stages(tmp_path / "out"))["rows"]
    of_model, of_layers, of_still = (np.array(row["alpha"]) for row in rows)
    np.testing.assert_array_equal(of_still, np.tile(of_model, (4, 1)))
    assert rows[2]["temperature"] == rows[0]["temperature"]
    assert abs(np.log(rows[0]["temperature"])) > ONE_SEED.alpha_learning_rate / 2
    assert np.abs(of_layers - of_model).max() > 1e-3
    assert [row["steps"] for row in rows] == [5, 10, 10]
    # 5 steps of 2 K directions, and 4 validations more.
    assert rows[1]["forward_passes"] == rows[0]["forward_passes"] + 5 * 2 * 4 * 16 + 4 * 20


def test_regmean_of_equal_experts_is_that_expert(context):
    expert = context.problem.network.init(jax.random.key(0))
    experts = glue_jax.stack_experts([expert] * 2)
    measured = Measured(context.problem, lambda how: experts, [{}, {}], context.validation, context.evaluate)
    merge, images = ALL["RegMean"].merge, context.train.images
    assert merge is not None
    merged = merge(measured, [images[:20], images[20:40]])
    jax.tree.map(lambda merged, leaf: np.testing.assert_allclose(merged, leaf, atol=1e-5), merged, expert)
    assert measured.passes == 2 * 40
    # Gram matrices of minibatches add up.
    one, two = measured.grams([images[:20]]), measured.grams([images[:20], images[:20]])
    jax.tree.map(lambda one, two: np.testing.assert_allclose(two, 2 * one, rtol=1e-6), one, two)


def test_what_is_learned_first_is_one_vector_of_the_same_kind():
    fine = ALL["free coefficients, by layer"]
    others = "free coefficients, temperature", "GLUE, minibatch", "task vectors", "aligned, free coefficients"
    for other in (fine, *(ALL[name] for name in others)):
        with pytest.raises(ValueError, match=f"by layer: first is {other.name!r}; expected a recipe of the grou"):
            dataclasses.replace(fine, first=other)


def test_the_experiments_own_step_of_glue_is_the_one_that_is_measured():
    config = dataclasses.replace(ONE_SEED, num_directions=3, directions="gaussian")
    step = {recipe.name: recipe for recipe in recipes(config)}["4 GLUE"].step_fn
    assert isinstance(step, functools.partial)
    expected = {"radius": config.radius, "num_directions": 3, "directions": "gaussian", "matmul_precision": "highest"}
    assert step.keywords == expected


def test_the_ensemble_is_of_mean_probabilities(context):
    experts = [context.problem.network.init(jax.random.key(seed)) for seed in range(3)]
    found = measurement._ensemble(context, experts)
    probabilities = np.mean([jax.nn.softmax(context.problem.logits(e, context.test.images)) for e in experts], axis=0)
    labels = np.asarray(context.test.labels)
    assert found["test_accuracy"] == pytest.approx((probabilities.argmax(axis=1) == labels).mean())
    assert found["test_loss"] == pytest.approx(-np.log(probabilities[np.arange(len(labels)), labels]).mean(), rel=1e-4)
