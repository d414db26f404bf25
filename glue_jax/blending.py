"""The blend of stacked experts (Eq. 1), for every floating-point dtype, without a wider copy of the experts."""

import functools
import inspect
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from glue_jax.experts import num_experts, path_name
from glue_jax.types import MergeFn, Params, PyTree


def blend(
    experts: Params, alpha: ArrayLike, groups: PyTree | None = None, *, min_dtype: DTypeLike | None = None
) -> Params:
    """Blends stacked experts into one model: theta(alpha) = sum_i alpha_i theta_i (Eq. 1).

    Each leaf is summed in at least float32, and the sum is then cast to the dtype of the experts. Float32 and float64
    leaves take one `jnp.tensordot` at the highest precision. Leaves of bfloat16 and float16 are converted inside the
    sum, so no float32 copy of the experts is made. Leaves of integers or booleans are not summed: the result has the
    first expert's.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        alpha: the coefficients, `[K]`, or `[G, K]` with `groups`. They may be negative, and may have any sum.
        groups: which row of `alpha` blends which leaf. It is a pytree of row numbers in `range(G)` with the structure
            of one expert. It may also be a prefix of that structure. One row number then stands for a whole part of the
            model, and this row of `alpha` blends all leaves of the part.
        min_dtype: the narrowest dtype of the result. The steps and `learn` pass float32, because two nearby blends
            become mostly equal when they are cast to bfloat16. None casts every leaf to the dtype of the experts.

    Returns:
        The blended model, each leaf `[...]`.

    Raises:
        ValueError: if the shapes of `alpha`, `groups` and the experts do not fit.
        TypeError: if the coefficients are complex, or no array.

    Examples:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
        >>> glue_jax.blend(experts, jnp.array([0.25, 0.75]))["w"]
        Array([0.75, 0.75, 0.75], dtype=float32)
    """
    k = num_experts(experts)
    try:
        alpha = jnp.asarray(alpha)
    except (TypeError, ValueError) as error:
        raise TypeError(f"alpha is a {type(alpha).__name__}; expected one array of coefficients") from error
    expected = "[K]" if groups is None else "[G, K]"
    if alpha.ndim != (1 if groups is None else 2) or alpha.shape[-1] != k:
        raise ValueError(
            f"alpha has shape {alpha.shape}; expected {expected} with K = {k}, the experts' leading axis"
            + ("; to blend by rows, pass groups" if groups is None and alpha.ndim == 2 else "")
        )
    if jnp.iscomplexobj(alpha):
        raise TypeError(f"alpha has dtype {alpha.dtype}; expected real coefficients")
    leaves, treedef = jax.tree.flatten(experts)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    rows = None if groups is None else jax.tree.leaves(_broadcast_groups(groups, experts, num_groups=len(alpha)))
    blended = [None if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf[0] for leaf in leaves]
    floating = [index for index, leaf in enumerate(blended) if leaf is None]
    sums = _weighted_sums(
        [alpha if rows is None else alpha[rows[index]] for index in floating], [leaves[index] for index in floating]
    )
    for index, total in zip(floating, sums, strict=True):
        dtype = leaves[index].dtype
        blended[index] = total.astype(dtype if min_dtype is None else _wider(dtype, min_dtype))
    return jax.tree.unflatten(treedef, blended)


def merge_for_learning(merge_fn: MergeFn) -> MergeFn:
    """Returns `merge_fn` in the form that the steps and `learn` call: its result keeps at least float32.

    If `merge_fn` has a keyword `min_dtype`, as `blend` and a `functools.partial` of `blend` have, it is called with
    float32. The result of any other `merge_fn` is checked.

    Args:
        merge_fn: `merge_fn(experts, alpha) -> params`.

    Returns:
        The function. It raises a ValueError, with the path, if a leaf has fewer bits than float32. It accepts a short
        leaf that `merge_fn` takes unchanged from the experts.
    """
    words = {"min_dtype": jnp.float32} if _takes_min_dtype(merge_fn) else {}

    def merge(experts: Params, alpha: PyTree) -> Params:
        params = merge_fn(experts, alpha, **words)
        given = {id(leaf) for leaf in jax.tree.leaves(experts)}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            # A leaf that depends on alpha is traced, and is not one of the given leaves.
            if isinstance(leaf, Tracer) and id(leaf) not in given and is_short(leaf.dtype):
                raise ValueError(
                    f"merge_fn returned {leaf.dtype} at {path_name(path)}; expected at least float32 while the "
                    "coefficients are learned, because two nearby blends are mostly equal in fewer bits. Inside "
                    "merge_fn, pass min_dtype=jnp.float32 to glue_jax.blend, and cast the finished model. If the leaf "
                    "does not depend on alpha, widen it by .astype(jnp.float32)"
                )
        return params

    return merge


def is_short(dtype: DTypeLike) -> bool:
    """Returns whether a dtype is floating point with fewer bits than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


@jax.jit
def _weighted_sums(alphas: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
    """Returns Eq. (1) for each leaf `[K, ...]` and its coefficients `[K]`, in at least float32.

    It is jitted, because outside `jit` a choice by platform would compile anew at every call.
    """

    def of_each(one: Any, alphas: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
        return [one(alpha.astype(_wider(leaf.dtype)), leaf) for alpha, leaf in zip(alphas, leaves, strict=True)]

    return jax.lax.platform_dependent(
        alphas,
        leaves,
        cpu=functools.partial(of_each, _weighted_sum_on_cpu),
        default=functools.partial(of_each, _weighted_sum),
    )


def _weighted_sum(alpha: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns Eq. (1) for one leaf on an accelerator.

    A matrix product would round a short leaf, or would need a wide copy of it. So a short leaf is multiplied and added,
    which takes one loop over the leaf.
    """
    if is_short(leaf.dtype):
        return jnp.sum(jnp.expand_dims(alpha, tuple(range(1, leaf.ndim))) * leaf.astype(alpha.dtype), axis=0)
    return jnp.tensordot(alpha, leaf, axes=1, precision=jax.lax.Precision.HIGHEST, preferred_element_type=leaf.dtype)


def _weighted_sum_on_cpu(alpha: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns Eq. (1) for one leaf in a form that XLA:CPU runs fast, and differentiates fast.

    A wide leaf is reshaped to a matrix, because the derivative of a product with more than two axes would transpose the
    whole leaf. The experts of a short leaf are added one after another. The barrier ties the leaf to the expert's
    number. Without it XLA would move the widening of the whole leaf out of the loop.
    """
    if not is_short(leaf.dtype):
        return _weighted_sum(alpha, leaf.reshape(len(leaf), -1)).reshape(leaf.shape[1:])

    @jax.checkpoint
    def add(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        weight, expert = at
        tied, expert = jax.lax.optimization_barrier((leaf, expert))
        part = jax.lax.dynamic_index_in_dim(tied, expert, keepdims=False)
        return total + weight * part.astype(weight.dtype), None

    return jax.lax.scan(add, jnp.zeros(leaf.shape[1:], alpha.dtype), (alpha, jnp.arange(len(leaf))))[0]


def _wider(dtype: DTypeLike, least: DTypeLike = jnp.float32) -> DTypeLike:
    """Returns the wider of two real floating-point dtypes, or a complex dtype unchanged if it is wide enough."""
    return least if jnp.finfo(dtype).bits < jnp.finfo(least).bits else dtype


def _takes_min_dtype(merge_fn: MergeFn) -> bool:
    """Returns whether a merge has a keyword `min_dtype` that is still None."""
    try:
        parameter = inspect.signature(merge_fn).parameters.get("min_dtype")
    except ValueError:
        return False
    return parameter is not None and parameter.default is None


def _broadcast_groups(groups: PyTree, experts: Params, *, num_groups: int) -> PyTree:
    """Returns the row of each leaf as an int, checked."""
    try:
        rows = jax.tree.broadcast(groups, experts)
    except ValueError as error:
        advice = "pass groups.rows" if hasattr(groups, "rows") else "expected a prefix of the experts' tree"
        raise ValueError(f"groups does not fit; {advice}: {error}") from error

    def checked(path: tuple[Any, ...], row: Any) -> int:
        try:
            number = operator.index(row)
        except TypeError as error:
            raise ValueError(f"groups holds {row!r} at {path_name(path)}; expected a row number") from error
        if isinstance(row, bool) or not 0 <= number < num_groups:
            raise ValueError(
                f"groups holds row {row} at {path_name(path)}; expected one of the {num_groups} rows of alpha"
            )
        return number

    return jax.tree_util.tree_map_with_path(checked, rows)
