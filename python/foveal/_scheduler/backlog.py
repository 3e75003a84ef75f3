"""The tasks that wait, and which of them is next.

Every waiting task has a slot; slots are handed out in the order of arrival, so the smallest occupied one is the task
that has waited longest, and equal keys of the heap, whose ties go to the smaller id, come out first in, first out. When
the slots are used up the waiting tasks are moved together (a constant cost a task, over time).

What comes next is decided by one of two servers:

- The **proportional** server takes the smallest key of an IndexedHeap. "credit": key = V + charge/weight, where V is
  the key served last: self-clocked fair queueing (Golestani, INFOCOM 1994), so two tasks that both wait all the while
  get service in the ratio of their weights up to one turn of each. "sample": key = V + charge*E/weight, E exponential:
  since those races have no memory, each turn is a fresh draw in proportion to the weights. "strict": key = -score.
  A weight that changes rescales what is left of a key, key - V, by old weight/new weight (Waldspurger & Weihl 1995),
  which is exact for "sample". weight = exp((score - reference)/temperature), clipped to exp(-25) below the reference.
- The **rotation** takes all tasks in turn, whatever their scores, and gets `floor` of the service. A task joins at its
  end, keeps its place while it is in flight or served by the proportional server, and goes to the end when the rotation
  serves it. So each task gets floor/n of the service here, and one that waits with at most n others waits for at most
  (n + w) C / floor of service, C the dearest turn and w the number in flight: before its turn each other task gets at
  most one, and what the rotation is owed varies by at most w C (docs/scheduler.md). No urgency and no feedback enters.

Aging: a score that grows at a common rate while it waits is ``score + rate*(now - queued)``. The part ``rate*now`` is
common to all, so neither softmax nor order sees it, and ``score - rate*queued`` never needs re-keying.

Not thread-safe: the scheduler calls it with its mutex held.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from foveal._scheduler.future import Task
from foveal._scheduler.shares import Floats, Policy, narrowed
from foveal.queues import IndexedHeap

_CAPACITY = 64  # of the smallest heap
_DEEPEST = -25.0  # log of the smallest weight; exp(25) turns are more than the floor ever lets a task wait
_HIGHEST = 1.0  # log weight above which the reference moves up; small, so that charge/weight is not lost beside V
_LARGEST_V = 2.0**40  # beyond, charge/weight would lose digits beside V
_RESOLVE = 1.125  # with `breadth` the temperature is solved anew when the number of tasks has changed by this factor


class Backlog:
    """Waiting tasks; see the module."""

    def __init__(
        self, policy: Policy, floor: float, temperature: float, breadth: float | None, aging: float, seed: int | None
    ) -> None:
        self.temperature = temperature
        """What scores are divided by; with `breadth`, what was last solved for."""
        self._policy: Policy = policy
        self._floor = floor
        self._breadth = breadth
        self._aging = aging
        self._random = random.Random(seed)
        self._rotation_credit = floor - 1.0  # service that the rotation is owed, less one turn: it serves from 0 on
        # The unfinished tasks in the order of rotation, and some that are finished: these are dropped at the head, or
        # all together now and then. Empty when nothing rotates.
        self._rotation: deque[Task] = deque()
        self._rotation_limit = _CAPACITY  # at which length to look for them
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._slots: list[Task | None] = []
        # By slot: what the task itself says of its score, the score, the log of its weight, its key in the heap.
        self._own, self._scores, self._log_weights, self._keys = (array("d") for _ in range(4))
        self._features: NDArray[np.float32] | None = None  # (capacity, d), zero for tasks without
        self._heap = IndexedHeap(_CAPACITY)
        self._v = 0.0
        self._reference: float | None = None
        self._solved_for = 0  # how many tasks there were when `temperature` was solved for
        self._changes = 0  # pushes and pops since the last rebase

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Task]:
        """Iterate over the tasks, the one that has waited longest first."""
        return (task for task in self._slots if task is not None)

    def scores(self) -> Floats:
        """Give the scores, in the order of iteration."""
        return np.frombuffer(self._scores)[self._occupied()] if self._count else np.empty(0)

    def features(self) -> NDArray[np.float32] | None:
        """Give the tasks' features (n, d), in the order of iteration; None when no task has any."""
        if self._features is None or self._count == len(self._slots):
            return None if self._features is None else self._features[: self._count]
        return self._features[self._occupied()]

    def push(self, task: Task, attention: float = 0.0) -> None:
        """Add a task; `attention` is the scorer's part of its score."""
        if len(self._slots) == self._heap.capacity:
            self._make_room()
        own = self._own_score(task)
        score = own + attention
        log_weight = self._log_weight(score)
        if self._policy == "strict":
            key = -score
        else:
            ahead = task.residual
            if ahead < 0.0:
                ahead = task.charge * (self._random.expovariate(1.0) if self._policy == "sample" else 1.0)
            key = self._v + ahead * math.exp(-log_weight)
        task.slot = len(self._slots)
        self._heap.push(task.slot, key)
        if task.features is not None or self._features is not None:
            self._set_features(task)
        self._slots.append(task)
        self._own.append(own)
        self._scores.append(score)
        self._log_weights.append(log_weight)
        self._keys.append(key)
        self._count += 1
        if not task.in_rotation and self._floor > 0.0 and self._policy != "strict":
            task.in_rotation = True
            self._rotation.append(task)
        self._after_change()

    def pop(self) -> Task:
        """Take the next task out for its turn, charging its server what the turn is expected to cost."""
        if self._is_rotations_turn():
            return self.take(self._next_in_rotation(), rotation=True)
        slot = self._heap.peek()[0]
        if self._log_weights[slot] <= _DEEPEST and self._changes > self._count and self._policy != "strict":
            self._rebase()  # before V jumps by exp(25): the weights that were clipped are told apart again
            slot = self._heap.peek()[0]
        task = self._slots[slot]
        assert task is not None
        return self.take(task)

    def take(self, task: Task, *, rotation: bool = False) -> Task:
        """Take this task out for its turn, whosever turn it is."""
        slot = task.slot
        task.by_rotation = rotation
        if rotation and task.in_rotation:
            task.in_rotation = False
            self._rotation.remove(task)  # at the head, or behind tasks in flight
        self._rotation_credit += (self._floor - rotation) * task.charge
        if self._policy != "strict":
            key, log_weight = self._keys[slot], self._log_weights[slot]
            if rotation:  # the proportional server did not serve it: it keeps its place there
                task.residual = max(0.0, key - self._v) * math.exp(log_weight)
            else:
                self._v = max(self._v, key)
                task.residual = -1.0
            if self._v > _LARGEST_V and self._changes > self._count:
                self._rebase()
        self.remove(task)
        return task

    def remove(self, task: Task) -> None:
        """Take a task out without a turn."""
        self._heap.remove(task.slot)
        self._slots[task.slot] = None
        task.slot = -1
        self._count -= 1
        self._after_change()

    def settle(self, task: Task, cost: float) -> None:
        """Settle a turn: it took `cost`, not the expected charge."""
        self._rotation_credit += (self._floor - task.by_rotation) * (cost - task.charge)

    def update(self, task: Task) -> None:
        """Re-key one task after its urgency or importance has changed."""
        slot = task.slot
        own = self._own_score(task)
        score = own + (self._scores[slot] - self._own[slot])
        if score == self._scores[slot]:
            return
        log_weight = self._log_weight(score)  # before anything of this slot is read: it may rebase
        if self._policy == "strict":
            key = -score
        else:
            key = self._v + (self._keys[slot] - self._v) * math.exp(self._log_weights[slot] - log_weight)
        self._own[slot] = own
        self._scores[slot] = score
        self._log_weights[slot] = log_weight
        self._keys[slot] = key
        self._heap.update(slot, key)

    def update_all(self, attention: Floats) -> None:
        """Give every task, in the order of iteration, a new attention score, and re-key all with one update_many."""
        self._rebase(np.frombuffer(self._own)[self._occupied()] + attention)

    def _own_score(self, task: Task) -> float:
        return task.urgency + task.importance - self._aging * task.queued

    def _is_rotations_turn(self) -> bool:
        if self._floor <= 0.0 or self._policy == "strict":
            return False
        if self._policy == "sample":
            return self._random.random() < self._floor
        return self._rotation_credit >= -1e-9  # `floor` is a rounded number: 20 times 0.05 is to make a whole turn

    def _next_in_rotation(self) -> Task:
        """Find the first that waits; those in flight before it, at most one a worker, keep their place."""
        rotation, passed = self._rotation, []
        while (task := rotation[0]).slot < 0:
            rotation.popleft()
            if task.finished is None:
                passed.append(task)
        rotation.extendleft(reversed(passed))
        return task

    def _log_weight(self, score: float) -> float:
        """Log of the weight for a score, clipped; first moves the reference where it would not serve this score."""
        if self._reference is None:
            self._reference = score
        x = self._gap(score)
        if x > _HIGHEST or (x < _DEEPEST and self._changes > self._count):
            self._rebase(at_least=score)
            x = self._gap(score)
        return max(x, _DEEPEST)

    def _gap(self, score: float) -> float:
        assert self._reference is not None
        gap = score - self._reference
        if self.temperature > 0.0:
            return gap / self.temperature
        return 0.0 if gap == 0.0 else math.copysign(math.inf, gap)

    def _after_change(self) -> None:
        self._changes += 1
        if len(self._rotation) > self._rotation_limit:
            self._rotation = deque(task for task in self._rotation if task.finished is None)
            self._rotation_limit = 2 * len(self._rotation) + _CAPACITY
        if not self._count:
            self._clear()
        elif self._breadth is not None:
            fewest, most = self._solved_for / _RESOLVE, self._solved_for * _RESOLVE
            if not fewest <= self._count <= most:
                self._rebase()

    def _occupied(self) -> NDArray[np.int64]:
        if self._count == len(self._slots):
            return np.arange(self._count)
        return np.fromiter((t.slot for t in self._slots if t is not None), np.int64, self._count)

    def _set_features(self, task: Task) -> None:
        if self._features is None:
            assert task.features is not None
            self._features = np.zeros((self._heap.capacity, task.features.shape[-1]), np.float32)
        self._features[task.slot] = 0.0 if task.features is None else task.features

    def _rebase(self, new_scores: Floats | None = None, at_least: float = -math.inf) -> None:
        """Make V 0 and the largest score the reference, solve for the temperature; re-key with one update_many."""
        self._changes = 0
        self._solved_for = self._count
        if not self._count:
            self._reference = at_least
            return
        slots = self._occupied()
        all_scores, all_log_weights, all_keys = map(np.frombuffer, (self._scores, self._log_weights, self._keys))
        scores = all_scores[slots] if new_scores is None else new_scores
        self._reference = max(float(scores.max()), at_least)
        if self._breadth is not None:
            self.temperature = narrowed(self._breadth, scores)
        gaps = scores - self._reference
        if self.temperature > 0.0:
            gaps /= self.temperature
        else:
            gaps[gaps < 0.0] = -math.inf
        log_weights = np.maximum(gaps, _DEEPEST)
        if self._policy == "strict":
            keys = -scores
        else:
            left = np.maximum(all_keys[slots] - self._v, 0.0)
            keys = left * np.exp(all_log_weights[slots] - log_weights)
            self._v = 0.0
        all_scores[slots] = scores
        all_log_weights[slots] = log_weights
        all_keys[slots] = keys
        self._heap.update_many(slots, keys)

    def _make_room(self) -> None:
        """Move the waiting tasks together, in order, into a heap of twice their number."""
        occupied = self._occupied()
        for name in ("_own", "_scores", "_log_weights", "_keys"):
            setattr(self, name, array("d", np.frombuffer(getattr(self, name))[occupied].tobytes()))
        self._slots = [task for task in self._slots if task is not None]
        for slot, task in enumerate(self._slots):
            assert task is not None
            task.slot = slot
        self._heap = IndexedHeap.from_arrays(
            np.arange(self._count), np.frombuffer(self._keys), max(_CAPACITY, 2 * self._count)
        )
        if self._features is not None:
            features = np.zeros((self._heap.capacity, self._features.shape[1]), np.float32)
            features[: self._count] = self._features[occupied]
            self._features = features
