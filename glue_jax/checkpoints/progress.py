"""A line on stderr that says how far a command is, and about how long it takes."""

import sys
import time
from types import TracebackType

# Seconds between two lines, on a terminal and in a file.
_ON_TERMINAL, _IN_FILE = 0.2, 30.0


class ProgressLine:
    """Shows progress. On a terminal one line changes; in a file there is a new line every half minute."""

    def __init__(self, name: str) -> None:
        """Starts the clock. `name` stands at the start of the line."""
        self._name = name
        self._started = self._shown = time.monotonic()
        self._first: int | None = None
        self._is_terminal = sys.stderr.isatty()

    def show(self, done: int, total: int) -> None:
        """Shows how much of a total is done, in any unit, if some time went by since the last line."""
        now = time.monotonic()
        if self._first is None:
            # What an earlier run did took no time in this one.
            self._first, self._started = done, now
        # One moment alone says nothing about the speed.
        if done == self._first or now - self._shown < (_ON_TERMINAL if self._is_terminal else _IN_FILE):
            return
        self._shown = now
        minutes, seconds = divmod(round((now - self._started) / (done - self._first) * (total - done)), 60)
        text = f"{self._name}: {done / total:.0%}, about {minutes} min {seconds} s left"
        print(f"\r{text}\033[K" if self._is_terminal else text, end="" if self._is_terminal else "\n", file=sys.stderr)

    def __enter__(self) -> "ProgressLine":
        """Returns the line."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Clears the line on a terminal."""
        if self._is_terminal:
            print("\r\033[K", end="", file=sys.stderr)
