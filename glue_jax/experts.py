"""Experts as one pytree with a leading axis K."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from glue_jax.checks import compiled
from glue_jax.paths import check_finite, slashed
from glue_jax.types import Params, PyTree


def stack_experts(
    experts: Iterable[Params], *, take_first: str | Sequence[str] = (), sharding: PyTree = None
) -> Params:
    """Stacks K experts of one architecture into one pytree whose leaves are `[K, ...]`.

    Leaves that are not floating point (counters, masks) are never averaged: the experts must agree on them, or
    they must be named in `take_first`. The stack is filled leaf by leaf. An iterator that yields expert after expert
    and keeps none of them needs memory for the stack and one leaf; a list needs it for the experts and the stack.

    Args:
        experts: K pytrees of one structure, with leaves of the same shapes and dtypes: arrays of JAX or NumPy, or
            what `np.asarray` takes.
        take_first: leaves that are not floating point and may differ; the first expert's are kept. Each entry is a
            regular expression for their paths (`glue_jax.paths`), as `"num_batches_tracked$"`, or a path as errors
            print it.
        sharding: where the stack goes: a `jax.sharding.Sharding` of the stacked leaves, or a pytree of them, a prefix
            of an expert's. None is JAX's default.

    Returns:
        The experts as one pytree, each leaf `[K, ...]`.

    Raises:
        ValueError: experts that differ, with every difference by its path; weights that are infinite or not a
            number; integers that JAX's dtype does not hold; an entry of `take_first` that finds no leaf, or a
            floating-point one.
        TypeError: experts that are one pytree, a leaf that is no array of numbers, or a PRNG key.

    Warns:
        UserWarning: float64 leaves, which JAX stores as float32 unless `jax_enable_x64` is set.

    Example:
        >>> import jax.numpy as jnp
        >>> import glue_jax
        >>> experts = glue_jax.stack_experts([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
        >>> experts["w"].shape
        (2, 3)
    """
    if isinstance(experts, Mapping):
        raise TypeError(
            f"experts is a {type(experts).__name__}; expected an iterable of K pytrees, one for each expert"
        )
    columns: dict[str, list[Any]] = {}
    paths, treedef, kept = [], None, set()
    differences: list[str] = []
    for index, expert in enumerate(experts):
        flat, own_treedef = jax.tree_util.tree_flatten_with_path(expert)
        leaves = {path_name(path): _as_array(index, path, leaf) for path, leaf in flat}
        if treedef is None:
            if not leaves:
                raise ValueError("the experts hold no arrays: expected pytrees with at least one leaf")
            treedef, paths = own_treedef, [path for path, _ in flat]
            kept = _resolve_take_first(paths, leaves, take_first)
            columns = {path: [leaf] for path, leaf in leaves.items()}
            continue
        found = _differences({path: column[0] for path, column in columns.items()}, leaves, kept)
        if not found and own_treedef != treedef:
            found = [f"in the types of its containers: {own_treedef} against {treedef}"]
        differences += [f"expert {index} differs from expert 0 {text}" for text in found]
        if not differences:
            for path, leaf in leaves.items():
                columns[path].append(columns[path][0] if path in kept else leaf)
    if treedef is None:
        raise ValueError("stack_experts got no experts: expected at least one pytree")
    if differences:
        raise ValueError("\n".join(differences))
    # The last of an iterator's experts is freed with the others.
    expert = flat = leaves = None
    shardings = [None] * len(paths) if sharding is None else _broadcast(sharding, treedef)
    stacked = []
    for (path, column), place in zip(columns.items(), shardings, strict=True):
        stacked.append(_stacked(path, column, place))
        column.clear()
    result = jax.tree.unflatten(treedef, stacked)
    check_finite("experts", result, stacked=True)
    return result


def num_experts(experts: Params) -> int:
    """Returns K, the leading axis that every leaf of stacked experts shares.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.

    Raises:
        ValueError: no leaves, a leaf without a leading axis, leading axes that differ, by path, or of length 0.
    """
    leaves = jax.tree_util.tree_leaves_with_path(experts)
    if not leaves:
        raise ValueError("the experts hold no arrays: expected a pytree with leaves [K, ...]")
    first_path, first_leaf = leaves[0]
    for path, leaf in leaves:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != np.shape(first_leaf)[0]:
            raise ValueError(
                f"the experts are not stacked: {path_name(path)} has shape {np.shape(leaf)} and "
                f"{path_name(first_path)} has shape {np.shape(first_leaf)}; expected a common leading axis K "
                "(see stack_experts)"
            )
    if not np.shape(first_leaf)[0]:
        raise ValueError(f"{path_name(first_path)} has shape {np.shape(first_leaf)}; expected at least one expert")
    return np.shape(first_leaf)[0]


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a path of `jax.tree_util` as errors print it."""
    return jax.tree_util.keystr(path) or "the root"


def _as_array(index: int, path: tuple[Any, ...], leaf: Any) -> Any:
    """A leaf of expert `index` as an array of JAX or NumPy; refuses what cannot be stacked."""
    where = f"expert {index} holds a {type(leaf).__name__} at {path_name(path)}"
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{where}, whose mask would be lost: fill it first")
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"expert {index} holds a PRNG key at {path_name(path)}, which cannot be blended: split off the "
                "parameters and the batch statistics, and stack those"
            )
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        array = np.asarray(leaf)
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype)) if isinstance(leaf, float | complex) else array
    if not hasattr(leaf, "__array__"):
        raise TypeError(f"{where}; expected arrays alone")
    try:
        array = np.asarray(leaf)
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(
            f"{where}, which NumPy cannot read ({error}); of a PyTorch tensor pass tensor.detach().cpu().numpy(), of a "
            "bfloat16 one tensor.detach().cpu().float().numpy().astype(jnp.bfloat16)"
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.bool_)):
        raise TypeError(f"{where} of dtype {array.dtype}; expected numbers")
    return array


def _resolve_take_first(
    paths: Sequence[tuple[Any, ...]], leaves: dict[str, Any], take_first: str | Sequence[str]
) -> set[str]:
    """The names of the leaves that `take_first` finds."""
    slashed_paths = {path_name(path): slashed(path) for path in paths}
    kept = set()
    for entry in (take_first,) if isinstance(take_first, str) else take_first:
        found = {entry} & leaves.keys()
        if not found:
            expression = compiled("an entry of take_first", entry)
            found = {name for name, path in slashed_paths.items() if expression.search(path)}
        if not found:
            raise ValueError(f"take_first has {entry!r}, which finds no leaf of {list(slashed_paths.values())}")
        if wrong := sorted(name for name in found if jnp.issubdtype(leaves[name].dtype, jnp.inexact)):
            raise ValueError(f"take_first has {entry!r}, but floating-point leaves are blended, not taken: {wrong}")
        kept |= found
    return kept


def _differences(first: dict[str, Any], other: dict[str, Any], kept: set[str]) -> list[str]:
    """What keeps two experts from being stacked."""
    found = [f"in that it has no {path}" for path in first if path not in other]
    found += [f"in that it has {path}, which expert 0 lacks" for path in other if path not in first]
    return found + [
        f"at {path}: {difference}"
        for path, leaf in other.items()
        if path in first and (difference := _difference(first[path], leaf, kept=path in kept))
    ]


def _difference(first: Any, other: Any, *, kept: bool) -> str | None:
    """What keeps two leaves from being stacked, or None."""
    if first.shape != other.shape:
        return f"{other.shape} against {first.shape}"
    if first.dtype != other.dtype:
        return f"{other.dtype} against {first.dtype}"
    if kept or jnp.issubdtype(first.dtype, jnp.inexact):
        return None
    advice = "only floating-point leaves are averaged, so name the path in take_first to keep expert 0's"
    if isinstance(first, Tracer) or isinstance(other, Tracer):
        return f"{first.dtype} values that are traced, and cannot be compared under jit; {advice}"
    if np.array_equal(first, other):
        return None
    values = f" ({other} against {first})" if first.size == 1 else ""
    return f"different {first.dtype} values{values}; {advice}"


def _stacked(path: str, column: Sequence[Any], sharding: Any) -> jax.Array:
    """One leaf of all experts, `[K, ...]`, in its place."""
    dtype = column[0].dtype
    stored = jax.dtypes.canonicalize_dtype(dtype)
    if any(isinstance(leaf, jax.Array) for leaf in column):
        stacked = jnp.stack(column)
    else:
        on_host = np.stack(column)
        stacked = on_host.astype(stored, copy=False)
        if jnp.issubdtype(dtype, jnp.integer) and not np.array_equal(stacked, on_host):
            raise ValueError(
                f"{path} has {dtype} values that JAX's {stored} does not hold; set jax_enable_x64, or leave it out"
            )
    if stored != dtype and jnp.issubdtype(dtype, jnp.inexact):
        warnings.warn(
            f"{path} is stored as {stored}, not as {dtype}: set jax_enable_x64 to keep it, or cast the experts",
            stacklevel=3,
        )
    return jnp.asarray(stacked) if sharding is None else jax.device_put(stacked, sharding)


def _broadcast(sharding: PyTree, treedef: Any) -> list[Any]:
    """The sharding of each leaf, from a prefix of the tree."""
    like = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return jax.tree.leaves(
        jax.tree.broadcast(sharding, like, is_leaf=lambda node: isinstance(node, jax.sharding.Sharding)),
        is_leaf=lambda node: isinstance(node, jax.sharding.Sharding),
    )
