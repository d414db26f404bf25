"""What the studies share.

It leads from a command line to the experts of an experiment, and from results to a report.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from experiments.protocol import data
from experiments.protocol.config import Config
from experiments.protocol.context import Context, prepare
from experiments.protocol.data import Dataset
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import ExpertArguments, Parsed, parse
from experiments.reporting.presentation import Report, reported
from experiments.runtime.progress import ProgressBars
from experiments.runtime.session import exit_on
from experiments.runtime.sources import name_of
from experiments.runtime.stages import Stages, machine


def study(
    arguments: type[Parsed],
    measure: Callable[[Context, Parsed, Stages], Mapping[str, Any]],
    present: Callable[[Mapping[str, Any]], Report],
    *,
    title: str,
    rows: str | None = None,
    plan: Callable[[Context, Parsed], str] | None = None,
) -> Callable[..., dict[str, Any]]:
    """Returns the `main` of a study, which leads from a command line to the report.

    Args:
        arguments: the class of the options.
        measure: the function that measures what is not measured yet, and keeps it in the stages. Its module is the
            command, and the docstring of its module is the text of `--help`.
        present: the function that makes the report of the results.
        title: the subject of the study.
        rows: the name under which `measure` returns a list of dicts that each have a `machine`. If it is None, the
            machine is that of this process, unless `measure` returns a `machine`.
        plan: a function that returns a text to print before the work begins. By default it is how many experts are
            missing.

    Returns:
        A function of the words of a command line. By default they are those of this process. It returns the results,
        which JSON holds: `title`, `command`, `machine`, `config`, and what `measure` returns. It raises SystemExit as
        `experiments.runtime.session.session` does, and if the command line cannot be followed.
    """
    module = name_of(measure).partition(":")[0].removeprefix("experiments.").removesuffix(".__main__")

    def main(words: Sequence[str] | None = None) -> dict[str, Any]:
        """Measures, from the words of a command line to the report. Returns the results."""
        words = sys.argv[1:] if words is None else list(words)
        with exit_on(ValueError):
            parsed = parse(arguments, module, sys.modules[measure.__module__].__doc__ or "", words)
            parsed.check()
        command = command_line(module, words)

        def work(progress: ProgressBars) -> dict[str, Any]:
            with exit_on(ValueError, OSError, data.DatasetNotFoundError):
                dataset = data.load(parsed.config.dataset, parsed.data_dir, parsed.config.image_size)
                context = open_context(parsed, parsed.config, dataset, progress)
            planned = plan(context, parsed) if plan else describe_missing(context)
            progress.say(f"{dataset.name}; {machine()}\n{planned}")
            measured = measure(context, parsed, parsed.stages(progress))
            machines = {row["machine"] for row in measured[rows]} if rows else {machine()}
            return {
                "title": f"{title}: {parsed.experiment}, preset {parsed.preset}",
                "command": command,
                "machine": "; ".join(sorted(machines)),
                "config": dataclasses.asdict(parsed.config),
                **measured,
            }

        return reported(parsed.out_dir, command, work, present)

    return main


def open_context(parsed: ExpertArguments, config: Config, dataset: Dataset, progress: ProgressBars) -> Context:
    """Returns the context of the experiment whose experts a command line takes.

    Raises:
        ValueError: if the config does not fit the data.
    """
    return prepare(config, dataset, parsed.run_dir / "stages", progress, accept_stages=parsed.accept_stages)


def command_line(module: str, words: Sequence[str]) -> str:
    """Returns the command line of a module of `experiments`, in the form that a shell takes."""
    return shlex.join(["python", "-m", f"experiments.{module}", *words])


def chosen(field: str, words: Collection[str], names: Collection[str], *, whole: bool = False) -> list[str]:
    """Returns the names that contain one of some words, in their order. No words choose all names.

    Args:
        field: the option that has the words.
        words: parts of names.
        names: all names.
        whole: whether a word that is a name stands for this name alone.

    Raises:
        ValueError: if a word is part of no name; the error has the field, the word, and the names.
    """
    found = set() if words else set(names)
    for word in words:
        of_word = {word} if whole and word in names else {name for name in names if word in name}
        if not of_word:
            raise ValueError(f"{field} has {word!r}; expected part of one of {list(names)}")
        found |= of_word
    return [name for name in names if name in found]


def slug(name: str) -> str:
    """Returns a name in the form for files: `Gauss-Newton, by layer` becomes `gauss-newton-by-layer`."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
