"""The ops ``torch.ops.foveal.*``: their schemas and every rule but the CPU kernels.

The kernels are in C++ (cpp/bindings/torch_ops.cc); ``_fallback`` stands in where torch lacks the C shim that they need.

==========================  ==========================================================================================
``attention_plain``         softmax(scale * q k^T) v, causal or not, and nothing else: fewer arguments and one result
                            make a call 1.6 microseconds cheaper
``attention_forward``       every option, and the log-sum-exp that a backward pass needs
``attention_forward_out``   the same into a given tensor
``attention_backward``      the gradients of the inputs of ``attention_forward`` and ``attention_forward_stats``
``attention_forward_stats`` ``attention_forward`` with statistics of the rows
``attention_stats``         statistics of the rows and keys alone, of q and k
==========================  ==========================================================================================

Arguments mean what they mean in :func:`foveal.attention`. ``q_offset`` is an integer and ``q_offsets`` a tensor, used
when there is no ``q_offset``. ``seed`` is an int64 tensor of shape (), so that a compiled graph can draw it; dropout
needs one. ``bshd`` is ``layout="bshd"``. ``weights`` is an empty tensor unless ``return_weights``. Every result is
contiguous. A refused argument raises RuntimeError here, as it does in any op of torch; ``foveal.attention`` gives it
the class that NumPy callers get.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foveal.torch.ops.declare import Op, declare
from foveal.torch.ops.records import (
    GRADIENTS_SCHEMA,
    OPTION_GRADIENTS,
    SAVED_SCHEMA,
    BackwardOptions,
    Options,
    StatsOptions,
)

_ARRAYS = "Tensor q, Tensor k, Tensor v"
_INPUTS = f"{_ARRAYS}, {Options.schema}"
_ROWS = "Tensor entropy, Tensor mass, Tensor max_weight, Tensor threshold, Tensor argmax"

# --- shapes ----------------------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> None:
    """Refuse what no shape of a result could be made of; the rest is for the kernel, which sees memory too."""
    for x in (k, v, *others):
        if isinstance(x, Tensor) and x.device != q.device:
            raise TypeError(f"attention: a tensor is on {x.device}, expected {q.device} (from q)")
    if not 2 <= q.ndim <= 4:
        raise ValueError(f"attention: q has {q.ndim} dimensions, expected 2, 3 or 4")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} has dtype {x.dtype}, expected {q.dtype} (from q)")
        if x.ndim != q.ndim:
            raise ValueError(f"attention: {name} has {x.ndim} dimensions, expected {q.ndim} (from q)")
    torch._check_value(
        k.shape[-1] == q.shape[-1],
        lambda: f"attention: k.shape[{k.ndim - 1}] is {k.shape[-1]}, expected head_dim {q.shape[-1]} (from q)",
    )


def _place(axis: int, rank: int, bshd: bool) -> int:
    """Where a tensor of this rank holds an axis of (B,H,S,D); negative where it lacks it."""
    return ((0, 2, 1, 3) if bshd and rank > 2 else (0, 1, 2, 3))[axis] - (4 - rank)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, bshd: bool, *masks: Tensor | None) -> None:
    """Refuse shapes that do not belong together, in the kernel's words, before a graph is made of them."""

    def extent(x: Tensor, axis: int) -> int:
        place = _place(axis, x.ndim, bshd)
        return 1 if place < 0 else x.shape[place]

    def require(name: str, x: Tensor, axis: int, what: str, source: str, y: Tensor) -> None:
        found, expected = extent(x, axis), extent(y, axis)
        torch._check_value(
            found == expected,
            lambda: (
                f"attention: {name}.shape[{_place(axis, x.ndim, bshd)}] is {found}, expected {what} {expected} "
                f"(from {source})"
            ),
        )

    require("k", k, 0, "batch", "q", q)
    require("v", v, 0, "batch", "q", q)
    require("v", v, 1, "num_kv_heads", "k", k)
    require("v", v, 2, "seqlen_kv", "k", k)
    heads, kv_heads = extent(q, 1), extent(k, 1)
    known = isinstance(heads, int) and isinstance(kv_heads, int)
    if known and (heads % kv_heads if kv_heads else heads):
        raise ValueError(
            f"attention: k.shape[{_place(1, k.ndim, bshd)}] is {kv_heads}, expected a divisor of num_heads {heads} "
            "(from q)"
        )
    scores = (extent(q, 0), heads, extent(q, 2), extent(k, 2))
    for name, x in zip(("mask", "bias"), masks, strict=False):
        if x is None:
            continue
        pairs = zip(x.shape[::-1], scores[::-1], strict=False)  # of the extents that are numbers, not symbols
        wrong = any(isinstance(n, int) and isinstance(m, int) and n not in (1, m) for n, m in pairs)
        if x.ndim > 4 or wrong:
            raise ValueError(
                f"attention: {name} has shape {tuple(x.shape)}, expected an array that broadcasts to "
                f"(B, Hq, Sq, Skv) = {scores}"
            )


def _new_out(q: Tensor, v: Tensor) -> Tensor:
    """Make a contiguous output; the same formula serves every rank and layout."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _new_lse_and_weights(q: Tensor, k: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Make the results that are (B, Hq, Sq, ...) in every layout, without the axes that q lacks."""
    rows, num_keys = tuple(q.shape[:-1]), k.shape[-2]
    if options.bshd and q.ndim > 2:
        rows, num_keys = (*q.shape[:-3], q.shape[-2], q.shape[-3]), k.shape[-3]
    lse = q.new_empty(rows, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return lse, q.new_empty((*rows, num_keys) if options.return_weights else (0,))


def _plain_fake(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    _check(q, k, v)
    _check_shapes(q, k, v, False)
    return _new_out(q, v)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *values: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*values, **named)
    _check(q, k, v, *options)
    _check_shapes(q, k, v, options.bshd, options.mask, options.bias)
    return _new_out(q, v), *_new_lse_and_weights(q, k, options)


def _new_rows(lse: Tensor) -> list[Tensor]:
    """Make the statistics of the rows."""
    return [*(lse.new_empty(lse.shape) for _ in range(4)), lse.new_empty(lse.shape, dtype=torch.int64)]


def _forward_stats_fake(q: Tensor, k: Tensor, v: Tensor, *values: Any, **named: Any) -> tuple[Tensor, ...]:
    out, lse, weights = _forward_fake(q, k, v, *values, **named)
    return out, lse, weights, *_new_rows(lse)


def _stats_fake(q: Tensor, k: Tensor, *values: Any, **named: Any) -> tuple[Tensor, ...]:
    options = StatsOptions(*values, **named)
    _check(q, k, k, *options)
    _check_shapes(q, k, k, options.bshd, options.mask, options.bias)
    lse, _ = _new_lse_and_weights(q, k, Options(bshd=options.bshd))
    num_keys = k.shape[-3] if options.bshd and q.ndim > 2 else k.shape[-2]
    top = (*lse.shape, options.top_k)
    return (
        *_new_rows(lse),
        lse.new_empty((*lse.shape[:-1], num_keys)),
        lse.new_empty(top, dtype=torch.int64),
        (lse.new_empty(top)),
    )


def _forward_out_fake(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, *values: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    options = Options(*values, **named)
    _check(q, k, v, out, *options)
    _check_shapes(q, k, v, options.bshd, options.mask, options.bias)
    return _new_lse_and_weights(q, k, options)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
    **named: Any,
) -> tuple[Tensor, ...]:
    problem = BackwardOptions(*values, **named)
    _check(q, k, v, dout, dlse, out, lse, *problem)
    _check_shapes(q, k, v, problem.bshd, problem.mask, problem.bias)
    return *(x.new_empty(x.shape) for x in (q, k, v)), *_option_gradients(lse, problem)


def _option_gradients(lse: Tensor, options: Any) -> list[Tensor]:
    """Make the gradients of options that are asked for, and empty ones of the others."""

    def of(x: Tensor | None, asked: bool) -> Tensor:
        return lse.new_empty(x.shape if asked and x is not None else (0,))

    return [of(getattr(options, name, None), getattr(options, asked)) for name, asked in OPTION_GRADIENTS.items()]


# --- vmap ------------------------------------------------------------------------------------------------------------


class _Fold:
    """Folds a mapped axis of extent n into the batch axis of one op call, and out of its results."""

    def __init__(self, n: int, q: Tensor, q_dim: int | None, bshd: bool):
        self.n = n
        self.rank = q.ndim - (q_dim is not None)  # of one example
        self.batch = 1 if self.rank < 4 else q.shape[0] if q_dim is None else q.movedim(q_dim, 0).shape[1]
        self.head_axis = 2 if bshd else 1

    def array(self, x: Tensor, dim: int | None) -> Tensor:
        """Fold q, k or v."""
        x = x.expand(self.n, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1) if self.rank == 4 else x if self.rank == 3 else x.unsqueeze(self.head_axis)

    def option(self, x: Tensor | None, dim: int | None, rank: int) -> Tensor | None:
        """Fold an argument that has the batch axis first, unless it broadcasts over that axis; ``rank`` counts it."""
        if x is None:
            return None
        x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        while x.ndim < rank + 1:
            x = x.unsqueeze(1)
        if dim is None and x.shape[1] == 1 and rank == 4:
            return x.squeeze(0)
        return x.expand(self.n, self.batch, *x.shape[2:]).flatten(0, 1)

    def unfold(self, x: Tensor, head_axis: int) -> Tensor:
        """Split the batch axis of a result."""
        if self.rank == 4:
            return x.reshape(self.n, self.batch, *x.shape[1:])
        return x if self.rank == 3 else x.squeeze(head_axis)


_Dims = tuple[int | None, ...]


def _plain_vmap(info: Any, dims: _Dims, q: Tensor, k: Tensor, v: Tensor, *scalars: Any) -> Any:
    fold = _Fold(info.batch_size, q, dims[0], bshd=False)
    arrays = [fold.array(x, dim) for x, dim in zip((q, k, v), dims, strict=False)]
    return fold.unfold(torch.ops.foveal.attention_plain(*arrays, *scalars), 1), 0


def _forward_vmap(info: Any, dims: _Dims, *values: Any) -> Any:
    return _mapped(torch.ops.foveal.attention_forward, info, dims, *values)


def _forward_stats_vmap(info: Any, dims: _Dims, *values: Any) -> Any:
    return _mapped(torch.ops.foveal.attention_forward_stats, info, dims, *values)


def _mapped(op: Any, info: Any, dims: _Dims, q: Tensor, k: Tensor, v: Tensor, *values: Any) -> Any:
    options = Options(*values)
    dim_of = dict(zip(Options._fields, dims[3:], strict=False))
    # A head has one sink and one temperature for the whole batch, and dropout depends on the place in it; so each
    # example is a call.
    one_a_head = any(dim_of.get(name) is not None for name in ("sinks", "gate_temperature", "u"))
    if one_a_head or options.dropout_p:
        return _by_examples(op, info, dims, q, k, v, *values)

    fold = _Fold(info.batch_size, q, dims[0], options.bshd)
    arrays = [fold.array(x, dim) for x, dim in zip((q, k, v), dims, strict=False)]
    ranks = {
        "mask": 4,
        "bias": 4,
        "alibi_slopes": 2,
        "gate_tau": 3,
        "span": 2,
        "q_lens": 1,
        "kv_lens": 1,
        "q_offsets": 1,
    }
    folded: dict[str, Any] = {
        name: fold.option(getattr(options, name), dim_of.get(name), rank) for name, rank in ranks.items()
    }
    out, lse, weights, *rows = op(*arrays, *options._replace(**folded))
    weights_dim = 0 if options.return_weights else None
    weights = fold.unfold(weights, 1) if options.return_weights else weights
    mapped = (fold.unfold(out, fold.head_axis), fold.unfold(lse, 1), weights, *(fold.unfold(x, 1) for x in rows))
    return mapped, (0, 0, weights_dim, *(0 for _ in rows))


def _by_examples(op: Any, info: Any, dims: _Dims, *values: Any) -> Any:
    results = [op(*chosen) for chosen in _examples(info.batch_size, dims, values)]
    stacked = tuple(torch.stack(result) for result in zip(*results, strict=True))
    return stacked, tuple(0 for _ in stacked)


def _stats_vmap(info: Any, dims: _Dims, *values: Any) -> Any:
    return _by_examples(torch.ops.foveal.attention_stats, info, dims, *values)


def _examples(count: int, dims: _Dims, values: tuple[Any, ...]) -> Iterator[list[Any]]:
    for n in range(count):
        yield [x if dim is None else x.select(dim, n) for x, dim in zip(values, dims, strict=True)]


def _backward_vmap(info: Any, dims: _Dims, *values: Any) -> Any:
    return _by_examples(torch.ops.foveal.attention_backward, info, dims, *values)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


def _pairs(q: Sequence[int], k: Sequence[int], bshd: bool) -> int:
    num_keys = k[-3] if bshd and len(k) > 2 else k[-2]
    rows = 1
    for extent in q[:-1]:
        rows *= extent
    return rows * num_keys


def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], bshd: bool) -> int:
    """Count the two matrix products in full, as torch counts its own attention, causal or not."""
    return 2 * _pairs(q, k, bshd) * (q[-1] + v[-1])


def _plain_flops(q: Any, k: Any, v: Any, *values: Any, out_shape: Any = None, **named: Any) -> int:
    return _flops(q, k, v, bshd=False)


def _forward_flops(q: Any, k: Any, v: Any, *values: Any, out_shape: Any = None, **named: Any) -> int:
    return _flops(q, k, v, Options(*values, **named).bshd)


def _stats_flops(q: Any, k: Any, *values: Any, out_shape: Any = None, **named: Any) -> int:
    """The scores, twice."""
    return 2 * 2 * _pairs(q, k, StatsOptions(*values, **named).bshd) * int(q[-1])


def _forward_out_flops(out: Any, q: Any, k: Any, v: Any, *values: Any, out_shape: Any = None, **named: Any) -> int:
    return _flops(q, k, v, Options(*values, **named).bshd)


def _backward_flops(
    dout: Any,
    dlse: Any,
    out: Any,
    lse: Any,
    q: Any,
    k: Any,
    v: Any,
    *values: Any,
    out_shape: Any = None,
    **named: Any,
) -> int:
    """Five products: scores, dP, dV, dK, dQ."""
    products: int = 3 * q[-1] + 2 * v[-1]
    return 2 * _pairs(q, k, BackwardOptions(*values, **named).bshd) * products


# --- the ops ---------------------------------------------------------------------------------------------------------

declare(
    Op(
        "attention_plain",
        f"({_ARRAYS}, bool causal=False, float? scale=None) -> Tensor",
        _plain_fake,
        _plain_vmap,
        _plain_flops,
        cast_from=0,
    ),
    Op(
        "attention_forward",
        f"({_INPUTS}) -> (Tensor out, Tensor lse, Tensor weights)",
        _forward_fake,
        _forward_vmap,
        _forward_flops,
        cast_from=0,
    ),
    Op(
        "attention_forward_stats",
        f"({_INPUTS}) -> (Tensor out, Tensor lse, Tensor weights, {_ROWS})",
        _forward_stats_fake,
        _forward_stats_vmap,
        _forward_flops,
        cast_from=0,
    ),
    Op(
        "attention_stats",
        f"(Tensor q, Tensor k, {StatsOptions.schema})"
        f" -> ({_ROWS}, Tensor key_mass, Tensor top_keys, Tensor top_weights)",
        _stats_fake,
        _stats_vmap,
        _stats_flops,
        cast_from=0,
        num_cast=2,
    ),
    Op(
        "attention_forward_out",
        f"(Tensor(a!) out, {_INPUTS}) -> (Tensor lse, Tensor weights)",
        _forward_out_fake,
        None,  # it writes to an argument
        _forward_out_flops,
        cast_from=1,
    ),
    Op(
        "attention_backward",
        f"({SAVED_SCHEMA}, {_ARRAYS}, {BackwardOptions.schema}) -> ({GRADIENTS_SCHEMA})",
        _backward_fake,
        _backward_vmap,
        _backward_flops,
    ),
)
