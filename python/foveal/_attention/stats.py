"""Where a row looks: statistics of its weights, without the array of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from foveal import _core
from foveal._options import core_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence


class AttentionStats(NamedTuple):
    """Statistics of the weights w of each query, before dropout; None for what was not asked for.

    Arrays are (B, Hq, Sq) in every layout, without the axes that q lacks, in float32 (float64 for float64).
    """

    entropy: Any
    """-sum(p log p) of p = w / sum(w), in nats."""
    breadth: Any
    """exp(entropy): over how many keys the query spreads its weight; 0 where it weighs none."""
    max_weight: Any
    """The largest weight."""
    argmax: Any
    """int64, the key with the largest score, the first of several; -1 where no key has a weight, or all have NaN."""
    threshold: Any = None
    """tau of sparsemax and entmax15, in the units of its formula; inf where a query sees no key."""
    key_mass: Any = None
    """(B, Hq, Skv), the sum over the queries of the weight that each key receives."""
    top_keys: Any = None
    """(B, Hq, Sq, top_k) int64, the heaviest keys, heaviest first; -1 where fewer have a weight above 0."""
    top_weights: Any = None
    """(B, Hq, Sq, top_k), their weights; 0 where there is no key."""


def stats_of(rows: tuple[Any, ...], normalizer: str, *more: Any) -> AttentionStats:
    """Make the statistics of the rows, as the core gives them, those of its caller."""
    entropy, _, max_weight, threshold, argmax = rows
    if isinstance(entropy, np.ndarray):
        xp: Any = np
    elif hasattr(entropy, "__torch_function__"):
        import torch as xp
    else:
        xp = entropy.__array_namespace__()
    none = (argmax < 0) & (entropy == 0)  # a row with NaN has no key either, but an entropy of NaN
    breadth = xp.where(none, xp.zeros_like(entropy), xp.exp(entropy))
    has_threshold = normalizer in ("sparsemax", "entmax15")
    return AttentionStats(entropy, breadth, max_weight, argmax, threshold if has_threshold else None, *more)


def attention_stats(
    q: Any,
    k: Any,
    *,
    top_k: int = 0,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    q_offset: int | Sequence[int] | Any | None = None,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    gate: tuple[Any, Any] | None = None,
    span: tuple[Any, float] | None = None,
    q_lens: Sequence[int] | Any | None = None,
    kv_lens: Sequence[int] | Any | None = None,
    normalizer: str = "softmax",
    layout: str = "bhsd",
) -> AttentionStats:
    """Compute where attention looks: its entropy, what each key receives, and the heaviest keys of each query.

    The weights are those of :func:`attention` with the same options, computed block by block and never held. There is
    no gradient; those of entropy and breadth come with ``attention(..., return_stats=True)``.

    Parameters
    ----------
    q, k : array
        (B, Hq, Sq, D) and (B, Hkv, Skv, D), as in :func:`attention`.
    top_k : int
        0 to Skv: how many of the heaviest keys to find for each query.
    mask, bias, causal, q_offset, window, scale, softcap, alibi_slopes, sinks, gate, span, q_lens, kv_lens, normalizer
        As in :func:`attention`.
    layout : "bhsd" or "bshd"
        Of q and k; the statistics are (B, Hq, ...) in both.

    Returns
    -------
    AttentionStats
        With ``key_mass``, and with ``top_keys`` and ``top_weights`` where ``top_k`` > 0. The bits do not depend on the
        number of threads, nor on what else is in the batch.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`; ``top_k`` outside 0 to Skv.
    NotImplementedError
        A tensor that requires grad, with grad mode on.

    Examples
    --------
    >>> import numpy as np
    >>> import foveal
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((1, 8, 5, 64), dtype=np.float32)
    >>> k = rng.standard_normal((1, 2, 7, 64), dtype=np.float32)
    >>> stats = foveal.attention_stats(q, k, top_k=2)
    >>> stats.key_mass.shape, stats.top_keys.shape
    ((1, 8, 7), (1, 8, 5, 2))
    >>> bool((stats.top_keys[..., 0] == stats.argmax).all())
    True
    >>> np.allclose(stats.key_mass.sum(-1), 5)
    True
    """
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "causal": causal,
        "q_offset": q_offset,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "gate": gate,
        "span": span,
        "q_lens": q_lens,
        "kv_lens": kv_lens,
        "normalizer": normalizer,
        "layout": layout,
    }
    if not isinstance(q, np.ndarray) and hasattr(q, "__torch_function__"):
        from foveal.torch import _attention_stats

        results = _attention_stats(q, k, top_k, options)
    else:
        values = [*core_arguments(options).values(), top_k]
        results = _core.attention_stats(q, k, k, *values)
    *rows, key_mass, top_keys, top_weights = results
    top = (top_keys, top_weights) if top_k else ()
    return stats_of(tuple(rows), normalizer, key_mass, *top)
