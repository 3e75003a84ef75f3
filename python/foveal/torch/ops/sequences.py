"""The ops of :func:`foveal.attention_varlen` and :func:`foveal.attention_kvcache`, as ``_ops`` has that of attention.

==============================  ======================================================================================
``attention_varlen_forward``    packed sequences
``attention_varlen_backward``   the gradients of its inputs from those of ``out`` and ``lse``
``attention_kvcache``           a cache of keys and values, which new tokens join in place first; no gradient
==============================  ======================================================================================

Arguments mean what they mean in those functions. There are no rules for vmap: the ops say so.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from foveal._options import KVCACHE, VARLEN
from foveal.torch.ops.declare import Op, declare, refusing_vmap
from foveal.torch.ops.dense import _check, _new_lse_and_weights, _new_out, _option_gradients
from foveal.torch.ops.records import (
    GRADIENTS_SCHEMA,
    SAVED_SCHEMA,
    Options,
    PackedBackwardOptions,
    PackedOptions,
)

_PACKED = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_kv"


class Update(NamedTuple):
    """What ``attention_kvcache`` has between ``cache_lens`` and the scores."""

    k: Tensor | None = None
    v: Tensor | None = None
    block_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False


def _results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse, _ = _new_lse_and_weights(q, k, Options(bshd=True))
    return _new_out(q, v), lse


def _varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, *values: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, cu_seqlens_q, cu_seqlens_kv, *values, *named.values())
    return _results(q, k, v)


def _varlen_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    *values: Any,
    **named: Any,
) -> tuple[Tensor, ...]:
    options = PackedBackwardOptions(*values, **named)
    _check(q, k, v, dout, dlse, out, lse, cu_seqlens_q, cu_seqlens_kv, *options)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_option_gradients(lse, options)


def _kvcache_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, *values: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    return _results(q, k_cache, v_cache)


def refuse_gradient() -> NoReturn:
    """Refuse to differentiate a call on a cache."""
    raise NotImplementedError(
        "attention_kvcache: an input requires grad, expected no gradient: a cache has none; detach the inputs or call "
        "under torch.no_grad()"
    )


declare(
    Op(
        "attention_varlen_forward",
        f"({_PACKED}, {PackedOptions.schema}) -> (Tensor out, Tensor lse)",
        _varlen_fake,
        refusing_vmap(VARLEN),
        cast_from=0,
    ),
    Op(
        "attention_varlen_backward",
        f"({SAVED_SCHEMA}, {_PACKED}, {PackedBackwardOptions.schema}) -> ({GRADIENTS_SCHEMA})",
        _varlen_backward_fake,
        refusing_vmap(VARLEN),
    ),
    Op(
        "attention_kvcache",
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cache_lens, Tensor? k=None, Tensor? v=None, "
        "Tensor? block_table=None, Tensor? cache_batch_idx=None, Tensor? k_scale=None, Tensor? v_scale=None, "
        "Tensor? rotary_cos=None, Tensor? rotary_sin=None, bool rotary_interleaved=False, "
        f"{PackedOptions.schema}) -> (Tensor out, Tensor lse)",
        _kvcache_fake,
        refusing_vmap(KVCACHE),
    ),
)
