"""Weighted completion time on one machine: the scheduler, which learns costs as it goes, against policies that do not.

An instance is 200 jobs of 8 kinds, all there from the start. The kinds' typical costs are log-normal (sigma 1.5), a
job's cost is its kind's times a log-normal factor (sigma 0.5), weights are log-normal (sigma 1). The sum of weight
times completion time is least for the largest weight/cost first (Smith 1956), which needs the costs: the oracle. The
regret of a policy is how far above that it ends.

The scheduler knows a job's weight and kind. A job's importance is log(weight); its urgency is -log(cost), as the moving
average of its kind's finished jobs has it (of all finished jobs, for a kind that is new). So the softmax is in
proportion to weight / expected cost.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import foveal

JOBS, KINDS, EMA = 200, 8, 0.3
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Instance:
    kinds: NDArray[np.int64]
    costs: Floats
    weights: Floats
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Instance:
        rng = np.random.default_rng(seed)
        kinds = rng.integers(0, KINDS, JOBS)
        costs = np.exp(rng.normal(0, 1.5, KINDS))[kinds] * np.exp(rng.normal(0, 0.5, JOBS))
        return cls(kinds, costs, np.exp(rng.normal(0, 1.0, JOBS)), seed)

    def total(self, completed: Floats) -> float:
        return float(self.weights @ completed)

    def in_order(self, order: NDArray[np.int64]) -> Floats:
        completed = np.empty(JOBS)
        completed[order] = np.cumsum(self.costs[order])
        return completed


def oracle(instance: Instance) -> Floats:
    return instance.in_order(np.argsort(-instance.weights / instance.costs, kind="stable"))


def fifo(instance: Instance) -> Floats:
    return instance.in_order(np.arange(JOBS))


def heaviest_first(instance: Instance) -> Floats:
    return instance.in_order(np.argsort(-instance.weights, kind="stable"))


def by_turns(instance: Instance, key: Callable[[int, int], float]) -> Floats:
    """Turns of a tenth of the median cost; key(job, turns so far) says who is next, the smallest."""
    turn = float(np.median(instance.costs)) / 10
    left = instance.costs.copy()
    heap = [(key(job, 0), job, 0) for job in range(JOBS)]
    heapq.heapify(heap)
    completed, now = np.empty(JOBS), 0.0
    while heap:
        _, job, turns = heap[0]
        spent = min(turn, left[job])
        now += spent
        left[job] -= spent
        if left[job] > 0:
            heapq.heapreplace(heap, (key(job, turns + 1), job, turns + 1))
        else:
            completed[job] = now
            heapq.heappop(heap)
    return completed


def round_robin(instance: Instance) -> Floats:
    return by_turns(instance, lambda job, turns: turns)


def stride(instance: Instance) -> Floats:
    return by_turns(instance, lambda job, turns: (turns + 1) / instance.weights[job])


def lottery(instance: Instance) -> Floats:
    """Each turn is drawn by softmax(log weight): exponential races, which have no memory."""
    rng = np.random.default_rng(instance.seed + 1000)
    clocks = np.zeros(JOBS)

    def key(job: int, turns: int) -> float:
        clocks[job] += rng.exponential() / instance.weights[job]
        return float(clocks[job])

    return by_turns(instance, key)


def least_attained(instance: Instance) -> Floats:
    """Who has had least for its weight is next: good for heavy tails (Nuyens & Wierman 2008)."""
    return by_turns(instance, lambda job, turns: turns / instance.weights[job])


class Simulated(Executor):
    """Runs each task as it comes."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def learned(instance: Instance, **options: Any) -> Floats:
    scheduler = foveal.Scheduler(Simulated(), max_in_flight=1, **options)
    completed = np.full(JOBS, math.nan)
    now, of_all = 0.0, 0.0
    of_kind: dict[int, float] = {}

    def run(job: int) -> None:
        nonlocal now, of_all
        cost, kind = float(instance.costs[job]), int(instance.kinds[job])
        first = now == 0.0
        now += cost
        completed[job] = now
        of_all = math.log(cost) if first else of_all + EMA * (math.log(cost) - of_all)
        old = of_kind.get(kind, math.log(cost))
        of_kind[kind] = old + EMA * (math.log(cost) - old)
        for other in np.flatnonzero(np.isnan(completed)):
            expected = of_kind.get(int(instance.kinds[other]), of_all)
            scheduler.update(int(other), urgency=-expected)

    for job in range(JOBS):
        scheduler.submit(run, job, key=job, importance=math.log(instance.weights[job]))
    for row in scheduler.run().rows:
        assert row.status == "done", row
    return completed


POLICIES: dict[str, Callable[[Instance], Floats]] = {
    "oracle: largest weight/cost first": oracle,
    "foveal.Scheduler, costs learned, strict": lambda instance: learned(instance, policy="strict"),
    "foveal.Scheduler, costs learned": learned,
    "foveal.Scheduler, costs learned, floor 0": lambda instance: learned(instance, floor=0.0),
    "largest weight first": heaviest_first,
    "weighted least attained service": least_attained,
    "stride, by weight": stride,
    "lottery, softmax of log weight": lottery,
    "round robin": round_robin,
    "first in, first out": fifo,
}


def regrets(instances: int, progress: Callable[[], object] = lambda: None) -> dict[str, Floats]:
    """Regret of each policy on each instance, relative to the oracle."""
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in range(instances):
        instance = Instance.draw(seed)
        least = instance.total(oracle(instance))
        for name, policy in POLICIES.items():
            completed = policy(instance)
            assert abs(completed.max() - instance.costs.sum()) < 1e-6 * completed.max(), name
            found[name].append(instance.total(completed) / least - 1)
        progress()
    return {name: np.array(values) for name, values in found.items()}
