"""Permutation alignment: `align`, `align_experts` and `permute` put the hidden units of experts into one order.

A network computes the same function when the units of a hidden layer change places. So two experts from separate
initialisations have their units in different orders, and their average mixes unrelated units. Weight matching finds the
permutations that bring the weights of experts closest together (Ainsworth et al., 2023, Algorithms 1 and 3,
https://arxiv.org/abs/2209.04836). It needs no data.

A `PermutationSpec` says which axes may be permuted (`glue_jax.merging.permutation_specs`). `chain_spec` writes it for a
plain chain of layers.

If the experts have different heads, split the heads off with `partition`. Align the rest, with a spec that does not
have the paths of the heads, and with `reference=0`. Then `combine` the blend with the head of expert 0. This head fits,
because the units of expert 0 did not move.
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
"""For each permutation's name, an int array `[n]`. Unit j comes from place `permutation[j]`."""


class Alignment(NamedTuple):
    """The result of `align_experts`.

    Attributes:
        experts: the permuted experts, leaves `[K, ...]`. Each computes the same function as before, if the spec
            describes the network.
        permutations: the permutations of each expert.
    """

    experts: Params
    permutations: list[Permutations]


def permute(params: Params, spec: PermutationSpec, permutations: Mapping[str, np.ndarray]) -> Params:
    """Returns a model whose units have changed places. It computes the same function.

    Args:
        params: one model.
        spec: the axes that may be permuted.
        permutations: the permutations by name. Units of a name that is missing stay where they are.

    Returns:
        The model, with NumPy arrays as leaves.

    Raises:
        ValueError: if the spec does not fit the model; the error names the path.
        ValueError: if `permutations` has a name that the spec does not have.
        ValueError: if a permutation does not hold each index once.
        TypeError: if `spec` or `permutations` is no mapping.
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

    The method improves one permutation at a time, in random order, until none improves. Each improvement solves an
    assignment problem. The method ends in a local optimum, so it runs twice and keeps the better result. The first run
    starts with all units in their places. The second run starts with a pass through the network: it matches each
    permutation by the weights whose other ends have been matched already.

    Args:
        params: the model to permute.
        reference: a model of the same structure and shapes.
        spec: the axes that may be permuted.
        ignore: a regular expression for the paths of leaves that are permuted but not compared, such as BatchNorm
            statistics. None compares all leaves.
        seed: the seed of the random order.
        max_sweeps: the largest number of sweeps over all permutations, at least 1.

    Returns:
        The permutations. `permute(params, spec, permutations)` is close to `reference`.

    Raises:
        ValueError: if the spec does not fit the model, if the leaves or shapes of the reference differ, or if weights
            are infinite or NaN; the error names the path.
        ValueError: if `ignore` leaves no weights to match a permutation by.
        ValueError: if `max_sweeps` is below 1.
        TypeError: if weights are complex, or if an argument has the wrong type.
    """
    check_counts(max_sweeps=max_sweeps)
    check_counts(at_least=0, seed=seed)
    layout = Layout(spec, reference)
    ours, theirs = by_path(params), by_path(reference)
    for path in ours.keys() | theirs.keys():
        shapes = [np.shape(leaves[path]) if path in leaves else "no leaf" for leaves in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"params has {shapes[0]} at {path!r}, and reference has {shapes[1]}; expected the same")
        if np.iscomplexobj(ours[path]) or np.iscomplexobj(theirs[path]):
            raise TypeError(f"params or reference is complex at {path!r}; expected real weights")
    check_finite("params", params)
    check_finite("reference", reference)
    compared = [path for path in ours if not (ignore and compiled("ignore", ignore).search(path))]
    if unseen := sorted(layout.sizes.keys() - {name for path in compared for name in layout.names(path)}):
        raise ValueError(f"ignore is {ignore!r}; expected a pattern that leaves weights to match {unseen} by")

    def match(name: str, permutations: Permutations, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inner products of all pairs of units, and the best assignment, with all other units in place."""
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
    """Aligns K experts to one of them, or to one another.

    A wrong spec changes the function of the experts, and the shapes may not show it. So pass a `check_fn` if you can
    run a forward pass.

    Args:
        experts: stacked experts, each leaf `[K, ...]`.
        spec: the axes that may be permuted.
        reference: the index of the expert that the others are aligned to. If it is None, all experts are first aligned
            to expert 0. Then each expert is aligned to the mean of the others, round after round, until no expert moves
            (Algorithm 3, MergeMany).
        ignore: as for `align`.
        seed: the seed of the random orders.
        max_rounds: the largest number of rounds if `reference` is None, at least 1.
        check_fn: `check_fn(params) -> outputs`, a pytree of arrays, such as the logits of some inputs in evaluation
            mode. It is called before and after the permutation of each expert whose units moved. None checks nothing.
        tolerance: how much an output may change, relative to the largest output.

    Returns:
        The aligned experts and their permutations.

    Raises:
        ValueError: as for `align`.
        ValueError: if `reference` is no expert's index.
        ValueError: if weights are infinite or NaN; the error names the expert and the path.
        ValueError: if `check_fn` shows that an expert computes another function.
        ValueError: if `max_rounds` is below 1.
        TypeError: as for `align`.
    """
    check_counts(max_rounds=max_rounds)
    check_counts(at_least=0, seed=seed)
    if reference is not None:
        check_counts(at_least=0, reference=reference)
    k = num_experts(experts)
    check_finite("experts", experts, stacked=True)
    models = [jax.tree.map(lambda leaf, index=index: np.asarray(leaf[index]), experts) for index in range(k)]
    if reference is not None and reference not in range(k):
        raise ValueError(f"reference is {reference}; expected the index of one of {k} experts, or None")
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
    """Returns the weights of each of the n units along an axis, `[n, weights]`, in the order of `places`."""
    return np.moveaxis(np.asarray(leaf, np.float64), axis, 0)[places].reshape(len(places), -1)


def _check_function(
    index: int, check_fn: Callable[[Params], PyTree], before: Params, after: Params, tolerance: float
) -> None:
    """Refuses an expert whose outputs changed when its units changed places."""
    outputs = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), check_fn(params)) for params in (before, after)]
    if not jax.tree.leaves(outputs):
        raise ValueError(f"check_fn returned {outputs[0]}; expected arrays, the outputs of the model")
    for first, second in zip(*map(jax.tree.leaves, outputs), strict=True):
        change, size = np.abs(second - first).max(initial=0), np.abs(first).max(initial=0)
        if not change <= tolerance * size:
            raise ValueError(
                f"expert {index} computes something else after its units changed places: its outputs moved by "
                f"{change:.3g}, and the largest is {size:.3g}; expected at most {tolerance} times the largest. So the "
                "spec does not describe the network (did chain_spec get the right kernel_layout?)"
            )


def _mean_of_others(models: list[Params], index: int) -> Params:
    """Returns the mean of all models but one."""
    others = [model for number, model in enumerate(models) if number != index]
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *others)
