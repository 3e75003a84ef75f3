"""foveal against its peers on one piece of work: the results are compared first, then the times."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import foveal
from foveal import _core

from .measure import Contender, take_turns
from .show import Row
from .work import (
    TOLERANCE,
    Array,
    Inputs,
    Work,
    foveal_numpy,
    foveal_torch,
    naive_attention,
    numpy_naive,
    onnxruntime_attention,
    torch_sdpa,
)

PEERS: dict[str, Callable[[Work, Sequence[Inputs]], Contender]] = {
    "torch": torch_sdpa,
    "onnxruntime": onnxruntime_attention,
    "numpy": numpy_naive,
}
MODULES = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx"), "numpy": ("numpy",)}
CACHE_NBYTES = 32 << 20  # when the machine does not say


def installed(peer: str) -> bool:
    return all(importlib.util.find_spec(module) for module in MODULES[peer])


def can_hold(dtype: str) -> bool:
    """Whether NumPy has that dtype here: bfloat16 needs ml_dtypes."""
    return dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes") is not None


def peers_of(work: Work) -> list[str]:
    """The installed peers that can do it, in a time and a memory that somebody would wait for."""
    if work.window is not None:
        return []
    able = ["torch"]
    if work.dtype == "float32" and work.num_kv_heads == work.heads:
        able.append("onnxruntime")
        if work.batch * work.heads * work.seqlen * work.num_keys <= 1 << 25:
            able.append("numpy")
    return [peer for peer in able if installed(peer)]


def compare(
    work: Work,
    *,
    peers: Sequence[str] | None = None,
    threads: int | None = None,
    tensors: bool = False,
    in_microseconds: bool = False,
    budget: float = 5.0,
    progress: Callable[[float], object] = lambda fraction: None,
) -> Row:
    """Checks, then times one piece of work. `tensors`: ours is called with torch tensors too."""
    with num_threads(threads) as used:
        inputs = cold_copies(work)
        ours = (foveal_torch if tensors else foveal_numpy)(work, inputs)
        others = {peer: PEERS[peer](work, inputs) for peer in (peers_of(work) if peers is None else peers)}
        check(work, inputs[0], ours, list(others.values()))
        limit = machine_limit(work, used)
        times = take_turns([ours, *others.values()], budget=budget, progress=progress)
        if work.seqlen == 1:  # the bandwidth that a shared machine leaves changes: ask before and after
            limit = max(limit, machine_limit(work, used))
    seconds = times.median(ours.name)
    amount, unit = (work.kv_nbytes, "GB/s") if work.seqlen == 1 else (work.flops, "GF/s")
    return Row(
        label=f"{work}{f' on {used} thread' if threads else ''}{' tensors' * tensors}",
        value=seconds * 1e6 if in_microseconds else amount / seconds / 1e9,
        unit="us" if in_microseconds else unit,
        ratios={peer: times.ratio(contender.name, ours.name) for peer, contender in others.items()},
        limit=None if in_microseconds else amount / seconds / limit,
        detail="; ".join(
            [f"{times.rounds} rounds", f"{len(inputs)} copies", *(other.name for other in others.values())]
        ),
    )


@contextlib.contextmanager
def num_threads(threads: int | None) -> Iterator[int]:
    """Everybody's thread count within; None leaves each its default. Yields foveal's."""
    if threads is None:
        yield foveal.get_num_threads()
        return
    import torch

    before = torch.get_num_threads()
    foveal.set_num_threads(threads)
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        foveal.set_num_threads(None)
        torch.set_num_threads(before)


def cold_copies(work: Work) -> list[Inputs]:
    """For one query, as many copies of the keys and values as leave none of them in the cache; else one."""
    first = work.inputs()
    cold = work.seqlen == 1 and work.kv_nbytes > CACHE_NBYTES // 16
    count = max(1, math.ceil(4 * cache_nbytes() / work.kv_nbytes)) if cold else 1
    return [first, *((first[0].copy(), first[1].copy(), first[2].copy()) for _ in range(count - 1))]


@functools.cache
def cache_nbytes() -> int:
    """Of the last-level cache."""
    with contextlib.suppress(OSError, ValueError):
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size.removesuffix("K")) << 10 for size in sizes)
    return CACHE_NBYTES


def machine_limit(work: Work, threads: int) -> float:
    """Bytes or operations per second, whichever bounds this work."""
    return read_bandwidth(threads) if work.seqlen == 1 else fma_peak(threads)


def read_bandwidth(threads: int) -> float:
    return _core.measure_read_bandwidth(threads, max(256 << 20, 4 * cache_nbytes()))


@functools.cache
def fma_peak(threads: int) -> float:
    return _core.measure_fma_peak(threads, 0.3)


def check(work: Work, inputs: Inputs, ours: Contender, others: Sequence[Contender]) -> None:
    """Ours against a float64 computation of one head's last rows; the peers against ours, everywhere."""
    rows = slice(-64, None)
    q, k, v = (array[:1, :1].astype(np.float64) for array in inputs)
    position = np.arange(work.num_keys - work.seqlen, work.num_keys)[rows, None]
    distance = position - np.arange(work.num_keys)
    hidden = (distance < 0) & work.causal
    if work.window is not None:
        hidden |= distance > work.window
    out = as_numpy(work, ours)
    assert_close("foveal", out[:1, :1, rows], naive_attention(q[:, :, rows], k, v, hidden), TOLERANCE[work.dtype])
    for other in others:
        assert_close(other.name, as_numpy(work, other), out, 2 * TOLERANCE[work.dtype])


def as_numpy(work: Work, contender: Contender) -> Array:
    """One result as a float (B,Hq,Sq,D) array."""
    with contender.within():
        result: Any = contender.call()
        if hasattr(result, "copy_outputs_to_cpu"):  # ONNX Runtime's (B,Sq,Hq*D)
            flat: Array = result.copy_outputs_to_cpu()[0]
            return np.swapaxes(flat.reshape(work.batch, work.seqlen, work.heads, work.head_dim), 1, 2)
        out: Array = (result if isinstance(result, np.ndarray) else result.float().numpy()).astype(np.float32)
        return out.reshape(work.batch, work.heads, work.seqlen, work.head_dim)


def assert_close(name: str, found: Array, expected: Array, tolerance: float) -> None:
    error = float(np.abs(found - expected).max()) / float(np.abs(expected).max())
    if not error <= tolerance:
        raise RuntimeError(
            f"bench: the result of {name} is off by {error:.1e} of its largest, expected {tolerance:.1e}"
        )
