"""Checks of an objective on a batch, before anything is learned: its loss runs, and its labels are the network's."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from glue_jax.arguments import BATCH_SIZE
from glue_jax.checkpoints.objective import MOST_TEXT, Objective, ObjectiveError, default_loss
from glue_jax.objectives import OutputLoss
from glue_jax.types import Params


def check_batches(path: Path, objective: Objective, model: Params, batch_size: int | None) -> None:
    """Refuses data that the loss does not take, and labels that are no classes of the network. Nothing is computed.

    Args:
        path: the objective file, for errors.
        objective: what the file defines. It has data.
        model: the shapes and dtypes of a blend, as `jax.eval_shape` returns them.
        batch_size: the number of examples in a minibatch. With None it is the default.

    Raises:
        ObjectiveError: if a loss does not run on a batch, or if `default_loss` is given a label that is no class.
    """
    batch_size = BATCH_SIZE if batch_size is None else batch_size
    judge = objective.validation_fn or objective.loss_fn
    _check(path, objective.loss_fn, model, "load_data", objective.data, batch_size)
    if objective.validation_data is not None:
        _check(path, judge, model, "load_validation_data", objective.validation_data, batch_size)
    elif judge is not objective.loss_fn:
        _check(path, judge, model, "load_data", objective.data, batch_size)


def _check(path: Path, loss_fn: Any, model: Params, name: str, data: Any, batch_size: int) -> None:
    """Checks what one loading function returned, for one function of the file."""
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{[min(len(leaf), batch_size), *leaf.shape[1:]]}", data)
    outputs: Any = None
    try:
        batch = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (min(len(leaf), batch_size), *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)
            ),
            data,
        )
        if isinstance(loss_fn, OutputLoss):
            outputs = jax.eval_shape(loss_fn.outputs_fn, model, batch)
            jax.eval_shape(loss_fn.loss, outputs, batch)
        else:
            jax.eval_shape(loss_fn, model, batch)
    except ObjectiveError:
        raise
    except Exception as error:
        raise ObjectiveError(
            f"{path}: the loss of a batch of {name}, {shapes}, does not run: {' '.join(str(error).split())[:MOST_TEXT]}"
        ) from error
    if outputs is None or loss_fn.loss is not default_loss:
        return
    labels: Any = data.get("y", data.get("labels"))
    num_outputs = outputs.shape[-1]
    wrong = np.argwhere((labels < 0) | (labels >= num_outputs)) if np.issubdtype(labels.dtype, np.integer) else []
    if len(wrong):
        raise ObjectiveError(
            f"{path}: {name} returned the label {labels[tuple(wrong[0])]} for example {wrong[0][0]}; expected 0 to "
            f"{num_outputs - 1}, because the network has {num_outputs} outputs"
        )
