"""Priority queues: a heap, a mapping that pops in order, queues for threads and for asyncio, a tree to sample from.

The two queues are one algorithm (`_Queue`), driven by blocking a thread or by awaiting; how they wait is in
``_waiting``. What is promised to a waiting get is *an* item: which one is decided when it is handed out, so that
priorities can change, and items be cancelled, up to then.
"""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Generator, Hashable
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from foveal import _core
from foveal._core import Empty, IndexedHeap
from foveal._priority_map import PriorityMap
from foveal._sum_tree import SumTree
from foveal._waiting import Line, Waiter, course

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractContextManager

__all__ = ["AsyncPriorityQueue", "Empty", "IndexedHeap", "PriorityMap", "PriorityQueue", "ShutDown", "SumTree"]

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

if TYPE_CHECKING:

    class ShutDown(Exception):
        """The queue was shut down."""

elif hasattr(queue, "ShutDown"):
    ShutDown = queue.ShutDown
else:

    class ShutDown(Exception):
        """The queue was shut down: ``queue.ShutDown`` from Python 3.13 on."""


class _Nothing(enum.Enum):
    NOTHING = enum.auto()


_NOTHING: Final = _Nothing.NOTHING


class _Entry:
    """An item in the queue; the key of the map, by identity."""

    __slots__ = ("item", "key")

    def __init__(self, item: Any, key: Hashable) -> None:
        self.item = item
        self.key = key


def _to_timeout(name: str, block: bool, timeout: float | None) -> float | None:
    if not block or timeout is None:
        return None
    seconds = _core.as_float(name, "timeout", timeout)
    if not seconds >= 0:
        raise ValueError(f"{name}: timeout is {timeout!r}, expected at least 0, or None")
    return seconds


class _Queue(Generic[ItemT]):
    """What both queues do under the mutex, and the course of the calls that may wait."""

    _mutex: AbstractContextManager[Any]

    def __init__(self, maxsize: int = 0, *, max: bool = False) -> None:
        if not hasattr(maxsize, "__index__"):
            name = type(self).__name__
            raise TypeError(f"{name}: maxsize has type {type(maxsize).__name__}, expected an integer")
        self.maxsize = maxsize
        """How many items fit; 0 or less: no limit."""
        self._entries: PriorityMap[_Entry] = PriorityMap(max=max)
        self._by_key: dict[Hashable, _Entry] = {}
        self._getters, self._putters, self._joiners = Line(), Line(), Line()
        self._unfinished = 0
        self._is_shutdown = False

    def __repr__(self) -> str:
        """Say how many items are waiting; takes no lock."""
        limit = f" of {self.maxsize}" if self.maxsize > 0 else ""
        state = ", shut down" if self._is_shutdown else ""
        return f"<{type(self).__name__}: {len(self._entries)}{limit} waiting, {self._unfinished} unfinished{state}>"

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__}: a queue can be neither copied nor pickled")

    def update_priority(self, key: Hashable, priority: float) -> None:
        """Change the priority of the waiting item that was put with this key; it goes behind its new equals.

        Raises
        ------
        KeyError
            No item with this key is waiting.
        ValueError
            The priority is NaN, or an integer that float64 cannot hold (some beyond 2**53).
        """
        priority = self._checked("update_priority", priority)
        with self._mutex:
            self._entries.update_priority(self._by_key[key], priority)

    def cancel(self, key: Hashable) -> bool:
        """Take the waiting item with this key out, as if it had been got and done; return whether there was one."""
        with self._mutex:
            entry = self._by_key.pop(key, None)
            if entry is None:
                return False
            self._entries.discard(entry)
            self._finish(1)
            if len(self._getters.permitted) > len(self._entries):
                self._getters.revoke()
            self._after_leaving()
            return True

    def task_done(self) -> None:
        """Say that an item that was got has been dealt with.

        Raises
        ------
        ValueError
            There was no such item.
        """
        with self._mutex:
            if self._unfinished <= 0:
                raise ValueError(f"{type(self).__name__}.task_done: called more often than items were put")
            self._finish(1)

    def shutdown(self, immediate: bool = False) -> None:
        """Refuse puts from now on, and gets as soon as the queue is empty: they raise ShutDown.

        Parameters
        ----------
        immediate : bool
            Empty the queue at once; the items count as done.
        """
        with self._mutex:
            self._is_shutdown = True
            if immediate:
                dropped = list(self._entries)  # until the mutex is free: an item's __del__ may use the queue
                self._entries.clear()
                self._by_key.clear()
                self._finish(len(dropped))
            self._getters.release_all()
            self._putters.release_all()

    def qsize(self) -> int:
        """Say how many items are waiting, those included that are promised to a waiting get."""
        return len(self._entries)

    def empty(self) -> bool:
        """Say whether no item is waiting."""
        return not self._entries

    def full(self) -> bool:
        """Say whether `maxsize` items are waiting."""
        return 0 < self.maxsize <= len(self._entries)

    def _new_waiter(self) -> Waiter:
        raise NotImplementedError

    def _checked(self, method: str, priority: float) -> float:
        if type(priority) is float and priority == priority:
            return priority
        return _core.as_number(f"{type(self).__name__}.{method}", "priority", priority)

    # Everything from here on is called with the mutex held, save the courses.

    def _finish(self, count: int) -> None:
        self._unfinished = max(0, self._unfinished - count)  # task_done may have come before the item was got
        if self._unfinished == 0:
            self._joiners.release_all()

    def _insert(self, item: ItemT, priority: float, key: Hashable) -> None:
        entry = _Entry(item, key)
        if key is not None:
            self._by_key[key] = entry
        self._entries.push(entry, priority)
        self._unfinished += 1
        self._getters.grant()

    def _take(self) -> ItemT:
        entry, _ = self._entries.peekitem()
        if entry.key is not None:
            del self._by_key[entry.key]  # first: if comparing the key fails, the item stays
        self._entries.popitem()
        self._after_leaving()
        item: ItemT = entry.item
        return item

    def _after_leaving(self) -> None:
        self._putters.grant()
        if self._is_shutdown and not self._entries:
            self._getters.release_all()

    def _may_put(self, key: Hashable) -> bool:
        if self._is_shutdown:
            raise ShutDown(f"{type(self).__name__}.put: the queue was shut down")
        if key is not None and key in self._by_key:
            raise ValueError(f"{type(self).__name__}.put: key {key!r} is waiting already, expected another key")
        return self.maxsize <= 0 or len(self._entries) + len(self._putters.permitted) < self.maxsize

    def _may_get(self) -> bool:
        if self._is_shutdown and not self._entries:
            raise ShutDown(f"{type(self).__name__}.get: the queue was shut down")
        return len(self._entries) > len(self._getters.permitted)

    # Without the mutex again: what costs least where nobody needs to wait, and what may wait.

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


class PriorityQueue(_Queue[ItemT]):
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
        timeout = _to_timeout("PriorityQueue.put", block, timeout)
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
        timeout = _to_timeout("PriorityQueue.get", block, timeout)
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


class AsyncPriorityQueue(_Queue[ItemT]):
    """:class:`PriorityQueue` for the tasks of one event loop: ``put``, ``get`` and ``join`` are awaited.

    The exceptions are those of :class:`PriorityQueue`, not asyncio's. As with all of asyncio, other threads reach it
    by ``loop.call_soon_threadsafe`` only.

    Examples
    --------
    >>> import asyncio
    >>> from foveal import AsyncPriorityQueue
    >>> async def main():
    ...     jobs = AsyncPriorityQueue()
    ...     await jobs.put("later", 2.0)
    ...     await jobs.put("now", 1.0)
    ...     return await jobs.get()
    >>> asyncio.run(main())
    'now'
    """

    def __init__(self, maxsize: int = 0, *, max: bool = False) -> None:
        super().__init__(maxsize, max=max)
        self._mutex = threading.RLock()  # excludes nobody from one thread, and costs less than contextlib.nullcontext

    async def put(
        self,
        item: ItemT,
        priority: float,
        *,
        key: Hashable = None,
        block: bool = True,
        timeout: float | None = None,
    ) -> None:
        """Put an item in, waiting for room if need be; see :meth:`PriorityQueue.put`."""
        priority = self._checked("put", priority)
        timeout = _to_timeout("AsyncPriorityQueue.put", block, timeout)
        if self._try_put(item, priority, key):
            return
        if not block:
            raise queue.Full
        await self._drive(self._put(item, priority, key), timeout)

    async def get(self, block: bool = True, timeout: float | None = None) -> ItemT:
        """Take the first item out, waiting for one if need be; see :meth:`PriorityQueue.get`."""
        timeout = _to_timeout("AsyncPriorityQueue.get", block, timeout)
        if (item := self._try_get()) is not _NOTHING:
            return item
        if not block:
            raise Empty
        return await self._drive(self._get(), timeout)

    def put_nowait(self, item: ItemT, priority: float, *, key: Hashable = None) -> None:
        """Put an item in, or raise ``queue.Full`` at once."""
        if not self._try_put(item, self._checked("put", priority), key):
            raise queue.Full

    def get_nowait(self) -> ItemT:
        """Take the first item out, or raise ``Empty`` at once."""
        if (item := self._try_get()) is _NOTHING:
            raise Empty
        return item

    async def join(self) -> None:
        """Wait until `task_done` was called for every item that was put."""
        await self._drive(self._join(), None)

    def _new_waiter(self) -> Waiter:
        import asyncio  # costs more to import than all of foveal; whoever comes here has it

        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        return Waiter(future, wake)

    @staticmethod
    async def _drive(course: Generator[Waiter, bool, ResultT], timeout: float | None) -> ResultT:
        import asyncio

        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            waiter = next(course)
            while True:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                done, _ = await asyncio.wait((waiter.signal,), timeout=left)
                waiter = course.send(bool(done))
        except StopIteration as end:
            result: ResultT = end.value
            return result
        finally:
            course.close()
