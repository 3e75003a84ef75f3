"""A task, and the Future that stands for its result.

A queued task is to be small: a ``concurrent.futures.Future`` costs 1.7 kB before it holds anything, nearly all of it
the Condition that waiters wait on. Here the Condition is made when somebody first asks for it.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from foveal._scheduler.checks import text_of
from foveal._scheduler.waits import Seen, Wait, Waiters, refused

if TYPE_CHECKING:
    from foveal._scheduler.engine import Engine

_LOG = logging.getLogger("foveal.scheduler")


# As a task's slot, besides those of the backlog and -1, not there: it has not been taken in yet; it is over, and noted
# as such everywhere.
ARRIVING, BOOKED = -2, -3
_LONGEST_ERROR = 1000  # characters of the text that is kept of an exception


class DeadlineExceeded(TimeoutError):
    """The task was not started before its deadline."""


class Step(NamedTuple):
    """What a stepper's step gives back."""

    done: bool
    """True: do not call me again."""
    feedback: float | None = None
    """How urgent the rest is: moves the task's urgency by an exponential moving average."""
    cost: float = 1.0
    """What the step took, in the unit of the budget that it was given."""


def as_step(key: Hashable, step: Any) -> Step:
    """Give what the step of task `key` returned as a Step of plain numbers, or refuse it."""
    at = f"Scheduler: the step of {text_of(key)}"
    if not isinstance(step, tuple) or not 1 <= len(step) <= 3:
        raise TypeError(f"{at} returned {text_of(step)}, expected foveal.Step(done, feedback, cost)")
    done, feedback, cost = tuple(step) + (None, 1.0)[len(step) - 1 :]
    try:
        plain = Step(bool(done), None if feedback is None else float(feedback), float(cost))
    except Exception as error:
        raise TypeError(f"{at} returned {text_of(step)}: {error}") from None
    if plain.feedback is not None and not math.isfinite(plain.feedback):
        raise ValueError(f"{at} gave feedback {feedback}, expected a finite number or None")
    if not 0.0 <= plain.cost < math.inf:
        raise ValueError(f"{at} gave cost {cost}, expected at least 0 and finite")
    return plain


_RLock: Any = type(threading.RLock())


class _Condition(_RLock):  # type: ignore[misc]
    """A threading.Condition, with the ``with`` of the lock that it is.

    That of a threading.Condition is written in Python: Ctrl-C in the main thread, on its way out, leaves it locked.
    This one is smaller too, until somebody waits.
    """

    __slots__ = ("_inner",)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait to be notified; the lock is held."""
        if not hasattr(self, "_inner"):
            self._inner = threading.Condition(self)
        return self._inner.wait(timeout)

    def notify_all(self) -> None:
        """Wake those who wait; the lock is held."""
        if hasattr(self, "_inner"):
            self._inner.notify_all()


class Future(concurrent.futures.Future):  # type: ignore[type-arg]
    """The result of a scheduled task: a ``concurrent.futures.Future`` with a `key`.

    `cancel` takes a task that waits out of the scheduler. `result` and `exception` of a task that waits raise
    RuntimeError while the scheduler does not run, for they would wait for ever. A stepper's Future is pending until it
    is done, since it can be cancelled between two steps. Whoever waits on several Futures with
    ``concurrent.futures.wait`` sees to it that the scheduler runs.
    """

    def __init__(self, engine: Engine, task: Task) -> None:
        # Not super().__init__(), which would make the Condition. What it sets besides, in all supported versions:
        self._state = "PENDING"
        self._result: Any = None
        self._exception: BaseException | None = None
        self._waiters: list[Any] = Waiters()
        self._done_callbacks: list[Callable[[Any], object]] = []
        self.key = task.key
        """The task's key, as submitted or made up."""
        self._engine = engine
        self._task: Task | None = task

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied or pickled, as that of the base class cannot be pickled."""
        raise TypeError(
            f"Future: that of task {text_of(self.key)} cannot be copied or pickled, expected its result to be"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "_condition":  # setdefault is atomic: all threads get the same one
            return self.__dict__.setdefault("_condition", _Condition())
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def cancel(self) -> bool:
        """Cancel the task if it waits, and a stepper between two steps; return whether it is cancelled."""
        task = self._task
        if task is not None:
            self._engine.cancel(task)
        return self.cancelled()

    def result(self, timeout: float | None = None) -> Any:
        """Give the task's result, or raise its exception.

        Raises
        ------
        RuntimeError
            The task waits and the scheduler does not run: call its run() or start().
        TimeoutError
            `timeout` seconds have passed.
        concurrent.futures.CancelledError
            The task was cancelled.
        """
        self._await("result", timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Give the task's exception, or None; raises as `result` does."""
        self._await("exception", timeout)
        return super().exception(0)

    def _await(self, method: str, timeout: float | None) -> None:
        if self._is_done():
            return
        self._engine.check_runs(f"Future.{method}")  # also before the Condition, which a fork may have left locked
        if timeout is None:
            with Wait(self._can_end) as wait:
                while not self._pause(method, wait.patience):
                    if wait.is_endless():
                        raise refused(f"Future.{method}", [self])
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self._pause(method, until - time.monotonic()):
            if until - time.monotonic() <= 0:
                raise concurrent.futures.TimeoutError

    def _pause(self, method: str, seconds: float) -> bool:
        """Wait for the end of the task, not much longer than so many seconds, and say whether it has come."""
        with self._condition:
            if not self.done():
                self._engine.check_runs(f"Future.{method}")
                if seconds > 0.0:
                    self._condition.wait(min(seconds, threading.TIMEOUT_MAX))
            return self.done()

    def _can_end(self, seen: Seen) -> bool:
        """Say whether the task can end while these threads wait for it."""
        task = self._task
        return task is None or self._is_done() or self._engine.can_end(task, seen)

    def _is_done(self) -> bool:
        """Say what `done` does, without the Condition: what it says then stays so."""
        return self._state in ("FINISHED", "CANCELLED", "CANCELLED_AND_NOTIFIED")

    def _set_running(self, task: Task) -> None:
        """Be running; not a stepper, which can be cancelled between two steps. Nobody waits for this: no Condition."""
        if not task.max_steps:
            self._state = "RUNNING"

    def _resolve(self, task: Task) -> None:
        """Take over the outcome of the task, which is over; may be called again."""
        self._task = None
        if self._is_done():
            return
        try:
            if task.status == "done":
                self.set_result(task.result)
            elif task.status == "cancelled":
                self._state = "PENDING"  # from running: a task that is to be tried again can be cancelled
                try:
                    super().cancel()
                finally:
                    self.set_running_or_notify_cancel()  # tells those in concurrent.futures.wait
            else:
                self.set_exception(task.error)
        except concurrent.futures.InvalidStateError:  # somebody else has resolved it
            pass

    def _invoke_callbacks(self) -> None:
        """Call those callbacks that have not been called yet: unlike that of the base class, may be called again."""
        while self._is_done() and self._done_callbacks:
            callback = self._done_callbacks.pop(0)
            try:
                callback(self)
            except Exception:
                _LOG.exception("exception calling callback for %r", self)

    def _look_again(self) -> None:
        """Wake those who wait in `result`: the scheduler has stopped."""
        condition = self.__dict__.get("_condition")
        if condition is not None:
            with condition:
                condition.notify_all()


class Task:
    """One unit of work and where it stands. Written under the scheduler's mutex only."""

    __slots__ = (
        "args",
        "attempts",
        "attention",
        "by_rotation",
        "charge",
        "cost",
        "credit",
        "deadline",
        "doomed",
        "error",
        "error_text",
        "features",
        "finished",
        "fn",
        "future",
        "granted",
        "importance",
        "in_rotation",
        "key",
        "kwargs",
        "level",
        "max_steps",
        "queued",
        "residual",
        "result",
        "share",
        "slot",
        "started",
        "status",
        "steps",
        "submitted",
        "turn_began",
        "urgency",
    )

    def __init__(
        self,
        key: Hashable,
        fn: Callable[..., Any] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None,
        urgency: float,
        importance: float,
        now: float,
    ) -> None:
        self.key = key
        self.fn = fn
        self.args = args
        self.kwargs = kwargs
        self.urgency = urgency
        self.importance = importance
        self.submitted = self.queued = self.turn_began = now
        self.status = "waiting"
        self.slot = ARRIVING  # in the backlog
        self.attention = 0.0  # the scorer's part of the score, when last asked
        self.charge = 1.0  # the expected cost of the next turn
        self.granted = 0.0  # what was set aside for the turn under way
        # What is left to wait with the proportional server after a turn of the rotation, in charge; -1: nothing.
        self.residual = -1.0
        self.credit = 0.0  # what it takes from a lane that it leaves empty to the one that it comes back to
        self.by_rotation = False  # who serves it this turn
        self.share = 0.0  # of all weights, when this turn was decided
        self.in_rotation = False  # has a place there
        self.level = -1.0  # what it has had there; -1: nothing
        self.doomed = False  # cancelled while a step was under way
        self.steps = 0
        self.attempts = 0
        self.cost = 0.0
        self.max_steps: int | float = 0  # 0: not a stepper
        self.deadline: float | None = None
        self.features: NDArray[np.float32] | None = None
        self.started: float | None = None
        self.finished: float | None = None
        self.result: Any = None
        self.error: BaseException | None = None  # until the Future has it
        self.error_text: str | None = None  # what is kept of it
        self.future: Future

    def is_resolved(self) -> bool:
        """Say whether the Future is resolved, and nothing of the user's is held any more but the key."""
        return not hasattr(self, "future")

    def resolve(self) -> None:
        """Resolve the Future, which calls its callbacks, and let go of all else; may be called again.

        The mutex is not held: here is where callbacks and destructors have their say.
        """
        if self.is_resolved():
            return
        future = self.future
        if self.error is not None and self.error_text is None:
            self.error_text = text_of(self.error, _LONGEST_ERROR)
        try:
            future._resolve(self)
        except BaseException:  # Ctrl-C: perhaps before those who wait were told, or all callbacks called
            future._look_again()
            future._invoke_callbacks()
            raise
        finally:
            if future._is_done():
                self.fn, self.args, self.kwargs, self.features = None, (), None, None
                self.result = self.error = None
                del self.future

    def arguments(self) -> tuple[Any, ...]:
        """Give the positional arguments of this turn: a stepper's is its budget."""
        return (self.granted,) if self.max_steps else self.args
