"""CPU kernels in Python, for a torch whose C shim lacks what the C++ kernels need. Slower to call, otherwise the same.

They hand the tensors to the function that serves every array with ``__dlpack__``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal import _core
from foveal._options import DEFAULTS, core_arguments
from foveal.torch.ops.records import (
    ASKED,
    SAVED,
    BackwardOptions,
    Options,
    PackedBackwardOptions,
    PackedOptions,
    StatsOptions,
    as_dense,
)


def _arguments(q: Tensor, k: Tensor, v: Tensor, options: Any, last: tuple[Any, ...] = (), **requests: Any) -> list[Any]:
    """Give the arguments of a function of ``_core`` that ends with ``last``."""
    own = core_arguments(
        {
            **{name: x for name, x in options._asdict().items() if name in DEFAULTS},
            "q_offset": options.q_offset if options.q_offsets is None else options.q_offsets,
            "gate": None
            if options.gate_tau is None
            else tuple(map(_lent, (options.gate_tau, options.gate_temperature))),
            "span": None if options.span is None else (_lent(options.span), options.span_ramp),
            "window": (options.window_left, options.window_right),
            "seed": _seed(options),
            "normalizer": _core.NORMALIZERS[options.normalizer],
            "layout": "bshd" if options.bshd else "bhsd",
        },
        **requests,
    )
    # Only a detached tensor lends its memory.
    return [_lent(x) for x in (q, k, v, *own.values(), *last)]


def _lent(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _seed(options: Any) -> int | None:
    if options.dropout_p == 0.0:
        return None
    if options.seed is None:
        raise ValueError("attention: seed is absent, expected one with dropout_p")
    if options.seed.ndim or options.seed.dtype != torch.int64:
        raise TypeError("attention: seed is no int64 tensor of shape (), as the op expects it")
    seed = int(options.seed)
    if seed < 0:
        raise ValueError(f"attention: seed is {seed}, expected 0 to 2^63 - 1")
    return seed


def _compute(q: Tensor, k: Tensor, v: Tensor, options: Any, out: Tensor | None, **requests: Any) -> Any:
    return _core.attention(*_arguments(q, k, v, options, out=out, return_weights=options.return_weights, **requests))


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Any:
    return _compute(q, k, v, Options(causal=causal, scale=scale), None, return_lse=False)


def _forward(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, weights, _ = _compute(q, k, v, Options(*values), None, return_lse=True)
    return out, lse, q.new_empty(0) if weights is None else weights


def _forward_stats(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, ...]:
    out, lse, weights, rows = _compute(q, k, v, Options(*values), None, return_lse=True, return_stats=True)
    return out, lse, q.new_empty(0) if weights is None else weights, *rows


def _stats(q: Tensor, k: Tensor, *values: Any) -> tuple[Tensor, ...]:
    *options, top_k = StatsOptions(*values)
    return tuple(_core.attention_stats(*_arguments(q, k, k, Options(*options), (top_k,))))


def _forward_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    _, lse, weights, _ = _compute(q, k, v, Options(*values), out, return_lse=True)
    return lse, q.new_empty(0) if weights is None else weights


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
) -> tuple[Tensor, ...]:
    options = BackwardOptions(*values)
    last = (lse, dout, dlse, *(getattr(options, x) for x in (*SAVED, *ASKED)))
    gradients = _core.attention_backward(*_arguments(q, k, v, options, last, out=out))
    none = q.new_empty(0, dtype=lse.dtype)
    return tuple(none.clone() if x is None else x for x in gradients)


# --- packed sequences and caches -------------------------------------------------------------------------------------


def _varlen(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    begins, options = values[:2], as_dense(PackedOptions(*values[2:]))
    out, lse, *_ = _core.attention_varlen(*_arguments(q, k, v, options, begins, return_lse=True))
    return out, lse


def _varlen_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
) -> tuple[Tensor, ...]:
    begins, options = values[:2], PackedBackwardOptions(*values[2:])
    last = (*begins, lse, dout, dlse, *(getattr(options, x) for x in (*SAVED, *ASKED)))
    gradients = _core.attention_varlen_backward(*_arguments(q, k, v, as_dense(options), last, out=out))
    return tuple(lse.new_empty(0) if x is None else x for x in gradients)


def _kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    from foveal.torch.ops.sequences import Update

    count = len(Update._fields)
    update, options = Update(*values[:count]), as_dense(PackedOptions(*values[count:]), kv_lens=cache_lens)
    out, lse, *_ = _core.attention_kvcache(*_arguments(q, k_cache, v_cache, options, update, return_lse=True))
    return out, lse


# By the names of their ops.
KERNELS = {
    "attention_plain": _plain,
    "attention_forward": _forward,
    "attention_forward_stats": _forward_stats,
    "attention_stats": _stats,
    "attention_forward_out": _forward_out,
    "attention_backward": _backward,
    "attention_varlen_forward": _varlen,
    "attention_varlen_backward": _varlen_backward,
    "attention_kvcache": _kvcache,
}
