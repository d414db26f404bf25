"""Objectives to learn the coefficients by: a loss in two parts, the error rate, the entropy.

SPSA needs no gradient, so it can learn by a metric:

    loss_fn = lambda params, batch: glue_jax.objectives.error_rate(apply(params, batch["x"]), batch["y"])

A metric that counts, such as the error rate, does not change at a small radius. Give `spsa_step` a radius at which it
changes; `glue_jax.calibrate` finds one. Or learn by a smooth loss, and validate by the metric (`validation_fn`).
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from glue_jax.checks import check_callable
from glue_jax.types import Batch, Params

__all__ = ["LossOfOutputs", "OutputLoss", "OutputsFn", "entropy", "error_rate"]


class OutputsFn(Protocol):
    """A function `outputs_fn(params, batch) -> outputs`. It returns what the network computes for each example."""

    def __call__(self, params: Params, batch: Batch, /) -> Any:
        """Returns one array `[B, ...]`, or a pytree of such arrays."""
        ...


class LossOfOutputs(Protocol):
    """A function `loss(outputs, batch) -> scalar`. It returns the loss of a network's outputs on a minibatch."""

    def __call__(self, outputs: Any, batch: Batch, /) -> jax.Array:
        """Returns the mean loss over the minibatch, `[]`."""
        ...


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """A `loss_fn` in two parts: the network's outputs, and the loss of these outputs.

    Every step and `learn` take it as their `loss_fn`. `gauss_newton_step` needs it.

    Attributes:
        outputs_fn: `outputs_fn(params, batch) -> outputs`. The outputs are an array `[B, ...]` or a pytree of such
            arrays, for instance logits.
        loss: `loss(outputs, batch) -> scalar`, the mean over the minibatch. For `gauss_newton_step`, JAX must be able
            to differentiate it twice. That step also wants it convex in the outputs, as the cross-entropy of logits and
            the squared error are.

    Raises:
        TypeError: if a part cannot be called.

    Examples:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> loss_fn = glue_jax.OutputLoss(
        ...     lambda params, batch: batch["x"] @ params["w"],
        ...     lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2),
        ... )
        >>> float(loss_fn({"w": jnp.ones(2)}, {"x": jnp.eye(2), "y": jnp.array([1.0, 3.0])}))
        2.0
    """

    outputs_fn: OutputsFn
    loss: LossOfOutputs

    def __post_init__(self) -> None:
        """Refuses parts that cannot be called."""
        check_callable(outputs_fn=self.outputs_fn, loss=self.loss)

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array:
        """Returns the mean loss of `params` on `batch`, `[]`."""
        return self.loss(self.outputs_fn(params, batch), batch)


def error_rate(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Returns the error rate, 1 - accuracy, float32 `[]`.

    The result is NaN if a logit is NaN, so that a broken network is noticed. The result is also NaN if a label belongs
    to no class, such as -1 for an example without a label.

    Args:
        logits: the scores of C classes, `[..., C]`, C at least 2.
        labels: the right classes, integers `[...]` from 0 to C - 1.

    Raises:
        ValueError: if the labels have another shape (such as one-hot `[..., C]`, or `[..., 1]`), if there are fewer
            than two classes, or if there are no examples.
        TypeError: if the labels are not integers.
    """
    if labels is None:
        raise TypeError("labels is None; expected integers")
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if labels.shape != logits.shape[:-1] or not labels.size or logits.shape[-1:] < (2,):
        raise ValueError(
            f"labels have shape {labels.shape} and logits have shape {logits.shape}; expected [...] and [..., C], with "
            "one integer label for each example and C at least 2"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}; expected integers")
    # In a short dtype, the number of classes may not fit.
    labels = labels.astype(jnp.int32)
    wrong = (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)
    of_no_class = (labels < 0) | (labels >= logits.shape[-1])
    return jnp.mean(jnp.where(jnp.isnan(logits).any(axis=-1) | of_no_class, jnp.nan, wrong))


def entropy(logits: ArrayLike) -> jax.Array:
    """Returns the mean entropy of predictions in nats, `[]`, in at least float32. This objective needs no labels.

    AdaMerging learns by it (Yang et al., 2024, https://arxiv.org/abs/2310.02575). A class with logit -inf,
    such as a masked class, adds 0.

    Args:
        logits: the scores of C classes, `[..., C]`.

    Raises:
        ValueError: if the logits have no axis, or if there are no examples.
    """
    logits = jnp.asarray(logits)
    if not (logits.ndim and logits.size):
        raise ValueError(f"logits have shape {logits.shape}; expected [..., C]")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    # 0 times -inf would be NaN.
    finite = jnp.where(jnp.isneginf(log_probabilities), 0, log_probabilities)
    return -jnp.mean(jnp.sum(jnp.exp(log_probabilities) * finite, axis=-1))
