"""PyTorch's scaled_dot_product_attention by each backend, and the formula in eager mode; in inference mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from ..work import Inputs, Way, Work, as_float32, as_torch, cycled, thread_counts, visible, way_name, without_groups


def ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sdpa = torch.nn.functional.scaled_dot_product_attention
    backends = (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    bias = None
    if work.causal:
        bias = torch.zeros(work.seqlen, work.num_keys, dtype=getattr(torch, work.dtype))
        bias.masked_fill_(torch.from_numpy(~visible(work)), -torch.inf)

    def formula(q: Any, k: Any, v: Any) -> Any:
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        return (scores if bias is None else scores.add_(bias)).softmax(-1) @ v

    @contextlib.contextmanager
    def within(threads: int, backend: SDPBackend | None) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.inference_mode(), sdpa_kernel(backend) if backend else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)

    arranged = [(name, False, _tensors(some)) for name, some in without_groups(work, inputs)]
    if work.num_kv_heads != work.heads:
        arranged.append(("enable_gqa", True, _tensors(inputs)))
    for threads in thread_counts(work):
        for name, gqa, tensors in arranged:
            attend = functools.partial(sdpa, is_causal=work.causal, enable_gqa=gqa)
            for backend in backends:
                called = way_name("torch", backend.name if backend else "default", name, threads=threads)
                context = functools.partial(within, threads, backend)
                yield Way(called, cycled(attend, tensors), context, _read)
            if not gqa:
                called = way_name("torch", "formula", name, threads=threads)
                yield Way(called, cycled(formula, tensors), functools.partial(within, threads, None), _read)


def _tensors(inputs: Sequence[Inputs]) -> list[tuple[Any, ...]]:
    return [tuple(map(as_torch, triple)) for triple in inputs]


def _read(out: Any) -> Any:
    return as_float32(out.float())
