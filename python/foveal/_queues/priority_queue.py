"""PriorityQueue: the rules of ``rules`` for threads, which wait as ``waiting`` says.

What is promised to a waiting get is *an* item: which one is decided when it is handed out, so that
priorities can change, and items be cancelled, up to then.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Generator, Hashable
from typing import Final, Literal, TypeVar

from foveal._core import Empty
from foveal._queues.rules import ItemT, Queue, to_timeout
from foveal._queues.waiting import Line, Waiter, course

ResultT = TypeVar("ResultT")


class _Nothing(enum.Enum):
    NOTHING = enum.auto()


_NOTHING: Final = _Nothing.NOTHING


class PriorityQueue(Queue[ItemT, Line]):
    """A queue for threads whose items leave by priority, which may change while they wait.

    The interface of ``queue.PriorityQueue``, with the priority beside the item instead of in it, so that items need
    not be comparable; ``shutdown`` as from Python 3.13 on. Equal priorities are first in, first out. Threads that wait
    in ``get`` are served in the order in which they came; one that comes later does not overtake them.

    Parameters
    ----------
    maxsize : int
        How many items fit; 0 or less: no limit.
    max : bool
        The largest priority first.

    Examples
    --------
    >>> from foveal import PriorityQueue
    >>> jobs = PriorityQueue()
    >>> jobs.put("sweep", 3.0)
    >>> jobs.put({"url": "https://example.org"}, 2.0, key="page")
    >>> jobs.put("answer", 1.0)
    >>> jobs.update_priority("page", 0.5)
    >>> jobs.get(), jobs.get()
    ({'url': 'https://example.org'}, 'answer')
    """

    def __init__(self, maxsize: int = 0, *, max: bool = False) -> None:
        super().__init__(maxsize, max=max)
        self._mutex = threading.Lock()

    def put(
        self,
        item: ItemT,
        priority: float,
        *,
        key: Hashable = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Put an item in, waiting for room if need be.

        Parameters
        ----------
        item : object
            Anything.
        priority : float
            Not NaN. An integer must be one that float64 can hold, as all up to 2**53 are; a Decimal or a Fraction
            becomes the nearest float64, as float() has it.
        key : hashable, optional
            The name by which `update_priority` and `cancel` find the item while it waits; free again when the item is
            handed out. None: they cannot.
        block, timeout
            Whether to wait, and for how many seconds at most; None: without limit.

        Raises
        ------
        queue.Full
            There was no room in time.
        ShutDown
            The queue was shut down.
        ValueError
            An item with this key is waiting; the priority is NaN, or an integer that float64 cannot hold; the timeout
            is negative.
        """
        priority = self._checked("put", priority)
        timeout = to_timeout("PriorityQueue.put", block, timeout)
        if self._try_put(item, priority, key):
            return
        if not block:
            raise queue.Full
        self._drive(self._put(item, priority, key), timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> ItemT:
        """Take the first item out, waiting for one if need be.

        Parameters
        ----------
        block, timeout
            Whether to wait, and for how many seconds at most; None: without limit.

        Raises
        ------
        foveal.Empty
            No item came in time; a ``queue.Empty``.
        ShutDown
            The queue was shut down and is empty.
        """
        timeout = to_timeout("PriorityQueue.get", block, timeout)
        if (item := self._try_get()) is not _NOTHING:
            return item
        if not block:
            raise Empty
        return self._drive(self._get(), timeout)

    def put_nowait(self, item: ItemT, priority: float, *, key: Hashable = None) -> None:
        """Put an item in, or raise ``queue.Full`` at once."""
        self.put(item, priority, key=key, block=False)

    def get_nowait(self) -> ItemT:
        """Take the first item out, or raise ``Empty`` at once."""
        return self.get(block=False)

    def join(self) -> None:
        """Wait until `task_done` was called for every item that was put."""
        self._drive(self._join(), None)

    def _new_line(self) -> Line:
        return Line()

    def _try_put(self, item: ItemT, priority: float, key: Hashable) -> bool:
        with self._mutex:
            if not self._may_put(key):
                return False
            self._insert(item, priority, key)
            return True

    def _try_get(self) -> ItemT | Literal[_Nothing.NOTHING]:
        with self._mutex:
            return self._take() if self._may_get() else _NOTHING

    def _put(self, item: ItemT, priority: float, key: Hashable) -> Generator[Waiter, bool, None]:
        return course(
            self._mutex,
            self._putters,
            self._new_waiter,
            lambda: self._may_put(key),
            lambda: self._insert(item, priority, key),
            queue.Full,
        )

    def _get(self) -> Generator[Waiter, bool, ItemT]:
        return course(self._mutex, self._getters, self._new_waiter, self._may_get, self._take, Empty)

    def _join(self) -> Generator[Waiter, bool, None]:
        return course(
            self._mutex, self._joiners, self._new_waiter, lambda: self._unfinished == 0, lambda: None, TimeoutError
        )

    def _new_waiter(self) -> Waiter:
        lock = threading.Lock()
        lock.acquire()
        return Waiter(lock, lock.release)

    @staticmethod
    def _drive(course: Generator[Waiter, bool, ResultT], timeout: float | None) -> ResultT:
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            waiter = next(course)
            while True:
                left = -1.0 if deadline is None else min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
                waiter = course.send(waiter.signal.acquire(timeout=left))
        except StopIteration as end:
            result: ResultT = end.value
            return result
        finally:
            course.close()
