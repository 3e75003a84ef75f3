"""What users call: the Scheduler, which checks what it is given and leaves the rest to the ledger and the engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Executor
from types import TracebackType
from typing import Any, Literal

from numpy.typing import ArrayLike

from foveal._scheduler.backlog import Backlog
from foveal._scheduler.checks import (
    check_callable,
    check_count,
    check_finite,
    check_hashable,
    check_priority,
    check_range,
    text_of,
)
from foveal._scheduler.engine import Engine
from foveal._scheduler.executors import ExecutorHandle
from foveal._scheduler.future import Future, Step, Task
from foveal._scheduler.ledger import Ledger
from foveal._scheduler.progress import Progress
from foveal._scheduler.report import Decision, Report
from foveal._scheduler.scorer import AttentionScorer, ScorerHandle
from foveal._scheduler.shares import Floats, Policy, largest_remainder, softmax, with_floor

_BACKGROUND_HISTORY = 10_000  # tasks, decisions and turns that a scheduler which runs for ever remembers
_POLICIES = ("credit", "sample", "strict")


class Scheduler:
    """Runs tasks by priority: softmax((urgency + importance)/temperature) is each task's share of the service.

    Parameters
    ----------
    executor : concurrent.futures.Executor, or callable that makes one, optional
        Threads, processes, Dask's ``client.get_executor()``, MPI. What a callable makes is shut down by the scheduler,
        and made anew when it breaks; a ProcessPoolExecutor that breaks is replaced by one like it. Default: threads.
    max_in_flight : int, optional
        How many tasks may be with the executor. Default: its number of workers, so that priorities count to the last
        moment; more keeps distant workers busy.
    temperature : float
        Above 0, default 1; higher shares more evenly.
    floor : float
        From 0 to 1: this part of the service goes round all waiting tasks in turn, whatever their priorities.
    breadth : float, optional
        How many tasks share the rest, as exp(entropy): the temperature is solved for. Not together with `temperature`.
    ema : float
        From 0 to 1: feedback moves an urgency by ``urgency += ema * (feedback - urgency)``.
    aging : float
        At least 0: what a score gains for each second of waiting.
    policy : {"credit", "sample", "strict"}
        "credit" is deterministic and keeps to the shares as closely as turns allow; "sample" draws each turn at random
        in proportion to the shares; "strict" always takes the largest score, and starves the others by design.
    scorer : AttentionScorer or callable, optional
        Adds attention to the scores of tasks that have `features`: see :meth:`rescore`.
    seed : int, optional
        Of "sample".
    clock : callable, optional
        Gives the time in seconds for deadlines, aging and the log. Default: ``time.monotonic``. A clock that runs
        backwards is taken to stand still.

    Notes
    -----
    A turn of a submitted callable counts 1 as service, a turn of a stepper what its Step says it cost. A newcomer waits
    a few times as long as its share alone would have it, however many equals are due (docs/scheduler.md has the bound).
    With n others waiting and w in flight at most, a task gets a turn before the rest get ``(n + w) * C / floor`` more
    service where all turns cost C, ``(2n + w) * C / floor`` where they cost at most C, whatever urgencies and feedback
    do. With one worker and the same clock and seed the
    decisions are the same.

    Examples
    --------
    >>> import foveal
    >>> scheduler = foveal.Scheduler(max_in_flight=1)
    >>> order = []
    >>> for word, urgency in [("last", 0.0), ("first", 2.0), ("second", 1.0)]:
    ...     future = scheduler.submit(order.append, word, urgency=urgency, key=word)
    >>> scheduler.allocate(10)
    {'last': 1, 'first': 6, 'second': 3}
    >>> scheduler.run().counts, order
    ({'done': 3}, ['first', 'second', 'last'])
    """

    def __init__(
        self,
        executor: Executor | Callable[[], Executor] | None = None,
        *,
        max_in_flight: int | None = None,
        temperature: float | None = None,
        floor: float = 0.05,
        breadth: float | None = None,
        ema: float = 0.3,
        aging: float = 0.0,
        policy: Policy = "credit",
        scorer: AttentionScorer | Callable[[Any], ArrayLike] | None = None,
        seed: int | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if executor is not None and not isinstance(executor, Executor) and not callable(executor):
            raise TypeError(
                f"Scheduler: executor has type {type(executor).__name__}, expected a concurrent.futures.Executor, "
                "a callable that makes one, or None"
            )
        if scorer is not None:
            check_callable("Scheduler", "scorer", scorer)
        if clock is not None:
            check_callable("Scheduler", "clock", clock)
        if breadth is not None and temperature is not None:
            raise ValueError("Scheduler: breadth and temperature are both given, expected one: breadth solves for it")
        if policy not in _POLICIES:
            raise ValueError(f"Scheduler: policy is {policy!r}, expected one of {_POLICIES}")
        if max_in_flight is not None:
            check_count("Scheduler", "max_in_flight", max_in_flight, 1)
        check_range("Scheduler", "temperature", 1.0 if temperature is None else temperature, above=0.0)
        check_range("Scheduler", "floor", floor, 0.0, 1.0)
        check_range("Scheduler", "ema", ema, 0.0, 1.0)
        check_range("Scheduler", "aging", aging, 0.0)
        if breadth is not None:
            check_range("Scheduler", "breadth", breadth, 1.0)
        self._temperature, self._breadth = 1.0 if temperature is None else temperature, breadth
        self._floor, self._policy = floor, policy
        self._max_in_flight = max_in_flight
        self._made_up = itertools.count(1)  # keys
        self._scorer = ScorerHandle(scorer)
        backlog = Backlog(policy, floor, self._temperature, breadth, aging, seed)
        self._ledger = Ledger(backlog, self._scorer, ema)
        self._engine = Engine(self._ledger, ExecutorHandle(executor), clock)

    def submit(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        urgency: float = 0.0,
        importance: float = 0.0,
        features: ArrayLike | None = None,
        key: Hashable = None,
        deadline: float | None = None,
        **kw: Any,
    ) -> Future:
        """Queue ``fn(*args, **kw)`` and give its Future.

        Parameters
        ----------
        fn, *args, **kw
            What is called. A process needs to pickle them. Keywords with the names of the parameters below are the
            scheduler's: for a `fn` with a ``key`` of its own submit ``functools.partial(fn, key=...)``.
        urgency, importance : float
            Finite, and so is their sum, the score. Urgency is what feedback and :meth:`update` are expected to change.
        features : array (d,), optional
            What the scheduler's scorer compares with its focus.
        key : hashable, optional
            By which the task is addressed, in reports too; free again when the task is done. Default: ``"task-1"`` and
            so on.
        deadline : float, optional
            Seconds from now in which the task must have been started; else it is not started and its Future gets
            DeadlineExceeded.

        Raises
        ------
        ValueError
            The key is that of an unfinished task; a number is not finite, or a deadline negative.
        TypeError
            `fn` is not callable, the key not hashable; `features` without a scorer.
        RuntimeError
            The scheduler was shut down.
        """
        check_callable("Scheduler.submit", "fn", fn)
        if deadline is not None:
            check_range("Scheduler.submit", "deadline", deadline, 0.0)
        return self._add("Scheduler.submit", fn, args, kw or None, urgency, importance, key, features, deadline, 0)

    def add_stepper(
        self,
        step: Callable[[float], Step],
        /,
        *,
        key: Hashable,
        urgency: float = 0.0,
        importance: float = 0.0,
        max_steps: int | None = None,
    ) -> Future:
        """Queue a long task that yields: ``step(budget) -> Step(done, feedback, cost)``, called until it is done.

        Each turn calls `step` once with the budget that it may spend: 1.0, or what is left of run()'s budget if that is
        less. Service is counted by the costs that come back. In other processes `step` is pickled for every turn, so it
        must keep its state elsewhere.

        Parameters
        ----------
        step : callable
            From the budget to a Step.
        key : hashable
            By which the task is addressed.
        urgency, importance : float
            As of :meth:`submit`.
        max_steps : int, optional
            The task counts as done after so many.

        Returns
        -------
        Future
            Of the last Step.
        """
        check_callable("Scheduler.add_stepper", "step", step)
        if key is None:
            raise TypeError("Scheduler.add_stepper: key is None, expected a hashable")
        if max_steps is not None:
            check_count("Scheduler.add_stepper", "max_steps", max_steps, 1)
        limit = math.inf if max_steps is None else max_steps
        return self._add("Scheduler.add_stepper", step, (), None, urgency, importance, key, None, None, limit)

    def update(
        self,
        key: Hashable,
        *,
        urgency: float | None = None,
        importance: float | None = None,
        feedback: float | None = None,
    ) -> None:
        """Change the priority of a task that is not done; `feedback` moves the urgency by the moving average.

        Parameters
        ----------
        key : hashable
            The key, or the task's Future.
        urgency, importance : float, optional
            The new values.
        feedback : float, optional
            ``urgency += ema * (feedback - urgency)``.

        Raises
        ------
        KeyError
            There is no such task, or it is done.
        ValueError
            A number is not finite, or the new score; nothing is changed then.
        """
        if urgency is not None and type(urgency) is not float:  # whether a float is finite comes out below
            check_finite("Scheduler.update", "urgency", urgency)
        if importance is not None and type(importance) is not float:
            check_finite("Scheduler.update", "importance", importance)
        if feedback is not None:
            check_finite("Scheduler.update", "feedback", feedback)
        task = self._lookup("Scheduler.update", key)
        if task is None:
            raise KeyError(f"Scheduler.update: {text_of(key)} is no task, or is done")
        is_finite = True
        with self._engine.lock("Scheduler.update"), self._ledger:
            # Else it is over at this moment, and its Future is about to say so. The slot first: it is in the cache.
            if task.slot >= 0 or task.finished is None:
                new_urgency = task.urgency if urgency is None else float(urgency)
                new_importance = task.importance if importance is None else float(importance)
                if feedback is not None:
                    new_urgency = self._ledger.fed_back(new_urgency, feedback)
                is_finite = math.isfinite(new_urgency + new_importance)
                if is_finite:
                    task.urgency, task.importance = new_urgency, new_importance
                    if task.slot >= 0:
                        self._ledger.backlog.update(task)
        if not is_finite:  # raised out here: an error in there breaks the section off
            check_priority("Scheduler.update", new_urgency, new_importance)

    def rescore(self, state: ArrayLike | None = None) -> None:
        """Compute the attention of all waiting tasks anew and re-key them in one batch.

        Parameters
        ----------
        state : array, optional
            The scorer's new focus, for an AttentionScorer.

        Raises
        ------
        TypeError
            The scheduler has no scorer, or `state` is given and the scorer is no AttentionScorer.
        """
        with self._engine.lock("Scheduler.rescore"), self._ledger:
            self._scorer.focus("Scheduler.rescore", state)
            features = self._ledger.backlog.features()
            if features is not None:
                self._ledger.backlog.update_all(self._scorer.of_many(features))

    def distribution(self) -> dict[Hashable, float]:
        """Give the share of each waiting task, in order of arrival: floor/n + (1 - floor) * softmax; they sum to 1.

        With "strict" these are the softmax's shares all the same, though dispatch does not follow them.
        """
        keys, shares = self._shares("Scheduler.distribution")
        return dict(zip(keys, shares.tolist(), strict=True))

    def allocate(self, budget: float, *, integer: bool = True) -> dict[Hashable, Any]:
        """Divide a budget among the waiting tasks in proportion to :meth:`distribution`.

        Parameters
        ----------
        budget : int, or with ``integer=False`` float
            Above 0.
        integer : bool
            Whole shares that sum to the budget exactly, by largest remainder.

        Raises
        ------
        ValueError
            The budget is not positive and finite, or not whole where it must be.
        """
        check_range("Scheduler.allocate", "budget", budget, above=0.0)
        if integer and budget != int(budget):
            raise ValueError(f"Scheduler.allocate: budget is {budget}, expected a whole number, or integer=False")
        keys, shares = self._shares("Scheduler.allocate")
        if not keys:
            return {}
        parts: list[Any] = largest_remainder(int(budget), shares) if integer else (shares * budget).tolist()
        return dict(zip(keys, parts, strict=True))

    def cancel(self, key: Hashable) -> bool:
        """Cancel a waiting task, or a stepper, by its key or Future; return whether it is cancelled.

        A submitted callable that has started is not. A stepper in a step is cancelled when the step is over.
        """
        task = self._lookup("Scheduler.cancel", key)
        return task is not None and self._engine.cancel(task)

    def replay(self, decisions: Iterable[Decision]) -> None:
        """Make the next run decide as it is written in a decision log, and by the policy when that is at its end.

        Every task of the log must be there when its turn comes, unless it was cancelled or its deadline passed.
        """
        log = []
        for i, decision in enumerate(decisions):
            try:
                log.append(Decision(*decision))
            except TypeError:
                raise TypeError(
                    f"Scheduler.replay: decisions[{i}] is {text_of(decision)}, expected a Decision(time, key, rotation)"
                ) from None
        with self._engine.lock("Scheduler.replay"), self._ledger:
            self._ledger.replay.clear()
            self._ledger.replay.extend(log)

    def run(
        self,
        *,
        budget: float | None = None,
        timeout: float | None = None,
        on_error: Literal["collect", "raise"] = "collect",
        retries: int = 0,
        progress: bool = False,
    ) -> Report:
        """Run tasks until none is left, the budget is spent or the time is over, and report.

        What has been started is awaited in every case; what has not stays in the scheduler for another run.

        Parameters
        ----------
        budget : float, optional
            Service to be spent: 1 for a callable, a Step's cost for a stepper's turn.
        timeout : float, optional
            Seconds after which nothing is started any more.
        on_error : {"collect", "raise"}
            "collect": a task's exception goes to its Future and the report; "raise": the first one also ends the run.
        retries : int
            How often a task that raised, or whose worker died, is run again before its exception counts. When a pool of
            processes breaks, those in flight are run one at a time, so that only the one that breaks it is charged.
        progress : bool
            Show a bar (tqdm where installed).

        Raises
        ------
        RuntimeError
            The scheduler runs already, was shut down, or its executor was; no task is lost.
        KeyboardInterrupt
            After tasks that were started are done; a second Ctrl-C does not wait for them.
        ValueError
            The budget is not positive, a replayed log names a task that is not there, ...
        """
        if budget is not None:
            check_range("Scheduler.run", "budget", budget, above=0.0)
        if timeout is not None:
            check_range("Scheduler.run", "timeout", timeout, 0.0)
        check_count("Scheduler.run", "retries", retries, 0)
        if on_error not in ("collect", "raise"):
            raise ValueError(f"Scheduler.run: on_error is {on_error!r}, expected 'collect' or 'raise'")
        began = 0.0

        def opened(width: int) -> None:
            nonlocal began
            began = self._engine.clock.now()
            service = math.inf if budget is None else float(budget)
            until = math.inf if timeout is None else began + timeout
            self._ledger.open(width, retries, raises=on_error == "raise", budget=service, until=until)

        with Progress(progress, self._ledger.counts) as bar:
            show = bar.show if progress else None
            self._engine.run(self._max_in_flight, opened, show)
        now = self._engine.clock.now()
        with self._engine.lock("Scheduler.run"), self._ledger:
            report = self._ledger.report(began, now)
            self._ledger.remember(None)
        return report

    def start(self, *, retries: int = 0) -> Scheduler:
        """Run tasks in the background from now on, as they are submitted, until :meth:`shutdown`."""
        check_count("Scheduler.start", "retries", retries, 0)

        def opened(width: int) -> None:
            self._ledger.remember(_BACKGROUND_HISTORY)
            self._ledger.open(width, retries, raises=False)

        self._engine.start(self._max_in_flight, opened)
        return self

    def report(self) -> Report:
        """Report on what waits, and in the background on the latest 10,000 tasks.

        :meth:`run` returns its own report and forgets what is in it, for it may be a million rows. One that ends with
        an error, or with Ctrl-C, returns none: what it did is reported on here, and by the next run.
        """
        now = self._engine.clock.now()
        with self._engine.lock("Scheduler.report"), self._ledger:
            return self._ledger.report(None, now)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks. Those that wait are still run by whatever runs, and cancelled when nothing does.

        A scheduler that runs in the background when the interpreter ends is shut down in this way, and awaited.

        Parameters
        ----------
        wait : bool
            Return when all is done and no thread of the scheduler is left; in a task or a callback, which would wait
            for itself, return at once.
        cancel_futures : bool
            Cancel the tasks that wait.
        """
        self._engine.shut_down(wait=wait, cancel=cancel_futures)

    def __repr__(self) -> str:
        """Say how many tasks there are, and whether it runs; takes no lock."""
        state = self._engine.refusal or ("running" if self._engine.is_running() else "not running")
        unfinished, in_flight = len(self._ledger.tasks), self._ledger.in_flight
        return f"<Scheduler: {self._policy}, {unfinished - in_flight} waiting, {in_flight} in flight, {state}>"

    def __enter__(self) -> Scheduler:
        """Start in the background."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shut down when all tasks are done; after an exception those that wait are cancelled."""
        self.shutdown(wait=True, cancel_futures=kind is not None)

    def _add(
        self,
        function: str,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        urgency: float,
        importance: float,
        key: Hashable,
        features: ArrayLike | None,
        deadline: float | None,
        max_steps: float,
    ) -> Future:
        if not (type(urgency) is type(importance) is float and math.isfinite(urgency + importance)):  # most are
            check_priority(function, urgency, importance)
        row = None if features is None else self._scorer.row(function, features)
        engine, tasks = self._engine, self._ledger.tasks
        if key is None:
            key = next(made for made in map("task-{}".format, self._made_up) if made not in tasks)
        now = engine.clock.now()
        task = Task(key, fn, args, kwargs, float(urgency), float(importance), now)
        task.future = future = Future(engine, task)
        task.max_steps = max_steps
        task.features = row
        task.deadline = None if deadline is None else now + deadline
        if engine.refusal:
            raise RuntimeError(f"{function}: {engine.refusal}")
        try:
            found = tasks.setdefault(key, task)
        except TypeError:
            check_hashable(function, key)
            raise
        if found is not task:
            raise ValueError(f"{function}: key {text_of(key)} is that of an unfinished task, expected a new one")
        try:
            engine.arrive(task)
        except BaseException:  # Ctrl-C: the caller will never see the Future
            engine.cancel(task)
            raise
        if engine.refusal and engine.cancel(task):  # at the same time
            raise RuntimeError(f"{function}: {engine.refusal}")
        return future

    def _lookup(self, function: str, key: Hashable) -> Task | None:
        if isinstance(key, Future):
            return key._task if key._engine is self._engine else None
        try:
            return self._ledger.tasks.get(key)
        except TypeError:
            check_hashable(function, key)
            raise

    def _shares(self, function: str) -> tuple[list[Hashable], Floats]:
        with self._engine.lock(function), self._ledger:
            keys = [task.key for task in self._ledger.backlog]
            scores = self._ledger.backlog.scores()
            temperature = self._ledger.backlog.solve()
        if not keys:
            return keys, scores
        return keys, with_floor(softmax(scores, temperature), 0.0 if self._policy == "strict" else self._floor)
