"""What an op is: one record of its schema and of every rule that torch asks for, and the one place that registers them.

Gradients are registered beside (``gradients.py``), since an op needs its backward op for it. CPU kernels in C++
are registered by ``_core`` through torch's stable interface, before the schemas, which is as good.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from foveal import _core


class Op(NamedTuple):
    """An op ``torch.ops.foveal.<name>``."""

    name: str
    schema: str
    fake: Callable[..., Any]  # shapes and dtypes of the results
    vmap: Callable[..., Any] | None  # None: torch itself refuses, naming the op
    flops: Callable[..., Any] | None = None
    cast_from: int | None = None  # autocast: where q is, which k and v follow
    num_cast: int = 3


def _libtorch() -> list[str]:
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    return [os.path.join(os.path.dirname(torch.__file__), "lib", name), name]


library = torch.library.Library("foveal", "DEF")
_shim_is_missing = bool(_core.register_torch_ops(_libtorch()))


def declare(*ops: Op) -> None:
    """Register ops with all their rules."""
    for op in ops:
        library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    if _shim_is_missing:
        from foveal.torch.ops import fallback

        for op in ops:
            library.impl(op.name, fallback.KERNELS[op.name], "CPU")
    for op in ops:
        overload = getattr(torch.ops.foveal, op.name)
        torch.library.register_fake(f"foveal::{op.name}", op.fake, lib=library)
        if op.vmap is not None:
            torch.library.register_vmap(f"foveal::{op.name}", op.vmap, lib=library)
        if op.flops is not None:
            register_flop_formula(overload)(op.flops)
        if op.cast_from is not None:
            rule = autocast_rule(overload.default, op.cast_from, op.num_cast, "cpu")
            library.impl(overload.default, rule, "AutocastCPU", with_keyset=True)

    from foveal.torch.ops import cuda

    cuda.register(library, *ops)


def autocast_rule(op: torch._ops.OpOverload, first: int, count: int, device: str) -> Callable[..., Any]:
    """Cast q, k and v, which share a dtype, and nothing else; ``first`` is the place of q, ``count`` 2 without v."""
    key = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}[device]

    def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # Like torch's own rules, leave float64 alone.
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    def rule(_: torch._C.DispatchKeySet, *values: Any, **named: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        arguments = [*values]
        end = first + count
        arguments[first:end] = [cast(tensor, dtype) for tensor in arguments[first:end]]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*arguments, **named)

    return rule


def refusing_vmap(function: str) -> Callable[..., Any]:
    """Make the rule of an op that has none for vmap."""

    def rule(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"{function}: there is no rule for vmap, expected a call without it")

    return rule
