"""Coefficients that need no learning, and the way between weights and logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from glue_jax.checks import as_numbers, check_counts
from glue_jax.types import PyTree


def uniform(num_experts: int) -> jax.Array:
    """Returns alpha = 1/K for each expert, float32 `[K]`: where GLUE starts (section 3.3 of the paper).

    Raises:
        ValueError: `num_experts` below 1.
    """
    check_counts(num_experts=num_experts)
    return jnp.full((num_experts,), 1 / num_experts, jnp.float32)


def data_size_weights(sizes: ArrayLike) -> jax.Array:
    """Returns alpha_i proportional to n_i, the size of expert i's training set: Config 1 of the paper.

    Args:
        sizes: the number of training examples of each expert, `[K]`.

    Returns:
        Coefficients on the simplex, float32 `[K]`.

    Raises:
        ValueError: sizes that are not a `[K]` of finite numbers, none negative and one at least positive.

    Example:
        >>> import glue_jax
        >>> glue_jax.coefficients.data_size_weights([2000, 6000])
        Array([0.25, 0.75], dtype=float32)
    """
    return _normalized("sizes", sizes)


def proxy_accuracy_weights(accuracies: ArrayLike) -> jax.Array:
    """Returns alpha_i proportional to Acc_i, expert i's accuracy on target validation data: Config 2 of the paper.

    Args:
        accuracies: the accuracy of each expert, `[K]`, as fractions or in percent.

    Returns:
        Coefficients on the simplex, float32 `[K]`.

    Raises:
        ValueError: accuracies that are not a `[K]` of finite numbers, none negative and one at least positive.
    """
    return _normalized("accuracies", accuracies)


def weights_to_logits(weights: ArrayLike) -> jax.Array:
    """Returns the logits beta with mean zero whose softmax is `weights`: a start anywhere inside the simplex.

    Args:
        weights: coefficients, `[K]` or `[G, K]`, positive, each row with sum 1.

    Returns:
        beta of the shape of `weights`, float32: `init(..., beta=weights_to_logits(weights))` starts there.

    Raises:
        ValueError: weights that are not inside the simplex. A softmax reaches its border only in the limit: start
            from `0.99 * weights + 0.01 / K` there.
    """
    array = as_numbers("weights", weights)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"weights have shape {array.shape}; expected [K] or [G, K]")
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(
            f"weights are {array.tolist()}; expected finite numbers above 0 (a softmax reaches 0 only in the limit: "
            "start from 0.99 * weights + 0.01 / K)"
        )
    if not np.allclose(array.sum(axis=-1), 1, rtol=0, atol=1e-4):
        raise ValueError(f"weights sum to {array.sum(axis=-1).tolist()}; expected 1")
    logits = np.log(array)
    return jnp.asarray(logits - logits.mean(axis=-1, keepdims=True), jnp.float32)


def check_floating(beta: PyTree) -> None:
    """Raises a TypeError, by path, where coefficients are not floating point and so cannot be learned."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(beta):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path)
            raise TypeError(f"beta{name} has dtype {jnp.result_type(leaf)}; expected a floating-point dtype")


def _normalized(name: str, values: Any) -> jax.Array:
    """The values over their sum, float32 `[K]`."""
    array = as_numbers(name, values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} have shape {array.shape}; expected [K], one number for each expert")
    if not np.isfinite(array).all() or (array < 0).any() or not array.any():
        raise ValueError(
            f"{name} are {array.tolist()}; expected finite numbers, none negative and one at least positive"
        )
    array = array / array.max()  # So that the sum is finite.
    return jnp.asarray(array / array.sum(), jnp.float32)
