"""The measurements of `experiments.studies.cost`, row by row. The result of each row is kept on disk."""

import dataclasses
import functools
import resource
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled

import glue_jax
from experiments.models.network import Variables
from experiments.protocol.training import Problem
from experiments.runtime.progress import ProgressBars, Stage
from experiments.runtime.stages import Stages, machine
from experiments.studies.cost.programs import (
    Setting,
    compile_program,
    digest_of_row,
    flops,
    full_step,
    make_inputs,
    make_problem,
    num_parameters,
    spsa_step,
    temporary_bytes,
    total_bytes,
)
from glue_jax import theory
from glue_jax.types import Batch

# The number of programs: those that run, and one that is compiled for its FLOPs.
_PROGRAMS = 9
# The rest of the memory is left to the system and to other processes.
_MEMORY_SHARE = 0.8
# Linux says here how much memory is free.
_MEMORY_INFO = Path("/proc/meminfo")


class Program(NamedTuple):
    """A compiled function, and its arguments."""

    function: Compiled
    arguments: tuple[Any, ...]


class Samples(NamedTuple):
    """The measurements of each call of a program, in the order of the repetitions.

    Attributes:
        seconds: the seconds of the call.
        page_faults: the number of pages of memory that this process was given during the call.
    """

    seconds: list[float]
    page_faults: list[int]


def measure(settings: list[Setting], repetitions: int, stages: Stages, progress: ProgressBars) -> list[dict[str, Any]]:
    """Measures the rows that are not measured yet, with so many timed calls of each program.

    Returns:
        A row for each setting, a dict that JSON holds. It has the setting's fields and `name`, `parameters` (their
        number), `platform`, `machine`, `temporary_bytes` and `flops` of the compiled steps, `total_bytes` (the most
        that one of the row's programs takes), and `times` (see `compare`). `times` is None if the memory is too small
        for the programs.
    """
    bar = progress.stage("Cost", len(settings) * (_PROGRAMS + repetitions))
    return [_measure_row(setting, repetitions, stages, bar, progress) for setting in settings]


def compare(samples: Mapping[str, Samples], num_directions: int) -> dict[str, Any]:
    """Compares the times of the steps with those of their parts, Eq. (9) and (10).

    Args:
        samples: the samples of the programs that `_programs` names.
        num_directions: m, the number of directions.

    Returns:
        A dict that JSON holds. `samples` has the seconds of each call. `seconds` and `page_faults` are medians.
        `backward_ratio` is gamma. `predicted` has the seconds of the steps by Eq. (9), and `over_predicted` is measured
        over predicted. `quartiles` are those of this ratio for the SPSA step, over the repetitions. `spsa_over_full` is
        the ratio of the steps. `predicted_cheaper` is Eq. (10), or Eq. (9) if m is not 1, and `cheaper` is the same as
        measured. `excess` has the seconds by which the SPSA step differs from its prediction, in three parts.
    """
    m = num_directions
    seconds = {name: statistics.median(values.seconds) for name, values in samples.items()}
    forward, blend = seconds["forward"], seconds["blend"]
    gamma = (seconds["value_and_grad"] - forward) / forward
    parts = (forward, gamma, blend, seconds["inner_products"])
    predicted = {
        "full_step": theory.full_gradient_cost(*parts),
        "spsa_step": theory.spsa_cost(forward, blend, num_directions=m),
    }
    predicted_cheaper = theory.spsa_is_cheaper(*parts) if m == 1 else predicted["spsa_step"] < predicted["full_step"]
    in_turn = {name: np.array(values.seconds) for name, values in samples.items()}
    ratios = in_turn["spsa_step"] / (2 * m * (in_turn["forward"] + in_turn["blend"]))
    return {
        "samples": {name: values.seconds for name, values in samples.items()},
        "seconds": seconds,
        "page_faults": {name: statistics.median(values.page_faults) for name, values in samples.items()},
        "backward_ratio": gamma,
        "predicted": predicted,
        "over_predicted": {name: seconds[name] / value for name, value in predicted.items()},
        "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "spsa_over_full": seconds["spsa_step"] / seconds["full_step"],
        "predicted_cheaper": predicted_cheaper,
        "cheaper": seconds["spsa_step"] < seconds["full_step"],
        "excess": {
            "one program": 2 * m * (seconds["probe"] - forward - blend),
            "many probes": seconds["estimate"] - 2 * m * seconds["probe"],
            "the rest": seconds["spsa_step"] - seconds["estimate"],
        },
    }


def available_bytes() -> int | None:
    """Returns the free memory of the first device in bytes. Returns None if the system does not say."""
    if memory := jax.devices()[0].memory_stats():
        return memory["bytes_limit"] - memory["bytes_in_use"]
    if not _MEMORY_INFO.exists():
        return None
    fields = dict(line.split(":") for line in _MEMORY_INFO.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _measure_row(
    setting: Setting, repetitions: int, stages: Stages, bar: Stage, progress: ProgressBars
) -> dict[str, Any]:
    """One row."""
    name, problem = setting.name, make_problem(setting)
    code = digest_of_row(setting, _measure_row)
    depends_on = {**dataclasses.asdict(setting), "machine": machine(), "version": glue_jax.__version__, "code": code}
    programs = functools.cache(lambda: _programs(setting, problem, bar))
    sizes = stages.read(f"sizes/{name}", depends_on) or stages.write(f"sizes/{name}", depends_on, _sizes(programs()))
    timed = {**depends_on, "repetitions": repetitions}
    times = stages.read(f"times/{name}", timed)
    if times is None:
        available = available_bytes()
        if available is None or sizes["total_bytes"] <= _MEMORY_SHARE * available:
            samples = _time(programs(), repetitions, bar)
            times = stages.write(f"times/{name}", timed, compare(samples, setting.num_directions))
        else:
            bar.skip(repetitions)
            progress.say(
                f"{name}: not timed, since it takes {sizes['total_bytes'] / 1e9:.1f} GB, and "
                f"{available / 1e9:.1f} GB are free"
            )
    else:
        bar.skip(repetitions)
    if not programs.cache_info().currsize:
        bar.skip(_PROGRAMS)
    known = {"name": name, "parameters": num_parameters(problem), "platform": jax.devices()[0].platform}
    return {**dataclasses.asdict(setting), **known, **sizes, "times": times}


def _programs(setting: Setting, problem: Problem, bar: Stage) -> dict[str, Program]:
    """Returns the steps, their parts in Eq. (9), and the programs in between."""
    inputs = make_inputs(setting, problem)
    state, experts, batch = inputs.state, inputs.experts, inputs.batch
    m = setting.num_directions

    def inner_products(experts: Variables, alpha: jax.Array, gradient: Variables) -> jax.Array:
        _, pull_back = jax.vjp(lambda alpha: glue_jax.blend(experts, alpha), alpha)
        return pull_back(gradient)[0]

    def probe(experts: Variables, alpha: jax.Array, batch: Batch) -> jax.Array:
        return problem.loss(glue_jax.blend(experts, alpha), batch)

    def estimate(
        key: jax.Array, state: glue_jax.GlueState, experts: Variables, batch: Batch
    ) -> glue_jax.estimators.Estimate:
        return glue_jax.estimators.spsa_gradient(
            jax.random.fold_in(key, state.step),
            lambda beta: probe(experts, jax.nn.softmax(beta), batch),
            state.beta,
            num_directions=m,
        )

    def compiled(function: Any, *arguments: Any) -> Program:
        program = Program(compile_program(setting, function, arguments), arguments)
        bar.advance()
        return program

    alpha = glue_jax.alpha(state)
    blend = compiled(glue_jax.blend, experts, alpha)
    variables = blend.function(*blend.arguments)
    return {
        "forward": compiled(problem.loss, variables, batch),
        "value_and_grad": compiled(jax.value_and_grad(problem.loss), variables, batch),
        "blend": blend,
        # A gradient has the shapes of the variables, so its inner products cost the same.
        "inner_products": compiled(inner_products, experts, alpha, variables),
        "probe": compiled(probe, experts, alpha, batch),
        "estimate": compiled(estimate, *inputs),
        "full_step": compiled(full_step(problem), *inputs),
        "spsa_step": compiled(spsa_step(problem, setting), *inputs),
        "spsa_step_vmapped": compiled(spsa_step(problem, setting, probe_batch_size=2 * m), *inputs),
    }


def _sizes(programs: Mapping[str, Program]) -> dict[str, Any]:
    """Memory and FLOPs of the compiled steps."""
    functions = {name: program.function for name, program in programs.items()}
    return {
        "temporary_bytes": {name: temporary_bytes(functions[name]) for name in ("full_step", "spsa_step")},
        "flops": {name: flops(functions[name]) for name in ("full_step", "spsa_step_vmapped")},
        "total_bytes": max(total_bytes(functions[name]) for name in functions if name != "spsa_step_vmapped"),
    }


def _time(programs: Mapping[str, Program], repetitions: int, bar: Stage) -> dict[str, Samples]:
    """Times the programs. They take turns."""
    timed = {name: program for name, program in programs.items() if name != "spsa_step_vmapped"}
    forward = timed["forward"]
    samples = {name: Samples([], []) for name in timed}
    for repetition in range(-1, repetitions):
        for name, (function, arguments) in timed.items():
            # This call is not timed. A program right after a backward pass would pay for the memory that the pass gave
            # back.
            jax.block_until_ready(forward.function(*forward.arguments))
            faults, start = _page_faults(), time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds, faults = time.perf_counter() - start, _page_faults() - faults
            # The first round warms up.
            if repetition >= 0:
                samples[name].seconds.append(seconds)
                samples[name].page_faults.append(faults)
        if repetition >= 0:
            bar.advance()
    return samples


def _page_faults() -> int:
    """Returns how many pages of memory this process was given so far. Pages that were read from a disk do not count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
