"""What comes back from an executor, and what that says: of the task, or of the executor."""

from __future__ import annotations

import concurrent.futures
import enum
from concurrent.futures import BrokenExecutor, Executor
from typing import Any

from foveal._scheduler.executors import ExecutorHandle, is_broken, takes_nothing
from foveal._scheduler.future import Task, as_step

_REFUSALS = (RuntimeError, concurrent.futures.CancelledError)  # what an executor that was shut down raises


class Verdict(enum.Enum):
    """What the return of a task or a runner says."""

    OVER = enum.auto()
    """Something of the task alone: it is over, or the executor cannot take it."""
    BREAK = enum.auto()
    """The executor broke and has been replaced."""
    FIRST_OF_BREAK = enum.auto()
    """The same, and this was the first to say so."""
    END = enum.auto()
    """The executor takes no tasks any more."""
    NONSENSE = enum.auto()
    """What the executor's submit gave is no Future: who knows what has become of the task."""


class Runner:
    """Stands for one call of a pool of threads, which takes task after task."""

    __slots__ = ("task", "thread")

    def __init__(self) -> None:
        self.thread: int | None = None
        """That it runs in; None: it has not begun."""
        self.task: Task | None = None
        """The one that was taken last."""


class Return:
    """A task, or a runner, that came back from an executor."""

    __slots__ = ("error", "executor", "is_refused", "result", "value", "verdict", "what")

    def __init__(
        self,
        what: Task | Runner,
        executor: Executor | None,
        result: concurrent.futures.Future[Any] | None,
        error: BaseException | None = None,
    ) -> None:
        self.what = what
        self.executor = executor
        """Where it was; None: no executor was to be had."""
        self.result = result
        """None: the executor did not take it, with `error`."""
        self.error = error
        self.value: Any = None
        """What a task that has not failed gave."""
        self.is_refused = result is None or isinstance(what, Runner)
        """Whether no task was started."""
        self.verdict = Verdict.END

    @classmethod
    def of_nonsense(cls, what: Task | Runner, executor: Executor, found: object) -> Return:
        """Make the one of a task for which the executor gave something that is no Future."""
        error = TypeError(
            f"Scheduler: submit of the executor {type(executor).__name__} returned {type(found).__name__}, "
            "expected a concurrent.futures.Future"
        )
        one = cls(what, executor, None, error)
        one.verdict = Verdict.NONSENSE
        return one

    def judge(self, executor: ExecutorHandle) -> None:
        """Reach a verdict, for which the executor may have to be asked, and replaced. Not with the mutex."""
        if self.verdict is Verdict.NONSENSE:
            return
        if self.result is not None:
            if self.result.cancelled():  # by the executor, when it was shut down: nothing that runs can be cancelled
                self.is_refused, self.error = True, concurrent.futures.CancelledError("cancelled by the executor")
            else:
                self.error = self.result.exception()
        if isinstance(self.error, BrokenExecutor) and self.executor is not None:
            was_mended = executor.is_mended(self.executor)
            if not was_mended and not self.is_refused and not is_broken(self.executor):
                self.verdict = Verdict.OVER  # the task has raised this for reasons of its own
            elif was_mended or executor.mend(self.executor):
                self.verdict = Verdict.BREAK if was_mended else Verdict.FIRST_OF_BREAK
        elif not (
            self.is_refused
            and (
                isinstance(self.what, Runner)
                or self.executor is None
                or isinstance(self.error, _REFUSALS)
                or (self.error is not None and takes_nothing(self.executor, self.error))
            )
        ):
            self.verdict = Verdict.OVER
        if self.result is not None and self.error is None:
            self._take_value(self.result)

    def _take_value(self, result: concurrent.futures.Future[Any]) -> None:
        task = self.what
        if isinstance(task, Task):
            try:
                self.value = as_step(task.key, result.result()) if task.max_steps else result.result()
            except Exception as error:
                self.error = error
