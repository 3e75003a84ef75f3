"""What bench/queues_report.py compares: foveal's queues and others, with the same two methods for the same work.

The loops are written as a user would write them, with what is looked up outside of the loop where that is possible.
"""

from __future__ import annotations

import ctypes
import functools
import heapq
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import foveal

ROOT = Path(__file__).parents[1]


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


Keys = Sequence[Any]
Numbers = Sequence[float]


class Queue:
    def __init__(self, keys: Keys, priorities: Numbers) -> None:
        raise NotImplementedError

    def update(self, keys: Keys, priorities: Numbers) -> None:
        raise NotImplementedError

    def pop_push(self, priorities: Numbers) -> list[Any]:
        """Take the first out and put it back with another priority; returns the keys in their order."""
        raise NotImplementedError


class IndexedHeap(Queue):
    def __init__(self, keys: Keys, priorities: Numbers) -> None:
        self.heap = foveal.IndexedHeap.from_arrays(np.array(keys), np.array(priorities))

    def update(self, keys: Keys, priorities: Numbers) -> None:
        update = self.heap.update
        for key, priority in zip(keys, priorities, strict=True):
            update(key, priority)

    def pop_push(self, priorities: Numbers) -> list[Any]:
        pop, push, popped = self.heap.pop, self.heap.push, []
        for priority in priorities:
            key, _ = pop()
            push(key, priority)
            popped.append(key)
        return popped


class Mapping(Queue):
    """What has the interface of a dict, and popitem."""

    make: Callable[[dict[Any, float]], Any]

    def __init__(self, keys: Keys, priorities: Numbers) -> None:
        self.map = type(self).make(dict(zip(keys, priorities, strict=True)))

    def update(self, keys: Keys, priorities: Numbers) -> None:
        of = self.map
        for key, priority in zip(keys, priorities, strict=True):
            of[key] = priority

    def pop_push(self, priorities: Numbers) -> list[Any]:
        of, popped = self.map, []
        for priority in priorities:
            key, _ = of.popitem()
            of[key] = priority
            popped.append(key)
        return popped


class PriorityMap(Mapping):
    make = foveal.PriorityMap


class PqDict(Mapping):
    @staticmethod
    def make(data: dict[Any, float]) -> Any:
        from pqdict import pqdict

        return pqdict(data)


class HeapDict(Mapping):
    @staticmethod
    def make(data: dict[Any, float]) -> Any:
        from heapdict import heapdict

        made = heapdict()
        made.update(data)
        return made


class LazyHeapq(Queue):
    """heapq as its documentation advises: outdated entries stay until they come up, or until they are the most."""

    def __init__(self, keys: Keys, priorities: Numbers) -> None:
        self.of = dict(zip(keys, priorities, strict=True))
        self.tidy()

    def tidy(self) -> None:
        self.heap = [(priority, key) for key, priority in self.of.items()]
        heapq.heapify(self.heap)

    def update(self, keys: Keys, priorities: Numbers) -> None:
        of, heap, push = self.of, self.heap, heapq.heappush
        for key, priority in zip(keys, priorities, strict=True):
            of[key] = priority
            push(heap, (priority, key))
        if len(heap) > 2 * len(of):
            self.tidy()

    def pop_push(self, priorities: Numbers) -> list[Any]:
        of, heap, push, pop, popped = self.of, self.heap, heapq.heappush, heapq.heappop, []
        for fresh in priorities:
            while True:
                priority, key = pop(heap)
                if of.get(key) == priority:
                    break
            of[key] = fresh
            push(heap, (fresh, key))
            popped.append(key)
        return popped


PEERS: dict[str, type[Queue]] = {
    "lazy heapq": LazyHeapq,
    **({"pqdict": PqDict} if installed("pqdict") else {}),
    **({"heapdict": HeapDict} if installed("heapdict") else {}),
}


class CppLoop:
    """The updates in a C++ loop, compiled here."""

    def __init__(self, ids: Any, priorities: Any) -> None:
        self.library = compiled_loop()
        self.heap = ctypes.c_void_p(self.library.heap_new(address(ids), address(priorities), ctypes.c_int64(len(ids))))

    def update_many(self, ids: Any, priorities: Any) -> None:
        self.library.heap_update(self.heap, address(ids), address(priorities), ctypes.c_int64(len(ids)))

    def pop(self) -> int:
        return int(self.library.heap_pop(self.heap))


def address(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def compiled_loop() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "heap_loop.so"
        flags = ["-std=c++20", "-O3", "-DNDEBUG", "-shared", "-fPIC", f"-I{ROOT / 'cpp' / 'include'}"]
        subprocess.run(["c++", *flags, ROOT / "bench" / "heap_loop.cc", "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.heap_new.restype = ctypes.c_void_p
    loaded.heap_pop.restype = ctypes.c_int64
    return loaded


def torchrl_tree(capacity: int) -> Any:
    """Torchrl's SumSegmentTree, without the rest of torchrl."""
    spec = importlib.util.find_spec("torchrl")
    if spec is None or not spec.submodule_search_locations:
        return None
    for path in Path(spec.submodule_search_locations[0]).glob("_torchrl*.so"):
        import torch  # noqa: F401 - loads what the extension needs

        extension = importlib.util.spec_from_file_location("_torchrl", path)
        if extension is None or extension.loader is None:
            continue
        try:
            module = importlib.util.module_from_spec(extension)
        except ImportError as error:  # built for another torch
            print(f"torchrl is left out: {str(error)[:200]}", file=sys.stderr)
            return None
        extension.loader.exec_module(module)
        return module.SumSegmentTreeFp64(capacity)
    return None
