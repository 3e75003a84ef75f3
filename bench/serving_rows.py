"""The rows of the report about sequences of different lengths: packed one after another, and in a cache of pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import foveal
from foveal import _core
from foveal._bench.compare import assert_close
from foveal._bench.measure import Contender, take_turns
from foveal._bench.show import Row
from foveal._bench.work import TOLERANCE

Progress = Callable[[float], object]

PACKED_LENS = [round(n) for n in np.geomspace(32, 2048, 16)]
CACHE_LENS = [round(n) for n in np.linspace(512, 8192, 8)]
PAGE_SIZE = 16
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def packed_sequences(budget: float, progress: Progress, *, dtype: str) -> Row:
    """Self-attention within 16 sequences, against SDPA on a padded batch with a mask, and against a call for each."""
    heads, head_dim = 8, 64
    lens = np.random.default_rng(0).permutation(PACKED_LENS).tolist()
    begins = torch.tensor([0, *lens]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lens), heads, head_dim, generator=generator).to(getattr(torch, dtype)) for _ in range(3))
    padded = [torch.zeros(len(lens), heads, max(lens), head_dim, dtype=q.dtype) for _ in range(3)]
    for b, n in enumerate(lens):
        for array, x in zip(padded, (q, k, v), strict=True):
            array[b, :, :n] = x[begins[b] : begins[b] + n].transpose(0, 1)
    mask = (torch.arange(max(lens)) < torch.tensor(lens)[:, None])[:, None, None]
    alone = [[array[b : b + 1, :, :n].contiguous() for array in padded] for b, n in enumerate(lens)]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    contenders = [
        Contender("foveal", lambda: foveal.attention_varlen(q, k, v, begins, begins), torch.inference_mode),
        Contender("torch padded", lambda: sdpa(*padded, attn_mask=mask), torch.inference_mode),
        Contender("torch call by call", lambda: [sdpa(*x) for x in alone], torch.inference_mode),
    ]
    ours, in_a_batch, one_by_one = (contender.call() for contender in contenders)
    for b, n in enumerate(lens):
        own = ours[begins[b] : begins[b] + n].transpose(0, 1).float().numpy()
        assert_close("torch padded", in_a_batch[b, :, :n].float().numpy(), own, 2 * TOLERANCE[dtype])
        assert_close("torch call by call", one_by_one[b][0].float().numpy(), own, 2 * TOLERANCE[dtype])
    flops = 4.0 * heads * head_dim * sum(n * n for n in lens)
    contenders.append(Contender("machine", lambda: _core.run_fmas(foveal.get_num_threads(), flops)))
    times = take_turns(contenders, budget=2 * budget, progress=progress)
    return Row(
        f"16 packed sequences of 32 to 2048 tokens, ({heads},{head_dim}) {_short(dtype)}",
        flops / times.median("foveal") / 1e9,
        "GF/s",
        {name: times.ratio(name, "foveal") for name in ("torch padded", "torch call by call")},
        times.ratio("machine", "foveal").median,
        f"{sum(lens)} tokens, {len(lens) * max(lens)} padded; {times.rounds} rounds",
    )


def paged_decode(budget: float, progress: Progress) -> Row:
    """A token more for each of 8 sequences of 512 to 8192 tokens in pages of 16."""
    q, pages, table = _paged_cache()
    ours = _decode("foveal", q, pages, table)
    alone = torch.cat(
        [
            foveal.attention(q[b : b + 1], *_gathered(pages, table[b], n), layout="bshd")
            for b, n in enumerate(CACHE_LENS)
        ]
    )
    assert_close("foveal", ours.call().float().numpy(), alone.float().numpy(), 0.0)
    times = take_turns([ours, _reading(pages)], budget=budget, progress=progress)
    return _decode_row("bf16", pages, times.median("foveal"), {}, times)


def paged_int8_decode(budget: float, progress: Progress) -> Row:
    """The same with an int8 cache, against the bfloat16 one."""
    q, pages, table = _paged_cache()
    codes, scales = zip(*(_quantized(x) for x in pages), strict=True)
    ours = _decode("foveal", q, codes, table, k_scale=scales[0], v_scale=scales[1])
    own = _decode("own bf16 cache", q, pages, table)
    assert_close("foveal", ours.call().float().numpy(), own.call().float().numpy(), 0.03)
    times = take_turns([ours, own, _reading(codes)], budget=2 * budget, progress=progress)
    ratios = {"own bf16 cache": times.ratio("own bf16 cache", "foveal")}
    return _decode_row("int8", codes, times.median("foveal"), ratios, times)


def _decode_row(dtype: str, pages: Any, seconds: float, ratios: Any, times: Any) -> Row:
    nbytes = sum(x.nbytes for x in pages)
    return Row(
        f"8 sequences of 512 to 8192 keys, pages of {PAGE_SIZE}, ({HEADS}/{KV_HEADS},{HEAD_DIM}) {dtype}",
        nbytes / seconds / 1e9,
        "GB/s",
        ratios,
        times.ratio("machine", "foveal").median,
        f"{nbytes >> 20} MiB of keys and values; {times.rounds} rounds",
    )


def _paged_cache() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """(q, (k pages, v pages), table), the pages in random order."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-n // PAGE_SIZE) for n in CACHE_LENS]
    order = torch.randperm(sum(counts), generator=generator, dtype=torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for b, (some, count) in enumerate(zip(order.split(counts), counts, strict=True)):
        table[b, :count] = some
    shape = (sum(counts), PAGE_SIZE, KV_HEADS, HEAD_DIM)
    k, v = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    q = torch.randn(len(counts), 1, HEADS, HEAD_DIM, generator=generator).bfloat16()
    return q, (k, v), table


def _quantized(pages: Tensor) -> tuple[Tensor, Tensor]:
    scale = pages.float().abs().amax((1, 3)) / 127
    return (pages.float() / scale[:, None, :, None]).round().to(torch.int8), scale


def _gathered(pages: Any, own: Tensor, length: int) -> list[Tensor]:
    count = -(-length // PAGE_SIZE)
    return [x[own[:count].long()].flatten(0, 1)[None, :length] for x in pages]


def _decode(name: str, q: Tensor, pages: Any, table: Tensor, **scales: Tensor) -> Contender:
    lens = torch.tensor(CACHE_LENS, dtype=torch.int32)

    def call() -> Any:
        return foveal.attention_kvcache(q, *pages, cache_lens=lens, block_table=table, **scales)

    return Contender(name, call, torch.inference_mode)


def _reading(pages: Any) -> Contender:
    arrays = [x.view(torch.uint8).numpy() for x in pages]
    threads = foveal.get_num_threads()
    return Contender("machine", lambda: [_core.read_bytes(threads, x) for x in arrays])


def _short(dtype: str) -> str:
    return {"float32": "f32", "bfloat16": "bf16"}[dtype]
