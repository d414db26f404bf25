"""Coefficients that need no learning, and the logits that start learning at given weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from glue_jax.checks import as_numbers, check_counts
from glue_jax.types import PyTree

__all__ = ["data_size_weights", "proxy_accuracy_weights", "uniform", "weights_to_logits"]


def uniform(num_experts: int) -> jax.Array:
    """Returns alpha = 1/K for each expert, float32 `[K]`. GLUE starts here (section 3.3 of the paper).

    Args:
        num_experts: K, the number of experts.

    Raises:
        ValueError: if `num_experts` is below 1.
        TypeError: if `num_experts` is no integer.
    """
    check_counts(num_experts=num_experts)
    return jnp.full((num_experts,), 1 / num_experts, jnp.float32)


def data_size_weights(sizes: ArrayLike) -> jax.Array:
    """Returns alpha_i proportional to n_i, the size of expert i's training set: the paper's Config 1.

    Args:
        sizes: the number of training examples of each expert, `[K]`.

    Returns:
        Coefficients on the simplex, float32 `[K]`.

    Raises:
        ValueError: if `sizes` is not `[K]`, if a size is negative or not finite, or if all sizes are 0.
        TypeError: if `sizes` holds no real numbers.

    Examples:
        >>> import glue_jax
        >>> glue_jax.coefficients.data_size_weights([2000, 6000])
        Array([0.25, 0.75], dtype=float32)
    """
    return _normalized("sizes", sizes)


def proxy_accuracy_weights(accuracies: ArrayLike) -> jax.Array:
    """Returns alpha_i proportional to Acc_i, expert i's accuracy on target validation data: the paper's Config 2.

    Args:
        accuracies: the accuracy of each expert, `[K]`, all as fractions or all in percent.

    Returns:
        Coefficients on the simplex, float32 `[K]`.

    Raises:
        ValueError: if `accuracies` is not `[K]`, if an accuracy is negative or not finite, or if all accuracies are 0.
        TypeError: if `accuracies` holds no real numbers.
    """
    return _normalized("accuracies", accuracies)


def weights_to_logits(weights: ArrayLike) -> jax.Array:
    """Returns the logits beta whose softmax is `weights`. The logits have mean zero.

    With it, learning can start anywhere inside the simplex: `init(..., beta=weights_to_logits(weights))`.

    Args:
        weights: positive coefficients, `[K]` or `[G, K]`. Each row sums to 1.

    Returns:
        The logits, float32, with the shape of `weights`.

    Raises:
        ValueError: if the weights are not inside the simplex. No logits give a weight of exactly 0. To start near the
            border, pass `0.99 * weights + 0.01 / K`.
        TypeError: if `weights` holds no real numbers.
    """
    array = as_numbers("weights", weights)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"weights have shape {array.shape}; expected [K] or [G, K]")
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(
            f"weights are {array.tolist()}; expected finite numbers above 0 (no softmax is exactly 0: start from "
            "0.99 * weights + 0.01 / K)"
        )
    if not np.allclose(array.sum(axis=-1), 1, rtol=0, atol=1e-4):
        raise ValueError(f"weights sum to {array.sum(axis=-1).tolist()}; expected 1")
    logits = np.log(array)
    return jnp.asarray(logits - logits.mean(axis=-1, keepdims=True), jnp.float32)


def check_floating(beta: PyTree, *, least_bits: int = 16) -> None:
    """Raises a TypeError, with the path, if a coefficient cannot be learned: it is not floating point, or too short.

    Args:
        beta: the coefficients.
        least_bits: the smallest number of bits of a coefficient. In 16 bits, most of a step is rounded away.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(beta):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or 8 * dtype.itemsize < least_bits:
            name, least = jax.tree_util.keystr(path), f" of at least {least_bits} bits" if least_bits > 16 else ""
            raise TypeError(f"beta{name} has dtype {dtype}; expected a floating-point dtype{least}")


def _normalized(name: str, values: Any) -> jax.Array:
    """Returns the values divided by their sum, float32 `[K]`."""
    array = as_numbers(name, values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} have shape {array.shape}; expected [K], one number for each expert")
    if not np.isfinite(array).all() or (array < 0).any() or not array.any():
        raise ValueError(
            f"{name} are {array.tolist()}; expected finite numbers, none of them negative and at least one positive"
        )
    # Divided first, so that the sum cannot overflow.
    array = array / array.max()
    return jnp.asarray(array / array.sum(), jnp.float32)
