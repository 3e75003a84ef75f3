"""PriorityMap: the native half has what is hot and a dict's atomicity; here is the rest of a mapping."""

from __future__ import annotations

import copyreg
import reprlib
from collections.abc import Hashable, ItemsView, Iterator, MutableMapping, ValuesView
from typing import Any, TypeVar

from foveal import _core

KeyT = TypeVar("KeyT", bound=Hashable)
MapT = TypeVar("MapT", bound="PriorityMap[Any]")


class _Items(ItemsView[KeyT, float]):
    """Iterates over a list made when it begins, as keys do: another thread may remove one meanwhile."""

    __slots__ = ()
    _mapping: PriorityMap[KeyT]

    def __iter__(self) -> Iterator[tuple[KeyT, float]]:
        return iter(self._mapping._items())


class _Values(ValuesView[float]):
    __slots__ = ()
    _mapping: PriorityMap[Any]

    def __iter__(self) -> Iterator[float]:
        return (priority for _, priority in self._mapping._items())

    def __contains__(self, value: object) -> bool:
        return value in list(self)


class PriorityMap(_core.PriorityMap[KeyT], MutableMapping[KeyT, float]):
    """A dict of priorities that pops in their order, and whose priorities may change.

    The smallest priority comes first, with ``max`` the largest. Equal priorities are first in, first out: a key whose
    priority changes goes behind its new equals, one that is set to what it was keeps its place.

    Priorities are float64: infinities are fine, NaN is refused. An integer that float64 cannot hold (some beyond 2**53)
    is refused, so that it cannot be out of order, and so is an integer `delta` whose sum it cannot hold; a Decimal or a
    Fraction becomes the nearest float64, as float() has it.

    All that a ``MutableMapping`` does, it does by key: ``m[key] = priority`` inserts or changes, ``del m[key]``,
    ``m.pop(key)`` and ``m.update(...)`` are those of a dict; ``popitem`` and ``peekitem`` are about the first key.
    Iteration is over a list of the keys (or items, or values) made when it begins, in no order. It may be used by
    several threads: each call is atomic as a dict's is.

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
        ``push`` or ``pushpop`` of a present key; a priority is NaN, or an integer that float64 cannot hold.
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

    def items(self) -> ItemsView[KeyT, float]:
        """Return the (key, priority) pairs, a view."""
        return _Items(self)

    def values(self) -> ValuesView[float]:
        """Return the priorities, a view."""
        return _Values(self)

    def iter_sorted(self) -> Iterator[tuple[KeyT, float]]:
        """Iterate over a copy as (key, priority), first to last."""
        return _drain(super().copy())

    def copy(self: MapT) -> MapT:
        """Return another map with the same contents in the same order."""
        other = super().copy()
        if attributes := getattr(self, "__dict__", None):  # of a subclass
            other.__dict__.update(attributes)
        return other

    __copy__ = copy

    @reprlib.recursive_repr()
    def __repr__(self) -> str:
        """Show the contents in order."""
        return f"{type(self).__name__}({dict(self.iter_sorted())!r}{', max=True' if self.max else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self),), self.__getstate__()  # type: ignore[attr-defined]

    def __getstate__(self) -> tuple[Any, ...]:
        return (*super().__getstate__(), getattr(self, "__dict__", None))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not (isinstance(state, tuple) and len(state) == 3):
            raise TypeError(f"PriorityMap.__setstate__: state is {state!r}, expected (max, items, attributes)")
        *contents, attributes = state
        if not (attributes is None or (isinstance(attributes, dict) and hasattr(self, "__dict__"))):
            raise TypeError(
                f"PriorityMap.__setstate__: attributes are {attributes!r}, expected a dict, or None where there is none"
            )
        super().__setstate__(tuple(contents))
        if attributes:
            self.__dict__.update(attributes)


def _drain(rest: _core.PriorityMap[KeyT]) -> Iterator[tuple[KeyT, float]]:
    while len(rest):
        yield _core.PriorityMap.popitem(rest)
