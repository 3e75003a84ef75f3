"""Exact blocked attention on the CPU, and priority queues on a lock-free heap, for NumPy, PyTorch and DLPack arrays."""

from typing import TYPE_CHECKING

from foveal import _core as _core  # first: it refuses a subinterpreter before NumPy is loaded into it for good
from foveal._attention.additive import additive_attention
from foveal._attention.dense import Attention, attention
from foveal._attention.sequences import attention_kvcache, attention_varlen
from foveal._attention.stats import AttentionStats, attention_stats
from foveal._runtime import Info, get_num_threads, info, set_num_threads
from foveal.queues import AsyncPriorityQueue, Empty, IndexedHeap, PriorityMap, PriorityQueue, ShutDown, SumTree

if TYPE_CHECKING:
    from foveal.scheduler import (
        AttentionScorer,
        DeadlineExceeded,
        Report,
        Scheduler,
        Step,
        TaskBalancer,
        temperature_for_breadth,
    )

__version__ = "0.1.0"

__all__ = [
    "AsyncPriorityQueue",
    "Attention",
    "AttentionScorer",
    "AttentionStats",
    "DeadlineExceeded",
    "Empty",
    "IndexedHeap",
    "Info",
    "PriorityMap",
    "PriorityQueue",
    "Report",
    "Scheduler",
    "ShutDown",
    "Step",
    "SumTree",
    "TaskBalancer",
    "__version__",
    "additive_attention",
    "attention",
    "attention_kvcache",
    "attention_stats",
    "attention_varlen",
    "get_num_threads",
    "info",
    "set_num_threads",
    "temperature_for_breadth",
]

_OF_SCHEDULER = (
    "AttentionScorer",
    "DeadlineExceeded",
    "Report",
    "Scheduler",
    "Step",
    "TaskBalancer",
    "temperature_for_breadth",
)

if not TYPE_CHECKING:  # type checkers are to know of the names in __all__ alone

    def __getattr__(name):
        import importlib

        if name in _OF_SCHEDULER:  # imported when first asked for: concurrent.futures takes a while
            return getattr(importlib.import_module("foveal.scheduler"), name)
        if name in ("scheduler", "torch"):  # as if it had been imported, whatever ran before
            try:
                return importlib.import_module(f"foveal.{name}")
            except ModuleNotFoundError as error:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}: {error}") from error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        own = {name for name in globals() if not name.startswith("_") or name.endswith("__")}
        return sorted({*__all__, *own} - {"TYPE_CHECKING"})
