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
  which is exact for "sample". weight = exp((score - reference)/temperature). The reference, the largest score, V and
  the temperature are set anew in passes over all tasks, at most one for every 1/16 of them that came, went or changed.
  Until then a weight may be cut off, at exp(-600), or too high to be told from others as high.
- The **rotation** takes all tasks in turn, whatever their scores, and gets `floor` of the service. A task joins at its
  end, keeps its place while it is in flight or served by the proportional server, and goes to the end when the rotation
  serves it. So each task gets floor/n of the service here, and one that waits with at most n others waits for at most
  (n + w) C / floor of service, C the dearest turn and w the number in flight: before its turn each other task gets at
  most one, and what the rotation is owed varies by at most w C (docs/scheduler.md). No urgency and no feedback enters.

Aging: a score that grows at a common rate while it waits is ``score + rate*(now - queued)``. The part ``rate*now`` is
common to all, so neither softmax nor order sees it, and ``score - rate*queued`` never needs re-keying.

Scores are cut off at +-1e290, so that no difference of two overflows.

Not thread-safe: the scheduler calls it with its mutex held.
"""

from __future__ import annotations

import math
import random
from array import array
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from foveal._scheduler.future import Task
from foveal._scheduler.shares import Floats, Policy, narrowed
from foveal.queues import IndexedHeap

_CAPACITY = 64  # of the smallest heap
# Logs of weights, relative to the reference: where they are cut off; up to where the reference need not follow (beside
# V of at most _LARGEST_V a key V + charge/weight still tells weights up to exp(20) apart); down to where V follows.
_DEEPEST, _HIGHEST, _HIGH, _LOW = -600.0, 600.0, 20.0, -25.0
_LARGEST_V = 2.0**20
_LARGEST_SCORE = 1e290
_PATIENCE = 16  # a pass over all tasks is due when changes times this exceed their number: about 1 us a change
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
        # By slot: the score, and the key in the heap.
        self._scores, self._keys = array("d"), array("d")
        # By slot, from the first task with features on: these, or zeros, and the score less the scorer's part.
        self._features: NDArray[np.float32] | None = None  # (capacity, d)
        self._own: Floats = np.empty(0)
        self._heap = IndexedHeap(_CAPACITY)
        self._v = 0.0
        self._reference: float | None = None
        self._is_stale = False  # a task as high as the reference has left
        self._solved_for = 0  # how many tasks there were when `temperature` was solved for
        self._changes = 0  # since the last rebase

    def restart(self, tasks: Iterable[Task]) -> None:
        """Begin anew with none of `tasks`, all that are unfinished; the rotation keeps its order."""
        self._clear()
        places = dict.fromkeys(self._rotation)
        for task in tasks:
            task.residual = -1.0
            task.in_rotation = task in places
            if task.slot >= 0:
                task.slot = -1
        self._rotation = deque(task for task in places if task.finished is None)

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
        own = _cut_off(task.urgency + task.importance - self._aging * task.queued)
        score = _cut_off(own + attention)
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
            self._set_features(task, own)
        self._slots.append(task)
        self._scores.append(score)
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
        if self._is_rebase_due() and self._policy != "strict" and self._weighed(self._scores[slot]) < _LOW:
            self._rebase()  # those that the reference was the largest of are gone
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
            key, log_weight = self._keys[slot], self._weighed(self._scores[slot])
            if rotation:  # the proportional server did not serve it: it keeps its place there
                task.residual = max(0.0, key - self._v) * math.exp(log_weight)
            else:
                task.residual = -1.0
                if log_weight >= _LOW:  # else V would leave no digits for the others' keys
                    self._v = max(self._v, key)
            if self._v > _LARGEST_V and self._is_rebase_due():
                self._rebase()
        self.remove(task)
        return task

    def remove(self, task: Task) -> None:
        """Take a task out without a turn."""
        if not self._is_stale:
            self._is_stale = self._weighed(self._scores[task.slot]) > -1.0
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
        score = own = task.urgency + task.importance - self._aging * task.queued
        if not -_LARGEST_SCORE <= own <= _LARGEST_SCORE:
            score = own = _cut_off(own)
        if self._features is not None:
            score = _cut_off(own + (self._scores[task.slot] - float(self._own[task.slot])))
            self._own[task.slot] = own
        if score == self._scores[task.slot]:
            return
        self._changes += 1
        log_weight = self._log_weight(score)  # before anything of its slot is read: it may rebase
        slot = task.slot
        if self._policy == "strict":
            key = -score
        else:
            left = (self._keys[slot] - self._v) * math.exp(self._weighed(self._scores[slot]))
            key = self._v + left * math.exp(-log_weight)
        self._scores[slot] = score
        self._keys[slot] = key
        self._heap.update(slot, key)

    def update_all(self, attention: Floats) -> None:
        """Give every task, in the order of iteration, a new attention score, and re-key all with one update_many."""
        attention = np.clip(attention, -_LARGEST_SCORE, _LARGEST_SCORE)
        self._rebase(np.clip(self._own[self._occupied()] + attention, -_LARGEST_SCORE, _LARGEST_SCORE))

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

    def _is_rebase_due(self) -> bool:
        return self._changes * _PATIENCE > self._count

    def _log_weight(self, score: float) -> float:
        """Give the log of the weight for a score; first moves the reference where it would not serve this score."""
        if self._reference is None:
            self._reference = score
        x = self._weighed(score)
        if (x > _HIGH or (x <= _DEEPEST and self._is_stale)) and self._is_rebase_due():
            self._rebase(at_least=score)
            x = self._weighed(score)
        return x

    def _weighed(self, score: float) -> float:
        """Give the log of the weight for a score, cut off."""
        x = score - self._reference  # type: ignore[operator]
        if self.temperature > 0.0:
            x /= self.temperature
        elif x:
            x = math.copysign(math.inf, x)
        return x if _DEEPEST <= x <= _HIGHEST else _DEEPEST if x < 0 else _HIGHEST

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

    def _set_features(self, task: Task, own: float) -> None:
        if self._features is None:
            assert task.features is not None
            self._features = np.zeros((self._heap.capacity, task.features.shape[-1]), np.float32)
            self._own = np.zeros(self._heap.capacity)
            self._own[: len(self._scores)] = self._scores  # nobody before had features
        self._features[task.slot] = 0.0 if task.features is None else task.features
        self._own[task.slot] = own

    def _rebase(self, new_scores: Floats | None = None, at_least: float = -math.inf) -> None:
        """Make V 0 and the largest score the reference, solve for the temperature; re-key with one update_many.

        May move tasks to other slots.
        """
        self._changes = 0
        self._is_stale = False
        self._solved_for = self._count
        if not self._count:
            self._reference = at_least
            return
        if 4 * self._count < len(self._slots):
            self._make_room()
        slots = self._occupied()
        all_scores, all_keys = np.frombuffer(self._scores), np.frombuffer(self._keys)
        old_scores = all_scores[slots]
        scores = old_scores if new_scores is None else new_scores
        old_log_weights = self._log_weights(old_scores)
        self._reference = max(float(scores.max()), at_least)
        if self._breadth is not None:
            self.temperature = narrowed(self._breadth, scores)
        if self._policy == "strict":
            keys = -scores
        else:
            left = np.maximum(all_keys[slots] - self._v, 0.0)
            with np.errstate(all="ignore"):
                keys = left * np.exp(old_log_weights) * np.exp(-self._log_weights(scores))
            self._v = 0.0
        all_scores[slots] = scores
        all_keys[slots] = keys
        self._heap.update_many(slots, keys)

    def _log_weights(self, scores: Floats) -> Floats:
        gaps = scores - (0.0 if self._reference is None else self._reference)
        with np.errstate(all="ignore"):
            if self.temperature > 0.0:
                gaps /= self.temperature
            else:
                gaps[gaps != 0.0] *= math.inf
        return np.clip(gaps, _DEEPEST, _HIGHEST)

    def _make_room(self) -> None:
        """Move the waiting tasks together, in order, into a heap of twice their number."""
        occupied = self._occupied()
        self._scores, self._keys = (
            array("d", np.frombuffer(values)[occupied].tobytes()) for values in (self._scores, self._keys)
        )
        self._slots = [task for task in self._slots if task is not None]
        for slot, task in enumerate(self._slots):
            assert task is not None
            task.slot = slot
        capacity = max(_CAPACITY, 2 * self._count)
        self._heap = IndexedHeap.from_arrays(np.arange(self._count), np.frombuffer(self._keys), capacity)
        if self._features is not None:
            features, own = self._features, self._own
            self._features = np.zeros((capacity, features.shape[1]), np.float32)
            self._features[: self._count] = features[occupied]
            self._own = np.zeros(capacity)
            self._own[: self._count] = own[occupied]


def _cut_off(score: float) -> float:
    return min(max(-_LARGEST_SCORE, score), _LARGEST_SCORE)  # in this order nan, an age beyond all, is the smallest
