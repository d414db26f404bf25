"""How figures, tables and numbers look in every report, and how a report is written."""

import functools
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.runtime.progress import ProgressBars
from experiments.runtime.session import session
from experiments.runtime.stages import write_json, write_whole

TableCells: TypeAlias = tuple[list[str], list[list[str]]]
"""The header of a table, and its rows."""
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
"""The settings of Matplotlib, for `matplotlib.rc_context`."""


class Report(NamedTuple):
    """What a command shows of its results.

    Attributes:
        markdown: the report.
        figures: the pictures, by the names of their files. The report points to them.
        tables: the header and the rows of each table that is printed, by title.
    """

    markdown: str
    figures: Mapping[str, Figure]
    tables: Mapping[str, TableCells]

    def write(self, folder: Path, results: Mapping[str, Any] | None = None) -> None:
        """Writes `results.json` if results are given, the pictures and `report.md`.

        Each is written whole or not at all.
        """
        # Everything is made before anything is written. The report points to the rest, so it is written last.
        contents = {name: png(figure) for name, figure in self.figures.items()}
        if results is not None:
            write_json(folder / "results.json", results)
        for name, content in {**contents, "report.md": self.markdown.encode()}.items():
            write_whole(folder / name, functools.partial(Path.write_bytes, data=content))

    def show(self, folder: Path, console: Console) -> None:
        """Prints the tables, and the path of the report."""
        for title, table in self.tables.items():
            console.print(rich_table(title, *table))
        console.print(f"report: {folder / 'report.md'}", highlight=False, soft_wrap=True)


def reported(
    out_dir: Path,
    command: str,
    work: Callable[[ProgressBars], dict[str, Any]],
    present: Callable[[Mapping[str, Any]], Report],
) -> dict[str, Any]:
    """Does the work of a command in its folder, and then writes and shows the report.

    Args:
        out_dir: the folder of the command.
        command: the command line, such as `python -m experiments.digits`.
        work: `work(progress)` returns the results, which JSON holds.
        present: the function that makes the report of the results.

    Returns:
        The results.

    Raises:
        SystemExit: as `experiments.runtime.session.session` does.
    """
    # A path may contain brackets, which are no markup.
    console = Console(markup=False)
    with session(out_dir, console, command) as progress:
        results = work(progress)
        # As the file holds them, so that experiments.rewrite makes the same report.
        report = present(json.loads(json.dumps(results)))
        report.write(out_dir, results)
    report.show(out_dir, console)
    return results


def page(results: Mapping[str, Any], *blocks: str) -> str:
    """Returns a report: the title, the command and the machine, and then some blocks of Markdown."""
    head = f"# {results['title']}", f"    {results['command']}", f"Run on {results['machine']}."
    return "\n\n".join([*head, *blocks]) + "\n"


def png(figure: Figure) -> bytes:
    """Returns the bytes of a picture's file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def unbroken(title: str) -> str:
    """Returns a title that `textwrap` breaks only after commas, not between a field and its value."""
    return title.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")


def shortened(title: str, width: int) -> str:
    """Returns a title with as many of its parts, between commas, as fit `width` characters, and '...' for the rest."""
    parts = title.split(", ")
    kept = [part for index, part in enumerate(parts) if len(", ".join(parts[: index + 1])) <= width]
    return title if len(kept) == len(parts) else f"{', '.join(kept)} ..."


def number(value: float) -> str:
    """Returns a number with three digits, or with all digits before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def ends(values: Iterable[float]) -> str:
    """Returns the least and the most of some numbers as text. Equal numbers are there once."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys((number(ordered[0]), number(ordered[-1]))))


def spread(values: np.ndarray, digits: int) -> str:
    """Returns the mean and the standard deviation as text.

    Equal values have none, as when nothing depends on the seed.
    """
    deviation = f" ± {values.std(ddof=1):,.{digits}f}" if np.ptp(values) > 0 else ""
    return f"{values.mean():,.{digits}f}{deviation}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. Numbers are on the right of their cells."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> TableCells:
    """Returns headers and cells.

    Args:
        rows: the fields of each row.
        columns: a format string for each header. It takes fields, for example `{loss:.3f}` or `{times[full_step]:.0f}`.
    """
    return list(columns), [[cell.format_map(row) for cell in columns.values()] for row in rows]


def grouped(rows: Iterable[Mapping[str, Any]], field: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Returns the rows with each value of a field, in their order."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return groups


class Claim(NamedTuple):
    """A claim of the paper, with what was measured.

    Attributes:
        claim: in the paper's words.
        section: the section of the paper.
        quantity: what was measured.
        values: the value of the quantity in each case.
        holds: whether the claim holds in each case.
    """

    claim: str
    section: str
    quantity: str
    values: Sequence[float]
    holds: Sequence[bool]

    @property
    def verdict(self) -> str:
        """'yes' if the claim holds in all cases, 'no' if in none.

        Otherwise it says in how many. Without a case it is '-'.
        """
        held = sum(self.holds)
        if 0 < held < len(self.holds):
            return f"in {held} of {len(self.holds)}"
        return "-" if not self.holds else "yes" if held else "no"


def claim_table(claims: Iterable[Claim]) -> TableCells:
    """Returns the header, and a row for each claim: the least and the most that was measured, and the verdict."""
    return ["the paper", "section", "measured", "least to most", "holds"], [
        [found.claim, found.section, found.quantity, ends(found.values) if found.values else "-", found.verdict]
        for found in claims
    ]


def rich_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Returns a table for the terminal. Numbers are on the right of their cells."""
    table = Table(title=title)
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table
