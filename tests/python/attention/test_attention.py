"""foveal.attention against the float64 oracle and against a formula in NumPy, on every instruction set."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16, DTYPES, assert_within, formula, random_array, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import foveal

# 0, 1, around the vector lanes (4 to 16), register tiles (24, 48), key blocks (128) and row blocks (192).
SEQLENS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 33, 47, 48, 49, 63, 65, 127, 128, 129, 191, 193]
HEAD_DIMS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 192, 256, 257, 511, 512]


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> foveal.Attention:
    """Compare out, lse and weights with the formula, and return them."""
    expected = formula(q, k, v, **options)
    result = foveal.attention(q, k, v, return_lse=True, return_weights=True, **options)
    alone = foveal.attention(q, k, v, **options)
    for out in (result.out, alone):
        assert out.dtype == q.dtype
        assert_within(out, expected.out, expected.out_error, "out")
    assert result.lse.dtype == (np.float64 if q.dtype == np.float64 else np.float32)
    assert_within(result.lse, expected.lse, expected.lse_error, "lse")
    assert result.weights.dtype == q.dtype
    assert_within(result.weights, expected.weights, expected.weights_error, "weights")
    # float16 and bfloat16 lse are float32 from the same sums; without weights another kernel may run.
    assert_within(
        foveal.attention(q, k, v, return_lse=True, **options).lse, expected.lse, expected.lse_error, "lse alone"
    )
    return result


def qkv(shape: tuple[int, int, int, int, int, int, int], dtype: Any = np.float32, seed: int = 0) -> Any:
    """(B, Hq, Hkv, Sq, Skv, D, Dv) to three arrays."""
    batch, num_heads, num_kv_heads, seqlen_q, seqlen_kv, head_dim, value_dim = shape
    rng = np.random.default_rng(seed)
    return (
        random_array(rng, (batch, num_heads, seqlen_q, head_dim), np.dtype(dtype)),
        random_array(rng, (batch, num_kv_heads, seqlen_kv, head_dim), np.dtype(dtype)),
        random_array(rng, (batch, num_kv_heads, seqlen_kv, value_dim), np.dtype(dtype)),
    )


# ---- the grid -------------------------------------------------------------------------------------------------------


@st.composite
def axis_steps(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An order of the axes in memory, and a step for each: negative reverses, 0 broadcasts."""
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.tuples(*(st.sampled_from([1, 1, 1, 2, 3, -1, -2, 0]) for _ in shape)))
    return tuple(order), steps


def stretched(array: np.ndarray, order: tuple[int, ...], steps: tuple[int, ...]) -> np.ndarray:
    """The values of `array` (of one slice, where a step is 0) under other strides."""
    for axis, step in enumerate(steps):
        if step == 0 and array.shape[axis] > 0:
            array = np.repeat(np.take(array, [0], axis), array.shape[axis], axis)
    stored = [1 if step == 0 else extent * abs(step) for extent, step in zip(array.shape, steps, strict=True)]
    memory = np.full([stored[axis] for axis in order], 7, array.dtype).transpose(np.argsort(order))
    index = tuple(slice(None, None, step or 1) for step in steps)
    view = memory[index]
    strides = [0 if step == 0 else stride for stride, step in zip(view.strides, steps, strict=True)]
    view = as_strided(view, array.shape, strides)
    view[...] = array
    return view


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, Any, Any, dict[str, Any]]:
    """q, k, v and options, over everything that attention accepts."""
    dtype = draw(st.sampled_from(DTYPES))
    rank = draw(st.sampled_from([4, 4, 4, 3, 2]))
    layout = draw(st.sampled_from(["bhsd", "bshd"]))
    batch = draw(st.sampled_from([1, 1, 2, 3, 0])) if rank == 4 else 1
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 0])) if rank > 2 else 1
    group = draw(st.sampled_from([1, 1, 2, 3, 4, 5, 8])) if rank > 2 else 1
    seqlen_q = draw(st.sampled_from(SEQLENS) | st.integers(0, 70))
    seqlen_kv = draw(st.sampled_from(SEQLENS) | st.integers(0, 300))
    # Keep an example under some 3 million products: the point is variety.
    room = max(1, 3_000_000 // max(1, batch * num_kv_heads * group * seqlen_q * seqlen_kv))
    head_dim = draw(st.sampled_from([d for d in HEAD_DIMS if d <= room]))
    value_dim = draw(st.just(head_dim) | st.sampled_from([d for d in HEAD_DIMS if d <= room]))
    num_heads = num_kv_heads * group
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(heads: int, seqlen: int, dim: int) -> np.ndarray:
        shape = (batch, heads, seqlen, dim) if layout == "bhsd" else (batch, seqlen, heads, dim)
        shape = shape[4 - rank :] if rank > 2 else (seqlen, dim)
        return stretched(random_array(rng, shape, dtype), *draw(axis_steps(shape)))

    q, k = array(num_heads, seqlen_q, head_dim), array(num_kv_heads, seqlen_kv, head_dim)
    v = array(num_kv_heads, seqlen_kv, value_dim)
    scores = (batch, num_heads, seqlen_q, seqlen_kv)

    def broadcast_shape() -> tuple[int, ...]:
        shape = tuple(draw(st.sampled_from([extent, 1])) for extent in scores)
        return shape[draw(st.integers(0, 4)) :]

    options: dict[str, Any] = {"layout": layout}
    if draw(st.booleans()):
        options["causal"] = draw(st.sampled_from([True, np.True_]))
    if draw(st.booleans()):
        options["q_offset"] = draw(
            st.integers(-5, seqlen_kv + 3) | st.lists(st.integers(-300, 300), min_size=batch, max_size=batch)
        )
    if draw(st.sampled_from([True, False, False])):
        side = st.none() | st.integers(0, 20) | st.integers(100, 200)
        options["window"] = (draw(side), draw(side))
    if draw(st.sampled_from([True, False, False])):
        mask = rng.random(broadcast_shape()) < draw(st.sampled_from([0.5, 0.02, 0.98, 0.0, 1.0]))
        options["mask"] = stretched(np.asarray(mask), *draw(axis_steps(mask.shape)))
    if draw(st.sampled_from([True, False, False])):
        bias = random_array(rng, broadcast_shape(), draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()):
            bias[rng.random(bias.shape) < 0.3] = -np.inf
        options["bias"] = stretched(bias, *draw(axis_steps(bias.shape)))
    if draw(st.sampled_from([True, False, False])):
        options["scale"] = draw(st.sampled_from([0.0, 1.0, -0.3, 0.05, 2]))
    if draw(st.sampled_from([True, False, False])):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50, 1e4]))
    if draw(st.sampled_from([True, False, False])):
        shape = draw(st.sampled_from([(num_heads,), (batch, num_heads)]))
        slopes = rng.random(shape).astype(draw(st.sampled_from(DTYPES)))
        options["alibi_slopes"] = stretched(slopes, *draw(axis_steps(shape)))
    if draw(st.sampled_from([True, False, False])):
        sinks = random_array(rng, (num_heads,), draw(st.sampled_from(DTYPES)))
        sinks[rng.random(num_heads) < 0.2] = -np.inf
        options["sinks"] = sinks
    for name, seqlen in (("q_lens", seqlen_q), ("kv_lens", seqlen_kv)):
        if draw(st.sampled_from([True, False, False])):
            lens = draw(st.lists(st.integers(0, seqlen), min_size=batch, max_size=batch))
            options[name] = draw(st.sampled_from([list, tuple, np.array, lambda x: np.array(x, np.int32)]))(lens)
            if isinstance(options[name], np.ndarray) and not lens:
                options[name] = options[name].astype(np.int64)
    return q, k, v, options


@settings(max_examples=300)
@given(problems())
def test_option_grid(isa: str, problem: tuple[Any, Any, Any, dict[str, Any]]) -> None:
    q, k, v, options = problem
    check(q, k, v, **options)


@settings(max_examples=300)
@given(problems())
def test_oracle_agrees_with_the_formula(problem: tuple[Any, Any, Any, dict[str, Any]]) -> None:
    # In float64 the oracle is a kernel like any other: both it and the formula round each step to 2^-53.
    q, k, v, options = problem
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    expected = formula(q, k, v, **options)
    out, lse, weights = reference(q, k, v, **options)
    assert_within(out, expected.out, expected.out_error, "out")
    assert_within(lse, expected.lse, expected.lse_error + 1e-15, "lse")
    assert_within(weights, expected.weights, expected.weights_error, "weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle_rounds_once(dtype: Any) -> None:
    # The same numbers as a float64 problem, then rounded by NumPy: equal bits.
    q, k, v = qkv((1, 2, 1, 9, 11, 8, 5), dtype)
    out, _, weights = reference(q, k, v)
    wide_out, _, wide_weights = reference(*(array.astype(np.float64) for array in (q, k, v)))
    np.testing.assert_array_equal(out, wide_out.astype(dtype))
    np.testing.assert_array_equal(weights, wide_weights.astype(dtype))


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(isa: str, head_dim: int, dtype: Any) -> None:
    check(*qkv((1, 2, 1, 19, 37, head_dim, head_dim), dtype), causal=True)
    check(*qkv((1, 2, 1, 3, 21, 40, head_dim), dtype))


@pytest.mark.parametrize("seqlen_q", [1, 2, 15, 16, 17, 47, 48, 49, 127, 128, 129, 191, 192, 193])
@pytest.mark.parametrize("seqlen_kv", [1, 15, 16, 17, 127, 128, 129, 255, 257])
def test_seqlens(isa: str, seqlen_q: int, seqlen_kv: int) -> None:
    arrays = qkv((1, 1, 1, seqlen_q, seqlen_kv, 16, 16))
    check(*arrays)
    check(*arrays, causal=True)
    check(*arrays, causal=True, q_offset=0)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 17])
@pytest.mark.parametrize("seqlen_q", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding(isa: str, group: int, seqlen_q: int, dtype: Any) -> None:
    # One and a few queries a head, many keys: key ranges are split and merged.
    check(*qkv((2, 2 * group, 2, seqlen_q, 1100, 32, 24), dtype), causal=True, kv_lens=[1100, 3])
    check(*qkv((1, group, 1, seqlen_q, 4100, 16, 16), dtype))


@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 3, 4, 8, 8), (2, 0, 0, 3, 4, 8, 8), (2, 0, 3, 3, 4, 8, 8), (2, 2, 1, 0, 4, 8, 8), (2, 2, 1, 3, 0, 8, 8)],
)
def test_empty_axes(isa: str, shape: Any) -> None:
    result = check(*qkv(shape), causal=True)
    assert (result.out == 0).all()
    assert np.isneginf(result.lse).all()


def test_an_empty_batch_of_any_size_is_done_at_once() -> None:
    for batch in (2**28, 2**40, 2**59):
        no_rows = np.empty((batch, 1, 0, 1), np.float32)
        result = foveal.attention(no_rows, no_rows, no_rows, return_lse=True, return_weights=True)
        assert result.out.shape == (batch, 1, 0, 1)
        assert result.lse.shape == (batch, 1, 0)
        one_key = np.broadcast_to(np.float32(1), (batch, 1, 1, 1))
        assert foveal.attention(np.empty((batch, 0, 1, 1), np.float32), one_key, one_key).shape == (batch, 0, 1, 1)


def test_large_scores(isa: str) -> None:
    # exp overflows without the running maximum, in either order of the keys.
    q, k, v = qkv((1, 1, 1, 33, 200, 64, 8))
    for keys in (k, np.sort(k, axis=2), -np.sort(-k, axis=2)):
        check(30 * q, 30 * keys, v)


# ---- options one by one ---------------------------------------------------------------------------------------------


def test_causal_aligns_at_the_last_key(isa: str) -> None:
    q, k, v = qkv((1, 1, 1, 3, 5, 8, 8))
    out = foveal.attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, foveal.attention(q, k, v, mask=np.tri(3, 5, 2, dtype=bool)), atol=1e-6)
    out = foveal.attention(q, k, v, causal=True, q_offset=0)
    np.testing.assert_allclose(out, foveal.attention(q, k, v, mask=np.tri(3, 5, 0, dtype=bool)), atol=1e-6)
    with_lens = foveal.attention(q, k, v, causal=True, q_lens=[2], kv_lens=[4])
    np.testing.assert_allclose(
        with_lens[:, :, :2], foveal.attention(q[:, :, :2], k[:, :, :4], v[:, :, :4], causal=True), atol=1e-6
    )


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (150,),
        (60, 1),
        (60, 150),
        (4, 1, 1),
        (4, 60, 150),
        (2, 1, 1, 1),
        (2, 4, 60, 150),
        (1, 1, 60, 1),
        (2, 1, 1, 150),
    ],
)
def test_mask_and_bias_broadcast(isa: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    arrays = qkv((2, 4, 2, 60, 150, 16, 16))
    check(*arrays, mask=np.asarray(rng.random(shape) < 0.5))
    check(*arrays, bias=np.asarray(rng.standard_normal(shape)))
    check(*arrays, mask=np.asarray(rng.random(shape) < 0.7), bias=np.asarray(rng.standard_normal(shape), np.float16))


@pytest.mark.parametrize("left", [None, 0, 1, 16, 130])
@pytest.mark.parametrize("right", [None, 0, 1, 16, 130])
@pytest.mark.parametrize("causal", [False, True])
def test_windows(isa: str, left: int | None, right: int | None, causal: bool) -> None:
    check(*qkv((1, 2, 1, 150, 280, 8, 8)), window=(left, right), causal=causal)
    check(*qkv((1, 2, 1, 150, 280, 8, 8)), window=(left, right), causal=causal, q_offset=-40)


def test_windows_beyond_everything_do_nothing() -> None:
    arrays = qkv((1, 2, 1, 40, 60, 8, 8))
    expected = foveal.attention(*arrays)
    for huge in (10**6, 2**62, 2**63 - 1, 2**63, 10**30):
        np.testing.assert_array_equal(foveal.attention(*arrays, window=(huge, huge)), expected)


def test_positions_as_far_as_they_go(isa: str) -> None:
    q, k, v = qkv((1, 1, 1, 1, 9, 8, 8))
    far = 2**59
    for q_offset, window, seen in ((far, (far - 2, None), slice(2, 9)), (-far, (None, far + 3), slice(0, 4))):
        weights = foveal.attention(q, k, v, q_offset=q_offset, window=window, return_weights=True).weights
        np.testing.assert_array_equal(np.flatnonzero(weights), np.arange(9)[seen])
        unlimited = foveal.attention(q, k, v, q_offset=q_offset)
        np.testing.assert_array_equal(unlimited, foveal.attention(q, k, v))


def test_all_masked_rows(isa: str) -> None:
    q, k, v = qkv((2, 4, 2, 70, 140, 16, 16))
    mask = np.ones((70, 140), bool)
    mask[::3] = False
    bias = np.zeros((70, 140), np.float32)
    bias[::3] = -np.inf
    for options in ({"mask": mask}, {"bias": bias}):
        result = check(q, k, v, **options)
        assert (result.out[:, :, ::3] == 0).all()
        assert (result.weights[:, :, ::3] == 0).all()
        assert np.isneginf(result.lse[:, :, ::3]).all()
        sinks = np.array([1.5, -2, 0, -np.inf], np.float32)
        result = check(q, k, v, sinks=sinks, **options)
        assert (result.out[:, :, ::3] == 0).all()
        # Two roundings: the sink goes to base 2 and back.
        np.testing.assert_allclose(result.lse[:, :, ::3], np.broadcast_to(sinks[:, None], (2, 4, 24)), rtol=2**-23)


def test_rows_past_q_len(isa: str) -> None:
    q, k, v = qkv((2, 2, 1, 20, 30, 16, 16))
    q[1, :, 5:] = np.nan
    result = check(q, k, v, q_lens=[20, 5], kv_lens=[30, 0], sinks=np.array([0.5, 1], np.float32))
    assert (result.out[1] == 0).all()
    assert (result.weights[1] == 0).all()
    assert np.isneginf(result.lse[1, :, 5:]).all()
    np.testing.assert_allclose(result.lse[1, :, :5], [[0.5] * 5, [1] * 5], rtol=2**-23)


def test_scalars_of_numpy() -> None:
    q, k, v = qkv((1, 1, 1, 5, 9, 8, 8))
    expected = foveal.attention(q, k, v, causal=True, scale=0.25, softcap=2.0, q_offset=3, window=(4, None))
    out = foveal.attention(
        q,
        k,
        v,
        causal=np.True_,
        scale=np.float32(0.25),
        softcap=np.int64(2),
        q_offset=np.int16(3),
        window=[np.uint8(4), None],
    )
    np.testing.assert_array_equal(out, expected)
    offset = np.array(3)
    out = foveal.attention(q, k, v, causal=True, scale=0.25, softcap=2, window=(4, None), q_offset=offset)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"])
def test_lengths_of_any_integer_type(dtype: str) -> None:
    q, k, v = qkv((3, 1, 1, 6, 9, 8, 8))
    expected = foveal.attention(q, k, v, kv_lens=[9, 0, 4])
    np.testing.assert_array_equal(foveal.attention(q, k, v, kv_lens=np.array([9, 0, 4], dtype)), expected)
    every_other = np.array([7, 9, 7, 0, 7, 4], dtype)[1::2]
    np.testing.assert_array_equal(foveal.attention(q, k, v, kv_lens=every_other), expected)
    backwards = np.array([4, 0, 9], dtype)[::-1]
    np.testing.assert_array_equal(foveal.attention(q, k, v, kv_lens=backwards), expected)


# ---- what must not leak ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 3, 70])
def test_hidden_keys_do_not_leak(isa: str, dtype: Any, poison: float, seqlen_q: int) -> None:
    rng = np.random.default_rng(2)
    q, k, v = qkv((2, 4, 2, seqlen_q, 300, 32, 16), dtype)
    some = rng.random((2, 1, seqlen_q, 300)) < 0.6
    some[..., 128:256] = False  # a whole key block
    cases: list[dict[str, Any]] = [
        {"mask": some},
        {"kv_lens": [140, 0]},
        {"causal": True, "q_offset": 100},
        {"window": (20, 30), "q_offset": 150},
    ]
    for options in cases:
        expected = formula(q, k, v, **options)
        hidden_from_all = ~expected.seen.any((1, 2))  # (B, Skv)
        assert hidden_from_all.any()
        bad_k, bad_v = k.copy(), v.copy()
        for b in range(2):
            bad_k[b, :, hidden_from_all[b]] = poison
            bad_v[b, :, hidden_from_all[b]] = poison
        poisoned = foveal.attention(q, bad_k, bad_v, return_lse=True, return_weights=True, **options)
        for out in (poisoned.out, foveal.attention(q, bad_k, bad_v, **options)):
            assert_within(out, expected.out, expected.out_error, "out")
        assert_within(poisoned.lse, expected.lse, expected.lse_error, "lse")
        assert_within(poisoned.weights, expected.weights, expected.weights_error, "weights")


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("seqlen_q", [2, 5, 100])
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_key_that_others_see_does_not_leak(isa: str, poison: float, seqlen_q: int, where: str) -> None:
    q, k, v = qkv((1, 2, 1, seqlen_q, 200, 16, 16))
    (k if where == "k" else v)[:, :, 50] = poison
    mask = np.ones((seqlen_q, 200), bool)
    mask[::2, 50] = False
    expected = formula(q, np.where(np.isfinite(k), k, 0), np.where(np.isfinite(v), v, 0), mask=mask)
    result = foveal.attention(q, k, v, mask=mask, return_lse=True, return_weights=True)
    for out in (result.out, foveal.attention(q, k, v, mask=mask)):
        assert_within(out[:, :, ::2], expected.out[:, :, ::2], expected.out_error[:, :, ::2], "out")
        assert not np.isfinite(out[:, :, 1::2]).any() or (where == "k" and poison == np.inf)
    assert_within(result.lse[:, :, ::2], expected.lse[:, :, ::2], expected.lse_error[:, :, ::2], "lse")
    assert_within(result.weights[:, :, ::2], expected.weights[:, :, ::2], expected.weights_error[:, :, ::2], "weights")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 4, 60])
def test_nan_and_infinity_as_in_the_oracle(isa: str, dtype: Any, seqlen_q: int) -> None:
    base = qkv((1, 2, 1, seqlen_q, 150, 16, 16), dtype)
    for which, name in enumerate("qkv"):
        for poison in (np.nan, np.inf, -np.inf):
            arrays = [array.copy() for array in base]
            row = min(seqlen_q - 1, 2) if name == "q" else 70
            arrays[which][0, 0, row, 3] = poison
            out, lse, _ = reference(*arrays)
            result = foveal.attention(*arrays, return_lse=True)
            case = f"{poison} in {name}"
            expected = formula(*base)
            for actual, wanted, error in ((result.out, out, expected.out_error), (result.lse, lse, expected.lse_error)):
                odd = ~np.isfinite(wanted.astype(float))
                np.testing.assert_array_equal(actual[odd].astype(float), wanted[odd].astype(float), err_msg=case)
                assert np.isfinite(actual[~odd].astype(float)).all(), case
                if name != "k":  # an infinite k moves all weights, and with them the bound
                    assert_within(np.where(odd, 0, actual), np.where(odd, 0, wanted).astype(float), error * 2, case)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect by its Linux numbers")
def test_keys_past_kv_len_are_never_read(isa: str) -> None:
    # The last key that may be read ends where a page without access begins.
    head_dim, kv_len, page = 16, 21, mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    second_page = ctypes.c_void_p(np.frombuffer(memory, np.uint8).ctypes.data + page)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    keys = np.frombuffer(memory, np.float32, kv_len * head_dim, page - 4 * kv_len * head_dim)
    keys = keys.reshape(1, 1, kv_len, head_dim)
    keys[...] = random_array(np.random.default_rng(0), keys.shape, keys.dtype)
    padded = as_strided(keys, (1, 1, 400, head_dim))
    assert protect(second_page, page, 0) == 0
    try:
        for seqlen_q in (1, 40):
            q = random_array(np.random.default_rng(1), (1, 1, seqlen_q, head_dim), keys.dtype)
            expected = foveal.attention(q, keys, keys, causal=True)
            np.testing.assert_array_equal(foveal.attention(q, padded, padded, causal=True, kv_lens=[kv_len]), expected)
    finally:
        protect(second_page, page, mmap.PROT_READ | mmap.PROT_WRITE)


# ---- out, layouts, kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_out(isa: str, layout: str, dtype: Any) -> None:
    q, k, v = qkv((2, 3, 3, 4, 5, 8, 6), dtype)
    if layout == "bshd":
        q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    expected = foveal.attention(q, k, v, layout=layout)
    assert expected.flags.c_contiguous
    shape = expected.shape
    for make in (
        lambda: np.full(shape, 9, dtype),
        lambda: np.full(shape[::-1], 9, dtype).T,
        lambda: np.full((*shape[:-1], 2 * shape[-1]), 9, dtype)[..., ::-2],
        lambda: np.full((*shape[:2], 2 * shape[2], shape[3]), 9, dtype)[:, :, 1::2],
    ):
        out = make()
        assert foveal.attention(q, k, v, layout=layout, out=out) is out
        np.testing.assert_array_equal(out, expected)
    result = foveal.attention(q, k, v, layout=layout, out=out, return_lse=True)
    assert result.out is out
    assert result.weights is None
    assert result.stats is None


def test_out_leaves_the_gaps_of_its_buffer_alone(isa: str) -> None:
    q, k, v = qkv((1, 2, 2, 50, 60, 16, 5))
    buffer = np.full((1, 2, 50, 16), 9, np.float32)
    foveal.attention(q, k, v, out=buffer[..., 4:9])
    assert (buffer[..., :4] == 9).all()
    assert (buffer[..., 9:] == 9).all()


def test_out_may_be_a_slice_of_the_buffer_of_the_inputs(isa: str) -> None:
    packed = np.random.default_rng(0).standard_normal((2, 30, 4, 3, 16), dtype=np.float32)  # (B, S, qkvo, H, D)
    q, k, v, out = (packed[:, :, i] for i in range(4))
    expected = foveal.attention(q.copy(), k.copy(), v.copy(), layout="bshd")
    foveal.attention(q, k, v, layout="bshd", out=out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("rank", [2, 3])
def test_lower_ranks(isa: str, rank: int) -> None:
    arrays = qkv((1, 1 if rank == 2 else 4, 1 if rank == 2 else 2, 6, 9, 8, 8))
    whole = foveal.attention(*arrays, causal=True, return_lse=True, return_weights=True)
    low = [array.reshape(array.shape[4 - rank :]) for array in arrays]
    result = foveal.attention(*low, causal=True, return_lse=True, return_weights=True)
    for actual, expected in zip(result[:3], whole[:3], strict=True):
        assert actual.shape == expected.shape[4 - rank :]
        np.testing.assert_array_equal(actual, expected.reshape(actual.shape))
    if rank == 3:
        swapped = foveal.attention(
            *(array.swapaxes(0, 1) for array in low), causal=True, layout="bshd", return_lse=True
        )
        np.testing.assert_array_equal(swapped.out, result.out.swapaxes(0, 1))
        assert_within(swapped.lse, result.lse.astype(float), formula(*low, causal=True).lse_error * 2, "lse")


def test_read_only_inputs_and_subclasses(tmp_path: Any) -> None:
    q, k, v = qkv((1, 2, 1, 6, 9, 8, 8))
    expected = foveal.attention(q, k, v)
    for array in (q, k, v):
        array.flags.writeable = False
    np.testing.assert_array_equal(foveal.attention(q, k, v), expected)
    mapped = np.memmap(tmp_path / "q", np.float32, "w+", shape=q.shape)
    mapped[...] = q
    out = foveal.attention(mapped, k, v)
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, expected)


def test_bfloat16_is_the_dtype_of_ml_dtypes() -> None:
    q, k, v = qkv((1, 1, 1, 3, 4, 8, 8), BFLOAT16)
    assert foveal.attention(q, k, v).dtype == BFLOAT16


# ---- against PyTorch's kernel ---------------------------------------------------------------------------------------


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """The plain formula in the arrays' own precision."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.dtype.type(q.shape[-1]))
    if causal:
        scores = np.where(np.tri(q.shape[-2], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 3, 512, 64), (1, 2, 700, 128), (4, 3, 128, 32)], ids=str)
def test_error_is_at_most_twice_that_of_pytorch(isa: str, shape: tuple[int, ...], dtype: str, causal: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    q, k, v = (random_array(rng, shape, kind) for _ in range(3))
    tensors = [torch.from_numpy(array.astype(np.float64)).to(getattr(torch, dtype)) for array in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal).to(torch.float64).numpy()
    ours = foveal.attention(q, k, v, causal=causal).astype(np.float64)
    exact = softmax_attention(*(array.astype(np.longdouble) for array in (q, k, v)), causal=causal)
    for norm in (lambda x: np.sqrt(np.mean(x**2)), lambda x: np.max(np.abs(x))):
        assert norm(ours - exact) <= 2 * norm(theirs - exact)
