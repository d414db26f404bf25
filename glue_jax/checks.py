"""Checks of arguments that the library's modules share. Each error names the argument and its value."""

import math
import operator
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import NDArray

from glue_jax.types import GlueState


def check_counts(*, at_least: int = 1, **counts: Any) -> None:
    """Refuses values that are not integers, and integers below `at_least`."""
    for name, count in counts.items():
        try:
            number = operator.index(count)
        except TypeError as error:
            raise TypeError(f"{name} is {count!r}; expected an integer of at least {at_least}") from error
        if number < at_least:
            raise ValueError(f"{name} is {count}; expected at least {at_least}")


def as_numbers(name: str, values: Any) -> NDArray[np.float64]:
    """Returns real numbers as float64. Refuses complex numbers, text, None and traced values."""
    try:
        array = np.asarray([np.asarray(value) for value in values] if isinstance(values, list | tuple) else values)
        return array.astype(np.float64, casting="same_kind")
    except (TypeError, ValueError) as error:
        where = ", outside jit" if isinstance(values, Tracer) else ""
        raise TypeError(f"{name} is {values!r}; expected real numbers{where}") from error


def as_number(name: str, value: Any) -> float:
    """Returns one real number as a Python float. Refuses anything else."""
    number = as_numbers(name, value)
    if number.shape != ():
        raise ValueError(f"{name} has shape {number.shape}; expected one real number")
    return float(number)


def check_positive(name: str, value: Any) -> None:
    """Refuses a value that is not a real scalar above 0 and finite. The value of a traced scalar is not checked."""
    if isinstance(value, Tracer):
        if value.shape != () or jnp.iscomplexobj(value):
            raise ValueError(f"{name} has shape {value.shape}, dtype {value.dtype}; expected one real number")
    elif not 0 < as_number(name, value) < math.inf:
        raise ValueError(f"{name} is {value}; expected a finite number above 0")


def compiled(name: str, pattern: Any) -> re.Pattern[str]:
    """Returns a compiled regular expression. Refuses a pattern that is no regular expression."""
    try:
        return re.compile(pattern)
    except TypeError as error:
        raise TypeError(f"{name} is {pattern!r}; expected a regular expression") from error
    except re.error as error:
        raise ValueError(f"{name} is {pattern!r}, which is no regular expression: {error}") from error


def check_callable(**functions: Any) -> None:
    """Refuses values that cannot be called."""
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{name} is {function!r}; expected a function")


def check_state(state: Any) -> None:
    """Refuses a value that is no `GlueState`."""
    if not isinstance(state, GlueState):
        raise TypeError(
            f"state is a {type(state).__name__}; expected a GlueState, which glue_jax.init and the steps return (a "
            "LearnResult holds one in its attribute state)"
        )
    if not jnp.issubdtype(getattr(state.step, "dtype", type(state.step)), np.integer) or np.shape(state.step):
        raise TypeError(f"state.step is {state.step!r}; expected one integer")


def check_optimizer(optimizer: Any, state: GlueState | None = None) -> None:
    """Refuses a value that is no optimizer of optax, and an optimizer that did not make the state."""
    if not callable(getattr(optimizer, "init", None)) or not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"optimizer is {optimizer!r}; expected an optax.GradientTransformation, for instance optax.adam(1e-2)"
        )
    if state is None:
        return
    trees = jax.eval_shape(optimizer.init, state.beta), state.opt_state
    expected, found = (
        [(path, jnp.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)] for tree in trees
    )
    if expected != found or jax.tree.structure(trees[0]) != jax.tree.structure(trees[1]):
        raise ValueError(
            "state.opt_state is not of this optimizer and beta: it has leaves "
            f"{[(jax.tree_util.keystr(path), shape) for path, shape in found]}; expected those of optimizer.init, "
            f"{[(jax.tree_util.keystr(path), shape) for path, shape in expected]}"
        )
