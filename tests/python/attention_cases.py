"""Attention written out in NumPy, the error that a right kernel may make, and arrays to try it on."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from foveal import _core
from foveal._options import DEFAULTS, core_arguments

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]

# Unit roundoff, and half the spacing of the numbers around zero below which results may be flushed.
ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = {"float32": 2.0**-126, "float64": 2.0**-1022, "float16": 2.0**-24, "bfloat16": 2.0**-126}


class Expected(NamedTuple):
    """Results in float64 and how far a kernel may be from each, in the caller's rank and layout."""

    out: np.ndarray
    lse: np.ndarray
    weights: np.ndarray
    out_error: np.ndarray
    lse_error: np.ndarray
    weights_error: np.ndarray
    seen: np.ndarray


def _canonical(array: np.ndarray, layout: str) -> np.ndarray:
    """(B, H, S, D) from the caller's rank and layout."""
    if layout == "bshd" and array.ndim > 2:
        array = array.swapaxes(-3, -2)
    return array.reshape((1,) * (4 - array.ndim) + array.shape).astype(np.float64)


def _visible(
    shape: tuple[int, ...],
    causal: bool,
    window: tuple[int | None, int | None],
    mask: Any,
    q_offset: np.ndarray,
    q_lens: np.ndarray,
    kv_lens: np.ndarray,
) -> np.ndarray:
    _, _, seqlen_q, seqlen_kv = shape
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_kv)
    position = q_offset[:, None, None, None] + i
    seen = np.broadcast_to(True if mask is None else np.asarray(mask), shape) & (j < kv_lens[:, None, None, None])
    seen = seen & (i < q_lens[:, None, None, None])
    if causal:
        seen = seen & (j <= position)
    if window[0] is not None:
        seen = seen & (j >= position - window[0])
    if window[1] is not None:
        seen = seen & (j <= position + window[1])
    return seen


def formula(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    q_offset: Any = None,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    layout: str = "bhsd",
) -> Expected:
    """Compute softmax(scores) v over whole arrays, with the error bound of a kernel that accumulates as q's dtype asks.

    It follows the rounding of each step to first order. A sum of n terms is granted n roundings (Higham 2002, "Accuracy
    and Stability of Numerical Algorithms", 4.2). The square root of that would do for independent roundings, but equal
    terms, which the search for failing cases likes, round alike.
    """
    rank, dtype = q.ndim, q.dtype.name
    unit = ROUNDOFF["float64" if dtype == "float64" else "float32"]
    q4, k4, v4 = (_canonical(array, layout) for array in (q, k, v))
    batch, num_heads, seqlen_q, head_dim = q4.shape
    group = num_heads // k4.shape[1] if k4.shape[1] else 1
    k4, v4 = k4.repeat(group, axis=1), v4.repeat(group, axis=1)
    seqlen_kv = k4.shape[2]
    shape = (batch, num_heads, seqlen_q, seqlen_kv)

    q_len = np.full(batch, seqlen_q) if q_lens is None else np.asarray(q_lens, np.int64)
    kv_len = np.full(batch, seqlen_kv) if kv_lens is None else np.asarray(kv_lens, np.int64)
    offset = kv_len - q_len if q_offset is None else np.broadcast_to(np.asarray(q_offset, np.int64), (batch,))
    seen = _visible(shape, causal, window, mask, offset, q_len, kv_len)
    scale = head_dim**-0.5 if scale is None else scale

    with np.errstate(all="ignore"):
        dots = scale * (q4 @ k4.swapaxes(-1, -2))
        magnitude = abs(scale) * (np.abs(q4) @ np.abs(k4).swapaxes(-1, -2))
        error = (head_dim + 4) * unit * magnitude
        scores = dots
        if softcap > 0:
            scores = softcap * np.tanh(dots / softcap)
            error = error + 8 * unit * np.abs(scores)
        if alibi_slopes is not None:
            slopes = np.broadcast_to(np.asarray(alibi_slopes, np.float64), (batch, num_heads))[:, :, None, None]
            position = offset[:, None, None, None] + np.arange(seqlen_q)[:, None]
            linear = slopes * np.abs(position - np.arange(seqlen_kv))
            scores, error = scores - linear, error + 4 * unit * np.abs(linear)
        if bias is not None:
            added = np.broadcast_to(np.asarray(bias, np.float64), shape)
            scores, error = scores + added, error + 4 * unit * np.where(np.isinf(added), 0, np.abs(added))
        error = error + 4 * unit * np.abs(scores)

        seen = seen & (scores != -np.inf)
        scores = np.where(seen, scores, -np.inf)
        sink = np.full((batch, num_heads, seqlen_q, 1), -np.inf)
        if sinks is not None:
            sink[:] = np.asarray(sinks, np.float64)[:, None, None]
            sink[np.broadcast_to((np.arange(seqlen_q) >= q_len[:, None])[:, None, :, None], sink.shape)] = -np.inf
        top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), sink)
        finite_top = np.where(np.isneginf(top), 0.0, top)
        exponentials = np.where(seen, np.exp(scores - finite_top), 0.0)
        total = exponentials.sum(-1, keepdims=True) + np.exp(sink - finite_top)
        lse = np.where(total == 0, -np.inf, finite_top + np.log(total))
        weights = np.where(seen, exponentials / total, 0.0)

        # Relative errors of a weight before and by its normalisation.
        distance = np.where(seen, np.abs(scores - finite_top), 0.0)
        relative = np.where(seen, error + 4 * unit * (distance + 1), 0.0)
        joint = (weights * relative).sum(-1, keepdims=True) + (seqlen_kv + 4) * unit
        visible_v = np.where(np.isnan(v4) | np.isinf(v4), 0.0, v4)
        hides_all_such = np.where(np.isnan(v4) | np.isinf(v4), 1.0, 0.0)
        out = weights @ visible_v
        if hides_all_such.any():  # rows that see such a v are not for this formula
            out = np.where((seen.astype(float) @ hides_all_such) > 0, np.nan, out)
        rounding = ROUNDOFF[dtype]
        # docs/numerics.md: with AVX512-BF16, three to eight rows of a key/value head have their weights rounded.
        few = (q_len * group >= 3) & (q_len * group <= 8) & (dtype == "bfloat16" and _core.isa() == "avx512bf16")
        relative_in_out = relative + joint + 8 * unit + 2 * rounding * few[:, None, None, None]
        # A weight below the smallest normal number of the accumulator may count as nothing.
        flushed = seen * TINY["float64" if dtype == "float64" else "float32"]
        out_error = (weights * relative_in_out + flushed) @ np.abs(visible_v) + 2 * rounding * np.abs(out) + TINY[dtype]
        weights_error = weights * (relative + joint) + 2 * rounding * weights + TINY[dtype]
        lse_error = (joint + 4 * unit * (1 + np.abs(np.where(np.isinf(lse), 0.0, lse)) + np.abs(finite_top))) + TINY[
            "float32"
        ]

    def shaped(array: np.ndarray, swap: bool) -> np.ndarray:
        array = array.reshape(array.shape[4 - rank :])
        return array.swapaxes(-3, -2) if swap and layout == "bshd" and rank > 2 else array

    return Expected(
        shaped(out, True),
        shaped(lse, False)[..., 0],
        shaped(weights, False),
        shaped(out_error, True),
        shaped(lse_error, False)[..., 0],
        shaped(weights_error, False),
        shaped(np.broadcast_to(seen, shape), False),
    )


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give out, lse and weights of the float64 oracle in C++."""
    assert options.keys() <= DEFAULTS.keys()
    arguments = core_arguments(options, return_lse=True, return_weights=True)
    out, lse, weights, _ = _core.attention_reference(q, k, v, *arguments.values())
    return out, lse, weights


def assert_within(actual: np.ndarray, expected: np.ndarray, error: np.ndarray, what: str) -> None:
    """Compare entry by entry; infinities and NaN must be where they are expected."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    found = actual.astype(np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite], err_msg=what)
    with np.errstate(invalid="ignore"):
        far = finite & ~(np.abs(found - np.where(finite, expected, 0)) <= error)
    if far.any():
        worst = tuple(int(n) for n in np.argwhere(far)[0])
        raise AssertionError(
            f"{what}: {far.sum()} of {far.size} entries beyond the bound, the first at {worst}: "
            f"{found[worst]!r}, expected {expected[worst]!r} within {error[worst]:.3g}"
        )


def random_array(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Normal variates."""
    return rng.standard_normal(shape).astype(dtype)
