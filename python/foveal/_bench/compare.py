"""foveal against its peers on one piece of work: the results are compared first, then the times."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import foveal
from foveal import _core

from .measure import Contender, accepted, take_turns
from .peers import PEERS, peers_of
from .peers.numpy import entmax15_attention, naive_attention
from .show import Row
from .work import TOLERANCE, Array, Inputs, Way, Work, cycled, foveal_numpy, foveal_torch

CACHE_NBYTES = 32 << 20  # when the machine does not say


def can_hold(dtype: str) -> bool:
    """Whether NumPy has that dtype here: bfloat16 needs ml_dtypes."""
    return dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes") is not None


def compare(
    work: Work,
    *,
    peers: Sequence[str] | None = None,
    threads: int | None = None,
    tensors: bool = False,
    in_microseconds: bool = False,
    budget: float = 5.0,
    progress: Callable[[float], object] = lambda fraction: None,
) -> Row:
    """Checks, then times one piece of work against each peer; by default all that `peers_of` the work.

    Every way of a peer takes its turn in every round; the one with the least median is the peer. Peers come one after
    the other, so that one's pool of threads does not hold up another. `tensors`: foveal is called with torch tensors.
    `budget`: seconds for each peer.
    """
    peers = peers_of(work) if peers is None else peers
    with num_threads(threads) as used:
        inputs = cold_copies(work)
        ours = (foveal_torch if tensors else foveal_numpy)(work, inputs)
        check_ours(work, inputs[0], ours)
        bound = machine_bound(work, inputs, used)
        seconds, limits, ratios, tried, rounds = [], [], {}, {}, []
        for number, peer in enumerate(peers or [None]):
            others = [] if peer is None else checked_ways(peer, work, inputs, ours)
            times = take_turns(
                [ours, *others, bound],
                budget=budget,
                progress=lambda fraction, number=number: progress((number + fraction) / max(1, len(peers))),  # type: ignore[misc]
            )
            seconds.extend(times.seconds[ours.name])
            limits.append(times.ratio(bound.name, ours.name).median)
            rounds.append(times.rounds)
            if peer is not None:
                ratios[peer] = times.ratio(times.best(others).name, ours.name)
                tried[peer] = [{way.name: times.median(way.name) for way in others}]
    median = statistics.median(seconds)
    amount, unit = (work.kv_nbytes, "GB/s") if work.seqlen == 1 else (work.flops, "GF/s")
    copies = f"{len(inputs)} copies in turn; " if len(inputs) > 1 else ""
    return Row(
        label=f"{work}{f', {used} thread' if threads else ''}{', tensors' * tensors}",
        value=median * 1e6 if in_microseconds else amount / median / 1e9,
        unit="us" if in_microseconds else unit,
        ratios=ratios,
        limit=None if in_microseconds else statistics.median(limits),
        detail=f"{copies}{min(rounds)} rounds or more",
        tried=tried,
    )


def checked_ways(peer: str, work: Work, inputs: Sequence[Inputs], ours: Way) -> list[Way]:
    """Those of the peer's ways that accept the work, each found to do the same as ours."""
    expected = ours.result(work)

    def check(way: Way, result: Any) -> None:
        assert_close(way.name, way.array(work, result), expected, 2 * TOLERANCE[work.dtype])

    return accepted(PEERS[peer].ways(work, inputs), check)


@contextlib.contextmanager
def num_threads(threads: int | None) -> Iterator[int]:
    """The thread count of foveal within, which its peers follow; None is the default. Yields it."""
    foveal.set_num_threads(threads)
    try:
        yield foveal.get_num_threads()
    finally:
        foveal.set_num_threads(None)


def cold_copies(work: Work) -> list[Inputs]:
    """For one query, as many copies of the keys and values as leave none of them in the cache; else one."""
    first = work.inputs()
    cold = work.seqlen == 1 and work.kv_nbytes > CACHE_NBYTES // 16
    count = max(1, math.ceil(4 * cache_nbytes() / work.kv_nbytes)) if cold else 1
    return [first, *((first[0].copy(), first[1].copy(), first[2].copy()) for _ in range(count - 1))]


@functools.cache
def cache_nbytes() -> int:
    """Of the last-level cache."""
    with contextlib.suppress(OSError, ValueError):
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size.removesuffix("K")) << 10 for size in sizes)
    return CACHE_NBYTES


def machine_bound(work: Work, inputs: Sequence[Inputs], threads: int) -> Contender:
    """What no implementation can do without, and nothing else: reading the keys and values once, or the arithmetic.

    It takes turns with the rest, since the speed that a shared machine leaves changes from second to second.
    """
    if work.seqlen > 1:
        return Contender("machine", lambda: _core.run_fmas(threads, work.flops))

    def read(q: Array, k: Array, v: Array) -> None:
        for array in (k, v):
            _core.read_bytes(threads, array.view(np.uint8))

    return Contender("machine", cycled(read, inputs))


@functools.cache
def read_bandwidth(threads: int) -> float:
    """Bytes per second of reading a buffer that no cache holds: the best of some passes."""
    buffer = np.ones(max(256 << 20, 4 * cache_nbytes()), np.uint8)
    return buffer.nbytes / _fewest_seconds(lambda: _core.read_bytes(threads, buffer))


@functools.cache
def fma_peak(threads: int) -> float:
    """Float32 operations per second of FMAs in registers: the best of some rounds."""
    operations = _core.run_fmas(threads, threads * 3e8)
    return operations / _fewest_seconds(lambda: _core.run_fmas(threads, operations))


def share_of_cores(threads: int, budget: float = 0.3) -> float:
    """Which part of that many cores' time this process gets when it wants all of it: less than 1 beside other work."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + budget:
        _core.run_fmas(threads, threads * 3e8)
    return (time.process_time() - cpu) / (time.perf_counter() - wall) / threads


def _fewest_seconds(call: Callable[[], object], budget: float = 0.3) -> float:
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < budget:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def check_ours(work: Work, inputs: Inputs, ours: Way) -> None:
    """Against a float64 computation of one head's last rows."""
    rows = slice(-64, None)
    q, k, v = (array[:1, :1].astype(np.float64) for array in inputs)
    position = np.arange(work.num_keys - work.seqlen, work.num_keys)[rows, None]
    distance = position - np.arange(work.num_keys)
    hidden = (distance < 0) & work.causal
    if work.window is not None:
        hidden |= distance > work.window
    formula = entmax15_attention if work.normalizer == "entmax15" else naive_attention
    expected = formula(q[:, :, rows], k, v, hidden)
    assert_close(ours.name, ours.result(work)[:1, :1, rows], expected, TOLERANCE[work.dtype])


def assert_close(name: str, found: Array, expected: Array, tolerance: float) -> None:
    error = float(np.abs(found - expected).max()) / float(np.abs(expected).max())
    if not error <= tolerance:
        raise RuntimeError(
            f"bench: the result of {name} is off by {error:.1e} of its largest, expected {tolerance:.1e}"
        )
