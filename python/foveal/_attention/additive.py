"""Additive attention: scores from a layer of tanh instead of a product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveal import _core
from foveal._attention.dense import Attention
from foveal._attention.stats import stats_of
from foveal._options import core_arguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_NAME = "additive_attention"


def _check(q: Any, k: Any, w_q: Any, w_k: Any, u: Any) -> None:
    """Refuse projections that do not fit."""
    for name, w, of, x in (("w_q", w_q, "q", q), ("w_k", w_k, "k", k)):
        if getattr(w, "ndim", None) != 2:
            raise ValueError(f"{_NAME}: {name} has shape {getattr(w, 'shape', None)}, expected (D, A)")
        if w.shape[0] != x.shape[-1]:
            raise ValueError(f"{_NAME}: {name}.shape[0] is {w.shape[0]}, expected D {x.shape[-1]} (from {of})")
    if w_k.shape[1] != w_q.shape[1]:
        raise ValueError(f"{_NAME}: w_k.shape[1] is {w_k.shape[1]}, expected A {w_q.shape[1]} (from w_q)")
    if getattr(u, "ndim", None) not in (1, 2) or u.shape[-1] != w_q.shape[1]:
        raise ValueError(
            f"{_NAME}: u has shape {getattr(u, 'shape', None)}, expected (A,) or (Hq, A), A = {w_q.shape[1]} (from w_q)"
        )


def _floating(q: Any) -> Sequence[Any]:
    if isinstance(q, np.ndarray):
        names = [x for x in ("float32", "float64", "float16", "bfloat16") if q.dtype.name == x]
        return [q.dtype] if names and q.dtype.isnative else []
    import torch

    return torch.float32, torch.float64, torch.float16, torch.bfloat16


def additive_attention(
    q: Any,
    k: Any,
    v: Any,
    w_q: Any,
    w_k: Any,
    u: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool = False,
    q_offset: int | Sequence[int] | Any | None = None,
    window: tuple[int | None, int | None] = (None, None),
    q_lens: Sequence[int] | Any | None = None,
    kv_lens: Sequence[int] | Any | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    normalizer: str = "softmax",
    layout: str = "bhsd",
    out: Any = None,
    return_weights: bool = False,
    return_stats: bool = False,
) -> Any:
    """Compute attention with additive scores, block by block, without the array of tanh of every pair.

    ::

        s = u . tanh(q w_q + k w_k)      (Sq, Skv), of (Sq, Skv, A) numbers that are never held
        out = dropout(softmax(s)) v

    Symbols as in :func:`attention`; A is the width of the hidden layer.

    Parameters
    ----------
    q, k, v : array
        (B, Hq, Sq, D), (B, Hkv, Skv, Dk) and (B, Hkv, Skv, Dv), or all without B, or all without B and H. numpy.ndarray
        or torch.Tensor, of one dtype: float32, float64, float16 or bfloat16.
    w_q, w_k : array
        (D, A) and (Dk, A), of q's dtype.
    u : array
        (A,) or (Hq, A), of q's dtype.
    mask, bias, causal, q_offset, window, q_lens, kv_lens, dropout_p, seed, normalizer, layout, out
        As in :func:`attention`.
    return_weights, return_stats : bool
        As in :func:`attention`.

    Returns
    -------
    array or Attention
        As :func:`attention`. Projections and scores are float32 (float64 for float64) whatever q's dtype; the output
        is rounded once. For tensors, q, k, v, w_q, w_k, u and ``bias`` have gradients.

    Raises
    ------
    TypeError, ValueError
        As :func:`attention`, and for ``w_q``, ``w_k`` and ``u`` of shapes that do not fit.

    References
    ----------
    Bahdanau, Cho and Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and Translate", appendix
    A.1.2.

    Examples
    --------
    >>> import numpy as np
    >>> import foveal
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 4, 6, 16), dtype=np.float32)
    >>> w_q, w_k = rng.standard_normal((2, 16, 8), dtype=np.float32)
    >>> u = rng.standard_normal(8, dtype=np.float32)
    >>> out, _, weights, _ = foveal.additive_attention(q, k, v, w_q, w_k, u, return_weights=True)
    >>> s = np.tanh((q @ w_q)[..., :, None, :] + (k @ w_k)[..., None, :, :]) @ u
    >>> np.allclose(weights, np.exp(s) / np.exp(s).sum(-1, keepdims=True), atol=1e-6)
    True
    """
    options: dict[str, Any] = {
        "mask": mask,
        "bias": bias,
        "causal": causal,
        "q_offset": q_offset,
        "window": window,
        "q_lens": q_lens,
        "kv_lens": kv_lens,
        "dropout_p": dropout_p,
        "seed": seed,
        "normalizer": normalizer,
        "layout": layout,
    }
    requests = {"return_weights": return_weights, "return_stats": return_stats}
    arrays = {"q": q, "k": k, "v": v, "w_q": w_q, "w_k": w_k, "u": u}
    compute: Callable[..., Any]
    if hasattr(q, "__torch_function__"):
        from foveal.torch.additive import compute
    elif isinstance(q, np.ndarray):
        compute = _compute
    else:
        kind = type(q).__module__ + "." + type(q).__qualname__
        raise TypeError(f"{_NAME}: q has type {kind}, expected numpy.ndarray or torch.Tensor")
    for name, x in arrays.items():
        if isinstance(x, np.ndarray) != isinstance(q, np.ndarray) or not hasattr(x, "dtype"):
            raise TypeError(
                f"{_NAME}: {name} has type {type(x).__qualname__}, expected {type(q).__qualname__} (from q)"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {x.dtype}, expected {q.dtype} (from q)")
    if q.dtype not in _floating(q):
        raise TypeError(f"{_NAME}: q has dtype {q.dtype}, expected float32, float64, float16 or bfloat16")
    for name in "qkv":
        if not 2 <= arrays[name].ndim <= 4:
            raise ValueError(f"{_NAME}: {name} has {arrays[name].ndim} dimensions, expected 2, 3 or 4")
    _check(q, k, w_q, w_k, u)
    try:
        result = compute(*arrays.values(), options, out, requests)
    except (TypeError, ValueError, NotImplementedError, MemoryError) as error:
        # What attention says of the arguments that it has too.
        text = str(error).removeprefix(f"{_NAME}: ").removeprefix("attention: ")
        raise type(error)(f"{_NAME}: {text}") from None
    if not (return_weights or return_stats):
        return result
    attended, _, weights, stats = result
    return Attention(attended, None, weights, stats_of(tuple(stats), normalizer) if return_stats else None)


def _compute(
    q: Any, k: Any, v: Any, w_q: Any, w_k: Any, u: Any, options: dict[str, Any], out: Any, requests: dict[str, bool]
) -> Any:
    """Compute it on NumPy arrays, in the dtype of the sums."""
    dtype = q.dtype
    accumulator = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    q, k, v, w_q, w_k, u = (x.astype(accumulator, copy=False) for x in (q, k, v, w_q, w_k, u))
    direct = dtype == accumulator
    given = {**options, "u": u, "out": out if direct else None}
    result = _core.attention(q @ w_q, k @ w_k, v, *core_arguments(given, **{"out": given["out"], **requests}).values())
    if direct:
        return result
    attended, lse, weights, stats = result if isinstance(result, tuple) else (result, None, None, None)
    if out is None:
        attended = attended.astype(dtype)
    else:
        if not isinstance(out, np.ndarray) or out.dtype != dtype or out.shape != attended.shape:
            raise ValueError(
                f"{_NAME}: out has dtype {getattr(out, 'dtype', None)} and shape {getattr(out, 'shape', None)}, "
                f"expected {dtype} and {attended.shape}"
            )
        out[...] = attended
        attended = out
    if not isinstance(result, tuple):
        return attended
    return attended, lse, None if weights is None else weights.astype(dtype), stats
