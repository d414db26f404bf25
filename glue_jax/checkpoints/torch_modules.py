"""`module_functions`: a PyTorch module as JAX functions of its state dict, by torchax.

This module needs PyTorch and `pip install --pre 'torchax>=0.0.14.dev0'`. torchax 0.0.13 cannot be imported with
PyTorch 2.13 or newer (https://github.com/google/torchax/issues/101).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from glue_jax.checkpoints.headers import library

_ADVICE = "pip install --pre torch 'torchax>=0.0.14.dev0'"
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_MOST_NAMES = 5

ModuleFn: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
"""A function of a state dict and a batch, both of arrays by name."""


class ModuleFunctions(NamedTuple):
    """A PyTorch module as JAX functions. They can be jitted, vmapped and differentiated.

    Attributes:
        outputs_fn: `outputs_fn(params, batch)` returns the module's output in evaluation mode: without dropout, and
            with the running statistics of BatchNorm.
        minibatch_fn: the same, but BatchNorm uses the statistics of the minibatch. It does not read the running
            statistics, so they may be missing or None. It is `outputs_fn` if the module has no BatchNorm.
        statistics_fn: `statistics_fn(params, batch)` returns the `running_mean` and the (biased) `running_var` of one
            batch alone, for `glue_jax.merging.refresh_statistics`. None if the module has no BatchNorm.
    """

    outputs_fn: ModuleFn
    minibatch_fn: ModuleFn
    statistics_fn: ModuleFn | None


def module_functions(module: Any, *, inputs: Sequence[str] | None = None) -> ModuleFunctions:
    """Makes JAX functions of a PyTorch module. The module is copied without its weights, and is not changed.

    The functions take the state dict of one model: a flat dict of arrays with the names of `module.state_dict()`.
    `blend` returns such a dict if `load_experts` read the experts. They also take a batch: a dict of arrays. They
    compute in at least float32, whatever the dtypes of the weights. If several names stand for one tied weight, the
    state dict needs only one of these names.

    Args:
        module: a `torch.nn.Module`. Its output is a tensor or a pytree of tensors. If the output is a mapping with the
            entry `logits`, such as an output of Hugging Face's transformers, the functions return this entry alone.
        inputs: the entries of the batch that are passed to the module by keyword. With None, an entry is passed if
            `module.forward` has an argument of this name, except for the entry `labels`. If no entry has such a name,
            the module gets the entry `x`.

    Returns:
        The functions.

    Raises:
        TypeError: if `module` is no `torch.nn.Module`.
        ImportError: if PyTorch or torchax cannot be imported.

    Examples:
        functions = module_functions(network)
        loss_fn = glue_jax.OutputLoss(functions.minibatch_fn, lambda logits, batch: mean_loss(logits, batch["y"]))
        experts = load_experts(paths)
        result = glue_jax.learn(key, experts, {"x": x, "y": y}, loss_fn=loss_fn, ...)
        # With BatchNorm, the blend's running statistics must be measured anew before evaluation mode uses them.
        prior = glue_jax.merging.refresh_statistics(
            glue_jax.blend(experts, result.alpha), [{"x": x}], jax.jit(functions.statistics_fn)
        )
    """
    torch = library("torch", _ADVICE)
    env = _environment()
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module")
    chosen = _Inputs(module, inputs)
    evaluation = _without_weights(torch, module).eval()
    ties = _ties(module)
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(module)}

    def outputs_fn(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        return _call(torch, env, evaluation, _complete(params, ties, shapes), chosen, batch)

    minibatch = _without_weights(torch, module).eval()
    layers = {name: layer for name, layer in minibatch.named_modules() if _is_batch_norm(torch, layer)}
    if not layers:
        return ModuleFunctions(outputs_fn, outputs_fn, None)
    for layer in layers.values():
        # In evaluation mode too, a layer without running statistics normalises by the minibatch.
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        layer.track_running_stats = False
    dropped = {f"{name}.{each}" if name else each for name in layers for each in (*_STATISTICS, _COUNTER)}

    def minibatch_fn(params: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        return _call(torch, env, minibatch, _complete(params, ties, shapes, dropped), chosen, batch)

    def statistics_fn(params: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        found: dict[str, Any] = {}

        def record(name: str, given: Any) -> None:
            if f"{name}running_mean" in found:
                raise ValueError(f"the layer {name.removesuffix('.')!r} runs twice; its statistics are not defined")
            values = env.t2j_iso(given)
            values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
            axes = tuple(axis for axis in range(values.ndim) if axis != 1)
            found[f"{name}running_mean"] = jnp.mean(values, axes)
            found[f"{name}running_var"] = jnp.var(values, axes)

        hooks = [
            layer.register_forward_pre_hook(lambda _, given, name=name: record(f"{name}." if name else "", given[0]))
            for name, layer in layers.items()
        ]
        try:
            minibatch_fn(params, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    return ModuleFunctions(outputs_fn, minibatch_fn, statistics_fn)


class _Inputs:
    """Chooses what the module gets of a batch."""

    def __init__(self, module: Any, inputs: Sequence[str] | None):
        self._inputs = None if inputs is None else tuple(inputs)
        self._known = set(inspect.signature(module.forward).parameters) - {"labels"}

    def of(self, batch: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Returns the positional and the keyword arguments."""
        if not isinstance(batch, Mapping):
            raise TypeError(f"the batch is a {type(batch).__name__}; expected a dict, such as {{'x': inputs}}")
        names = [name for name in batch if name in self._known] if self._inputs is None else self._inputs
        if missing := [name for name in names if name not in batch]:
            raise ValueError(f"the batch has no {missing[0]!r}, which inputs names; it has {list(batch)}")
        if names:
            return [], {name: batch[name] for name in names}
        if "x" not in batch:
            raise ValueError(
                f"the batch has {list(batch)}; expected 'x', or some of the module's arguments, {sorted(self._known)}"
            )
        return [batch["x"]], {}


def _call(
    torch: Any, env: Any, module: Any, params: Mapping[str, Any], inputs: _Inputs, batch: Mapping[str, Any]
) -> Any:
    """Returns the output of a module with these weights."""
    # Buffers that are not in the state dict, such as tables of positions.
    others = {name: leaf for name, leaf in module.named_buffers() if not leaf.is_meta}
    given = {**env.t2j_copy(others), **params}, *inputs.of(batch)
    weights, arguments, keywords = env.j2t_iso(jax.tree.map(_at_least_float32, given))
    # torchax relies on the promotion of ranks.
    with jax.numpy_rank_promotion("allow"), env, torch.no_grad():
        output = torch.func.functional_call(module, weights, tuple(arguments), keywords)
    return env.t2j_iso(output["logits"] if isinstance(output, Mapping) and "logits" in output else output)


def _complete(
    params: Mapping[str, Any],
    ties: Mapping[str, frozenset[str]],
    shapes: Mapping[str, tuple[int, ...]],
    dropped: frozenset[str] | set[str] = frozenset(),
) -> dict[str, Any]:
    """Returns the weights that a module needs. Refuses missing and unknown names."""
    given = {name: leaf for name, leaf in params.items() if leaf is not None and name not in dropped}
    if unknown := [name for name in given if name not in ties]:
        raise ValueError(
            f"params has {_listed(unknown)}, which the module does not have. If the names have a prefix, rename can "
            "remove it"
        )
    for name, leaf in given.items():
        if jnp.shape(leaf) != shapes[name]:
            raise ValueError(f"the module's {name} has shape {shapes[name]}, and the experts' has {jnp.shape(leaf)}")
    missing = [
        name
        for name, tied in ties.items()
        if name not in dropped and not name.endswith(_COUNTER) and not tied & given.keys()
    ]
    if missing:
        hint = "; only minibatch_fn does without statistics" if all(map(_is_statistic, missing)) else ""
        raise ValueError(f"params lacks {_listed(missing)}, which the module needs{hint}")
    # If a tensor has several names, PyTorch wants only the module's first name for it.
    order = list(ties)
    return {name: leaf for name, leaf in given.items() if name == min(ties[name] & given.keys(), key=order.index)}


def _at_least_float32(leaf: Any) -> jax.Array:
    """Returns an array. A short floating-point array becomes float32, because PyTorch computes with one dtype."""
    array = jnp.asarray(leaf)
    is_short = jnp.issubdtype(array.dtype, jnp.inexact)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32)) if is_short else array


def _is_statistic(name: str) -> bool:
    return name.endswith(_STATISTICS)


def _listed(names: Sequence[str]) -> str:
    """Returns some names as text."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{list(names[:_MOST_NAMES])}{more}"


def _ties(module: Any) -> dict[str, frozenset[str]]:
    """Returns the names of the state dict, each with all names of the same tensor."""
    same: dict[int, set[str]] = {}
    tensors = dict(_tensors(module))
    state = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        same.setdefault(id(tensor), set()).add(name)
    return {name: frozenset(same[id(tensor)]) for name, tensor in tensors.items() if name in state}


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    """Returns parameters and buffers by name. A tied one is there under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _without_weights(torch: Any, module: Any) -> Any:
    """Returns a copy of a module whose state dict has no numbers. Buffers outside the state dict keep their numbers."""
    state = module.state_dict(keep_vars=True)
    memo = {}
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            empty = tensor.detach().to("meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False) if is_parameter else empty
    return copy.deepcopy(module, memo)


def _is_batch_norm(torch: Any, layer: Any) -> bool:
    """Whether a layer is a BatchNorm with running statistics."""
    return isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.track_running_stats


def _environment() -> Any:
    """Returns the environment of torchax."""
    try:
        return library("torchax", _ADVICE).default_env()
    except AttributeError as error:
        raise ImportError(f"torchax does not fit this version of PyTorch ({error}): {_ADVICE}") from error
