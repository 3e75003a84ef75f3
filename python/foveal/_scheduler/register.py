"""The register of unfinished tasks: a new one gets its key and its Future here, and each is found by either."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import ArrayLike

from foveal._scheduler.checks import check_hashable, check_priority, text_of
from foveal._scheduler.engine import Engine
from foveal._scheduler.future import Future, Task
from foveal._scheduler.ledger import Ledger
from foveal._scheduler.scorer import ScorerHandle


class Register:
    """Takes tasks in and finds them; see the module."""

    def __init__(self, engine: Engine, ledger: Ledger, scorer: ScorerHandle) -> None:
        self._engine = engine
        self._ledger = ledger
        self._scorer = scorer
        self._made_up = itertools.count(1)  # keys

    def add(
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
        """Take a task in and give its Future, or refuse it."""
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

    def find(self, function: str, key: Hashable) -> Task | None:
        """Give the unfinished task of a key, or the task of a Future; None: there is none."""
        if isinstance(key, Future):
            return key._task if key._engine is self._engine else None
        try:
            return self._ledger.tasks.get(key)
        except TypeError:
            check_hashable(function, key)
            raise
