"""The steps whose cost is measured. Images and experts are random, because their values do not change the cost."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Compiled

import glue_jax
from experiments import models
from experiments.models.network import Variables
from experiments.protocol.data import Examples
from experiments.protocol.training import Problem
from experiments.runtime.sources import digest, name_of

IMAGE_SHAPES: Mapping[str, tuple[int, int, int]] = {
    "resnet20": (32, 32, 3),
    "mobilenetv2": (32, 32, 3),
    "vit": (64, 64, 3),
    "convnet": (8, 8, 1),
}
"""Height, width and channels of each network's images: CIFAR-10's, SVHN's, Imagenette's at 64 x 64 pixels, and the
digits'. The experiment on Imagenette has 48 x 48 pixels and a ViT of half the width."""
NUM_CLASSES = 10
"""The number of classes of each of these data sets."""
OPTIMIZER = optax.adam(1e-2, b1=0.9, b2=0.99)
"""The optimizer of the coefficients (section 5)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What the cost of a step depends on.

    Attributes:
        network: a key of `IMAGE_SHAPES`.
        batch_size: the number of images in a minibatch.
        num_experts: K, the number of experts.
        num_directions: m, the number of directions of the SPSA step. The full-gradient step does not depend on it.
        matmul_precision: the precision of the network's products, as in `Config`. A CPU has only one precision.
    """

    network: str = "resnet20"
    batch_size: int = 64
    num_experts: int = 10
    num_directions: int = 1
    matmul_precision: Literal["highest", "high", "default"] = "highest"

    def __post_init__(self) -> None:
        """Refuses values out of their range. The ValueError has the field, its value, and what was expected."""
        if self.network not in IMAGE_SHAPES:
            raise ValueError(f"network is {self.network!r}; expected one of {tuple(IMAGE_SHAPES)}")
        for name in ("batch_size", "num_experts", "num_directions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def name(self) -> str:
        """The name of the row in messages, reports and files."""
        return f"{self.network}-batch{self.batch_size}-k{self.num_experts}-m{self.num_directions}"


class StepInputs(NamedTuple):
    """The arguments of a step."""

    key: jax.Array
    state: glue_jax.GlueState
    experts: Variables
    batch: Examples


def make_problem(setting: Setting) -> Problem:
    """Returns the network. Its images are scaled from [0, 255] to [-2, 2]."""
    shape = IMAGE_SHAPES[setting.network]
    network = models.build(setting.network, image_shape=shape, num_classes=NUM_CLASSES)
    return Problem(network, np.full(shape[-1], 0.5, np.float32), np.full(shape[-1], 0.25, np.float32))


def digest_of_row(setting: Setting, function: Callable[..., Any]) -> str:
    """Returns the digest of the source of a row: of a function, and of the setting's network."""
    network = models.MODULES[setting.network]
    return digest(name_of(function), name_of(network), leaving_out=("experiments.models:MODULES",))


def num_parameters(problem: Problem) -> int:
    """Returns the number of a network's parameters."""
    variables = jax.eval_shape(problem.network.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def make_inputs(setting: Setting, problem: Problem) -> StepInputs:
    """Returns random images and labels, experts as they are initialised, and the state of the uniform average."""
    experts_key, images_key, labels_key, key = jax.random.split(jax.random.key(0), 4)
    shape = (setting.batch_size, *IMAGE_SHAPES[setting.network])
    return StepInputs(
        key=key,
        state=glue_jax.init(setting.num_experts, OPTIMIZER),
        experts=jax.vmap(problem.network.init)(jax.random.split(experts_key, setting.num_experts)),
        batch=Examples(
            images=jax.random.bits(images_key, shape, jnp.uint8),
            labels=jax.random.randint(labels_key, shape[:1], 0, NUM_CLASSES),
        ),
    )


def full_step(problem: Problem) -> Callable[..., Any]:
    """Returns the full-gradient step as a function of `StepInputs`."""
    return functools.partial(glue_jax.full_gradient_step, loss_fn=problem.loss, optimizer=OPTIMIZER)


def spsa_step(problem: Problem, setting: Setting, *, probe_batch_size: int | None = None) -> Callable[..., Any]:
    """Returns the SPSA step as a function of `StepInputs`.

    Args:
        problem: the network.
        setting: the setting. Its number of directions matters.
        probe_batch_size: see `glue_jax.estimators.spsa_gradient`.
    """
    return functools.partial(
        glue_jax.spsa_step,
        loss_fn=problem.loss,
        optimizer=OPTIMIZER,
        num_directions=setting.num_directions,
        probe_batch_size=probe_batch_size,
        # `compile_program` sets the precision, for this step and for the full-gradient step.
        matmul_precision=None,
    )


def compile_program(setting: Setting, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Compiled:
    """Returns a function, compiled for its arguments. These are arrays or `jax.ShapeDtypeStruct`s."""
    with jax.default_matmul_precision(setting.matmul_precision):
        return jax.jit(function).lower(*arguments).compile()


def temporary_bytes(program: Compiled) -> int:
    """Returns the peak memory of a program in bytes, without its arguments and its results."""
    return _memory(program).temp_size_in_bytes


def total_bytes(program: Compiled) -> int:
    """Returns the peak memory of a program in bytes, with its arguments and its results."""
    memory = _memory(program)
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


def flops(program: Compiled) -> float:
    """Returns the number of floating-point operations of a program. XLA counts those of a loop's body once."""
    analysis = program.cost_analysis()
    if not analysis:
        raise RuntimeError("this backend does not say how many FLOPs a program takes")
    return float(analysis["flops"])


def _memory(program: Compiled) -> Any:
    """XLA's account of a program's memory."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError("this backend does not say how much memory a program takes")
    return memory
