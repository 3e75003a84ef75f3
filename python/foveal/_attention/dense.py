"""``foveal.attention``: one signature for every kind of array, and the way from it to the kernel of that kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypedDict, TypeVar, overload

from numpy import ndarray

from foveal import _core
from foveal._attention.stats import stats_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Unpack

ArrayT = TypeVar("ArrayT")


class Attention(NamedTuple):
    """What :func:`attention` returns when more than the output is asked for; what was not asked for is None."""

    out: Any
    lse: Any = None
    weights: Any = None
    stats: Any = None


class _Options(TypedDict, total=False):
    mask: Any
    bias: Any
    causal: bool
    q_offset: int | Sequence[int] | Any | None
    window: tuple[int | None, int | None]
    scale: float | None
    softcap: float
    alibi_slopes: Any
    sinks: Any
    gate: tuple[Any, Any] | None
    span: tuple[Any, float] | None
    q_lens: Sequence[int] | Any | None
    kv_lens: Sequence[int] | Any | None
    dropout_p: float
    seed: int | None
    normalizer: Literal["softmax", "sparsemax", "entmax15", "sigmoid", "relu", "normalized_sigmoid"]
    layout: Literal["bhsd", "bshd"]
    out: Any


_torch_attention: Callable[..., Any] | None = None


def _load_torch_attention() -> Callable[..., Any]:
    """Import foveal.torch when the first tensor comes: foveal alone never imports torch."""
    global _torch_attention
    from foveal import torch

    _torch_attention = torch._attention
    return _torch_attention


@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: Literal[False] = ...,
    return_weights: Literal[False] = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[_Options],
) -> ArrayT: ...
@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: Literal[True],
    return_weights: bool = ...,
    return_stats: bool = ...,
    **options: Unpack[_Options],
) -> Attention: ...
@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: bool = ...,
    return_weights: Literal[True],
    return_stats: bool = ...,
    **options: Unpack[_Options],
) -> Attention: ...
@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: bool = ...,
    return_weights: bool = ...,
    return_stats: Literal[True],
    **options: Unpack[_Options],
) -> Attention: ...
@overload
def attention(
    q: ArrayT,
    k: ArrayT,
    v: ArrayT,
    *,
    return_lse: bool = ...,
    return_weights: bool = ...,
    return_stats: bool = ...,
    **options: Unpack[_Options],
) -> ArrayT | Attention: ...
def attention(
    q: Any,
    k: Any,
    v: Any,
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
    q_lens: Sequence[int] | Any | None = None,
    kv_lens: Sequence[int] | Any | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    normalizer: str = "softmax",
    layout: str = "bhsd",
    out: Any = None,
    return_lse: bool = False,
    return_weights: bool = False,
    return_stats: bool = False,
    gate: tuple[Any, Any] | None = None,
    span: tuple[Any, float] | None = None,
) -> Any:
    r"""Compute exact scaled dot-product attention, block by block, without the array of scores.

    ::

        s = scale * q k^T                          (Sq, Skv), never held
        s = softcap * tanh(s / softcap)            where softcap > 0
        s = s - slope * |q_offset + i - j| + bias  where given
        s = s + log(sigmoid((s - tau) / T))        with a gate
        s = s + log(clamp((ramp + z - |q_offset + i - j|) / ramp, 0, 1))  with a span
        out = dropout(softmax(s)) v                over the keys j that query i sees

    Symbols: B batch, Hq query heads, Hkv key/value heads (Hkv divides Hq; query head h reads key/value head
    h // (Hq / Hkv)), Sq and Skv sequence lengths, D query/key head dim, Dv value head dim.

    Parameters
    ----------
    q, k, v : array
        (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv), or all without B, or all without B and H. numpy.ndarray,
        torch.Tensor or any CPU array with ``__dlpack__`` (such as JAX's), of one kind and one dtype: float32, float64,
        float16 or bfloat16 (``ml_dtypes.bfloat16`` in NumPy). Strides are free: negative, broadcast (0) and padded ones
        are read in place.
    mask : bool array, optional
        Broadcastable to (B, Hq, Sq, Skv); True: query i sees key j.
    bias : floating array, optional
        Broadcastable to (B, Hq, Sq, Skv), added to the scores. A key at -inf is not seen.
    causal : bool
        Query i, at position q_offset + i, sees the keys j <= q_offset + i.
    q_offset : int or (B,) integers, optional
        May be negative. Default: Skv - Sq (kv_len - q_len with lengths), so the last query sits at the last key. For
        the alignment at the first key that PyTorch's ``is_causal`` has, pass 0.
    window : (int or None, int or None)
        Query i sees the keys q_offset + i - left <= j <= q_offset + i + right; None: no limit. Composes with
        ``causal``.
    scale : float, optional
        Default: 1/sqrt(D).
    softcap : float
        0: none.
    alibi_slopes : (Hq,) or (B, Hq) floating array, optional
        ALiBi (Press et al. 2022), by distance from the query's position.
    sinks : (Hq,) floating array, optional
        One more logit per head in the denominator alone.
    q_lens, kv_lens : (B,) integers, optional
        Rows past q_len are 0; keys past kv_len are never read. Lists, NumPy arrays and tensors will do for all kinds.
    dropout_p : float
        The chance of each weight to become 0 after the normaliser; the others are multiplied by 1 / (1 - dropout_p).
        ``return_weights`` gives the weights after it, ``return_lse`` knows nothing of it.
    seed : int, optional
        0 to 2^63 - 1 (for tensors also an int64 tensor of shape ()): with the places b, h, i, j of a pair all that
        decides whether it is dropped, on any machine. Default: from torch's generator for tensors, else from the
        system, anew at each call.
    normalizer : str
        How the scores s of a row become weights w. tau is the number at which the weights of the row sum to 1, and n
        the number of keys that lengths, causal and window leave to the row (mask and bias not counted).

        - ``"softmax"``: w = exp(s) / sum(exp(s)).
        - ``"sparsemax"``: w = max(s - tau, 0) [1]_.
        - ``"entmax15"``: w = max(s / 2 - tau, 0)^2 [2]_.
        - ``"sigmoid"``: w = sigmoid(s - log(n)) [3]_.
        - ``"relu"``: w = max(s, 0) / n [4]_.
        - ``"normalized_sigmoid"``: w = sigmoid(s) / sum(sigmoid(s)).

        A key with weight 0 (sparsemax, entmax15, relu) never reaches the output, NaN included. Other normalisers than
        softmax have no ``sinks`` and no ``return_lse``. docs/mechanisms.md says when to use which.
    return_stats : bool
        Return an :class:`Attention` with ``stats``, an :class:`AttentionStats` of the weights before dropout: entropy,
        breadth, largest weight and its key, and the threshold of sparsemax and entmax15. For tensors, entropy and
        breadth have a gradient.
    gate : (tau, T), optional
        Learned threshold: adds log(sigmoid((s - tau) / T)) to each score, so that softmax weighs a key by exp(s) times
        sigmoid((s - tau) / T). tau is a number or a floating array broadcastable to (B, Hq, Sq), T > 0 a number or a
        (Hq,) array.
    span : (z, ramp), optional
        Learned span [5]_: keys further from the query's position than z fade out over ``ramp`` positions, and blocks
        beyond are skipped. z is a number or a (Hq,) or (B, Hq) floating array, ramp > 0 a number.
    layout : "bhsd" or "bshd"
        "bshd": q, k, v and the output are (B, Sq, Hq, D) and so on, and (S, H, D) without B. Nothing is copied.
    out : array, optional
        Takes the output and is returned: q's shape with Dv for D, q's kind and dtype, any strides that do not overlap
        themselves or another argument. Undefined after a KeyboardInterrupt.
    return_lse, return_weights : bool
        Return an :class:`Attention` with ``lse`` (B, Hq, Sq), log(sum(exp(s))), in float32 (float64 for float64), and
        ``weights`` (B, Hq, Sq, Skv) in q's dtype; in this order in every layout, without the axes that q
        lacks.

    Returns
    -------
    array or Attention
        (B, Hq, Sq, Dv), in the layout, rank, kind and dtype of q, C-contiguous. Sums are float32 (float64 for float64)
        and the output is rounded once. A query that sees no key gives 0, weights 0 and lse -inf (with a sink: the
        sink). What is not seen, NaN and infinity included, has no influence.

        The bits do not depend on the number of threads, nor on what else is in the batch, nor on padding that lengths
        exclude; they may differ between instruction sets.

    Raises
    ------
    TypeError
        An argument has a wrong type, kind, dtype or device; a floating ``mask``.
    ValueError
        A shape, stride, length or number does not fit; the text says which, and what was expected.
    NotImplementedError
        An option that is not built yet, or ``sinks`` with another normaliser than softmax.
    MemoryError
        No memory for a result or for working space.

    References
    ----------
    Vaswani et al. 2017, "Attention Is All You Need". Milakov and Gimelshein 2018, "Online normalizer calculation for
    softmax". Dao et al. 2022, "FlashAttention".

    .. [1] Martins and Astudillo 2016, "From Softmax to Sparsemax".
    .. [2] Peters, Niculae and Martins 2019, "Sparse Sequence-to-Sequence Models".
    .. [3] Ramapuram et al. 2025, "Theory, Analysis, and Best Practices for Sigmoid Self-Attention".
    .. [4] Wortsman et al. 2023, "Replacing softmax with ReLU in Vision Transformers".
    .. [5] Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers", eq. 4 and 5.

    Examples
    --------
    >>> import numpy as np
    >>> import foveal
    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((2, 8, 5, 64), dtype=np.float32)
    >>> k = rng.standard_normal((2, 2, 7, 64), dtype=np.float32)
    >>> v = rng.standard_normal((2, 2, 7, 64), dtype=np.float32)
    >>> foveal.attention(q, k, v, causal=True).shape
    (2, 8, 5, 64)
    >>> out, lse, weights, _ = foveal.attention(q, k, v, kv_lens=[7, 3], return_lse=True, return_weights=True)
    >>> lse.shape, weights.shape
    ((2, 8, 5), (2, 8, 5, 7))
    >>> bool((weights[1, :, :, 3:] == 0).all())
    True
    """
    if normalizer != "softmax" and return_lse:
        refuse_lse("attention", normalizer)
    call = _core.attention
    if not isinstance(q, ndarray) and hasattr(q, "__torch_function__"):
        call = _torch_attention or _load_torch_attention()
    # By position, in the order of foveal._options: keywords would cost as much as a whole call on small arrays.
    result = call(
        q,
        k,
        v,
        mask,
        bias,
        alibi_slopes,
        sinks,
        gate,
        span,
        None,  # u, of additive_attention
        q_lens,
        kv_lens,
        causal,
        q_offset,
        window,
        scale,
        softcap,
        dropout_p,
        seed,
        normalizer,
        layout,
        out,
        return_lse,
        return_weights,
        return_stats,
    )
    if not (return_lse or return_weights or return_stats):
        return result
    attended, lse, weights, stats = result
    return Attention(attended, lse, weights, stats_of(stats, normalizer) if return_stats else None)


def refuse_lse(function: str, normalizer: str) -> NoReturn:
    """Refuse to return the lse of another normaliser than softmax, which has none."""
    if normalizer not in _core.NORMALIZERS:
        *first, last = map(repr, _core.NORMALIZERS)
        raise ValueError(f"{function}: normalizer is {normalizer!r}, expected {', '.join(first)} or {last}")
    raise ValueError(f"{function}: return_lse is True, expected False with normalizer={normalizer!r}, which has no lse")
