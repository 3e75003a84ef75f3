"""What :func:`foveal.additive_attention` does with tensors: two projections and one call of attention's op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal._options import core_arguments
from foveal.torch.ops.call import _attention


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    u: Tensor,
    options: dict[str, Any],
    out: Tensor | None,
    requests: dict[str, bool],
) -> Any:
    """Compute it in the dtype of the sums; under autocast the output has autocast's dtype, as that of any product."""
    device = q.device.type
    casts = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if casts else q.dtype
    with torch.autocast(device, enabled=False):
        accumulator = _accumulator(q.dtype)
        q, k, v, w_q, w_k, u = (x.to(accumulator) for x in (q, k, v, w_q, w_k, u))
        return _attend(q @ w_q, k @ w_k, v, u, options, out, requests, dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    options: dict[str, Any],
    out: Tensor | None,
    requests: dict[str, bool],
) -> Any:
    """Compute it of queries and keys that have been projected; the output has the dtype of q."""
    dtype, accumulator = q.dtype, _accumulator(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, u = (x.to(accumulator) for x in (q, k, v, u))
        return _attend(q, k, v, u, options, out, requests, dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    options: dict[str, Any],
    out: Tensor | None,
    requests: dict[str, bool],
    dtype: torch.dtype,
) -> Any:
    direct = dtype == q.dtype
    given = core_arguments({**options, "u": u}, **{"out": out if direct else None, **requests})
    result = _attention(q, k, v, *given.values())
    if direct:
        return result
    attended, lse, weights, stats = result if isinstance(result, tuple) else (result, None, None, None)
    if out is None:
        attended = attended.to(dtype)
    elif out.dtype != dtype or out.shape != attended.shape:
        raise ValueError(
            f"additive_attention: out has dtype {out.dtype} and shape {tuple(out.shape)}, expected {dtype} and "
            f"{tuple(attended.shape)}"
        )
    else:
        attended = out.copy_(attended)
    if not isinstance(result, tuple):
        return attended
    return attended, lse, None if weights is None else weights.to(dtype), stats
