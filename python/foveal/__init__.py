"""Exact blocked attention on the CPU, and priority queues on a lock-free heap, for NumPy, PyTorch and DLPack arrays."""

from foveal._attention import Attention, attention
from foveal._core import Empty, IndexedHeap
from foveal._runtime import Info, get_num_threads, info, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "Empty",
    "IndexedHeap",
    "Info",
    "__version__",
    "attention",
    "get_num_threads",
    "info",
    "set_num_threads",
]
