"""Priority queues: a heap, a mapping that pops in order, queues for threads and for asyncio, a tree to sample from."""

from __future__ import annotations

from foveal._core import Empty, IndexedHeap
from foveal._queues.async_queue import AsyncPriorityQueue
from foveal._queues.priority_map import PriorityMap
from foveal._queues.priority_queue import PriorityQueue
from foveal._queues.rules import ShutDown
from foveal._queues.sum_tree import SumTree

__all__ = ["AsyncPriorityQueue", "Empty", "IndexedHeap", "PriorityMap", "PriorityQueue", "ShutDown", "SumTree"]
