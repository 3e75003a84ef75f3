"""Scheduling by priority: tasks on any executor, attention over tasks, and weights for the losses of many tasks."""

from __future__ import annotations

from foveal._scheduler.balancer import TaskBalancer
from foveal._scheduler.future import DeadlineExceeded, Future, Step
from foveal._scheduler.report import Decision, Report, Row, Span
from foveal._scheduler.scheduler import Scheduler
from foveal._scheduler.scorer import AttentionScorer
from foveal._scheduler.shares import temperature_for_breadth

__all__ = [
    "AttentionScorer",
    "DeadlineExceeded",
    "Decision",
    "Future",
    "Report",
    "Row",
    "Scheduler",
    "Span",
    "Step",
    "TaskBalancer",
    "temperature_for_breadth",
]
