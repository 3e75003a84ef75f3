"""The rotation: goes round all tasks whatever their scores, and gives each the same service.

A task joins at the end, keeps its place while it is in flight for the proportional server, and goes to the end when it
has had its part of the round. Rounds are elastic (Kanhere, Sethu and Parekh 2002): a task has a *level*, what it has
had in all, and the round has one; a visit lasts until the task's level is above the round's, and the next round is
higher by the dearest turn of this one. So where all turns cost the same each task has one a round, and where they do
not a cheap one has several. A new task begins at the level of the round that first comes to it.

A round rises by 1, the budget of a step, at most, so that nobody is served for long because another's turn was dear:
who has had more than that sleeps until the rounds have caught up with it.
"""

from __future__ import annotations

from collections import deque
from itertools import chain

from foveal._scheduler.future import Task
from foveal.queues import PriorityMap

_CAPACITY = 64
_HIGHEST_RISE = 1.0
_ROUNDING = 1e-9  # of levels
_DEAREST = 1e6  # a turn that costs more counts as this here, or levels would have no digits for the others' turns


class Rotation:
    """Tasks in the order of rotation; see the module."""

    def __init__(self) -> None:
        # Unfinished tasks, and some that are finished: these are dropped at the head, or all together now and then.
        self._places: deque[Task] = deque()
        self._sleepers: PriorityMap[Task] = PriorityMap()  # by their levels
        self._limit = _CAPACITY  # at how many to look for finished ones
        self._left = 0  # how many places the round has still to come to
        self._level = 0.0  # of the round
        self._rise = 0.0  # the dearest turn of the round

    def restarted(self) -> Rotation:
        """Give another with those that are unfinished, in their order; their levels are forgotten."""
        other = Rotation()
        for task in dict.fromkeys(chain(self._places, self._sleepers)):
            if task.finished is None:
                other.join(task)
        return other

    def join(self, task: Task) -> None:
        """Give a task that has no place one: at the end, or at the head when its visit is not over."""
        task.in_rotation = True
        if len(self._places) + len(self._sleepers) >= self._limit:
            self._drop_finished()
        if 0.0 <= task.level <= self._level + _ROUNDING:
            self._places.appendleft(task)
            self._left += 1
        else:
            self._places.append(task)

    def first(self) -> Task:
        """Find the first that waits; those in flight before it, at most one a worker, keep their places."""
        passed = []
        while True:
            while not self._left:
                self._begin_round()
            task = self._places[0]
            is_early = task.level > self._level + _ROUNDING
            if task.slot >= 0 and not is_early:
                break
            self._places.popleft()
            self._left -= 1
            if task.finished is not None:
                continue
            if is_early:
                self._sleepers[task] = task.level
            else:
                passed.append(task)
        self._places.extendleft(reversed(passed))
        self._left += len(passed)
        return task

    def take(self, task: Task) -> None:
        """Take a task out for a turn of the rotation."""
        if task.in_rotation:
            task.in_rotation = False
            if not self._sleepers.discard(task):
                self._places.remove(task)  # at the head, or behind tasks in flight
                self._left = max(0, self._left - 1)
        if task.level < 0.0:
            task.level = self._level
        task.level += min(task.charge, _DEAREST)

    def settle(self, task: Task, cost: float) -> None:
        """Take note of what a turn of the rotation cost, which was not the expected charge."""
        task.level = max(0.0, task.level + (min(cost, _DEAREST) - min(task.charge, _DEAREST)))
        self._rise = max(self._rise, min(cost, _HIGHEST_RISE))

    def _begin_round(self) -> None:
        assert self._places or self._sleepers
        self._level += self._rise
        if not self._rise and self._sleepers:  # nobody else waits
            self._level = max(self._level, self._sleepers.peekitem()[1])
        self._rise = 0.0
        while self._sleepers and self._sleepers.peekitem()[1] <= self._level + _ROUNDING:
            self._places.append(self._sleepers.popitem()[0])
        self._left = len(self._places)

    def _drop_finished(self) -> None:
        self._places = deque(task for task in self._places if task.finished is None)
        self._left = min(self._left, len(self._places))
        for task in [task for task in self._sleepers if task.finished is not None]:
            del self._sleepers[task]
        self._limit = 2 * (len(self._places) + len(self._sleepers)) + _CAPACITY
