"""What :func:`foveal.attention` does with tensors: one call of an op, and the right exception when that fails.

The kernel judges the arguments, so a good call passes no second check on its way, and Dynamo can trace it. Only when
something has been refused is it asked in what words NumPy callers would hear of it.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from foveal import _core
from foveal._options import DEFAULTS, NAMES, REQUESTS, core_arguments
from foveal.torch.ops.gradients import OUT_HAS_NO_GRADIENT, differentiable_attention, differentiable_stats
from foveal.torch.ops.records import StatsOptions

_plain = torch.ops.foveal.attention_plain.default
_forward = torch.ops.foveal.attention_forward.default
_forward_stats = torch.ops.foveal.attention_forward_stats.default
_stats = torch.ops.foveal.attention_stats.default
_forward_out = torch.ops.foveal.attention_forward_out.default

# What a call of the op forwards to, 0.2 microseconds sooner; Dynamo knows only the op itself.
_plain_eager = getattr(_plain, "_op", _plain)

_is_grad_enabled = torch.is_grad_enabled
_is_functorch_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_functorch_is_active = torch._C._are_functorch_transforms_active
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

_UNLIMITED = (None, None)


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    gate: Any,
    span: Any,
    u: Any,
    q_lens: Any,
    kv_lens: Any,
    causal: Any,
    q_offset: Any,
    window: Any,
    scale: Any,
    softcap: Any,
    dropout_p: Any,
    seed: Any,
    normalizer: Any,
    layout: Any,
    out: Any,
    return_lse: Any,
    return_weights: Any,
    return_stats: Any,
    /,
) -> Any:
    """Take and return what ``_core.attention`` does, for tensors."""
    try:
        # Who traces or transforms the call is to see the op, whose own kernels know of gradients.
        seen = _is_dynamo_compiling() or _functorch_is_active() or _forward_ad._current_level >= 0
        gradient = not seen and _is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if (
            not gradient
            and mask is None
            and bias is None
            and q_offset is None
            and alibi_slopes is None
            and sinks is None
            and gate is None
            and span is None
            and u is None
            and q_lens is None
            and kv_lens is None
            and out is None
            and softcap == 0.0
            and dropout_p == 0.0
            and normalizer == "softmax"
            and window == _UNLIMITED
            and layout == "bhsd"
            and not (return_lse or return_weights or return_stats)
            and (causal is False or causal is True)
        ):
            if seen:
                return _plain(q, k, v, causal, scale)
            with _BelowAutograd():  # the op's autograd kernel is in Python
                return _plain_eager(q, k, v, causal, scale)

        gate_tau, gate_temperature = _gate(gate, q)
        z, ramp = _span(span, q)
        if not gradient and not seen and _is_grad_enabled():
            parameters = (bias, alibi_slopes, sinks, gate_tau, gate_temperature, z, u)
            gradient = any(isinstance(x, Tensor) and x.requires_grad for x in parameters)
        window_left, window_right = window
        offset, offsets = _offset(q_offset, q.device)
        inputs = (
            q,
            k,
            v,
            mask,
            bias,
            alibi_slopes,
            sinks,
            gate_tau,
            gate_temperature,
            z,
            u,
            _integers(q_lens, q.device),
            _integers(kv_lens, q.device),
            offsets,
            _seed(seed, dropout_p, q.device),
            ramp,
            _flag(causal),
            offset,
            _side(window_left),
            _side(window_right),
            scale,
            softcap,
            dropout_p,
            _normalizer(normalizer),
            _is_bshd(layout),
            bool(return_weights),
        )
        rows: Any = None
        if gradient and out is not None:
            raise NotImplementedError(OUT_HAS_NO_GRADIENT)
        if return_stats:
            if gradient:
                result, lse, weights, *rows = differentiable_stats(*inputs)
            elif seen:
                result, lse, weights, *rows = _forward_stats(*inputs)
            else:
                with _BelowAutograd():
                    result, lse, weights, *rows = _forward_stats(*inputs)
            if out is not None:
                _forward_out(out, *inputs)
                result = out
        elif gradient:
            result, lse, weights = differentiable_attention(*inputs)
        elif out is None and seen:
            result, lse, weights = _forward(*inputs)
        elif out is None:
            with _BelowAutograd():
                result, lse, weights = _forward(*inputs)
        else:
            lse, weights = _forward_out(out, *inputs)
            result = out
    except Exception as error:
        given: tuple[Any, ...] = (mask, bias, alibi_slopes, sinks, gate, span, u, q_lens, kv_lens)
        given += (
            causal,
            q_offset,
            window,
            scale,
            softcap,
            dropout_p,
            0 if isinstance(seed, Tensor) else seed,
            normalizer,
            layout,
            out,
            return_lse,
            return_weights,
            return_stats,
        )
        arguments = {"q": q, "k": k, "v": v, **dict(zip((*NAMES, *REQUESTS), given, strict=True))}
        raise _explained(error, arguments) from None
    if not (return_lse or return_weights or return_stats):
        return result
    return result, lse if return_lse else None, weights if return_weights else None, rows


def _attention_stats(q: Any, k: Any, top_k: Any, options: dict[str, Any]) -> Any:
    """Take and return what ``_core.attention_stats`` does, for tensors; ``options`` are by name."""
    try:
        if isinstance(top_k, bool):
            raise TypeError
        gate_tau, gate_temperature = _gate(options["gate"], q)
        z, ramp = _span(options["span"], q)
        offset, offsets = _offset(options["q_offset"], q.device)
        window_left, window_right = options["window"]
        made = {
            "gate_tau": gate_tau,
            "gate_temperature": gate_temperature,
            "span": z,
            "span_ramp": ramp,
            "q_lens": _integers(options["q_lens"], q.device),
            "kv_lens": _integers(options["kv_lens"], q.device),
            "q_offsets": offsets,
            "q_offset": offset,
            "causal": _flag(options["causal"]),
            "window_left": _side(window_left),
            "window_right": _side(window_right),
            "normalizer": _normalizer(options["normalizer"]),
            "bshd": _is_bshd(options["layout"]),
            "top_k": top_k if isinstance(top_k, _INTEGER) else operator.index(top_k),
        }
        kept = {name: x for name, x in options.items() if name in StatsOptions._fields}
        return _stats(q, k, *StatsOptions(**{**kept, **made}))
    except Exception as error:
        arguments = {"q": q, "k": k, "v": k, **core_arguments(options), "top_k": top_k}
        raise _explained(error, arguments, "attention_stats", _core.attention_stats) from None


# The options as an op takes them. What they cannot be made of raises anything; `_explained` finds the words.


_BOOL = (bool, np.bool_, torch.SymBool)
_INTEGER = (int, torch.SymInt)


def _offset(q_offset: Any, device: torch.device) -> tuple[int | None, Tensor | None]:
    if isinstance(q_offset, bool):
        raise TypeError
    if isinstance(q_offset, _INTEGER):
        return q_offset, None  # type: ignore[return-value]
    if isinstance(q_offset, np.integer):
        return int(q_offset), None
    return None, _integers(q_offset, device)


def _number(value: Any, q: Tensor) -> Tensor:
    """Make a tensor of a number; a tensor stays as it is."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (str, bytes, np.ndarray)):
        raise TypeError
    return torch.full((), float(value), dtype=torch.float64, device=q.device)


def _gate(gate: Any, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if gate is None:
        return None, None
    tau, temperature = _pair(gate)
    return _number(tau, q), _number(temperature, q)


def _span(span: Any, q: Tensor) -> tuple[Tensor | None, float]:
    if span is None:
        return None, 0.0
    z, ramp = _pair(span)
    if isinstance(ramp, Tensor) and ramp.requires_grad:
        raise NotImplementedError("attention: span[1] requires grad, expected a number: the ramp has no gradient")
    return _number(z, q), float(ramp)


def _pair(value: Any) -> Any:
    if not isinstance(value, (tuple, list)):
        raise TypeError
    return value


def _normalizer(name: Any) -> int:
    return _core.NORMALIZERS.index(name)


_INTEGERS = (torch.int64, torch.int32)
_NARROW_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64)


def _integers(values: Any, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    if isinstance(values, (list, tuple)):
        if any(isinstance(x, (bool, np.bool_)) for x in values):
            raise TypeError
        values = torch.tensor(values, dtype=None if values else torch.int64, device=device)
        if values.ndim != 1:
            raise TypeError
    elif not isinstance(values, Tensor):
        if not hasattr(values, "__dlpack__"):
            raise TypeError
        values = torch.as_tensor(values, device=device).clone()  # theirs may change before the backward pass
    if values.dtype not in _INTEGERS + _NARROW_INTEGERS:
        raise TypeError
    integers: Tensor = values if values.dtype in _INTEGERS else values.to(torch.int64)
    return integers


def _seed(seed: Any, dropout_p: Any, device: torch.device) -> Tensor | None:
    """Make the seed of dropout, from torch's generator where none is given."""
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, (bool, np.bool_)) or seed < 0:
        raise TypeError
    return torch.full((), operator.index(seed), dtype=torch.int64, device=device)


def _side(width: Any) -> int | torch.SymInt | None:
    """Make a side of the window; a negative one is for the kernel to refuse."""
    if width is None:
        return None
    if isinstance(width, _BOOL):
        raise TypeError
    if isinstance(width, torch.SymInt):
        return width
    if not isinstance(width, int):
        width = operator.index(width)
    return None if width >= 2**62 else width


def _flag(value: Any) -> bool:
    """Make a bool; of a symbolic one the program that is traced is for one value, under a guard where it can differ."""
    if not isinstance(value, _BOOL):
        raise TypeError
    return bool(value)


def _is_bshd(layout: Any) -> bool:
    if layout not in ("bhsd", "bshd"):
        raise ValueError
    return bool(layout == "bshd")


_DEFAULTS = {**dict.fromkeys("qkv"), **DEFAULTS, **REQUESTS}
_SCALAR = (bool, int, float, str, np.generic)

# What a CUDA kernel refuses, it refuses in the words of NumPy's callers.
_WORDED = (NotImplementedError, TypeError, ValueError, MemoryError)


def _explained(
    error: Exception,
    arguments: dict[str, Any],
    function: str = "attention",
    check: Any = _core.check_attention,
) -> BaseException:
    """Find the exception that NumPy callers would get for what made the call raise ``error``."""
    if isinstance(error, NotImplementedError) and str(error).startswith(f"{function}: "):
        return error
    if isinstance(error, _WORDED) and str(error).startswith("attention") and getattr(arguments["q"], "is_cuda", False):
        return error
    if isinstance(error, NotImplementedError) and "jvp" in str(error):  # Dynamo allows our Function none to say it in
        return NotImplementedError("attention: there is no forward-mode derivative, expected reverse mode")
    failure: BaseException | None = _core.take_torch_failure(str(error))
    if failure is not None:
        return failure
    for name, array in arguments.items():
        if not isinstance(array, Tensor):
            continue
        if array.device.type != "cpu":
            return TypeError(f"{function}: {name} is on {array.device}, expected cpu")
        if array.is_nested or array.is_quantized or array.layout != torch.strided:
            kind = "nested" if array.is_nested else "quantized" if array.is_quantized else str(array.layout)
            kind = kind.removeprefix("torch.").removeprefix("_")
            return TypeError(f"{function}: {name} is a {kind} tensor, expected a plain dense one")
        if name == "out" and (array.is_neg() or array.is_conj()):
            return TypeError(
                "attention: out is a negated view, expected a tensor that owns its sign: out.resolve_neg()"
            )
    without_memory = any(
        isinstance(x, Tensor) and (_is_functorch_wrapped(x) or hasattr(x, "fake_mode")) for x in arguments.values()
    )
    if not without_memory:
        return _refusal(check, arguments, function) or error
    # Shapes have been judged. The arguments that are no arrays can be judged beside any arrays.
    judged = _DEFAULTS | {name: x for name, x in arguments.items() if name in _DEFAULTS and isinstance(x, _SCALAR)}
    judged |= {**dict.fromkeys("qkv", torch.zeros(1, 1, 1, 1)), "window": arguments["window"]}
    if function != "attention":  # the lengths are another's
        judged |= {"q_lens": None, "kv_lens": None}
    refusal = _refusal(_core.check_attention, judged, "attention")
    return error if refusal is None else type(refusal)(str(refusal).replace("attention", function, 1))


def _refusal(check: Any, arguments: dict[str, Any], function: str) -> BaseException | None:
    try:
        check(*(x.detach() if isinstance(x, Tensor) else x for x in arguments.values()))
    except (TypeError, ValueError) as refusal:
        if str(refusal).startswith(f"{function}: "):
            return refusal
    return None
