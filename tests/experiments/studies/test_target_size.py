"""The study of target sizes: what is drawn, how epochs are chosen, and the command at a tiny scale."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.protocol.training import Trainer, TrainingState
from experiments.studies import starts, target_size
from experiments.studies.starts import STARTS, labelled_images
from tests.experiments.helpers import ONE_SEED, check_report, folder_options, prepare_quietly

# Of the training images, those that do not validate.
AVAILABLE = 1348 - ONE_SEED.validation_examples


@pytest.fixture(scope="module")
def context(digits, tmp_path_factory):
    return prepare_quietly(ONE_SEED, digits, tmp_path_factory.mktemp("run"))


def test_smaller_target_sets_are_part_of_larger_ones_and_begin_with_the_seeds_own(context):
    drawn = [labelled_images(context, 0, size) for size in (30, 64, 100, 1000)]
    for smaller, larger in itertools.pairwise(drawn):
        assert set(smaller.all) < set(larger.all)
        assert set(smaller.validation) <= set(larger.validation)
    assert set(drawn[1].all) == set(context.targets[0])
    assert [len(labelled.validation) for labelled in drawn] == [10, 12, 20, 200]
    for labelled, size in zip(drawn, (30, 64, 100, 1000), strict=True):
        assert len(set(labelled.learning) | set(labelled.validation)) == len(labelled.all) == size
        assert not set(labelled.all) & set(context.splits.validation)
    assert set(labelled_images(context, 0, AVAILABLE).all) == set(context.splits.rest)


def test_of_many_images_a_thousand_validate(context):
    many = context._replace(splits=context.splits._replace(rest=np.arange(10_000)))
    labelled = labelled_images(many, 0, 10_000)
    assert (len(labelled.validation), len(labelled.learning)) == (1000, 9000)


@pytest.mark.parametrize(
    ("accuracies", "losses", "best"), [([0.5, 0.7, 0.6], [1.0, 3.0, 2.0], 1), ([0.5, 0.7, 0.7], [1.0, 3.0, 2.0], 2)]
)
def test_the_best_expert_is_the_most_accurate_and_of_equals_the_one_of_the_lowest_loss(
    context, accuracies, losses, best
):
    def evaluate(expert, images):
        assert len(images.labels) == 30
        return {"accuracy": accuracies[int(expert["expert"])], "loss": losses[int(expert["expert"])]}

    judged = context._replace(evaluate=evaluate, config=dataclasses.replace(context.config, num_experts=3))
    bank = starts.make_bank(judged, {"expert": jnp.arange(3)})
    assert int(STARTS["best expert"](bank, labelled_images(context, 0, 30))["expert"]) == best


@pytest.mark.parametrize(
    ("losses", "chosen", "epochs"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0, 2),
        ([5.0, 4.0, 3.0, 6.0, 6.0, 6.0, 1.0, 1.0, 1.0], 2, 4),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8, 8),
    ],
)
def test_fine_tuning_keeps_the_model_of_the_lowest_validation_loss_and_stops(context, losses, chosen, epochs):
    def init(variables):
        return TrainingState(variables=variables, opt_state=())

    def epoch(keys, epoch, state, examples, rows):
        return TrainingState(variables={"epochs": state.variables["epochs"] + 1}, opt_state=()), np.zeros((1, 1))

    trainer = Trainer(init=init, steps=jax.jit(lambda: None), epoch=epoch)
    judged = context._replace(evaluate=lambda variables, examples: {"loss": losses[int(variables["epochs"])]})
    labelled = labelled_images(context, 0, 30)
    best, found = target_size.fine_tune(judged, trainer, {"epochs": jnp.zeros(())}, labelled, 8)
    assert int(best["epochs"]) == chosen
    assert found == losses[: epochs + 1]


def test_the_command_keeps_what_it_measured_and_reports_it(tiny, tmp_path, monkeypatch):
    words = [*folder_options(tmp_path), "--sizes", "30", "2000", "--epochs", "2", "--least-steps", "3"]
    results = target_size.main(words)
    rows = results["rows"]
    assert (results["available"], results["left_out"]) == (AVAILABLE, [2000])
    assert [row["start"] for row in rows] == list(STARTS)
    # 20 images, one minibatch: an epoch is a step.
    assert {(row["size"], row["validation"], row["most_epochs"]) for row in rows} == {(30, 10, 3)}
    for row in rows:
        assert row["epochs"] == int(np.argmin(row["validation_loss"]))
        assert 1 < len(row["validation_loss"]) <= row["most_epochs"] + 1
        if not row["epochs"]:
            assert row["tuned_accuracy"] == row["prior_accuracy"]
    report = check_report(tmp_path / "out", results, "target-size.png")
    assert f"| {AVAILABLE:,} | 2,000 |" in report
    assert f"| 30 | 10 | {len(rows)} |" in report
    monkeypatch.setattr(target_size, "fine_tune", lambda *_: pytest.fail("fine-tuned again"))
    assert target_size.main(words)["rows"] == rows
