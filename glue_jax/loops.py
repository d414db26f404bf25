"""`loop`: `jax.lax.map`, with convolutions in the one layout that XLA:CPU runs fast inside a loop.

XLA:CPU has a fast convolution for images `[B, H, W, C]` and kernels `[H, W, in, out]`. Outside of loops it brings other
layouts, such as PyTorch's, into this one. Inside a loop it does not. There a network of six convolutions, with 64
images `[16, 32, 32]`, took 22 times as long (one CPU core, JAX 0.10.2).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import eval_jaxpr
from jax.extend.core import jaxprs_in_params
from jax.extend.core.primitives import conv_general_dilated_p

from glue_jax.types import PyTree

_CALLS = ("jit", "checkpoint")


def loop(fun: Callable[[PyTree], Any], xs: PyTree, batch_size: int | None = None) -> Any:
    """Returns what `jax.lax.map(fun, xs, batch_size=batch_size)` returns.

    Args:
        fun: a function that JAX can trace.
        xs: the arguments of all calls, each leaf `[S, ...]`.
        batch_size: how many calls `vmap` makes together. With None, the calls are made one at a time.
    """
    one = jax.eval_shape(lambda xs: jax.tree.map(lambda leaf: leaf[0], xs), xs)
    closed, shapes = jax.make_jaxpr(fun, return_shape=True)(one)
    fast = _rewritten(closed.jaxpr)
    if fast is closed.jaxpr:
        return jax.lax.map(fun, xs, batch_size=batch_size)

    def mapped(jaxpr: Any, xs: PyTree) -> Any:
        def evaluated(x: PyTree) -> Any:
            leaves = eval_jaxpr(jaxpr, closed.consts, *jax.tree.leaves(x))
            return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

        return jax.lax.map(evaluated, xs, batch_size=batch_size)

    return jax.lax.platform_dependent(
        xs, cpu=functools.partial(mapped, fast), default=functools.partial(mapped, closed.jaxpr)
    )


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields all equations of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def _rewritten(jaxpr: Any) -> Any:
    """Returns a jaxpr for `eval_jaxpr` with its convolutions in the fast layout, or the same one if none is slow.

    Functions under `jit` and `checkpoint` are entered. Loops, branches and functions with derivatives of their own are
    not.
    """

    def replaced(equation: Any) -> Any:
        if _is_slow(equation):
            return equation.replace(primitive=_ChannelsLast)
        if equation.primitive.name not in _CALLS:
            return equation
        inner = equation.params["jaxpr"]
        inner, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        fast = _rewritten(inner)
        if fast is inner:
            return equation
        return equation.replace(primitive=_Inlined, params={"jaxpr": fast, "consts": consts})

    replacements = [replaced(equation) for equation in jaxpr.eqns]
    changed = any(new is not old for new, old in zip(replacements, jaxpr.eqns, strict=True))
    return jaxpr.replace(eqns=replacements) if changed else jaxpr


def _is_slow(equation: Any) -> bool:
    """Returns whether an equation is a convolution in another layout than the fast one."""
    if equation.primitive is not conv_general_dilated_p:
        return False
    given = equation.params["dimension_numbers"]
    return given != _fast_layout(len(given.lhs_spec))


def _fast_layout(num_axes: int) -> jax.lax.ConvDimensionNumbers:
    """Returns the dimension numbers of images `[B, ..., C]` and kernels `[..., in, out]`."""
    last = num_axes - 1
    images = (0, last, *range(1, last))
    return jax.lax.ConvDimensionNumbers(images, (last, last - 1, *range(last - 1)), images)


class _ChannelsLast:
    """What `eval_jaxpr` calls in place of a convolution's primitive."""

    multiple_results = False
    get_bind_params = conv_general_dilated_p.get_bind_params

    @staticmethod
    def bind(images: jax.Array, kernel: jax.Array, *, dimension_numbers: Any, **params: Any) -> jax.Array:
        """Convolves in the fast layout, and returns the result in the layout that the convolution had."""
        (batch, channels, *space), (outputs, inputs, *window), result = dimension_numbers
        fast = _fast_layout(len(result))
        convolved = conv_general_dilated_p.bind(
            jax.lax.transpose(images, (batch, *space, channels)),
            jax.lax.transpose(kernel, (*window, inputs, outputs)),
            dimension_numbers=fast,
            **params,
        )
        places = dict(zip(result, fast.out_spec, strict=True))
        return jax.lax.transpose(convolved, [places[axis] for axis in range(len(result))])


class _Inlined:
    """What `eval_jaxpr` calls in place of a function under `jit` or `checkpoint` that has a slow convolution."""

    multiple_results = True
    get_bind_params = conv_general_dilated_p.get_bind_params

    @staticmethod
    def bind(*values: Any, jaxpr: Any, consts: Any) -> list[Any]:
        """Evaluates the function. Shardings and options of its `jit` have no effect."""
        return eval_jaxpr(jaxpr, consts, *values)
