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
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    device = q.device.type
    casts = torch.is_autocast_enabled(device) and q.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if casts else q.dtype
    with torch.autocast(device, enabled=False):
        q, k, v, w_q, w_k, u = (x.to(accumulator) for x in (q, k, v, w_q, w_k, u))
        direct = dtype == accumulator
        given = core_arguments({**options, "u": u}, **{"out": out if direct else None, **requests})
        result = _attention(q @ w_q, k @ w_k, v, *given.values())
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
