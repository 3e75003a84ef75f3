"""What :func:`foveal.attention_varlen` and :func:`foveal.attention_kvcache` do with tensors: one call of an op each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from foveal import _core
from foveal._options import core_arguments
from foveal.torch.ops.autograd import below_autograd
from foveal.torch.ops.call import (
    _INTEGER,
    _explained,
    _flag,
    _gate,
    _integers,
    _normalizer,
    _offset,
    _seed,
    _side,
    _span,
)
from foveal.torch.ops.gradients import differentiable_varlen
from foveal.torch.ops.records import PackedOptions
from foveal.torch.ops.sequences import refuse_gradient

_varlen_forward = torch.ops.foveal.attention_varlen_forward.default
_kvcache = torch.ops.foveal.attention_kvcache.default


def _packed(options: dict[str, Any], q: Tensor) -> Any:
    """Give the options as both ops end with them."""
    device = q.device
    window_left, window_right = options["window"]
    gate_tau, gate_temperature = _gate(options.get("gate"), q)
    z, ramp = _span(options.get("span"), q)
    offset, offsets = _offset(options["q_offset"], device)
    made = {
        "gate_tau": gate_tau,
        "gate_temperature": gate_temperature,
        "span": z,
        "span_ramp": ramp,
        "q_offsets": offsets,
        "q_offset": offset,
        "seed": _seed(options.get("seed"), options.get("dropout_p", 0.0), device),
        "causal": _flag(options["causal"]),
        "window_left": _side(window_left),
        "window_right": _side(window_right),
        "normalizer": _normalizer(options["normalizer"]),
    }
    return PackedOptions(**{name: x for name, x in options.items() if name in PackedOptions._fields} | made)


def _run(op: torch._ops.OpOverload, differentiate: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    # Who traces or transforms the call is to see the op, whose own kernels know of gradients.
    if (
        torch.compiler.is_dynamo_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return op(*inputs)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return differentiate(*inputs)
    return below_autograd(op, inputs)  # its autograd kernel is in Python


def _no_gradient(*_: Any) -> NoReturn:
    refuse_gradient()


def _judged(options: dict[str, Any], kv_lens: Any) -> dict[str, Any]:
    """Give what the core judges of a refused call, all but q, k and v."""
    seed = options.get("seed")
    own = {**options, "kv_lens": kv_lens, "seed": 0 if isinstance(seed, Tensor) else seed}
    return core_arguments(own, layout="bshd", return_lse=True)


def _attention_varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, options: dict[str, Any]) -> Any:
    """Give (out, lse); jagged nested tensors bring their own boundaries and get a nested output."""
    if getattr(q, "is_nested", False):
        return _attention_nested(q, k, v, cu_seqlens_q, cu_seqlens_kv, options)
    try:
        begins = [_integers(begins, q.device) for begins in (cu_seqlens_q, cu_seqlens_kv)]
        inputs = (q, k, v, *begins, *_packed(options, q))
        return _run(_varlen_forward, differentiable_varlen, inputs)
    except Exception as error:
        arguments = {"q": q, "k": k, "v": v, **_judged(options, None)}
        arguments |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_kv": cu_seqlens_kv}
        raise _explained(error, arguments, "attention_varlen", _core.check_attention_varlen) from None


def _attention_nested(q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_kv: Any, options: dict[str, Any]) -> Any:
    for name, begins in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if begins is not None:
            raise ValueError(f"attention_varlen: {name} is given, expected None: nested tensors hold the boundaries")
    tokens = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
            raise TypeError(f"attention_varlen: {name} is no jagged nested tensor, expected one as q is")
        if x.ndim != 4 or x._ragged_idx not in (1, 2) or x.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(
                f"attention_varlen: {name} is no (B, tokens, H, D) or (B, H, tokens, D) without holes, expected such a "
                "jagged tensor"
            )
        # values() has the tokens in place of the batch and ragged axes.
        tokens.append(x.values() if x._ragged_idx == 1 else x.values().transpose(0, 1))  # type: ignore[attr-defined]
    if not torch.equal(k.offsets(), v.offsets()):
        raise ValueError("attention_varlen: v has other lengths than k, expected the same")
    out, lse = _attention_varlen(tokens[0], tokens[1], tokens[2], q.offsets(), k.offsets(), options)
    nested = torch.nested.nested_tensor_from_jagged(out, q.offsets())
    return (nested if q._ragged_idx == 1 else nested.transpose(1, 2)), lse


def _attention_kvcache(
    q: Any, k_cache: Any, v_cache: Any, cache_lens: Any, update: dict[str, Any], options: dict[str, Any]
) -> Any:
    """Give (out, lse); ``update`` has the arguments from k to rotary_interleaved, in the order of the op."""
    try:
        lens = cache_lens
        if isinstance(lens, _INTEGER) and not isinstance(lens, bool):
            lens = torch.full((), lens, dtype=torch.int64, device=q.device)  # type: ignore[arg-type]
        new = [
            _integers(x, q.device) if name in ("block_table", "cache_batch_idx") else x for name, x in update.items()
        ]
        new[-1] = _flag(new[-1])
        inputs = (q, k_cache, v_cache, _integers(lens, q.device), *new, *_packed(options, q))
        return _run(_kvcache, _no_gradient, inputs)
    except Exception as error:
        arguments = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **_judged(options, cache_lens), **update}
        raise _explained(error, arguments, "attention_kvcache", _core.check_attention_kvcache) from None
