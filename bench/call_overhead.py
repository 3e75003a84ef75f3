"""The cost of one call of foveal.attention on arrays so small that the arithmetic hardly counts.

    python bench/call_overhead.py

Prints microseconds a call, the median over rounds in which the contenders take turns, and the spread (quartiles).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np

import foveal
from foveal import _core


def per_call(function: Callable[[], object], calls: int) -> float:
    """Microseconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def contenders(batch_shape: tuple[int, ...], num_keys: int, head_dim: int) -> dict[str, Callable[[], object]]:
    """Make calls that compute the same, by name."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((*batch_shape, 1, head_dim), dtype=np.float32)
    k = rng.standard_normal((*batch_shape, num_keys, head_dim), dtype=np.float32)
    v = rng.standard_normal((*batch_shape, num_keys, head_dim), dtype=np.float32)
    out = np.empty_like(q)
    options = (None, None, False, None, (None, None), None, 0.0, None, None, None, None, 0.0, None)
    defaults = (*options, "bhsd", None, False, False)

    def naive() -> object:
        scores = q @ k.swapaxes(-1, -2) * (head_dim**-0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    expected = naive()
    functions: dict[str, Callable[[], object]] = {
        "numpy call": lambda: foveal.attention(q, k, v),
        "numpy call, causal and out=": lambda: foveal.attention(q, k, v, causal=True, out=out),
        "numpy call, lse": lambda: foveal.attention(q, k, v, return_lse=True),
        "  of which the native function": lambda: _core.attention(q, k, v, *defaults),
        "plain NumPy": naive,
    }
    try:
        import torch
    except ImportError:
        pass
    else:
        tq, tk, tv = (torch.from_numpy(array) for array in (q, k, v))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        functions["torch scaled_dot_product_attention"] = lambda: sdpa(tq, tk, tv)
        if importlib.util.find_spec("foveal.torch") is not None:
            functions["torch call"] = lambda: foveal.attention(tq, tk, tv)
    for name, function in functions.items():
        if "lse" not in name:
            np.testing.assert_allclose(np.asarray(function()), expected, atol=1e-5, err_msg=name)
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=2000)
    arguments = parser.parse_args()
    print(foveal.info())
    for batch_shape, num_keys, head_dim in (((1, 1), 1, 8), ((1, 8), 64, 64)):
        functions = contenders(batch_shape, num_keys, head_dim)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(arguments.rounds):
            for name, function in functions.items():
                times[name].append(per_call(function, arguments.calls))
        print(f"\none query, (B, H) {batch_shape}, {num_keys} keys, head_dim {head_dim}, float32; us a call")
        for name, samples in times.items():
            low, median, high = statistics.quantiles(samples, n=4)
            print(f"  {name:36s}{median:8.2f}   {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
