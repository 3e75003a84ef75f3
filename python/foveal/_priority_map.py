"""PriorityMap: the native half has what is hot and a dict's atomicity; here is the rest of a mapping."""

from __future__ import annotations

import copyreg
from collections.abc import Hashable, Iterator, MutableMapping
from typing import Any, TypeVar

from foveal import _core

KeyT = TypeVar("KeyT", bound=Hashable)


class PriorityMap(_core.PriorityMap[KeyT], MutableMapping[KeyT, float]):
    """A dict of priorities that pops in their order, and whose priorities may change.

    The smallest priority comes first, with ``max`` the largest. Equal priorities are first in, first out: a key whose
    priority changes goes behind its new equals, one that is set to what it was keeps its place. Infinities are fine,
    NaN is refused.

    All that a ``MutableMapping`` does, it does by key: ``m[key] = priority`` inserts or changes, ``del m[key]``,
    ``m.pop(key)`` and ``m.update(...)`` are those of a dict; ``popitem`` and ``peekitem`` are about the first key.
    Iteration is over a list of the keys made when it begins, in no order. It may be used by several threads: each call
    is atomic as a dict's is.

    Parameters
    ----------
    data : mapping, or iterable of (key, priority)
    max : bool
        The largest priority first.

    Raises
    ------
    KeyError
        The key is absent: ``m[key]``, ``del``, ``pop``, ``update_priority``, ``adjust``.
    ValueError
        ``push`` or ``pushpop`` of a present key; a priority is NaN.
    foveal.Empty
        ``popitem`` or ``peekitem`` of nothing; a KeyError and a ``queue.Empty``.
    TypeError
        A key that cannot be hashed, a priority that is no real number.

    Examples
    --------
    >>> from foveal import PriorityMap
    >>> tasks = PriorityMap({"write": 2.0, "read": 1.0, "sleep": 9.0})
    >>> tasks.peekitem()
    ('read', 1.0)
    >>> tasks["read"] = 2.0  # now behind its equal
    >>> tasks.adjust("sleep", -8.5)
    0.5
    >>> tasks.popitem(), tasks.popitem()
    (('sleep', 0.5), ('write', 2.0))
    >>> tasks
    PriorityMap({'read': 2.0})
    """

    __slots__ = ()

    def iter_sorted(self) -> Iterator[tuple[KeyT, float]]:
        """Iterate over a copy as (key, priority), first to last."""
        return _drain(self.copy())

    def __repr__(self) -> str:
        """Show the contents in order."""
        return f"{type(self).__name__}({dict(self.iter_sorted())!r}{', max=True' if self.max else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]


def _drain(rest: PriorityMap[KeyT]) -> Iterator[tuple[KeyT, float]]:
    while rest:
        yield rest.popitem()
