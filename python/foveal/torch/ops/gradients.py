"""The gradients of attention and of packed sequences, and the autograd kernels of the ops beside them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from foveal._options import ATTENTION, VARLEN
from foveal.torch.ops.autograd import Differentiable, is_differentiated
from foveal.torch.ops.declare import library
from foveal.torch.ops.records import BackwardOptions, Options, PackedBackwardOptions, PackedOptions
from foveal.torch.ops.sequences import refuse_gradient

OUT_HAS_NO_GRADIENT = (
    "attention: out is given with inputs that require grad, expected out=None: a result with a gradient is a new tensor"
)

_ops = torch.ops.foveal
_plain = _ops.attention_plain.default
_forward_out = _ops.attention_forward_out.default
_kvcache = _ops.attention_kvcache.default
_stats = _ops.attention_stats.default

differentiable_attention = Differentiable(
    ATTENTION, _ops.attention_forward.default, _ops.attention_backward.default, 3, Options, BackwardOptions
)
differentiable_stats = Differentiable(
    ATTENTION, _ops.attention_forward_stats.default, _ops.attention_backward.default, 3, Options, BackwardOptions
)
differentiable_varlen = Differentiable(
    VARLEN,
    _ops.attention_varlen_forward.default,
    _ops.attention_varlen_backward.default,
    5,
    PackedOptions,
    PackedBackwardOptions,
)


def _plain_kernel(
    keyset: torch._C.DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None
) -> Any:
    if not is_differentiated(q, k, v):
        return _plain.redispatch(keyset & torch._C._after_autograd_keyset, q, k, v, causal, scale)
    return differentiable_attention(q, k, v, *Options(causal=causal, scale=scale))[0]


def _forward_out_kernel(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
    if is_differentiated(*values):
        raise NotImplementedError(OUT_HAS_NO_GRADIENT)
    return _forward_out.redispatch(keyset & torch._C._after_autograd_keyset, *values)


def _forward_out_version_kernel(keyset: torch._C.DispatchKeySet, out: Tensor, *values: Any) -> Any:
    """Let autograd see that ``out`` was written to: what saved it for its own backward pass then raises."""
    results = _forward_out.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, out, *values)
    torch.autograd.graph.increment_version(out)
    return results


def _kvcache_kernel(keyset: torch._C.DispatchKeySet, *values: Any, **named: Any) -> Any:
    if is_differentiated(*values, *named.values()):
        refuse_gradient()
    return _kvcache.redispatch(keyset & torch._C._after_autograd_keyset, *values, **named)


def refuse_gradient_of_stats() -> NoReturn:
    """Refuse to differentiate attention_stats."""
    raise NotImplementedError(
        "attention_stats: an input requires grad, expected no gradient: entropy and breadth have one in "
        "attention(..., return_stats=True); detach the inputs or call under torch.no_grad()"
    )


def _stats_kernel(keyset: torch._C.DispatchKeySet, *values: Any, **named: Any) -> Any:
    if is_differentiated(*values, *named.values()):
        refuse_gradient_of_stats()
    return _stats.redispatch(keyset & torch._C._after_autograd_keyset, *values, **named)


differentiable_attention.register(library)
differentiable_stats.register(library, backward_too=False)
differentiable_varlen.register(library)
library.impl(_plain, _plain_kernel, "Autograd", with_keyset=True)
library.impl(_forward_out, _forward_out_kernel, "Autograd", with_keyset=True)
library.impl(_forward_out, _forward_out_version_kernel, "ADInplaceOrView", with_keyset=True)
library.impl(_stats, _stats_kernel, "Autograd", with_keyset=True)
library.impl(_kvcache, _kvcache_kernel, "Autograd", with_keyset=True)
