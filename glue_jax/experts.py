"""Experts as one pytree with a leading axis K, and their blend (Eq. 1)."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glue_jax.types import Params, PyTree


def stack_experts(experts: Sequence[Params], *, take_first: Sequence[str] = ()) -> Params:
    """Stacks K experts of one architecture into one pytree whose leaves are `[K, ...]`.

    Leaves that are not floating point (counters, masks) are never averaged: the experts must agree on them, or
    they must be named in `take_first`.

    Args:
        experts: K pytrees of one structure, with leaves of the same shapes and dtypes.
        take_first: leaves that are not floating point and may differ; the first expert's are kept. Each entry is
            a whole path as the errors print it (`"['bn']['num_batches_tracked']"`) or one key of a path
            (`"num_batches_tracked"`), which names every leaf below it.

    Returns:
        The experts as one pytree, each leaf `[K, ...]`.

    Raises:
        ValueError: experts that differ, with every difference by its path; an entry of `take_first` that names no
            leaf or a floating-point one.
        TypeError: a leaf that is no array, or a PRNG key.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
        >>> experts["w"].shape
        (2, 3)
    """
    if not experts:
        raise ValueError("stack_experts got no experts: expected a sequence of at least one pytree")
    flattened = [jax.tree_util.tree_flatten_with_path(expert) for expert in experts]
    trees = [_checked_leaves(index, leaves) for index, (leaves, _) in enumerate(flattened)]
    first, (first_leaves, treedef) = trees[0], flattened[0]
    if not first:
        raise ValueError("the experts hold no arrays: expected pytrees with at least one leaf")
    kept = _resolve_take_first(first_leaves, take_first)

    differences = []
    for index, (leaves, (_, other_treedef)) in enumerate(zip(trees, flattened, strict=True)):
        found = [f"has no {path}" for path in first if path not in leaves]
        found += [f"has {path}, which expert 0 lacks" for path in leaves if path not in first]
        found += [
            f"at {path}: {difference}"
            for path, leaf in leaves.items()
            if path in first and (difference := _difference(first[path], leaf, kept=path in kept))
        ]
        if not found and other_treedef != treedef:
            found = [f"in the types of its containers: {other_treedef} against {treedef}"]
        differences += [f"expert {index} differs from expert 0 {text}" for text in found]
    if differences:
        raise ValueError("\n".join(differences))

    stacked = [jnp.stack([(first if path in kept else tree)[path] for tree in trees]) for path in first]
    return jax.tree.unflatten(treedef, stacked)


def num_experts(experts: Params) -> int:
    """Returns K, the leading axis that every leaf of stacked experts shares.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.

    Raises:
        ValueError: no leaves, a leaf without a leading axis, or leading axes that differ, by path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(experts)
    if not leaves:
        raise ValueError("the experts hold no arrays: expected a pytree with leaves [K, ...]")
    first_path, first_leaf = leaves[0]
    for path, leaf in leaves:
        if np.ndim(leaf) == 0 or leaf.shape[0] != first_leaf.shape[0]:
            raise ValueError(
                f"the experts are not stacked: {_name(path)} has shape {np.shape(leaf)} and "
                f"{_name(first_path)} has shape {np.shape(first_leaf)}; expected a common leading axis K "
                "(see stack_experts)"
            )
    return first_leaf.shape[0]


def blend(experts: Params, alpha: jax.typing.ArrayLike, groups: PyTree | None = None) -> Params:
    """Blends stacked experts into one model: theta(alpha) = sum_i alpha_i theta_i (Eq. 1).

    One `jnp.tensordot` a leaf, accumulated in at least float32 with the highest precision (so that the two probes
    of SPSA, which differ by little, are not rounded together on an accelerator), then cast to the expert's dtype.
    Leaves that are not floating point are the first expert's.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        alpha: the coefficients, `[K]`, or `[G, K]` with `groups`. They need not lie on the simplex.
        groups: a pytree of row numbers in `range(G)`, of the experts' structure or a prefix of it: the row of
            `alpha` that blends a leaf. A part of the model whose row is `g` is blended by `alpha[g]`.

    Returns:
        The blended model, each leaf `[...]` in the expert's dtype.

    Raises:
        ValueError: shapes of `alpha`, `groups` and the experts that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
        >>> glue_jax.blend(experts, jnp.array([0.25, 0.75]))["w"]
        Array([0.75, 0.75, 0.75], dtype=float32)
    """
    k = num_experts(experts)
    alpha = jnp.asarray(alpha)
    expected = "[K]" if groups is None else "[G, K]"
    if alpha.ndim != (1 if groups is None else 2) or alpha.shape[-1] != k:
        raise ValueError(
            f"alpha has shape {alpha.shape}; expected {expected} with K = {k}, the experts' leading axis"
            + ("; pass groups to blend by rows" if groups is None and alpha.ndim == 2 else "")
        )
    if groups is None:
        return jax.tree.map(lambda leaf: _blend_leaf(alpha, leaf), experts)
    rows = _broadcast_groups(groups, experts, num_groups=alpha.shape[0])
    return jax.tree.map(lambda leaf, row: _blend_leaf(alpha[row], leaf), experts, rows)


def _checked_leaves(index: int, leaves: list[tuple[Any, Any]]) -> dict[str, np.ndarray | jax.Array]:
    """The leaves of one expert by path, as arrays; refuses what cannot be stacked."""
    arrays = {}
    for path, leaf in leaves:
        name = _name(path)
        if not isinstance(leaf, bool | int | float | complex) and not hasattr(leaf, "__array__"):
            raise TypeError(f"expert {index} holds a {type(leaf).__name__} at {name}; expected arrays alone")
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"expert {index} holds a PRNG key at {name}, which cannot be blended: split off the parameters and "
                "the batch statistics, and stack those"
            )
        arrays[name] = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)  # pyright: ignore[reportArgumentType]
    return arrays


def _resolve_take_first(leaves: list[tuple[Any, Any]], take_first: Sequence[str]) -> set[str]:
    """The paths that `take_first` names."""
    if isinstance(take_first, str):
        raise TypeError(f"take_first is the string {take_first!r}; expected a sequence of paths")
    names = {_name(path): {jax.tree_util.keystr((key,), simple=True) for key in path} for path, _ in leaves}
    averaged = {_name(path) for path, leaf in leaves if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)}
    kept = set()
    for entry in take_first:
        named = {name for name, keys in names.items() if entry == name or entry in keys}
        if not named:
            raise ValueError(f"take_first names {entry!r}, but no leaf is there; the paths are {list(names)}")
        if wrong := sorted(named & averaged):
            raise ValueError(f"take_first names {entry!r}, but floating-point leaves are blended, not taken: {wrong}")
        kept |= named
    return kept


def _difference(first: Any, other: Any, *, kept: bool) -> str | None:
    """What keeps two leaves from being stacked, or None."""
    if first.shape != other.shape:
        return f"{other.shape} against {first.shape}"
    if first.dtype != other.dtype:
        return f"{other.dtype} against {first.dtype}"
    if kept or jnp.issubdtype(first.dtype, jnp.inexact) or np.array_equal(first, other):
        return None
    values = f" ({other} against {first})" if first.size == 1 else ""
    return (
        f"different {first.dtype} values{values}; only floating-point leaves are averaged, so name the path in "
        "take_first to keep expert 0's"
    )


def _blend_leaf(alpha: jax.Array, leaf: jax.Array) -> jax.Array:
    """Eq. (1) for one leaf."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf[0]
    blended = jnp.tensordot(
        alpha,
        leaf,
        axes=1,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(leaf.dtype, jnp.float32),
    )
    return blended.astype(leaf.dtype)


def _broadcast_groups(groups: PyTree, experts: Params, *, num_groups: int) -> PyTree:
    """The row of each leaf as an int, checked."""
    try:
        rows = jax.tree.broadcast(groups, experts)
    except ValueError as error:
        raise ValueError(f"groups is no prefix of the experts' tree: {error}") from error

    def checked(path: tuple[Any, ...], row: Any) -> int:
        try:
            number = operator.index(row)
        except TypeError as error:
            raise ValueError(f"groups holds {row!r} at {_name(path)}; expected a row number") from error
        if not 0 <= number < num_groups:
            raise ValueError(
                f"groups holds row {number} at {_name(path)}; expected one of the {num_groups} rows of alpha"
            )
        return number

    return jax.tree_util.tree_map_with_path(checked, rows)


def _name(path: tuple[Any, ...]) -> str:
    """A path as errors print it."""
    return jax.tree_util.keystr(path) or "the root"
