"""Permutation alignment of experts by weight matching.

A network computes the same function when the units of a hidden layer change places, so experts from separate
initialisations have theirs in places of their own, and an average mixes units that have nothing to do with one another.
Weight matching (Ainsworth et al., 2023, Algorithms 1 and 3, https://arxiv.org/abs/2209.04836) finds, without data, the
permutations that bring experts' weights closest together.

What may be permuted is data, a `PermutationSpec` (`glue_jax.merging.permutation_specs`); `chain_spec` writes the one
of a plain chain of layers.

Where experts' heads differ, `partition` them off, align the rest by a spec without their paths, and `combine` the blend
with the head of the expert that the others were aligned to: its units kept their places, so that its head fits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from glue_jax.checks import check_counts, compiled
from glue_jax.experts import num_experts
from glue_jax.merging.permutation_specs import Layout, PermutationSpec
from glue_jax.paths import by_path, check_finite
from glue_jax.types import Params, PyTree

Permutations: TypeAlias = dict[str, np.ndarray]
"""By name, an int `[n]`: unit j comes from place `permutation[j]`."""


class Alignment(NamedTuple):
    """What `align_experts` found.

    Attributes:
        experts: each computes the function that it did before if the spec describes the network, leaves `[K, ...]`.
        permutations: of each expert.
    """

    experts: Params
    permutations: list[Permutations]


def permute(params: Params, spec: PermutationSpec, permutations: Mapping[str, np.ndarray]) -> Params:
    """Returns a model whose units changed places; it computes the same function.

    Args:
        params: one model.
        spec: what may be permuted.
        permutations: by name; those left out leave their units where they are.

    Raises:
        ValueError: a spec that does not fit the model, by path; a permutation that the spec does not name, or that is
            none.
    """
    layout = Layout(spec, params)
    layout.check(permutations)
    moved = [layout.permuted(path, leaf, permutations) for path, leaf in by_path(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), moved)


def align(
    params: Params,
    reference: Params,
    spec: PermutationSpec,
    *,
    ignore: str | None = "^batch_stats/",
    seed: int = 0,
    max_sweeps: int = 100,
) -> Permutations:
    """Returns the permutations that bring a model's weights closest to a reference's (Algorithm 1).

    Coordinate ascent over the permutations in random order, each an assignment problem, until none improves. It ends in
    a local optimum, so it is begun twice, and the better end kept: from all units as they are, and from a first pass
    through the network, in which each permutation is matched by the weights whose other ends are in their places.

    Args:
        params: the model to permute.
        reference: of its structure and shapes.
        spec: what may be permuted.
        ignore: a regular expression for paths of leaves that are permuted and not compared: BatchNorm statistics.
        seed: of the order.
        max_sweeps: over all permutations, at least 1.

    Returns:
        `permute(params, spec, permutations)` is close to `reference`.

    Raises:
        ValueError: a spec that does not fit the model, by path; a reference of other leaves or shapes; weights that are
            infinite or NaN, by argument and path; a permutation none of whose leaves is compared; `max_sweeps` below 1.
    """
    check_counts(max_sweeps=max_sweeps)
    check_counts(at_least=0, seed=seed)
    layout = Layout(spec, reference)
    ours, theirs = by_path(params), by_path(reference)
    for path in ours.keys() | theirs.keys():
        shapes = [np.shape(leaves[path]) if path in leaves else "no leaf" for leaves in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"params has {shapes[0]} at {path!r}, and reference {shapes[1]}: expected the same")
        if np.iscomplexobj(ours[path]) or np.iscomplexobj(theirs[path]):
            raise TypeError(f"params or reference is complex at {path!r}; expected real weights")
    check_finite("params", params)
    check_finite("reference", reference)
    compared = [path for path in ours if not (ignore and compiled("ignore", ignore).search(path))]
    if unseen := sorted(layout.sizes.keys() - {name for path in compared for name in layout.names(path)}):
        raise ValueError(f"ignore is {ignore!r}, which leaves no weights to match the permutations {unseen} by")

    def match(name: str, permutations: Permutations, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The inner products of each two units, all others being where the permutations put them; the assignment."""
        identity = np.arange(layout.sizes[name])
        gain = np.zeros((len(identity),) * 2)
        for path in paths:
            for axis, places in layout.places(path, name):
                moved = layout.permuted(
                    path,
                    ours[path],
                    {**permutations, name: identity},
                    elsewhere={name: permutations.get(name, identity)},
                    axis=axis,
                )
                gain += _units(theirs[path], axis, places) @ _units(moved, axis, places).T
        return gain, linear_sum_assignment(gain, maximize=True)[1]

    def first_pass() -> Permutations:
        permutations: Permutations = {}
        with_name = {name: [path for path in compared if layout.places(path, name)] for name in layout.sizes}

        def settled(name: str) -> list[str]:
            return [path for path in with_name[name] if layout.names(path) - {name} <= permutations.keys()]

        def share(name: str) -> float:
            weights = [sum(np.size(ours[path]) for path in paths) for paths in (settled(name), with_name[name])]
            return weights[0] / max(weights[1], 1)

        while remaining := sorted(layout.sizes.keys() - permutations.keys()):
            name = max(remaining, key=share)
            permutations[name] = match(name, permutations, settled(name) or with_name[name])[1]
        return permutations

    def ascend(permutations: Permutations) -> Permutations:
        order = np.random.default_rng(seed)
        for _ in range(max_sweeps):
            improved = False
            for name in order.permutation(sorted(permutations)):
                gain, found = match(name, permutations, compared)
                rows = np.arange(len(found))
                before, after = gain[rows, permutations[name]].sum(), gain[rows, found].sum()
                if after > before + 1e-6 * abs(before):
                    permutations[name], improved = found, True
            if not improved:
                break
        return permutations

    def closeness(permutations: Permutations) -> float:
        moved = {path: layout.permuted(path, ours[path], permutations) for path in compared}
        return sum(
            float(np.vdot(*(np.asarray(a, np.float64) for a in (theirs[path], leaf)))) for path, leaf in moved.items()
        )

    as_they_are = {name: np.arange(size) for name, size in layout.sizes.items()}
    return max((ascend(start) for start in (as_they_are, first_pass())), key=closeness)


def align_experts(
    experts: Params,
    spec: PermutationSpec,
    *,
    reference: int | None = 0,
    ignore: str | None = "^batch_stats/",
    seed: int = 0,
    max_rounds: int = 20,
    check_fn: Callable[[Params], PyTree] | None = None,
    tolerance: float = 1e-2,
) -> Alignment:
    """Aligns K experts, to one of them or to one another.

    A spec that does not describe the network changes what it computes, and its shapes may not tell. Pass a `check_fn`
    wherever a forward pass is at hand.

    Args:
        experts: stacked, each leaf `[K, ...]`.
        spec: what may be permuted.
        reference: the expert that all others are aligned to. None goes on from the alignment to the first: each in turn
            to the mean of the others, round after round until none moves (Algorithm 3, MergeMany).
        ignore: as for `align`.
        seed: of the orders.
        max_rounds: of aligning each to the mean of the others, at least 1.
        check_fn: `check_fn(params) -> outputs`, a pytree of arrays, such as the logits of some inputs in evaluation
            mode. It is called for each expert whose units changed places, before and after that. None checks nothing.
        tolerance: how far an output may move, relative to the largest.

    Raises:
        ValueError: a spec that does not fit, by path; a reference that is no expert's number; weights that are infinite
            or NaN, by expert and path; what else `align` refuses; an expert that computes something else than before,
            by `check_fn`; `max_rounds` below 1.
    """
    check_counts(max_rounds=max_rounds)
    check_counts(at_least=0, seed=seed)
    if reference is not None:
        check_counts(at_least=0, reference=reference)
    k = num_experts(experts)
    check_finite("experts", experts, stacked=True)
    models = [jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), experts) for index in range(k)]
    if reference is not None and reference not in range(k):
        raise ValueError(f"reference is {reference}; expected the number of one of {k} experts, or None")
    layout = Layout(spec, models[0])
    total = [{name: np.arange(size) for name, size in layout.sizes.items()} for _ in models]

    def move(index: int, target: Params) -> bool:
        found = align(models[index], target, spec, ignore=ignore, seed=seed)
        moved = any((permutation != np.arange(len(permutation))).any() for permutation in found.values())
        if moved:
            models[index] = permute(models[index], spec, found)
            total[index] = {name: total[index][name][permutation] for name, permutation in found.items()}
        return moved

    for index in set(range(k)) - {reference or 0}:
        move(index, models[reference or 0])
    if reference is None and k > 1:
        order = np.random.default_rng(seed)
        for _ in range(max_rounds):
            moved = [move(index, _mean_of_others(models, index)) for index in order.permutation(k)]
            if not any(moved):
                break
    if check_fn is not None:
        for index, permutations in enumerate(total):
            if any((permutation != np.arange(len(permutation))).any() for permutation in permutations.values()):
                before = jax.tree.map(lambda leaf, index=index: leaf[index], experts)
                _check_function(index, check_fn, before, models[index], tolerance)
    aligned = [
        leaf if path not in spec else (jnp.asarray if isinstance(leaf, jax.Array) else np.asarray)(np.stack(leaves))
        for (path, leaf), *leaves in zip(by_path(experts).items(), *map(jax.tree.leaves, models), strict=True)
    ]
    return Alignment(jax.tree.unflatten(jax.tree.structure(experts), aligned), total)


def _units(leaf: Any, axis: int, places: np.ndarray) -> np.ndarray:
    """The weights of each unit, `[n, ...]` flattened to `[n, weights]`."""
    return np.moveaxis(np.asarray(leaf, np.float64), axis, 0)[places].reshape(len(places), -1)


def _check_function(
    index: int, check_fn: Callable[[Params], PyTree], before: Params, after: Params, tolerance: float
) -> None:
    """Refuses an expert whose outputs changed with the places of its units."""
    outputs = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), check_fn(params)) for params in (before, after)]
    if not jax.tree.leaves(outputs):
        raise ValueError(f"check_fn returned {outputs[0]}; expected outputs of the model, arrays")
    for first, second in zip(*map(jax.tree.leaves, outputs), strict=True):
        change, size = np.abs(second - first).max(initial=0), np.abs(first).max(initial=0)
        if not change <= tolerance * size:
            raise ValueError(
                f"expert {index} computes something else after its units changed places: its outputs moved by "
                f"{change:.3g}, and the largest is {size:.3g}; expected at most {tolerance} of that, so the spec does "
                "not describe the network (has chain_spec the right kernel_layout?)"
            )


def _mean_of_others(models: list[Params], index: int) -> Params:
    """The mean of all models but one."""
    others = [model for number, model in enumerate(models) if number != index]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *others)
