"""Checks of the arguments of `learn`, made before any work."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from glue_jax.batches import num_examples
from glue_jax.checks import check_callable, check_counts, check_optimizer
from glue_jax.gauss_newton import check_output_loss, gauss_newton_step
from glue_jax.links import apply_link
from glue_jax.streams import as_arrays, check_same_kind, check_validation_stream, is_stream
from glue_jax.types import LearnResult, LinkFn, PyTree

# The defaults in `learn`'s signature. A value that differs from them was given by the user.
BATCH_SIZE, PATIENCE = 64, 10
# The keyword arguments that `learn` itself passes to each step.
_OWN = ("loss_fn", "optimizer", "link_fn", "merge_fn")


def check_functions(functions: dict[str, Any], **optional: Any) -> None:
    """Refuses values that cannot be called, and functions of `learn` that are hidden in its `step_fn`."""
    given = {name: function for name, function in optional.items() if function is not None}
    check_callable(**{name: function for name, function in functions.items() if name != "optimizer"}, **given)
    for name, function in functions.items():
        try:
            hash(function)
        except TypeError as error:
            raise TypeError(
                f"{name} is a {type(function).__name__} that has no hash ({error}), so JAX cannot compile with it; "
                "expected a function: def one that calls it"
            ) from error
    for step_fn in _unwrapped(functions["step_fn"]):
        hidden = [name for name in getattr(step_fn, "keywords", {}) if name in _OWN]
        if hidden:
            raise ValueError(
                f"step_fn is a functools.partial that holds {', '.join(hidden)}, which learn would overwrite: "
                f"pass {', '.join(f'{name}=' for name in hidden)} to learn instead"
            )
    _check_optimizer(functions.get("optimizer"), functions["step_fn"])
    if bare(functions["step_fn"]) is gauss_newton_step:
        check_output_loss(functions["loss_fn"])


def bare(step_fn: Any) -> Any:
    """Returns the function that a step wraps as a partial or a jitted function."""
    return list(_unwrapped(step_fn))[-1]


def validate_every_of(step_fn: Any) -> int:
    """Returns the default number of steps between validations. Gauss-Newton needs fewer steps than other estimators."""
    return 5 if bare(step_fn) is gauss_newton_step else 50


def _check_optimizer(optimizer: Any, step_fn: Any) -> None:
    """Refuses a value that is no optimizer, an optimizer that the step does not take, and a missing optimizer."""
    name = getattr(bare(step_fn), "__name__", repr(step_fn))
    try:
        words = inspect.signature(step_fn).parameters
    except ValueError:
        # Some functions have no signature.
        words = {}
    if optimizer is None:
        if "optimizer" in words:
            raise TypeError(
                f"optimizer is None; expected an optax.GradientTransformation, for instance optax.adam(1e-2), which "
                f"step_fn, {name}, takes (gauss_newton_step needs none)"
            )
        return
    check_optimizer(optimizer)
    takes_any = not words or any(word.kind is inspect.Parameter.VAR_KEYWORD for word in words.values())
    if "optimizer" not in words and not takes_any:
        raise ValueError(f"optimizer was given, but step_fn, {name}, takes none: leave the optimizer out")


def _unwrapped(step_fn: Any) -> Iterator[Any]:
    """Yields a step, and then each function that it wraps as a partial or a jitted function."""
    yield step_fn
    while isinstance(step_fn, functools.partial) or hasattr(step_fn, "__wrapped__"):
        step_fn = step_fn.func if isinstance(step_fn, functools.partial) else step_fn.__wrapped__
        yield step_fn


def check_link(result: LearnResult, link_fn: LinkFn) -> None:
    """Refuses a result that was learned with another link. Its beta means other coefficients under this link."""
    alpha, kept = apply_link(link_fn, result.beta), result.alpha
    alike = jax.tree.map(jnp.shape, alpha) == jax.tree.map(jnp.shape, kept)
    if not alike or not jax.tree.all(jax.tree.map(lambda new, old: np.allclose(new, old, 1e-3, 1e-6), alpha, kept)):
        raise ValueError(
            f"state is a result with the coefficients {kept}, but link_fn makes {alpha} of its beta: pass the "
            "link_fn that it was learned with, or leave state out"
        )


def check_numbers(
    max_steps: Any, validate_every: Any, batch_size: Any, validation_batch_size: Any, patience: Any, steps_per_call: Any
) -> None:
    """Refuses numbers that are not counts. The last three may be None."""
    check_counts(max_steps=max_steps, validate_every=validate_every, batch_size=batch_size)
    optional = {
        "validation_batch_size": validation_batch_size,
        "patience": patience,
        "steps_per_call": steps_per_call,
    }
    check_counts(**{name: count for name, count in optional.items() if count is not None})


def check_key_and_trees(key: Any, *trees: PyTree) -> None:
    """Refuses a value that is no key, and a call under a transformation of JAX."""
    trees = tuple(tree for tree in trees if not is_stream(tree))
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((key, trees))):
        raise TypeError(
            "learn was called under jit, vmap or another transformation of JAX: call it outside. It jits its own "
            "steps, and it must read losses back to know when to stop"
        )
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    if not typed and (getattr(key, "dtype", None) != np.uint32 or np.ndim(key) != 1):
        raise TypeError(f"key is {key!r}; expected one key, for instance jax.random.key(0)")


def checked_data(data: Any, batch_size: int, steps_per_call: int | None) -> Any:
    """Returns the arrays on the device, or the stream."""
    if is_stream(data):
        if batch_size != BATCH_SIZE:
            raise ValueError(
                f"batch_size is {batch_size}, but data is a {type(data).__name__}, and its batches have a size: "
                "leave batch_size out (validation_batch_size sets the size of validation batches)"
            )
        if steps_per_call not in (None, 1):
            raise ValueError(
                f"steps_per_call is {steps_per_call}, but data is a {type(data).__name__}, which is read batch after "
                "batch; expected None or 1"
            )
        return data
    if batch_size > num_examples("data", data):
        raise ValueError(f"batch_size is {batch_size}, but data holds {num_examples('data', data)} examples")
    return jax.tree.map(jnp.asarray, as_arrays("data", data))


def checked_validation(
    validation_data: Any, data: Any, validation_fn: Any, patience: int | None, batch_size: int | None
) -> Any:
    """Returns the validation arrays on the device, or the stream.

    Without a `validation_fn`, the validation data must be of the same kind as the data.
    """
    if validation_data is None and (validation_fn is not None or patience not in (None, PATIENCE)):
        name = "validation_fn" if validation_fn is not None else f"patience={patience}"
        raise ValueError(f"{name} was given without validation_data; expected validation_data too")
    if batch_size is not None and (validation_data is None or is_stream(validation_data)):
        what = "None" if validation_data is None else f"a {type(validation_data).__name__} with batches of its own size"
        raise ValueError(f"validation_batch_size is {batch_size}, but validation_data is {what}")
    if validation_data is None:
        return None
    if is_stream(validation_data):
        check_validation_stream(validation_data)
        return validation_data
    num_examples("validation_data", validation_data)
    validation_data = jax.tree.map(jnp.asarray, as_arrays("validation_data", validation_data))
    if validation_fn is None and not is_stream(data):
        check_same_kind(data, validation_data)
    return validation_data
