"""Blends of LoRA adapters as pure functions: `merge_adapters` blends, and `add_adapter` adds a blend to a base.

An adapter changes a weight W to W + s B A. The blend's change is the weighted sum of the products, sum_i alpha_i s_i
B_i A_i. It is one product of the concatenated factors: A = [A_1; ...; A_K], B = [alpha_1 s_1 B_1, ..., alpha_K s_K
B_K]. The average of the A_i times the average of the B_i would be another change.
"""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from glue_jax.experts import num_experts
from glue_jax.types import Params, PyTree

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<weight>\.weight)?")
"""The names of PEFT's factors."""
SCALING = ".lora_scaling"
"""The ending of the name of a module's scalings `[K]`, among stacked adapters."""
_PREFIX = "base_model.model."


def merge_adapters(
    experts: Params, alpha: ArrayLike, groups: PyTree | None = None, *, min_dtype: DTypeLike | None = None
) -> dict[str, jax.Array]:
    """Blends stacked adapters exactly, by concatenation. It is the `merge_fn` of adapters.

    Args:
        experts: the attribute `experts` of what `load_adapters` returns.
        alpha: the coefficients, `[K]`, or `[G, K]` with `groups`. They need not lie on the simplex.
        groups: which row of `alpha` blends which module, as for `glue_jax.blend`. All leaves of a module have one row.
            `glue_jax.merging.group_by_path(experts, r"^(.*)[.]lora_")` gives each module a row of its own.
        min_dtype: the narrowest dtype of the result, as for `glue_jax.blend`.

    Returns:
        The factors of one adapter with scaling 1, by the names of PEFT. A module that has the rank R in the stacked
        experts has the factors A `[K R, ...]` and B `[out, K R, ...]`.

    Raises:
        ValueError: if `alpha` or `groups` does not fit the experts, or if `experts` has no factors of LoRA.
    """
    coefficients = coefficients_of(experts, jnp.asarray(alpha), groups)
    merged = {}
    for name, leaf in experts.items():
        if not (found := FACTOR.fullmatch(name)):
            continue
        dtype = leaf.dtype if min_dtype is None else jnp.promote_types(leaf.dtype, min_dtype)
        if found["factor"] == "A":
            merged[name] = jnp.asarray(leaf, dtype).reshape(-1, *leaf.shape[2:])
            continue
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        weights = (coefficients(found["module"]) * experts[found["module"] + SCALING]).astype(wide)
        parts = jnp.expand_dims(weights, tuple(range(1, leaf.ndim))) * jnp.asarray(leaf, wide)
        merged[name] = jnp.moveaxis(parts, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:]).astype(dtype)
    if not merged:
        raise ValueError(
            f"experts has {list(experts)[:5]}, which are no factors of LoRA; expected the experts of load_adapters"
        )
    return merged


def add_adapter(
    base: Mapping[str, ArrayLike], adapter: Mapping[str, ArrayLike], *, fan_in_fan_out: bool = False
) -> dict[str, Any]:
    """Returns the weights of a base network with an adapter merged into them, W + B A.

    With it any network can be evaluated in a loss: `loss(add_adapter(base, adapter), batch)`.

    Args:
        base: the weights of the base, by the names of its state dict.
        adapter: the factors of one adapter with scaling 1, by the names of PEFT, from `merge_adapters`.
        fan_in_fan_out: whether a square weight is `[in, out]`, as those of GPT-2 (the entry of the same name in the
            configuration). For other weights the shape decides.

    Returns:
        The weights. A changed weight has the wider of two dtypes, the base's and the adapter's. So it keeps float32
        while coefficients are learned. The other weights are those of `base`.

    Raises:
        ValueError: if the base lacks a weight, if its shape does not fit, or if it is no floating-point tensor.
    """
    params: dict[str, Any] = dict(base)
    for name, factor in adapter.items():
        found = FACTOR.fullmatch(name)
        if found is None:
            raise ValueError(f"adapter holds {name}; expected the factors of LoRA, which merge_adapters returns")
        if found["factor"] == "B":
            continue
        weight_name = base_name(found["module"]) + ".weight"
        if weight_name not in base:
            raise ValueError(
                f"base has no {weight_name}, which the adapter changes; it has {sorted(base)[:5]} and more"
            )
        weight = jnp.asarray(base[weight_name])
        first = jnp.asarray(factor)
        second = jnp.asarray(adapter[partner(name)])
        wide = jnp.promote_types(first.dtype, jnp.float32)
        change = jnp.tensordot(
            second.reshape(second.shape[:2]).astype(wide), first.astype(wide), 1, precision=jax.lax.Precision.HIGHEST
        )
        is_square = change.ndim == 2 and len(set(change.shape)) == 1
        if found["embedding"] or (change.ndim == 2 and (fan_in_fan_out if is_square else change.shape != weight.shape)):
            change = change.T
        if change.shape != weight.shape or not jnp.issubdtype(weight.dtype, jnp.floating):
            raise ValueError(
                f"base has {weight.dtype} of shape {weight.shape} at {weight_name}; expected floating-point numbers of "
                f"the shape of the adapter's change, {change.shape}"
            )
        result = jnp.promote_types(weight.dtype, first.dtype)
        params[weight_name] = (weight.astype(jnp.promote_types(wide, weight.dtype)) + change).astype(result)
    return params


def base_name(module: str) -> str:
    """Returns the name of a module in the base, from its name in an adapter."""
    return module.removeprefix(_PREFIX)


def partner(name: str) -> str:
    """Returns the name of the other factor of a product."""
    found = FACTOR.fullmatch(name)
    assert found is not None
    other = "B" if found["factor"] == "A" else "A"
    return f"{found['module']}.lora_{found['embedding'] or ''}{other}{found['weight'] or ''}"


def coefficients_of(experts: Params, alpha: Any, groups: PyTree | None) -> Callable[[str], Any]:
    """Returns the function from a module's name to its coefficients `[K]`, after a check of alpha and the groups."""
    k = num_experts(experts)
    expected = "[K]" if groups is None else "[G, K]"
    if alpha.ndim != (1 if groups is None else 2) or alpha.shape[-1] != k:
        raise ValueError(f"alpha has shape {alpha.shape}; expected {expected} with K = {k}, the number of adapters")
    if groups is None:
        return lambda module: alpha
    try:
        leaves = jax.tree.broadcast(groups, experts)
    except ValueError as error:
        raise ValueError(f"groups does not fit; expected a prefix of the experts' tree: {error}") from error
    rows: dict[str, int] = {}
    for name, row in leaves.items():
        found = FACTOR.fullmatch(name)
        module = found["module"] if found else name.removesuffix(SCALING)
        number = operator.index(row)
        if not 0 <= number < len(alpha):
            raise ValueError(f"groups holds row {row} at {name}; expected one of the {len(alpha)} rows of alpha")
        if rows.setdefault(module, number) != number:
            raise ValueError(
                f"groups holds the rows {rows[module]} and {number} for {module}; expected one row a module"
            )
    return lambda module: alpha[rows[module]]
