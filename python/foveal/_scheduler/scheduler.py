"""What users call: the Scheduler, which checks what it is given and leaves the rest to the ledger and the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Executor
from types import TracebackType
from typing import Any, Literal, NoReturn, SupportsIndex

from numpy.typing import ArrayLike

from foveal._scheduler.backlog import Backlog
from foveal._scheduler.checks import (
    check_callable,
    check_count,
    check_executor,
    check_priority,
    check_range,
    check_score,
    check_synchronous,
    text_of,
)
from foveal._scheduler.engine import Engine
from foveal._scheduler.executors import ExecutorHandle
from foveal._scheduler.future import Future, Step
from foveal._scheduler.ledger import Ledger
from foveal._scheduler.progress import Progress
from foveal._scheduler.register import Register
from foveal._scheduler.report import Decision, Report
from foveal._scheduler.scorer import AttentionScorer, ScorerHandle
from foveal._scheduler.shares import Policy, largest_remainder
from foveal._scheduler.views import report_of, shares_of

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
        check_executor("Scheduler", executor)
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
        temperature = 1.0 if temperature is None else temperature
        check_range("Scheduler", "temperature", temperature, above=0.0)
        check_range("Scheduler", "floor", floor, 0.0, 1.0)
        check_range("Scheduler", "ema", ema, 0.0, 1.0)
        check_range("Scheduler", "aging", aging, 0.0)
        if breadth is not None:
            check_range("Scheduler", "breadth", breadth, 1.0)
        self._policy = policy
        self._least = 0.0 if policy == "strict" else floor  # of the service that goes round
        self._max_in_flight = max_in_flight
        backlog = Backlog(policy, floor, temperature, breadth, aging, seed)
        handle = ScorerHandle(scorer)
        self._ledger = Ledger(backlog, handle, ema)
        self._engine = Engine(self._ledger, ExecutorHandle(executor), clock)
        self._register = Register(self._engine, self._ledger, handle)

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
            `fn` is not callable, or is asynchronous; the key is not hashable; `features` without a scorer.
        RuntimeError
            The scheduler was shut down.
        """
        check_callable("Scheduler.submit", "fn", fn)
        check_synchronous("Scheduler.submit", "fn", fn)
        if deadline is not None:
            check_range("Scheduler.submit", "deadline", deadline, 0.0)
        return self._register.add(
            "Scheduler.submit", fn, args, kw or None, urgency, importance, key, features, deadline, 0
        )

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
        check_synchronous("Scheduler.add_stepper", "step", step)
        if key is None:
            raise TypeError("Scheduler.add_stepper: key is None, expected a hashable")
        if max_steps is not None:
            check_count("Scheduler.add_stepper", "max_steps", max_steps, 1)
        limit = math.inf if max_steps is None else max_steps
        return self._register.add("Scheduler.add_stepper", step, (), None, urgency, importance, key, None, None, limit)

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
            check_score("Scheduler.update", "urgency", urgency)
            urgency = float(urgency)
        if importance is not None and type(importance) is not float:
            check_score("Scheduler.update", "importance", importance)
            importance = float(importance)
        if feedback is not None:
            check_score("Scheduler.update", "feedback", feedback)
            feedback = float(feedback)
        task = self._register.find("Scheduler.update", key)
        if task is None:
            raise KeyError(f"Scheduler.update: {text_of(key)} is no task, or is done")
        is_finite = True
        with self._engine.lock("Scheduler.update"), self._ledger:
            # Else it is over at this moment, and its Future is about to say so. The slot first: it is in the cache.
            if task.slot >= 0 or task.finished is None:
                new_urgency = task.urgency if urgency is None else urgency
                new_importance = task.importance if importance is None else importance
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
        Exception
            What the scorer raises, and ValueError when it gives no finite score for each; nothing is changed then.
        """
        with self._engine.lock("Scheduler.rescore"), self._ledger:
            self._ledger.rescore("Scheduler.rescore", state)

    def distribution(self) -> dict[Hashable, float]:
        """Give the share of each waiting task, in order of arrival: floor/n + (1 - floor) * softmax; they sum to 1.

        With "strict" these are the softmax's shares all the same, though dispatch does not follow them.
        """
        keys, shares = shares_of("Scheduler.distribution", self._engine, self._ledger, self._least)
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
        keys, shares = shares_of("Scheduler.allocate", self._engine, self._ledger, self._least)
        if not keys:
            return {}
        parts: list[Any] = largest_remainder(int(budget), shares) if integer else (shares * budget).tolist()
        return dict(zip(keys, parts, strict=True))

    def cancel(self, key: Hashable) -> bool:
        """Cancel a waiting task, or a stepper, by its key or Future; return whether it is cancelled.

        A submitted callable that has started is not. A stepper in a step is cancelled when the step is over.
        """
        task = self._register.find("Scheduler.cancel", key)
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
            self._ledger.follow(log)

    def run(
        self,
        *,
        budget: float | None = None,
        timeout: float | None = None,
        on_error: Literal["collect", "raise"] = "collect",
        retries: int = 0,
        progress: bool = False,
        executor: Executor | Callable[[], Executor] | None = None,
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
            How often a task that raised, or whose worker died, is run again before its exception counts; for a stepper
            the count begins anew after each good step. When a pool of processes breaks, those in flight are run one at
            a time, so that only the one that breaks it is charged.
        progress : bool
            Show a bar (tqdm where installed).
        executor : concurrent.futures.Executor, or callable that makes one, optional
            Takes the place of the scheduler's executor from now on: for one that was shut down, or whose client was
            closed, with tasks left.

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
        check_executor("Scheduler.run", executor)
        handle = None if executor is None else ExecutorHandle(executor)
        service = math.inf if budget is None else float(budget)
        began = self._engine.clock.now()
        until = math.inf if timeout is None else began + timeout

        def opened(width: int) -> None:
            self._ledger.open(width, retries, raises=on_error == "raise", budget=service, until=until)

        with Progress(progress, self._ledger.counts) as bar:
            show = bar.show if progress else None
            self._engine.run(handle, self._max_in_flight, opened, show)
        report = report_of("Scheduler.run", self._engine, self._ledger, began)
        with self._engine.lock("Scheduler.run"), self._ledger:
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
        an error, or with Ctrl-C, returns none: what it did is reported on here, and by the next run. The rows are those
        of the tasks that there were at the call; each row is true of one moment, not all of the same: nobody waits for
        the report.
        """
        return report_of("Scheduler.report", self._engine, self._ledger, None)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False, timeout: float | None = None) -> None:
        """Take no more tasks. Those that wait are still run by whatever runs, and cancelled when nothing does.

        A scheduler that runs in the background when the interpreter ends is shut down in this way, and awaited.

        Parameters
        ----------
        wait : bool
            Return when all is done and no thread of the scheduler is left; in a task or a callback, which would wait
            for itself, return at once. False: return at once, and let the end of the interpreter not wait either for an
            executor that is no pool of threads or processes: what is then in flight is given up, what waits cancelled.
        cancel_futures : bool
            Cancel the tasks that wait.
        timeout : float, optional
            Seconds after which to give up what is in flight, and may never come back: its Futures get a RuntimeError,
            those that wait are cancelled. A thread that runs a task cannot be stopped, and goes on.

        Raises
        ------
        ValueError
            `timeout` is negative, or given with ``wait=False``.
        """
        if timeout is not None:
            check_range("Scheduler.shutdown", "timeout", timeout, 0.0)
            if not wait:
                raise ValueError("Scheduler.shutdown: timeout is given with wait=False, expected one of them")
        self._engine.shut_down(wait=wait, cancel=cancel_futures, timeout=math.inf if timeout is None else timeout)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled: two schedulers cannot own the same tasks, threads and locks."""
        raise TypeError(
            "Scheduler: cannot be copied or pickled, expected a new Scheduler, which is given tasks of its own"
        )

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
