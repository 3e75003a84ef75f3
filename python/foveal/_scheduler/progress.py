"""A progress bar over tasks: tqdm where it is installed, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """Shows how many tasks are done of how many, ten times a second at most; nothing when not asked to."""

    def __init__(self, wanted: bool, counts: Callable[[], tuple[int, int]]) -> None:
        self._counts = counts
        self.is_wanted = wanted
        self._bar: Any = None
        self._last = 0.0

    def __enter__(self) -> Progress:
        """Begin."""
        if self.is_wanted:
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self._bar = tqdm(desc="tasks", unit="task")
        return self

    def __exit__(self, *_: object) -> None:
        """Show the end."""
        if self.is_wanted:
            self._draw()
            if self._bar is not None:
                self._bar.close()
            else:
                sys.stderr.write("\n")

    def show(self) -> None:
        """Show where it stands."""
        if self.is_wanted and time.monotonic() - self._last >= 0.1:
            self._draw()

    def _draw(self) -> None:
        self._last = time.monotonic()
        done, left = self._counts()
        if self._bar is not None:
            self._bar.total = done + left
            self._bar.n = done
            self._bar.refresh()
        else:
            sys.stderr.write(f"\r{done} of {done + left} tasks")
            sys.stderr.flush()
