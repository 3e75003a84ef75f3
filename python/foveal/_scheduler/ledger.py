"""The ledger of all tasks: which wait, which are in flight, which are over, and what budget is left.

It decides and takes note; it runs nothing. A task goes from waiting to running and from there to done or failed, or
back to waiting (a stepper between two steps, a task that is tried again); from waiting also to cancelled or expired.

Whoever calls it holds the scheduler's mutex and is in a section, ``with ledger:``, which begins by taking in what has
arrived. A section may be broken off anywhere (foveal._scheduler.dispatch says by what), and then leaves the backlog,
the deadlines and the counts half changed. So what a task says of itself, its `status`, is what counts, it changes in
one go, and all else can be made anew from it: the next section begins with that, and calls nothing of users'. Of what
waits only the order among equals and the places with the proportional server are lost in it, no task.

What a section needs from users' code, a scorer's answer or what a log's key is equal to, it asks for by
:meth:`Ledger._ask`, before it changes anything: an error there leaves all as it was.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ParamSpec, TypeVar

from numpy.typing import ArrayLike

from foveal._scheduler.backlog import Backlog
from foveal._scheduler.checks import text_of
from foveal._scheduler.future import ARRIVING, BOOKED, DeadlineExceeded, Task
from foveal._scheduler.report import Decision, Span
from foveal._scheduler.scorer import ScorerHandle
from foveal.queues import PriorityMap

_SPENT = 1e-9  # a budget that is no more than rounding
_LOG = logging.getLogger("foveal.scheduler")
_P = ParamSpec("_P")
_T = TypeVar("_T")
_DEAREST = 1e30  # a turn that costs more counts as this in the shares, whose sums are to stay finite


class Ledger:
    """Where every task stands; see the module."""

    def __init__(self, backlog: Backlog, scorer: ScorerHandle, ema: float) -> None:
        self.backlog = backlog
        self.tasks: dict[Hashable, Task] = {}
        """By key, those whose Futures are not resolved."""
        self.arrivals: deque[Task] = deque()
        """New tasks, already in `tasks`, that the next section takes in; anybody may append."""
        self.put_off: deque[tuple[Task, float]] = deque()
        """Tasks to be cancelled by the next section, and the time when that was asked; anybody may append."""
        self.is_whole = True
        """Whether the last section was not broken off."""
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
        self._replay: deque[Decision] = deque()
        self._withdrawn: list[Hashable] = []  # keys of tasks that the log may name, but which need no turn any more
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
        self.is_whole = self.is_whole or kind is None

    def _ask(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call what is the user's, while nothing is half changed: an error in it breaks no section off."""
        self.is_whole = True
        answer = call(*args, **kwargs)
        self.is_whole = False
        return answer

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
            self._push(task)

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

    def follow(self, log: Iterable[Decision]) -> None:
        """Decide as it is written in this log, and by the policy when that is at its end."""
        self._replay, self._withdrawn = deque(log), []

    def remember(self, limit: int | None) -> None:
        """Start a new history, of so many tasks, decisions and turns; None: of all."""
        self._finished: deque[Task] = deque(maxlen=limit)
        self._decisions: deque[Decision] = deque(maxlen=limit)
        self._spans: deque[Span] = deque(maxlen=limit)

    def history(self) -> tuple[list[Task], list[Decision], list[Span]]:
        """Give the tasks that are over and those that are not, the decisions, the turns."""
        return [*self._finished, *self.unfinished()], list(self._decisions), list(self._spans)

    def counts(self) -> tuple[int, int]:
        """Say how many tasks are over and how many are not."""
        return len(self._finished), len(self.tasks)

    # Tasks come, change and go.

    def unfinished(self) -> list[Task]:
        """Give the tasks that wait or are in flight."""
        return [task for task in list(self.tasks.values()) if task.finished is None]

    def fed_back(self, urgency: float, feedback: float) -> float:
        """Give an urgency moved by the moving average."""
        return (1.0 - self._ema) * urgency + self._ema * feedback  # cannot overflow

    def rescore(self, function: str, state: ArrayLike | None) -> None:
        """Turn the scorer to a new focus, if one is given, and re-key the tasks that wait by it."""
        tasks, features = list(self.backlog), self.backlog.features()
        attention = self._ask(self._scorer.turn, function, state, features)
        if attention is not None:
            for task, part in zip(tasks, attention.tolist(), strict=True):
                task.attention = part
            self.backlog.update_all(attention)

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

    def accepts(self, now: float) -> bool:
        """Say whether this run hands out tasks at all still."""
        return self.is_open and self._budget > _SPENT and now < self.until

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
        elif self._replay and (decision := self._ask(self._next_of_log)) is not None:
            logged = self._ask(self.tasks.get, decision.key)
            if logged is None or logged.slot < 0:
                if not self.in_flight:  # else it may be in flight: its turn comes when it is back
                    self._replay.popleft()
                    self.close(
                        ValueError(
                            f"Scheduler.replay: the log's next task is {text_of(decision.key)}, expected one that waits"
                        )
                    )
                return None
            self._replay.popleft()
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

    def _next_of_log(self) -> Decision | None:
        """Give the log's next decision, those for tasks that were withdrawn left out."""
        while self._replay and self._replay[0].key in self._withdrawn:
            self._replay.popleft()
        return self._replay[0] if self._replay else None

    def settle(self, task: Task, value: Any, error: BaseException | None, now: float) -> None:
        """Take note of a turn that is over, with what it returned or raised; never raises."""
        self._land()
        try:
            self._account(task, value, error, now)
        except BaseException as failure:  # what was returned is of a kind that nobody has thought of
            self.abandon(task, failure, now)

    def give_up(self, error: BaseException, now: float) -> None:
        """Let all that is in flight fail, for it may never come back, and hand out nothing more."""
        self.close()
        for task in self.unfinished():
            if task.status == "running":
                self._finish(task, "failed", error, now)
        self._is_alone = False
        self._mend()

    def abandon(self, task: Task, error: BaseException, now: float) -> None:
        """Let a task fail, wherever it is, after an error in the middle of a change."""
        if task.finished is None:
            self._finish(task, "failed", error, now)
        self._mend()

    def _account(self, task: Task, value: Any, error: BaseException | None, now: float) -> None:
        task.steps += 1
        self._spans.append(Span(task.key, task.turn_began, now))
        cost = value.cost if task.max_steps and error is None else 1.0
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
            task.attempts = 0
            if value.feedback is not None:
                task.urgency = self.fed_back(task.urgency, value.feedback)
            self._wait_again(task, now)
        else:
            task.result = value
            self._finish(task, "done", None, now)

    def put_back(self, task: Task) -> None:
        """Undo the decision for a task that was not started: it is among the next again."""
        self._attend(task)  # to a focus that is new since; where that fails the task is as it was
        self._land()
        self._budget += task.granted
        self.backlog.undo(task)
        if not task.steps:
            task.started = None
        task.status = "waiting"
        self._push(task)

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
        error = self._attend(task)
        if error is None:
            self._push(task)
        else:
            self._finish(task, "failed", error, now)

    def _attend(self, task: Task) -> Exception | None:
        """Ask the scorer for a task's attention; give the error of one that is a user's callable."""
        if task.features is not None:
            try:
                task.attention = self._scorer.of_one(task.features)
            except Exception as error:
                return error
        return None

    def _push(self, task: Task) -> None:
        """Let a task wait in the backlog, with the attention that it has."""
        if task.deadline is not None and not task.steps:
            self._deadlines[task] = task.deadline
        self.backlog.push(task, task.attention)

    def _finish(self, task: Task, status: str, error: BaseException | None, now: float) -> None:
        task.status, task.error, task.finished = status, error, now
        self._book(task)

    def _book(self, task: Task) -> None:
        """Note that a task is over; what it holds is let go of when its Future is resolved, not in a section."""
        self.over.append(task)
        self._finished.append(task)
        task.slot = BOOKED

    def free_keys(self, over: Iterable[Task]) -> None:
        """Free the keys of tasks that are over; may be called again.

        Not in a section, for a key's __eq__ may do anything.
        """
        tasks = self.tasks
        for task in over:
            try:
                key = task.key
                if tasks.get(key) is task:
                    del tasks[key]
            except Exception:  # of a key whose __eq__ raises; the entry stays, and says that it is finished
                _LOG.exception("exception comparing the key %s", text_of(task.key))

    def _withdraw(self, task: Task) -> bool:
        """Take a waiting task out of wherever it waits; say whether it did."""
        if task.slot >= 0:
            self.backlog.remove(task)
        elif task in self._suspects:
            self._suspects.remove(task)
        elif task.slot != ARRIVING or task.finished is not None:  # else it is submitted at this moment
            return False
        self._deadlines.discard(task)
        if self._replay:
            self._withdrawn.append(task.key)
        return True
