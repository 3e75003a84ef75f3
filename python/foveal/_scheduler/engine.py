"""The engine: the life of the thread that runs the tasks, from the start of a run to its end, and to the process's.

That thread, the drive, goes round in Dispatch until nothing is left to do. Users' threads start it and wait for it;
Ctrl-C, which Python raises in the main thread wherever that stands, does not hit it.

- A drive that cannot begin, or whose starter is interrupted, is dismissed: it finds out by itself, should it begin yet.
- At the end of the interpreter what has been started in the background is run to its end, as concurrent.futures does,
  and before that closes its pools; on Ctrl-C what still waits is cancelled.
- In the child of a fork there is no drive. What waits there is the parent's, so the scheduler refuses everything; one
  that did not run at the fork goes on in both.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
import weakref
from collections.abc import Callable

from foveal._scheduler.bell import Bell
from foveal._scheduler.clock import Clock
from foveal._scheduler.dispatch import Dispatch
from foveal._scheduler.executors import ExecutorHandle
from foveal._scheduler.future import Task
from foveal._scheduler.ledger import Ledger
from foveal._scheduler.waits import Seen, Wait

_ANOTHER_LOOK = 0.1  # seconds between looks at what gives no news, and between pictures of progress
_HEARTBEAT = 1.0  # seconds after which to look for news that a thread which was interrupted may have owed us
_SHUT_DOWN = "the scheduler was shut down"
_FORKED = "the scheduler ran when this process was forked, and runs on in the parent alone; make another one here"


class _Drive(threading.Thread):
    """The thread of one run."""

    def __init__(self, engine: Engine, forever: bool, show: Callable[[], None] | None) -> None:
        super().__init__(name="foveal-scheduler", daemon=True)
        self.engine = engine
        self.forever = forever  # or until the ledger is exhausted
        self.show = show  # progress
        self.has_begun = False
        self.is_left = False  # by a shutdown that did not wait
        self.is_awaited = forever or not threading.current_thread().daemon  # at the end of the interpreter
        self.failure: BaseException | None = None  # why it ended before its time; nobody else keeps it
        self._has_ended = False
        self._end = Bell()

    def run(self) -> None:
        try:
            self.engine._drive_on(self)
        finally:
            self.engine._has_ended(self)
            self._has_ended = True
            self._end.ring()

    def wait(self, timeout: float = math.inf) -> bool:
        """Wait for the end, and say whether it has come."""
        until = time.monotonic() + timeout
        while not self._has_ended:  # join alone takes a thread for dead when Ctrl-C interrupts it (CPython 3.11)
            left = until - time.monotonic()
            if left <= 0.0:
                return False
            self._end.wait(min(left, _HEARTBEAT))
        self._end.ring()  # for others who wait
        self.join()
        return True


class Engine:
    """Runs the tasks of a ledger; see the module."""

    def __init__(self, ledger: Ledger, executor: ExecutorHandle, read_clock: Callable[[], float] | None) -> None:
        self.clock = Clock(read_clock)
        self.refusal = ""
        """Why it takes nothing more; empty: it does."""
        self._dispatch = Dispatch(ledger, executor, self.clock)
        self._ledger = ledger
        self._executor = executor
        self._drive: _Drive | None = None
        self.lock, self.cancel, self.arrive = self._dispatch.lock, self._dispatch.cancel, self._dispatch.arrive
        _ENGINES.add(self)

    def is_running(self) -> bool:
        """Say whether tasks are being handed out, or will be."""
        return self._drive is not None

    def check_runs(self, function: str) -> None:
        """Refuse to wait for a task that nothing runs."""
        if self._drive is None:
            advice = _FORKED if self.refusal == _FORKED else "call run() or start() of its scheduler"
            raise RuntimeError(f"{function}: nothing runs the task; {advice}")

    def can_end(self, task: Task, seen: Seen) -> bool:
        """Say whether a task can end, or the wait for it be refused, while the threads in `seen` wait for it."""
        drive = self._drive
        return drive is None or self._dispatch.can_end(task, drive.ident, seen)

    def _run_can_end(self, seen: Seen) -> bool:
        """Say whether what is in flight can end."""
        return all(self.can_end(task, seen) for task in self._ledger.unfinished() if task.status == "running")

    def start(self, max_in_flight: int | None, opened: Callable[[int], None]) -> None:
        """Run tasks in the background until it is shut down.

        `opened` is called with the number of tasks that may be in flight, in a section, and opens the ledger.
        """
        drive = _Drive(self, True, None)
        try:
            self._begin("Scheduler.start", drive, max_in_flight, opened)
        except BaseException:
            self._abort(drive)
            raise

    def run(
        self,
        executor: ExecutorHandle | None,
        max_in_flight: int | None,
        opened: Callable[[int], None],
        show: Callable[[], None] | None,
    ) -> None:
        """Run all tasks, wait for the end; on Ctrl-C hand out nothing more and wait for what is in flight.

        From then on on this executor, if one is given.
        """
        drive = _Drive(self, False, show)
        try:
            self._begin("Scheduler.run", drive, max_in_flight, opened, executor)
            with Wait(self._run_can_end):
                drive.wait()
        except BaseException:
            self._abort(drive)
            raise
        failure = drive.failure or self._dispatch.error or self._ledger.failure
        drive.failure = None
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # which holds this frame

    def shut_down(self, *, wait: bool, cancel: bool, timeout: float = math.inf) -> None:
        """Take no more tasks; end when those that wait are done, or cancelled; give up those in flight after a timeout.

        Does not wait in a thread that is itself waited for: a task's, a callback's.
        """
        self.refusal = self.refusal or _SHUT_DOWN
        if self.refusal == _FORKED:
            return
        drive = self._drive
        for task in self._ledger.unfinished() if cancel or drive is None else []:
            self.cancel(task)
        self._dispatch.wake.ring()
        if self._dispatch.is_in_section():
            return
        if drive is None:
            self._executor.close()
        elif not wait:
            drive.is_left = True
        elif drive is not threading.current_thread():
            until = time.monotonic() + timeout
            # A pool may name a thread among its own only after that has begun to run a task.
            with Wait(self._run_can_end) as own:
                while not self._dispatch.waits_for_this_thread() and not own.is_endless():
                    if drive.wait(max(0.0, min(_ANOTHER_LOOK, until - time.monotonic()))):
                        return
                    if time.monotonic() >= until:
                        self._give_up(drive, timeout)
                        return

    def _give_up(self, drive: _Drive, timeout: float) -> None:
        error = RuntimeError(
            f"Scheduler.shutdown: the task was in flight for longer than the timeout of {timeout:g} s, and is not "
            "waited for any more; who knows whether it is done"
        )
        with self._dispatch.mutex, self._ledger:
            if self._drive is not drive:
                return
            self._dispatch.give_up(error)
        self._dispatch.wake.ring()
        drive.wait(_HEARTBEAT)  # not for ever: a callback may keep it

    def _begin(
        self,
        function: str,
        drive: _Drive,
        max_in_flight: int | None,
        opened: Callable[[int], None],
        executor: ExecutorHandle | None = None,
    ) -> None:
        mutex, former = self.lock(function), self._executor
        executor = executor or former
        width, runs_in_pool = max_in_flight or executor.width(), executor.is_pool_of_threads()
        with mutex, self._ledger:
            refusal = self.refusal or ("the scheduler runs already" if self._drive is not None else "")
            if not refusal:
                self._dispatch.open(executor, width, runs_in_pool)
                opened(width)
                self._executor, self._drive = executor, drive
        if refusal:
            if executor is not former:
                executor.close()
            raise RuntimeError(f"{function}: {refusal}")
        if executor is not former:
            former.close(wait=False)
        drive.start()

    def _abort(self, drive: _Drive) -> None:
        """After an error, or Ctrl-C, while it began or went on: see to it that the drive ends, or never begins."""
        with self._dispatch.mutex, self._ledger:
            if self._drive is not drive:
                return
            self._ledger.close()
            if not drive.has_begun:
                self._drive = None
        self._dispatch.wake.ring()
        if drive.has_begun:
            drive.wait()

    def _drive_on(self, drive: _Drive) -> None:
        dispatch = self._dispatch
        with dispatch.mutex, self._ledger:
            if self._drive is not drive:
                return  # dismissed
            drive.has_begun = True
        try:
            while not self._is_over(drive):
                dispatch.wake.hush()
                dispatch.go_round()
                if drive.show is not None:
                    drive.show()
                if not self._is_over(drive):
                    dispatch.wake.wait(_ANOTHER_LOOK if drive.show is not None else self._patience())
        except BaseException as error:
            with dispatch.mutex, self._ledger:
                dispatch.fail(error)
            while not self._is_over(drive):
                dispatch.wake.hush()
                dispatch.go_round()
                dispatch.wake.wait(_ANOTHER_LOOK)
        try:
            self._executor.close(wait=not dispatch.has_given_up)
        except BaseException as error:
            dispatch.error = dispatch.error or error
        self._end(drive)

    def _end(self, drive: _Drive) -> None:
        ledger = self._ledger
        with self._dispatch.mutex, ledger:
            self._drive = None
            ledger.close()
            ledger.follow(())
            failure = drive.failure = self._dispatch.error or ledger.failure
            ledger.failure = self._dispatch.error = None
            left = ledger.unfinished()
            futures = [task.future for task in left]
            for task in left:  # that nobody would ever run
                if drive.forever and failure is not None:
                    ledger.fail(task, failure, self.clock.latest)
                elif self.refusal:
                    ledger.cancel(task, self.clock.latest)
        self._dispatch.settle_over()
        for future in futures:
            future._look_again()

    def _has_ended(self, drive: _Drive) -> None:
        if self._drive is drive:  # its end has failed, for want of memory perhaps
            self._drive = None

    def _is_over(self, drive: _Drive) -> bool:
        ledger = self._ledger
        with self._dispatch.mutex, ledger:
            if not self._dispatch.is_idle():
                return False
            if drive.forever and ledger.is_open and not self.refusal:
                return False
            return not ledger.has_room() or (ledger.until < math.inf and ledger.until <= self._dispatch.tick())

    def _patience(self) -> float:
        """How long the drive may sleep: until the next deadline or the end, for news wakes it."""
        ledger = self._ledger
        with self._dispatch.mutex, ledger:
            due = min(ledger.until, ledger.next_deadline())
            if due == math.inf:
                return _HEARTBEAT
            if not self.clock.is_ours:
                return _ANOTHER_LOOK
            return min(max(0.0, due - self._dispatch.tick()), _HEARTBEAT)

    def _after_fork(self) -> None:
        """Be in a child, where there are no other threads."""
        self._dispatch.after_fork()
        if self._drive is not None:
            self.refusal, self._drive = _FORKED, None
            self._executor.forget()


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for engine in list(_ENGINES):
        engine._after_fork()


def _at_exit() -> None:
    drives = [thread for thread in threading.enumerate() if isinstance(thread, _Drive) and thread.is_awaited]
    try:
        for drive in drives:
            is_left = drive.is_left and not drive.engine._executor.is_awaited_by_python()
            drive.engine.shut_down(wait=True, cancel=is_left, timeout=0.0 if is_left else math.inf)
    except BaseException:  # Ctrl-C
        for drive in drives:
            drive.engine.shut_down(wait=False, cancel=True)
        for drive in drives:
            drive.wait()
        raise


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
# The pools of concurrent.futures are closed in this way too, in the order opposite to that of registration, and theirs
# came first: executors.py has imported them. What atexit calls would come after that, when tasks can only fail.
getattr(threading, "_register_atexit", atexit.register)(_at_exit)
