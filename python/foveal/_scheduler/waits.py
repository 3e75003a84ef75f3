"""Waits that can never end, which are refused.

A task, or a callback, that waits without a timeout for a task keeps its thread, and its slot. When the awaited one can
have neither until the wait is over, the wait can never end. Every wait without a timeout is noted here, by its thread;
a thread with no entry is taken to come to an end some time, and what is not known of an executor is taken to be free.
So what is refused is certain. A thread that waits asks every now and then, since what others do later may close a ring.
Tasks are read without their schedulers' locks: a ring stays closed, so the answer counts when it is found twice.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from foveal._scheduler.checks import text_of

if TYPE_CHECKING:
    from foveal._scheduler.future import Future

_FIRST_LOOK, _LOOK = 0.01, 0.25  # seconds that a wait goes on before it is looked at, and between looks

Seen = frozenset[int]
_waits: dict[int, Wait] = {}  # by thread
_refusal = threading.Lock()  # one wait of a ring is refused, and frees the others


class Wait:
    """A wait of this thread for something that `can_end`, given the threads that are known to wait for it."""

    def __init__(self, can_end: Callable[[Seen], bool]) -> None:
        self.can_end = can_end
        self.patience = _FIRST_LOOK
        """Seconds until the next look."""
        self._thread = threading.get_ident()
        self._former: Wait | None = None

    def __enter__(self) -> Wait:
        self._former = _waits.get(self._thread)
        _waits[self._thread] = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._former is None:
            _waits.pop(self._thread, None)
        else:
            _waits[self._thread] = self._former

    def is_endless(self) -> bool:
        """Say whether it can never end, and that is by what it keeps from others; it counts no more then.

        A wait for a task that waits for itself, say, goes on: that one is refused.
        """
        self.patience = _LOOK
        if can_go_on(self._thread):
            return False
        time.sleep(_FIRST_LOOK)
        with _refusal:
            if can_go_on(self._thread):
                return False
            self.__exit__()
            if self.can_end(frozenset()):
                return True
            self.__enter__()
            return False


def can_go_on(thread: int | None, seen: Seen = frozenset()) -> bool:
    """Say whether a thread may come to an end, or to its next task."""
    wait = None if thread is None else _waits.get(thread)
    if wait is None or thread is None:
        return True
    return thread not in seen and wait.can_end(seen | {thread})


def refused(function: str, futures: Iterable[Future]) -> RuntimeError:
    """Make the error of a wait that can never end."""
    keys = ", ".join(sorted({text_of(future.key) for future in futures}))[:200]
    return RuntimeError(
        f"{function}: the wait for task {keys} could never end: a task or a callback waits in the thread or the slot "
        "that this one, or one that it waits for, needs; let it be submitted and awaited from outside, give the "
        "scheduler more slots (max_in_flight, and threads of its executor), or wait with a timeout"
    )


class Waiters(list[Any]):
    """A Future's waiters, those of concurrent.futures.wait and as_completed, whose waits are noted too."""

    __slots__ = ()  # nor a reference to the Future: no cycle

    def append(self, waiter: Any) -> None:
        """Take in a waiter, and have its event tell of the wait."""
        event = getattr(waiter, "event", None)
        if type(event) is threading.Event:
            waiter.event = _Event(waiter)
        super().append(waiter)


class _Event(threading.Event):
    """The event of a waiter for several Futures."""

    def __init__(self, waiter: Any) -> None:
        super().__init__()
        self._futures: list[Future] = []
        # The one for all counts how many are left; the others, and this after an error, take one for enough.
        self._needs_all = hasattr(waiter, "num_pending_calls") and not getattr(waiter, "stop_on_exception", True)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, and refuse to wait for ever."""
        if timeout is not None:
            return super().wait(timeout)
        awaited = list(sys._getframe(1).f_locals.get("fs", ()))  # of concurrent.futures, which does not tell otherwise
        self._futures = [future for future in awaited if hasattr(future, "_can_end")]
        is_known = bool(self._futures) and (self._needs_all or len(self._futures) == len(awaited))
        with Wait(self._can_end) as wait:
            while not super().wait(wait.patience):
                if is_known and wait.is_endless():
                    raise refused("concurrent.futures", self._pending())
        return True

    def _pending(self) -> list[Future]:
        return [future for future in self._futures if not future._is_done()]

    def _can_end(self, seen: Seen) -> bool:
        ends = (future._can_end(seen) for future in self._pending())
        return self.is_set() or (all(ends) if self._needs_all else any(ends))
