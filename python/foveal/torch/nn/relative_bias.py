"""Biases of the scores that depend on the distance of key and query alone, and how they reach the kernel.

The bias of query i and key j is ``line[j - i + Sq - 1]``: Sq + Skv - 1 numbers for each head. With the queries in
reverse order, r = Sq - 1 - i, it is ``line[r + j]``, an array with strides (1, 1) over the line itself: a view, which
the kernel reads in place. So no (Sq, Skv) array is made; the gradient of the bias is one, so it is made for a block of
queries at a time. Whether a query sees a key under ``causal`` and ``window`` depends on their distance too, and reaches
the kernel in the same way, as a mask: in reverse order the options would mean something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 512  # queries whose bias has a gradient at a time

Window = tuple[int | None, int | None]


def distances(num_queries: int, num_keys: int, offset: int | Tensor, device: torch.device) -> Tensor:
    """Give j - (offset + i) along a line: (Sq + Skv - 1,), or (B, Sq + Skv - 1) for offsets (B,)."""
    line = torch.arange(num_queries + num_keys - 1, device=device) - (num_queries - 1)
    return line - (offset[:, None] if isinstance(offset, Tensor) else offset)


def seen(distance: Tensor, causal: bool, window: Window) -> Tensor | None:
    """Say where ``causal`` and ``window`` let a query see a key; None: everywhere."""
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    sides = [] if left is None else [distance >= -left]
    sides += [] if right is None else [distance <= right]
    return None if not sides else sides[0] & sides[-1]


def attend(
    call: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor,
    num_keys: int,
    bias: Tensor,
    visible: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with a bias by distance: (out, weights or None).

    ``call(q, **options)`` is an attention of q (B, Sq, Hq, D) that gives (out, weights or None). ``bias`` is
    (Hq, Sq + Skv - 1) or (B, Hq, Sq + Skv - 1), ``visible`` None or (Sq + Skv - 1,) or (B, 1, Sq + Skv - 1), and
    ``options`` hold the rest, a mask and a bias of the user in the order of q among them.
    """
    num_queries = q.shape[1]
    block = BLOCK if torch.is_grad_enabled() and bias.requires_grad else max(num_queries, 1)
    outs, weights = [], []
    for begin in range(0, max(num_queries, 1), block):
        end = min(begin + block, num_queries)
        rows = slice(num_queries - end, num_queries - begin + num_keys - 1)  # of the line, for queries begin to end
        changed = dict(options)
        changed["bias"] = _joined(_hankel(bias[..., rows], num_keys), _rows(options.get("bias"), begin, end), torch.add)
        line = None if visible is None else _hankel(visible[..., rows], num_keys)
        changed["mask"] = _joined(line, _rows(options.get("mask"), begin, end), torch.logical_and)
        out, weight = call(q[:, begin:end].flip(1), **changed)
        outs.append(out.flip(1))
        if weight is not None:
            weights.append(weight.flip(2))
    return _cat(outs, 1), _cat(weights, 2) if weights else None


def _hankel(line: Tensor, num_keys: int) -> Tensor:
    return line.unfold(-1, num_keys, 1)


def _rows(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    """Take the rows of a block, in reverse order, of what broadcasts to (B, Hq, Sq, Skv)."""
    return x if x is None or x.ndim < 2 or x.shape[-2] == 1 else x[..., begin:end, :].flip(-2)


def _joined(x: Tensor | None, y: Tensor | None, join: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    return y if x is None else x if y is None else join(x, y)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class T5RelativeBias(nn.Module):
    """The relative position bias of T5: one learned number for each head and bucket of distances.

    Half of the buckets hold one distance each, the other half grow logarithmically up to ``max_distance``; all beyond
    shares the last one. T5 does not scale its scores: its attention has ``scale=1.0``. One module may serve the
    attention of several layers, as in T5.

    Parameters
    ----------
    num_heads : int
        Query heads.
    num_buckets : int
        Buckets in all; ``bidirectional`` gives each direction half of them.
    max_distance : int
        From here on distances are told apart no more.
    bidirectional : bool
        False, for decoders: keys after the query count as distance 0.

    References
    ----------
    Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    section 2.1.

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import T5RelativeBias
    >>> T5RelativeBias(num_heads=8)(torch.arange(-3, 4)).shape
    torch.Size([8, 7])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        exact = num_buckets // (4 if bidirectional else 2)
        if exact < 1 or max_distance <= exact:
            raise ValueError(
                f"T5RelativeBias: num_buckets is {num_buckets} and max_distance {max_distance}, expected at least "
                f"{4 if bidirectional else 2} buckets and a max_distance above the {exact} that have one each"
            )
        self.num_heads, self.num_buckets, self.max_distance = num_heads, num_buckets, max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the numbers anew."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, distance: Tensor) -> Tensor:
        """Give the bias (num_heads, ...) of distances j - i (...), key minus query."""
        return functional.embedding(self._bucket(distance), self.weight).movedim(-1, 0)

    def _bucket(self, distance: Tensor) -> Tensor:
        buckets, first = self.num_buckets, torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            first = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = buckets // 2
        growth = (buckets - exact) / math.log(self.max_distance / exact)
        far = exact + ((distance.clamp(min=exact) / exact).log() * growth).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))

    def extra_repr(self) -> str:
        """Show the settings."""
        return (
            f"{self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


class LearnedRelativeBias(nn.Module):
    """A learned number for each head and each distance up to ``max_distance``; all beyond shares the last one.

    It is the scalar form of the relative positions of Shaw et al. 2018, "Self-Attention with Relative Position
    Representations", with their clipping.

    Parameters
    ----------
    num_heads : int
        Query heads.
    max_distance : int
        Distances are clipped to -max_distance .. max_distance.

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import LearnedRelativeBias
    >>> LearnedRelativeBias(num_heads=8, max_distance=16)(torch.arange(-3, 4)).shape
    torch.Size([8, 7])
    """

    def __init__(self, num_heads: int, max_distance: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        if max_distance < 0:
            raise ValueError(f"LearnedRelativeBias: max_distance is {max_distance}, expected 0 or more")
        self.num_heads, self.max_distance = num_heads, max_distance
        self.weight = nn.Parameter(torch.empty(2 * max_distance + 1, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the numbers anew."""
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, distance: Tensor) -> Tensor:
        """Give the bias (num_heads, ...) of distances j - i (...), key minus query."""
        place = distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return functional.embedding(place, self.weight).movedim(-1, 0)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.num_heads}, max_distance={self.max_distance}"


def alibi_slopes(num_heads: int) -> list[float]:
    """Give the slopes of ALiBi (Press et al. 2022, "Train Short, Test Long", section 3).

    They fall geometrically from 2^(-8 / n) for n heads, a power of 2; other numbers of heads take every other slope of
    the next power as well, as the authors' code does.

    Examples
    --------
    >>> from foveal.torch.nn import alibi_slopes
    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** int(math.log2(num_heads))
    slopes: list[float] = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes if power == num_heads else slopes + alibi_slopes(2 * power)[0::2][: num_heads - power]
