"""Attention of whole batches by flash-attn's names: (B, S, H, D) tensors, bottom-right causal.

With ``return_attn_probs`` a function returns (out, softmax_lse, S_dmask). As in the original, S_dmask is empty
without dropout: ask :func:`foveal.attention` for weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveal._attention.dense import attention
from foveal.compat.flash_attn._arguments import check_rank, refuse_dropped_weights, softcap_of, unpack, window_of


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Compute attention; foveal's work is deterministic whether asked for or not.

    Parameters
    ----------
    q, k, v : Tensor
        (B, Sq, Hq, D), (B, Skv, Hkv, D), (B, Skv, Hkv, Dv); Hkv divides Hq.
    dropout_p : float
        0.0 for evaluation.
    softmax_scale : float, optional
        Default: 1/sqrt(D).
    causal : bool
        Query i sees the keys j <= i + Skv - Sq.
    window_size : (int, int)
        Query i sees the keys from i + Skv - Sq - left to i + Skv - Sq + right; a negative number: no limit.
    softcap : float
        0.0: none.
    alibi_slopes : (Hq,) or (B, Hq) Tensor, optional
        Adds -slope * |i + Skv - Sq - j|.
    deterministic : bool
        Of no effect.
    return_attn_probs : bool
        Return (out, softmax_lse, an empty tensor).

    Returns
    -------
    Tensor or tuple
        out (B, Sq, Hq, Dv); softmax_lse (B, Hq, Sq). A query that sees no key gives 0 and -inf.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As :func:`foveal.attention`.

    Examples
    --------
    >>> import torch
    >>> from foveal.compat.flash_attn import flash_attn_func
    >>> q, k = torch.randn(2, 5, 8, 64), torch.randn(2, 7, 2, 64)
    >>> flash_attn_func(q, k, k, causal=True, window_size=(3, 0)).shape
    torch.Size([2, 5, 8, 64])
    """
    return _attention(
        "flash_attn_func",
        (q, k, v),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with k and v in one tensor: kv is (B, Skv, 2, Hkv, D). Nothing is copied."""
    function = "flash_attn_kvpacked_func"
    k, v = unpack(function, "kv", kv, 2, 2)
    return _attention(
        function,
        (q, k, v),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """:func:`flash_attn_func` with q, k and v in one tensor: qkv is (B, S, 3, H, D). Nothing is copied."""
    function = "flash_attn_qkvpacked_func"
    return _attention(
        function,
        unpack(function, "qkv", qkv, 2, 3),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
    )


def _attention(
    function: str,
    qkv: tuple[Tensor, ...],
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Any:
    q, k, v = qkv
    check_rank(function, 4, q=q, k=k, v=v)
    refuse_dropped_weights(function, dropout_p, return_attn_probs)
    result: Any = attention(
        q,
        k,
        v,
        causal=causal,
        window=window_of(function, window_size),
        scale=softmax_scale,
        softcap=softcap_of(function, softcap),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        layout="bshd",
        return_lse=return_attn_probs,
    )
    return (result.out, result.lse, q.new_empty(0)) if return_attn_probs else result
