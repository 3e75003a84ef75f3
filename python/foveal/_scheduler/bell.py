"""A bell that one thread waits for and any may ring, a threading.Event but for this: Ctrl-C leaves no lock behind.

The methods of an Event are Python code around a lock, and an interrupt on the way out of its ``with`` keeps the lock
for ever, with whoever waits for it. Those of queue.SimpleQueue are C.
"""

from __future__ import annotations

import queue


class Bell:
    """Rings until somebody has waited for it, or it is hushed."""

    def __init__(self) -> None:
        self._rings: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Ring, if it does not already."""
        if self._rings.empty():
            self._rings.put(None)

    def hush(self) -> None:
        """Be quiet until the next ring."""
        while self.wait(0.0):
            pass

    def wait(self, seconds: float) -> bool:
        """Wait for a ring, so many seconds at most, and say whether there was one."""
        try:
            self._rings.get(seconds > 0.0, seconds)
        except queue.Empty:
            return False
        return True
