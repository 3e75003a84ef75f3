"""How many keys a query attends to, and the temperature that makes it so many.

The breadth of a row of weights w is exp(H), H = -sum w log w: n for n equal weights. With w = softmax(s),
H = lse - sum w s, and since s = scale q k^T is linear in k, sum w s = scale q . (sum w k): the attention of q and k
with k as values. So the kernel gives both terms block by block, without an array of scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal._attention.dense import attention
from foveal.torch.nn.rotary import accumulator

STEPS = 14  # from a bracket of 10^8 to four digits of the breadth

_SHARPEST, _FLATTEST = 1e5, 1e-3  # the largest score, times the inverse temperature, at the ends of the bracket


def entropy(q: Tensor, k: Tensor, scale: float, **options: Any) -> Tensor:
    """Give H in nats (B, Hq, Sq) of q (B, Sq, Hq, D) and k (B, Skv, Hkv, D); 0 where nothing is seen.

    ``options`` may hide keys; they may not change scores.
    """
    found: Any = attention(q, k, k, layout="bshd", scale=scale, return_lse=True, **options)
    score = scale * (q * found.out).sum(-1).transpose(1, 2)
    return torch.where(found.lse == -torch.inf, 0, found.lse - score).clamp(min=0)


def temperature(q: Tensor, k: Tensor, breadth: Tensor, scale: float, **options: Any) -> Tensor:
    """Find the temperature (B, Hq, Sq) at which each row has the asked breadth, which broadcasts to it.

    Entropy grows with temperature, so there is one, except beyond the ends: a breadth above the number of keys gets
    almost equal weights, one below that of the sharpest row the sharpest. Bracketed, by Chandrupatla's method (1997, "A
    new hybrid quadratic/bisection algorithm"), which here takes 10 to 12 steps. The number of steps is fixed, so
    that it can be traced. There is no gradient.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        exact = accumulator(q.dtype)
        q, k = q.detach().to(exact), k.detach().to(exact)
        target = breadth.to(exact).log()
        largest = scale * q.norm(dim=-1).transpose(1, 2) * _longest(k, q.shape[2])
        largest = largest.clamp(min=1e-20)

        def excess(x: Tensor) -> Tensor:
            """Entropy above the target at the log temperature x."""
            return entropy(q * (-x).exp().transpose(1, 2)[..., None], k, scale, **options) - target

        x1, x2 = (largest / _SHARPEST).log(), (largest / _FLATTEST).log()
        # A target beyond an end is taken to lie at that end.
        f1, f2 = excess(x1).clamp(max=-1e-6), excess(x2).clamp(min=1e-6)
        step = torch.full_like(x1, 0.5)
        for _ in range(STEPS):
            x = x1 + step * (x2 - x1)
            f = excess(x)
            same = (f > 0) == (f1 > 0)
            x3, f3 = torch.where(same, x1, x2), torch.where(same, f1, f2)
            x2, f2 = torch.where(same, x2, x1), torch.where(same, f2, f1)
            x1, f1 = x, f
            xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
            smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
            quadratic = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
            step = torch.where(smooth & quadratic.isfinite(), quadratic.clamp(1e-4, 1 - 1e-4), 0.5)
        return torch.where(f1.abs() < f2.abs(), x1, x2).exp()


def _longest(k: Tensor, num_heads: int) -> Tensor:
    """Give the norm of the longest key of each query head (B, Hq, 1)."""
    norms = k.norm(dim=-1).amax(1) if k.shape[1] else k.new_zeros(k.shape[0], k.shape[2])
    return norms.repeat_interleave(num_heads // k.shape[2], dim=1)[..., None]
