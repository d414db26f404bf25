"""The number format that a loss computes in, and the precision and the radius that SPSA needs there.

SPSA subtracts the losses of two nearby models. Rounding can destroy this difference. `experiments.studies.numerics`
measured how much of it is left:

- A float32 network with products at the highest precision gives slopes within 2 % at the link's radius. This holds for
  experts that are far apart and for experts that differ by 1 %.
- A network that casts to bfloat16 or float16 itself rounds the difference away, at the softmax's radius. At
  `SHORT_FACTOR` times this radius, slopes are usable if the experts are far apart. Without a softmax, a probe moves the
  blend further, and the link's own radius is enough.
- Forward-mode slopes (`forward_gradient_step`) are as exact as the network's number format.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

from glue_jax.blending import is_short
from glue_jax.loops import equations
from glue_jax.types import PyTree

DEFAULT_RADIUS = 0.01
"""The default length of a probe's step in beta, if beta is alpha or if the library does not know the link."""

SOFTMAX_RADIUS = 0.1
"""The default length of a probe's step in beta under a softmax.

With ten experts, a softmax changes alpha by a tenth of a change of beta.
"""

SHORT_FACTOR = 10.0
"""The factor on the softmax's radius if the loss multiplies arrays of fewer bits than float32."""


def multiplies_short_floats(fun: Callable[[PyTree], Any], beta: PyTree) -> bool:
    """Returns whether a function multiplies or convolves floating-point arrays of fewer bits than float32.

    Args:
        fun: a function that JAX can trace. It is not run.
        beta: the argument of the function.
    """
    return any(
        equation.primitive.name in ("dot_general", "conv_general_dilated")
        and any(is_short(operand.aval.dtype) for operand in equation.invars)
        for equation in equations(jax.make_jaxpr(fun)(beta).jaxpr)
    )


def matmul_precision_of(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Returns `jax.default_matmul_precision(name)`, or a context that changes nothing if `name` is None."""
    return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)
