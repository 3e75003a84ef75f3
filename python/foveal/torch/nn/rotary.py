"""Rotary position embedding: queries and keys turned by angles that grow with their positions.

A pair of features (x, y) at position p becomes (x cos a - y sin a, x sin a + y cos a), a = p * frequency of the pair
(Su et al. 2021, "RoFormer", equation 34). The scaled forms change the frequencies alone, and YaRN the length of the
vectors too. Frequencies and angles are float64, the turned features are rounded once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Llama3Scaling:
    """The frequencies of Llama 3.1 (Llama team 2024, "The Llama 3 Herd of Models").

    Wavelengths above original_length / low_freq_factor become ``factor`` times longer, those below
    original_length / high_freq_factor stay, and those between are interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def scaled(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Give the new frequencies and the factor of the vectors' lengths."""
        turns = self.original_length * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models", section 3.2 to 3.4).

    Pairs that turn more than ``beta_fast`` times within ``original_length`` tokens stay, those that turn less than
    ``beta_slow`` times become ``factor`` times slower, with a linear ramp over the pairs between. Queries and keys are
    multiplied by ``attention_factor``; None: 0.1 log(factor) + 1. ``truncate`` rounds the ends of the ramp outwards to
    whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def scaled(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Give the new frequencies and the factor of the vectors' lengths."""
        pairs = len(frequencies)
        ends = [
            pairs * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)
            for turns in (self.beta_fast, self.beta_slow)
        ]
        if self.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], 2 * pairs - 1)
        high = high if high != low else low + 0.001
        slowed = ((torch.arange(pairs, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        length = self.attention_factor
        if length is None:
            length = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return frequencies * (1 - slowed + slowed / self.factor), length


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys.

    Parameters
    ----------
    dim : int
        How many features of a head are turned, even; a head's further features stay (partial rotary).
    base : float
        Pair i of n = dim / 2 has the frequency base^(-i / n).
    interleaved : bool
        A pair is two neighbours, as in RoFormer and GPT-J; False: a feature and the one dim / 2 further on, as in
        GPT-NeoX and Llama.
    scaling : Llama3Scaling or YarnScaling, optional
        For contexts longer than those of the training.

    Raises
    ------
    ValueError
        ``dim`` is odd or not positive, or ``base`` is not above 1.

    References
    ----------
    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding".

    Examples
    --------
    >>> import torch
    >>> from foveal.torch.nn import RotaryEmbedding
    >>> rotary = RotaryEmbedding(16)
    >>> rotary(torch.ones(1, 5, 2, 16), torch.arange(5)).shape
    torch.Size([1, 5, 2, 16])
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        interleaved: bool = False,
        scaling: Llama3Scaling | YarnScaling | None = None,
    ):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryEmbedding: dim is {dim}, expected an even number above 0")
        if not base > 1:
            raise ValueError(f"RotaryEmbedding: base is {base}, expected a number above 1")
        self.dim, self.base, self.interleaved, self.scaling = dim, base, interleaved, scaling
        pairs = dim // 2
        frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        self.length = 1.0
        if scaling is not None:
            frequencies, self.length = scaling.scaled(frequencies, base)
        # No buffer: ``.to(torch.bfloat16)`` would round the frequencies, and with them all far positions.
        self.frequencies: tuple[float, ...] = tuple(frequencies.tolist())

    def tables(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Give cosines and sines, each (..., dim / 2), of integer positions (...)."""
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        angles = positions[..., None] * frequencies
        return (angles.cos() * self.length).to(dtype), (angles.sin() * self.length).to(dtype)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x (B, S, H, D), with dim <= D, by the angles of its positions, (S,) or (B, S) integers."""
        return self.turn(x, *self.tables(positions, accumulator(x.dtype)))

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn x (B, S, H, D) by what :meth:`tables` gave for its positions."""
        cos, sin = cos[..., None, :], sin[..., None, :]
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        a, b = (turned[..., 0::2], turned[..., 1::2]) if self.interleaved else turned.chunk(2, dim=-1)
        pair = [a * cos - b * sin, a * sin + b * cos]
        turned = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        turned = turned.to(x.dtype)
        return turned if rest.shape[-1] == 0 else torch.cat([turned, rest], dim=-1)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}, scaling={self.scaling}"
