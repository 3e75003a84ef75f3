"""The normalisers against the `entmax` package in the plain formula, and against our own softmax.

    python bench/normalizer_rows.py [--processes 3] [--seconds 20] [--quick | --breadth]

Every row takes turns in one process: ours and each way of the peer. What is printed is the worst median of the
processes, with their range. The package's functions are exact (sorting; with a bound `k` on the keys that have weight,
as its documentation advises) or bisect; each is tried. Results are compared before times are.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import foveal
from turns import in_a_process, show, take_turns

SHAPE = (1, 8, 2048, 64)
SPARSE = {"sparsemax": 64, "entmax15": 512}  # with the k that leaves this work exact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=3, help="fresh processes, of which the worst counts")
    parser.add_argument("--seconds", type=float, default=20, help="for the turns of each row of a process")
    parser.add_argument("--quick", action="store_true", help="one short process, of small arrays")
    parser.add_argument("--breadth", action="store_true", help="print how many keys have weight, and the breadth")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=foveal._core.NORMALIZERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(extra_memory(arguments.memory)))
    elif arguments.one:
        print(json.dumps(rows(arguments.seconds, SHAPE)))
    elif arguments.breadth:
        breadth()
    elif arguments.quick:
        show([rows(0.5, (1, 2, 256, 32))])
    else:
        command = [__file__, "--seconds", str(arguments.seconds)]
        show([without_ways(in_a_process(*command, "--one")) for _ in range(arguments.processes)])
        for name in ("softmax", *SPARSE):
            mib = in_a_process(*command, "--memory", name)
            print(f"  {name:58} {mib:6.1f} MiB beside the arrays at (1,8,16384,64)")


def without_ways(found: dict[str, float]) -> dict[str, float]:
    """Name rows without the way that was the peer's best, which differs from process to process."""
    return {name.replace(" (sorting)", "").replace(" (bisection)", ""): ratio for name, ratio in found.items()}


def rows(seconds: float, shape: tuple[int, ...]) -> dict[str, float]:
    """Ratios of medians by name: how many times as fast as a peer, or as long as softmax, ours is."""
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=g) for _ in range(4))
    ratios = {}
    for name, bound in SPARSE.items():
        peers = peers_of(name, min(bound, shape[2]))
        for what, step in (("forward", forward), ("forward and backward", both)):
            ways = {"ours": step(ours(name), q, k, v, dout), "softmax": step(ours("softmax"), q, k, v, dout)}
            for way, attention in peers.items():
                ways[way] = step(attention, q, k, v, dout)
            check(name, ways)
            times = take_turns(ways, seconds)
            exact = min((way for way in peers if "k=" not in way and way in ways), key=times.__getitem__)
            ratios[f"{name}, {what}, against entmax ({exact})"] = times[exact] / times["ours"]
            limited = next(way for way in peers if "k=" in way)
            ratios[f"{name}, {what}, against entmax ({limited})"] = times[limited] / times["ours"]
            ratios[f"{name}, {what}, of softmax's time"] = times["ours"] / times["softmax"]
    names = ("relu", "sigmoid", "normalized_sigmoid")
    for what, step in (("forward", forward), ("forward and backward", both)):
        ways = {name: step(ours(name), q, k, v, dout) for name in ("softmax", *names)}
        times = take_turns(ways, seconds)
        ratios |= {f"{name}, {what}, of softmax's time": times[name] / times["softmax"] for name in names}
    return ratios


def ours(name: str) -> Callable[..., Tensor]:
    return lambda q, k, v: foveal.attention(q, k, v, normalizer=name)


def peers_of(name: str, bound: int) -> dict[str, Callable[..., Tensor]]:
    try:
        import entmax
    except ImportError:
        raise SystemExit("normalizer_rows: the peer is absent, expected `pip install entmax`") from None
    functions = {
        "sorting": lambda s: getattr(entmax, name)(s, dim=-1),
        f"sorting, k={bound}": lambda s: getattr(entmax, name)(s, dim=-1, k=bound),
        "bisection": lambda s: (
            entmax.sparsemax_bisect(s, dim=-1) if name == "sparsemax" else entmax.entmax_bisect(s, alpha=1.5, dim=-1)
        ),
    }

    def formula(f: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: f(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) @ v

    return {way: formula(f) for way, f in functions.items()}


def forward(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return (attention(q, k, v),)

    return call


def both(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)


def check(name: str, ways: dict[str, Callable[[], Any]]) -> None:
    """Compare results; leave out an exact way of the peer that takes more than twice as long as the other one."""
    found = ways["ours"]()
    seconds = {}
    for way in [way for way in ways if way not in ("ours", "softmax")]:
        start = time.perf_counter()
        results = ways[way]()
        seconds[way] = time.perf_counter() - start
        for x, y in zip(found, results, strict=True):
            error = ((x - y).abs().max() / y.abs().max()).item()
            if not error <= 1e-3:  # a key at the threshold may fall on either side
                raise RuntimeError(f"bench: {name} by {way} is off by {error:.1e} of its largest, expected 1e-3")
    exact = {way: found for way, found in seconds.items() if "k=" not in way}
    for way, found in exact.items():
        if found > 2 * min(exact.values()):
            del ways[way]


def extra_memory(name: str) -> float:
    """MiB that a call at S=16384 takes beyond its arrays."""
    q, k, v, out = (np.random.default_rng(0).standard_normal((1, 8, 16384, 64), dtype=np.float32) for _ in range(4))
    foveal.attention(q[:, :, :16], k, v)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    foveal.attention(q, k, v, normalizer=name, out=out)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def breadth() -> None:
    """Print the share of keys with weight and exp(entropy) of the mean row of standard normal scores."""
    scores = np.random.default_rng(0).standard_normal((1, 64, 1, 2048))
    q, k = np.zeros((1, 64, 1, 1)), np.zeros((1, 64, 2048, 1))
    for name in foveal._core.NORMALIZERS:
        weights = foveal.attention(q, k, k, bias=scores, normalizer=name, return_weights=True).weights
        p = weights / weights.sum(-1, keepdims=True)
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
        print(f"{name:20} {(weights > 0).mean():8.2%} {np.exp(entropy).mean():8.1f}")


if __name__ == "__main__":
    main()
