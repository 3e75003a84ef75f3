"""Rotary position embedding (Su et al. 2021, "RoFormer"), as flash-attn's cache function applies it.

Pairs of features are turned by the angle of the token's position, whose cosine and sine are tabulated. A pair is two
neighbours (interleaved), or a feature and the one half of the turned features further on. Features beyond the turned
ones stay. Worked in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool) -> Tensor:
    """Turn x (B, S, H, D) by the rows of cos, sin (positions, pairs) that ``positions`` (B, S) or (B, 1) names."""
    pairs = cos.shape[1]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosine, sine = (table[positions].to(work)[:, :, None] for table in (cos, sin))
    turned = x[..., : 2 * pairs].to(work)
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    both = (first * cosine - second * sine, first * sine + second * cosine)
    turned = torch.stack(both, -1).flatten(-2) if interleaved else torch.cat(both, -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * pairs :]), -1)
