"""How threads wait, first come, first served; what a line of waiting threads keeps is in ``rules``."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

ResultT = TypeVar("ResultT")


class Waiter:
    """Somebody who waits; `signal` is what his thread sleeps on, `wake()` ends that."""

    __slots__ = ("_wake", "_woken", "granted", "signal", "turn")

    def __init__(self, signal: Any, wake: Callable[[], object]) -> None:
        self.signal = signal
        self.granted = False
        self.turn = 0
        """Smaller than that of whoever came later."""
        self._wake = wake
        self._woken = False

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._wake()


class Line:
    """Those who wait for the same thing, in the order in which they came."""

    __slots__ = ("_came", "permitted", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Waiter] = deque()
        self.permitted: list[Waiter] = []
        """Those who have a permit and have not used it yet: so many of the thing are promised."""
        self._came = 0

    def join(self, waiter: Waiter, turn: int | None) -> Waiter:
        """Let somebody wait: one who has waited before at the turn that he had."""
        if turn is None:
            self._came += 1
            waiter.turn = self._came
            self.waiting.append(waiter)
        else:
            waiter.turn = turn
            self._rejoin(waiter)
        return waiter

    def grant(self) -> None:
        """Give the first a permit."""
        if self.waiting:
            waiter = self.waiting.popleft()
            waiter.granted = True
            self.permitted.append(waiter)
            waiter.wake()

    def revoke(self) -> None:
        """Take a permit back, from whoever came last."""
        waiter = max(self.permitted, key=lambda permitted: permitted.turn)
        self.leave(waiter)
        self._rejoin(waiter)

    def release_all(self) -> None:
        """Wake everybody without a permit, to look again."""
        while self.waiting:
            self.waiting.popleft().wake()

    def leave(self, waiter: Waiter) -> bool:
        """Take a waiter out who is in, and his permit; return whether he had one."""
        if waiter.granted:
            waiter.granted = False
            self.permitted.remove(waiter)
            return True
        with contextlib.suppress(ValueError):
            self.waiting.remove(waiter)
        return False

    def _rejoin(self, waiter: Waiter) -> None:
        later = (place for place, other in enumerate(self.waiting) if other.turn > waiter.turn)
        self.waiting.insert(next(later, len(self.waiting)), waiter)


def course(
    mutex: AbstractContextManager[Any],
    line: Line,
    new_waiter: Callable[[], Waiter],
    ready: Callable[[], bool],
    act: Callable[[], ResultT],
    error: type[Exception],
) -> Generator[Waiter, bool, ResultT]:
    """The course of a call that acts as soon as it is possible, or fails with `error` when it may no longer wait.

    It yields a waiter to sleep on, without the mutex, and is sent whether that was woken in time. Whoever drives it
    closes it: when an exception ends the sleep, a permit that came meanwhile goes to the next in line.
    """
    waiter = turn = None
    may_wait = True
    try:
        while True:
            with mutex:
                permit = waiter is not None and line.leave(waiter)
                waiter = None
                try:
                    if ready():
                        return act()
                except BaseException:
                    if permit:
                        line.grant()
                    raise
                if not may_wait:
                    raise error
                waiter = line.join(new_waiter(), turn)
                turn = waiter.turn
            may_wait = yield waiter
    finally:
        if waiter is not None:
            with mutex:
                if line.leave(waiter):
                    line.grant()
