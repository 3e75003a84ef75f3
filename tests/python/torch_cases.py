"""Inputs and options that the tests of tensors share."""

import os

import ml_dtypes
import numpy as np
import torch

from foveal import _core

# test_torch_process.py runs the other tests again, with this set, over the kernels in Python.
FALLBACK = "FOVEAL_TEST_TORCH_FALLBACK" in os.environ
if FALLBACK:
    _core.register_torch_ops = lambda libraries: "torch_library_impl"

from foveal.torch.ops.records import Options as Options  # noqa: E402  after the change above

ops = torch.ops.foveal
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def to_numpy(x):
    """The same memory as an array, in tuples too; anything but a tensor stays what it is."""
    if isinstance(x, tuple):
        return tuple(map(to_numpy, x))
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def assert_same_bits(tensor, array):
    found = to_numpy(tensor)
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == np.ascontiguousarray(array).tobytes()


def qkv(
    batch=2, heads=6, kv_heads=2, seqlen_q=19, seqlen_kv=35, head_dim=24, value_dim=16, dtype=torch.float32, seed=0
):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, seqlen_q, head_dim, generator=g).to(dtype),
        torch.randn(batch, kv_heads, seqlen_kv, head_dim, generator=g).to(dtype),
        torch.randn(batch, kv_heads, seqlen_kv, value_dim, generator=g).to(dtype),
    )


def options_grid():
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 19, 35, generator=g) > 0.3
    mask[0, 0, 3] = False
    return {
        "plain": {},
        "causal": {"causal": True},
        "causal scale": {"causal": True, "scale": 0.25},
        "mask": {"mask": mask},
        "mask 2-d": {"mask": mask[1, 0]},
        "bias": {"bias": torch.randn(6, 19, 35, generator=g)},
        "bias float64 column": {"bias": torch.randn(2, 1, 19, 1, dtype=torch.float64, generator=g)},
        "window": {"window": (5, 3)},
        "causal window offset": {"causal": True, "window": (7, None), "q_offset": 4},
        "softcap scale": {"softcap": 3.0, "scale": 0.5},
        "alibi": {"alibi_slopes": torch.rand(6, generator=g), "causal": True},
        "alibi per batch": {"alibi_slopes": torch.rand(2, 6, generator=g)},
        "sinks": {"sinks": torch.randn(6, generator=g)},
        "lens": {"q_lens": [19, 7], "kv_lens": [20, 0]},
        "lens tensors": {"q_lens": torch.tensor([3, 19]), "kv_lens": torch.tensor([35, 1], dtype=torch.int32)},
        "offsets": {"causal": True, "q_offset": torch.tensor([-3, 30])},
        "everything": {
            "mask": mask,
            "bias": torch.randn(19, 35, generator=g),
            "causal": True,
            "q_offset": [9, 16],
            "window": (20, 2),
            "scale": 0.2,
            "softcap": 10.0,
            "alibi_slopes": torch.rand(6, generator=g),
            "sinks": torch.randn(6, generator=g),
            "q_lens": [18, 19],
            "kv_lens": [33, 35],
        },
    }


OPTIONS = options_grid()
