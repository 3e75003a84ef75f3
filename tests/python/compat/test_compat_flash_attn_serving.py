"""flash-attn's functions for packed sequences and for a cache, against the formula in plain torch operations."""

import math

import pytest
import torch
from flash_attn_reference import DTYPES, assert_close, plain_attention, random

from foveal.compat.flash_attn import (
    bert_padding,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 2)},
    "causal window": {"causal": True, "window_size": (3, -1)},
    "scale and softcap": {"softcap": 1.5, "softmax_scale": 2.0},
    "alibi": {"alibi_slopes": torch.arange(1.0, 7.0) / 8, "causal": True},
    "alibi of batch": {"alibi_slopes": torch.arange(24.0).reshape(4, 6) / 16},
}

# --- packed sequences ------------------------------------------------------------------------------------------------

LENS_Q = [5, 0, 17, 1]
LENS_K = [9, 3, 17, 30]


def begins(lens):
    return torch.tensor([0, *lens]).cumsum(0, dtype=torch.int32)


def packed(dtype=torch.float32, more=0):
    return (
        random(sum(LENS_Q) + more, 6, 16, dtype=dtype, seed=0),
        random(sum(LENS_K) + more, 2, 16, dtype=dtype, seed=1),
        random(sum(LENS_K) + more, 2, 8, dtype=dtype, seed=2),
    )


def plain_varlen(q, k, v, lens_q, lens_k, alibi_slopes=None, **options):
    """Each sequence through the formula."""
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    outs, lses = [], []
    for b, arrays in enumerate(parts):
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        out, lse = plain_attention(*(x[None] for x in arrays), alibi_slopes=slopes, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name, dtype):
    q, k, v = packed(dtype)
    expected, expected_lse = plain_varlen(q, k, v, LENS_Q, LENS_K, **OPTIONS[name])
    magnitude = plain_varlen(q, k, v.abs(), LENS_Q, LENS_K, **OPTIONS[name])[0].double()
    out, lse, dropped = flash_attn_varlen_func(
        q, k, v, begins(LENS_Q), begins(LENS_K), 17, 30, **OPTIONS[name], return_attn_probs=True
    )
    assert_close(out, expected, magnitude)
    assert_close(lse, expected_lse)
    assert dropped.numel() == 0
    again = flash_attn_varlen_func(q, k, v, begins(LENS_Q), begins(LENS_K), 17, 30, **OPTIONS[name])
    assert torch.equal(again, out)


def test_varlen_has_the_bits_of_each_sequence_alone():
    q, k, v = packed()
    out = flash_attn_varlen_func(q, k, v, begins(LENS_Q).long(), begins(LENS_K).long(), 17, 30, causal=True)
    parts = zip(out.split(LENS_Q), q.split(LENS_Q), k.split(LENS_K), v.split(LENS_K), strict=True)
    for found, *arrays in parts:
        assert torch.equal(found, flash_attn_func(*(x[None] for x in arrays), causal=True)[0])


def test_varlen_positional_arguments_and_packs():
    q, k, v = packed()
    v = torch.cat((v, v), -1)
    slopes = torch.ones(6) / 4
    tail = (0.0, 0.5, True, (5, 0), 3.0, slopes, False, True)
    out, lse, _ = flash_attn_varlen_func(q, k, v, begins(LENS_Q), begins(LENS_K), 17, 30, *tail)
    expected, expected_lse = plain_varlen(
        q, k, v, LENS_Q, LENS_K, slopes, softmax_scale=0.5, causal=True, window_size=(5, 0), softcap=3.0
    )
    assert_close(out, expected)
    assert_close(lse, expected_lse)
    kv = torch.stack((k, v), 1)
    found = flash_attn_varlen_kvpacked_func(q, kv, begins(LENS_Q), begins(LENS_K), 17, 30, *tail)
    assert torch.equal(found[0], out)
    qkv = random(sum(LENS_K), 3, 6, 16)
    expected = flash_attn_varlen_func(*qkv.unbind(1), begins(LENS_K), begins(LENS_K), 30, 30, *tail)
    found = flash_attn_varlen_qkvpacked_func(qkv, begins(LENS_K), 30, *tail)
    assert torch.equal(found[0], expected[0])


def test_varlen_rows_that_belong_to_no_sequence():
    q, k, v = packed(more=3)
    v[-3:] = torch.nan
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, begins(LENS_Q), begins(LENS_K), 17, 30, causal=True, return_attn_probs=True
    )
    assert (out[-3:] == 0).all()
    assert (lse[:, -3:] == -math.inf).all()
    expected = flash_attn_varlen_func(*(x[:-3] for x in (q, k, v)), begins(LENS_Q), begins(LENS_K), 17, 30, causal=True)
    assert torch.equal(out[:-3], expected)


def test_varlen_of_nothing():
    q, k, v = packed()
    out = flash_attn_varlen_func(q[:0], k[:0], v[:0], begins([]), begins([]), 0, 0)
    assert out.shape == (0, 6, 8)


def pages_of(x, lens, page_size, seed=0):
    """Scatter the sequences of packed x over pages in random order; what no sequence uses is NaN."""
    counts = [-(-length // page_size) for length in lens]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed))
    pages = torch.full((len(order), page_size, *x.shape[1:]), torch.nan, dtype=x.dtype)
    table = torch.full((len(lens), max(counts) + 1), -1, dtype=torch.int32)
    taken = 0
    for b, part in enumerate(x.split(lens)):
        table[b, : counts[b]] = order[taken : taken + counts[b]]
        for i, piece in enumerate(part.split(page_size)):
            pages[table[b, i], : len(piece)] = piece
        taken += counts[b]
    return pages, table


@pytest.mark.parametrize("page_size", [1, 4, 16, 256])
def test_varlen_in_pages(page_size):
    q, k, v = packed()
    (k_pages, table), (v_pages, _) = (pages_of(x, LENS_K, page_size) for x in (k, v))
    found = flash_attn_varlen_func(
        q, k_pages, v_pages, begins(LENS_Q), begins(LENS_K), 17, 30, causal=True, block_table=table
    )
    assert torch.equal(found, flash_attn_varlen_func(q, k, v, begins(LENS_Q), begins(LENS_K), 17, 30, causal=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cu_seqlens_q": [0, 5]}, TypeError, "cu_seqlens_q has type list, expected an int32 or int64 torch.Tensor"),
        ({"cu_seqlens_q": torch.zeros(5)}, TypeError, "cu_seqlens_q has type torch.float32, expected an int32"),
        ({"cu_seqlens_k": torch.zeros(2, 2).int()}, ValueError, "cu_seqlens_k.shape is (2, 2), expected (batch + 1,)"),
        ({"cu_seqlens_k": torch.zeros(0).int()}, ValueError, "cu_seqlens_k.shape is (0,), expected (batch + 1,)"),
        ({"cu_seqlens_k": torch.tensor([0, 9])}, ValueError, "cu_seqlens_k has 2 elements, expected 5 (from cu_"),
        ({"cu_seqlens_q": torch.tensor([1, 5, 5, 9, 23])}, ValueError, "cu_seqlens_q[0] is 1, expected 0"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 4, 9, 23])}, ValueError, "cu_seqlens_q[2] is 4, expected 5 or more"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 5, 22, 24])}, ValueError, "cu_seqlens_q[4] is 24, expected at most 23"),
        ({"max_seqlen_k": 29}, ValueError, "max_seqlen_k is 29, expected 30 or more (from cu_seqlens_k)"),
        ({"max_seqlen_q": "a"}, TypeError, "max_seqlen_q has type str, expected an integer"),
        ({"max_seqlen_k": None}, TypeError, "max_seqlen_k has type NoneType, expected an integer"),
        ({"softcap": None}, TypeError, "softcap has type NoneType, expected a number"),
        ({"q": None}, TypeError, "q has type NoneType, expected torch.Tensor"),
        ({"q": random(4, 23, 6, 16)}, ValueError, "q has 4 dimensions, expected 3"),
        ({"block_table": torch.zeros(4, 3).int()}, ValueError, "k has 3 dimensions, expected 4"),
        ({"alibi_slopes": torch.ones(3, 6)}, ValueError, "alibi_slopes.shape[0] is 3, expected 4 (from cu_seqlens_q)"),
        ({"window_size": None}, ValueError, "window_size is None, expected (left, right)"),
        ({"dropout_p": 0.1, "return_attn_probs": True}, NotImplementedError, "return_attn_probs is True and dropout_p"),
    ],
)
def test_varlen_refused(change, error, text):
    q, k, v = packed()
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": begins(LENS_Q),
        "cu_seqlens_k": begins(LENS_K),
        "max_seqlen_q": 17,
        "max_seqlen_k": 30,
    }
    with pytest.raises(error) as found:
        flash_attn_varlen_func(**{**arguments, **change})
    assert str(found.value).startswith(f"flash_attn_varlen_func: {text}")


@pytest.mark.parametrize(
    ("table", "error", "text"),
    [
        (torch.zeros(4, 8), TypeError, "block_table has type torch.float32"),
        (torch.zeros(3, 8).int(), ValueError, "block_table.shape is (3, 8), expected (4, pages)"),
        (torch.zeros(4, 7).int(), ValueError, "sequence 3 has 30 keys, expected at most 28 (in block_table)"),
        (torch.full((4, 8), 99).int(), ValueError, "block_table[0] is [99, 99, 99], expected pages below"),
        (torch.full((4, 8), -1).int(), ValueError, "block_table[0] is [-1, -1, -1], expected pages below"),
    ],
)
def test_bad_pages_are_refused(table, error, text):
    q, k, v = packed()
    (k_pages, _), (v_pages, _) = (pages_of(x, LENS_K, 4) for x in (k, v))
    with pytest.raises(error) as found:
        flash_attn_varlen_func(q, k_pages, v_pages, begins(LENS_Q), begins(LENS_K), 17, 30, block_table=table)
    assert str(found.value).startswith(f"flash_attn_varlen_func: {text}")


# --- a cache ---------------------------------------------------------------------------------------------------------

HELD = [7, 0, 20, 3]
ROOM = 24


def cached(new=2, dtype=torch.float32, queries=None):
    """q, the caches with NaN where they hold nothing, and the new keys and values."""
    k_cache, v_cache = random(4, ROOM, 2, 16, dtype=dtype, seed=1), random(4, ROOM, 2, 8, dtype=dtype, seed=2)
    for b, length in enumerate(HELD):
        k_cache[b, length:], v_cache[b, length:] = torch.nan, torch.nan
    return (
        random(4, new if queries is None else queries, 6, 16, dtype=dtype, seed=3),
        k_cache,
        v_cache,
        random(4, new, 2, 16, dtype=dtype, seed=4),
        random(4, new, 2, 8, dtype=dtype, seed=5),
    )


def turn(x, position, cos, sin, interleaved):
    """Turn one token (H, D) by complex multiplication."""
    pairs = cos.shape[1]
    turned, rest = x[:, : 2 * pairs].double(), x[:, 2 * pairs :]
    split = turned.unflatten(1, (pairs, 2)) if interleaved else turned.unflatten(1, (2, pairs)).mT
    split = torch.view_as_complex(split.contiguous()) * torch.complex(cos[position].double(), sin[position].double())
    split = torch.view_as_real(split)
    turned = split.flatten(1) if interleaved else split.mT.flatten(1)
    return torch.cat((turned.to(x.dtype), rest), 1)


def plain_kvcache(q, k_cache, v_cache, k, v, held, rotary=None, leftpad=None, alibi_slopes=None, **options):
    """One sequence after another: out, lse, and what each sequence's keys and values are in the end."""
    outs, lses, kept = [], [], []
    each_query = options.get("causal", False) or options.get("window_size", (-1, -1)) != (-1, -1)
    for b, length in enumerate(held):
        queries, keys, values = q[b], k_cache[b, :length], v_cache[b, :length]
        if k is not None:
            new = k[b]
            if rotary is not None:
                new = torch.stack([turn(x, length + i, *rotary) for i, x in enumerate(new)])
                queries = torch.stack([turn(x, length + i * each_query, *rotary) for i, x in enumerate(queries)])
            keys, values = torch.cat((keys, new)), torch.cat((values, v[b]))
        kept.append((keys, values))
        start = 0 if leftpad is None else leftpad[b]
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes
        out, lse = plain_attention(
            queries[None], keys[None, start:], values[None, start:], alibi_slopes=slopes, **options
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("new", "queries"), [(1, 1), (3, 3), (2, 4), (0, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_kvcache(name, new, queries, dtype):
    q, k_cache, v_cache, k, v = cached(new, dtype, queries)
    if new == 0:
        k = v = None
    expected, expected_lse, kept = plain_kvcache(q, k_cache, v_cache, k, v, HELD, **OPTIONS[name])
    absolute = v if v is None else v.abs()
    magnitude = plain_kvcache(q, k_cache, v_cache.abs(), k, absolute, HELD, **OPTIONS[name])[0].double()
    before = k_cache.clone(), v_cache.clone()
    out, lse = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=torch.tensor(HELD, dtype=torch.int32),
        **OPTIONS[name],
        return_softmax_lse=True,
    )
    assert_close(out, expected, magnitude)
    assert_close(lse, expected_lse)
    for cache, old, place in ((k_cache, before[0], 0), (v_cache, before[1], 1)):
        for b, length in enumerate(HELD):
            assert torch.equal(cache[b, : length + new], kept[b][place])
            assert torch.equal(cache[b, length + new :].isnan(), torch.ones_like(old[b, length + new :]).bool())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("pairs", [8, 4])
@pytest.mark.parametrize("name", ["plain", "causal", "window"])
def test_rotary(name, pairs, interleaved, dtype):
    q, k_cache, v_cache, k, v = cached(3, dtype)
    angles = torch.arange(30)[:, None] * 0.7 ** torch.arange(pairs)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    held = [5, 0, 20, 3]
    expected, _, kept = plain_kvcache(q, k_cache, v_cache, k, v, held, (cos, sin, interleaved), **OPTIONS[name])
    out = flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cos,
        sin,
        torch.tensor(held),
        rotary_interleaved=interleaved,
        **OPTIONS[name],
    )
    for b, length in enumerate(held):
        assert_close(k_cache[b, : length + 3], kept[b][0])
        assert torch.equal(v_cache[b, : length + 3], kept[b][1])
    # In half precision q and k are rounded once more, after turning, here and there.
    error = (out.double() - expected.double()).abs().max()
    assert error <= (2e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps)


def test_one_length_for_all_and_none():
    q, k_cache, v_cache, k, v = cached(1)
    k_cache, v_cache = random(4, ROOM, 2, 16), random(4, ROOM, 2, 8)
    full = flash_attn_with_kvcache(q, k_cache, v_cache)
    assert torch.equal(full, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ROOM))
    assert_close(full, plain_attention(q, k_cache, v_cache)[0])
    ones = k_cache.clone(), v_cache.clone()
    each = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=torch.full((4,), 9))
    assert torch.equal(flash_attn_with_kvcache(q, *ones, k, v, cache_seqlens=9, num_splits=3), each)


def test_rows_of_the_cache():
    q, k_cache, v_cache, k, v = cached(2)
    rows = torch.tensor([2, 0, 3], dtype=torch.int32)
    held = [HELD[row] for row in rows]
    some = slice(0, 3)
    expected, _, kept = plain_kvcache(q[some], k_cache[rows], v_cache[rows], k[some], v[some], held, causal=True)
    before = k_cache[1].clone()
    out = flash_attn_with_kvcache(
        q[some],
        k_cache,
        v_cache,
        k[some],
        v[some],
        cache_seqlens=torch.tensor(held),
        cache_batch_idx=rows,
        causal=True,
    )
    assert_close(out, expected)
    for b, row in enumerate(rows):
        assert torch.equal(k_cache[row, : held[b] + 2], kept[b][0])
    assert torch.equal(k_cache[1].nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_on_the_left(name):
    q, k_cache, v_cache, k, v = cached(2)
    leftpad = torch.tensor([3, 0, 20, 1], dtype=torch.int32)
    expected, _, _ = plain_kvcache(q, k_cache, v_cache, k, v, HELD, leftpad=leftpad, **OPTIONS[name])
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(HELD), cache_leftpad=leftpad, **OPTIONS[name]
    )
    assert_close(out, expected)


@pytest.mark.parametrize("page_size", [1, 4, 16, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_cache_in_pages(name, page_size):
    q, k_cache, v_cache, k, v = cached(2)
    lens = [length + 2 for length in HELD]  # the pages are there before their tokens
    (k_pages, table), (v_pages, _) = (
        pages_of(torch.cat([cache[b, :length] for b, length in enumerate(lens)]), lens, page_size)
        for cache in (k_cache, v_cache)
    )
    options = OPTIONS[name]
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=torch.tensor(HELD), **options)
    out = flash_attn_with_kvcache(
        q, k_pages, v_pages, k, v, cache_seqlens=torch.tensor(HELD), block_table=table, **options
    )
    assert torch.equal(out, expected)
    for b, length in enumerate(lens):
        for token in range(length):
            assert torch.equal(k_pages[table[b, token // page_size], token % page_size], k_cache[b, token])
            assert torch.equal(v_pages[table[b, token // page_size], token % page_size], v_cache[b, token])
    used = sum(lens)
    assert k_pages[..., 0, 0].isfinite().sum() == used  # nothing was written anywhere else


def test_an_empty_cache():
    q, k_cache, v_cache, _, _ = cached(1)
    out, lse = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=0, return_softmax_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


COS = torch.ones(40, 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": random(2, 6, 16)}, ValueError, "q has 3 dimensions, expected 4"),
        ({"cache_seqlens": None}, ValueError, "cache_seqlens is None, expected lengths: k is given"),
        ({"cache_seqlens": 23}, ValueError, "cache_seqlens is [23, 23, 23, 23], expected 0 to 22"),
        ({"cache_seqlens": -1}, ValueError, "cache_seqlens is [-1, -1, -1, -1], expected 0 to 22"),
        ({"cache_seqlens": torch.ones(3).int()}, ValueError, "cache_seqlens.shape is (3,), expected (4,) (from q)"),
        ({"cache_seqlens": torch.ones(4)}, TypeError, "cache_seqlens has type torch.float32, expected an int32"),
        ({"k": None}, ValueError, "v is given alone"),
        ({"k": random(4, 30, 2, 16), "v": random(4, 30, 2, 8)}, ValueError, "k.shape[1] is 30, expected at most 24"),
        ({"k": random(4, 2, 3, 16)}, ValueError, "k.shape is (4, 2, 3, 16), expected (4, 2, 2, 16)"),
        ({"v": random(4, 1, 2, 8)}, ValueError, "v.shape is (4, 1, 2, 8), expected (4, 2, 2, 8)"),
        ({"v": random(4, 2, 2, 8).half()}, TypeError, "v has dtype torch.float16, expected torch.float32 (from q)"),
        (
            {"k_cache": random(4, 24, 2, 16).half()},
            TypeError,
            "k_cache has dtype torch.float16, expected torch.float32",
        ),
        ({"v_cache": random(4, 23, 2, 8)}, ValueError, "v_cache.shape is (4, 23, 2, 8), expected"),
        ({"q": random(3, 2, 6, 16), "k": None, "v": None}, ValueError, "k_cache.shape[0] is 4, expected 3 (from q)"),
        (
            {"cache_batch_idx": torch.tensor([0, 1, 2, 4])},
            ValueError,
            "cache_batch_idx is [0, 1, 2, 4], expected 0 to 3",
        ),
        (
            {"cache_leftpad": torch.tensor([0, 1, 2, 25])},
            ValueError,
            "cache_leftpad is [0, 1, 2, 25], expected 0 to 24",
        ),
        ({"rotary_cos": COS}, ValueError, "expected rotary_cos, rotary_sin, k and v together, found some of them"),
        ({"rotary_cos": COS, "rotary_sin": COS[:, :4]}, ValueError, "rotary_sin.shape is (40, 4), expected (40, 8)"),
        (
            {"rotary_cos": COS[:21], "rotary_sin": COS[:21]},
            ValueError,
            "rotary_cos.shape[0] is 21, expected 22 or more (from the lengths)",
        ),
        (
            {"rotary_cos": torch.ones(40, 9), "rotary_sin": torch.ones(40, 9)},
            ValueError,
            "rotary_cos.shape[1] is 9, expected at most 8 (from q)",
        ),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, expected 0.0 or more"),
        ({"softcap": None}, TypeError, "softcap has type NoneType, expected a number"),
        ({"k": "a", "v": "b"}, TypeError, "k has type str, expected torch.Tensor"),
        (
            {"cache_batch_idx": torch.tensor([3, 1, 0, 1])},
            ValueError,
            "attention_kvcache: cache_batch_idx[3] is 1 like cache_batch_idx[1], expected a row of its own for new",
        ),
        (
            {"k_cache": random(1, 24, 2, 16).expand(4, -1, -1, -1)},
            ValueError,
            "attention_kvcache: k_cache has elements that share memory",
        ),
        ({"q": random(4, 2, 6, 16).requires_grad_()}, NotImplementedError, "q requires grad, expected no gradient"),
        ({"q": random(4, 2, 5, 16)}, ValueError, "attention_kvcache: "),
        ({"alibi_slopes": torch.ones(5)}, ValueError, "attention_kvcache: alibi_slopes"),
        ({"softmax_scale": math.nan}, ValueError, "attention_kvcache: scale"),
    ],
)
def test_kvcache_refused_with_nothing_written(change, error, text):
    q, k_cache, v_cache, k, v = cached(2)
    arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": torch.tensor(HELD)}
    arguments = {**arguments, **change}
    before = [arguments[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(error) as found:
        flash_attn_with_kvcache(**arguments)
    assert str(found.value).removeprefix("flash_attn_with_kvcache: ").startswith(text)
    for name, old in zip(("k_cache", "v_cache"), before, strict=True):
        assert torch.equal(arguments[name].nan_to_num(9.0), old.nan_to_num(9.0))


def test_pages_refused_with_nothing_written():
    q, k_cache, v_cache, k, v = cached(2)
    arguments = (q, k_cache, v_cache, k, v)
    held = torch.tensor(HELD)
    before = k_cache.clone()
    for table, text in (
        (torch.tensor([[0], [1], [2], [4]]), r"block_table\[3\] is \[4\], expected pages below 4"),
        (torch.tensor([[0], [1], [-1], [2]]), r"block_table\[2\] is \[-1\], expected pages below 4"),
        (torch.tensor([0, 1, 2, 3]), "block_table has 1 dimensions, expected 2"),
        (torch.tensor([[0], [1], [2]]), r"block_table\.shape is \(3, 1\), expected \(4, pages\)"),
    ):
        with pytest.raises(ValueError, match=text):
            flash_attn_with_kvcache(*arguments, cache_seqlens=held, block_table=table)
    table = torch.tensor([[0], [1], [2], [3]])
    with pytest.raises(ValueError, match="cache_batch_idx and block_table"):
        flash_attn_with_kvcache(*arguments, cache_seqlens=held, block_table=table, cache_batch_idx=held)
    with pytest.raises(NotImplementedError, match="cache_leftpad and block_table"):
        flash_attn_with_kvcache(*arguments, cache_seqlens=held, block_table=table, cache_leftpad=held)
    assert torch.equal(k_cache.nan_to_num(9.0), before.nan_to_num(9.0))


# --- padding ---------------------------------------------------------------------------------------------------------


def test_unpad_and_pad():
    x = random(3, 5, 2, 4)
    real = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    packed_x, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, real)
    assert torch.equal(packed_x, x[real.bool()])
    assert indices.tolist() == [0, 1, 11, 12, 13, 14]
    assert cu_seqlens.tolist() == [0, 2, 2, 6]
    assert (cu_seqlens.dtype, longest, used.tolist()) == (torch.int32, 4, [2, 0, 4])
    assert torch.equal(bert_padding.pad_input(packed_x, indices, 3, 5), x * real[..., None, None])
    assert torch.equal(bert_padding.index_first_axis(x.flatten(0, 1), indices), packed_x)


def test_unpad_keeps_unused_tokens():
    x, real = random(2, 3, 4), torch.tensor([[1, 0, 0], [1, 1, 0]])
    unused = torch.tensor([[0, 1, 0], [0, 0, 1]])
    packed_x, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, real, unused)
    assert indices.tolist() == [0, 1, 3, 4, 5]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 2, 5], 3, [1, 2])
    assert torch.equal(packed_x, x.flatten(0, 1)[indices])


def test_padding_is_differentiable():
    x = random(2, 3, 4, dtype=torch.float64).requires_grad_()
    real = torch.tensor([[1, 0, 0], [1, 1, 0]])

    def there_and_back(x):
        packed_x, indices, *_ = bert_padding.unpad_input(x, real)
        return bert_padding.pad_input(packed_x * packed_x, indices, 2, 3)

    assert torch.autograd.gradcheck(there_and_back, (x,))
