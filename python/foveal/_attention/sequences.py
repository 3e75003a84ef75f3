"""Attention where sequences differ in length: packed one after another, or growing in a cache of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy import ndarray

from foveal import _core
from foveal._attention.dense import Attention, refuse_lse
from foveal._options import core_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence


def _is_tensor(q: Any) -> bool:
    return not isinstance(q, ndarray) and hasattr(q, "__torch_function__")


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Sequence[int] | Any | None = None,
    cu_seqlens_kv: Sequence[int] | Any | None = None,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    q_offset: int | Sequence[int] | Any | None = None,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    gate: tuple[Any, Any] | None = None,
    span: tuple[Any, float] | None = None,
    normalizer: str = "softmax",
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
) -> Any:
    """Compute attention within each of B sequences that are packed one after another, without padding.

    Symbols as in :func:`attention`; B sequences have Tq queries and Tk keys in all.

    Parameters
    ----------
    q, k, v : array
        (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, Dv), of the kinds and dtypes that :func:`attention` takes. Or jagged nested
        tensors of PyTorch, (B, tokens, H, D) or transposed to (B, H, tokens, D), which hold the boundaries themselves.
    cu_seqlens_q, cu_seqlens_kv : (B + 1,) integers
        Sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys cu_seqlens_kv[b] to
        cu_seqlens_kv[b + 1]; neither may fall. Tokens before the first and behind the last belong to no sequence. None
        with nested tensors.
    mask, bias : array, optional
        As in :func:`attention`, broadcastable to (B, Hq, Sq, Skv), the longest lengths: row i and column j are those of
        query i and key j of their sequence.
    causal, q_offset, window, scale, softcap, alibi_slopes, sinks, normalizer
        As in :func:`attention`, within each sequence. ``q_offset`` is by default the number of its keys less that of
        its queries, so the last query sits at the last key.
    gate, span
        As in :func:`attention`, tau broadcastable to (Hq, Tq).
    dropout_p, seed
        As in :func:`attention`, where sequence b is batch element b.
    return_lse : bool
        Return an :class:`Attention` with ``lse``.

    Returns
    -------
    array or Attention
        (Tq, Hq, Dv), of q's kind and dtype, nested for nested tensors; ``lse`` (Hq, Tq), float32 (float64 for float64).
        Queries of no sequence give 0 and -inf, as do those that see no key (with a sink: the sink).

        The bits are those of :func:`attention` on each sequence alone.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`, and where the boundaries fall or leave the tokens.
    NotImplementedError
        ``alibi_slopes`` that require grad: of tensors, q, k, v, ``bias``, ``sinks``, ``gate`` and
        ``span`` have a gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import foveal
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((9, 8, 64), dtype=np.float32)
    >>> k = rng.standard_normal((12, 2, 64), dtype=np.float32)
    >>> out = foveal.attention_varlen(q, k, k, [0, 4, 9], [0, 7, 12], causal=True)
    >>> alone = foveal.attention(q[4:], k[7:], k[7:], causal=True, layout="bshd")
    >>> bool((out[4:] == alone).all())
    True
    """
    if return_lse and normalizer != "softmax":
        refuse_lse("attention_varlen", normalizer)
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "causal": causal,
        "q_offset": q_offset,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "gate": gate,
        "span": span,
        "dropout_p": dropout_p,
        "seed": seed,
        "normalizer": normalizer,
    }
    if _is_tensor(q):
        from foveal.torch import _attention_varlen

        out, lse = _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_kv, options)
    else:
        arguments = core_arguments(options, layout="bshd", return_lse=True)
        values = [*arguments.values(), cu_seqlens_q, cu_seqlens_kv]
        out, lse, *_ = _core.attention_varlen(q, k, v, *values)
    return Attention(out, lse) if return_lse else out


def attention_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    *,
    cache_lens: int | Sequence[int] | Any,
    k: Any = None,
    v: Any = None,
    block_table: Any = None,
    cache_batch_idx: Sequence[int] | Any | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: bool = False,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    q_offset: int | Sequence[int] | Any | None = None,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    normalizer: str = "softmax",
    return_lse: bool = False,
) -> Any:
    """Append new tokens to a cache of keys and values, in place, then compute attention to it.

    Symbols as in :func:`attention`: B sequences, Sq queries each. The cache has a row of Smax tokens for each sequence,
    or pages of any number of tokens that a table shares out among the sequences; pages are read where they lie.

    Parameters
    ----------
    q : array
        (B, Sq, Hq, D), of the kinds and dtypes that :func:`attention` takes.
    k_cache, v_cache : array
        (B, Smax, Hkv, D) and (B, Smax, Hkv, Dv), or with ``block_table`` (pages, page size, Hkv, D) and
        (pages, page size, Hkv, Dv); q's dtype, or int8 with ``k_scale`` and ``v_scale``.
    cache_lens : int or (B,) integers
        How many tokens each sequence has in the cache before this call.
    k, v : array, optional
        (B, Snew, Hkv, D) and (B, Snew, Hkv, Dv), of q's dtype: written behind them. Snew may differ from Sq.
    block_table : (B, pages a sequence) integers, optional
        Token t of sequence b is row t % page_size of page block_table[b, t // page_size]. Entries past the tokens are
        never read. Sequences may share pages that none of them writes to.
    cache_batch_idx : (B,) integers, optional
        Sequence b has cache row cache_batch_idx[b] instead of b; there may be more rows than sequences.
    k_scale, v_scale : (pages, Hkv) floating array, optional
        What one step of an int8 cache is worth, for each page (a row of the cache is one page) and head: element =
        code * scale. New tokens are stored as round(x / scale), at most 127 in magnitude, so max|x| / 127 is a scale
        that fits. docs/numerics.md has the error.
    rotary_cos, rotary_sin : (positions, pairs) floating array, optional
        With k and v only: turn the first 2 * pairs features of new token i, and of query i, by the angle of position
        cache_lens + i (RoFormer, Su et al. 2021).
    rotary_interleaved : bool
        A pair is two neighbours; False: a feature and the one ``pairs`` further on.
    mask, bias : array, optional
        Broadcastable to (B, Hq, Sq, Smax), where pages make Smax = pages a sequence * page size.
    causal, q_offset, window, scale, softcap, alibi_slopes, sinks, normalizer
        As in :func:`attention`, for each sequence with its new tokens: the last query sits at the last key.
    return_lse : bool
        Return an :class:`Attention` with ``lse``.

    Returns
    -------
    array or Attention
        (B, Sq, Hq, Dv), of q's kind and dtype; ``lse`` (B, Hq, Sq), float32 (float64 for float64).

        Without int8 the bits are those of :func:`attention` on the tokens of each sequence alone, for any page size.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`, and for lengths, rows or pages out of range, or a full cache. The cache is as before then.
    NotImplementedError
        A tensor that requires grad, with grad mode on: a cache has no gradient.

    References
    ----------
    Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".

    Examples
    --------
    >>> import numpy as np
    >>> import foveal
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 1, 8, 64), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 2, 1, 2, 64), dtype=np.float32)
    >>> k_cache, v_cache = np.zeros((2, 10, 16, 2, 64), np.float32)
    >>> table = np.array([[7, 2], [4, 0]])
    >>> foveal.attention_kvcache(q, k_cache, v_cache, cache_lens=[0, 20], k=k, v=v, block_table=table).shape
    (2, 1, 8, 64)
    >>> bool((k_cache[0, 20 - 16] == k[1, 0]).all())
    True
    """
    if return_lse and normalizer != "softmax":
        refuse_lse("attention_kvcache", normalizer)
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "causal": causal,
        "q_offset": q_offset,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "normalizer": normalizer,
    }
    update = {
        "k": k,
        "v": v,
        "block_table": block_table,
        "cache_batch_idx": cache_batch_idx,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
    }
    if _is_tensor(q):
        from foveal.torch import _attention_kvcache

        out, lse = _attention_kvcache(q, k_cache, v_cache, cache_lens, update, options)
    else:
        arguments = core_arguments(options, kv_lens=cache_lens, layout="bshd", return_lse=True)
        out, lse, *_ = _core.attention_kvcache(q, k_cache, v_cache, *arguments.values(), *update.values())
    return Attention(out, lse) if return_lse else out
