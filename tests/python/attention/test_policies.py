"""Gates and spans against their formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16

import foveal

B, HQ, HKV, SKV, D = 2, 4, 2, 150, 16
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}


def arrays(rows: int, dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(rows)
    return [rng.standard_normal(x).astype(dtype) for x in ((B, HQ, rows, D), (B, HKV, SKV, D), (B, HKV, SKV, D))]


def formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, gate: Any = None, span: Any = None, causal: bool = False):
    """Give the output and the weights."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HQ // HKV, axis=1) for x in (k, v))
    s = q @ k.swapaxes(-1, -2) / np.sqrt(D)
    position = (SKV - q.shape[2] + np.arange(q.shape[2]))[:, None]
    if gate is not None:
        tau = np.broadcast_to(gate[0], q.shape[:3])[..., None]
        temperature = np.broadcast_to(gate[1], (HQ,))[:, None, None]
        s = s - np.logaddexp(0, -(s - tau) / temperature)
    if span is not None:
        z, ramp = np.broadcast_to(span[0], (B, HQ))[..., None, None], span[1]
        with np.errstate(divide="ignore"):
            s = s + np.log(np.clip((ramp + z - abs(position - np.arange(SKV))) / ramp, 0, 1))
    if causal:
        s = np.where(np.arange(SKV) <= position, s, -np.inf)
    highest = s.max(-1, keepdims=True)
    w = np.exp(s - np.where(np.isfinite(highest), highest, 0))
    total = w.sum(-1, keepdims=True)
    w = np.divide(w, total, out=np.zeros_like(w), where=total > 0)
    return w @ v, w


def policies(rows: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(1)
    return {
        "tau of each query": {"gate": (rng.standard_normal((B, HQ, rows)), 0.3)},
        "a temperature a head": {"gate": (0.2, rng.random(HQ) + 0.2)},
        "a closed gate": {"gate": (100.0, 1.0)},
        "a span a head": {"span": (rng.random(HQ) * 60, 20.0)},
        "a span of a number": {"span": (9.5, 0.5), "causal": True},
        "spans of which some hide all": {"span": (rng.random((B, HQ)) * 60 - 30, 7.0)},
        "both": {
            "gate": (rng.standard_normal((1, HQ, 1)), 0.5),
            "span": (rng.random((1, HQ)) * 90, 40.0),
            "causal": True,
        },
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16], ids=lambda x: np.dtype(x).name)
@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("name", policies(1))
def test_against_the_formula(name: str, rows: int, dtype: Any) -> None:
    q, k, v = arrays(rows, dtype)
    options = policies(rows)[name]
    expected, weights = formula(q, k, v, **options)
    found = foveal.attention(q, k, v, return_weights=True, **options)
    tolerance = TOLERANCE[np.dtype(dtype).name]
    np.testing.assert_allclose(found.out.astype(np.float64), expected, atol=tolerance)
    np.testing.assert_allclose(found.weights.astype(np.float64), weights, atol=tolerance)
    np.testing.assert_allclose(foveal.attention(q, k, v, **options).astype(np.float64), expected, atol=tolerance)


def test_packed_sequences_have_the_bits_of_each_alone() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, D)).astype(np.float32) for n, h in ((9, HQ), (12, HKV), (12, HKV)))
    tau, z = rng.standard_normal((HQ, 9)).astype(np.float32), rng.random(HQ) * 5
    found = foveal.attention_varlen(q, k, v, [0, 4, 9], [0, 7, 12], gate=(tau, 0.5), span=(z, 3.0))
    for rows, keys in ((slice(0, 4), slice(0, 7)), (slice(4, 9), slice(7, 12))):
        alone = foveal.attention(q[rows], k[keys], v[keys], gate=(tau[:, rows], 0.5), span=(z, 3.0), layout="bshd")
        assert (found[rows] == alone).all()


def test_lengths_and_a_batch_change_no_bit() -> None:
    q, k, v = arrays(20, np.float32)
    tau = np.random.default_rng(0).standard_normal((B, HQ, 20)).astype(np.float32)
    options = {"gate": (tau, 0.4), "span": (30.0, 8.0), "causal": True}
    both = foveal.attention(q, k, v, kv_lens=[150, 90], **options)
    alone = foveal.attention(q[1:], k[1:, :, :90], v[1:, :, :90], **{**options, "gate": (tau[1:], 0.4)})
    assert (both[1:] == alone).all()


def test_what_a_span_hides_does_not_reach_the_output() -> None:
    q, k, v = arrays(20, np.float32)
    expected = foveal.attention(q, k, v, span=(20.0, 5.0), causal=True)
    k[:, :, :100], v[:, :, :100] = np.nan, np.inf
    assert (foveal.attention(q, k, v, span=(20.0, 5.0), causal=True) == expected).all()


def test_pointwise_normalisers_count_keys_beyond_the_span() -> None:
    q, k, v = arrays(5)
    weights = foveal.attention(q, k, v, span=(10.0, 5.0), normalizer="relu", return_weights=True).weights
    s = q @ np.repeat(k, HQ // HKV, axis=1).swapaxes(-1, -2) / np.sqrt(D)
    left = 15 - abs(SKV - 5 + np.arange(5)[:, None] - np.arange(SKV))
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.where(left > 0, s + np.log(np.clip(left / 5, 0, 1)), -np.inf)
    np.testing.assert_allclose(weights, np.maximum(s, 0) / SKV, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"gate": 1.0}, TypeError, r"gate has type float, expected \(tau, T\)"),
        ({"gate": (1.0,)}, ValueError, r"gate has 1 items, expected \(tau, T\)"),
        ({"gate": (0.0, 0.0)}, ValueError, r"gate\[1\] has the element 0, expected finite numbers above 0"),
        ({"gate": (0.0, np.array([1.0, -1, 1, 1]))}, ValueError, r"gate\[1\] has the element -1"),
        ({"gate": (0.0, float("nan"))}, ValueError, r"gate\[1\] has the element nan"),
        ({"gate": (0.0, np.ones(3))}, ValueError, r"gate\[1\] has shape \(3,\), expected \(\) or \(Hq,\) = \(4,\)"),
        ({"gate": (np.zeros((HQ, 9)), 1.0)}, ValueError, r"gate\[0\] has shape \(4, 9\), expected an array that broad"),
        ({"gate": ("x", 1.0)}, TypeError, r"gate\[0\] has type str, expected a number or a floating array"),
        ({"gate": (np.zeros(5, int), 1.0)}, TypeError, r"gate\[0\] has dtype int64"),
        ({"span": 3}, TypeError, r"span has type int, expected \(z, ramp\)"),
        ({"span": (3.0, 0.0)}, ValueError, r"span\[1\] is 0, expected a finite number above 0"),
        ({"span": (3.0, float("inf"))}, ValueError, r"span\[1\] is inf"),
        ({"span": (3.0, "x")}, TypeError, r"span\[1\] has type str, expected a number"),
        (
            {"span": (np.zeros(3), 1.0)},
            ValueError,
            r"span\[0\] has shape \(3,\), expected \(Hq,\) = \(4,\) or \(B, Hq\)",
        ),
    ],
)
def test_refusals(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    q, k, v = arrays(5)
    with pytest.raises(kind, match="^attention: " + text):
        foveal.attention(q, k, v, **options)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    q, k, v = arrays(300, np.float32)
    options = {"gate": (np.zeros((B, HQ, 300), np.float32), 0.4), "span": (60.0, 8.0), "return_stats": True}
    before = foveal.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            foveal.set_num_threads(threads)
            results.append((foveal.attention(q, k, v, **options), foveal.attention_stats(q, k, top_k=3)))
        for found, stats in results[1:]:
            assert (found.out == results[0][0].out).all()
            assert all((x == y).all() for x, y in zip(found.stats[:4], results[0][0].stats[:4], strict=True))
            assert all((x == y).all() for x, y in zip(stats[5:], results[0][1][5:], strict=True))
    finally:
        foveal.set_num_threads(before)
