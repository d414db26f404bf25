"""Progress: a bar for each stage, with the time that is left. Without a terminal, lines stand for the bars."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# Without a terminal, a line is printed so often.
_SECONDS_BETWEEN_LINES = 60.0


class Stage:
    """One bar."""

    def __init__(self, bars: RichProgress, name: str, total: int):
        """Shows a bar of `total` units."""
        self._bars, self._total = bars, total
        self._task = bars.add_task(name, total=total)
        self._last_line = time.monotonic()

    def advance(self, units: int = 1) -> None:
        """Counts units of work as done."""
        self._bars.advance(self._task, units)
        if not self._bars.console.is_terminal and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            task = next(task for task in self._bars.tasks if task.id == self._task)
            left = "" if task.time_remaining is None else f", {timedelta(seconds=task.time_remaining)} left"
            self._bars.console.print(
                f"{task.description}: {task.completed:.0f} of {task.total:.0f}{left}", highlight=False
            )

    def skip(self, units: int) -> None:
        """Takes units off the work: an earlier run did them, or they are not needed."""
        self._total -= units
        self._bars.update(self._task, total=self._total, visible=self._total > 0)


class ProgressBars:
    """The bars of a run. It is a context manager."""

    def __init__(self, console: Console):
        """Shows bars on `console` if it is a terminal."""
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # An epoch may take minutes; the default forgets after 30 seconds.
            speed_estimate_period=24 * 3600,
        )

    def __enter__(self) -> "ProgressBars":
        """Starts showing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops showing."""
        self._bars.stop()

    def stage(self, name: str, total: int) -> Stage:
        """Returns a new bar."""
        return Stage(self._bars, name, total)

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._bars.console.print(text, highlight=False, soft_wrap=True)
