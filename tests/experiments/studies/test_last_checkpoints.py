"""The study of the last checkpoints: the run that writes them, the ways to blend them, and the command."""

import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.digits import PRESETS
from experiments.runtime import checkpoints
from experiments.runtime.stages import DamagedStageError
from experiments.studies import last_checkpoints, training_run
from experiments.studies.training_run import decay_name, draw_images, load_average, load_models, moving_averages
from tests.experiments.helpers import ONE_SEED, TINY, check_report, folder_options, prepare_quietly

TINY_RUN = dataclasses.replace(ONE_SEED, expert_epochs=3)
DECAYS = (0.2, 0.999)


@pytest.fixture(scope="module")
def context(digits, tmp_path_factory):
    return prepare_quietly(TINY_RUN, digits, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(context, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    bar = context.progress.stage("Epochs", TINY_RUN.expert_epochs)
    return folder, training_run.train_run(context, draw_images(context, 0), 0, DECAYS, folder, bar)


def test_a_moving_average_forgets_the_first_parameters_and_leaves_the_updates_alone():
    link = moving_averages(DECAYS)
    params: Any = {"w": jnp.array([1.0, 2.0])}
    state: Any = link.init(params)
    # The decays of the first two steps are 1/10 and 2/11.
    for _ in range(2):
        updates, state = link.update({"w": jnp.array([1.0, 1.0])}, state, params)
        params = optax.apply_updates(params, updates)
    expected = 2 / 11 * (0.1 * 1 + 0.9 * 2) + 9 / 11 * 3
    for decay in DECAYS:
        average = state.averages[decay_name(decay)]["w"]
        np.testing.assert_allclose(average, [expected, expected + 1], rtol=1e-6)
    for _ in range(1000):
        _, state = link.update({"w": jnp.zeros(2)}, state, {"w": jnp.array([5.0, 5.0])})
    np.testing.assert_allclose(state.averages["decay_0_2"]["w"], 5.0, rtol=1e-6)


def test_the_images_of_a_seed_are_apart_and_must_be_there(context):
    images, others = draw_images(context, 0), draw_images(context, 1)
    assert (len(images.training), len(images.held_out)) == (TINY.expert_examples, TINY.target_examples)
    assert len({*images.training, *images.held_out, *context.splits.validation}) == 24 + 64 + 20
    assert set(images.training) != set(others.training)
    config = dataclasses.replace(TINY_RUN, target_examples=1348)
    with pytest.raises(
        ValueError, match="expert_examples is 24 and target_examples is 1348, but there are 1328 images"
    ):
        draw_images(context._replace(config=config), 0)


def test_the_last_checkpoints_are_read_as_they_were_written(context, trained, tmp_path):
    folder, record = trained
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    models = load_models(context, folder, record)
    # The checksums agree, so the last model is the one of the last epoch.
    last = jax.tree.map(lambda leaf: leaf[-1], models)
    assert checkpoints.checksum(last) == record["checksums"]["3"]
    fast, slow = (load_average(context, folder, decay) for decay in DECAYS)
    away = [float(optax.tree.norm(jax.tree.map(jnp.subtract, each, last["params"]))) for each in (fast, slow)]
    assert 0 < away[0] < away[1]
    swapped = tmp_path / "swapped"
    shutil.copytree(folder / "2", swapped / "3")
    shutil.copytree(folder / "3", swapped / "2")
    with pytest.raises(DamagedStageError, match=r"2 is damaged .*checksums differ"):
        load_models(context, swapped, record)


def test_a_command_line_comes_to_its_report_and_trains_and_learns_once(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "quick", TINY_RUN)
    words = ["--decays", "0.5", *folder_options(tmp_path)]
    results = last_checkpoints.main([*words, "--ways", "last", "moving"])
    assert [row["way"] for row in results["rows"]] == [
        "last checkpoint",
        "last checkpoint, refreshed",
        "uniform average of the last k",
        "moving average",
    ]
    monkeypatch.setattr(training_run, "make_trainer", lambda *_, **__: pytest.fail("trained again"))
    results = last_checkpoints.main(words)
    rows = {row["way"]: row for row in results["rows"]}
    assert list(rows) == list(last_checkpoints.WAYS)
    assert rows["uniform average of the last k"]["alpha"] == [0.5, 0.5]
    assert rows["moving average"]["chosen"] == "decay 0.5"
    for way, row in rows.items():
        if "softmax" in way:
            np.testing.assert_allclose(np.sum(row["alpha"]), 1, rtol=1e-5)
    # Refreshing changes the statistics alone.
    assert rows["last checkpoint"]["loss"] != rows["last checkpoint, refreshed"]["loss"]
    monkeypatch.setattr(last_checkpoints.Run, "refreshed", lambda *_: pytest.fail("learned again"))
    assert last_checkpoints.main(words)["rows"] == results["rows"]
    report = check_report(tmp_path / "out", results)
    assert "| learned, free | " in report
    assert "| epoch | 2 | 3 |" in report
