"""What the studies share: the way from a command line to the experts of an experiment, and to a report."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from experiments.protocol import data
from experiments.protocol.context import Context, prepare
from experiments.protocol.expert_training import describe_missing
from experiments.protocol.presets import Parsed, parse
from experiments.reporting.presentation import rich_table, write_report
from experiments.runtime.session import exit_on, session
from experiments.runtime.stages import Stages, machine


class Report(NamedTuple):
    """What a study shows.

    Attributes:
        markdown: the report.
        figures: by the names of their files.
        tables: by title, the header and the rows.
    """

    markdown: str
    figures: Mapping[str, Figure]
    tables: Mapping[str, tuple[list[str], list[list[str]]]]


def run(
    arguments: type[Parsed],
    module: str,
    description: str,
    words: Sequence[str] | None,
    *,
    title: str,
    rows: str,
    measure: Callable[[Context, Parsed, Stages], Mapping[str, Any]],
    present: Callable[[Mapping[str, Any]], Report],
) -> dict[str, Any]:
    """Runs a study from a command line to its report.

    Args:
        arguments: what a command line says.
        module: of the study, without `experiments.`.
        description: what `--help` says.
        words: the command line; None is the process's.
        title: what the study is about.
        rows: the name under which `measure` returns what it measured, a list of dicts that each have a `machine`.
        measure: measures what is not measured yet. It keeps it in the stages.
        present: from the results to the report.

    Returns:
        The results, which JSON holds: `title`, `command`, `machine`, `config`, and what `measure` returns.

    Raises:
        SystemExit: as `experiments.runtime.session.session` does, and for a command line that cannot be followed.
    """
    words = sys.argv[1:] if words is None else list(words)
    console = Console(markup=False)
    with exit_on(ValueError):
        parsed = parse(arguments, module, description, words)
        parsed.check(least_experts=2)
    command = shlex.join(["python", "-m", f"experiments.{module}", *words])
    with session(parsed.out_dir, console, command) as progress:
        with exit_on(ValueError, OSError, data.DatasetNotFoundError):
            dataset = data.load(parsed.config.dataset, parsed.data_dir, parsed.config.image_size)
            kept, accept = parsed.run_dir / "stages", parsed.accept_stages
            context = prepare(parsed.config, dataset, kept, progress, accept_stages=accept)
        progress.say(f"{dataset.name}; {machine()}\n{describe_missing(context)}")
        measured = measure(context, parsed, parsed.stages(progress))
        results = {
            "title": f"{title}: {parsed.experiment}, preset {parsed.preset}",
            "command": command,
            "machine": "; ".join(sorted({row["machine"] for row in measured[rows]})),
            "config": dataclasses.asdict(parsed.config),
            **measured,
        }
        report = present(results)
        write_report(parsed.out_dir, results, report.markdown, report.figures)
    for name, table in report.tables.items():
        console.print(rich_table(name, *table))
    console.print(f"report: {parsed.out_dir / 'report.md'}", highlight=False, soft_wrap=True)
    return results


def slug(name: str) -> str:
    """Returns a name as it stands in files: `Gauss-Newton, by layer` is `gauss-newton-by-layer`."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
