"""The gradient of ``attention_varlen_forward``, as ``_autograd`` has that of ``attention_forward``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal.torch.ops.autograd import apply, below_autograd, is_differentiated
from foveal.torch.ops.ops import _library
from foveal.torch.ops.serving_ops import Scores

_forward = torch.ops.foveal.attention_varlen_forward.default
_backward = torch.ops.foveal.attention_varlen_backward.default

_TENSORS = Scores._fields.index("causal")  # so many come first
_BIAS = Scores._fields.index("bias")
_SINKS = Scores._fields.index("sinks")


class AttentionVarlen(torch.autograd.Function):
    """(out, lse) of ``attention_varlen_forward``."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return below_autograd(_forward, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        arrays, scores = inputs[:5], inputs[5:]
        ctx.save_for_backward(*output, *arrays, *scores[:_TENSORS])
        ctx.scalars = scores[_TENSORS:]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> Any:
        out, lse, *inputs = ctx.saved_tensors
        scores = inputs[5:]
        bias_grad, sinks_grad = (ctx.needs_input_grad[5 + place] for place in (_BIAS, _SINKS))
        dq, dk, dv, dbias, dsinks = _backward(dout, dlse, out, lse, *inputs, *ctx.scalars, bias_grad, sinks_grad)
        of_scores: list[Tensor | None] = [None] * len(Scores._fields)
        if bias_grad:
            of_scores[_BIAS] = dbias.to(scores[_BIAS].dtype)
        if sinks_grad:
            of_scores[_SINKS] = dsinks.to(scores[_SINKS].dtype)
        return dq, dk, dv, None, None, *of_scores


class _NoSecondDerivative(torch.autograd.Function):
    """The results of ``attention_varlen_backward``, whose own gradient raises."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return below_autograd(_backward, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("attention_varlen: there is no second derivative, expected a single backward pass")


def differentiable_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, *values: Any
) -> Any:
    """Call ``attention_varlen_forward`` on inputs that require a gradient."""
    scores = Scores(*values)
    if scores.alibi_slopes is not None and scores.alibi_slopes.requires_grad:
        raise NotImplementedError(
            "attention_varlen: alibi_slopes requires grad, expected no gradient: there is none for the slopes; detach "
            "them"
        )
    if torch.is_autocast_enabled(q.device.type):  # here, so that what is saved has the dtype of the output
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return apply(AttentionVarlen, (q, k, v, cu_seqlens_q, cu_seqlens_kv, *scores))


def _forward_kernel(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
    if not is_differentiated(*values):
        return _forward.redispatch(keyset & torch._C._after_autograd_keyset, *values)
    return differentiable_varlen(*values)


def _backward_kernel(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
    if not is_differentiated(*values):
        return _backward.redispatch(keyset & torch._C._after_autograd_keyset, *values)
    return apply(_NoSecondDerivative, values)


_library.impl(_forward, _forward_kernel, "Autograd", with_keyset=True)
_library.impl(_backward, _backward_kernel, "Autograd", with_keyset=True)
