"""`stack_experts` and `num_experts`: K experts as one pytree whose leaves have a leading axis K."""

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

    Leaves of integers or booleans, such as counters and masks, are never averaged. The experts must agree on them, or
    `take_first` must name them. To save memory, pass a generator that yields one expert after another, and keeps no
    reference to an expert. The call then stacks the experts leaf by leaf, and frees the experts' leaves once they are
    stacked. So it needs memory for the stack and one leaf. With a list it needs memory for all experts and the stack.

    Args:
        experts: K pytrees of one structure, whose leaves have the same shapes and dtypes. A leaf is a number, an array
            of JAX or NumPy, or another array that has `__array__`.
        take_first: names leaves of integers or booleans in which the experts may differ. The stack keeps the first
            expert's values. An entry is a regular expression for paths (`glue_jax.paths`), such as
            `"num_batches_tracked$"`, or a path as errors print it.
        sharding: the place of the stack: a `jax.sharding.Sharding` of the stacked leaves, or a pytree of shardings
            whose structure is a prefix of an expert's. With None it is JAX's default.

    Returns:
        The experts as one pytree, each leaf `[K, ...]`.

    Raises:
        ValueError: if experts differ; the error lists every difference with its path.
        ValueError: if a weight is infinite or NaN, or if a generator reuses the arrays of one expert for the next.
        ValueError: if an integer does not fit into the dtype in which JAX stores it.
        ValueError: if an entry of `take_first` matches no leaf, or matches a floating-point leaf.
        TypeError: if `experts` is a dict, which is a single expert, or if a leaf is a PRNG key or no array of numbers.

    Warns:
        UserWarning: if a leaf is float64. JAX stores it as float32 unless `jax_enable_x64` is set.

    Examples:
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
            if not isinstance(experts, Sequence):
                _check_memory(index, {path: column[-1] for path, column in columns.items()}, leaves)
            for path, leaf in leaves.items():
                columns[path].append(columns[path][0] if path in kept else leaf)
    if treedef is None:
        raise ValueError("stack_experts got no experts: expected at least one pytree")
    if differences:
        raise ValueError("\n".join(differences))
    # Frees the last expert of an iterator too.
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
    """Returns K, the length of the leading axis that all leaves of stacked experts share.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.

    Raises:
        ValueError: if there are no leaves, or if the leading axes are missing, empty or of different lengths; the error
            names the paths.
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
    """Returns a path of `jax.tree_util` in the form that errors print."""
    return jax.tree_util.keystr(path) or "the root"


def _as_array(index: int, path: tuple[Any, ...], leaf: Any) -> Any:
    """Returns a leaf of expert `index` as an array of JAX or NumPy. Refuses a leaf that cannot be stacked."""
    where = f"expert {index} holds a {type(leaf).__name__} at {path_name(path)}"
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{where}, whose mask would be lost: fill it first")
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"expert {index} holds a PRNG key at {path_name(path)}, which cannot be blended: split off the "
                "parameters and the batch statistics, and stack only these"
            )
        return leaf
    if isinstance(leaf, bool | int | float | complex):
        array = np.asarray(leaf)
        return array.astype(jax.dtypes.canonicalize_dtype(array.dtype)) if isinstance(leaf, float | complex) else array
    if not hasattr(leaf, "__array__"):
        raise TypeError(f"{where}; expected only arrays")
    try:
        array = np.asarray(leaf)
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(
            f"{where}, which NumPy cannot read ({error}). For a PyTorch tensor, pass tensor.detach().cpu().numpy(); if "
            "it is bfloat16, pass tensor.detach().cpu().float().numpy().astype(jnp.bfloat16)"
        ) from error
    if not (jnp.issubdtype(array.dtype, jnp.number) or jnp.issubdtype(array.dtype, jnp.bool_)):
        raise TypeError(f"{where} of dtype {array.dtype}; expected numbers")
    return array


def _check_memory(index: int, before: dict[str, Any], leaves: dict[str, Any]) -> None:
    """Refuses an expert in the memory of the expert before, which a generator has then overwritten.

    A leaf that experts share, such as a frozen one, is no reason.
    """
    pairs = [(leaf, before[path]) for path, leaf in leaves.items() if leaf.size]
    arrays = [pair for pair in pairs if all(isinstance(leaf, np.ndarray) for leaf in pair)]
    if pairs and len(arrays) == len(pairs) and all(np.shares_memory(*pair) for pair in arrays):
        raise ValueError(
            f"expert {index} lies in the memory of expert {index - 1}; expected a generator that yields a copy of each "
            "expert, such as array.copy() of each leaf"
        )


def _resolve_take_first(
    paths: Sequence[tuple[Any, ...]], leaves: dict[str, Any], take_first: str | Sequence[str]
) -> set[str]:
    """Returns the names of the leaves that `take_first` matches."""
    slashed_paths = {path_name(path): slashed(path) for path in paths}
    kept = set()
    for entry in (take_first,) if isinstance(take_first, str) else take_first:
        found = {entry} & leaves.keys()
        if not found:
            expression = compiled("an entry of take_first", entry)
            found = {name for name, path in slashed_paths.items() if expression.search(path)}
        if not found:
            raise ValueError(
                f"take_first has {entry!r}, which matches no path; the paths are {[*slashed_paths.values()]}"
            )
        if wrong := sorted(name for name in found if jnp.issubdtype(leaves[name].dtype, jnp.inexact)):
            raise ValueError(f"take_first has {entry!r}, but floating-point leaves are blended, not taken: {wrong}")
        kept |= found
    return kept


def _differences(first: dict[str, Any], other: dict[str, Any], kept: set[str]) -> list[str]:
    """Returns the differences that keep two experts from being stacked."""
    found = [f"in that it has no {path}" for path in first if path not in other]
    found += [f"in that it has {path}, which expert 0 lacks" for path in other if path not in first]
    return found + [
        f"at {path}: {difference}"
        for path, leaf in other.items()
        if path in first and (difference := _difference(first[path], leaf, kept=path in kept))
    ]


def _difference(first: Any, other: Any, *, kept: bool) -> str | None:
    """Returns the difference that keeps two leaves from being stacked, or None."""
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


def place_leaf(path: str, stacked: np.ndarray, sharding: Any) -> jax.Array:
    """Returns one leaf of all experts, `[K, ...]`, from the host to its place, in the dtype that JAX has for it.

    Raises:
        ValueError: if an integer does not fit into the dtype in which JAX stores it.

    Warns:
        UserWarning: if a leaf is float64, and JAX stores it as float32.
    """
    dtype = stacked.dtype
    stored = jax.dtypes.canonicalize_dtype(dtype)
    if stored != dtype:
        converted = stacked.astype(stored)
        if jnp.issubdtype(dtype, jnp.inexact):
            warnings.warn(
                f"{dtype} leaves are stored as {stored}: set jax_enable_x64 to keep their dtype, or cast the experts",
                stacklevel=4,
            )
        elif not np.array_equal(converted, stacked):
            raise ValueError(
                f"{path} has {dtype} values that JAX's {stored} does not hold; set jax_enable_x64, or drop the leaf"
            )
        stacked = converted
    # Nobody else has the array, so a CPU may take it as it is.
    return jax.device_put(stacked, sharding, may_alias=True)


def _stacked(path: str, column: Sequence[Any], sharding: Any) -> jax.Array:
    """Returns one leaf of all experts, `[K, ...]`, in its place."""
    if not any(isinstance(leaf, jax.Array) for leaf in column):
        return place_leaf(path, np.stack(column), sharding)
    stacked = jnp.stack(column)
    return stacked if sharding is None else jax.device_put(stacked, sharding)


def _broadcast(sharding: PyTree, treedef: Any) -> list[Any]:
    """Returns the sharding of each leaf, from a prefix of the tree."""
    like = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    return jax.tree.leaves(
        jax.tree.broadcast(sharding, like, is_leaf=lambda node: isinstance(node, jax.sharding.Sharding)),
        is_leaf=lambda node: isinstance(node, jax.sharding.Sharding),
    )
