"""Computes a function as an accelerator with rounded products does, on any machine."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxprs_in_params

PRODUCTS = ("dot_general", "conv_general_dilated")
"""The primitives whose operands an accelerator rounds."""
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


def with_rounded_products(fun: Callable[..., Any], mantissa_bits: int) -> Callable[..., Any]:
    """Returns a function whose products round their float32 operands, as the default products of a GPU or a TPU do.

    A product that asks for the highest precision stays as it is. It asks by its own argument, or the function is traced
    under `jax.default_matmul_precision("highest")`. The sums of products are float32.

    Args:
        fun: any function that JAX traces, without a product inside a loop or a branch. MobileNetV2 has such products,
            because it chooses them by platform.
        mantissa_bits: 10 for TF32, 7 for bfloat16.

    Returns:
        The function. It can be jitted, differentiated and vmapped.

    Raises:
        ValueError: when the function is called, if a product is inside a loop or a branch.
    """

    def rounded(*arguments: Any) -> Any:
        closed, shapes = jax.make_jaxpr(fun, return_shape=True)(*arguments)
        results = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(arguments), mantissa_bits)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return rounded


def _evaluate(jaxpr: Any, consts: Any, arguments: list[Any], mantissa_bits: int) -> list[Any]:
    """The results of a jaxpr with rounded products."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for equation in jaxpr.eqns:
        inputs = [atom.val if isinstance(atom, Literal) else values[atom] for atom in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in _CALLS:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            outputs = _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, mantissa_bits)
        else:
            if name in PRODUCTS and not _is_highest(params["precision"]):
                inputs = [_rounded(value, mantissa_bits) for value in inputs]
            elif _has_product(params):
                raise ValueError(f"fun has a product inside {name}, which is not rounded here")
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
        values.update(zip(equation.outvars, outputs, strict=True))
    return [atom.val if isinstance(atom, Literal) else values[atom] for atom in jaxpr.outvars]


def _has_product(params: Any) -> bool:
    """Whether a loop or a branch has a product."""
    return any(
        equation.primitive.name in PRODUCTS or _has_product(equation.params)
        for inner in jaxprs_in_params(params)
        for equation in inner.eqns
    )


def _rounded(value: jax.Array, mantissa_bits: int) -> jax.Array:
    """A float32 operand as it enters a product."""
    return jax.lax.reduce_precision(value, 8, mantissa_bits) if value.dtype == jnp.float32 else value


def _is_highest(precision: Any) -> bool:
    """Whether a product's `precision` asks for all digits."""
    return jax.lax.Precision.HIGHEST in (precision if isinstance(precision, tuple) else (precision,))
