"""Fair timing of several callables that do the same work: they take turns, and only ratios within a turn are compared.

A shared or throttled machine changes its speed from second to second, so the time of one contender says little, while
the ratio of two that ran within the same fraction of a second says much. A round runs every contender once, in an order
that turns round from round to round; the ratio of two contenders is taken within each round, and the median and the
quartiles of these ratios are reported.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SETTLE_SECONDS = 0.15  # before each slot, at most: OpenBLAS's threads spin for 0.1 s after their work
WARM_SECONDS = 0.003  # then: refills the caches and wakes the threads
LONG_SECONDS = 0.1  # a call as long as this is not warmed up: it would take as much time again and change nothing
SLOT_SECONDS = 0.01  # calls shorter than this are repeated within a slot


@dataclass(frozen=True)
class Contender:
    """`call()` does the work once and returns its result; `within()` makes the context that the calls need, if any."""

    name: str
    call: Callable[[], Any]
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


C = TypeVar("C", bound=Contender)


@dataclass(frozen=True)
class Spread:
    """The median of a sample, between its quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return Spread(sample[0], sample[0], sample[0])
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Times:
    """Seconds for one call, by contender: one figure a round, rounds in the same order for all."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def best(self, contenders: Iterable[Contender]) -> Contender:
        """The one with the least median."""
        return min(contenders, key=lambda contender: self.median(contender.name))

    def ratio(self, slower: str, faster: str) -> Spread:
        """How many times faster `faster` is than `slower`."""
        pairs = zip(self.seconds[slower], self.seconds[faster], strict=True)
        return Spread.of([a / b for a, b in pairs])


def take_turns(
    contenders: Sequence[Contender],
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 201,
    progress: Callable[[float], object] = lambda fraction: None,
) -> Times:
    """Times the contenders in turn for about `budget` seconds; `progress` hears the fraction that is done."""
    slots = {contender.name: _Slot.of(contender) for contender in contenders}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    begin = time.perf_counter()
    for number in range(max_rounds):
        spent = (time.perf_counter() - begin) / budget
        progress(min(max(spent, number / max_rounds), 1.0))
        if spent >= 1 and number >= min_rounds:
            break
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            seconds[contender.name].append(slots[contender.name].seconds())
    progress(1.0)
    return Times(seconds)


def accepted(ways: Iterable[C], check: Callable[[C, Any], object]) -> list[C]:
    """Those that do not refuse the work; `check` is given each and what its first call returned, and raises."""
    able = []
    for way in ways:
        with way.within():
            try:
                result = way.call()
            except (RuntimeError, NotImplementedError):  # how PyTorch's backends say that they cannot do it
                continue
            check(way, result)
        able.append(way)
    if not able:
        raise RuntimeError("bench: none of the peer's ways does this work")
    return able


@dataclass(frozen=True)
class _Slot:
    """A contender's part of a round."""

    contender: Contender
    calls: int  # that are timed
    warm: bool

    @staticmethod
    def of(contender: Contender) -> _Slot:
        with contender.within():
            contender.call()
            calls = 1
            while True:
                elapsed = _elapsed(contender.call, calls)
                if elapsed >= SLOT_SECONDS:
                    return _Slot(contender, calls, warm=elapsed < LONG_SECONDS)
                calls = max(2 * calls, int(calls * SLOT_SECONDS / max(elapsed, 1e-9)))

    def seconds(self) -> float:
        """For one call."""
        call = self.contender.call
        with self.contender.within():
            _settle()
            warm_until = time.perf_counter() + WARM_SECONDS * self.warm
            while time.perf_counter() < warm_until:
                call()
            return _elapsed(call, self.calls) / self.calls


def _elapsed(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _settle() -> None:
    """Waits until the pools of the others have gone to sleep: their spinning takes a core that this slot needs."""
    until = time.perf_counter() + SETTLE_SECONDS
    while time.perf_counter() < until:
        time.sleep(0.002)
        states = [_state(task) for task in Path("/proc/self/task").glob("*/stat")]
        if states and states.count("R") <= 1:  # this thread
            return


def _state(stat: Path) -> str:
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except OSError:  # the thread has ended meanwhile
        return "X"
