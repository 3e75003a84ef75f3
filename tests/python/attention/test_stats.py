"""Statistics of where a row looks, against the array of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16

import foveal

NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid", "relu", "normalized_sigmoid")
B, HQ, HKV, SKV, D = 2, 4, 2, 150, 16


def arrays(rows: int, dtype: Any = np.float64, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(rows)
    shapes = ((B, HQ, rows, D), (B, HKV, SKV, D), (B, HKV, SKV, D))
    q, k, v = (rng.standard_normal(x) for x in shapes)
    return (q * scale).astype(dtype), k.astype(dtype), v.astype(dtype)


def expected(weights: np.ndarray) -> dict[str, np.ndarray]:
    mass = weights.sum(-1)
    p = np.divide(weights, mass[..., None], out=np.zeros_like(weights), where=mass[..., None] > 0)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    return {
        "entropy": entropy,
        "breadth": np.where(mass > 0, np.exp(entropy), 0),
        "max_weight": weights.max(-1, initial=0),
        "argmax": np.where(mass > 0, weights.argmax(-1), -1),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "q_offset": -3},
    "lens": {"kv_lens": [0, 77], "q_lens": [5, 3]},
    "mask bias": {"mask": np.random.default_rng(0).random((B, HQ, 1, SKV)) < 0.1, "bias": np.full((SKV,), 0.5)},
    "gate span": {"gate": (0.3, 0.5), "span": (20.0, 9.0)},
    "dropout": {"dropout_p": 0.4, "seed": 1},
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("rows", [1, 5, 37])
def test_against_the_weights(rows: int, name: str, normalizer: str) -> None:
    if rows != 5 and "lens" in name:
        return
    q, k, v = arrays(rows, scale=2.0)
    options = {**OPTIONS[name], "normalizer": normalizer}
    found = foveal.attention(q, k, v, return_stats=True, return_weights=True, **options)
    undropped = {x: y for x, y in options.items() if x not in ("dropout_p", "seed")}
    weights = foveal.attention(q, k, v, return_weights=True, **undropped).weights
    for field, value in expected(weights).items():
        np.testing.assert_allclose(getattr(found.stats, field), value, atol=1e-11, err_msg=field)
    assert (found.out == foveal.attention(q, k, v, return_weights=True, **options).out).all()
    assert (found.stats.threshold is not None) == (normalizer in ("sparsemax", "entmax15"))

    stats = foveal.attention_stats(q, k, top_k=4, **undropped)
    for x, y in zip(stats[:5], found.stats[:5], strict=True):
        assert x is y is None or np.array_equal(x, y)
    np.testing.assert_allclose(stats.key_mass, weights.sum(-2), atol=1e-11)
    np.testing.assert_allclose(stats.top_weights, -np.sort(-weights, -1)[..., :4], atol=1e-12)
    at = np.take_along_axis(weights, np.maximum(stats.top_keys, 0), -1)
    np.testing.assert_allclose(np.where(stats.top_keys >= 0, at, 0), stats.top_weights, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16], ids=lambda x: np.dtype(x).name)
def test_other_dtypes(dtype: Any) -> None:
    q, k, v = arrays(37, dtype)
    stats = foveal.attention(q, k, v, return_stats=True).stats
    exact = foveal.attention(*(x.astype(np.float64) for x in (q, k, v)), return_stats=True).stats
    assert stats.entropy.dtype == np.float32
    assert stats.argmax.dtype == np.int64
    np.testing.assert_allclose(stats.entropy, exact.entropy, atol=2e-5)
    np.testing.assert_allclose(stats.max_weight, exact.max_weight, rtol=1e-5)


def test_the_bound_of_the_entropy() -> None:
    """docs/numerics.md: 32 u (1 + log n) beside the error of the scores."""
    unit = 2.0**-24
    one = foveal.attention(*(np.ones((3, 1, 8), np.float32),) * 3, return_stats=True).stats
    assert (one.entropy == 0).all()
    assert (one.breadth == 1).all()
    assert (one.argmax == 0).all()
    for n in (2, 100, 5000):
        q, k = np.ones((4, 8), np.float32), np.ones((n, 8), np.float32)
        stats = foveal.attention(q, k, k, return_stats=True).stats
        assert abs(stats.entropy - np.log(n)).max() <= 32 * unit * (1 + np.log(n))
        assert (stats.argmax == 0).all()  # of equals the first
    scores = np.linspace(-1e4, 1e4, 999).astype(np.float32)
    stats = foveal.attention(np.ones((1, 1), np.float32), scores[:, None], scores[:, None], return_stats=True).stats
    s = scores.astype(np.float64)
    p = np.exp(s - s.max())
    p /= p.sum()
    assert abs(stats.entropy - -(p * np.log(np.where(p > 0, p, 1))).sum()).max() <= 32 * unit * (1 + np.log(999))
    assert stats.argmax == 998


def test_a_sink_takes_no_part() -> None:
    q, k, v = arrays(9)
    sinks = np.array([-1.0, 0, 3, 8])
    found = foveal.attention(q, k, v, sinks=sinks, return_stats=True, return_weights=True)
    for field, value in expected(found.weights).items():
        np.testing.assert_allclose(getattr(found.stats, field), value, atol=1e-11, err_msg=field)


def test_a_row_with_nan_has_no_statistics_but_nan() -> None:
    q, k, v = arrays(5)
    q[0, 0, 2] = np.nan
    for normalizer in NORMALIZERS:
        stats = foveal.attention(q, k, v, normalizer=normalizer, return_stats=True).stats
        for value in (stats.entropy, stats.breadth, stats.max_weight):
            assert np.isnan(value[0, 0, 2]), normalizer
            assert np.isnan(value).sum() == 1, normalizer
        assert stats.argmax[0, 0, 2] == -1


def test_empty_sizes() -> None:
    q, k = np.ones((2, 3, 0, 8)), np.ones((2, 3, 5, 8))
    stats = foveal.attention_stats(q, k, top_k=2)
    assert stats.entropy.shape == (2, 3, 0)
    assert (stats.key_mass == np.zeros((2, 3, 5))).all()
    assert stats.top_keys.shape == (2, 3, 0, 2)
    none = foveal.attention_stats(k, q)
    assert (none.entropy == 0).all()
    assert (none.breadth == 0).all()
    assert (none.argmax == -1).all()
    assert none.key_mass.shape == (2, 3, 0)
    assert foveal.attention_stats(np.ones((0, 3, 4, 8)), np.ones((0, 3, 5, 8))).key_mass.shape == (0, 3, 5)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_ranks_and_layouts(layout: str) -> None:
    q, k, _ = arrays(7)
    whole = foveal.attention_stats(q, k, top_k=2)
    if layout == "bshd":
        q, k = q.swapaxes(1, 2), k.swapaxes(1, 2)
    for x, y in zip(foveal.attention_stats(q, k, top_k=2, layout=layout), whole, strict=True):
        assert x is y is None or np.array_equal(x, y)
    for x, y in zip(foveal.attention_stats(q[0], k[0], top_k=2, layout=layout), whole, strict=True):
        assert x is y is None or np.array_equal(x, y[0])


def test_statistics_of_a_long_row_hold_no_matrix() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, 4096, 16), dtype=np.float32) for _ in range(2))
    stats = foveal.attention_stats(q, k, top_k=3)
    np.testing.assert_allclose(stats.key_mass.sum(), 4096, rtol=1e-5)
    assert (np.diff(stats.top_weights, axis=-1) <= 0).all()


@pytest.mark.parametrize(
    ("top_k", "kind", "text"),
    [
        (-1, ValueError, "top_k is -1, expected 0 to Skv = 150"),
        (151, ValueError, "top_k is 151, expected 0 to Skv = 150"),
        (2**70, ValueError, f"top_k is {2**70}, expected 0 to Skv = 150"),
        (1.5, TypeError, "top_k has type float, expected an integer"),
        (True, TypeError, "top_k has type bool, expected an integer"),
    ],
)
def test_refusals(top_k: Any, kind: type[Exception], text: str) -> None:
    q, k, _ = arrays(3)
    with pytest.raises(kind, match="^attention_stats: " + text):
        foveal.attention_stats(q, k, top_k=top_k)
    with pytest.raises(ValueError, match=r"^attention_stats: k.shape\[3\] is 8, expected head_dim 16"):
        foveal.attention_stats(q, k[..., :8])
