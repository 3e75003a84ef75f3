"""Numbers at the ends of their range: what is finite stays so in base 2 and in float32."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16, DTYPES, ROUNDOFF, random_array

import foveal

SKV = 150  # more than a block of keys

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_seqlen = pytest.mark.parametrize("seqlen_q", [1, 4, 40])  # kernels for one row, for few and for many


def qkv(seqlen_q: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = (1, 2, seqlen_q, 16), (1, 1, SKV, 16), (1, 1, SKV, 8)
    return tuple(random_array(rng, shape, np.dtype(dtype)) for shape in shapes)  # type: ignore[return-value]


def lowest_of(dtype: np.dtype[Any]) -> np.ndarray:
    """The most negative finite number."""
    if dtype == BFLOAT16:
        return np.array(0xFF7F, np.uint16).view(BFLOAT16)
    return np.array(np.finfo(dtype).min, dtype)


def assert_mean(out: np.ndarray, v: np.ndarray) -> None:
    """Every row of `out` is the mean of the rows of `v`, whose weights are equal."""
    v = v.astype(np.float64)
    unit = ROUNDOFF["float64" if out.dtype == np.float64 else "float32"]
    error = 2 * len(v) * unit * np.abs(v).mean(0) + 4 * ROUNDOFF[out.dtype.name] * np.abs(v).max(0)
    assert (np.abs(out.astype(np.float64) - v.mean(0)) <= error).all()


# ---- bias -----------------------------------------------------------------------------------------------------------


@each_dtype
@each_seqlen
@pytest.mark.parametrize("bias_dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_with_nothing_but_the_lowest_bias_takes_the_mean(
    isa: str, seqlen_q: int, dtype: Any, bias_dtype: Any, sign: int
) -> None:
    q, k, v = qkv(seqlen_q, dtype)
    bias = np.zeros((seqlen_q, SKV), bias_dtype)
    bias[0] = sign * lowest_of(bias_dtype)
    mask = np.arange(SKV) < 70
    result = foveal.attention(q, k, v, bias=bias, mask=mask, return_lse=True)
    assert_mean(result.out[0, :, 0], v[0, 0, :70])
    assert np.isfinite(result.lse).all()
    assert (np.sign(result.lse[:, :, 0]) == -sign).all()
    other_rows = foveal.attention(q, k, v, mask=mask)[:, :, 1:]
    np.testing.assert_array_equal(result.out[:, :, 1:], other_rows)


@each_dtype
@each_seqlen
def test_the_lowest_bias_hides_keys_beside_others(isa: str, seqlen_q: int, dtype: Any) -> None:
    q, k, v = qkv(seqlen_q, dtype)
    hidden = np.random.default_rng(1).random((seqlen_q, SKV)) < 0.4
    expected = foveal.attention(q, k, v, bias=np.where(hidden, -np.inf, 0))
    for lowest in (lowest_of(np.dtype(np.float32)), lowest_of(np.dtype(np.float64)), lowest_of(BFLOAT16)):
        out = foveal.attention(q, k, v, bias=np.where(hidden, lowest, np.zeros_like(lowest)))
        np.testing.assert_array_equal(out, expected)


@each_seqlen
def test_no_other_bias_is_bounded(isa: str, seqlen_q: int) -> None:
    q, k, v = qkv(seqlen_q)
    for odd, lse in ((-np.inf, -np.inf), (np.inf, np.nan), (np.nan, np.nan)):
        result = foveal.attention(q, k, v, bias=np.full((1, SKV), odd), return_lse=True)
        np.testing.assert_array_equal(result.lse, np.full_like(result.lse, lse))
        np.testing.assert_array_equal(result.out, np.full_like(result.out, 0 if odd == -np.inf else np.nan))


# ---- scale and softcap ----------------------------------------------------------------------------------------------


@each_seqlen
@pytest.mark.parametrize(
    ("dtype", "softcaps"),
    [(np.float32, (3e38, 1e39, 1e300)), (np.float16, (1e39, 1e300)), (np.float64, (1.7e308,))],
    ids=["float32", "float16", "float64"],
)
def test_a_softcap_beyond_all_scores_is_none(isa: str, seqlen_q: int, dtype: Any, softcaps: tuple[float, ...]) -> None:
    q, k, v = qkv(seqlen_q, dtype)
    for softcap in softcaps:
        np.testing.assert_array_equal(foveal.attention(q, k, v, softcap=softcap), foveal.attention(q, k, v))


@each_dtype
@each_seqlen
def test_a_softcap_of_next_to_nothing_makes_all_scores_equal(isa: str, seqlen_q: int, dtype: Any) -> None:
    q, k, v = qkv(seqlen_q, dtype)
    q[:, :, 0] = 0  # 0 * inf, where 1 / softcap was not bounded
    for softcap in (5e-324, 1e-300, 1e-45, 1e-38):
        for row in foveal.attention(q, k, v, softcap=softcap)[0, 0]:
            assert_mean(row[None], v[0, 0])


@each_dtype
@pytest.mark.parametrize("scale", [3e38, -1e300])
def test_a_scale_beyond_the_accumulator_is_refused(dtype: Any, scale: float) -> None:
    q, k, v = qkv(1, dtype)
    if dtype == np.float64:
        assert np.isfinite(foveal.attention(q / 2**30, k / 2**30, v, scale=scale)).all()
        return
    text = f"attention: scale is {scale:g}, expected a magnitude of at most 2.35866e+38 for {dtype}"
    with pytest.raises(ValueError, match=re.escape(text)):
        foveal.attention(q, k, v, scale=scale)


# ---- sinks and slopes -----------------------------------------------------------------------------------------------


LARGEST = np.array(np.finfo(np.float32).max, np.float32), np.array(np.finfo(np.float64).max)


@each_dtype
@each_seqlen
def test_sinks_as_large_as_can_be(isa: str, seqlen_q: int, dtype: Any) -> None:
    q, k, v = qkv(seqlen_q, dtype)
    for largest in LARGEST:
        above, below = (np.full(2, sign * largest, largest.dtype) for sign in (1, -1))
        result = foveal.attention(q, k, v, sinks=above, return_lse=True)
        assert (result.out == 0).all()
        assert np.isfinite(result.lse).all()
        assert (result.lse > 1e38).all()
        np.testing.assert_array_equal(foveal.attention(q, k, v, sinks=below), foveal.attention(q, k, v))
        nothing = np.zeros(1, bool)
        for sinks, sign in ((above, 1), (below, -1)):
            result = foveal.attention(q, k, v, sinks=sinks, mask=nothing, return_lse=True)
            assert (result.out == 0).all()
            assert np.isfinite(result.lse).all()
            assert (sign * result.lse > 1e38).all()


@each_dtype
@each_seqlen
def test_slopes_as_large_as_can_be(isa: str, seqlen_q: int, dtype: Any) -> None:
    q, k, v = qkv(seqlen_q, dtype)
    for largest in LARGEST:
        for sign, seen in ((1, slice(0, seqlen_q)), (-1, slice(SKV - 1, SKV))):  # the nearest key, the farthest
            slopes = np.full(2, sign * largest, largest.dtype)
            result = foveal.attention(q, k, v, alibi_slopes=slopes, q_offset=0, return_lse=True)
            np.testing.assert_array_equal(result.out, np.broadcast_to(v[:, :, seen], result.out.shape))
            assert np.isfinite(result.lse).all()
