"""What both priority queues do: their items, names and counts, and who of those who wait gets what.

How somebody waits is left to them: a thread in ``priority_queue`` by ``waiting``, a task in ``async_queue``.
"""

from __future__ import annotations

import queue
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from foveal import _core
from foveal._queues.priority_map import PriorityMap

if TYPE_CHECKING:
    from collections.abc import Sized
    from contextlib import AbstractContextManager

ItemT = TypeVar("ItemT")

if TYPE_CHECKING:

    class ShutDown(Exception):
        """The queue was shut down."""

elif hasattr(queue, "ShutDown"):
    ShutDown = queue.ShutDown
else:

    class ShutDown(Exception):
        """The queue was shut down: ``queue.ShutDown`` from Python 3.13 on."""


class Line(Protocol):
    """Those who wait for the same thing, in the order in which they came.

    What they wait for (an item, room for one) is promised to the first of them by a permit as soon as it is there.
    Until the permit is used or given on, newcomers must leave so much untouched. What was promised and is no more (a
    cancelled item) is taken back from whoever came last; he keeps his turn.
    """

    @property
    def waiting(self) -> Sized: ...
    @property
    def permitted(self) -> Sized: ...
    def grant(self) -> None:
        """Give the first a permit."""

    def revoke(self) -> None:
        """Take a permit back, from whoever came last."""

    def release_all(self) -> None:
        """Wake everybody without a permit, to look again."""


LineT = TypeVar("LineT", bound=Line)


class Entry:
    """An item in the queue; the key of the map, by identity."""

    __slots__ = ("item", "key")

    def __init__(self, item: Any, key: Hashable) -> None:
        self.item = item
        self.key = key


_new_entry = object.__new__  # Entry(item, key) costs twice as much


def to_timeout(name: str, block: bool, timeout: float | None) -> float | None:
    if not block or timeout is None:
        return None
    seconds = _core.as_float(name, "timeout", timeout)
    if not seconds >= 0:
        raise ValueError(f"{name}: timeout is {timeout!r}, expected at least 0, or None")
    return seconds


class Queue(Generic[ItemT, LineT]):
    """What both queues do under the mutex."""

    _mutex: AbstractContextManager[Any]

    def __init__(self, maxsize: int = 0, *, max: bool = False) -> None:
        if not hasattr(maxsize, "__index__"):
            name = type(self).__name__
            raise TypeError(f"{name}: maxsize has type {type(maxsize).__name__}, expected an integer")
        self.maxsize = maxsize
        """How many items fit; 0 or less: no limit."""
        self._entries: PriorityMap[Entry] = PriorityMap(max=max)
        self._by_key: dict[Hashable, Entry] = {}
        self._getters, self._putters, self._joiners = self._new_line(), self._new_line(), self._new_line()
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

    def _new_line(self) -> LineT:
        raise NotImplementedError

    def _checked(self, method: str, priority: float) -> float:
        if type(priority) is float and priority == priority:
            return priority
        return _core.as_number(f"{type(self).__name__}.{method}", "priority", priority)

    # Everything from here on is called with the mutex held.

    def _finish(self, count: int) -> None:
        self._unfinished = max(0, self._unfinished - count)  # task_done may have come before the item was got
        if self._unfinished == 0:
            self._joiners.release_all()

    def _insert(self, item: ItemT, priority: float, key: Hashable) -> None:
        entry = _new_entry(Entry)
        entry.item = item
        entry.key = key
        if key is not None:
            self._by_key[key] = entry
        self._entries.push(entry, priority)
        self._unfinished += 1
        if self._getters.waiting:
            self._getters.grant()

    def _take(self) -> ItemT:
        if self._by_key:
            entry, _ = self._entries.peekitem()
            if entry.key is not None:
                del self._by_key[entry.key]  # first: if comparing the key fails, the item stays
        entry, _ = self._entries.popitem()
        if self._putters.waiting or self._is_shutdown:
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
