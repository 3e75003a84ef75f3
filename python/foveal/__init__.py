"""Exact blocked attention on the CPU, for NumPy, PyTorch and every library that speaks DLPack."""

from foveal._attention import Attention, attention
from foveal._runtime import Info, get_num_threads, info, set_num_threads

__version__ = "0.1.0"

__all__ = ["Attention", "Info", "__version__", "attention", "get_num_threads", "info", "set_num_threads"]
