"""Compiled programs, and how long they take."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
from jax.stages import Compiled

Key = TypeVar("Key", bound=Hashable)

# Linux lists its free memory here.
_MEMORY_INFO = Path("/proc/meminfo")


class Program(NamedTuple):
    """A function that was compiled and has run once.

    Attributes:
        name: the name of the function.
        function: the compiled function.
        arguments: the arguments that it is called with.
        result: its result.
    """

    name: str
    function: Compiled
    arguments: tuple[Any, ...]
    result: Any


def compile_and_run(name: str, function: Callable[..., Any], *arguments: Any) -> Program | str:
    """Compiles a function and calls it once.

    Args:
        name: the name of the program.
        function: a function of arrays. It may be one that JAX cannot trace.
        *arguments: pytrees of arrays.

    Returns:
        The program. If JAX cannot trace the function, or if memory is too small, the reason as text.
    """
    try:
        lowered = jax.jit(function).lower(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    try:
        compiled = lowered.compile()
        needed, free = temporary_bytes(compiled), _free_bytes(compiled)
        if needed is not None and free is not None and needed > free:
            return f"it needs {needed / 1e9:.3g} GB of memory, but {free / 1e9:.3g} GB are free"
        return Program(name, compiled, arguments, jax.block_until_ready(compiled(*arguments)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _first_line(error)


def temporary_bytes(program: Compiled) -> int | None:
    """Returns the memory that a program takes beside its arguments and results, or None if the backend does not say."""
    memory = program.memory_analysis()
    return None if memory is None else memory.temp_size_in_bytes


def median_seconds(programs: Mapping[Key, Program], repeats: int, *, between: Program) -> dict[Key, float]:
    """Returns the median time of one call of each program, in seconds.

    The programs take turns, so that other work on the machine disturbs all of them equally.

    Args:
        programs: the programs to time.
        repeats: how often each program is timed.
        between: a program that runs, untimed, before each timed call. A backward pass gives memory back, and the next
            program would pay to get it again.
    """
    samples = {key: [] for key in programs}
    for _ in range(repeats):
        for key, program in programs.items():
            _run(between)
            samples[key].append(_seconds(program))
    return {key: statistics.median(values) for key, values in samples.items()}


def _seconds(program: Program) -> float:
    """Returns the time of one call, in seconds."""
    start = time.perf_counter()
    _run(program)
    return time.perf_counter() - start


def _run(program: Program) -> None:
    """Calls a program, and waits for its result."""
    jax.block_until_ready(program.function(*program.arguments))


def _free_bytes(program: Compiled) -> int | None:
    """Returns the free memory of a CPU in bytes, and None for an accelerator.

    On a CPU, the system kills a program that takes more. An accelerator raises an error.
    """
    device = next(iter(jax.tree.leaves(program.output_shardings)[0].device_set))
    if device.platform != "cpu" or not _MEMORY_INFO.exists():
        return None
    fields = dict(line.split(":") for line in _MEMORY_INFO.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _first_line(error: Exception) -> str:
    """Returns the first line of an error's message."""
    return str(error).strip().split("\n")[0]
