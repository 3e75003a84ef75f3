"""What a run did: a table, a dict, a pandas.DataFrame, a Gantt chart."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from foveal._scheduler.checks import text_of

if TYPE_CHECKING:
    from foveal._scheduler.future import Task

_SHOWN = 20


class Decision(NamedTuple):
    """One entry of the decision log."""

    time: float
    """By the scheduler's clock."""
    key: Hashable
    """Of the task that it chose."""
    rotation: bool
    """Whether the rotation that keeps the floor chose it, not the weights."""


class Row(NamedTuple):
    """What became of one task. Times are by the scheduler's clock."""

    key: Hashable
    """As submitted, or made up."""
    status: str
    """done, failed, cancelled, expired; running; or waiting: not reached before the budget or the time was spent."""
    urgency: float
    """The latest."""
    importance: float
    """The latest."""
    submitted: float
    """When it was."""
    started: float | None
    """When its first turn began; None: it had none."""
    finished: float | None
    """When it was over; None: it is not."""
    turns: int
    """How many it had, those that were tried again included."""
    cost: float
    """What these cost in all: 1 for a callable's, what its Step says for a stepper's."""
    error: str | None
    """The repr of the exception that its Future carries, at most 1000 characters of it."""


class Span(NamedTuple):
    """One turn of one task, from when it was handed to the executor to when it was back."""

    key: Hashable
    """Of the task."""
    start: float
    """When it was handed out, by the scheduler's clock."""
    stop: float
    """When it was back."""


class Report:
    """The outcome of :meth:`Scheduler.run`: one row a task, the decisions in order, the turns.

    ``print(report)`` shows a table (with rich where it is installed), :meth:`to_dict`, :meth:`to_pandas` and
    :meth:`plot` give the rest.

    Attributes
    ----------
    rows : list of Row
        What became of each task: first those that are over, in that order, then those that are not.
    decisions : list of Decision
        Who was given each turn, in order: what :meth:`Scheduler.replay` takes.
    spans : list of Span
        The turns that are over, in order of their end.
    began, ended : float
        When the run began and ended, by the scheduler's clock; in the background, when the first of the tasks was
        submitted and when the report was made.
    """

    def __init__(
        self, rows: Sequence[Row], decisions: Sequence[Decision], spans: Sequence[Span], began: float, ended: float
    ) -> None:
        self.rows = list(rows)
        self.decisions = list(decisions)
        self.spans = list(spans)
        self.began = began
        self.ended = ended

    @property
    def counts(self) -> dict[str, int]:
        """How many tasks ended in which status."""
        return dict(Counter(row.status for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Give everything as dicts and lists."""
        return {
            "began": self.began,
            "ended": self.ended,
            "counts": self.counts,
            "tasks": [row._asdict() for row in self.rows],
            "decisions": [decision._asdict() for decision in self.decisions],
            "spans": [span._asdict() for span in self.spans],
        }

    def to_pandas(self) -> Any:
        """Give the rows as a pandas.DataFrame, which must be installed."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=Row._fields)

    def plot(self, path: Any = None, *, ax: Any = None) -> Any:
        """Draw a Gantt chart with matplotlib, a line a task in order of first start; return the Axes.

        Parameters
        ----------
        path : path, optional
            Where to save the figure.
        ax : matplotlib.axes.Axes, optional
            Where to draw; without it a figure is made, of the object-oriented kind, which needs no display.
        """
        from matplotlib.figure import Figure

        lines: dict[Hashable, list[tuple[float, float]]] = {}
        for span in sorted(self.spans, key=lambda span: span.start):
            lines.setdefault(span.key, []).append((span.start - self.began, span.stop - span.start))
        if ax is None:
            ax = Figure(figsize=(9, 1.2 + 0.22 * min(len(lines), 100)), layout="constrained").subplots()
        for y, bars in enumerate(lines.values()):
            ax.broken_barh(bars, (y - 0.4, 0.8), facecolor=f"C{y % 10}", edgecolor="white", linewidth=0.4)
        if len(lines) <= 100:
            ax.set_yticks(range(len(lines)), [_label(key) for key in lines])
        ax.invert_yaxis()
        ax.set_xlabel("time since the run began, in the clock's seconds")
        ax.set_ylabel("task")
        if path is not None:
            ax.figure.savefig(path, dpi=150)
        return ax

    def __str__(self) -> str:
        """Show a table of the tasks, the first and the last of them when they are many."""
        header = ("task", "status", "urgency", "importance", "waited", "took", "turns", "cost", "error")
        rows = self.rows
        shown = rows if len(rows) <= _SHOWN else [*rows[: _SHOWN // 2], None, *rows[-_SHOWN // 2 :]]
        cells = [self._cells(row) if row else ("...",) + ("",) * (len(header) - 1) for row in shown]
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items()) or "no tasks"
        title = f"{counts} in {self.ended - self.began:.3g} s"
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            return f"{title}\n{_plain_table(header, cells)}"
        table = Table(title=title)
        for name in header:
            table.add_column(name, justify="left" if name in ("task", "status", "error") else "right")
        for row_cells in cells:
            table.add_row(*row_cells)
        console = Console(file=io.StringIO(), width=110, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return str(capture.get()).rstrip("\n")  # str: mypy cannot see what it is where rich is not installed

    def __repr__(self) -> str:
        return f"<Report: {self.counts}>"

    def _cells(self, row: Row) -> tuple[str, ...]:
        waited = "" if row.started is None else f"{row.started - row.submitted:.3g}"
        took = "" if row.started is None or row.finished is None else f"{row.finished - row.started:.3g}"
        numbers = (f"{row.urgency:.3g}", f"{row.importance:.3g}", waited, took, str(row.turns), f"{row.cost:.3g}")
        return (_label(row.key), row.status, *numbers, row.error or "")


def _label(key: Hashable) -> str:
    return key if isinstance(key, str) else text_of(key)


def row_of(task: Task) -> Row:
    """Give a task's row."""
    return Row(
        task.key,
        task.status,
        task.urgency,
        task.importance,
        task.submitted,
        task.started,
        task.finished,
        task.steps,
        task.cost,
        task.error_text,
    )


def _plain_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    table = [header, *cells]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
