"""Looks at a scheduler that may be running: its report and its shares. Nobody waits for who looks."""

from __future__ import annotations

import time
from collections.abc import Hashable

from foveal._scheduler.engine import Engine
from foveal._scheduler.ledger import Ledger
from foveal._scheduler.report import Report, Row, row_of
from foveal._scheduler.shares import Floats, softmax, with_floor

_ROWS_AT_ONCE, _PAUSE = 1_000, 1e-4  # of a report, while the scheduler is locked; seconds between


def report_of(function: str, engine: Engine, ledger: Ledger, began: float | None) -> Report:
    """Report on all that the ledger remembers. It began at `began`; None: when the first of its tasks was submitted."""
    ended = engine.clock.now()
    with engine.lock(function), ledger:
        tasks, decisions, spans = ledger.history()
    rows: list[Row] = []
    while len(rows) < len(tasks):
        with engine.lock(function), ledger:
            rows.extend(map(row_of, tasks[len(rows) : len(rows) + _ROWS_AT_ONCE]))
        if len(rows) < len(tasks):
            time.sleep(_PAUSE)  # for those who wait for the lock; to release it is not enough
    if began is None:
        began = min((row.submitted for row in rows), default=ended)
    return Report(rows, decisions, spans, began, ended)


def shares_of(function: str, engine: Engine, ledger: Ledger, floor: float) -> tuple[list[Hashable], Floats]:
    """Give the keys of the tasks that wait, in order of arrival, and the share of each."""
    with engine.lock(function), ledger:
        tasks = list(ledger.backlog)
        scores = ledger.backlog.scores()
        temperature = ledger.backlog.solve()
    keys = [task.key for task in tasks]  # out here, and so is the rest: nobody is to wait for a look
    if not keys:
        return keys, scores
    return keys, with_floor(softmax(scores, temperature), floor)
