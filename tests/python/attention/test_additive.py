"""Additive attention against its formula in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16

import foveal

B, HQ, HKV, SKV, D, DK, DV, A = 2, 4, 2, 150, 8, 9, 6, 11


def arrays(rows: int, dtype: Any = np.float64, *, per_head: bool = False, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    shapes = [(B, HQ, rows, D), (B, HKV, SKV, DK), (B, HKV, SKV, DV), (D, A), (DK, A), (HQ, A) if per_head else (A,)]
    found = [rng.standard_normal(x) for x in shapes]
    return [(x * scale if i < 2 else x).astype(dtype) for i, x in enumerate(found)]


def scores_of(q: Any, k: Any, w_q: Any, w_k: Any, u: Any) -> np.ndarray:
    q, k, w_q, w_k, u = (x.astype(np.float64) for x in (q, k, w_q, w_k, u))
    k = np.repeat(k, HQ // HKV, axis=1)
    hidden = np.tanh((q @ w_q)[..., :, None, :] + (k @ w_k)[..., None, :, :])
    return (hidden * (u if u.ndim == 1 else u[:, None, None, :])).sum(-1)


def softmax(s: np.ndarray) -> np.ndarray:
    highest = s.max(-1, keepdims=True)
    w = np.exp(s - np.where(np.isfinite(highest), highest, 0))
    total = w.sum(-1, keepdims=True)
    return np.divide(w, total, out=np.zeros_like(w), where=total > 0)


TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16], ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("scale", [1.0, 30.0])  # beyond the range of the powers
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("per_head", [False, True])
def test_against_the_formula(per_head: bool, rows: int, scale: float, dtype: Any) -> None:
    given = arrays(rows, dtype, per_head=per_head, scale=scale)
    q, k, v, *weights = given
    position = SKV - rows + np.arange(rows)[:, None]
    s = np.where(np.arange(SKV) <= position, scores_of(q, k, *weights), -np.inf)
    found = foveal.additive_attention(*given, causal=True, return_weights=True, return_stats=True)
    w = softmax(s)
    out = w @ np.repeat(v.astype(np.float64), HQ // HKV, axis=1)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    assert found.out.dtype == found.weights.dtype == dtype
    np.testing.assert_allclose(found.weights.astype(np.float64), w, atol=tolerance)
    np.testing.assert_allclose(found.out.astype(np.float64), out, atol=tolerance)
    np.testing.assert_allclose(found.stats.max_weight, w.max(-1), atol=tolerance)


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15", "sigmoid", "relu", "normalized_sigmoid"])
def test_normalisers(normalizer: str) -> None:
    given = arrays(5)
    q, k, _, *weights = given
    found = foveal.additive_attention(*given, normalizer=normalizer, return_weights=True)
    s = scores_of(q, k, *weights)
    # A query and a key of one feature, whose product is the score, weigh the same.
    one = np.ones((1, 1, 1))
    same = np.stack(
        [
            np.stack([foveal.attention(one, s[b, h, i][None, :, None], s[b, h, i][None, :, None], scale=1.0,
                                       normalizer=normalizer, return_weights=True).weights[0, 0] for i in range(5)])
            for b in range(B) for h in range(HQ)
        ]
    ).reshape(B, HQ, 5, SKV)  # fmt: skip
    np.testing.assert_allclose(found.weights, same, atol=1e-12)


def test_options_layout_and_out() -> None:
    given = arrays(20)
    q, k, v, *weights = given
    mask = np.random.default_rng(0).random((B, HQ, 20, SKV)) < 0.5
    bias = np.random.default_rng(1).standard_normal((SKV,))
    options: dict[str, Any] = {"mask": mask, "bias": bias, "kv_lens": [150, 90], "q_lens": [20, 11], "window": (60, 3)}
    expected = foveal.additive_attention(*given, **options)
    s = scores_of(q, k, *weights) + bias
    position = (
        np.array([150, 90])[:, None, None, None] - np.array([20, 11])[:, None, None, None] + np.arange(20)[:, None]
    )
    j = np.arange(SKV)
    seen = mask & (j < np.array([150, 90])[:, None, None, None]) & (j >= position - 60) & (j <= position + 3)
    out = softmax(np.where(seen, s, -np.inf)) @ np.repeat(v, HQ // HKV, axis=1)
    out[1, :, 11:] = 0
    np.testing.assert_allclose(expected, out, atol=1e-12)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    found = foveal.additive_attention(*swapped, *weights, layout="bshd", **options)
    assert (found.swapaxes(1, 2) == expected).all()
    into = np.empty_like(expected)
    assert foveal.additive_attention(*given, out=into, **options) is into
    assert (into == expected).all()
    half = [x.astype(np.float16) for x in given]
    into = np.empty(expected.shape, np.float16)
    assert foveal.additive_attention(*half, out=into, **options) is into
    assert (into == foveal.additive_attention(*half, **options)).all()


def test_what_is_masked_does_not_reach_the_output() -> None:
    given = arrays(20, np.float32)
    expected = foveal.additive_attention(*given, kv_lens=[100, 100])
    given[1][:, :, 100:], given[2][:, :, 100:] = np.nan, np.inf
    assert (foveal.additive_attention(*given, kv_lens=[100, 100]) == expected).all()


def test_neighbours_and_threads_change_no_bit() -> None:
    given = arrays(50, np.float32)
    whole = foveal.additive_attention(*given)
    wild = [x.copy() for x in given]
    wild[0][:, :, 7] *= 1000  # a row beyond the range of the powers, and keys
    wild[1][:, :, 149] *= 1000
    wild_whole = foveal.additive_attention(*wild, kv_lens=[149, 149])
    tame = foveal.additive_attention(*given, kv_lens=[149, 149])
    others = [i for i in range(50) if i != 7]
    assert (wild_whole[:, :, others] == tame[:, :, others]).all()
    before = foveal.get_num_threads()
    try:
        foveal.set_num_threads(3)
        assert (foveal.additive_attention(*given) == whole).all()
    finally:
        foveal.set_num_threads(before)


def test_dtypes_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^additive_attention: q has dtype int64, expected float32, float64"):
        foveal.additive_attention(*(x.astype(np.int64) for x in arrays(3)))
    half = arrays(3, np.float16)
    with pytest.raises(
        ValueError, match=r"^additive_attention: out has dtype float16 and shape \(1, 2\), expected float16"
    ):
        foveal.additive_attention(*half, out=np.empty((1, 2), np.float16))


def test_empty_sizes() -> None:
    _, k, v, *weights = arrays(3)
    assert foveal.additive_attention(np.ones((B, HQ, 0, D)), k, v, *weights).shape == (B, HQ, 0, DV)
    assert (foveal.additive_attention(np.ones((B, HQ, 3, D)), k[:, :, :0], v[:, :, :0], *weights) == 0).all()


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"w_q": np.ones((D + 1, A))}, ValueError, r"w_q.shape\[0\] is 9, expected D 8 \(from q\)"),
        ({"w_k": np.ones((DK, A + 1))}, ValueError, r"w_k.shape\[1\] is 12, expected A 11 \(from w_q\)"),
        ({"w_k": np.ones(DK)}, ValueError, r"w_k has shape \(9,\), expected \(D, A\)"),
        ({"u": np.ones((1, HQ, A))}, ValueError, r"u has shape \(1, 4, 11\), expected \(A,\) or \(Hq, A\), A = 11"),
        ({"u": np.ones(A - 1)}, ValueError, r"u has shape \(10,\), expected"),
        (
            {"u": np.ones((3, A))},
            ValueError,
            r"u has shape \(3, 11\), expected \(A,\) = \(11,\) or \(Hq, A\) = \(4, 11\)",
        ),
        ({"u": np.ones(A, np.float32)}, TypeError, "u has dtype float32, expected float64"),
        ({"u": [1.0] * A}, TypeError, "u has type list, expected ndarray"),
        ({"q": np.ones((D,))}, ValueError, "q has 1 dimensions, expected 2, 3 or 4"),
        ({"out": np.empty((1, 2))}, ValueError, "out has 2 dimensions, expected 4"),
        ({"mask": np.ones(SKV)}, TypeError, "mask has dtype float64, expected bool"),
        ({"normalizer": "x"}, ValueError, "normalizer is 'x', expected 'softmax'"),
    ],
)
def test_refusals(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    given = dict(zip(("q", "k", "v", "w_q", "w_k", "u"), arrays(5), strict=True))
    with pytest.raises(kind, match="^additive_attention: " + text):
        foveal.additive_attention(**{**given, **change})
