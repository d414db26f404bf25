"""Compiled programs, and the time that they take."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.stages import Compiled

Key = TypeVar("Key", bound=Hashable)

# Where Linux says how much memory is free.
_MEMORY_INFO = Path("/proc/meminfo")


class Program(NamedTuple):
    """A function that is compiled and has run once.

    Attributes:
        name: of the function.
        function: compiled for the arguments.
        arguments: what it is called with.
        result: what it returned.
    """

    name: str
    function: Compiled
    arguments: tuple[Any, ...]
    result: Any


def compile_and_run(name: str, function: Callable[..., Any], *arguments: Any) -> Program | str:
    """Compiles a function and calls it once.

    Args:
        name: of the program.
        function: any function that may be one that JAX cannot trace.
        *arguments: pytrees of arrays.

    Returns:
        The program; or, as text, what was raised while JAX traced the function, or that it needs more memory than there
        is.
    """
    try:
        lowered = jax.jit(function).lower(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    try:
        compiled = lowered.compile()
        needed, free = temporary_bytes(compiled), _free_bytes(compiled)
        if needed is not None and free is not None and needed > free:
            return f"it needs {needed / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are free"
        return Program(name, compiled, arguments, jax.block_until_ready(compiled(*arguments)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _first_line(error)


def temporary_bytes(program: Compiled) -> int | None:
    """Returns what a program takes beside its arguments and results; None where the backend does not say."""
    memory = program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def median_seconds(programs: Mapping[Key, Program], repeats: int, *, between: Program) -> dict[Key, float]:
    """Returns the seconds of a call of each program, medians.

    The programs take turns, so that what else the machine does meets all of them.

    Args:
        programs: to time.
        repeats: how often.
        between: a program that runs, untimed, before each: what runs right after a backward pass pays for the pages of
            memory that this gave back.
    """
    samples = {key: [] for key in programs}
    for _ in range(repeats):
        for key, program in programs.items():
            _run(between)
            samples[key].append(_seconds(program))
    return {key: statistics.median(values) for key, values in samples.items()}


def _seconds(program: Program) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    _run(program)
    return time.perf_counter() - start


def _run(program: Program) -> None:
    """Calls a program, and waits for it."""
    jax.block_until_ready(program.function(*program.arguments))


def _free_bytes(program: Compiled) -> int | None:
    """The memory that is free on a CPU, where a program that takes more is killed. An accelerator raises an error."""
    device = next(iter(jax.tree.leaves(program.output_shardings)[0].device_set))
    if device.platform != "cpu" or not _MEMORY_INFO.exists():
        return None
    fields = dict(line.split(":") for line in _MEMORY_INFO.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _first_line(error: Exception) -> str:
    """What an error says, without what follows."""
    return str(error).strip().split("\n")[0]
