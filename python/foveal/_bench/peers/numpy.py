"""softmax(q k^T) v in plain NumPy: with care, and as a textbook has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..work import Array, Inputs, Way, Work, cycled, visible


def ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    hidden = ~visible(work) if work.causal else None
    yield Way("numpy", cycled(lambda q, k, v: naive_attention(q, k, v, hidden), inputs))


def textbook_ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    """A new array for every step; not causal."""

    def textbook(q: Array, k: Array, v: Array) -> Array:
        scores = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)

    yield Way("numpy textbook", cycled(textbook, inputs))


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
