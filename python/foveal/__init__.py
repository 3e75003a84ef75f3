"""Exact blocked attention on the CPU, and priority queues on a lock-free heap, for NumPy, PyTorch and DLPack arrays."""

from foveal._attention import Attention, attention
from foveal._runtime import Info, get_num_threads, info, set_num_threads
from foveal.queues import AsyncPriorityQueue, Empty, IndexedHeap, PriorityMap, PriorityQueue, ShutDown, SumTree

__version__ = "0.1.0"

__all__ = [
    "AsyncPriorityQueue",
    "Attention",
    "Empty",
    "IndexedHeap",
    "Info",
    "PriorityMap",
    "PriorityQueue",
    "ShutDown",
    "SumTree",
    "__version__",
    "attention",
    "get_num_threads",
    "info",
    "set_num_threads",
]
