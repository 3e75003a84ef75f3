"""Additive attention, gates, spans and statistics, against the formula in PyTorch or against the plain call.

    python bench/mechanism_rows.py [--processes 3] [--seconds 10] [--quick]

Every row takes turns in one process. What is printed is the worst median of the processes, with their range: how many
times as fast as the formula, or of the plain call's time. Memory is what a process adds to its peak by one call.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import foveal
from turns import in_a_process, show, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3, help="fresh processes, of which the worst counts")
    parser.add_argument("--seconds", type=float, default=10, help="for the turns of each row of a process")
    parser.add_argument("--quick", action="store_true", help="one short process, of small arrays")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=memory_rows(1), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(extra_memory(memory_rows(1)[arguments.memory])))
    elif arguments.one:
        print(json.dumps(rows(arguments.seconds, 1)))
    elif arguments.quick:
        show([rows(0.2, 8)])
    else:
        command = [__file__, "--seconds", str(arguments.seconds)]
        show([in_a_process(*command, "--one") for _ in range(arguments.processes)])
        for name in memory_rows(1):
            print(f"  {name:58} {in_a_process(*command, '--memory', name):8.1f} MiB beside the arrays")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def rows(seconds: float, part: int) -> dict[str, float]:
    """Ratios of medians by name; sequences are cut to one of ``part`` parts."""
    ratios = additive(seconds, 256 // part)
    q, k, v = randn(3, 1, 8, 4096 // part, 64).unbind()
    plain: dict[str, Callable[[], Any]] = {"plain": lambda: foveal.attention(q, k, v)}  # of what q, k and v are then
    ways = plain | {
        "return_stats": lambda: foveal.attention(q, k, v, return_stats=True),
        "attention_stats, top_k=8": lambda: foveal.attention_stats(q, k, top_k=8),
    }
    times = take_turns(ways, seconds)
    ratios |= {f"{way}, of the forward pass's time": times[way] / times["plain"] for way in ways if way != "plain"}
    for name in ("sparsemax", "entmax15", "sigmoid", "relu"):
        times = take_turns(
            {
                "plain": lambda name=name: foveal.attention(q, k, v, normalizer=name),
                "stats": lambda name=name: foveal.attention(q, k, v, normalizer=name, return_stats=True),
            },
            seconds,
        )
        ratios[f"return_stats, {name}, of the forward pass's time"] = times["stats"] / times["plain"]
    q, k, v = (x[:, :, : 2048 // part].contiguous() for x in (q, k, v))
    tau, z = randn(1, 8, 2048 // part), torch.full((8,), 2048.0 // part)
    ways = plain | {
        "gate": lambda: foveal.attention(q, k, v, gate=(tau, 0.5)),
        "span of all": lambda: foveal.attention(q, k, v, causal=True, q_offset=0, span=(z, 32.0)),
        "span of 256": lambda: foveal.attention(q, k, v, causal=True, q_offset=0, span=(z * 0 + 224.0, 32.0)),
        "causal": lambda: foveal.attention(q, k, v, causal=True, q_offset=0),
    }
    times = take_turns(ways, seconds)
    ratios["gate, of the forward pass's time"] = times["gate"] / times["plain"]
    ratios["span of all keys, causal, of the causal pass's time"] = times["span of all"] / times["causal"]
    ratios["span of 256, causal, against the causal pass"] = times["causal"] / times["span of 256"]
    ratios["span of 256, causal, against the full pass"] = times["plain"] / times["span of 256"]
    eager, stats = (f() for f in memory_rows(part).values())
    times = take_turns({"eager": eager, "stats": stats}, seconds)
    ratios["return_stats (8,12,512,64), against eager's weights"] = times["eager"] / times["stats"]
    return ratios


def additive(seconds: float, seqlen: int) -> dict[str, float]:
    q, k, v = randn(3, 4, 8, seqlen, 64).unbind()
    leaves = [q, k, v, randn(64, 64) / 8, randn(64, 64).mT / 8, randn(64)]

    def formula(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, u: Tensor) -> Tensor:
        hidden = torch.tanh((q @ w_q)[:, :, :, None] + (k @ w_k)[:, :, None])
        return torch.softmax(hidden @ u, -1) @ v

    torch.testing.assert_close(foveal.additive_attention(*leaves), formula(*leaves), rtol=1e-4, atol=1e-5)
    learned = [x.detach().requires_grad_() for x in leaves]
    ratios = {}
    for what, call in (
        ("forward", lambda f: f(*leaves)),
        ("forward and backward", lambda f: torch.autograd.grad(f(*learned).sum(), learned)),
    ):
        ways = {
            "ours": lambda call=call: call(foveal.additive_attention),
            "formula": lambda call=call: call(formula),
        }
        times = take_turns(ways, seconds)
        ratios[f"additive (4,8,256,64), A=64, {what}, against the formula"] = times["formula"] / times["ours"]
    return ratios


def memory_rows(part: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What makes a call each: eager's weights and their entropy, and ours."""

    def arrays() -> tuple[Tensor, ...]:
        return randn(3, 8, 12, 512 // part, 64).unbind()

    def eager() -> Callable[[], Any]:
        q, k, v = arrays()

        def call() -> Any:  # transformers.integrations' eager attention, then the entropy of what it returns
            weights = torch.softmax(q @ k.mT * 0.125, dim=-1, dtype=torch.float32)
            return weights @ v, -(weights * weights.clamp_min(1e-38).log()).sum(-1)

        return call

    def ours() -> Callable[[], Any]:
        q, k, v = arrays()
        return lambda: foveal.attention(q, k, v, return_stats=True)

    return {"eager weights and their entropy, (8,12,512,64)": eager, "return_stats, (8,12,512,64)": ours}


def extra_memory(make: Callable[[], Callable[[], Any]]) -> float:
    """MiB that a call adds to the peak of the process."""
    call = make()
    foveal.attention(*(torch.randn(1, 1, 4, 64) for _ in range(3)), return_stats=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
