"""The ops ``torch.ops.foveal.*`` on CUDA tensors, through the CUDA backend's C interface.

The backend judges the arguments with the code and the texts of the CPU. It is enqueued on torch's current stream of q's
device; outputs and workspace come from torch's allocator, so a call can be captured in a CUDA graph. An op that has no
kernel here says that it expects the CPU.

No GPU has run these kernels yet, so they are registered only under ``FOVEAL_CUDA=experimental``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from foveal import _cuda
from foveal._options import OPTIONS
from foveal.torch.ops.declare import Op, autocast_rule
from foveal.torch.ops.dense import _new_lse_and_weights, _new_out
from foveal.torch.ops.records import OPTION_GRADIENTS, BackwardOptions, Options, PackedBackwardOptions

# What the backend reads under the name that the ops have for it.
_TENSOR_OPTIONS = (
    *(x.name for option in OPTIONS for x in option.op_arguments if x.type == "Tensor?" and x.name in _cuda.VIEWS),
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "block_table",
)
_NUMBERS = tuple(x.name for option in OPTIONS for x in option.op_arguments if x.type in ("float", "int"))


def _view(name: str, tensor: Tensor, device: torch.device) -> _cuda.View:
    if tensor.device != device:
        raise TypeError(f"attention: {name} is on {tensor.device}, expected {device} (from q)")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _cuda.DTYPES:
        raise TypeError(f"attention: {name} has dtype {tensor.dtype}, expected one of {', '.join(_cuda.DTYPES)}")
    if tensor.ndim > _cuda.MAX_RANK:
        raise ValueError(f"attention: {name} has {tensor.ndim} dimensions, expected at most {_cuda.MAX_RANK}")
    return _cuda.view(tensor.data_ptr(), dtype, tensor.shape, tensor.stride(), device.index or 0)


def _put_views(target: Any, device: torch.device, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        setattr(target, name, _view(name, tensor, device))


def _named(values: tuple[Any, ...], **others: Any) -> dict[str, Any]:
    return {**BackwardOptions()._asdict(), **PackedBackwardOptions(*values)._asdict(), **others}


def _append(cache: Tensor, new: Tensor, places: tuple[Tensor, Tensor], name: str) -> None:
    if new.shape != (*places[0].shape, *cache.shape[2:]):
        expected = (*places[0].shape, *cache.shape[2:])
        raise ValueError(f"attention_kvcache: {name} has shape {tuple(new.shape)}, expected {expected}")
    cache.index_put_(places, new)


class _Call:
    """A problem in the backend's form; it owns the tensors that nobody else does until the launch is enqueued."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], bshd: bool) -> None:
        self.q, self.k, self.v = q, k, v
        p = self.problem = _cuda.Problem()
        _put_views(p, q.device, q=q, k=k, v=v)
        given = {name: options[name] for name in _TENSOR_OPTIONS if options.get(name) is not None}
        _put_views(p, q.device, **given)
        self.offsets = options["q_offsets"]
        if options["q_offset"] is not None:
            self.offsets = torch.full((), options["q_offset"], dtype=torch.int64, device=q.device)
        if self.offsets is not None:
            _put_views(p, q.device, q_offset=self.offsets)
        p.layout = int(bshd)
        p.causal = options["causal"]
        if options["window_left"] is not None:
            p.window_left = _cuda.window_side("left", options["window_left"])
        if options["window_right"] is not None:
            p.window_right = _cuda.window_side("right", options["window_right"])
        p.has_scale = options["scale"] is not None
        p.scale = options["scale"] or 0.0
        for name in _NUMBERS:
            setattr(p, name, options[name])

    def enqueue(self, library: _cuda.Library, stream: int, gradients: _cuda.Gradients | None = None) -> None:
        nbytes = library.workspace_nbytes(self.problem, gradients=gradients)
        workspace = torch.empty(nbytes, dtype=torch.uint8, device=self.q.device)
        place: dict[str, Any] = {"workspace": workspace.data_ptr(), "workspace_nbytes": nbytes, "stream": stream}
        if gradients is None:
            library.forward(self.problem, **place)
        else:
            library.backward(self.problem, gradients, **place)


def kernels(library: _cuda.Library, stream_of: Callable[[torch.device], int]) -> dict[str, Callable[..., Any]]:
    """Implement each op over an opened backend; `stream_of` gives a device's current stream."""

    def compute(q: Tensor, k: Tensor, v: Tensor, options: Any, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        out = _new_out(q, v) if out is None else out
        lse, weights = _new_lse_and_weights(q, k, options)
        call = _Call(q, k, v, options._asdict(), options.bshd)
        _put_views(call.problem, q.device, out=out, lse=lse)
        if options.return_weights:
            _put_views(call.problem, q.device, weights=weights)
        call.enqueue(library, stream_of(q.device))
        return out, lse, weights

    def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
        return compute(q, k, v, Options(causal=causal, scale=scale), None)[0]

    def forward(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
        return compute(q, k, v, Options(*values), None)

    def forward_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
        return compute(q, k, v, Options(*values), out)[1:]

    def differentiate(
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, call: _Call, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        q = call.q
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # what sum() gives has no strides to load along
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, call.k, call.v))
        given = _cuda.Gradients()
        _put_views(call.problem, q.device, out=out, lse=lse)
        _put_views(given, q.device, dout=dout, dq=dq, dk=dk, dv=dv)
        if dlse is not None:
            _put_views(given, q.device, dlse=dlse)
        dbias, dsinks = lse.new_empty(0), lse.new_empty(0)
        if options["bias_grad"] and options["bias"] is not None:
            dbias = lse.new_empty(options["bias"].shape)
            _put_views(given, q.device, dbias=dbias)
        if options["sinks_grad"] and options["sinks"] is not None:
            dsinks = lse.new_empty(options["sinks"].shape)
            _put_views(given, q.device, dsinks=dsinks)
        call.enqueue(library, stream_of(q.device), given)
        lacking = (lse.new_empty(0) for _ in [*OPTION_GRADIENTS][2:])  # whose options the backend refuses
        return dq, dk, dv, dbias, dsinks, *lacking

    def backward(
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *values: Any,
    ) -> tuple[Tensor, ...]:
        problem = BackwardOptions(*values)
        if problem.dentropy is not None:
            refuse_statistics()
        call = _Call(q, k, v, problem._asdict(), problem.bshd)
        return differentiate(dout, dlse, out, lse, call, problem._asdict())

    def tokens_first(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = _new_out(q, v)
        lse, _ = _new_lse_and_weights(q, k, Options(bshd=True))
        call = _Call(q, k, v, options, bshd=True)
        _put_views(call.problem, q.device, out=out, lse=lse)
        call.enqueue(library, stream_of(q.device))
        return out, lse

    def varlen_forward(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, *values: Any
    ) -> tuple[Tensor, Tensor]:
        options = _named(values, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        return tokens_first(q, k, v, options)

    def kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_lens: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        block_table: Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
        *values: Any,
    ) -> tuple[Tensor, Tensor]:
        lacks = {"k_scale": k_scale, "v_scale": v_scale, "rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
        for name, tensor in lacks.items():
            if tensor is not None:
                raise NotImplementedError(f"attention_kvcache: {name} is given, which the CUDA backend lacks")
        if (k is None) != (v is None):
            raise ValueError(f"attention_kvcache: {'k' if k is None else 'v'} is absent, expected both or none")
        if block_table is not None and cache_batch_idx is not None:
            raise ValueError("attention_kvcache: cache_batch_idx is given with block_table, expected one of them")
        if cache_batch_idx is not None:  # one page a sequence: its row of the cache
            block_table = cache_batch_idx.unsqueeze(1)
        lens = cache_lens.expand(q.shape[0])
        if k is not None and v is not None:
            positions = lens.unsqueeze(1) + torch.arange(k.shape[1], device=q.device)
            rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1).expand_as(positions)
            if block_table is not None:
                page_size = k_cache.shape[1]
                rows = block_table.long().gather(1, positions // page_size)
                positions = positions % page_size
            _append(k_cache, k, (rows, positions), "k")
            _append(v_cache, v, (rows, positions), "v")
            lens = lens + k.shape[1]
        options = _named(values, kv_lens=lens.contiguous(), block_table=block_table)
        return tokens_first(q, k_cache, v_cache, options)

    def varlen_backward(
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
    ) -> tuple[Tensor, ...]:
        options = _named(values, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv)
        return differentiate(dout, dlse, out, lse, _Call(q, k, v, options, bshd=True), options)

    def refuse_statistics(*_: Any) -> NoReturn:
        raise NotImplementedError("attention: statistics are asked for, which the CUDA backend lacks; expected cpu")

    return {
        "attention_forward_stats": refuse_statistics,
        "attention_stats": refuse_statistics,
        "attention_plain": plain,
        "attention_forward": forward,
        "attention_forward_out": forward_out,
        "attention_backward": backward,
        "attention_varlen_forward": varlen_forward,
        "attention_varlen_backward": varlen_backward,
        "attention_kvcache": kvcache,
    }


def _current_stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def register(library: torch.library.Library | None, *ops: Op) -> bool:
    """Give these ops their CUDA kernels where the backend was built and asked for; tell whether."""
    backend = _cuda.library() if _cuda.experimental() else None
    if backend is None or library is None:
        return False
    implementations = kernels(backend, _current_stream)
    for op in ops:
        library.impl(op.name, implementations[op.name], "CUDA")
        if op.cast_from is not None:
            overload = getattr(torch.ops.foveal, op.name).default
            rule = autocast_rule(overload, op.cast_from, op.num_cast, "cuda")
            library.impl(overload, rule, "AutocastCUDA", with_keyset=True)
    return True
