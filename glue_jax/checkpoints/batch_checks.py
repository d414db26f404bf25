"""Checks of an objective on a batch, before anything is learned: its loss runs, and its labels are the network's."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from glue_jax.arguments import BATCH_SIZE
from glue_jax.checkpoints.objective import MOST_TEXT, Objective, ObjectiveError, default_loss
from glue_jax.objectives import OutputLoss
from glue_jax.types import Params


def check_batches(path: Path, objective: Objective, model: Params) -> None:
    """Refuses data that the loss does not take, and labels that are no classes of the network. Nothing is computed.

    Args:
        path: the objective file, for errors.
        objective: what the file defines.
        model: the shapes and dtypes of a blend, as `jax.eval_shape` returns them.

    Raises:
        ObjectiveError: if the loss of a batch does not run, or if `default_loss` is given a label that is no class.
    """
    for name, data in {"load_data": objective.data, "load_validation_data": objective.validation_data}.items():
        if data is not None:
            _check(path, objective.loss_fn, model, name, data)


def _check(path: Path, loss_fn: Any, model: Params, name: str, data: Any) -> None:
    """Checks what one loading function returned."""
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            (min(len(leaf), BATCH_SIZE), *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype)
        ),
        data,
    )
    try:
        if not isinstance(loss_fn, OutputLoss):
            jax.eval_shape(loss_fn, model, batch)
            return
        outputs = jax.eval_shape(loss_fn.outputs_fn, model, batch)
        jax.eval_shape(loss_fn.loss, outputs, batch)
    except ObjectiveError:
        raise
    except Exception as error:
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", batch)
        raise ObjectiveError(
            f"{path}: the loss of a batch of {name}, {shapes}, does not run: {' '.join(str(error).split())[:MOST_TEXT]}"
        ) from error
    labels = data.get("y", data.get("labels")) if isinstance(data, dict) else None
    if loss_fn.loss is default_loss and labels is not None and np.issubdtype(labels.dtype, np.integer):
        wrong = np.argwhere((labels < 0) | (labels >= outputs.shape[-1]))
        if len(wrong):
            raise ObjectiveError(
                f"{path}: {name} returned the label {labels[tuple(wrong[0])]} for example {wrong[0][0]}; expected 0 to "
                f"{outputs.shape[-1] - 1}, because the network has {outputs.shape[-1]} outputs"
            )
