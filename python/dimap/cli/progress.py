"""A progress bar for work that lasts."""

from __future__ import annotations

import math
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..report.text import make_console

if TYPE_CHECKING:
    from rich.progress import Progress

DELAY = 1.0  # seconds


class Bar:
    """A bar on stderr that appears after `DELAY`, and never where stderr is no terminal.

    with Bar("opening") as bar:               # work of unknown length
        bar.step("reading", total=1 << 30)    # another piece of it, of known length
        bar.advance(1 << 20)

    whole: the name of a single bar for all steps; as much is written, after all readings, as one reads.
    """

    def __init__(self, description: str, *, whole: str = "", wanted: bool = True) -> None:
        self._description, self._whole = description, whole
        self._done = self._begun = 0
        self._total: int | None = None
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._timer: threading.Timer | None = None
        if wanted:
            self._timer = threading.Timer(DELAY, self._show)
            self._timer.daemon = True

    def step(self, description: str, total: int | None = None) -> None:
        """Begin the next piece of work; `total` in any unit, None where it is not known."""
        with self._lock:
            goes_on = bool(self._whole) and self._description == self._whole
            self._done = self._begun if goes_on else 0
            if total is not None:
                self._begun = self._done + total
                total = self._begun + (total if self._whole and description == "reading" else 0)
            goes_on = goes_on and (total is None) == (self._total is None)
            self._description, self._total = self._whole or description, total
            if self._progress is not None and goes_on:
                self._progress.update(self._progress.task_ids[0], total=total)
            elif self._progress is not None:
                self._begin(self._progress)

    def advance(self, amount: int) -> None:
        """Count what is done of the step; any thread may say it."""
        with self._lock:
            self._done += amount
            if self._progress is not None:
                self._progress.update(self._progress.task_ids[0], completed=self._done)

    def _begin(self, progress: Progress) -> None:
        for task in progress.task_ids:  # rich cannot take the length back from one that has it
            progress.remove_task(task)
        progress.add_task(self._description, total=self._total, completed=self._done)

    def _show(self) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            ProgressColumn,
            TaskProgressColumn,
            TextColumn,
        )
        from rich.text import Text

        class Left(ProgressColumn):
            def render(self, task: Any) -> Text:
                known = task.total is not None
                seconds = task.time_remaining if known else task.elapsed
                time = "" if seconds is None else timedelta(seconds=math.ceil(seconds))
                return Text(f"{time} {'left' if known else 'so far'}" if time != "" else "")

        console = make_console(stderr=True)
        if not console.is_terminal or console.is_dumb_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        progress = Progress(*columns, Left(), console=console, transient=True)
        with self._lock:
            self._begin(progress)
            progress.start()
            self._progress = progress

    def __enter__(self) -> Bar:
        if self._timer is not None:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()  # it may be about to show the bar
        if self._progress is not None:
            self._progress.stop()
