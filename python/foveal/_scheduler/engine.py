"""The engine: has tasks run by an executor, takes back what they did, and resolves their Futures.

A thread of its own, the driver, goes round: it settles what came back, lets deadlines expire, and hands out what there
is room for. A pool of threads is not given tasks but runners: a runner takes a task from the ledger, runs it, settles
it, takes the next, so that tasks cost no trip through the pool's queue and a priority counts until the very start.
Users' threads do none of this: Ctrl-C, which Python raises in the main thread wherever that stands, does not hit it.

All state is in the ledger, under one mutex, which is held neither while the executor is called nor while a Future is
resolved: both run the code of others.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor
from typing import Any, NamedTuple

from foveal._scheduler.executors import ExecutorHandle
from foveal._scheduler.future import Task
from foveal._scheduler.ledger import Ledger

_ANOTHER_LOOK = 0.1  # seconds between looks at a clock that is not ours, and between pictures of progress
_SLICE = 0.005  # seconds after which a runner lets others have the pool's thread
_NAME = "foveal-scheduler"
_REFUSALS = (RuntimeError, concurrent.futures.CancelledError)  # what an executor that was shut down raises
_LOG = logging.getLogger("foveal.scheduler")


class _Return(NamedTuple):
    """What came back from an executor."""

    task: Task | None
    """None: a runner, which has taken no task."""
    executor: Executor | None
    """Where it was; None: no executor was to be had."""
    result: concurrent.futures.Future[Any]
    refusal: BaseException | None
    """Why the executor did not take it."""


class _Mutex:
    """A lock whose holder finds all arrivals in the ledger.

    Those who submit only append to the arrivals, and do not wait for the lock: in Python a thread that gets a contended
    lock has still to wait for the interpreter's, holding up everybody: 20,000 tasks from 8 threads took thrice as long.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._lock = threading.Lock()
        self._ledger = ledger

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._ledger.arrivals:
            try:
                self._ledger.absorb()
            except BaseException:  # a scorer that raises, Ctrl-C: __exit__ will not be called
                self._lock.release()
                raise

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Engine:
    """Runs the tasks of a ledger; see the module."""

    def __init__(self, ledger: Ledger, executor: ExecutorHandle, clock: Callable[[], float] | None) -> None:
        self.mutex = _Mutex(ledger)
        self.ledger = ledger
        self.is_shut_down = False
        self._executor = executor
        self._runs_in_pool = False
        self._runners = 0  # with the pool, running or not yet
        self._width = 1
        self._clock = clock or time.monotonic
        self._own_clock = clock is None
        self._latest = -math.inf
        self._driver: threading.Thread | None = None
        self._returned: deque[_Return] = deque()
        self._unresolved = 0  # tasks that are over and whose Futures are being resolved
        self._wake = threading.Event()
        self._ended = threading.Event()  # the driver has
        self._error: BaseException | None = None  # of the driver itself: a clock that raises, a broken stderr

    def now(self) -> float:
        """Read the clock; one that runs backwards is taken to stand still."""
        self._latest = max(self._latest, self._clock())
        return self._latest

    def _tick(self) -> float:
        """Read the clock on nobody's behalf: if that fails the run does. The mutex is held."""
        try:
            return self.now()
        except BaseException as error:
            self._error = self._error or error
            self.ledger.close()
            return self._latest

    def is_running(self) -> bool:
        """Say whether tasks are being handed out, or will be."""
        return self._driver is not None

    def arrive(self, task: Task) -> None:
        """Take in a new task, which is in the ledger's `tasks` already. The mutex need not be held."""
        self.ledger.arrivals.append(task)
        # Who is busy looks at the arrivals when it is done, or wakes the driver, so this need not.
        busy = self._runners if self._runs_in_pool else self.ledger.in_flight
        if (busy < self._width or task.deadline is not None) and not self._wake.is_set():
            self._wake.set()

    def start(
        self,
        method: str,
        max_in_flight: int | None,
        opened: Callable[[int], None],
        show: Callable[[], None] | None = None,
        *,
        forever: bool,
    ) -> threading.Thread:
        """Begin to run tasks in a thread: until the ledger is exhausted, or for ever, until it is shut down.

        `opened` is called with the number of tasks that may be in flight, the mutex held, and opens the ledger; `show`
        shows the progress.
        """
        width, runs_in_pool = max_in_flight or self._executor.width(), self._executor.is_pool_of_threads()
        driver = threading.Thread(target=self._drive, args=(forever, show), name=_NAME, daemon=True)
        with self.mutex:
            if self.is_shut_down:
                raise RuntimeError(f"Scheduler.{method}: the scheduler was shut down")
            if self._driver is not None:
                raise RuntimeError(f"Scheduler.{method}: the scheduler runs already")
            self._width, self._runs_in_pool, self._error = width, runs_in_pool, None
            opened(width)
            self._driver = driver
            self._ended.clear()
        driver.start()
        return driver

    def run(self, max_in_flight: int | None, opened: Callable[[int], None], show: Callable[[], None] | None) -> None:
        """Run all tasks, wait for the end; on Ctrl-C hand out nothing more and wait for what is in flight."""
        has_begun = False

        def opened_here(width: int) -> None:
            nonlocal has_begun
            opened(width)
            has_begun = True

        try:
            self._wait_for(self.start("run", max_in_flight, opened_here, show, forever=False))
        except BaseException:
            driver = self._driver  # Ctrl-C may have come while start was still waiting for it to begin
            if has_begun and driver is not None:
                with self.mutex:
                    self.ledger.close()
                self._wake.set()
                self._wait_for(driver)
            raise
        error = self._error or self.ledger.failure
        if error is not None:
            raise error

    def shut_down(self, *, wait: bool, cancel: bool) -> None:
        """Take no more tasks; end when those that wait are done, or cancelled."""
        with self.mutex:
            self.is_shut_down = True
            driver = self._driver
            waiting = list(self.ledger.tasks.values()) if cancel or driver is None else []
        for task in waiting:
            self.cancel(task)
        self._wake.set()
        if driver is None:
            self._executor.close()
        elif wait and driver is not threading.current_thread():
            self._wait_for(driver)

    def cancel(self, task: Task) -> bool:
        """Cancel a task that waits, or a stepper when its step is over; say whether it is, or will be."""
        with self.mutex:
            cancelled = self.ledger.cancel(task, self._tick())
            over = self._take_over()
        self._resolve(over)
        with self.mutex:
            self._unresolved -= len(over)
        self._wake.set()
        return cancelled

    def _wait_for(self, driver: threading.Thread) -> None:
        self._ended.wait()  # Thread.join alone takes a thread for dead when Ctrl-C interrupts it (CPython 3.11)
        driver.join()

    def _drive(self, forever: bool, show: Callable[[], None] | None) -> None:
        try:
            while not self._is_over(forever):
                self._wake.clear()
                self._go_round()
                if show is not None:
                    show()
                if not self._is_over(forever):
                    self._wake.wait(_ANOTHER_LOOK if show is not None else self._patience())
        except BaseException as error:
            self._error = error
            with self.mutex:
                self.ledger.close()
            while not self._is_over(forever):
                self._wake.clear()
                self._go_round()
                self._wake.wait(_ANOTHER_LOOK)
        try:
            self._executor.close()
        except BaseException as error:
            self._error = self._error or error
        with self.mutex:
            self._driver = None
            self.ledger.replay.clear()
            failure = self.ledger.failure or self._error
            waiting = list(self.ledger.tasks.values())
            futures = [task.future for task in waiting]
            if forever and failure is not None:  # nobody would ever run what waits
                for task in waiting:
                    self.ledger.fail(task, failure, self._latest)
            over = self._take_over()
        self._resolve(over)
        with self.mutex:
            self._unresolved -= len(over)
        for future in futures:
            future._look_again()
        self._ended.set()

    def _is_over(self, forever: bool) -> bool:
        with self.mutex:
            if self.ledger.in_flight or self._returned or self._unresolved:
                return False
            if forever and self.ledger.is_open and not self.is_shut_down:
                return False
            until = self.ledger.until
            return not self.ledger.has_room() or (until < math.inf and until <= self._tick())

    def _patience(self) -> float | None:
        """How long the driver may sleep: until the next deadline or the end, for news wakes it."""
        with self.mutex:
            due = min(self.ledger.until, self.ledger.next_deadline())
            if due == math.inf:
                return None
            return min(max(0.0, due - self._tick()), threading.TIMEOUT_MAX) if self._own_clock else _ANOTHER_LOOK

    def _go_round(self) -> None:
        ledger = self.ledger
        while True:
            with self.mutex:
                if not (self._returned or ledger.over or ledger.has_room() or ledger.next_deadline() < math.inf):
                    return  # without a look at the clock: an injected one is read as often from run to run
                if self._returned or not self._runs_in_pool or ledger.next_deadline() < math.inf:
                    now = self._tick()
                    while self._returned:
                        self._take_back(self._returned.popleft(), now)
                    ledger.expire(now)
                over = self._take_over()
            self._resolve(over)  # before the next decision, in which callbacks may want to have a say
            launched: list[Task] = []
            runners = 0
            with self.mutex:
                self._unresolved -= len(over)
                if self._runs_in_pool:
                    runners = max(0, min(self._width, ledger.room() + ledger.in_flight) - self._runners)
                    self._runners += runners
                else:
                    while (task := ledger.take(now)) is not None:
                        launched.append(task)
            for task in launched:
                task.future._set_running(task)
                assert task.fn is not None
                self._submit(task, task.fn, task.arguments(), task.kwargs or {})
            for _ in range(runners):
                self._submit(None, self._run_tasks, (), {})
            if not (launched or over or self._returned):
                return

    def _submit(self, task: Task | None, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        executor = None
        try:
            executor = self._executor.get()
            inner = executor.submit(fn, *args, **kwargs)
        except BaseException as error:
            self._returned.append(_Return(task, executor, concurrent.futures.Future(), error))
            self._wake.set()
        else:
            if task is not None:
                self._executor.has_taken = True
            inner.add_done_callback(lambda inner: self._on_return(_Return(task, executor, inner, None)))

    def _on_return(self, returned: _Return) -> None:
        if returned.task is None and not returned.result.cancelled() and returned.result.exception() is None:
            return  # a runner that has run takes leave itself
        self._returned.append(returned)
        self._wake.set()

    def _run_tasks(self) -> None:
        """Be a runner."""
        self._executor.has_taken = True
        # An injected clock is read as often from run to run, so there are no slices with it.
        until = time.monotonic() + _SLICE if self._own_clock else math.inf
        ledger = self.ledger
        task: Task | None = None
        value, error = None, None
        while True:
            with self.mutex:
                now = self._tick() if task is not None or ledger.has_room() else self._latest
                if task is not None:
                    ledger.settle(task, value, error, now)
                ledger.expire(now)
                over = self._take_over()
            self._resolve(over)  # before the next decision, in which callbacks may want to have a say
            is_late = time.monotonic() > until
            with self.mutex:
                self._unresolved -= len(over)
                task = None if is_late else ledger.take(now)
                goes_on = is_late and ledger.has_room()
                if task is None and not goes_on:
                    self._runners -= 1
            if goes_on:  # behind what others have submitted to the pool
                self._submit(None, self._run_tasks, (), {})
                return
            if task is None:
                self._wake.set()
                return
            task.future._set_running(task)
            value = error = None
            try:
                assert task.fn is not None
                value = task.fn(*task.arguments(), **(task.kwargs or {}))
            except BaseException as raised:
                # Without this frame in its traceback, which would keep the error, and all that its frames hold, alive.
                error = raised.with_traceback(raised.__traceback__ and raised.__traceback__.tb_next)

    def _take_back(self, returned: _Return, now: float) -> None:
        """Tell the ledger what has become of a turn. The mutex is held."""
        task, executor, inner, error = returned
        refused = error is not None or task is None
        if inner.cancelled():  # by the executor, when it was shut down: nothing that runs can be cancelled
            refused, error = True, concurrent.futures.CancelledError("cancelled by the executor")
        elif error is None:
            error = inner.exception()
        if isinstance(error, BrokenExecutor) and executor is not None:
            was_mended = self._executor.is_mended(executor)
            if was_mended or self._executor.mend(executor):
                if task is None:
                    self._runners -= 1
                elif refused:
                    self.ledger.put_back(task)
                else:
                    was_only_one = not was_mended and self.ledger.in_flight == 1
                    self.ledger.settle_broken(task, error, now, was_only_one=was_only_one)
                return
        elif task is not None and not (refused and (executor is None or isinstance(error, _REFUSALS))):
            self.ledger.settle(task, None if error is not None else inner.result(), error, now)
            return
        # The executor takes no tasks any more: the run ends, and what was not started waits for another.
        failure = RuntimeError(f"Scheduler: the executor takes no tasks ({error}); none is lost")
        failure.__cause__ = error
        self.ledger.close(failure)
        if task is None:
            self._runners -= 1
        elif refused:
            self.ledger.put_back(task)
        else:
            self.ledger.settle(task, None, error, now)

    def _take_over(self) -> list[Task]:
        """Take over the tasks whose Futures are to be resolved. The mutex is held."""
        over, self.ledger.over = self.ledger.over, []
        self._unresolved += len(over)
        return over

    def _resolve(self, over: list[Task]) -> None:
        """Resolve Futures, which calls their callbacks. The mutex is not held."""
        for task in over:
            try:
                task.future._resolve(task)
            except BaseException:  # from a callback; of an Exception concurrent.futures itself thinks the same
                _LOG.exception("exception calling callback for %r", task.key)
