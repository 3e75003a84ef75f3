"""Forward and backward against PyTorch's scaled_dot_product_attention: gradients are compared first, then times.

A call is what a training step asks of an attention layer: the output with its graph, then the gradients of q, k and v.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveal
from foveal import _core
from foveal._bench.measure import Contender, accepted, take_turns
from foveal._bench.show import Row
from foveal._bench.work import TOLERANCE, Work, as_torch

PASSES = 3.5  # the operations of both passes, in forward passes: two products forward, five backward


def train(work: Work, budget: float, progress: Callable[[float], object]) -> Row:
    q, k, v = (as_torch(array) for array in work.inputs())
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    ours = step("foveal", lambda q, k, v: foveal.attention(q, k, v, causal=work.causal), q, k, v, dout)
    found = ours.call()
    _check("foveal", [x[:1, :1] for x in found], _exact(work, q, k, v, dout), 4 * TOLERANCE[work.dtype])
    others = accepted(
        _torch_ways(work, q, k, v, dout),
        lambda way, theirs: _check(way.name, theirs, found, 8 * TOLERANCE[work.dtype]),
    )
    threads = foveal.get_num_threads()
    bound = Contender("machine", lambda: _core.run_fmas(threads, PASSES * work.flops))
    times = take_turns([ours, *others, bound], budget=budget, progress=progress)
    return Row(
        label=f"{work}, forward and backward",
        value=PASSES * work.flops / times.median(ours.name) / 1e9,
        unit="GF/s",
        ratios={"torch": times.ratio(times.best(others).name, ours.name)},
        limit=times.ratio(bound.name, ours.name).median,
        detail=f"{times.rounds} rounds",
        tried={"torch": [{way.name: times.median(way.name) for way in others}]},
    )


def step(
    name: str,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Contender:
    """Forward and backward on these tensors, in the memory layout that they have."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return Contender(name, lambda: torch.autograd.grad(attention(*leaves), leaves, dout), within)


def _torch_ways(work: Work, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Iterator[Contender]:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    backends = [None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    if work.batch * work.heads * work.seqlen**2 <= 1 << 25:  # it holds all scores; beyond, nobody would wait for it
        backends.append(SDPBackend.MATH)
    for backend, layout in itertools.product(backends, ("bhsd", "bshd")):
        stored = [x if layout == "bhsd" else x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
        context = contextlib.nullcontext if backend is None else lambda backend=backend: sdpa_kernel(backend)
        name = f"torch[{backend.name if backend else 'default'}, {layout}]"
        yield step(name, lambda q, k, v: sdpa(q, k, v, is_causal=work.causal), *stored, within=context)


def _exact(work: Work, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the first head by the plain formula in float64."""
    q, k, v, dout = (x[:1, :1].double().requires_grad_() for x in tensors)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if work.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.autograd.grad(scores.softmax(-1) @ v, (q, k, v), dout.detach())


def _check(name: str, found: Any, expected: Any, tolerance: float) -> None:
    for what, x, y in zip(("dq", "dk", "dv"), found, expected, strict=True):
        error = ((x.double() - y.double()).abs().max() / y.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(
                f"bench: {what} of {name} is off by {error:.1e} of its largest, expected {tolerance:.1e}"
            )
