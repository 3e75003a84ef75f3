"""How each row of queues_report.py is measured: foveal's queues, and their peers (queue_peers.py) in turn with them."""

from __future__ import annotations

import asyncio
import itertools
import queue
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import foveal
from foveal._bench.measure import Contender, Times, take_turns
from foveal._bench.show import Row
from queue_peers import PEERS, CppLoop, Queue, installed, torchrl_tree

CALLS = 2000  # operations of one timed call, one by one
BATCH = 10_000
SAMPLE = 256


def fresh(n: int, count: int, rounds: int = 16) -> Iterator[tuple[Any, Any]]:
    """Indices and numbers for one call after the other, for ever; the same for whoever asks.

    What an index is given differs from what it was given last: the numbers come round in another rhythm.
    """
    rng = np.random.default_rng(n)
    indices = [rng.integers(0, n, count) for _ in range(rounds)]
    numbers = [rng.random(count) for _ in range(rounds - 1)]
    return zip(itertools.cycle(indices), itertools.cycle(numbers))


def fresh_lists(n: int, count: int, keys: Sequence[Any], rounds: int = 16) -> Iterator[tuple[list[Any], list[float]]]:
    """The same as lists."""
    both = list(itertools.islice(fresh(n, count, rounds), rounds))
    picked = [[keys[i] for i in indices] for indices, _ in both]
    numbers = [numbers.tolist() for _, numbers in both[:-1]]
    return zip(itertools.cycle(picked), itertools.cycle(numbers))


def magnitude(n: int) -> str:
    return f"{n:.0e}".replace("e+0", "e")


def row(label: str, times: Times, operations: int, **named: str) -> Row:
    """The nanoseconds of an operation, and how many times faster that is than what the others take."""
    ratios = {named.get(peer, peer): times.ratio(peer, "foveal") for peer in times.seconds if peer != "foveal"}
    return Row(label, times.median("foveal") / operations * 1e9, "ns", ratios, detail=f"{times.rounds} rounds")


# ---- one call an element ---------------------------------------------------------------------------------------------


def keys_of(kind: str, n: int) -> list[Any]:
    return [f"{i:x}-{i * 2654435761 % 2**32:08x}" if kind == "str" else i for i in range(n)]


def check_queues(makes: Sequence[type[Queue]], kind: str) -> None:
    keys = keys_of(kind, 3000)
    rng = np.random.default_rng(0)
    first, second, third = rng.random(3000).tolist(), rng.random(5000).tolist(), rng.random(2000).tolist()
    picked = [keys[i] for i in rng.integers(0, 3000, 5000)]
    orders = []
    for make in makes:
        made = make(keys, first)
        made.update(picked, second)
        orders.append(made.pop_push(third))
    if any(order != orders[0] for order in orders):
        raise RuntimeError("bench: two queues hand out a different order")


def loop_row(ours: type[Queue], work: str, kind: str, n: int, label: str, budget: float) -> Row:
    makes = {"foveal": ours, **PEERS}
    check_queues(list(makes.values()), kind)
    keys = keys_of(kind, n)
    first = np.random.default_rng(1).random(n).tolist()

    def contender(name: str, make: type[Queue]) -> Contender:
        made, calls = make(keys, first), fresh_lists(n, CALLS, keys)
        if work == "update":
            return Contender(name, lambda: made.update(*next(calls)))
        return Contender(name, lambda: made.pop_push(next(calls)[1]))

    times = take_turns([contender(name, make) for name, make in makes.items()], budget=budget * len(makes))
    return row(label, times, CALLS)


# ---- batches ---------------------------------------------------------------------------------------------------------


def update_many_row(n: int, label: str, budget: float) -> Row:
    ids, first = np.arange(n), np.random.default_rng(1).random(n)
    ours, calls = foveal.IndexedHeap.from_arrays(ids, first), fresh(n, BATCH)
    contenders = [Contender("foveal", lambda: ours.update_many(*next(calls)))]
    if shutil.which("c++"):
        check_loop(ids, first)
        loop, loop_calls = CppLoop(ids, first), fresh(n, BATCH)
        contenders.append(Contender("C++ loop", lambda: loop.update_many(*next(loop_calls))))
    for name, make in PEERS.items():
        made, lists = make(ids.tolist(), first.tolist()), fresh_lists(n, BATCH, range(n), rounds=4)
        contenders.append(Contender(name, lambda made=made, lists=lists: made.update(*next(lists))))
    times = take_turns(contenders, budget=budget * len(contenders))
    return row(label, times, BATCH)


def check_loop(ids: Any, first: Any) -> None:
    ours, loop, batch = foveal.IndexedHeap.from_arrays(ids, first), CppLoop(ids, first), next(fresh(len(ids), BATCH))
    ours.update_many(*batch)
    loop.update_many(*batch)
    if any(ours.pop()[0] != loop.pop() for _ in range(100)):
        raise RuntimeError("bench: update_many and the C++ loop differ")


def two_threads_row(n: int, label: str, budget: float) -> Row:
    """Two threads that update the same heap, against one that does the work of both."""
    heap = foveal.IndexedHeap.from_arrays(np.arange(n), np.random.default_rng(1).random(n))
    calls = fresh(n, 10 * BATCH, 8)

    def alone() -> None:
        heap.update_many(*next(calls))
        heap.update_many(*next(calls))

    with ThreadPoolExecutor(2) as pool:

        def together() -> None:
            for call in [pool.submit(heap.update_many, *next(calls)) for _ in range(2)]:
                call.result()

        times = take_turns([Contender("foveal", together), Contender("one thread", alone)], budget=2 * budget)
    return row(label, times, 20 * BATCH)


# ---- queues that block -----------------------------------------------------------------------------------------------

WAITING = 1000


def queue_row(label: str, budget: float) -> Row:
    """Put and get by one thread; nobody waits."""
    ours: foveal.PriorityQueue[int] = foveal.PriorityQueue()
    theirs: queue.PriorityQueue[tuple[float, int]] = queue.PriorityQueue()
    numbers = np.random.default_rng(1).random(WAITING).tolist()
    for i, number in enumerate(numbers):
        ours.put(i, number)
        theirs.put((number, i))

    def our_turn() -> None:
        for i, number in enumerate(numbers):
            ours.put(i, number)
            ours.get()

    def their_turn() -> None:
        for i, number in enumerate(numbers):
            theirs.put((number, i))
            theirs.get()

    times = take_turns([Contender("foveal", our_turn), Contender("theirs", their_turn)], budget=2 * budget)
    return row(label, times, WAITING, theirs="queue.PriorityQueue")


def async_queue_row(label: str, budget: float) -> Row:
    """The same by one task."""
    ours: foveal.AsyncPriorityQueue[int] = foveal.AsyncPriorityQueue()
    theirs: asyncio.PriorityQueue[tuple[float, int]] = asyncio.PriorityQueue()
    numbers = np.random.default_rng(1).random(WAITING).tolist()
    for i, number in enumerate(numbers):
        ours.put_nowait(i, number)
        theirs.put_nowait((number, i))

    async def our_turn() -> None:
        for i, number in enumerate(numbers):
            await ours.put(i, number)
            await ours.get()

    async def their_turn() -> None:
        for i, number in enumerate(numbers):
            await theirs.put((number, i))
            await theirs.get()

    loop = asyncio.new_event_loop()
    contenders = [
        Contender("foveal", lambda: loop.run_until_complete(our_turn())),
        Contender("theirs", lambda: loop.run_until_complete(their_turn())),
    ]
    times = take_turns(contenders, budget=2 * budget)
    loop.close()
    return row(label, times, WAITING, theirs="asyncio.PriorityQueue")


async def hand_over_ours(of: foveal.AsyncPriorityQueue[int], numbers: Sequence[float], pause: bool) -> None:
    for i, number in enumerate(numbers):
        await of.put(i, number)
        if pause:
            await asyncio.sleep(0)


async def hand_over_theirs(of: asyncio.PriorityQueue[tuple[float, int]], numbers: Sequence[float], pause: bool) -> None:
    for i, number in enumerate(numbers):
        await of.put((number, i))
        if pause:
            await asyncio.sleep(0)


def async_getters_row(maxsize: int, getters: int, label: str, budget: float) -> Row:
    """One task puts, others get: each waits for the other when one item fits; else the getters wait for each put."""
    loop = asyncio.new_event_loop()
    numbers = np.random.default_rng(1).random(WAITING).tolist()
    counts: dict[str, int] = {}
    contenders, tasks = [], []

    async def get(name: str, of: Any) -> None:
        while True:
            await of.get()
            counts[name] += 1

    peers: list[tuple[str, Any, Callable[..., Any]]] = [
        ("foveal", foveal.AsyncPriorityQueue(maxsize), hand_over_ours),
        ("theirs", asyncio.PriorityQueue(maxsize), hand_over_theirs),
    ]
    for name, of, hand_over in peers:
        counts[name] = 0
        tasks += [loop.create_task(get(name, of)) for _ in range(getters)]

        def turn(name: str = name, of: Any = of, hand_over: Callable[..., Any] = hand_over) -> None:
            before = counts[name]
            loop.run_until_complete(hand_over(of, numbers, pause=maxsize == 0))
            while not of.empty():
                loop.run_until_complete(asyncio.sleep(0))
            loop.run_until_complete(asyncio.sleep(0))
            if counts[name] != before + WAITING:
                raise RuntimeError(f"bench: {name} lost items")

        contenders.append(Contender(name, turn))
    times = take_turns(contenders, budget=2 * budget)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
    return row(label, times, WAITING, theirs="asyncio.PriorityQueue")


# ---- sampling --------------------------------------------------------------------------------------------------------


def sum_tree_row(work: str, n: int, label: str, budget: float) -> Row:
    everything, weights = np.arange(n), np.random.default_rng(1).random(n)
    rng, calls = np.random.default_rng(2), fresh(n, SAMPLE)
    ours = foveal.SumTree(n)
    ours.update_many(everything, weights)
    updates = [Contender("foveal", lambda: ours.update_many(*next(calls)))]
    samples = [Contender("foveal", lambda: ours.sample(SAMPLE, rng=rng))]

    tree = torchrl_tree(n)
    if tree is not None:
        tree[everything] = weights
        if not np.isclose(tree.query(0, n), ours.total):
            raise RuntimeError("bench: the totals of foveal and torchrl differ")

        def torchrl_sample() -> tuple[Any, Any]:
            total = tree.query(0, n)
            ids = tree.scan_lower_bound(rng.random(SAMPLE) * total)
            return ids, tree[ids] / total

        updates.append(Contender("torchrl", lambda: tree.__setitem__(*next(calls))))
        samples.append(Contender("torchrl", torchrl_sample))

    if installed("cpprb"):
        from cpprb import PrioritizedReplayBuffer

        buffer = PrioritizedReplayBuffer(n, {"x": {}}, alpha=1.0)
        buffer.add(x=np.zeros(n), priorities=weights)
        updates.append(Contender("cpprb", lambda: buffer.update_priorities(*next(calls))))
        samples.append(Contender("cpprb", lambda: buffer.sample(SAMPLE)))

    for contender in samples:  # heavy ids must come more often from everybody
        drawn: Any = [contender.call() for _ in range(40)]
        ids = np.concatenate([d["indexes"] if isinstance(d, dict) else d[0] for d in drawn])
        if not 0.62 < weights[ids].mean() < 0.71:
            raise RuntimeError(f"bench: {contender.name} does not sample in proportion to weight")
    contenders = updates if work == "update_many" else samples
    times = take_turns(contenders, budget=budget * len(contenders))
    return row(label, times, SAMPLE)
