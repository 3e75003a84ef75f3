"""What the arguments of flash-attn mean to :func:`foveal.attention`, and the refusals that the functions share."""

from __future__ import annotations

from operator import index
from typing import Any

from torch import Tensor


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


def softcap_of(function: str, softcap: float) -> float:
    """Refuse a negative one by its own name."""
    if not softcap >= 0.0:
        raise ValueError(f"{function}: softcap is {softcap}, expected 0.0 or more")
    return softcap


def refuse_dropped_weights(function: str, dropout_p: float, return_attn_probs: bool) -> None:
    """The original marks dropped weights by their sign; foveal has no such thing to give."""
    if return_attn_probs and dropout_p != 0.0:
        raise NotImplementedError(
            f"{function}: return_attn_probs is True and dropout_p is {dropout_p}, expected one of them alone"
        )
