"""AttentionScorer: which of many tasks a focus attends to, by foveal.attention's kernel.

The score of a task with key k under focus q is q.k/sqrt(d), so the softmax of the scores is the attention of one query
over the tasks (Vaswani et al. 2017, eq. 1). Several foci are taken as one that attends to what any of them does: the
score is then the log of the mean of exp(q_i.k/sqrt(d)). The kernel gives weights and the log of their denominator, and
log(weight) + lse is the score, free of what the other tasks are, so a task that arrives later is scored by itself.
Weights that underflow in float32 come out as scores 87 below the largest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foveal._attention.dense import attention
from foveal._scheduler.checks import check_count
from foveal._scheduler.shares import Floats


class AttentionScorer:
    """Scores tasks by the attention that a focus, changed by :meth:`focus`, gives to their features.

    Parameters
    ----------
    query_dim : int
        Of the state that the focus is made from.
    feature_dim : int, optional
        Of the tasks' features. Default: `query_dim`.
    w_q : array (query_dim, d), optional
        Makes the query from the state, w_q^T state. Default: the identity, when both dims are the same.
    w_k : array (feature_dim, d), optional
        Makes the key from the features. Default: the identity.

    Examples
    --------
    >>> import numpy as np, foveal
    >>> scorer = foveal.AttentionScorer(2)
    >>> scheduler = foveal.Scheduler(scorer=scorer, floor=0.0)
    >>> for name, features in [("east", [4.0, 0.0]), ("north", [0.0, 4.0])]:
    ...     future = scheduler.submit(print, name, features=features, key=name)
    >>> scheduler.rescore([0.0, 1.0])
    >>> {name: round(share, 2) for name, share in scheduler.distribution().items()}
    {'east': 0.06, 'north': 0.94}
    """

    def __init__(
        self,
        query_dim: int,
        feature_dim: int | None = None,
        *,
        w_q: ArrayLike | None = None,
        w_k: ArrayLike | None = None,
    ) -> None:
        feature_dim = query_dim if feature_dim is None else feature_dim
        check_count("AttentionScorer", "query_dim", query_dim, 1)
        check_count("AttentionScorer", "feature_dim", feature_dim, 1)
        self._w_q = _matrix("w_q", w_q, query_dim)
        self._w_k = _matrix("w_k", w_k, feature_dim)
        d_q = query_dim if self._w_q is None else self._w_q.shape[1]
        d_k = feature_dim if self._w_k is None else self._w_k.shape[1]
        if d_q != d_k:
            raise ValueError(f"AttentionScorer: queries have {d_q} features and keys {d_k}, expected as many: w_q, w_k")
        self._query_dim, self._feature_dim = query_dim, feature_dim
        self._queries: NDArray[np.float32] = np.zeros((1, d_q), np.float32)  # attends to all alike

    def focus(self, state: ArrayLike) -> None:
        """Attend to `state` (query_dim,), or to several states (m, query_dim), from now on."""
        states = np.atleast_2d(_finite("focus", "state", state, self._query_dim))
        if states.ndim != 2 or not len(states):
            raise ValueError(f"AttentionScorer.focus: state has shape {states.shape}, expected one state or several")
        self._queries = states if self._w_q is None else states @ self._w_q

    def keys(self, features: ArrayLike) -> NDArray[np.float32]:
        """Give the keys (..., d) of features (..., feature_dim)."""
        rows = _finite("keys", "features", features, self._feature_dim)
        return rows if self._w_k is None else rows @ self._w_k

    def __call__(self, keys: NDArray[np.float32]) -> Floats:
        """Give the scores (n,) of keys (n, d)."""
        v = np.broadcast_to(np.zeros((1, 1), np.float32), (len(keys), 1))
        _, lse, weights, _ = attention(self._queries, keys, v, return_lse=True, return_weights=True)
        logs = weights.astype(np.float64)
        np.log(np.maximum(logs, np.finfo(np.float32).tiny, out=logs), out=logs)
        logs += np.asarray(lse, np.float64)[:, None]
        if len(logs) == 1:
            return np.asarray(logs[0])
        largest = logs.max(axis=0)
        with np.errstate(under="ignore"):
            return np.asarray(largest + np.log(np.exp(logs - largest).mean(axis=0)))


class ScorerHandle:
    """A scheduler's scorer, an AttentionScorer or a callable from (n, d) to (n,), or none."""

    def __init__(self, scorer: AttentionScorer | Callable[[Any], ArrayLike] | None) -> None:
        self._scorer = scorer
        self._dim = 0  # of the features; 0: not known yet

    def row(self, function: str, features: ArrayLike) -> NDArray[np.float32]:
        """Give a task's features as the scorer takes them."""
        if self._scorer is None:
            raise TypeError(f"{function}: features are given, expected a scheduler with a scorer")
        row = self._scorer.keys(features) if isinstance(self._scorer, AttentionScorer) else np.asarray(features)
        if row.ndim != 1 or (self._dim or row.size) != row.size:
            raise ValueError(f"{function}: features have shape {row.shape}, expected ({self._dim or 'd'},)")
        if not np.isfinite(row).all():
            raise ValueError(f"{function}: features hold nan or inf, expected finite numbers")
        self._dim = row.size
        return row.astype(np.float32, copy=False)

    def turn(self, function: str, state: ArrayLike | None, features: NDArray[np.float32] | None) -> Floats | None:
        """Turn to `state`, if it is given, and give the scores (n,) of features (n, d).

        The scorer must be one that can, or there must be one at all. After an error it has not turned.
        """
        if self._scorer is None:
            raise TypeError(f"{function}: the scheduler has no scorer")
        if state is not None:
            if not isinstance(self._scorer, AttentionScorer):
                raise TypeError(f"{function}: state is given, expected an AttentionScorer as the scorer")
            turned = copy.copy(self._scorer)
            turned.focus(state)
            scores = None if features is None else _scores(turned, features)
            self._scorer.focus(state)
            return scores
        return None if features is None else self.of_many(features)

    def of_many(self, features: NDArray[np.float32]) -> Floats:
        """Give the scores (n,) of features (n, d)."""
        assert self._scorer is not None
        return _scores(self._scorer, features)

    def of_one(self, features: NDArray[np.float32]) -> float:
        """Give the score of one task."""
        return float(self.of_many(features[None])[0])


def _scores(scorer: Callable[[Any], ArrayLike], features: NDArray[np.float32]) -> Floats:
    scores = np.asarray(scorer(features), np.float64)
    if scores.shape != (len(features),) or not np.isfinite(scores).all():
        expected = f"({len(features)},), all finite"
        raise ValueError(f"Scheduler: the scorer gave shape {scores.shape}, expected {expected}")
    return scores


def _matrix(name: str, value: ArrayLike | None, rows: int) -> NDArray[np.float32] | None:
    if value is None:
        return None
    matrix = np.asarray(value, np.float32)
    if matrix.ndim != 2 or matrix.shape[0] != rows:
        raise ValueError(f"AttentionScorer: {name} has shape {matrix.shape}, expected ({rows}, d)")
    return matrix


def _finite(method: str, name: str, value: ArrayLike, dim: int) -> NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore"):
        array = np.ascontiguousarray(value, np.float32)
    if array.shape[-1:] != (dim,):
        raise ValueError(f"AttentionScorer.{method}: {name} has shape {array.shape}, expected (..., {dim})")
    if not np.isfinite(array).all():
        raise ValueError(f"AttentionScorer.{method}: {name} holds nan or inf, expected finite numbers")
    return array
