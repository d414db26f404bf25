"""How figures and numbers look, in every report."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
"""Matplotlib's settings, for `matplotlib.rc_context`."""


def png(figure: Figure) -> bytes:
    """Returns a picture as it is written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()


def spread(values: np.ndarray, digits: int) -> str:
    """Returns mean and standard deviation; no deviation where all are equal, as where nothing depends on the seed."""
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if np.ptp(values) > 0 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, numbers to the right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
