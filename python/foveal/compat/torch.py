"""``torch.nn.functional.scaled_dot_product_attention`` by foveal: the same arguments, alignment and shapes.

Where it differs from torch: a key that no query sees never reaches the result, not even as NaN; a mask may be given
together with ``is_causal`` whatever the shapes; what is refused raises TypeError or ValueError, not RuntimeError.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from foveal._attention.dense import attention

__all__ = ["scaled_dot_product_attention"]

_NAME = "scaled_dot_product_attention"
_TORCHS_WORDS = {
    "attention": _NAME,
    "q": "query",
    "k": "key",
    "v": "value",
    "mask": "attn_mask",
    "bias": "attn_mask",
    "causal": "is_causal",
}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute softmax(scale * query key^T + mask) value, as torch's function of this name does.

    Symbols: L queries, S keys, E and Ev features; N... any number of leading axes, which broadcast.

    Parameters
    ----------
    query, key, value : Tensor
        (N..., L, E), (N..., S, E), (N..., S, Ev), of two axes or more; float32, float64, float16 or bfloat16.
    attn_mask : Tensor, optional
        Broadcastable to (N..., L, S). Boolean, True: attend; or floating, added to the scores.
    dropout_p : float
        Applied whenever it is not 0, as in torch: pass 0.0 for evaluation.
    is_causal : bool
        Query i sees the keys j <= i: aligned at the first key, unlike ``foveal.attention(causal=True)``. With
        ``attn_mask`` a key has to pass both.
    scale : float, optional
        Default: 1/sqrt(E).
    enable_gqa : bool
        The third axis from the end counts heads, and the heads of ``key`` and of ``value`` divide those of ``query``.

    Returns
    -------
    Tensor
        (N..., L, Ev). A query that sees no key gives 0, as torch does.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit.
    NotImplementedError
        What :func:`foveal.attention` does not do yet.

    Examples
    --------
    >>> import torch
    >>> from foveal.compat.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(2, 8, 5, 64), torch.randn(2, 1, 7, 64), torch.randn(8, 7, 32)
    >>> scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([2, 8, 5, 32])
    """
    mask = bias = None
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            raise TypeError(f"{_NAME}: attn_mask has type {type(attn_mask).__name__}, expected torch.Tensor")
        if attn_mask.ndim < 2:
            raise ValueError(f"{_NAME}: attn_mask has {attn_mask.ndim} dimensions, expected 2 or more")
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        elif attn_mask.is_floating_point():
            bias = attn_mask
        else:
            raise TypeError(f"{_NAME}: attn_mask has dtype {attn_mask.dtype}, expected torch.bool or a floating dtype")

    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{_NAME}: {name} has type {type(x).__name__}, expected torch.Tensor")
    lead: tuple[int, ...] = query.shape[:-2]
    # Shapes of other ranks are not compared: that would put a guard on the sizes that happen to stand side by side.
    alike = 2 <= query.ndim <= 4 and query.ndim == key.ndim == value.ndim
    if not (alike and lead == key.shape[:-2] == value.shape[:-2]):
        query, key, value, lead = _broadcast(query, key, value, enable_gqa)
        if len(lead) > 2:
            query, key, value = (x.flatten(0, -4) for x in (query, key, value))
            mask, bias = (_fold(x, lead) for x in (mask, bias))
    try:
        out = attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            causal=is_causal,
            # Where the two alignments coincide, the default takes the shortest way.
            q_offset=0 if is_causal and not _is_known_equal(query.shape[-2], key.shape[-2]) else None,
            scale=scale,
            dropout_p=dropout_p,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(_in_torchs_words(str(error))) from None
    return out.reshape(*lead, *out.shape[-2:]) if len(lead) > 2 else out


def _is_known_equal(n: int, m: int) -> bool:
    """Tell whether two sizes are equal; symbolic ones only where they always are, since no guard may tie them."""
    if torch.compiler.is_dynamo_compiling() or isinstance(n, torch.SymInt) or isinstance(m, torch.SymInt):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(n == m)
    return n == m


def _in_torchs_words(text: str) -> str:
    """Name the arguments of foveal.attention in its error as the caller knows them."""
    return re.sub(r"\b(attention|q|k|v|mask|bias|causal)\b", lambda found: _TORCHS_WORDS[found[0]], text)


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Give all three the leading axes of the result, which are returned too; fewer heads of key and value remain."""
    least = 3 if enable_gqa else 2
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < least:
            raise ValueError(f"{_NAME}: {name} has {x.ndim} dimensions, expected {least} or more")
    leads = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if enable_gqa:
        heads = leads[0][-1]
        for name, given in zip(("key", "value"), leads[1:], strict=True):
            if given[-1] == 0 or heads % given[-1]:
                raise ValueError(
                    f"{_NAME}: {name}.shape[-3] is {given[-1]}, expected a divisor of {heads} (from query): "
                    "enable_gqa is True"
                )
        if leads[1][-1] != leads[2][-1]:
            key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
        kv_heads = key.shape[-3]
        leads = [(*given[:-1], heads) for given in leads]
    try:
        lead = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: query, key and value have the leading shapes {leads[0]}, {leads[1]} and {leads[2]}, "
            "expected shapes that broadcast"
        ) from None
    if not enable_gqa:  # one head that all share need not be repeated
        kv_heads = torch.broadcast_shapes((1,), leads[1][-1:], leads[2][-1:])[0]
    query = query.expand(*lead, *query.shape[-2:])
    kv_lead = (*lead[:-1], kv_heads) if lead else lead
    key, value = (x.expand(*kv_lead, *x.shape[-2:]) for x in (key, value))
    return query, key, value, lead


def _fold(x: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """Fold the batch axes of a mask into one, as those of query, key and value."""
    if x is None or x.ndim <= 3:
        return x
    if x.ndim > len(lead) + 2:
        raise ValueError(f"{_NAME}: attn_mask has {x.ndim} dimensions, expected {len(lead) + 2} or fewer")
    return x.expand(*lead[:-1], *x.shape[-3:]).flatten(0, -4)
