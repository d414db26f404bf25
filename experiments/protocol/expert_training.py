"""The experts of a run. They are trained, kept on disk, and measured."""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.network import Variables
from experiments.protocol.config import Config
from experiments.protocol.context import Context
from experiments.protocol.training import Problem, train
from experiments.runtime import checkpoints
from experiments.runtime.devices import everywhere, put
from experiments.runtime.progress import Stage
from experiments.runtime.stages import naming

# The key of the experts' seed is folded with these numbers, so that no two uses share a key.
_INITIALIZATION, _EXPERT_TRAINING = range(2)


def train_experts(context: Context) -> tuple[list[Variables], list[dict[str, Any]]]:
    """Trains the experts that are missing, and reads the others.

    Returns:
        The variables of each expert, and a record of each: `training_loss` by epoch, `checksum`, `seconds`, `machine`.

    Raises:
        FloatingPointError: if a loss is infinite or NaN; the error has the expert, the epoch and the step.
        DamagedStageError: if a kept expert is not what was written.
        LockedError: if experts are missing, and another process trains some into the same folder.
    """
    config, stages = context.config, context.stages
    keys = [_stage_of(context, index) for index in range(config.num_experts)]
    missing = missing_experts(context)
    stage = context.progress.stage("Experts", config.num_experts * config.expert_epochs)
    # A group is trained anew if one of its experts is missing. So the missing expert is the same as it would have been.
    together = context.trained_together
    groups = [list(range(first, first + together)) for first in range(0, config.num_experts, together)]
    groups = [group for group in groups if set(group) & set(missing)]
    stage.skip((config.num_experts - sum(map(len, groups))) * config.expert_epochs)
    if len(missing) < config.num_experts:
        context.progress.say(f"kept from an earlier run: {config.num_experts - len(missing)} experts")
    with stages.lock() if groups else contextlib.nullcontext():
        for group in groups:
            _train_and_keep(context, group, missing, stage)
    like = jax.eval_shape(context.problem.network.init, jax.random.key(0))
    sharding = everywhere(context.problem.mesh)
    experts, records = [], []
    for key in keys:
        record = stages.read(*key)
        assert record is not None
        experts.append(checkpoints.load(stages.path(*key), like, sharding, expected=record["checksum"]))
        records.append(record)
    return experts, records


def missing_experts(context: Context) -> list[int]:
    """Returns the numbers of the experts that are missing."""
    keys = [_stage_of(context, index) for index in range(context.config.num_experts)]
    stages = context.stages
    # Reading comes first: it accepts what other source has trained, if the user wants that.
    return [index for index, key in enumerate(keys) if stages.read(*key) is None or not stages.path(*key).is_dir()]


def describe_missing(context: Context) -> str:
    """Returns how many experts are to be trained, and what to do if other source has trained some of them."""
    missing = missing_experts(context)
    text = f"experts to train first: {len(missing)} of {context.config.num_experts}"
    other = [index for index in missing if context.stages.is_of_other_source(*_stage_of(context, index))]
    if other:
        text += (
            f"\n{len(other)} of them are kept, but other source computed them: if it would compute the same, stop this "
            "command and add --accept-stages experts"
        )
    return text


def measured_experts(context: Context, experts: Sequence[Variables]) -> dict[str, Any]:
    """Measures the experts, or reads what was measured.

    Returns:
        `experts`, a row for each expert with its loss and accuracy on each set of images, for example `test_loss`;
        `seconds` and `machine`. The sets are `validation`, `target` (of the first seed) and `test`.
    """
    images = {
        "validation": context.validation,
        "target": context.target(context.config.seeds[0]),
        "test": context.test,
    }

    def row(expert: Variables) -> dict[str, float]:
        return {
            f"{name}_{what}": value
            for name, examples in images.items()
            for what, value in context.evaluate(expert, examples).items()
        }

    return context.stages.run(*measurement(context), lambda: {"experts": [row(expert) for expert in experts]})


def measurement(context: Context) -> tuple[str, dict[str, Any]]:
    """Returns the name of the stage that measures the experts, and all that it depends on."""
    config = context.config
    depends_on = {
        **context.bank_fields,
        "seed": config.seeds[0],
        "target_examples": config.target_examples,
        "test_examples": config.test_examples,
        "code": context.code(measured_experts),
    }
    return "experts/accuracies", depends_on


def initial_variables(problem: Problem, config: Config) -> Variables:
    """Returns the variables that all experts of a common initialisation began with."""
    if config.initialization != "common":
        raise ValueError(f"initialization is {config.initialization!r}; expected 'common', with one origin")
    return jax.tree.map(lambda leaf: leaf[0], initialize(problem, config, [0]))


def _stage_of(context: Context, index: int) -> tuple[str, dict[str, Any]]:
    """Returns the name of an expert's stage, and all that it depends on."""
    return f"experts/{index}", {**context.expert_fields, "expert": index}


def _train_and_keep(context: Context, group: list[int], missing: list[int], stage: Stage) -> None:
    """Trains a group of experts at once, and keeps those that are missing."""
    start = time.perf_counter()
    with naming(f"experts {group}"):
        trained = _train_experts(context, group, stage)
    for index, (expert, losses) in zip(group, trained, strict=True):
        if index not in missing:
            continue
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expert)):
            raise FloatingPointError(
                f"experts/{index}: it has weights or statistics that are not finite after training, though its losses "
                "are: expected finite numbers (a smaller expert_learning_rate may help)"
            )
        key = _stage_of(context, index)
        result = {
            "training_loss": losses,
            "checksum": checkpoints.save(context.stages.path(*key), expert),
            "seconds": (time.perf_counter() - start) / len(group),
        }
        context.stages.write(*key, result)


def _train_experts(context: Context, group: list[int], stage: Stage) -> list[tuple[Variables, list[float]]]:
    """Trains some experts at once. Returns the variables of each, and its mean loss in each epoch."""
    config = context.config
    key = jax.random.fold_in(jax.random.key(config.expert_seed), _EXPERT_TRAINING)
    epochs = train(
        context.training,
        _keys(key, group),
        initialize(context.problem, config, [0] * len(group) if config.initialization == "common" else group),
        context.train,
        jnp.asarray(np.stack([context.splits.experts[index] for index in group])),
        num_epochs=config.expert_epochs,
    )
    trained, losses = {}, []
    for state, loss in epochs:
        trained = state.variables
        losses.append(loss)
        stage.advance(len(group))
    for index, loss in zip(group, losses[-1], strict=True):
        context.progress.say(f"expert {index}: training loss {loss:.3f} in the last epoch")
    return [
        (jax.tree.map(lambda leaf, at=at: leaf[at], trained), [float(loss[at]) for loss in losses])
        for at in range(len(group))
    ]


def initialize(problem: Problem, config: Config, numbers: Sequence[int]) -> Variables:
    """Returns the initial variables of the experts with these numbers, leaves `[M, ...]`."""
    key = jax.random.fold_in(jax.random.key(config.expert_seed), _INITIALIZATION)
    return put(_init(problem.network.init, _keys(key, numbers)), problem.mesh)


@functools.partial(jax.jit, static_argnums=0)
def _init(init: Callable[[jax.Array], Variables], keys: jax.Array) -> Variables:
    """Returns the initial variables for each key. Experts that are trained one after another share the program."""
    return jax.vmap(init)(keys)


def _keys(key: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """Returns a key for each number."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(numbers, jnp.uint32))
