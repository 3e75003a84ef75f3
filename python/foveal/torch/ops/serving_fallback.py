"""CPU kernels in Python of the ops in ``_serving_ops``, where ``_fallback`` has those of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveal import _core
from foveal.torch.ops.fallback import _arguments
from foveal.torch.ops.ops import Options
from foveal.torch.ops.serving_ops import Scores, Update


def _options(values: tuple[Any, ...], kv_lens: Tensor | None = None) -> Options:
    return Options(**Scores(*values)._asdict(), kv_lens=kv_lens, bshd=True)


def _varlen(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    begins, options = values[:2], _options(values[2:])
    out, lse, _ = _core.attention_varlen(*_arguments(q, k, v, options, None, True, False, *begins))
    return out, lse


def _varlen_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any
) -> tuple[Tensor, ...]:
    end = 2 + len(Scores._fields)
    begins, options, asked = values[:2], _options(values[2:end]), (*values[end:], False, False)[:2]
    last = (True, False, *begins, lse, dout, dlse, *asked)
    gradients = _core.attention_varlen_backward(*_arguments(q, k, v, options, out, *last))
    return tuple(lse.new_empty(0) if x is None else x for x in gradients)


def _kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lens: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    count = len(Update._fields)
    update, options = Update(*values[:count]), _options(values[count:], cache_lens)
    out, lse, _ = _core.attention_kvcache(*_arguments(q, k_cache, v_cache, options, None, True, False, *update))
    return out, lse


def register(library: torch.library.Library) -> None:
    """Give the ops of ``library`` their CPU kernels."""
    library.impl("attention_varlen_forward", _varlen, "CPU")
    library.impl("attention_varlen_backward", _varlen_backward, "CPU")
    library.impl("attention_kvcache", _kvcache, "CPU")
