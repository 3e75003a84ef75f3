"""What the arguments of flash-attn mean to :func:`foveal.attention`, and the refusals that the functions share."""

from __future__ import annotations

from itertools import pairwise
from operator import index
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int32, torch.int64)


def check_rank(function: str, rank: int, **tensors: Any) -> None:
    """Refuse what is not a tensor of so many axes."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name} has type {type(x).__name__}, expected torch.Tensor")
        if x.ndim != rank:
            raise ValueError(f"{function}: {name} has {x.ndim} dimensions, expected {rank}")


def window_of(function: str, window_size: Any) -> tuple[int | None, int | None]:
    """Translate (left, right), where a negative number means no limit."""
    try:
        left, right = (index(side) for side in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"{function}: window_size is {window_size!r}, expected (left, right)") from None
    return None if left < 0 else left, None if right < 0 else right


def softcap_of(function: str, softcap: Any) -> float:
    """Refuse what is no number, and a negative one by its own name."""
    try:
        cap = float(softcap)
    except (TypeError, ValueError):
        raise TypeError(f"{function}: softcap has type {type(softcap).__name__}, expected a number") from None
    if not cap >= 0.0:
        raise ValueError(f"{function}: softcap is {softcap}, expected 0.0 or more")
    return cap


def refuse_dropped_weights(function: str, dropout_p: float, return_attn_probs: bool) -> None:
    """The original marks dropped weights by their sign; foveal has no such thing to give."""
    if return_attn_probs and dropout_p != 0.0:
        raise NotImplementedError(
            f"{function}: return_attn_probs is True and dropout_p is {dropout_p}, expected one of them alone"
        )


def unpack(function: str, name: str, packed: Tensor, axis: int, count: int) -> tuple[Tensor, ...]:
    """Split q, k, v or k, v that are one tensor; nothing is copied."""
    check_rank(function, axis + 3, **{name: packed})
    if packed.shape[axis] != count:
        raise ValueError(f"{function}: {name}.shape[{axis}] is {packed.shape[axis]}, expected {count}")
    return packed.unbind(axis)


def boundaries(function: str, side: str, cu_seqlens: Any, max_seqlen: Any, total: int | None) -> list[int]:
    """Read cu_seqlens_q or cu_seqlens_k, and refuse what does not cut ``total`` tokens into sequences."""
    name = f"cu_seqlens_{side}"
    try:
        max_seqlen = index(max_seqlen)
    except TypeError:
        found = type(max_seqlen).__name__
        raise TypeError(f"{function}: max_seqlen_{side} has type {found}, expected an integer") from None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in _INTEGERS:
        found = getattr(cu_seqlens, "dtype", type(cu_seqlens).__name__)
        raise TypeError(f"{function}: {name} has type {found}, expected an int32 or int64 torch.Tensor")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{function}: {name}.shape is {tuple(cu_seqlens.shape)}, expected (batch + 1,)")
    begins: list[int] = cu_seqlens.tolist()
    if begins[0] != 0:
        raise ValueError(f"{function}: {name}[0] is {begins[0]}, expected 0")
    for b, (begin, end) in enumerate(pairwise(begins)):
        if end < begin:
            raise ValueError(f"{function}: {name}[{b + 1}] is {end}, expected {begin} or more")
        if end - begin > max_seqlen:
            raise ValueError(
                f"{function}: max_seqlen_{side} is {max_seqlen}, expected {end - begin} or more (from {name})"
            )
    if total is not None and begins[-1] > total:
        raise ValueError(
            f"{function}: {name}[{len(begins) - 1}] is {begins[-1]}, expected at most {total} (from {side})"
        )
    return begins


def integers_of_batch(function: str, name: str, values: Any, batch: int, highest: int) -> Tensor:
    """Read an int, or a tensor (B,) of integers from 0 to ``highest``, as int64 (B,)."""
    if isinstance(values, int) and not isinstance(values, bool):
        values = torch.full((batch,), values, dtype=torch.int64)
    if not isinstance(values, Tensor) or values.dtype not in _INTEGERS:
        found = getattr(values, "dtype", type(values).__name__)
        raise TypeError(f"{function}: {name} has type {found}, expected an int32 or int64 torch.Tensor")
    if values.shape != (batch,):
        raise ValueError(f"{function}: {name}.shape is {tuple(values.shape)}, expected ({batch},) (from q)")
    if batch and (int(values.min()) < 0 or int(values.max()) > highest):
        raise ValueError(f"{function}: {name} is {values.tolist()}, expected 0 to {highest}")
    return values.to(torch.int64)
