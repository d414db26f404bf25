"""How figures, tables and numbers look, in every report, and how a report is written."""

import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

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
"""Matplotlib's settings, for `matplotlib.rc_context`."""


def write_report(folder: Path, results: Mapping[str, Any], markdown: str, pictures: Mapping[str, Figure]) -> None:
    """Writes `results.json`, the pictures and `report.md`, each whole or not at all.

    Args:
        folder: where to.
        results: what JSON holds.
        markdown: the report.
        pictures: by the names of their files, which the report points to.
    """
    # All is made before any of it is written, and the report, which points to the rest, last.
    contents = {name: png(figure) for name, figure in pictures.items()}
    write_json(folder / "results.json", results)
    for name, content in {**contents, "report.md": markdown.encode()}.items():
        write_whole(folder / name, functools.partial(Path.write_bytes, data=content))


def png(figure: Figure) -> bytes:
    """Returns a picture as it is written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def unbroken(title: str) -> str:
    """Returns a title that `textwrap` breaks at its commas alone, no field from its value."""
    return title.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")


def shortened(title: str, width: int) -> str:
    """Returns a title with as many of its parts, between commas, as `width` characters hold, and '...' for the rest."""
    parts = title.split(", ")
    kept = [part for index, part in enumerate(parts) if len(", ".join(parts[: index + 1])) <= width]
    return title if len(kept) == len(parts) else f"{', '.join(kept)} ..."


def number(value: float) -> str:
    """Returns a number with three digits, or with all that are before its point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def ends(values: Iterable[float]) -> str:
    """Returns the least and the most of some numbers, or the one that they all are."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys((number(ordered[0]), number(ordered[-1]))))


def spread(values: np.ndarray, digits: int) -> str:
    """Returns mean and standard deviation; no deviation where all are equal, as where nothing depends on the seed."""
    deviation = f" ± {values.std(ddof=1):,.{digits}f}" if np.ptp(values) > 0 else ""
    return f"{values.mean():,.{digits}f}{deviation}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, numbers to the right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claim_table(claims: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Returns headers and cells: each `claim` with its `section`, what was `measured` and the `verdict`."""
    keys = ("claim", "section", "measured", "verdict")
    return ["the paper", "section", "measured", "holds"], [[claim[key] for key in keys] for claim in claims]


def rich_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """Returns a table for the terminal, numbers to the right."""
    table = Table(title=title, caption=caption)
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def verdict(holds: Sequence[bool]) -> str:
    """Returns what cases say about a claim: yes if it holds in all, no if in none, else in how many; - without any."""
    if not holds:
        return "-"
    return "yes" if all(holds) else f"in {sum(holds)} of {len(holds)}" if any(holds) else "no"
