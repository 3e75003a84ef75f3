"""Two builds of foveal against each other, call by call in turn: what a change of the house costs or gains.

    python bench/compare_builds.py OLD NEW [--seconds 4] [--only REGEX]

OLD and NEW are folders that hold a built package (`python` of a checkout, or what `pip install --target` filled). Each
build runs in a process of its own. The two take turns, one batch of calls each, so that what else the machine does
falls on both. A row prints the median time of OLD and the median and quartiles of NEW's time over OLD's.
Exits with 1 where a median is above 1 + LIMIT (--limit, 0.02).
"""

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from pathlib import Path


def rows():
    """Name -> a function that makes the arguments and returns the call to time."""
    import ml_dtypes
    import numpy as np
    import torch

    import foveal

    rng = np.random.default_rng(0)

    def arrays(q_shape, kv_shape, dtype=np.float32):
        return [rng.standard_normal(s, np.float32).astype(dtype) for s in (q_shape, kv_shape, kv_shape)]

    def forward(b, h, s, d, dtype=np.float32, kv_heads=None, **options):
        def make():
            q, k, v = arrays((b, h, s, d), (b, kv_heads or h, s, d), dtype)
            out = np.empty_like(q)
            return lambda: foveal.attention(q, k, v, out=out, **options)

        return make

    def biased():
        q, k, v = arrays((1, 8, 1024, 64), (1, 8, 1024, 64))
        bias = rng.standard_normal((1, 8, 1024, 1024), np.float32)
        return lambda: foveal.attention(q, k, v, bias=bias)

    def decode(heads, keys, d, dtype=np.float32, kv_heads=None, **options):
        def make():
            q, k, v = arrays((1, heads, 1, d), (1, kv_heads or heads, keys, d), dtype)
            return lambda: foveal.attention(q, k, v, **options)

        return make

    def int8_cache(heads, kv_heads):
        def make():
            pages, size, d = 64, 128, 128
            shape = (pages, size, kv_heads, d)
            k, v = (rng.integers(-127, 128, shape, np.int8) for _ in range(2))
            scale = np.full((pages, kv_heads), 0.02, np.float32)
            table = rng.permutation(pages).astype(np.int32)[None]
            q = rng.standard_normal((1, 1, heads, d), np.float32).astype(ml_dtypes.bfloat16)
            return lambda: foveal.attention_kvcache(
                q, k, v, cache_lens=[pages * size], block_table=table, k_scale=scale, v_scale=scale
            )

        return make

    def gradients(b, h, s, d, dtype, **options):
        def make():
            q, k, v = (torch.randn(b, h, s, d, dtype=dtype, requires_grad=True) for _ in range(3))
            dout = torch.randn(b, h, s, d, dtype=dtype)

            def call():
                torch.autograd.grad(foveal.attention(q, k, v, **options), (q, k, v), dout)

            return call

        return make

    def tensors():
        q = torch.randn(1, 8, 1, 64)
        k, v = torch.randn(1, 8, 64, 64), torch.randn(1, 8, 64, 64)
        return lambda: foveal.attention(q, k, v)

    bf16 = ml_dtypes.bfloat16
    return {
        "(1,8,1024,64) f32": forward(1, 8, 1024, 64),
        "(1,8,1024,64) f32 causal": forward(1, 8, 1024, 64, causal=True),
        "(1,8,1024,64) f32 softcap": forward(1, 8, 1024, 64, softcap=20.0),
        "(1,8,1024,64) f32 bias": biased,
        "(8,12,128,64) f32": forward(8, 12, 128, 64),
        "(32,12,32,32) f32 causal": forward(32, 12, 32, 32, causal=True),
        "(1,8,1024,64) bf16": forward(1, 8, 1024, 64, bf16),
        "(1,8,1024,64) f64": forward(1, 8, 1024, 64, np.float64),
        "(1,8,1,64) keys 64 f32": decode(8, 64, 64),
        "(1,8,1,64) keys 64 f32, tensors": tensors,
        "(1,32,1,128) keys 4096 f32": decode(32, 4096, 128),
        "(1,32,1,128) kv heads 4 keys 4096 bf16": decode(32, 4096, 128, bf16, kv_heads=4),
        "(1,8,1,128) keys 4096 f32 alibi": decode(8, 4096, 128, alibi_slopes=np.linspace(0.1, 1, 8)),
        "int8 cache, 32 heads to 8, keys 8192": int8_cache(32, 8),
        "int8 cache, 8 heads to 8, keys 8192": int8_cache(8, 8),
        "(1,8,1024,64) f32, forward and backward": gradients(1, 8, 1024, 64, torch.float32),
        "(1,8,1024,64) bf16 causal, forward and backward": gradients(1, 8, 1024, 64, torch.bfloat16, causal=True),
        "(1,8,1024,64) f32 softcap, forward and backward": gradients(1, 8, 1024, 64, torch.float32, softcap=20.0),
    }


def worker(package, pipe):
    """Serves (row, number of calls) with the seconds that they took."""
    sys.path.insert(0, package)
    import foveal

    assert Path(foveal.__file__).is_relative_to(package), foveal.__file__
    makers, calls = rows(), {}
    pipe.send(list(makers))
    while (request := pipe.recv()) is not None:
        name, number = request
        if name not in calls:
            calls.clear()
            calls[name] = makers[name]()
            calls[name]()
        call, began = calls[name], time.perf_counter()
        for _ in range(number):
            call()
        pipe.send(time.perf_counter() - began)


def compare(pipes, name, seconds):
    """The seconds of a call, old and new, in turn; batches of about 20 ms."""

    def run(which, number):
        pipes[which].send((name, number))
        return pipes[which].recv() / number

    batch = max(1, round(0.02 / max(run(0, 1), run(1, 1), 1e-9)))
    times, end = ([], []), time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            times[which].append(run(which, batch))
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="a row (default 4)")
    parser.add_argument("--only", default="", help="rows whose name this regular expression finds")
    parser.add_argument("--limit", type=float, default=0.02, help="how much slower a row may be (default 0.02)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for package in (options.old, options.new):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(str(package.resolve()), theirs), daemon=True))
        processes[-1].start()
        pipes.append(ours)
    names, _ = (pipe.recv() for pipe in pipes)
    slower = 0
    print("| work | old | new / old |\n|---|---|---|")
    for name in names:
        if not re.search(options.only, name):
            continue
        old, new = compare(pipes, name, options.seconds)
        ratios = sorted(b / a for a, b in zip(old, new, strict=True))
        low, middle, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.25, 0.5, 0.75))
        slower += middle > 1 + options.limit
        print(f"| {name} | {statistics.median(old) * 1e6:.1f} us | {middle:.3f} ({low:.3f}-{high:.3f}) |", flush=True)
    for pipe in pipes:
        pipe.send(None)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
