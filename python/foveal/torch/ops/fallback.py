"""CPU kernels in Python, for a torch whose C shim lacks what the C++ kernels need. Slower to call, otherwise the same.

They hand the tensors to the function that serves every array with ``__dlpack__``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal import _core
from foveal.torch.ops.ops import Options, Problem


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, options: Options | Problem, out: Tensor | None, *last: Any
) -> list[Any]:
    arguments = (
        q,
        k,
        v,
        options.mask,
        options.bias,
        options.causal,
        options.q_offset if options.q_offsets is None else options.q_offsets,
        (options.window_left, options.window_right),
        options.scale,
        options.softcap,
        options.alibi_slopes,
        options.sinks,
        _core.NORMALIZERS[options.normalizer],
        options.q_lens,
        options.kv_lens,
        options.dropout_p,
        _seed(options),
        "bshd" if options.bshd else "bhsd",
        out,
        *last,
    )
    # Only a detached tensor lends its memory.
    return [x.detach() if isinstance(x, Tensor) else x for x in arguments]


def _seed(options: Options | Problem) -> int | None:
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


def _compute(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None, *, return_lse: bool) -> Any:
    return _core.attention(*_arguments(q, k, v, options, out, return_lse, options.return_weights))


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Any:
    return _compute(q, k, v, Options(causal=causal, scale=scale), None, return_lse=False)


def _forward(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, weights = _compute(q, k, v, Options(*values), None, return_lse=True)
    return out, lse, q.new_empty(0) if weights is None else weights


def _forward_out(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    _, lse, weights = _compute(q, k, v, Options(*values), out, return_lse=True)
    return lse, q.new_empty(0) if weights is None else weights


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any
) -> tuple[Tensor, ...]:
    problem = Problem(*values)
    last = (True, False, lse, dout, dlse, problem.bias_grad, problem.sinks_grad)
    gradients = _core.attention_backward(*_arguments(q, k, v, problem, out, *last))
    none = q.new_empty(0, dtype=lse.dtype)
    return tuple(none.clone() if x is None else x for x in gradients)


def register(library: torch.library.Library) -> None:
    """Give the ops of ``library`` their CPU kernels."""
    library.impl("attention_plain", _plain, "CPU")
    library.impl("attention_forward", _forward, "CPU")
    library.impl("attention_forward_out", _forward_out, "CPU")
    library.impl("attention_backward", _backward, "CPU")
