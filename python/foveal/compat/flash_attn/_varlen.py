"""Attention of packed sequences by flash-attn's names: (tokens, H, D) tensors and where each sequence begins.

A call of :func:`foveal.attention_varlen`, so nothing is padded and the bits are those of each sequence alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foveal._attention.sequences import attention_varlen
from foveal.compat.flash_attn._arguments import (
    boundaries,
    check_rank,
    refuse_dropped_weights,
    softcap_of,
    unpack,
    window_of,
)
from foveal.compat.flash_attn._pages import check_pages, gather_pages


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Compute attention within each of B sequences.

    Parameters
    ----------
    q, k, v : Tensor
        (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv): the tokens of all sequences, one after another.
    cu_seqlens_q, cu_seqlens_k : (B + 1,) integer Tensor
        Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1], and keys likewise. The first is 0.
    max_seqlen_q, max_seqlen_k : int
        No sequence is longer.
    dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic
        As in ``flash_attn_func``, for each sequence.
    return_attn_probs : bool
        Return (out, softmax_lse, an empty tensor).
    block_table : (B, pages) integer Tensor, optional
        k and v are (pages in all, page size, Hkv, D), and sequence b has its keys in the pages block_table[b], in
        order. They are copied together for the computation.

    Returns
    -------
    Tensor or tuple
        out (Tq, Hq, Dv); softmax_lse (Hq, Tq). Queries past the last sequence give 0 and -inf.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`foveal.attention`, and for boundaries or pages that are out of range.

    Examples
    --------
    >>> import torch
    >>> from foveal.compat.flash_attn import flash_attn_varlen_func
    >>> q, k = torch.randn(9, 8, 64), torch.randn(12, 2, 64)
    >>> begins_q, begins_k = torch.tensor([0, 4, 9]), torch.tensor([0, 7, 12])
    >>> flash_attn_varlen_func(q, k, k, begins_q, begins_k, 5, 7, causal=True).shape
    torch.Size([9, 8, 64])
    """
    function = "flash_attn_varlen_func"
    check_rank(function, 3, q=q)
    check_rank(function, 3 if block_table is None else 4, k=k, v=v)
    refuse_dropped_weights(function, dropout_p, return_attn_probs)
    begins_q = boundaries(function, "q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    total_k = k.shape[0] if block_table is None else None
    begins_k = boundaries(function, "k", cu_seqlens_k, max_seqlen_k, total_k)
    batch = len(begins_q) - 1
    if len(begins_k) != batch + 1:
        raise ValueError(
            f"{function}: cu_seqlens_k has {len(begins_k)} elements, expected {batch + 1} (from cu_seqlens_q)"
        )
    lens_k = [end - begin for begin, end in pairwise(begins_k)]
    if block_table is not None:
        check_pages(function, block_table, lens_k, k, v)
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.ndim == 2 and alibi_slopes.shape[0] != batch:
        raise ValueError(
            f"{function}: alibi_slopes.shape[0] is {alibi_slopes.shape[0]}, expected {batch} (from cu_seqlens_q)"
        )

    if block_table is not None:
        k, v = (
            torch.cat([gather_pages(x, block_table[b : b + 1], [n])[0, :n] for b, n in enumerate(lens_k)] or [x[:0, 0]])
            for x in (k, v)
        )
    result: Any = attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        window=window_of(function, window_size),
        scale=softmax_scale,
        softcap=softcap_of(function, softcap),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=return_attn_probs,
    )
    return (result.out, result.lse, q.new_empty(0)) if return_attn_probs else result


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with k and v in one tensor: kv is (Tk, 2, Hkv, D)."""
    k, v = unpack("flash_attn_varlen_kvpacked_func", "kv", kv, 1, 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with q, k and v in one tensor: qkv is (T, 3, H, D)."""
    q, k, v = unpack("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 1, 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
