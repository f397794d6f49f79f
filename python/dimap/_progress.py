"""A progress bar for work that lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

DELAY = 1.0  # seconds


class Bar:
    """A bar on stderr that appears after `DELAY`, and never where stderr is no terminal.

    with Bar("opening") as bar:                  # work of unknown length
        bar.step("pruning")
        for name in bar.over("writing", sizes):  # sizes: name -> bytes
            ...
    """

    def __init__(self, description: str, *, wanted: bool = True) -> None:
        console = Console(stderr=True)
        self._wanted = wanted and console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(description, total=None)
        self._timer = threading.Timer(DELAY, self._show)
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._shown = self._over = False

    def step(self, description: str, total: int | None = None) -> None:
        """Begin the next piece of work; `total` in any unit, None where it is not known."""
        # A new task: rich cannot take the length back from one that has it.
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total)

    def advance(self, amount: int) -> None:
        """Count what is done of the step; any thread may say it."""
        self._progress.advance(self._task, amount)

    def over(self, description: str, sizes: Mapping[str, int]) -> Iterator[str]:
        """Go through the names, and count each one's size when it is done."""
        self.step(description, sum(sizes.values()))
        for name, size in sizes.items():
            yield name
            self._progress.advance(self._task, size)

    def _show(self) -> None:
        with self._lock:
            if not self._over:
                self._shown = True
                self._progress.start()

    def __enter__(self) -> Bar:
        if self._wanted:
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
        if self._shown:  # else it would print an empty line
            self._progress.stop()
