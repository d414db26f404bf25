"""A stage of `build_prior`: the coefficients that it learns, and the steps that learn them."""

import dataclasses
import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glue_jax.experts import num_experts
from glue_jax.gauss_newton import gauss_newton_step
from glue_jax.merging.groups import Groups, by_layer, group_by_path
from glue_jax.paths import by_path
from glue_jax.states import init
from glue_jax.steps import spsa_step
from glue_jax.types import GlueState, LearnResult, LinkFn, MergeFn, Params, PyTree, StepFn

SOFTMAX_RADIUS = 0.3
"""SPSA's radius under a softmax. A metric that counts errors changes at this radius, and a smooth loss is right too."""

# Gauss-Newton looks along at most so many directions in a step. On the digits by layer all 50 directions were better
# than 20 of them, and more directions take more passes.
_MOST_DIRECTIONS = 128
_GAUSS_NEWTON_IN_PART = functools.partial(gauss_newton_step, num_directions=_MOST_DIRECTIONS)
# SPSA's radius for free coefficients. Adam's learning rates, which fall to a fiftieth by a cosine.
_FREE_RADIUS, _SOFTMAX_RATE, _FREE_RATE, _LAST_RATE = 0.1, 0.3, 1e-2, 0.02


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage learns.

    Attributes:
        name: the name of the stage, and of its candidate.
        shape: the shape of the coefficients: `[K]` under a softmax, or `[G, K]` if they are free.
        link_fn: the link.
        merge_fn: the merge.
    """

    name: str
    shape: tuple[int, ...]
    link_fn: LinkFn
    merge_fn: MergeFn

    def first_state(self, alpha: PyTree, optimizer: optax.GradientTransformation | None) -> GlueState:
        """Returns the state of step 0. Free coefficients start at `alpha`, `[K]`; a softmax starts at 1/K."""
        beta = jnp.zeros(self.shape) if alpha is None else jnp.broadcast_to(alpha, self.shape)
        return init(self.shape[-1], optimizer, beta=beta, link_fn=self.link_fn)

    @property
    def directions(self) -> int:
        """The number of directions along which a step of Gauss-Newton looks."""
        count = math.prod(self.shape)
        return min(count, _MOST_DIRECTIONS) if len(self.shape) > 1 else count - 1

    def gauss_newton(self) -> StepFn:
        """Returns the step of Gauss-Newton, always the same object for the same number of coefficients."""
        is_all = len(self.shape) == 1 or math.prod(self.shape) <= _MOST_DIRECTIONS
        return gauss_newton_step if is_all else _GAUSS_NEWTON_IN_PART

    def spsa(self, max_steps: int) -> tuple[StepFn, optax.GradientTransformation]:
        """Returns SPSA's step and its optimizer, always the same objects for the same arguments."""
        return _spsa(len(self.shape) > 1, self.shape[-1], max_steps)


def stage_groups(groups: Any, experts: Params, merge_fn: Any) -> Groups | None:
    """Returns the groups of the second stage, checked. None leaves the stage out."""
    if groups is None or (isinstance(groups, str) and groups == "layers" and not _takes_groups(merge_fn)):
        return None
    if groups == "layers":
        try:
            found = by_layer(experts)
        except ValueError:
            found = group_by_path(experts, lambda path: path or "all")
        return _with_tied_rows(found, experts)
    if not isinstance(groups, Groups):
        raise TypeError(f"groups is {groups!r}; expected 'layers', None, or the Groups that group_by_path returns")
    if not _takes_groups(merge_fn):
        raise ValueError("groups was given, but merge_fn has no keyword groups; expected one, as glue_jax.blend has")
    shape = len(groups.names), num_experts(experts)
    jax.eval_shape(functools.partial(merge_fn, groups=groups.rows), experts, jax.ShapeDtypeStruct(shape, jnp.float32))
    return groups


def _with_tied_rows(groups: Groups, experts: Params) -> Groups:
    """Returns groups in which two leaves that are equal in all experts have one row.

    Tied weights of PyTorch are two names of one tensor. With two rows they would be blended into two tensors. A leaf
    whose numbers are all equal, such as an untrained bias, is not taken for a tied one.
    """
    leaves, rows = by_path(experts), by_path(groups.rows)
    first: dict[tuple[Any, ...], list[str]] = {}
    for name, leaf in leaves.items():
        if np.ndim(leaf) < 2:
            continue
        # A few numbers tell most leaves apart.
        corner = np.asarray(leaf[(slice(None), *[slice(4)] * (leaf.ndim - 1))])
        alike = first.setdefault((leaf.shape, leaf.dtype, corner.tobytes()), [])
        same = (other for other in alike if bool((leaves[other] == leaf).all()))
        if (other := next(same, None)) is None:
            alike.append(name)
        elif bool((leaf != leaf.reshape(-1)[0]).any()):
            rows[name] = rows[other]
    # A row that no leaf has any more would be learned in vain.
    used = {row: index for index, row in enumerate(sorted(set(rows.values())))}
    found = jax.tree.unflatten(jax.tree.structure(groups.rows), [used[row] for row in rows.values()])
    return Groups(found, tuple(groups.names[row] for row in used))


def by_group(merge_fn: MergeFn, groups: Groups) -> MergeFn:
    """Returns the merge of coefficients `[G, K]`, always the same object for the same groups."""
    return _by_rows(merge_fn, tuple(jax.tree.leaves(groups.rows)), jax.tree.structure(groups.rows))


@functools.cache
def _by_rows(merge_fn: Any, rows: tuple[int, ...], structure: Any) -> MergeFn:
    """Returns the merge whose leaves have these rows."""
    return functools.partial(merge_fn, groups=jax.tree.unflatten(structure, rows))


def _takes_groups(merge_fn: MergeFn) -> bool:
    """Returns whether a merge has a keyword `groups` that is still free."""
    parameter = inspect.signature(merge_fn).parameters.get("groups")
    return parameter is not None and parameter.default is None


@functools.cache
def with_shared(merge_fn: Any) -> MergeFn:
    """Returns the merge of a pair, the stacked experts and what they share, from a merge with a keyword `shared`."""

    def merge(both: tuple[Params, PyTree], alpha: PyTree, *, groups: PyTree = None, min_dtype: Any = None) -> Params:
        experts, shared = both
        return merge_fn(experts, alpha, groups=groups, min_dtype=min_dtype, shared=shared)

    return merge


def out_of_patience(result: LearnResult, patience: int | None) -> bool:
    """Returns whether `patience` validations came after the best one."""
    values = result.history.validation_values
    return patience is not None and len(values) > 0 and len(values) - 1 - int(np.argmin(values)) >= patience


@functools.cache
def _spsa(is_free: bool, k: int, max_steps: int) -> tuple[Any, optax.GradientTransformation]:
    """Returns K - 1 directions on the simplex with a softmax, and 2 K directions with free coefficients."""
    rate, radius, directions = (_FREE_RATE, _FREE_RADIUS, 2 * k) if is_free else (_SOFTMAX_RATE, SOFTMAX_RADIUS, k - 1)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, max_steps, _LAST_RATE), b1=0.9, b2=0.99)
    return functools.partial(spsa_step, radius=radius, num_directions=directions), optimizer
