"""What the scheduler has to know of an executor: how many tasks it takes, how it may be called, how to mend it."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor

from foveal._scheduler.waits import Seen, can_go_on

Maker = Callable[[], Executor]
_OF_ARGUMENTS = (TypeError, ValueError, AttributeError, pickle.PickleError)  # what says that a task cannot be sent


class ExecutorHandle:
    """An executor that is the user's, or is made by a callable and then ours to shut down."""

    def __init__(self, executor: Executor | Maker | None) -> None:
        self._given = executor if isinstance(executor, Executor) else None
        self._make: Maker = executor if callable(executor) and self._given is None else ThreadPoolExecutor
        self._current: Executor | None = self._given
        self._is_ours = self._given is None
        self.has_taken = False
        """Whether the executor, or the one that replaces it, has taken a task."""

    def get(self) -> Executor:
        """Give the executor, made now if need be."""
        if self._current is None:
            self._current = self._make()
        return self._current

    def width(self) -> int:
        """Say how many tasks it runs at once, as far as it tells; else the processors of this machine."""
        executor = self.get()
        for name in ("_max_workers", "num_workers"):  # of the standard library; of mpi4py
            number = getattr(executor, name, None)
            if isinstance(number, int) and number > 0:
                return number
        return os.cpu_count() or 1

    def is_pool_of_threads(self) -> bool:
        """Say whether it is a ThreadPoolExecutor as it comes: a derived class may do something for every task."""
        return type(self.get()) is ThreadPoolExecutor

    def runs_in(self, thread: threading.Thread) -> bool:
        """Say whether it runs tasks in this thread, as far as it tells."""
        return thread in getattr(self._current, "_threads", ())  # of ThreadPoolExecutor

    def has_free_thread(self, seen: Seen) -> bool:
        """Say whether one of its threads is free, or can be; yes if it does not tell."""
        if not isinstance(self._current, ThreadPoolExecutor):
            return True
        threads = list(self._current._threads)
        return len(threads) < self._current._max_workers or any(can_go_on(thread.ident, seen) for thread in threads)

    def is_mended(self, executor: Executor) -> bool:
        """Say whether this executor has been replaced since."""
        return self._current is not executor

    def mend(self, broken: Executor) -> bool:
        """Replace a broken executor by a new one of its kind; return whether that is possible and makes sense."""
        if not self.has_taken:  # and the new one would be no better
            return False
        if self._given is None:
            self._current = None
        elif type(broken) is ProcessPoolExecutor:
            # It has no public way to say how it was made; these names have been the same since Python 3.7.
            try:
                names = ("_max_workers", "_mp_context", "_initializer", "_initargs")
                self._current = ProcessPoolExecutor(*(getattr(broken, name) for name in names))
            except AttributeError:
                return False
            self._is_ours = True
        else:
            return False
        self.has_taken = False
        broken.shutdown(wait=False)
        return True

    def is_awaited_by_python(self) -> bool:
        """Say whether the end of the interpreter waits for its tasks by itself."""
        return isinstance(self._current, (ThreadPoolExecutor, ProcessPoolExecutor))

    def forget(self) -> None:
        """Drop what is ours without a word to it: this is a child, and its threads are the parent's."""
        self._current, self._is_ours = self._given, self._given is None

    def close(self, *, wait: bool = True) -> None:
        """Shut down what is ours, so that no thread is left behind; a later get makes a new one."""
        if self._is_ours and self._current is not None:
            self._current.shutdown(wait=wait)
            self._current = self._given
            self._is_ours = self._given is None


def takes_nothing(executor: Executor, error: BaseException) -> bool:
    """Say whether an executor whose submit raised `error` would do so for any task, as a closed Dask client does."""
    if isinstance(error, _OF_ARGUMENTS):
        return False
    try:
        executor.submit(int)
    except Exception as again:
        return type(again) is type(error)
    return False


def is_broken(executor: Executor) -> bool:
    """Say whether an executor is broken; it is asked to do next to nothing, which is the only public way to know."""
    try:
        executor.submit(int)
    except BrokenExecutor:
        return True
    except Exception:
        return False
    return False
