"""Dispatch: has tasks run by an executor, takes back what they did, and resolves their Futures.

Whoever drives it calls :meth:`Dispatch.go_round` again and again: that settles what came back, lets deadlines expire,
and hands out what there is room for. A pool of threads is not given tasks but runners: a runner takes a task from the
ledger, runs it, settles it, takes the next, so that tasks cost no trip through the pool's queue and a priority counts
until the very start.

All state is in the ledger. It is read and changed in sections, ``with dispatch.mutex, ledger:``, in which no code of
users is called that can be called elsewhere: not the executor, not callbacks. What cannot be helped (a scorer, a clock,
a key's ``__eq__``, a destructor that the garbage collector calls) may raise, which breaks the section off and makes
the next one mend the ledger; and it may call the scheduler, which then neither waits for itself nor sees a state that
is half changed: :meth:`Dispatch.lock` refuses, and a cancellation is put off to the next section. Ctrl-C, which Python
raises in the main thread wherever that stands, is one more way to break a section off. The mutex is CPython's own
RLock, whose ``with`` has no gap between taking it and being bound to give it back.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from foveal._scheduler.bell import Bell
from foveal._scheduler.clock import Clock
from foveal._scheduler.executors import ExecutorHandle
from foveal._scheduler.future import Task, as_step
from foveal._scheduler.ledger import Ledger
from foveal._scheduler.returns import Return, Runner, Verdict
from foveal._scheduler.waits import Seen, can_go_on

_SLICE = 0.005  # seconds after which a runner lets others have the pool's thread
_LOG = logging.getLogger("foveal.scheduler")


class Dispatch:
    """Hands the tasks of a ledger to an executor; see the module."""

    def __init__(self, ledger: Ledger, executor: ExecutorHandle, clock: Clock) -> None:
        self.mutex = threading.RLock()
        self.wake = Bell()
        """News for the driver."""
        self.error: BaseException | None = None
        """Of the scheduler itself: a clock that raises, a stderr that is broken."""
        self.has_given_up = False
        """Whether tasks and callbacks that are under way are not waited for any more."""
        self._ledger = ledger
        self._executor = executor
        self._clock = clock
        self._runs_in_pool = False
        self._width = 1
        self._runners: set[Runner] = set()  # with the pool, running or not yet
        self._returned: deque[Return] = deque()
        # Our threads that are resolving Futures, with those of which tasks.
        self._resolvers: list[tuple[int, Sequence[Task]]] = []
        # Users' threads that do, each with a lock that it holds meanwhile: whatever ends it, the lock is let go of.
        self._guests: list[tuple[int, threading.Lock]] = []

    def after_fork(self) -> None:
        """Have locks of one's own, in a child where the threads that held them are not."""
        self.mutex, self.wake = threading.RLock(), Bell()
        self._resolvers, self._guests = [], []
        self._ledger.is_whole = False

    def lock(self, function: str) -> AbstractContextManager[Any]:
        """Give the mutex, for a section; refuses to those whom the scheduler has called in one."""
        if self.mutex._is_owned():  # type: ignore[attr-defined]  # is_in_section, without another call
            raise RuntimeError(
                f"{function}: called by a scorer, a clock, a key or a destructor in the middle of a step of the "
                "scheduler, expected a call from outside"
            )
        return self.mutex

    def is_in_section(self) -> bool:
        """Say whether this thread is in a section."""
        return bool(self.mutex._is_owned())  # type: ignore[attr-defined]  # as threading.Condition asks it

    def open(self, executor: ExecutorHandle, width: int, runs_in_pool: bool) -> None:
        """Be ready to hand out so many tasks at once. In a section."""
        self._executor, self._width, self._runs_in_pool = executor, width, runs_in_pool
        self.error, self.has_given_up = None, False
        while self._returned:  # runners whom the pool refused when the last run was over: nothing is in flight
            one = self._returned.popleft()
            if isinstance(one.what, Runner):
                self._runners.discard(one.what)

    def fail(self, error: BaseException) -> None:
        """Hand out nothing more, since something is wrong with the scheduler itself. In a section."""
        self.error = self.error or error
        self._ledger.close()

    def give_up(self, error: BaseException) -> None:
        """Wait no more for what is in flight; what comes back later is not looked at. In a section."""
        self.has_given_up = True
        self._runners.clear()
        self._ledger.give_up(error, self._clock.latest)

    def tick(self) -> float:
        """Read the clock on nobody's behalf: if that fails the run does. In a section."""
        try:
            return self._clock.now()
        except BaseException as error:
            self.fail(error)
            return self._clock.latest

    def arrive(self, task: Task) -> None:
        """Take in a new task, which is in the ledger's `tasks` already. Not in a section.

        Those who submit only append to the arrivals, and do not wait for the mutex: in Python a thread that gets a
        contended lock has still to wait for the interpreter's, holding up everybody: 20,000 tasks from 8 threads took
        thrice as long.
        """
        self._ledger.arrivals.append(task)
        # Who is busy looks at the arrivals when it is done, or wakes the driver, so this need not.
        busy = len(self._runners) if self._runs_in_pool else self._ledger.in_flight
        if busy < self._width or task.deadline is not None:
            self.wake.ring()

    def cancel(self, task: Task) -> bool:
        """Cancel a task that waits, or a stepper when its step is over; say whether it is, or will be.

        Ctrl-C may come at any time: what this has not done then, the driver or the next call does.
        """
        if self.is_in_section():
            self._ledger.put_off.append((task, self._clock.latest))
            self.wake.ring()
            return task.finished is None and task.status == "waiting"
        now = self._clock.now()
        over: deque[Task] = deque()
        busy = threading.Lock()
        try:
            with busy:
                with self.mutex, self._ledger:
                    self._guests = [guest for guest in self._guests if guest[1].locked()]
                    self._guests.append((threading.get_ident(), busy))
                    cancelled = self._ledger.cancel(task, now)
                    over, self._ledger.over = self._ledger.over, over
                self._ledger.free_keys(over)
                while over:
                    over[0].resolve()
                    over.popleft()
        finally:
            if over:
                with self.mutex, self._ledger:
                    self._ledger.over.extend(task for task in over if not task.is_resolved())
            self.wake.ring()
        return cancelled

    def is_idle(self) -> bool:
        """Say whether nothing is in flight, or on its way back. In a section."""
        ledger = self._ledger
        if self.has_given_up:
            return not ledger.over
        return not (
            ledger.in_flight
            or self._returned
            or ledger.over
            or self._resolvers
            or any(busy.locked() for _, busy in self._guests)
        )

    def waits_for_this_thread(self) -> bool:
        """Say whether this thread is one that has to come to an end before all is done."""
        me = threading.get_ident()
        return (
            any(thread == me for thread, _ in self._resolvers)
            or any(guest == me and busy.locked() for guest, busy in self._guests)
            or self._executor.runs_in(threading.current_thread())
        )

    def can_end(self, task: Task, driver: int | None, seen: Seen) -> bool:
        """Say whether a task can end while the threads in `seen` wait for it; not in a section."""
        if task.finished is not None:
            resolvers = [thread for thread, over in list(self._resolvers) if task in over]
            return all(can_go_on(thread, seen) for thread in (*resolvers,) or (driver,))
        if task.status != "running" and task.deadline is not None and not task.steps:
            return True  # it expires
        runners = list(self._runners)
        if self._runs_in_pool:
            for runner in runners:
                if runner.task is task:
                    return can_go_on(runner.thread, seen)
            if any(runner.thread is not None and can_go_on(runner.thread, seen) for runner in runners):
                return True
            is_to_come = len(runners) < self._width or any(runner.thread is None for runner in runners)
            return is_to_come and self._accepts() and can_go_on(driver, seen) and self._executor.has_free_thread(seen)
        has_slot = task.status != "running" and self._accepts() and self._ledger.in_flight < self._width
        return can_go_on(driver, seen) and (has_slot or self._executor.has_free_thread(seen))

    def _accepts(self) -> bool:
        return self._ledger.accepts(self._clock.latest)

    def go_round(self) -> None:
        """Settle what came back, let deadlines expire, hand out what there is room for."""
        ledger = self._ledger
        while True:
            returned = self._collect()
            with self.mutex, ledger:
                if not (returned or ledger.over or ledger.has_room() or ledger.next_deadline() < math.inf):
                    return  # without a look at the clock: an injected one is read as often from run to run
                now = self._clock.latest
                if returned or not self._runs_in_pool or ledger.next_deadline() < math.inf:
                    now = self.tick()
                    for one in returned:  # nothing is let go of in here: it may have destructors
                        self._take_back(one, now)
                    ledger.expire(now)
                over = self._take_over()
            self._resolve(over)  # before the next decision, in which callbacks may want to have a say
            launched: list[Task] = []
            runners: list[Runner] = []
            try:
                with self.mutex, ledger:
                    self._has_resolved(over)
                    if self._runs_in_pool:
                        wanted = min(self._width, ledger.room() + ledger.in_flight) - len(self._runners)
                        runners = [Runner() for _ in range(wanted)]
                        self._runners.update(runners)
                    else:
                        while (task := ledger.take(now)) is not None:
                            launched.append(task)
            finally:  # what was taken is on its way, whatever else goes wrong
                for task in launched:
                    task.future._set_running(task)
                    assert task.fn is not None
                    self._submit(task, task.fn, task.arguments(), task.kwargs or {})
            for runner in runners:
                self._submit(runner, self._run, (runner,), {})
            if not (launched or over or self._returned):
                return

    def settle_over(self) -> None:
        """Resolve the Futures of what is over. Not in a section."""
        with self.mutex, self._ledger:
            over = self._take_over()
        self._resolve(over)
        with self.mutex, self._ledger:
            self._has_resolved(over)

    # To the executor and back.

    def _submit(
        self, what: Task | Runner, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        executor = None
        try:
            executor = self._executor.get()
            inner = executor.submit(fn, *args, **kwargs)
        except BaseException as error:
            self._come_back(Return(what, executor, None, error))
            return
        if not isinstance(inner, concurrent.futures.Future):
            self._come_back(Return.of_nonsense(what, executor, inner))
            return
        if isinstance(what, Task):
            self._executor.has_taken = True
        inner.add_done_callback(lambda inner: self._on_return(Return(what, executor, inner)))

    def _on_return(self, one: Return) -> None:
        assert one.result is not None
        if isinstance(one.what, Runner) and not one.result.cancelled() and one.result.exception() is None:
            return  # a runner that has run takes leave itself
        self._come_back(one)

    def _come_back(self, one: Return) -> None:
        self._returned.append(one)
        self.wake.ring()

    def _collect(self) -> list[Return]:
        """Collect what came back, and find out what it says. Not in a section."""
        returned = []
        while self._returned:
            returned.append(one := self._returned.popleft())
            try:
                one.judge(self._executor)
            except BaseException as error:  # from an executor that cannot even be replaced: its end
                one.error = one.error or error
        return returned

    def _take_back(self, one: Return, now: float) -> None:
        """Tell the ledger what has become of a turn. In a section."""
        task = one.what if isinstance(one.what, Task) else None
        if isinstance(one.what, Runner):
            self._runners.discard(one.what)
        try:
            if one.verdict is Verdict.END:  # what was not started waits for another run
                failure = RuntimeError(f"Scheduler: the executor takes no tasks ({one.error}); none is lost")
                failure.__cause__ = one.error
                self._ledger.close(failure)
            if task is None or task.finished is not None:  # given up in the meantime
                return
            if one.verdict is Verdict.NONSENSE:
                assert one.error is not None
                self._ledger.close(one.error)
                self._ledger.abandon(task, one.error, now)
            elif one.is_refused and one.verdict is not Verdict.OVER:
                self._ledger.put_back(task)
            elif one.verdict in (Verdict.BREAK, Verdict.FIRST_OF_BREAK):
                assert one.error is not None
                was_only_one = one.verdict is Verdict.FIRST_OF_BREAK and self._ledger.in_flight == 1
                self._ledger.settle_broken(task, one.error, now, was_only_one=was_only_one)
            else:
                self._ledger.settle(task, one.value, one.error, now)
        except BaseException as error:
            self._give_up(task, error)

    def _give_up(self, task: Task | None, error: BaseException) -> None:
        """Lose nothing, and let nobody wait for ever, after an error that nothing is known to raise. In a section."""
        self.fail(error)
        if task is not None and task.status == "running":
            self._ledger.abandon(task, error, self._clock.latest)

    # Runners.

    def _run(self, runner: Runner) -> None:
        """Be a runner."""
        self._executor.has_taken = True
        runner.thread = threading.get_ident()
        try:
            self._run_tasks(runner)
        except BaseException as error:
            with self.mutex, self._ledger:
                self._runners.discard(runner)
                self._give_up(runner.task, error)
            self.wake.ring()

    def _run_tasks(self, runner: Runner) -> None:
        # An injected clock is read as often from run to run, so there are no slices with it.
        until = time.monotonic() + _SLICE if self._clock.is_ours else math.inf
        ledger = self._ledger
        task: Task | None = None
        value, error = None, None
        while True:
            with self.mutex, ledger:
                if runner not in self._runners:
                    return  # given up in the meantime; or a pool that refused it has run it all the same
                now = self.tick() if task is not None or ledger.has_room() else self._clock.latest
                if task is not None:
                    ledger.settle(task, value, error, now)
                    runner.task = None  # who knows who runs it next
                ledger.expire(now)
                over = self._take_over()
            value = error = None  # not to be held by this frame, which the frames of the error hold
            self._resolve(over)  # before the next decision, in which callbacks may want to have a say
            is_late = time.monotonic() > until
            with self.mutex, ledger:
                self._has_resolved(over)
                runner.task = task = None if is_late else ledger.take(now)
                goes_on = is_late and ledger.has_room()
                if task is None and not goes_on:
                    self._runners.discard(runner)
            if goes_on:  # behind what others have submitted to the pool
                self._submit(runner, self._run, (runner,), {})
                return
            if task is None:
                self.wake.ring()
                return
            task.future._set_running(task)
            try:
                assert task.fn is not None
                value = task.fn(*task.arguments(), **(task.kwargs or {}))
                if task.max_steps:
                    value = as_step(task.key, value)
            except BaseException as raised:
                # Without this frame in its traceback, which would keep the error, and all that its frames hold, alive.
                error = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)

    # Futures.

    def _take_over(self) -> Sequence[Task]:
        """Take over the tasks whose Futures are to be resolved. In a section."""
        over = self._ledger.over
        if not over:
            return ()
        self._ledger.over = deque()
        self._resolvers.append((threading.get_ident(), over))
        return over

    def _resolve(self, over: Sequence[Task]) -> None:
        """Resolve Futures, which calls their callbacks, in a thread of the scheduler's. Not in a section."""
        self._ledger.free_keys(over)
        for task in over:
            try:
                task.resolve()
            except BaseException:  # from a callback; of an Exception concurrent.futures itself thinks the same
                with contextlib.suppress(BaseException):  # from a handler of the log
                    _LOG.exception("exception calling callback for %r", task.key)

    def _has_resolved(self, over: Sequence[Task]) -> None:
        """End what _take_over began. In a section."""
        if over:
            self._resolvers = [entry for entry in self._resolvers if entry[1] is not over]
