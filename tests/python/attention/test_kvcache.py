"""foveal.attention_kvcache: the bits of attention on each sequence, wherever the cache keeps its tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from attention_cases import BFLOAT16, DTYPES, ROUNDOFF, assert_within, formula, random_array
from hypothesis import given, settings
from hypothesis import strategies as st

import foveal

LENS = [50, 0, 700, 2100]
PAGE_SIZES = [1, 3, 16, 100, 256]


class Pages(NamedTuple):
    """Tokens of some sequences, and the same spread over pages in no order."""

    k: list[np.ndarray]
    v: list[np.ndarray]
    k_cache: np.ndarray
    v_cache: np.ndarray
    table: np.ndarray


def tokens(rng: np.random.Generator, lens: list[int], dtype: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    k = [random_array(rng, (n, 2, 24), np.dtype(dtype)) for n in lens]
    v = [random_array(rng, (n, 2, 16), np.dtype(dtype)) for n in lens]
    return k, v


def paged(lens: list[int], page_size: int, dtype: Any = np.float32, room: int = 0, seed: int = 5) -> Pages:
    """Pages with room for more tokens of each; what no token fills is NaN, and table entries of no page are bad."""
    rng = np.random.default_rng(seed)
    k, v = tokens(rng, lens, dtype)
    used = [-(-(n + room) // page_size) for n in lens]
    order = rng.permutation(sum(used) + 2)
    table = np.full((len(lens), max(used, default=0) + 1), -(10**6), np.int32)
    k_cache = np.full((len(order), page_size, 2, 24), np.nan, dtype)
    v_cache = np.full((len(order), page_size, 2, 16), np.nan, dtype)
    first = 0
    for b, (count, length) in enumerate(zip(used, lens, strict=True)):
        table[b, :count] = order[first : first + count]
        first += count
        for t in range(length):
            place = table[b, t // page_size], t % page_size
            k_cache[place], v_cache[place] = k[b][t], v[b][t]
    return Pages(k, v, k_cache, v_cache, table)


def queries(count: int, seqlen: int, dtype: Any = np.float32, heads: int = 4) -> np.ndarray:
    return random_array(np.random.default_rng(seqlen), (count, seqlen, heads, 24), np.dtype(dtype))


def assert_bits_of_each_alone(result: Any, q: np.ndarray, k: Any, v: Any, **options: Any) -> None:
    for b in range(len(q)):
        own = {n: x[b] if n == "q_offset" and np.ndim(x) == 1 else x for n, x in options.items()}
        alone: Any = foveal.attention(q[b], k[b], v[b], **own, layout="bshd", return_lse=True)
        assert np.asarray(result.out)[b].tobytes() == alone.out.tobytes(), f"sequence {b}"
        assert np.asarray(result.lse)[b].tobytes() == alone.lse.tobytes(), f"lse of sequence {b}"


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 3, 40])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_have_the_bits_of_one_array(isa: str, page_size: int, seqlen: int, dtype: Any) -> None:
    pages, q = paged(LENS, page_size, dtype), queries(4, seqlen, dtype)
    result = foveal.attention_kvcache(
        q, pages.k_cache, pages.v_cache, cache_lens=LENS, block_table=pages.table, causal=True, return_lse=True
    )
    assert_bits_of_each_alone(result, q, pages.k, pages.v, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [1, 40])
def test_rows_have_the_bits_of_one_array(isa: str, seqlen: int, dtype: Any) -> None:
    lens = [50, 0, 300]
    k, v = tokens(np.random.default_rng(2), lens, dtype)
    k_cache, v_cache = np.full((5, 310, 2, 24), np.nan, dtype), np.full((5, 310, 2, 16), np.nan, dtype)
    rows = [4, 0, 1]
    for row, a, b in zip(rows, k, v, strict=True):
        k_cache[row, : len(a)], v_cache[row, : len(b)] = a, b
    q = queries(3, seqlen, dtype)
    result = foveal.attention_kvcache(
        q, k_cache, v_cache, cache_lens=lens, cache_batch_idx=rows, window=(30, 0), return_lse=True
    )
    assert_bits_of_each_alone(result, q, k, v, window=(30, 0))
    in_order = foveal.attention_kvcache(
        q, k_cache[rows], v_cache[rows], cache_lens=np.array(lens, np.int32), window=(30, 0), return_lse=True
    )
    assert in_order.out.tobytes() == result.out.tobytes()


@settings(max_examples=60)
@given(data=st.data())
def test_any_lengths_pages_and_options(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    lens = draw(st.lists(st.integers(0, 60), max_size=4), label="lens")
    page_size, seqlen = draw(st.integers(1, 20)), draw(st.integers(0, 12))
    dtype = draw(st.sampled_from(DTYPES))
    pages = paged(lens, page_size, dtype)
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.tuples(*[st.none() | st.integers(0, 20)] * 2))
    if draw(st.booleans()):
        options["q_offset"] = draw(st.integers(-5, 40))
    if draw(st.booleans()):
        options["softcap"] = 1.5
    if draw(st.booleans()):
        options["sinks"] = np.linspace(-1, 1, 4)
    if draw(st.booleans()):
        options["alibi_slopes"] = np.linspace(0.1, 1, 4)
    q = queries(len(lens), seqlen, dtype)
    result = foveal.attention_kvcache(
        q, pages.k_cache, pages.v_cache, cache_lens=lens, block_table=pages.table, **options, return_lse=True
    )
    assert_bits_of_each_alone(result, q, pages.k, pages.v, **options)


@pytest.mark.parametrize("page_size", [7, 64])
def test_masks_and_biases_reach_over_the_capacity(isa: str, page_size: int) -> None:
    pages, q = paged([30, 100], page_size), queries(2, 5)
    capacity = pages.table.shape[1] * page_size
    rng = np.random.default_rng(0)
    mask = rng.random((2, 1, 5, capacity)) > 0.4
    bias = rng.standard_normal((1, 4, 1, capacity))
    out = foveal.attention_kvcache(
        q, pages.k_cache, pages.v_cache, cache_lens=[30, 100], block_table=pages.table, mask=mask, bias=bias
    )
    for b, n in enumerate([30, 100]):
        alone = foveal.attention(
            q[b], pages.k[b], pages.v[b], mask=mask[b, ..., :n], bias=bias[0, ..., :n], layout="bshd"
        )
        assert out[b].tobytes() == alone.tobytes()


def test_sequences_may_share_pages(isa: str) -> None:
    pages, q = paged([40, 40], 16), queries(2, 1)
    table = pages.table.copy()
    table[1, :2] = table[0, :2]  # the first 32 tokens
    out = foveal.attention_kvcache(q, pages.k_cache, pages.v_cache, cache_lens=40, block_table=table)
    k, v = (np.concatenate([x[0][:32], x[1][32:]]) for x in (pages.k, pages.v))
    assert out[1].tobytes() == foveal.attention(q[1], k, v, layout="bshd").tobytes()


def test_strides_of_the_cache(isa: str) -> None:
    pages, q = paged([45, 80], 16), queries(2, 2)
    expected = foveal.attention_kvcache(q, pages.k_cache, pages.v_cache, cache_lens=[45, 80], block_table=pages.table)
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (pages.k_cache, pages.v_cache)]
    reversed_ = [np.ascontiguousarray(x[::-1, ::-1, :, ::-1])[::-1, ::-1, :, ::-1] for x in heads_first]
    for k_cache, v_cache in (heads_first, reversed_):
        out = foveal.attention_kvcache(q, k_cache, v_cache, cache_lens=[45, 80], block_table=pages.table)
        assert out.tobytes() == expected.tobytes()


def test_any_number_of_threads(isa: str) -> None:
    pages, q = paged(LENS, 16), queries(4, 1)
    before, results = foveal.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            foveal.set_num_threads(count)
            results.add(
                foveal.attention_kvcache(
                    q, pages.k_cache, pages.v_cache, cache_lens=LENS, block_table=pages.table
                ).tobytes()
            )
    finally:
        foveal.set_num_threads(before)
    assert len(results) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [2, 8, 11])
def test_heads_that_are_read_together_have_the_bits_of_each_alone(
    isa: str, kv_heads: int, group: int, dtype: Any
) -> None:
    rng = np.random.default_rng(kv_heads)
    lens = [1100, 1, 130, 300, 40]
    k, v = (random_array(rng, (5, 1100, kv_heads, width), np.dtype(dtype)) for width in (40, 24))
    q = random_array(rng, (5, 1, kv_heads * group, 40), np.dtype(dtype))
    options: dict[str, Any] = {
        "cache_lens": lens,
        "window": (1000, None),
        "sinks": np.linspace(-1, 1, kv_heads * group),
    }
    before = foveal.get_num_threads()
    try:
        foveal.set_num_threads(1)  # few threads, so that an item may take many heads
        together = foveal.attention_kvcache(q, k, v, **options, return_lse=True)
        foveal.set_num_threads(64)
        apart = foveal.attention_kvcache(q, k, v, **options, return_lse=True)
    finally:
        foveal.set_num_threads(before)
    assert together.out.tobytes() == apart.out.tobytes()
    assert together.lse.tobytes() == apart.lse.tobytes()
    for b, n in enumerate(lens):
        for h in range(kv_heads):
            rows = slice(h * group, (h + 1) * group)
            alone: Any = foveal.attention(
                q[b, 0, rows, None],
                np.ascontiguousarray(k[b, :n, h])[None],
                np.ascontiguousarray(v[b, :n, h])[None],
                window=(1000, None),
                sinks=options["sinks"][rows],
                return_lse=True,
            )
            assert together.out[b, 0, rows].tobytes() == alone.out[:, 0].tobytes()
            assert together.lse[b, rows, 0].tobytes() == alone.lse[:, 0].tobytes()


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", [0, 1, 5])
@pytest.mark.parametrize("page_size", [1, 4, 100])
def test_new_tokens_join_the_cache(isa: str, page_size: int, added: int, dtype: Any) -> None:
    lens = [14, 0, 33]
    pages, q = paged(lens, page_size, dtype, room=added), queries(3, 2, dtype)
    rng = np.random.default_rng(1)
    k, v = random_array(rng, (3, added, 2, 24), np.dtype(dtype)), random_array(rng, (3, added, 2, 16), np.dtype(dtype))
    expected = [x.copy() for x in (pages.k_cache, pages.v_cache)]
    for b, n in enumerate(lens):
        for i in range(added):
            place = pages.table[b, (n + i) // page_size], (n + i) % page_size
            expected[0][place], expected[1][place] = k[b, i], v[b, i]
    result = foveal.attention_kvcache(
        q,
        pages.k_cache,
        pages.v_cache,
        cache_lens=lens,
        k=k,
        v=v,
        block_table=pages.table,
        causal=True,
        return_lse=True,
    )
    assert pages.k_cache.tobytes() == expected[0].tobytes()
    assert pages.v_cache.tobytes() == expected[1].tobytes()
    longer = [
        [np.concatenate([old, new]) for old, new in zip(x, y, strict=True)] for x, y in ((pages.k, k), (pages.v, v))
    ]
    assert_bits_of_each_alone(result, q, *longer, causal=True)


def test_token_by_token_is_all_at_once(isa: str) -> None:
    rng = np.random.default_rng(3)
    k, v = (random_array(rng, (2, 9, 2, width), np.dtype(np.float32)) for width in (24, 16))
    q = queries(2, 9)
    caches = [np.zeros((2, 12, 2, width), np.float32) for width in (24, 16)]
    steps = [
        foveal.attention_kvcache(
            q[:, i : i + 1], *caches, cache_lens=i, k=k[:, i : i + 1], v=v[:, i : i + 1], causal=True
        )
        for i in range(9)
    ]
    assert caches[0][:, :9].tobytes() == k.tobytes()
    expected = formula(q, k, v, causal=True, layout="bshd")
    assert_within(np.concatenate(steps, 1), expected.out, expected.out_error, "steps")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [12, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_embedding(isa: str, dtype: Any, pairs: int, interleaved: bool) -> None:
    lens, added, seqlen = [6, 0], 3, 3
    pages, q = paged(lens, 4, dtype, room=added), queries(2, seqlen, dtype)
    rng = np.random.default_rng(1)
    k, v = (random_array(rng, (2, added, 2, width), np.dtype(dtype)) for width in (24, 16))
    angles = np.arange(20)[:, None] * 10.0 ** -np.linspace(0, 3, pairs)
    cos, sin = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)

    def turned(x: np.ndarray, b: int) -> np.ndarray:
        exact = x.astype(np.float64)
        first, second = (exact[..., :pairs], exact[..., pairs : 2 * pairs])
        if interleaved:
            first, second = exact[..., 0 : 2 * pairs : 2], exact[..., 1 : 2 * pairs : 2]
        c, s = (t[lens[b] : lens[b] + len(x), None].astype(np.float64) for t in (cos, sin))
        pair = first * c - second * s, first * s + second * c
        exact[..., : 2 * pairs] = (
            np.stack(pair, -1).reshape(*x.shape[:2], -1) if interleaved else np.concatenate(pair, -1)
        )
        return exact

    q_before = q.copy()
    out = foveal.attention_kvcache(
        q,
        pages.k_cache,
        pages.v_cache,
        cache_lens=lens,
        k=k,
        v=v,
        block_table=pages.table,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=interleaved,
        causal=True,
    )
    assert q.tobytes() == q_before.tobytes()
    for b, n in enumerate(lens):
        places = [(pages.table[b, t // 4], t % 4) for t in range(n, n + added)]
        written = np.stack([pages.k_cache[place] for place in places])
        exact = turned(k[b], b)
        error = 3 * ROUNDOFF[np.dtype(dtype).name] * np.abs(exact) + 4 * ROUNDOFF[
            "float64" if dtype == np.float64 else "float32"
        ] * (np.abs(k[b].astype(np.float64)).max() + 1)
        assert_within(written, exact, error, f"new keys of sequence {b}")
        assert np.stack([pages.v_cache[place] for place in places]).tobytes() == v[b].tobytes()
        # What attention then reads is what was written, and the queries rounded as the keys are.
        keys, values = np.concatenate([pages.k[b], written]), np.concatenate([pages.v[b], v[b]])
        expected = formula(turned(q[b], b).astype(dtype), keys, values, causal=True, layout="bshd")
        slack = 60 * ROUNDOFF[np.dtype(dtype).name] * np.abs(values.astype(np.float64)).max()
        assert_within(out[b], expected.out, expected.out_error + slack, f"sequence {b}")


# ---- int8 -----------------------------------------------------------------------------------------------------------


def quantized(cache: np.ndarray, filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the scale of each (page, head) that just holds what is in it."""
    known = np.where(np.isnan(cache.astype(np.float32)), 0, cache.astype(np.float32))
    scale = np.maximum(np.abs(known).max((1, 3)), 1e-20) / 127
    codes = np.rint(known / scale[:, None, :, None]).clip(-127, 127).astype(np.int8)
    return codes, scale.astype(np.float32)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize(("seqlen", "heads"), [(1, 2), (1, 4), (2, 4), (2, 8), (40, 4)])
@pytest.mark.parametrize("page_size", [3, 16, 256])
def test_int8_cache(isa: str, page_size: int, seqlen: int, heads: int, dtype: Any) -> None:
    lens = [50, 0, 700, 1500]
    pages, q = paged(lens, page_size, dtype), queries(4, seqlen, dtype, heads)
    k_cache, k_scale = quantized(pages.k_cache, pages.table)
    v_cache, v_scale = quantized(pages.v_cache, pages.table)
    out = foveal.attention_kvcache(
        q, k_cache, v_cache, cache_lens=lens, block_table=pages.table, k_scale=k_scale, v_scale=v_scale, causal=True
    )
    assert out.dtype == dtype
    for b, n in enumerate(lens):
        places = [(pages.table[b, t // page_size], t % page_size) for t in range(n)]

        def stored(codes: np.ndarray, scale: np.ndarray, places: Any = places) -> np.ndarray:
            rows = [codes[place].astype(np.float32) * scale[place[0]][:, None] for place in places]
            return np.stack(rows) if rows else np.zeros((0, *codes.shape[2:]), np.float32)

        # docs/numerics.md: what is stored is within half a step, and computing with it rounds as q's dtype does.
        keys, values = stored(k_cache, k_scale), stored(v_cache, v_scale)
        if n:
            steps = np.stack([v_scale[place[0]] for place in places])[:, :, None]
            assert (np.abs(values - pages.v[b].astype(np.float32)) <= 0.501 * steps).all()
        expected = formula(q[b].astype(np.float32), keys, values, causal=True, layout="bshd")
        rounding = ROUNDOFF[dtype.name]
        top = np.abs(values).max(initial=0)
        norms = np.abs(q[b].astype(np.float64)).sum(-1).max(initial=0) * np.abs(keys).max(initial=0) / np.sqrt(24)
        slack = (4 + 2 * norms) * rounding * top
        assert_within(out[b], expected.out, expected.out_error + slack, f"sequence {b}")


@pytest.mark.parametrize("seqlen", [1, 2, 4])
@pytest.mark.parametrize("page_size", [3, 16])
def test_int8_scales_of_hidden_pages_do_not_matter(isa: str, page_size: int, seqlen: int) -> None:
    pages, q = paged([200], page_size), queries(1, seqlen)
    k_cache, k_scale = quantized(pages.k_cache, pages.table)
    v_cache, v_scale = quantized(pages.v_cache, pages.table)
    mask = np.repeat(np.random.default_rng(1).random(pages.table.shape[1]) > 0.4, page_size)
    options: dict[str, Any] = {"cache_lens": [200], "block_table": pages.table, "mask": mask[None, None, None]}
    expected = foveal.attention_kvcache(q, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale, **options)
    hidden = pages.table[0, : -(-200 // page_size)][~mask[:200:page_size]]
    assert len(hidden) > 3
    for number in (np.nan, np.inf):
        k_scale[hidden], v_scale[hidden] = number, number
        out = foveal.attention_kvcache(q, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale, **options)
        np.testing.assert_allclose(out, expected, atol=1e-5)  # other sums, where the kernel must leave values out


@pytest.mark.parametrize("head_dim", [16, 128, 512, 600, 1030])
@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_int8_sums_of_the_largest_codes(isa: str, dtype: Any, heads: int, head_dim: int) -> None:
    """Whatever a kernel adds codes in, it must hold these sums; and one large feature must not hide the others."""
    seqlen = 200
    codes = np.full((1, seqlen, 1, head_dim), -128, np.int8)
    codes[0, ::3] = 127
    codes[0, 1, 0, 1:] = 64
    values = np.where(np.arange(seqlen)[None, :, None, None] % 2, 127, -128).astype(np.int8).repeat(24, 3)
    q = np.ones((1, 1, heads, head_dim), dtype)
    q[..., 0] = 100
    k_scale, v_scale = np.full((1, 1), 1e-5, np.float32), np.full((1, 1), 0.25, np.float32)
    for scale in (1.0, 1e-3):
        options: dict[str, Any] = {"scale": scale}
        out = foveal.attention_kvcache(
            q,
            codes,
            values,
            cache_lens=seqlen,
            block_table=np.zeros((1, 1), np.int32),
            k_scale=k_scale,
            v_scale=v_scale,
            **options,
        )
        k, v = codes.astype(np.float64) * 1e-5, values.astype(np.float64) * 0.25
        expected = formula(q.astype(np.float64), k, v, **options, layout="bshd")
        # docs/numerics.md: scores off by at most e, and a weight by exp(2 e).
        e = scale * 2.0**-16 * 100 * np.abs(k).sum(-1).max()
        slack = (2 * ROUNDOFF[dtype.name] + np.expm1(2 * e) * (dtype == BFLOAT16) + 2e-6) * 32
        assert_within(out, expected.out, expected.out_error + slack, f"scale {scale}")


def test_int8_bits_of_each_sequence_alone(isa: str) -> None:
    pages, q = paged(LENS, 16, BFLOAT16), queries(4, 1, BFLOAT16)
    (k_cache, k_scale), (v_cache, v_scale) = (quantized(x, pages.table) for x in (pages.k_cache, pages.v_cache))

    def run(rows: slice) -> Any:
        return foveal.attention_kvcache(
            q[rows],
            k_cache,
            v_cache,
            cache_lens=LENS[rows],
            block_table=pages.table[rows],
            k_scale=k_scale,
            v_scale=v_scale,
        )

    whole = run(slice(None))
    assert whole.tobytes() == b"".join(run(slice(b, b + 1)).tobytes() for b in range(4))


def test_int8_cache_takes_new_tokens(isa: str) -> None:
    pages, q = paged([14, 3], 4, np.float32, room=2), queries(2, 1)
    k_cache, k_scale = quantized(pages.k_cache, pages.table)
    v_cache, v_scale = quantized(pages.v_cache, pages.table)
    k_scale[:], v_scale[:] = 0.02, 0.03
    rng = np.random.default_rng(8)
    k, v = (random_array(rng, (2, 2, 2, width), np.dtype(np.float32)) for width in (24, 16))
    k[0, 0, 0, 0], k[0, 0, 0, 1], v[1, 1, 1, 3] = 100, -100, -0.044
    foveal.attention_kvcache(
        q,
        k_cache,
        v_cache,
        cache_lens=[14, 3],
        k=k,
        v=v,
        block_table=pages.table,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    for b, n in enumerate([14, 3]):
        for i in range(2):
            place = pages.table[b, (n + i) // 4], (n + i) % 4
            assert np.array_equal(k_cache[place], np.rint(k[b, i] / np.float32(0.02)).clip(-127, 127))
            assert np.array_equal(v_cache[place], np.rint(v[b, i] / np.float32(0.03)).clip(-127, 127))


# ---- refusals -------------------------------------------------------------------------------------------------------


def call(**changed: Any) -> dict[str, Any]:
    pages = paged([14, 3], 4, room=2)
    rng = np.random.default_rng(8)
    k, v = (random_array(rng, (2, 2, 2, width), np.dtype(np.float32)) for width in (24, 16))
    arguments = {"q": queries(2, 2), "k_cache": pages.k_cache, "v_cache": pages.v_cache, "cache_lens": [14, 3]}
    arguments |= {"k": k, "v": v, "block_table": pages.table}
    return arguments | {n: x(arguments) if callable(x) else x for n, x in changed.items()}


def with_a_page_twice(table: np.ndarray) -> np.ndarray:
    changed = table.copy()
    changed[1, 1] = changed[0, 3]
    return changed


ONE = np.ones((8, 2), np.float32)
TABLES = {"rotary_cos": np.ones((20, 12)), "rotary_sin": np.ones((20, 12))}
REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "full": (
        {"cache_lens": [14, 19]},
        ValueError,
        r"cache_lens\[1\] is 19, expected 0 to 18 \(room for 20 tokens, 2 new\)",
    ),
    "negative": ({"cache_lens": [14, -1]}, ValueError, r"cache_lens\[1\] is -1, expected 0 to 18"),
    "lens shape": (
        {"cache_lens": [14]},
        ValueError,
        r"cache_lens has shape \(1,\), expected an integer or \(B,\) = \(2,\)",
    ),
    "lens dtype": ({"cache_lens": np.zeros(2)}, TypeError, "cache_lens has dtype float64, expected"),
    "no lens": ({"cache_lens": None}, TypeError, r"cache_lens is None, expected \(B,\) integers"),
    "page": (
        {"block_table": lambda a: np.where(a["block_table"] == a["block_table"][0, 3], 11, a["block_table"])},
        ValueError,
        r"block_table\[0, 3\] is 11, expected 0 to \d+ \(k_cache.shape\[0\] is",
    ),
    "page of the new": ({"cache_lens": [14, 8]}, ValueError, r"block_table\[1, 2\] is -1000000, expected 0 to"),
    "table shape": (
        {"block_table": np.zeros((3, 4), int)},
        ValueError,
        r"block_table has shape \(3, 4\), expected \(B, pages a sequence\), B = 2",
    ),
    "table dtype": ({"block_table": np.zeros((2, 5))}, TypeError, "block_table has dtype float64"),
    "k alone": ({"v": None}, ValueError, "v is absent, expected k and v"),
    "new heads": (
        {"k": np.zeros((2, 2, 4, 24), np.float32)},
        ValueError,
        r"k has shape \(2, 2, 4, 24\), expected \(2, 2, 2, 24\)",
    ),
    "new count": ({"v": np.zeros((2, 1, 2, 16), np.float32)}, ValueError, r"v has shape \(2, 1, 2, 16\), expected"),
    "new dtype": ({"v": np.zeros((2, 2, 2, 16))}, TypeError, "v has dtype float64, expected float32"),
    "cache dtype": ({"v_cache": lambda a: a["v_cache"].astype(np.float64)}, TypeError, "v_cache has dtype float64"),
    "cache dim": (
        {"k_cache": lambda a: np.zeros((*a["k_cache"].shape[:3], 23), np.float32)},
        ValueError,
        r"k_cache.shape\[3\] is 23, expected head_dim 24 \(from q\)",
    ),
    "rank": ({"q": np.zeros((2, 4, 24), np.float32)}, ValueError, "q has 3 dimensions, expected 4"),
    "shared": ({"v_cache": lambda a: a["k_cache"][..., :16]}, ValueError, "v_cache shares memory with k_cache"),
    "own tokens": ({"k": lambda a: a["k_cache"][:2, :2]}, ValueError, "k shares memory with the cache"),
    "two writers of a row": (
        {"block_table": None, "cache_batch_idx": [3, 3], "cache_lens": 1},
        ValueError,
        r"cache_batch_idx\[1\] is 3 like cache_batch_idx\[0\], expected a row of its own for new tokens",
    ),
    "two writers of a page": (
        {"block_table": lambda a: with_a_page_twice(a["block_table"])},
        ValueError,
        r"block_table\[1, 1\] is \d+ like block_table\[0, 3\], expected a page of its own for new tokens",
    ),
    "rows and pages": ({"cache_batch_idx": [0, 1]}, ValueError, "cache_batch_idx is given with block_table"),
    "rows": ({"block_table": None}, ValueError, r"k_cache.shape\[0\] is \d+, expected batch 2 \(from q\)"),
    "row": (
        {"block_table": None, "cache_batch_idx": [0, 99], "cache_lens": 1},
        ValueError,
        r"cache_batch_idx\[1\] is 99, expected 0 to",
    ),
    "cos alone": ({"rotary_cos": TABLES["rotary_cos"]}, ValueError, "rotary_sin is absent"),
    "cos without k": ({"k": None, "v": None, **TABLES}, ValueError, "rotary_cos is given without k and v"),
    "few positions": (
        {n: x[:15] for n, x in TABLES.items()},
        ValueError,
        r"rotary_cos.shape\[0\] is 15, expected at least 16",
    ),
    "many pairs": (
        {n: np.ones((20, 13)) for n in TABLES},
        ValueError,
        r"rotary_cos.shape\[1\] is 13, expected at most 12",
    ),
    "scale alone": ({"k_scale": ONE}, TypeError, "k_cache has dtype float32, expected int8"),
    "no scale": (
        {"k_cache": lambda a: a["k_cache"].astype(np.int8)},
        TypeError,
        r"k_cache has dtype int8, expected float32 \(from q\)",
    ),
    "scale shape": (
        {
            "k_cache": lambda a: np.zeros(a["k_cache"].shape, np.int8),
            "v_cache": lambda a: np.zeros(a["v_cache"].shape, np.int8),
            "k_scale": ONE,
            "v_scale": ONE[:, :1],
        },
        ValueError,
        r"v_scale has shape \(8, 1\), expected \(pages, Hkv\) = \(8, 2\)",
    ),
    "window": ({"window": (0, -2)}, ValueError, r"window\[1\] is -2, expected None or at least 0"),
}


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_refusals_leave_the_cache_as_it_was(name: str, kind: str) -> None:
    changed, error, text = REFUSALS[name]
    arguments = call(**changed)
    if kind == "tensor":
        torch = pytest.importorskip("torch")
        arguments = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    caches = [np.asarray(arguments[n]) for n in ("k_cache", "v_cache")]
    before = [x.tobytes() for x in caches]
    with pytest.raises(error, match="^attention_kvcache: " + text.replace("dtype ", "dtype (torch.)?")):
        foveal.attention_kvcache(**arguments)
    assert [x.tobytes() for x in caches] == before


def test_a_read_only_cache_can_be_read_and_not_written() -> None:
    arguments = call()
    for name in ("k_cache", "v_cache"):
        arguments[name].flags.writeable = False
    assert foveal.attention_kvcache(**arguments | {"k": None, "v": None}).shape == (2, 2, 4, 16)
    with pytest.raises(ValueError, match="attention_kvcache: k_cache is read-only"):
        foveal.attention_kvcache(**arguments)


# ---- tensors --------------------------------------------------------------------------------------------------------


def torch_call(dtype: str = "float32") -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    arguments = call()
    floating = ("q", "k_cache", "v_cache", "k", "v")
    made = {n: torch.from_numpy(arguments[n]).to(getattr(torch, dtype)) for n in floating}
    return made | {"cache_lens": torch.tensor([14, 3]), "block_table": torch.from_numpy(arguments["block_table"])}


def as_array(x: Any) -> np.ndarray:
    torch = pytest.importorskip("torch")
    array: np.ndarray = x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()
    return array


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_have_the_bits_of_arrays(dtype: str) -> None:
    tensors = torch_call(dtype)
    arrays = {n: as_array(x).copy() for n, x in tensors.items()}
    result = foveal.attention_kvcache(**tensors, causal=True, softcap=3.0, return_lse=True)
    expected = foveal.attention_kvcache(**arrays, causal=True, softcap=3.0, return_lse=True)
    assert as_array(result.out).tobytes() == expected.out.tobytes()
    assert as_array(result.lse).tobytes() == expected.lse.tobytes()
    for name in ("k_cache", "v_cache"):
        assert as_array(tensors[name]).tobytes() == arrays[name].tobytes()


def test_op_is_whole_under_opcheck_and_compile() -> None:
    torch = pytest.importorskip("torch")
    import foveal.torch  # registers the ops

    op = torch.ops.foveal.attention_kvcache.default
    names = ("q", "k_cache", "v_cache", "cache_lens", "k", "v", "block_table")
    made = torch_call()
    torch.nan_to_num_(made["k_cache"]), torch.nan_to_num_(made["v_cache"])
    inputs = [made[n] for n in names]
    torch.library.opcheck(op, [x.clone() for x in inputs])
    torch.library.opcheck(op, [x.clone() for x in inputs], {"causal": True, "softcap": 2.0})

    def run(*x: Any) -> Any:
        result = foveal.attention_kvcache(**dict(zip(names, x, strict=True)), causal=True)
        return result, x[1] + 1

    expected_inputs = [x.clone() for x in inputs]
    expected = run(*expected_inputs)
    for dynamic in (False, True):
        torch.compiler.reset()
        found_inputs = [x.clone() for x in inputs]
        found = torch.compile(run, fullgraph=True, dynamic=dynamic)(*found_inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(found_inputs, expected_inputs, strict=True))


def test_what_has_no_rule_is_refused() -> None:
    torch = pytest.importorskip("torch")
    for name in ("q", "k", "v", "k_cache"):
        arguments = torch_call()
        arguments[name].requires_grad_()
        with pytest.raises(NotImplementedError, match="attention_kvcache: an input requires grad"):
            foveal.attention_kvcache(**arguments)
        with torch.inference_mode():
            foveal.attention_kvcache(**torch_call())
    with torch.no_grad():
        assert not foveal.attention_kvcache(**arguments).requires_grad
    arguments = torch_call()
    q = arguments.pop("q")
    with pytest.raises(NotImplementedError, match="attention_kvcache: there is no rule for vmap"):
        torch.func.vmap(lambda x: foveal.attention_kvcache(x, **arguments))(torch.stack([q, q]))


def test_kernels_in_python_do_the_same() -> None:
    torch = pytest.importorskip("torch")
    from foveal.torch.ops import fallback as _fallback

    names = ("q", "k_cache", "v_cache", "cache_lens", "k", "v", "block_table")
    once, twice = ([torch_call()[n] for n in names] for _ in range(2))
    rest = (
        None,
        None,
        None,
        None,
        None,
        False,
        None,
        None,
        None,
        torch.randn(4),
        None,
        None,
        None,
        None,
        None,
        0.0,
        True,
    )
    out, lse = torch.ops.foveal.attention_kvcache(*once, *rest)
    again, lse_again = _fallback._kvcache(*twice, *rest)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    assert as_array(once[1]).tobytes() == as_array(twice[1]).tobytes()
