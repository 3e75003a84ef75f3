"""The gradient of ``attention_forward``: an autograd.Function, and the autograd kernels of the ops that apply it.

A kernel stands below the transforms of torch.func and below Dynamo, so both see one op whatever its tensors are: the
same one twice, wrapped, or symbolic. ``foveal.attention`` skips the dispatcher where neither looks on: it applies the
Function itself, or calls the op past its kernel where nothing requires a gradient.

There is no second derivative: the gradients can be computed with ``create_graph=True``, but using their graph raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from foveal.torch.ops.ops import Options, _library

_plain = torch.ops.foveal.attention_plain.default
_forward_out = torch.ops.foveal.attention_forward_out.default
_forward = torch.ops.foveal.attention_forward.default
_backward = torch.ops.foveal.attention_backward.default

_functorch = torch._C._functorch

OUT_HAS_NO_GRADIENT = (
    "attention: out is given with inputs that require grad, expected out=None: a result with a gradient is a new tensor"
)

_BIAS = 3 + Options._fields.index("bias")
_SINKS = 3 + Options._fields.index("sinks")
_TENSORS = Options._fields.index("causal")  # the options before it


def below_autograd(op: Any, inputs: Any) -> Any:
    """Call an op where autograd has been taken care of."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def apply(function: type[torch.autograd.Function], inputs: Any) -> Any:
    """Apply a Function inside an autograd kernel, or where there is no transform.

    torch.func's level has been chosen before a kernel is reached, so this is autograd of that level alone;
    ``Function.apply`` would look for the level again. It also binds the arguments to the signature of ``forward``,
    which takes half of its time.
    """
    directly: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    if not torch._C._are_functorch_transforms_active():
        return directly(*inputs)
    with enable_single_level_autograd_function():
        return directly(*inputs)


class Attention(torch.autograd.Function):
    """(out, lse, weights) of ``attention_forward``; ``weights`` has no gradient, so it must not be asked for."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return below_autograd(_forward, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, *values = inputs
        options = Options(*values)
        out, lse, weights = output
        ctx.mark_non_differentiable(weights)
        ctx.save_for_backward(q, k, v, out, lse, *options[:_TENSORS])
        ctx.scalars = options[_TENSORS:-1]

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor, _: Tensor) -> Any:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        bias_grad, sinks_grad = ctx.needs_input_grad[_BIAS], ctx.needs_input_grad[_SINKS]
        inputs = (dout, dlse, out, lse, q, k, v, *tensors, *ctx.scalars, bias_grad, sinks_grad)
        dq, dk, dv, dbias, dsinks = _backward(*inputs)
        gradients: list[Tensor | None] = [dq, dk, dv] + [None] * len(Options._fields)
        if bias_grad:
            gradients[_BIAS] = dbias.to(tensors[_BIAS - 3].dtype)
        if sinks_grad:
            gradients[_SINKS] = dsinks.to(tensors[_SINKS - 3].dtype)
        return tuple(gradients)


class _NoSecondDerivative(torch.autograd.Function):
    """The results of ``attention_backward``, whose own gradient raises."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return below_autograd(_backward, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("attention: there is no second derivative, expected a single backward pass")


# --- the ops' own autograd kernels -----------------------------------------------------------------------------------


def is_differentiated(*values: Any) -> bool:
    """Whether autograd follows a tensor among the values, under whatever torch.func has wrapped it in."""
    grad, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for x in values:
        if not isinstance(x, Tensor):
            continue
        while _functorch.is_functorch_wrapped_tensor(x):
            if _functorch.is_gradtrackingtensor(x):
                return True
            x = _functorch.get_unwrapped(x)
        if (grad and x.requires_grad) or (forward and forward_ad.unpack_dual(x).tangent is not None):
            return True
    return False


def differentiable_attention(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> Any:
    """Call ``attention_forward`` on inputs that require a gradient."""
    options = Options(*values)
    if options.alibi_slopes is not None and options.alibi_slopes.requires_grad:
        raise NotImplementedError(
            "attention: alibi_slopes requires grad, expected no gradient: there is none for the slopes; detach them"
        )
    if options.return_weights:
        raise NotImplementedError(
            "attention: return_weights is asked of inputs that require grad, expected no gradient: there is none "
            "through the weights; detach the inputs or call under torch.no_grad()"
        )
    if torch.is_autocast_enabled(q.device.type):  # here, so that what is saved has the dtype of the output
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return apply(Attention, (q, k, v, *options))


def _forward_kernel(keyset: torch._C.DispatchKeySet, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> Any:
    if not is_differentiated(q, k, v, *values):
        return _forward.redispatch(keyset & torch._C._after_autograd_keyset, q, k, v, *values)
    return differentiable_attention(q, k, v, *values)


def _backward_kernel(keyset: torch._C.DispatchKeySet, *values: Any) -> Any:
    if not is_differentiated(*values):
        return _backward.redispatch(keyset & torch._C._after_autograd_keyset, *values)
    return apply(_NoSecondDerivative, values)


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


_library.impl(_plain, _plain_kernel, "Autograd", with_keyset=True)
_library.impl(_forward, _forward_kernel, "Autograd", with_keyset=True)
_library.impl(_forward_out, _forward_out_kernel, "Autograd", with_keyset=True)
_library.impl(_forward_out, _forward_out_version_kernel, "ADInplaceOrView", with_keyset=True)
_library.impl(_backward, _backward_kernel, "Autograd", with_keyset=True)
