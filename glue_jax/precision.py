"""Which number format a loss computes in, and what SPSA needs of it.

SPSA subtracts two losses of nearby models. `experiments.studies.numerics` measures what rounding leaves of the
difference:

- A float32 network at the highest precision of products gives slopes within 2 % at the link's radius, for experts that
  are far from one another and for experts that are 1 % apart.
- A network that multiplies bfloat16 or float16 by itself rounds the difference away under a softmax, at that radius. At
  `SHORT_FACTOR` times the radius, the slopes of experts that are far apart are usable. Free coefficients move the blend
  further, and need nothing. Forward-mode slopes (`forward_gradient_step`) are as exact as the network's number format.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from glue_jax.blending import is_short
from glue_jax.types import PyTree

DEFAULT_RADIUS = 0.01
"""The length of a probe's step in beta, where beta is alpha or nothing is known of the link."""

SOFTMAX_RADIUS = 0.1
"""The length of a probe's step in beta under a softmax, which moves alpha by a tenth as much with ten experts."""

SHORT_FACTOR = 10.0
"""What multiplies the softmax's radius where the loss multiplies arrays of fewer bits than float32."""


def multiplies_short_floats(fun: Callable[[PyTree], Any], beta: PyTree) -> bool:
    """Returns whether a function has a product or a convolution of floating-point arrays of fewer bits than float32.

    Args:
        fun: any function that JAX traces. It is not run.
        beta: its argument.
    """
    return any(
        equation.primitive.name in ("dot_general", "conv_general_dilated")
        and any(is_short(operand.aval.dtype) for operand in equation.invars)
        for equation in _equations(jax.make_jaxpr(fun)(beta).jaxpr)
    )


def matmul_precision_of(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Returns `jax.default_matmul_precision(name)`, or what changes nothing for None."""
    return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)


def _equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr and of those within it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)
