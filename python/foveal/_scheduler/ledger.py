"""The ledger of all tasks: which wait, which are in flight, which are over, and what budget is left.

It decides and takes note; it runs nothing. A task goes from waiting to running and from there to done or failed, or
back to waiting (a stepper between two steps, a task that is tried again); from waiting also to cancelled or expired.

Whoever calls it holds the scheduler's mutex and is in a section, ``with ledger:``, which begins by taking in what has
arrived. A section may be broken off anywhere (foveal._scheduler.dispatch says by what), and then leaves the backlog,
the deadlines and the counts half changed. So what a task says of itself, its `status`, is what counts, it changes in
one go, and all else can be made anew from it: the next section begins with that. Of what waits only the order among
equals and the places with the proportional server are lost in it, no task.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from typing import Any

from foveal._scheduler.backlog import Backlog
from foveal._scheduler.checks import text_of, wrong_with_step
from foveal._scheduler.future import ARRIVING, BOOKED, DeadlineExceeded, Step, Task
from foveal._scheduler.report import Decision, Report, Span, row_of
from foveal._scheduler.scorer import ScorerHandle
from foveal.queues import PriorityMap

_SPENT = 1e-9  # a budget that is no more than rounding
_DEAREST = 1e30  # a turn that costs more counts as this in the shares, whose sums are to stay finite


class Ledger:
    """Where every task stands; see the module."""

    def __init__(self, backlog: Backlog, scorer: ScorerHandle, ema: float) -> None:
        self.backlog = backlog
        self.tasks: dict[Hashable, Task] = {}
        """By key, those that wait or are in flight."""
        self.arrivals: deque[Task] = deque()
        """New tasks, already in `tasks`, that the next section takes in; anybody may append."""
        self.put_off: deque[tuple[Task, float]] = deque()
        """Tasks to be cancelled by the next section, and the time when that was asked; anybody may append."""
        self.is_whole = True
        """Whether the last section was not broken off."""
        self.replay: deque[Decision] = deque()
        self.in_flight = 0
        self.over: deque[Task] = deque()
        """Tasks that are over and whose Futures are still to be resolved."""
        self.failure: BaseException | None = None
        """Why the run has ended before its time."""
        self.is_open = False
        """Whether tasks are handed out."""
        self._scorer = scorer
        self._ema = ema
        self._deadlines: PriorityMap[Task] = PriorityMap()
        self._suspects: deque[Task] = deque()  # were in flight when the executor broke: they run alone now
        self._is_alone = False  # a suspect is in flight
        self.open(1, 0, raises=False)
        self.close()
        self.remember(None)

    # Sections.

    def __enter__(self) -> None:
        if not self.is_whole:
            self._mend()
        self.is_whole = False
        while self.arrivals:
            task = self.arrivals[0]
            if task.slot == ARRIVING and task.finished is None:  # else a section that was broken off has begun with it
                self._queue(task, task.submitted)
            self.arrivals.popleft()
        while self.put_off:
            self.cancel(*self.put_off[0])
            self.put_off.popleft()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self.is_whole = kind is None

    def _mend(self) -> None:
        """Make anew, from what the tasks say, all that a section that was broken off may have left half changed."""
        tasks = list(self.tasks.values())
        for task in tasks:
            if task.finished is not None and task.slot != BOOKED:
                for book in (self.over, self._finished):
                    if task in book:
                        book.remove(task)
                self._book(task)
        tasks = [task for task in tasks if task.finished is None]
        self.in_flight = sum(task.status == "running" for task in tasks)
        self._deadlines = PriorityMap()
        self.backlog.restart(tasks)
        suspects = set(self._suspects)
        waiting = [t for t in tasks if t.status == "waiting" and t.slot != ARRIVING and t not in suspects]
        for task in sorted(waiting, key=lambda task: task.queued):
            self._queue(task, task.queued)

    # A run.

    def open(
        self, width: int, retries: int, *, raises: bool, budget: float = math.inf, until: float = math.inf
    ) -> None:
        """Hand out tasks from now on: at most `width` at once, for so much service, before `until`."""
        self._width, self._retries, self._raises = width, retries, raises
        self._budget, self.until = budget, until
        self.failure = None
        self.is_open = True

    def close(self, failure: BaseException | None = None) -> None:
        """Hand out no more."""
        self.is_open = False
        self.failure = self.failure or failure

    def remember(self, limit: int | None) -> None:
        """Start a new history, of so many tasks, decisions and turns; None: of all."""
        self._finished: deque[Task] = deque(maxlen=limit)
        self._decisions: deque[Decision] = deque(maxlen=limit)
        self._spans: deque[Span] = deque(maxlen=limit)

    def report(self, began: float | None, now: float) -> Report:
        """Report on the history and on what is not over yet."""
        rows = [row_of(task) for task in (*self._finished, *self.unfinished())]
        if began is None:
            began = min((row.submitted for row in rows), default=now)
        return Report(rows, self._decisions, self._spans, began, now)

    def counts(self) -> tuple[int, int]:
        """Say how many tasks are over and how many are not."""
        return len(self._finished), len(self.tasks)

    # Tasks come, change and go.

    def unfinished(self) -> list[Task]:
        """Give the tasks that wait or are in flight."""
        return [task for task in list(self.tasks.values()) if task.finished is None]

    def fed_back(self, urgency: float, feedback: float) -> float:
        """Give an urgency moved by the moving average; `feedback` may be any real number, a tensor's too."""
        return (1.0 - self._ema) * urgency + self._ema * float(feedback)  # cannot overflow

    def cancel(self, task: Task, now: float) -> bool:
        """Cancel a task that waits, or a stepper when its step is over; say whether it is, or will be."""
        if self._withdraw(task):
            self._finish(task, "cancelled", None, now)
            return True
        task.doomed = bool(task.max_steps) and task.finished is None
        return task.doomed

    def fail(self, task: Task, error: BaseException, now: float) -> None:
        """Let a task that waits fail."""
        if self._withdraw(task):
            self._finish(task, "failed", error, now)

    def expire(self, now: float) -> None:
        """Take out the tasks whose deadline has passed."""
        while self._deadlines and self._deadlines.peekitem()[1] < now:
            task, _ = self._deadlines.popitem()
            if self._withdraw(task):
                error = DeadlineExceeded(f"task {text_of(task.key)} was not started before its deadline")
                self._finish(task, "expired", error, now)

    def next_deadline(self) -> float:
        """Say when the next deadline is; inf: there is none."""
        return self._deadlines.peekitem()[1] if self._deadlines else math.inf

    # Turns.

    def has_room(self) -> bool:
        """Say whether there may be a task to hand out, the time left aside."""
        return (
            self.is_open
            and self.in_flight < self._width
            and not self._is_alone
            and self._budget > _SPENT
            and bool(self.backlog or self._suspects)
        )

    def room(self) -> int:
        """Say how many tasks may be handed out, the time left aside."""
        return min(self._width - self.in_flight, len(self.backlog) + len(self._suspects)) if self.has_room() else 0

    def take(self, now: float) -> Task | None:
        """Take the next task out for its turn, if there is room for one."""
        if not self.has_room() or now >= self.until:
            return None
        if self._suspects:
            if self.in_flight:
                return None
            task = self._suspects.popleft()
            self._is_alone = True
        elif self.replay:
            decision = self.replay[0]
            logged = self.tasks.get(decision.key)
            if logged is None or logged.slot < 0:
                if not self.in_flight:  # else it may be in flight: its turn comes when it is back
                    self.replay.popleft()
                    self.close(
                        ValueError(
                            f"Scheduler.replay: the log's next task is {text_of(decision.key)}, expected one that waits"
                        )
                    )
                return None
            self.replay.popleft()
            task = self.backlog.take(logged, rotation=decision.rotation)
        else:
            task = self.backlog.pop()
        if task.deadline is not None:
            self._deadlines.discard(task)
        task.granted = min(1.0, self._budget)
        self._budget -= task.granted
        self.in_flight += 1
        task.status = "running"
        task.turn_began = now
        if task.started is None:
            task.started = now
        self._decisions.append(Decision(now, task.key, task.by_rotation))
        return task

    def settle(self, task: Task, value: Any, error: BaseException | None, now: float) -> None:
        """Take note of a turn that is over, with what it returned or raised; never raises."""
        self._land()
        try:
            self._account(task, value, error, now)
        except BaseException as failure:  # what was returned is of a kind that nobody has thought of
            self.abandon(task, failure, now)

    def abandon(self, task: Task, error: BaseException, now: float) -> None:
        """Let a task fail, wherever it is, after an error in the middle of a change."""
        if task.finished is None:
            self._finish(task, "failed", error, now)
        self._mend()

    def _account(self, task: Task, value: Any, error: BaseException | None, now: float) -> None:
        task.steps += 1
        self._spans.append(Span(task.key, task.turn_began, now))
        cost = 1.0
        if error is None and task.max_steps:
            error = wrong_with_step(task.key, value)
            if error is None:
                value = Step(*value)
                cost = float(value.cost)
        task.cost += cost
        self._budget += task.granted - cost
        charge = min(cost, _DEAREST)
        self.backlog.settle(task, charge)
        task.charge = charge
        if task.doomed:
            self._finish(task, "cancelled", None, now)
        elif error is not None:
            task.attempts += 1
            if task.attempts <= self._retries:
                self._wait_again(task, now)
                return
            self._finish(task, "failed", error, now)
            if self._raises:
                self.close(error)
        elif task.max_steps and not value.done and task.steps < task.max_steps:
            if value.feedback is not None:
                task.urgency = self.fed_back(task.urgency, value.feedback)
            self._wait_again(task, now)
        else:
            task.result = value
            self._finish(task, "done", None, now)

    def put_back(self, task: Task) -> None:
        """Undo the decision for a task that was not started: it is among the next again."""
        self._land()
        self._budget += task.granted
        self.backlog.undo(task)
        if not task.steps:
            task.started = None
        self._wait_again(task, task.queued)

    def settle_broken(self, task: Task, error: BaseException, now: float, *, was_only_one: bool) -> None:
        """Take note that the executor broke, and was mended, while the task was in flight.

        Any of the tasks in flight may have done it. So they run again, one at a time: the one that breaks the executor
        by itself is charged, as for raising `error`, and only that one.
        """
        if self._is_alone or was_only_one:
            self.settle(task, None, error, now)
        else:
            self._land()
            self._budget += task.granted
            self.backlog.undo(task)
            task.status = "waiting"
            self._suspects.append(task)

    def _land(self) -> None:
        self.in_flight -= 1
        self._is_alone = False

    def _wait_again(self, task: Task, now: float) -> None:
        task.status = "waiting"
        task.queued = now
        self._queue(task, now)

    def _queue(self, task: Task, now: float) -> None:
        if task.deadline is not None and not task.steps:
            self._deadlines[task] = task.deadline
        try:
            attention = self._scorer.of_one(task.features)
        except Exception as error:  # a scorer that is a user's callable
            self._deadlines.discard(task)
            self._finish(task, "failed", error, now)
        else:
            self.backlog.push(task, attention)

    def _finish(self, task: Task, status: str, error: BaseException | None, now: float) -> None:
        task.status, task.error, task.finished = status, error, now
        self._book(task)

    def _book(self, task: Task) -> None:
        """Note that a task is over; what it holds is let go of when its Future is resolved, not in a section."""
        self.over.append(task)
        self._finished.append(task)
        try:
            del self.tasks[task.key]
        except Exception as error:  # of a key whose __eq__ raises; the entry stays, and says that it is finished
            self.close(error)
        task.slot = BOOKED

    def _withdraw(self, task: Task) -> bool:
        """Take a waiting task out of wherever it waits; say whether it did."""
        if task.slot >= 0:
            self.backlog.remove(task)
        elif task in self._suspects:
            self._suspects.remove(task)
        elif task.slot != ARRIVING or task.finished is not None:  # else it is submitted at this moment
            return False
        self._deadlines.discard(task)
        if self.replay:
            self.replay = deque(decision for decision in self.replay if decision.key != task.key)
        return True
