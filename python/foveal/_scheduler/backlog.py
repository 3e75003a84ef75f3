"""The tasks that wait, and which of them is next.

Every waiting task has a slot; slots are handed out in the order of arrival, so the smallest occupied one is the task
that has waited longest, and equal keys of the heap, whose ties go to the smaller id, come out first in, first out. When
the slots are used up the waiting tasks are moved together (a constant cost a task, over time).

What comes next is decided by one of two servers:

- The **proportional** server (foveal._scheduler.lanes) gives turns in the ratio of weights, or with "strict" to the
  largest score. weight = exp((score - reference)/temperature). The reference, the largest score, and the temperature
  are set anew in passes over all tasks, at most one for every 1/16 of them that came, went or changed. Until then a
  weight may be cut off, at exp(-600), or too high to be told from others as high. With `breadth` a pass is due, too,
  when exp(entropy) of the weights, of which running sums are kept, is 5% off, and then at most one for every 1/256.
- The **rotation** (foveal._scheduler.rotation) takes all tasks in turn, whatever their scores, and gets `floor` of the
  service. So each task gets floor/n of the service here, and one that waits with at most n others waits for at most
  (2 n + w) C / floor of service, (n + w) C / floor when all turns cost the same, C the dearest turn and w the number in
  flight (docs/scheduler.md). No urgency and no feedback enters.

Aging: a score that grows at a common rate while it waits is ``score + rate*(now - queued)``. The part ``rate*now`` is
common to all, so neither softmax nor order sees it, and ``score - rate*queued`` never needs re-keying.

Scores are cut off at +-1e290, so that no difference of two overflows.

Not thread-safe: the scheduler calls it with its mutex held.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from foveal._scheduler.future import Task
from foveal._scheduler.lanes import Lanes
from foveal._scheduler.rotation import Rotation
from foveal._scheduler.shares import Floats, Policy, narrowed

_CAPACITY = 64  # of the fewest slots
# Logs of weights, relative to the reference: where they are cut off; up to where the reference need not follow (beside
# V of at most _LARGEST_V a key V + charge/weight still tells weights up to exp(20) apart). The weight down to which V
# follows.
_DEEPEST, _HIGHEST, _HIGH = -600.0, 600.0, 20.0
_LOW = math.exp(-25.0)
_LARGEST_V = 2.0**20
_LARGEST_SCORE = 1e290
_PATIENCE = 16  # a pass over all tasks is due when changes times this exceed their number: about 1 us a change
# With `breadth`: how far off it may be until the temperature is solved for anew, and the patience with that.
_OFF, _PATIENCE_WITH_BREADTH = 0.05, 256


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
        self._rotates = floor > 0.0 and policy != "strict"
        self._rotation = Rotation()
        self._clear()

    def _clear(self) -> None:
        self._count = 0
        self._slots: list[Task | None] = []
        self._capacity = _CAPACITY  # at how many slots to move the waiting together
        self._scores = array("d")  # by slot
        # By slot, from the first task with features on: these, or zeros, and the score less the scorer's part.
        self._features: NDArray[np.float32] | None = None  # (capacity, d)
        self._own: Floats = np.empty(0)
        self._lanes = Lanes(self._policy, measures_breadth=self._breadth is not None)
        self._reference: float | None = None
        self._is_stale = False  # a task as high as the reference has left
        self._reached = 1.0  # the breadth when `temperature` was solved for
        self._changes = 0  # since the last rebase

    def restart(self, tasks: Iterable[Task]) -> None:
        """Begin anew with none of `tasks`, all that are unfinished; the rotation keeps its order."""
        self._clear()
        for task in tasks:
            task.residual = task.level = -1.0
            task.credit = 0.0
            task.in_rotation = False
            if task.slot >= 0:
                task.slot = -1
        self._rotation = self._rotation.restarted()

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
        if len(self._slots) == self._capacity:
            self._rebuild(self._occupied())
        own = _cut_off(task.urgency + task.importance - self._aging * task.queued)
        score = _cut_off(own + attention)
        log_weight = self._log_weight(score)
        if self._policy == "strict":
            self._lanes.push(0.0, task.charge, -score, 0.0)
        else:
            left = task.residual
            if left < 0.0:
                left = task.charge * (self._random.expovariate(1.0) if self._policy == "sample" else 1.0)
            self._lanes.push(log_weight, task.charge, left, task.credit)
            task.credit = 0.0
        task.slot = len(self._slots)
        if task.features is not None or self._features is not None:
            self._set_features(task, own)
        self._slots.append(task)
        self._scores.append(score)
        self._count += 1
        if self._rotates and not task.in_rotation:
            self._rotation.join(task)
        self._changes += 1

    def pop(self) -> Task:
        """Take the next task out for its turn, charging its server what the turn is expected to cost."""
        if self._policy == "strict":
            return self.take(self._task(self._lanes.first()))
        if self._breadth is not None and self._is_breadth_off():
            self._rebase()
        if self._is_rotations_turn():
            return self.take(self._rotation.first(), rotation=True)
        slot = self._lanes.first()
        if self._is_rebase_due() and self._lanes.weight(slot) < _LOW:
            self._rebase()  # those that the reference was the largest of are gone
            slot = self._lanes.first()
        return self.take(self._task(slot))

    def take(self, task: Task, *, rotation: bool = False) -> Task:
        """Take this task out for its turn, whosever turn it is."""
        slot = task.slot
        task.by_rotation = rotation
        task.residual = -1.0
        self._rotation_credit += (self._floor - rotation) * task.charge
        if rotation:
            self._rotation.take(task)
        if self._policy != "strict":
            if rotation:  # the proportional server did not serve it: it keeps its place there
                task.residual = self._lanes.left(slot)
            else:  # below _LOW V would leave no digits for the others' keys
                task.share = self._lanes.serve(slot, task.charge)
                v = self._lanes.move_v(slot) if self._lanes.weight(slot) >= _LOW else 0.0
                if self._policy == "sample" and v > _LARGEST_V and self._is_rebase_due():
                    self._rebase()
        task.credit = self._remove(task)
        return task

    def remove(self, task: Task) -> None:
        """Take a task out without a turn."""
        self._remove(task)

    def _remove(self, task: Task) -> float:
        self._is_stale = self._is_stale or self._weighed(self._scores[task.slot]) > -1.0
        credit = self._lanes.remove(task.slot)
        self._slots[task.slot] = None
        task.slot = -1
        self._count -= 1
        self._changes += 1
        if not self._count:
            self._clear()
        return credit

    def settle(self, task: Task, cost: float) -> None:
        """Settle a turn: it took `cost`, not the expected charge."""
        more = cost - task.charge
        self._rotation_credit += (self._floor - task.by_rotation) * more
        if task.by_rotation:
            self._rotation.settle(task, cost)
        elif more and self._policy == "credit":  # as if it had been known before
            more *= 1.0 - task.share
            self._lanes.pour(more)
            task.credit -= more

    def undo(self, task: Task) -> None:
        """Undo the decision for a task: it is among the next again when it is pushed."""
        self.settle(task, 0.0)
        task.residual = 0.0

    def update(self, task: Task) -> None:
        """Re-key one task after its urgency or importance has changed."""
        score = own = task.urgency + task.importance - self._aging * task.queued
        if not -_LARGEST_SCORE <= own <= _LARGEST_SCORE:
            score = own = _cut_off(own)
        slot = task.slot
        if self._features is not None:
            score = _cut_off(own + (self._scores[slot] - float(self._own[slot])))
            self._own[slot] = own
        if score == self._scores[slot]:
            return
        self._changes += 1
        log_weight = self._log_weight(score)
        slot = task.slot  # it may have rebased
        if self._policy == "strict":
            self._lanes.rekey(slot, -score)
        else:
            self._lanes.update(slot, log_weight)
        self._scores[slot] = score

    def update_all(self, attention: Floats) -> None:
        """Give every task, in the order of iteration, a new attention score, and re-key all with one update_many."""
        attention = np.clip(attention, -_LARGEST_SCORE, _LARGEST_SCORE)
        self._rebase(np.clip(self._own[self._occupied()] + attention, -_LARGEST_SCORE, _LARGEST_SCORE))

    def solve(self) -> float:
        """Give the temperature; with `breadth` solved for the tasks that wait now, for dispatch too."""
        if self._breadth is not None and self._changes:
            self._rebase()
        return self.temperature

    def _task(self, slot: int) -> Task:
        task = self._slots[slot]
        assert task is not None
        return task

    def _is_rotations_turn(self) -> bool:
        if not self._rotates:
            return False
        if self._policy == "sample":  # turns at rates that make `floor` of the service, whatever the two cost
            ours = self._floor * self._task(self._lanes.first()).charge
            theirs = (1.0 - self._floor) * self._rotation.first().charge
            part = ours / (ours + theirs) if ours + theirs else self._floor
            return self._random.random() < part
        return self._rotation_credit >= -1e-9  # `floor` is a rounded number: 20 times 0.05 is to make a whole turn

    def _is_breadth_off(self) -> bool:
        if not self._changes * _PATIENCE_WITH_BREADTH >= self._count:
            return False
        breadth = self._lanes.breadth()
        return not abs(breadth - self._reached) <= _OFF * self._reached

    def _is_rebase_due(self) -> bool:
        return self._changes * _PATIENCE > self._count

    def _log_weight(self, score: float) -> float:
        """Give the log of the weight for a score; first moves the reference where it would not serve this score."""
        reference, temperature = self._reference, self.temperature
        if reference is None:
            self._reference = score
        elif temperature > 0.0 and _DEEPEST < (x := (score - reference) / temperature) <= _HIGH:  # most are
            return x
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

    def _occupied(self) -> NDArray[np.int64]:
        if self._count == len(self._slots):
            return np.arange(self._count)
        return np.fromiter((t.slot for t in self._slots if t is not None), np.int64, self._count)

    def _set_features(self, task: Task, own: float) -> None:
        if self._features is None:
            assert task.features is not None
            self._features = np.zeros((self._capacity, task.features.shape[-1]), np.float32)
            self._own = np.zeros(self._capacity)
            self._own[: len(self._scores)] = self._scores  # nobody before had features
        self._features[task.slot] = 0.0 if task.features is None else task.features
        self._own[task.slot] = own

    def _rebase(self, new_scores: Floats | None = None, at_least: float = -math.inf) -> None:
        """Make the largest score the reference, solve for the temperature, and give all their new weights.

        May move tasks to other slots.
        """
        self._changes = 0
        self._is_stale = False
        if not self._count:
            self._reference = at_least
            return
        occupied = self._occupied()
        before = self._lanes.lefts(occupied)
        if new_scores is not None:
            np.frombuffer(self._scores)[occupied] = new_scores
        scores = np.frombuffer(self._scores)[occupied]
        self._reference = max(float(scores.max()), at_least)
        if self._breadth is not None:
            self.temperature = narrowed(self._breadth, scores)
        self._rebuild(occupied, before)
        if self._breadth is not None:
            self._reached = self._lanes.breadth()

    def _rebuild(self, occupied: NDArray[np.int64], standing: tuple[Floats, Floats] | None = None) -> None:
        """Move the waiting tasks together, in order, with room for as many again."""
        scores = np.frombuffer(self._scores)[occupied]
        if self._policy == "strict":
            nothing = np.zeros(len(scores))
            self._lanes.rebuild(occupied, nothing, -scores, nothing)
        else:
            self._lanes.rebuild(occupied, self._log_weights(scores), *(standing or self._lanes.lefts(occupied)))
        self._scores = array("d", scores.tobytes())
        if self._count != len(self._slots):
            self._slots = [task for task in self._slots if task is not None]
            for slot, task in enumerate(self._slots):
                task.slot = slot  # type: ignore[union-attr]
        capacity = max(_CAPACITY, 2 * self._count)
        if self._features is not None:
            features, own = self._features, self._own
            self._features = np.zeros((capacity, features.shape[1]), np.float32)
            self._features[: self._count] = features[occupied]
            self._own = np.zeros(capacity)
            self._own[: self._count] = own[occupied]
        self._capacity = capacity

    def _log_weights(self, scores: Floats) -> Floats:
        gaps = scores - (0.0 if self._reference is None else self._reference)
        with np.errstate(all="ignore"):
            if self.temperature > 0.0:
                gaps /= self.temperature
            else:
                gaps[gaps != 0.0] *= math.inf
        return np.clip(gaps, _DEEPEST, _HIGHEST)


def _cut_off(score: float) -> float:
    return min(max(-_LARGEST_SCORE, score), _LARGEST_SCORE)  # in this order nan, an age beyond all, is the smallest
