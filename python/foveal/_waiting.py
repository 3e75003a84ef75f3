"""Waiting, first come, first served; how is left to whoever drives it: a thread that blocks, a task that awaits.

What somebody waits for (an item, room for one) is promised to the first in line by a permit as soon as it is there.
Until the permit is used or given on, newcomers must leave so much untouched: they count ``line.granted``.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

ResultT = TypeVar("ResultT")


class Waiter:
    """Somebody who waits; `signal` is what his thread or task sleeps on, `wake()` ends that."""

    __slots__ = ("granted", "signal", "wake")

    def __init__(self, signal: Any, wake: Callable[[], object]) -> None:
        self.signal = signal
        self.wake = wake
        self.granted = False


class Line:
    """Those who wait for the same thing, in the order in which they came."""

    __slots__ = ("granted", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Waiter] = deque()
        self.granted = 0
        """Permits that were given and not used yet: so many of the thing are promised."""

    def join(self, waiter: Waiter, *, in_front: bool) -> Waiter:
        (self.waiting.appendleft if in_front else self.waiting.append)(waiter)
        return waiter

    def grant(self) -> None:
        """Give the first a permit."""
        if self.waiting:
            waiter = self.waiting.popleft()
            waiter.granted = True
            self.granted += 1
            waiter.wake()

    def release_all(self) -> None:
        """Wake everybody without a permit, to look again."""
        while self.waiting:
            self.waiting.popleft().wake()

    def leave(self, waiter: Waiter) -> bool:
        """Take a waiter out who is in, and his permit; return whether he had one."""
        if waiter.granted:
            waiter.granted = False
            self.granted -= 1
            return True
        with contextlib.suppress(ValueError):
            self.waiting.remove(waiter)
        return False


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
    waiter = None
    may_wait = True
    try:
        while True:
            with mutex:
                came_back = waiter is not None
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
                waiter = line.join(new_waiter(), in_front=came_back)
            may_wait = yield waiter
    finally:
        if waiter is not None:
            with mutex:
                if line.leave(waiter):
                    line.grant()
