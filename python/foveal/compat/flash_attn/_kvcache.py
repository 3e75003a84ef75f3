"""Attention of new queries to a cache of keys and values, which may grow first: flash-attn's function for decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal._attention.sequences import attention_kvcache
from foveal.compat.flash_attn._arguments import check_rank, integers_of_batch, softcap_of, window_of
from foveal.compat.flash_attn._pages import check_pages
from foveal.compat.flash_attn._rotary import rotate

_NAME = "flash_attn_with_kvcache"


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Append k and v to the cache, then compute attention of q to it. There is no gradient.

    Parameters
    ----------
    q : Tensor
        (B, Sq, Hq, D).
    k_cache, v_cache : Tensor
        (Bc, Smax, Hkv, D), (Bc, Smax, Hkv, Dv), or with ``block_table`` (pages, page size, Hkv, D) and so on.
    k, v : Tensor, optional
        (B, Snew, Hkv, D), (B, Snew, Hkv, Dv): written into the cache, in place, behind what it holds.
    rotary_cos, rotary_sin : Tensor, optional
        (positions, pairs), with k and v only: the first 2 * pairs features are turned by position before use, k from
        position cache_seqlens on. Query i is at cache_seqlens + i if causal or with a window, else at cache_seqlens.
    cache_seqlens : int or (B,) integer Tensor, optional
        How many tokens the cache holds. Default, without k: all that it has room for.
    cache_batch_idx : (B,) integer Tensor, optional
        Sequence b is in cache row cache_batch_idx[b] rather than b.
    cache_leftpad : (B,) integer Tensor, optional
        The keys before it are not seen. Not with ``block_table``.
    block_table : (B, pages) integer Tensor, optional
        Sequence b has its tokens in the pages block_table[b], in order. They are read where they lie.
    softmax_scale, causal, window_size, softcap, alibi_slopes
        As in ``flash_attn_func``: aligned so that the last query is at the last key.
    rotary_interleaved : bool
        Pairs are neighbours; False: a feature and the one ``pairs`` further on.
    num_splits : int
        Of no effect.
    return_softmax_lse : bool
        Return (out, softmax_lse).

    Returns
    -------
    Tensor or tuple
        out (B, Sq, Hq, Dv); softmax_lse (B, Hq, Sq).

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`foveal.attention`, and for lengths, rows or pages out of range. Nothing has been written then.

    Examples
    --------
    >>> import torch
    >>> from foveal.compat.flash_attn import flash_attn_with_kvcache
    >>> k_cache, v_cache = torch.zeros(2, 100, 2, 64), torch.zeros(2, 100, 2, 64)
    >>> q, k, v = torch.randn(2, 1, 8, 64), torch.randn(2, 1, 2, 64), torch.randn(2, 1, 2, 64)
    >>> held = torch.tensor([0, 5])
    >>> flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=held, causal=True).shape
    torch.Size([2, 1, 8, 64])
    >>> bool((k_cache[1, 5] == k[1, 0]).all())
    True
    """
    check_rank(_NAME, 4, q=q, k_cache=k_cache, v_cache=v_cache)
    check_rank(_NAME, 4, **{name: x for name, x in (("k", k), ("v", v)) if x is not None})
    window, softcap = window_of(_NAME, window_size), softcap_of(_NAME, softcap)
    if torch.is_grad_enabled():
        for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
            if x is not None and x.requires_grad:
                raise NotImplementedError(f"{_NAME}: {name} requires grad, expected no gradient: there is none")
    _check_new(q, k_cache, v_cache, k, v)
    batch = q.shape[0]
    _check_rows(k_cache, cache_batch_idx, block_table, batch)
    if block_table is None:
        room = k_cache.shape[1]
    else:
        check_rank(_NAME, 2, block_table=block_table)
        room = block_table.shape[1] * k_cache.shape[1]
    held, lens = _lengths(cache_seqlens, k, batch, room)
    if block_table is not None:
        check_pages(_NAME, block_table, lens.tolist(), k_cache, v_cache)
    leftpad = None
    if cache_leftpad is not None:
        if block_table is not None:
            raise NotImplementedError(f"{_NAME}: cache_leftpad and block_table are given, expected one of them")
        leftpad = integers_of_batch(_NAME, "cache_leftpad", cache_leftpad, batch, room)
    each_query = causal or window != (None, None)
    tables = _rotary_tables(q, k, rotary_cos, rotary_sin, held, lens, each_query)
    if tables is not None and k is not None and not each_query and q.shape[1] > 1:
        # All queries are at one position here, and at successive ones in attention_kvcache.
        new = held[:, None] + torch.arange(k.shape[1], device=q.device)
        q = rotate(q, *tables, held[:, None], interleaved=rotary_interleaved)
        k = rotate(k, *tables, new, interleaved=rotary_interleaved)
        tables = None
    mask = None
    if leftpad is not None:
        mask = (torch.arange(room, device=q.device) >= leftpad[:, None])[:, None, None]
    result: Any = attention_kvcache(
        q,
        k_cache,
        v_cache,
        cache_lens=held,
        k=k,
        v=v,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        rotary_cos=None if tables is None else tables[0],
        rotary_sin=None if tables is None else tables[1],
        rotary_interleaved=rotary_interleaved,
        mask=mask,
        causal=causal,
        window=window,
        scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_softmax_lse,
    )
    return (result.out, result.lse) if return_softmax_lse else result


def _check_new(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype != q.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {cache.dtype}, expected {q.dtype} (from q)")
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"{_NAME}: v_cache.shape is {tuple(v_cache.shape)}, expected {(*k_cache.shape[:3], 'Dv')} (from k_cache)"
        )
    if k is None and v is None:
        return
    if k is None or v is None:
        raise ValueError(f"{_NAME}: {'v' if k is None else 'k'} is given alone, expected k and v")
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (q.shape[0], k.shape[1], *cache.shape[2:])
        if x.shape != expected:
            raise ValueError(f"{_NAME}: {name}.shape is {tuple(x.shape)}, expected {expected}")
        if x.dtype != q.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {x.dtype}, expected {q.dtype} (from q)")


def _check_rows(k_cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None, batch: int) -> None:
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(f"{_NAME}: cache_batch_idx and block_table are given, expected one of them")
    elif cache_batch_idx is not None:
        integers_of_batch(_NAME, "cache_batch_idx", cache_batch_idx, batch, k_cache.shape[0] - 1)
    elif k_cache.shape[0] != batch:
        raise ValueError(f"{_NAME}: k_cache.shape[0] is {k_cache.shape[0]}, expected {batch} (from q)")


def _lengths(cache_seqlens: int | Tensor | None, k: Tensor | None, batch: int, room: int) -> tuple[Tensor, Tensor]:
    """Give the lengths before and after appending."""
    new = 0 if k is None else k.shape[1]
    if cache_seqlens is None:
        if k is not None:
            raise ValueError(f"{_NAME}: cache_seqlens is None, expected lengths: k is given")
        cache_seqlens = room
    if new > room:
        raise ValueError(f"{_NAME}: k.shape[1] is {new}, expected at most {room} (from k_cache)")
    held = integers_of_batch(_NAME, "cache_seqlens", cache_seqlens, batch, room - new)
    return held, held + new


def _rotary_tables(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    held: Tensor,
    lens: Tensor,
    each_query: bool,
) -> tuple[Tensor, Tensor] | None:
    """Give cos and sin, when there are any; they must fit."""
    if cos is None and sin is None:
        return None
    if cos is None or sin is None or k is None:
        raise ValueError(f"{_NAME}: expected rotary_cos, rotary_sin, k and v together, found some of them")
    check_rank(_NAME, 2, rotary_cos=cos, rotary_sin=sin)
    if cos.shape != sin.shape:
        raise ValueError(
            f"{_NAME}: rotary_sin.shape is {tuple(sin.shape)}, expected {tuple(cos.shape)} (from rotary_cos)"
        )
    if 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(
            f"{_NAME}: rotary_cos.shape[1] is {cos.shape[1]}, expected at most {q.shape[-1] // 2} (from q)"
        )
    last = int(torch.maximum(lens, held + (q.shape[1] if each_query else 1)).max()) if len(lens) else 0
    if cos.shape[0] < last:
        raise ValueError(f"{_NAME}: rotary_cos.shape[0] is {cos.shape[0]}, expected {last} or more (from the lengths)")
    return cos, sin
