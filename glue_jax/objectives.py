"""What to learn the coefficients by, beside the loss of Eq. (2): SPSA needs no gradient of it.

    loss_fn = lambda params, batch: glue_jax.objectives.error_rate(apply(params, batch["x"]), batch["y"])

A metric that counts has no slope at a small radius: give `spsa_step` one at which it changes (`glue_jax.calibrate`
finds it), or learn on a surrogate and validate on the metric (`validation_fn`).
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from glue_jax.checks import check_callable
from glue_jax.types import Batch, Params


class OutputsFn(Protocol):
    """`outputs_fn(params, batch) -> outputs`: what a network computes of each example."""

    def __call__(self, params: Params, batch: Batch, /) -> Any:
        """Returns one array `[B, ...]`, or a pytree of them."""
        ...


class LossOfOutputs(Protocol):
    """`loss(outputs, batch) -> scalar`: what the outputs of a minibatch are worth."""

    def __call__(self, outputs: Any, batch: Batch, /) -> jax.Array:
        """Returns the mean loss over the minibatch, `[]`."""
        ...


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """A `loss_fn` in two parts that can be had apart: what a network computes, and what that is worth.

    It is a `loss_fn` for every step and for `learn`. `gauss_newton_step` needs it.

    Attributes:
        outputs_fn: `outputs_fn(params, batch) -> outputs`, an array `[B, ...]` or a pytree of them, such as logits.
        loss: `loss(outputs, batch) -> scalar`, the mean over the minibatch, twice differentiable by JAX. It should be
            convex in the outputs, as the cross-entropy of logits and the squared error are.

    Example:
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
        """Refuses parts that cannot be called.

        Raises:
            TypeError: with the part.
        """
        check_callable(outputs_fn=self.outputs_fn, loss=self.loss)

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array:
        """Returns the mean loss of `params` on `batch`, `[]`."""
        return self.loss(self.outputs_fn(params, batch), batch)


def error_rate(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Returns 1 - accuracy, float32 `[]`.

    It is NaN where a logit is NaN, as of a network with a NaN among its weights, or where a label is of no class, as -1
    for an example without one.

    Args:
        logits: `[..., C]` of C classes, at least two.
        labels: the right classes, integers `[...]` from 0 to C - 1.

    Raises:
        ValueError: labels of another shape, such as one-hot labels `[..., C]` or `[..., 1]`, fewer than two classes, or
            no examples.
        TypeError: labels that are not integers.
    """
    if labels is None:
        raise TypeError("labels is None; expected integers")
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if labels.shape != logits.shape[:-1] or not labels.size or logits.shape[-1:] < (2,):
        raise ValueError(
            f"labels have shape {labels.shape} and logits {logits.shape}; expected [...] and [..., C] with one integer "
            "label an example and C of at least 2"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}; expected integers")
    wrong = (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)
    of_no_class = (labels < 0) | (labels >= logits.shape[-1])
    return jnp.mean(jnp.where(jnp.isnan(logits).any(axis=-1) | of_no_class, jnp.nan, wrong))


def entropy(logits: ArrayLike) -> jax.Array:
    """Returns the mean entropy of predictions in nats, `[]` in at least float32: an objective without labels.

    AdaMerging's (Yang et al., 2024, https://arxiv.org/abs/2310.02575). Where a logit is -inf, as of a masked class, the
    class adds 0.

    Args:
        logits: `[..., C]` of C classes.

    Raises:
        ValueError: logits without an axis of classes, or no examples.
    """
    logits = jnp.asarray(logits)
    if not (logits.ndim and logits.size):
        raise ValueError(f"logits have shape {logits.shape}; expected [..., C]")
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    # In place of 0 times -inf.
    finite = jnp.where(jnp.isneginf(log_probabilities), 0, log_probabilities)
    return -jnp.mean(jnp.sum(jnp.exp(log_probabilities) * finite, axis=-1))
