"""Data that do not suit the network are refused before anything is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glue_jax
from glue_jax.checkpoints.batch_checks import check_batches
from glue_jax.checkpoints.objective import Objective, ObjectiveError, default_loss

MODEL = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}


def outputs_fn(params, batch):
    return batch["x"] @ params["w"]


def checked(tmp_path, data, validation_data=None, validation_fn=None, batch_size=None):
    loss_fn = glue_jax.OutputLoss(outputs_fn, default_loss)
    objective = Objective(data, validation_data, loss_fn, validation_fn, None, None, None, None, "")
    check_batches(tmp_path / "objective.py", objective, MODEL, batch_size)


@pytest.mark.parametrize("labels", [np.arange(200) % 3, np.zeros(200, np.int64), np.ones((200, 3))])
def test_data_that_suit_the_network_pass(tmp_path, labels):
    checked(tmp_path, {"x": np.ones((200, 4)), "y": labels})


@pytest.mark.parametrize("wrong", [3, -100])
def test_a_label_without_an_output_is_named(tmp_path, wrong):
    good = {"x": np.ones((200, 4)), "y": np.arange(200) % 3}
    bad = {**good, "y": np.where(np.arange(200) == 150, wrong, good["y"])}
    message = rf"load_validation_data returned the label {wrong} for example 150; expected 0 to 2"
    with pytest.raises(ObjectiveError, match=message):
        checked(tmp_path, good, bad)


def test_data_of_another_shape_are_named_with_the_reason(tmp_path):
    message = r"load_data, {'x': 'float64\[64, 5\]', 'y': 'int64\[64\]'}, does not run: dot_general requires"
    with pytest.raises(ObjectiveError, match=message):
        checked(tmp_path, {"x": np.ones((200, 5)), "y": np.arange(200) % 3})


def test_validation_data_are_checked_by_the_function_that_sees_them(tmp_path):
    good = {"x": np.ones((200, 4)), "y": np.arange(200) % 3}
    unlabelled = {**good, "y": np.full(200, -1)}
    checked(tmp_path, good, unlabelled, glue_jax.OutputLoss(outputs_fn, lambda outputs, batch: jnp.mean(outputs)))
    with pytest.raises(ObjectiveError, match=r"the loss of a batch of load_data, .* does not run: .*'z'"):
        checked(tmp_path, good, None, glue_jax.OutputLoss(outputs_fn, lambda outputs, batch: jnp.mean(batch["z"])))


def test_the_batch_has_the_size_of_a_minibatch(tmp_path):
    data = {"x": np.ones((200, 4)), "y": np.arange(200) % 3}
    of_32 = glue_jax.OutputLoss(outputs_fn, lambda outputs, batch: jnp.mean(outputs.reshape(32, 3)))
    checked(tmp_path, data, None, of_32, batch_size=32)
    with pytest.raises(ObjectiveError, match="does not run"):
        checked(tmp_path, data, None, of_32)
