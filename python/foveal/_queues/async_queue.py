"""AsyncPriorityQueue: the rules of ``rules`` for the tasks of one event loop, who wait on futures.

One thread uses it, and nothing is awaited in the middle of a change: no mutex is needed, and a call that need not wait
is no dearer than one of asyncio.PriorityQueue.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from foveal._core import Empty
from foveal._queues.rules import ItemT, Queue, to_timeout

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Hashable


class TaskLine:
    """Those who wait for the same thing; each is known by the future on which its task sleeps.

    A future that is done ends the sleep, no more: a task has a permit if it is among the permitted when it runs, and
    stands in line until then if it has none. So it keeps its turn whatever it was woken for.
    """

    __slots__ = ("permitted", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[bool]] = deque()
        self.permitted: dict[asyncio.Future[bool], None] = {}
        """Of whom each came before all in `waiting`, in the order in which they came."""

    def grant(self) -> None:
        while self.waiting:
            future = self.waiting.popleft()
            if future.cancelled():  # its task has not been told yet
                continue
            self.permitted[future] = None
            wake(future)
            return

    def revoke(self) -> None:
        self.waiting.appendleft(self.permitted.popitem()[0])

    def release_all(self) -> None:
        for future in self.waiting:
            wake(future)

    def leave(self, future: asyncio.Future[bool]) -> bool:
        """Take somebody out, and his permit; return whether he had one."""
        if future in self.permitted:
            del self.permitted[future]
            return True
        with contextlib.suppress(ValueError):
            self.waiting.remove(future)
        return False


def _running_loop() -> asyncio.AbstractEventLoop:
    """Replace itself by asyncio's: that costs more to import than all of foveal, and as much to ask for as to wait."""
    global _running_loop
    from asyncio import get_running_loop as _running_loop

    return _running_loop()


def wake(future: asyncio.Future[bool], in_time: bool = True) -> None:
    if not future.done():
        future.set_result(in_time)


class AsyncPriorityQueue(Queue[ItemT, TaskLine]):
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
        self._mutex = threading.RLock()  # for the rules; excludes nobody, and costs less than contextlib.nullcontext

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
        if type(priority) is not float or priority != priority:
            priority = self._checked("put", priority)
        if timeout is not None:
            timeout = to_timeout("AsyncPriorityQueue.put", block, timeout)
        if not self._may_put(key):
            if not block:
                raise queue.Full
            await self._wait(self._putters, queue.Full, timeout, self._may_put, key)
        self._insert(item, priority, key)

    async def get(self, block: bool = True, timeout: float | None = None) -> ItemT:
        """Take the first item out, waiting for one if need be; see :meth:`PriorityQueue.get`."""
        if timeout is not None:
            timeout = to_timeout("AsyncPriorityQueue.get", block, timeout)
        if not self._may_get():
            if not block:
                raise Empty
            await self._wait(self._getters, Empty, timeout, self._may_get)
        return self._take()

    def put_nowait(self, item: ItemT, priority: float, *, key: Hashable = None) -> None:
        """Put an item in, or raise ``queue.Full`` at once."""
        priority = self._checked("put", priority)
        if not self._may_put(key):
            raise queue.Full
        self._insert(item, priority, key)

    def get_nowait(self) -> ItemT:
        """Take the first item out, or raise ``Empty`` at once."""
        if not self._may_get():
            raise Empty
        return self._take()

    async def join(self) -> None:
        """Wait until `task_done` was called for every item that was put."""
        if self._unfinished:
            await self._wait(self._joiners, TimeoutError, None, lambda: self._unfinished == 0)

    def _new_line(self) -> TaskLine:
        return TaskLine()

    async def _wait(
        self, line: TaskLine, error: type[Exception], timeout: float | None, ready: Callable[..., bool], *args: Any
    ) -> None:
        """Wait in line until `ready(*args)`; the caller takes what was promised before anybody else runs."""
        loop = _running_loop()
        future = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, wake, future, False)
        line.waiting.append(future)
        permit = False
        try:
            while True:
                in_time = await future
                permit = line.permitted.pop(future, True) is None
                if ready(*args):
                    break
                if not in_time:
                    raise error
                if permit:  # for nothing: `maxsize` is another
                    line.waiting.appendleft(future)
                    permit = False
                # Without a permit: it was taken back, or the queue was shut down. Again, at the same turn.
                renewed = loop.create_future()
                line.waiting[line.waiting.index(future)] = renewed
                future = renewed
                if timer is not None:
                    timer.cancel()
                    timer = loop.call_at(timer.when(), wake, future, False)
            if not permit:
                line.leave(future)
        except BaseException:
            if line.leave(future) or permit:
                line.grant()
            raise
        finally:
            if timer is not None:
                timer.cancel()
