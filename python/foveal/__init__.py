"""Exact blocked attention on the CPU, and priority queues on a lock-free heap, for NumPy, PyTorch and DLPack arrays."""

from typing import TYPE_CHECKING

from foveal._attention import Attention, attention
from foveal._runtime import Info, get_num_threads, info, set_num_threads
from foveal._serving import attention_kvcache, attention_varlen
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
    "attention",
    "attention_kvcache",
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
        if name in _OF_SCHEDULER:  # imported when first asked for: concurrent.futures takes a while
            from foveal import scheduler

            return getattr(scheduler, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
