"""The rows of the report that compare no peer's time: our own window, memory, import and the cost of a call."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable

import numpy as np

import foveal
from foveal._bench.measure import Contender, Spread, take_turns
from foveal._bench.show import Row
from foveal._bench.work import Work, foveal_numpy

Progress = Callable[[float], object]

PEAK_MEMORY = """
import re
from pathlib import Path
import numpy as np
import foveal

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def peak_mib(call):
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    before = kib("VmRSS")
    result = call()
    return (kib("VmHWM") - before) / 1024
"""

FORWARD = """
q, k, v = (np.random.default_rng(i).standard_normal((1, 2, {seqlen}, 64), np.float32) for i in range(3))
out = np.zeros_like(q)
foveal.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])  # the threads and their stacks
print(peak_mib(lambda: foveal.attention(q, k, v, out=out)))
"""

TRAINING = """
import torch

def step(*inputs):
    leaves = [x.requires_grad_() for x in inputs]
    out = foveal.attention(*leaves)
    return out, torch.autograd.grad(out, leaves, dout[:, :, : out.shape[2]])

q, k, v, dout = (torch.randn(1, 2, {seqlen}, 64) for _ in range(4))
step(*(x[:, :, :256].clone() for x in (q, k, v)))  # the threads and their stacks
print(peak_mib(lambda: step(q, k, v)) - 4 * q.nbytes / 2**20)
"""

IMPORT_TIME = """
import sys, time
import numpy
start = time.perf_counter()
import foveal
print((time.perf_counter() - start) * 1e3)
assert "torch" not in sys.modules
"""


def window_against_full(budget: float, progress: Progress) -> Row:
    """A window of 256 in 8192 causal keys, against our own causal attention over all of them."""
    window, full = (Work(1, 8, 8192, 64, causal=True, window=keys) for keys in (256, None))
    inputs = [full.inputs()]
    contenders = [foveal_numpy(window, inputs), Contender("full", foveal_numpy(full, inputs).call)]
    times = take_turns(contenders, budget=budget, progress=progress)
    return Row(
        str(window),
        window.flops / times.median("foveal") / 1e9,
        "GF/s",
        {"own full causal": times.ratio("full", "foveal")},
        detail=f"{times.rounds} rounds; {full.flops / window.flops:.1f} times fewer visible pairs",
    )


def call_overhead(budget: float, progress: Progress, *, tensors: bool, grad: bool = False) -> Row:
    """A whole call on (1,1,1,8): all cost, no work. With `grad`, one that records a graph."""
    q = np.ones((1, 1, 1, 8), np.float32)
    if tensors:
        import torch

        tensor = torch.from_numpy(q).requires_grad_(grad)
        mode = torch.enable_grad if grad else torch.no_grad
        sdpa = torch.nn.functional.scaled_dot_product_attention
        contenders = [
            Contender("foveal", lambda: foveal.attention(tensor, tensor, tensor), mode),
            Contender("torch", lambda: sdpa(tensor, tensor, tensor), mode),
        ]
    else:
        contenders = [Contender("foveal", lambda: foveal.attention(q, q, q))]
    times = take_turns(contenders, budget=budget, progress=progress)
    return Row(
        f"a call on (1,1,1,8){' tensors' * tensors}{' that require grad' * grad}",
        times.median("foveal") * 1e6,
        "us",
        {"torch": times.ratio("torch", "foveal")} if tensors else {},
        detail=f"{times.rounds} rounds",
    )


def peak_memory(budget: float, progress: Progress) -> Row:
    """What a long call holds beyond its inputs and its output; q, k, v and out are 16 MiB each, the scores 8 GiB."""
    return Row("extra memory at (1,2,32768,64) f32", float(_run(PEAK_MEMORY + FORWARD.format(seqlen=32768))), "MiB")


def peak_training_memory(budget: float, progress: Progress) -> Row:
    """The same of a forward and a backward pass beyond the output and the gradients, 8 MiB each; scores: 2 GiB."""
    extra = float(_run(PEAK_MEMORY + TRAINING.format(seqlen=16384)))
    return Row("extra memory at (1,2,16384,64) f32, forward and backward", extra, "MiB")


def import_time(budget: float, progress: Progress) -> Row:
    """`import foveal` in a fresh process that has imported NumPy."""
    sample = []
    for number in range(21):
        sample.append(float(_run(IMPORT_TIME)))
        progress((number + 1) / 21)
    spread = Spread.of(sample)
    return Row(
        "import foveal after numpy",
        statistics.median(sample),
        "ms",
        detail=f"21 processes, quartiles {spread.low:.1f}-{spread.high:.1f} ms; torch stays out",
    )


def _run(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"bench: a measuring process failed:\n{result.stderr}")
    return result.stdout
