"""The objective file of `glue-jax learn`: Python that says what the blend is for."""

import functools
import hashlib
import os
import sys
import traceback
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glue_jax.checkpoints.torch_modules import module_functions
from glue_jax.objectives import OutputLoss
from glue_jax.types import LossFn, Params

_WAYS = ("module", "outputs", "loss_fn", "evaluate")
FUNCTIONS = (
    *_WAYS,
    "loss",
    "metric",
    "load_data",
    "load_validation_data",
    "validation_fn",
    "statistics_fn",
    "rename",
    "spec",
)
"""The names of the functions of an objective file that have a meaning."""

_NOT_WITH_EVALUATE = {"load_data", "load_validation_data", "validation_fn", "metric", "statistics_fn"}
MOST_TEXT = 400
"""The most characters of another error that an error cites."""
# An error shows at most so many entries of a dict.
_MOST_ENTRIES = 8
_NUMBERS = ("loss", "metric", "loss_fn", "validation_fn")


class ObjectiveError(ValueError):
    """A function of the objective file raised, or returned something that cannot be used."""


class Objective(NamedTuple):
    """What `build_prior` needs of an objective file.

    Attributes:
        data: the target data, a pytree of arrays `[N, ...]`. None with `evaluate`.
        validation_data: arrays `[M, ...]` that choose among candidates. With None, a part of `data` is held out.
        loss_fn: the loss. None with `evaluate`.
        validation_fn: what is validated. With None it is the loss.
        evaluate: the function on the host. None with data.
        statistics_fn: BatchNorm's statistics of a batch. None refreshes nothing.
        rename: as for `load_experts`.
        spec: `spec(params)` returns the PermutationSpec that aligns the experts. None aligns nothing.
        digest: the hash of the file, and of the modules in its folder that it imports.
    """

    data: Any
    validation_data: Any
    loss_fn: LossFn | None
    validation_fn: LossFn | None
    evaluate: Callable[[Params], float | None] | None
    statistics_fn: Callable[..., Any] | None
    rename: Callable[[str], str] | None
    spec: Callable[[Params], Any] | None
    digest: str


def load_objective(path: Path) -> Objective:
    """Runs an objective file, and checks what it defines.

    The file defines one of

    - `module()`, which returns a PyTorch module, with `load_data()`. That returns `(inputs, labels)`, or a dict of the
      module's arguments by name and `labels`. The loss is `default_loss`, unless the file defines
      `loss(outputs, batch)`.
    - `outputs(params, batch)` and `loss(outputs, batch)`, with `load_data()`.
    - `loss_fn(params, batch)`, with `load_data()`.
    - `evaluate(params) -> number`.

    It may also define `load_validation_data()` and `rename(name)`. With `outputs` or `loss_fn` it may define
    `statistics_fn(params, batch)`, which returns BatchNorm's statistics of a batch. A `module` has its own. The file
    may define a function that chooses the best model in place of the loss: `metric(outputs, batch)` in the first two
    cases, or `validation_fn(params, batch)`. Lower is better. To align experts of separate initialisations, it defines
    `spec(params)`, which returns a PermutationSpec.

    Raises:
        FileNotFoundError: if there is no such file.
        ObjectiveError: if the file raises, or if it does not define what is needed. With `default_loss`, if labels look
            like classes and are no integers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a Python file with the objective")
    defined = _run(path)
    ways = [name for name in _WAYS if name in defined]
    if len(ways) != 1:
        raise ObjectiveError(
            f"{path} defines {' and '.join(ways) or 'none'} of {', '.join(_WAYS)}; expected one of them"
        )
    (way,) = ways
    for needed, of in (("loss", ("outputs",)), ("load_data", ("module", "outputs", "loss_fn"))):
        if way in of and needed not in defined:
            raise ObjectiveError(f"{path} defines {way}, but no {needed}")
    if way == "evaluate":
        if extra := sorted(_NOT_WITH_EVALUATE & defined.keys()):
            raise ObjectiveError(f"{path} defines evaluate and {extra}; expected evaluate to do what it needs itself")
        evaluate, rename, spec = defined["evaluate"], defined.get("rename"), defined.get("spec")
        return Objective(None, None, None, None, evaluate, None, rename, spec, _digest(path))
    if way == "module" and "statistics_fn" in defined:
        raise ObjectiveError(
            f"{path} defines module and statistics_fn; expected module alone, which has its statistics"
        )
    if "metric" in defined and (way == "loss_fn" or "validation_fn" in defined):
        if way == "loss_fn":
            raise ObjectiveError(f"{path} defines metric and loss_fn; expected validation_fn in place of metric")
        raise ObjectiveError(f"{path} defines metric and validation_fn; expected one of them")
    data = _arrays(path, "load_data", defined)
    validation = _arrays(path, "load_validation_data", defined) if "load_validation_data" in defined else None
    if way == "module":
        data, validation = (_by_name(path, each) for each in (data, validation))
        if "loss" not in defined:
            _check_targets(path, "load_data", data)
            _check_targets(path, "load_validation_data", validation)
        functions = module_functions(defined["module"]())
        loss_fn = OutputLoss(functions.outputs_fn, defined.get("loss", default_loss))
        statistics_fn = functions.statistics_fn
    else:
        loss_fn = OutputLoss(defined["outputs"], defined["loss"]) if way == "outputs" else defined["loss_fn"]
        statistics_fn = defined.get("statistics_fn")
    validation_fn = defined.get("validation_fn")
    if "metric" in defined and isinstance(loss_fn, OutputLoss):
        validation_fn = OutputLoss(loss_fn.outputs_fn, defined["metric"])
    return Objective(
        data,
        validation,
        loss_fn,
        validation_fn,
        None,
        statistics_fn,
        defined.get("rename"),
        defined.get("spec"),
        _digest(path),
    )


def _run(path: Path) -> dict[str, Callable[..., Any]]:
    """Runs the file. Returns its functions that have a meaning here; an error in one of them names file and line."""
    module = types.ModuleType("glue_objective")
    module.__file__ = str(path)
    # Classes look up their module by its name.
    sys.modules[module.__name__] = module
    # The file may import modules that lie beside it. Nothing is written there.
    sys.path.insert(0, str(path.parent.absolute()))
    sys.dont_write_bytecode = True
    _guarded(path, "the file", lambda: exec(compile(path.read_bytes(), path, "exec"), module.__dict__))()
    defined = {name: getattr(module, name) for name in FUNCTIONS if hasattr(module, name)}
    for name, function in defined.items():
        if not callable(function):
            raise ObjectiveError(f"{path}: {name} is {function!r}; expected a function")
    return {name: _guarded(path, name, function) for name, function in defined.items()}


def _digest(path: Path) -> str:
    """Returns the SHA-256 of the file, and of the imported modules below its folder that nobody installed there."""
    # As text: thousands of modules may be imported.
    path, here = path.absolute(), os.getcwd()
    folder = os.path.join(path.parent, "")
    files = {
        os.path.join(here, file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))
    }
    own = {Path(file) for file in files if file.startswith(folder)} - {path}
    found = hashlib.sha256(path.read_bytes())
    for file in sorted(own):
        if not {"site-packages", "dist-packages"} & {*file.parts} and file.is_file():
            found.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return found.hexdigest()


def _guarded(path: Path, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose errors name the file and the line."""

    @functools.wraps(function)
    def guarded(*values: Any) -> Any:
        try:
            result = function(*values)
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == path.absolute()]
            line = f", line {lines[-1]}" if lines else ""
            text = " ".join(str(error).split())[:MOST_TEXT]
            given = " ".join(", ".join(map(_in_words, values)).split())[:MOST_TEXT]
            given = f" (given {given})" if given else ""
            raise ObjectiveError(f"{path}{line}: {name} raised {type(error).__name__}: {text}{given}") from error
        is_number = isinstance(result, jax.Array | np.ndarray | np.generic | int | float) and not np.ndim(result)
        if name in _NUMBERS and not is_number:
            raise ObjectiveError(f"{path}: {name} returned {_in_words(result)}; expected one number")
        return result

    return guarded


def _in_words(value: Any) -> str:
    """Returns a value with a dtype and a shape in place of each array. It has at most the first 8 entries of a dict."""
    if isinstance(value, Mapping):
        entries = [f"{name!r}: {_in_words(each)}" for name, each in list(value.items())[:_MOST_ENTRIES]]
        return f"{{{', '.join(entries)}{', ...' * (len(value) > _MOST_ENTRIES)}}}"
    if isinstance(value, tuple | list):
        entries = ", ".join(map(_in_words, value))
        return f"[{entries}]" if isinstance(value, list) else f"({entries})"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return repr(value)


def _arrays(path: Path, name: str, defined: dict[str, Callable[..., Any]]) -> Any:
    """Returns what a loading function returns, as arrays."""
    loaded = defined[name]()
    leaves = jax.tree.leaves(loaded)
    if not leaves:
        raise ObjectiveError(f"{path}: {name} returned {loaded!r}; expected arrays [N, ...]")
    try:
        arrays = jax.tree.map(np.asarray, loaded)
    except Exception as error:
        # An array of another library that NumPy cannot read.
        raise ObjectiveError(f"{path}: {name} returned what is no array ({error}); expected arrays [N, ...]") from error
    for leaf, array in zip(leaves, jax.tree.leaves(arrays), strict=True):
        if array.dtype == object or not array.ndim:
            found = f"a {type(leaf).__name__}" if array.dtype == object else f"{array.dtype} {list(array.shape)}"
            raise ObjectiveError(f"{path}: {name} returned {found}; expected arrays [N, ...]")
    return arrays


def _by_name(path: Path, data: Any) -> Any:
    """Returns the data of a PyTorch module as a dict: inputs `x` and labels `y`, or what the file names itself."""
    if data is None or isinstance(data, dict):
        return data
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise ObjectiveError(f"{path}: load_data returned a {type(data).__name__}; expected (inputs, labels) or a dict")
    return {"x": data[0], "y": data[1]}


def _check_targets(path: Path, name: str, data: dict[str, Any] | None) -> None:
    """Refuses labels that name no class by its number, which `default_loss` would take for targets of a regression.

    They are one-hot labels, other probabilities, and True and False, or 0 and 1 as floating-point numbers.
    """
    targets = None if data is None else data.get("y", data.get("labels"))
    if not isinstance(targets, np.ndarray) or not targets.size or np.issubdtype(targets.dtype, np.integer):
        return
    if targets.dtype.kind in "USOM":
        raise ObjectiveError(
            f"{path}: {name} returned {targets.dtype} labels; expected integers [N], the numbers of the classes"
        )
    several = targets.ndim > 1 and targets.shape[-1] > 1
    sums_to_1 = several and (targets >= 0).all() and np.allclose(targets.sum(-1, dtype=np.float32), 1, atol=1e-2)
    if sums_to_1 or targets.dtype == bool or ((targets == 0) | (targets == 1)).all():
        raise ObjectiveError(
            f"{path}: {name} returned {targets.dtype} labels {list(targets.shape)} that look like classes (one-hot, "
            "probabilities, or 0 and 1); expected integers [N], the numbers of the classes, or a function "
            "loss(outputs, batch) in the file, for example the squared error"
        )


def default_loss(outputs: jax.Array, batch: Any) -> jax.Array:
    """Returns the cross-entropy of integer labels, or the squared error of other targets, `[]`.

    Args:
        outputs: the outputs of a PyTorch module, `[B, C]` for labels.
        batch: a dict with the labels `[B]`, or the targets, as `y` or `labels`.
    """
    name = next((name for name in ("y", "labels") if name in batch), None)
    if name is None:
        raise ObjectiveError(f"load_data returned {sorted(batch)}; expected y or labels among them, or define loss")
    targets = batch[name]
    if jnp.issubdtype(targets.dtype, jnp.integer):
        if outputs.shape[:-1] != targets.shape:
            raise ObjectiveError(f"outputs have shape {outputs.shape}, labels {targets.shape}; expected [B, C] and [B]")
        return optax.softmax_cross_entropy_with_integer_labels(outputs.astype(jnp.float32), targets).mean()
    if outputs.shape != targets.shape:
        raise ObjectiveError(
            f"outputs have shape {outputs.shape}, targets {targets.shape} of {targets.dtype}; expected one shape for "
            "the squared error, or integer labels for the cross-entropy"
        )
    return jnp.mean((outputs - targets) ** 2)
