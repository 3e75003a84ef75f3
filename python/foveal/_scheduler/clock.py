"""The scheduler's clock: the system's, or one that users give; one that runs backwards is taken to stand still."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Clock:
    """Gives the time in seconds."""

    def __init__(self, read: Callable[[], float] | None) -> None:
        self._read = read or time.monotonic
        self.is_ours = read is None
        """Whether it goes on by itself; one that is injected is read as often from run to run."""
        self.latest = -math.inf
        """What it said last."""

    def now(self) -> float:
        """Read it."""
        self.latest = max(self.latest, self._read())
        return self.latest
