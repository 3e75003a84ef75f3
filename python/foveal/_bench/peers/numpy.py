"""softmax(q k^T) v in plain NumPy: with care, and as a textbook has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..work import Array, Inputs, Way, Work, cycled, visible


def ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    hidden = ~visible(work) if work.causal else None
    attention = entmax15_attention if work.normalizer == "entmax15" else naive_attention
    yield Way("numpy", cycled(lambda q, k, v: attention(q, k, v, hidden), inputs))


def textbook_ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    """A new array for every step; not causal."""

    def textbook(q: Array, k: Array, v: Array) -> Array:
        scores = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)

    yield Way("numpy textbook", cycled(textbook, inputs))


def entmax15_attention(q: Array, k: Array, v: Array, hidden: Array | None = None) -> Array:
    """By sorting (Peters et al. 2019, algorithm 2); in the inputs' dtype."""
    scores = (q * q.dtype.type(q.shape[-1] ** -0.5 / 2)) @ k.swapaxes(-1, -2)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    largest = -np.sort(-scores, axis=-1)
    count = np.arange(1, scores.shape[-1] + 1, dtype=scores.dtype)
    with np.errstate(invalid="ignore"):  # hidden keys, which come last
        mean = np.cumsum(largest, axis=-1) / count
        spread = np.cumsum(largest**2, axis=-1) - count * mean**2
        threshold = mean - np.sqrt(np.maximum((1 - spread) / count, 0))
        last = (threshold < largest).sum(axis=-1, keepdims=True) - 1
    threshold = np.take_along_axis(threshold, last, axis=-1)
    return np.asarray(np.maximum(scores - threshold, 0) ** 2 @ v)


def naive_attention(q: Array, k: Array, v: Array, hidden: Array | None = None) -> Array:
    """As few passes over the (Sq,Skv) scores as NumPy allows; in the inputs' dtype."""
    scores = (q * q.dtype.type(q.shape[-1] ** -0.5)) @ k.swapaxes(-1, -2)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    out = scores @ v
    out /= scores.sum(axis=-1, keepdims=True)
    return np.asarray(out)
