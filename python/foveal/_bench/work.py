"""One attention problem as foveal and its peers are asked to solve it, and how many operations and bytes that takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import foveal

from .measure import Contender

Array = NDArray[Any]
Inputs = tuple[Array, Array, Array]  # q, k, v in layout bhsd

# Rounding once to the dtype costs half a unit in the last place; the rest is room for another order of summation.
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Work:
    """B, Hq, Sq, D and the rest; square and of equal heads unless said otherwise, causal aligned bottom-right."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    window: int | None = None  # keys to the left
    seqlen_kv: int | None = None
    kv_heads: int | None = None
    normalizer: str = "softmax"  # or "entmax15"

    def __str__(self) -> str:
        text = f"({self.batch},{self.heads},{self.seqlen},{self.head_dim})"
        if self.kv_heads:
            text += f" kv heads {self.kv_heads}"
        if self.seqlen_kv:
            text += f" keys {self.seqlen_kv}"
        text += {"float32": " f32", "float16": " f16", "bfloat16": " bf16"}[self.dtype]
        text += "" if self.normalizer == "softmax" else f" {self.normalizer}"
        return text + " causal" * self.causal + (f" window {self.window}" if self.window else "")

    @property
    def num_keys(self) -> int:
        return self.seqlen_kv or self.seqlen

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def num_scores(self) -> int:
        return self.batch * self.heads * self.seqlen * self.num_keys

    @property
    def flops(self) -> float:
        """2D for the score and 2D for the value of each visible (query, key); masked pairs are not counted."""
        last = np.arange(self.num_keys - self.seqlen, self.num_keys) if self.causal else np.full(1, self.num_keys - 1)
        first = np.maximum(last - self.window, 0) if self.window is not None else 0
        visible = float((last - first + 1).sum()) * (1 if self.causal else self.seqlen)
        return 4.0 * self.head_dim * self.batch * self.heads * visible

    @property
    def kv_nbytes(self) -> int:
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.batch * self.num_kv_heads * self.num_keys * self.head_dim * itemsize

    def inputs(self, seed: int = 0) -> Inputs:
        rng = np.random.default_rng(seed)
        kv_shape = (self.batch, self.num_kv_heads, self.num_keys, self.head_dim)
        shapes = ((self.batch, self.heads, self.seqlen, self.head_dim), kv_shape, kv_shape)
        q, k, v = (rng.standard_normal(shape, np.float32).astype(numpy_dtype(self.dtype)) for shape in shapes)
        return q, k, v


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; bfloat16 needs ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


def as_torch(array: Array) -> Any:
    """The same memory as a torch tensor."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def cycled(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """function(*inputs) of the next inputs in turn: more of them than the cache holds leaves it cold."""
    if len(inputs) == 1:
        q, k, v = inputs[0]
        return lambda: function(q, k, v)
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))


def without_groups(work: Work, inputs: Sequence[Inputs]) -> Iterator[tuple[str, list[Inputs]]]:
    """The same work for those who know no groups of query heads, by name; results have the same elements in a row."""
    group = work.heads // work.num_kv_heads
    if group == 1:
        yield "", list(inputs)
        return
    yield "keys and values expanded", [(q, k.repeat(group, 1), v.repeat(group, 1)) for q, k, v in inputs]
    if work.seqlen == 1:  # the queries of a group as rows of one head: what a careful user would write
        shape = (work.batch, work.num_kv_heads, group, work.head_dim)
        yield "group folded into the queries", [(q.reshape(shape), k, v) for q, k, v in inputs]


def thread_counts(work: Work) -> list[int]:
    """As many threads as foveal may use; one, too, for work that may not be worth waking the others."""
    threads = foveal.get_num_threads()
    return [threads, 1] if threads > 1 and work.flops < 1e8 else [threads]


def visible(work: Work) -> Array:
    """The causal mask (Sq,Skv): True where a query sees a key."""
    return np.tri(work.seqlen, work.num_keys, work.num_keys - work.seqlen, dtype=bool)


def way_name(peer: str, *details: str, threads: int | None = None) -> str:
    """As the report shows it; `threads` where it is a choice."""
    count = "" if threads is None or threads == foveal.get_num_threads() else f"{threads} thread"
    return f"{peer}[{', '.join(filter(None, (*details, count)))}]"


def as_float32(result: Any) -> Array:
    return np.asarray(result).astype(np.float32, copy=False)


@dataclass(frozen=True)
class Way(Contender):
    """One way to do one piece of work. `read` makes a float32 array of what `call` returned, in layout bhsd."""

    read: Callable[[Any], Array] = as_float32

    def array(self, work: Work, result: Any) -> Array:
        """What a call returned, as (B,Hq,Sq,D)."""
        return self.read(result).reshape(work.batch, work.heads, work.seqlen, work.head_dim)

    def result(self, work: Work) -> Array:
        with self.within():
            return self.array(work, self.call())


def foveal_numpy(work: Work, inputs: Sequence[Inputs]) -> Way:
    options: dict[str, Any] = {"causal": True} if work.causal else {}
    if work.window is not None:
        options["window"] = (work.window, None)
    if work.normalizer != "softmax":
        options["normalizer"] = work.normalizer
    return Way("foveal", cycled(lambda q, k, v: foveal.attention(q, k, v, **options), inputs))


def foveal_torch(work: Work, inputs: Sequence[Inputs]) -> Way:
    """foveal.attention on tensors."""
    import torch

    options: dict[str, Any] = {"causal": True} if work.causal else {}
    tensors = [tuple(map(as_torch, triple)) for triple in inputs]
    call = cycled(lambda q, k, v: foveal.attention(q, k, v, **options), tensors)
    return Way("foveal", call, torch.inference_mode, lambda out: as_float32(out.float()))
