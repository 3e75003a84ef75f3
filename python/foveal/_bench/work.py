"""One attention problem as foveal and its peers are asked to solve it, and how many operations and bytes that takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import foveal

from .measure import Contender, fastest

Array = NDArray[Any]
Inputs = tuple[Array, Array, Array]  # q, k, v in layout bhsd

# Rounding once to the dtype costs half a unit in the last place; the rest is room for another order of summation.
TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Work:
    """B, Hq, Sq, D and the rest; square and of equal heads unless said otherwise, causal aligned bottom-right."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    window: int | None = None  # keys to the left
    seqlen_kv: int | None = None
    kv_heads: int | None = None

    def __str__(self) -> str:
        text = f"({self.batch},{self.heads},{self.seqlen},{self.head_dim})"
        if self.kv_heads:
            text += f" kv heads {self.kv_heads}"
        if self.seqlen_kv:
            text += f" keys {self.seqlen_kv}"
        text += {"float32": " f32", "float16": " f16", "bfloat16": " bf16"}[self.dtype]
        return text + " causal" * self.causal + (f" window {self.window}" if self.window else "")

    @property
    def num_keys(self) -> int:
        return self.seqlen_kv or self.seqlen

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def flops(self) -> float:
        """2D for the score and 2D for the value of each visible (query, key); masked pairs are not counted."""
        last = np.arange(self.num_keys - self.seqlen, self.num_keys) if self.causal else np.full(1, self.num_keys - 1)
        first = np.maximum(last - self.window, 0) if self.window is not None else 0
        visible = float((last - first + 1).sum()) * (1 if self.causal else self.seqlen)
        return 4.0 * self.head_dim * self.batch * self.heads * visible

    @property
    def kv_nbytes(self) -> int:
        itemsize = 4 if self.dtype == "float32" else 2
        return 2 * self.batch * self.num_kv_heads * self.num_keys * self.head_dim * itemsize

    def inputs(self, seed: int = 0) -> Inputs:
        rng = np.random.default_rng(seed)
        kv_shape = (self.batch, self.num_kv_heads, self.num_keys, self.head_dim)
        shapes = ((self.batch, self.heads, self.seqlen, self.head_dim), kv_shape, kv_shape)
        q, k, v = (rng.standard_normal(shape, np.float32).astype(numpy_dtype(self.dtype)) for shape in shapes)
        return q, k, v


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of that name; bfloat16 needs ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return dtype
    return np.dtype(name)


def as_torch(array: Array) -> Any:
    """The same memory as a torch tensor."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def cycled(function: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """function(*inputs) of the next inputs in turn: more of them than the cache holds leaves it cold."""
    if len(inputs) == 1:
        q, k, v = inputs[0]
        return lambda: function(q, k, v)
    turn = itertools.cycle(inputs)
    return lambda: function(*next(turn))


def foveal_numpy(work: Work, inputs: Sequence[Inputs]) -> Contender:
    options: dict[str, Any] = {"causal": True} if work.causal else {}
    if work.window is not None:
        options["window"] = (work.window, None)
    return Contender("foveal", cycled(lambda q, k, v: foveal.attention(q, k, v, **options), inputs))


def foveal_torch(work: Work, inputs: Sequence[Inputs]) -> Contender:
    """foveal.attention on tensors."""
    import torch

    options: dict[str, Any] = {"causal": True} if work.causal else {}
    tensors = [tuple(map(as_torch, triple)) for triple in inputs]
    call = cycled(lambda q, k, v: foveal.attention(q, k, v, **options), tensors)
    return Contender("foveal", call, torch.inference_mode)


def torch_sdpa(work: Work, inputs: Sequence[Inputs]) -> Contender:
    """PyTorch's scaled_dot_product_attention, by the way that is fastest for this work."""
    return fastest(_torch_ways(work, inputs))


def _torch_ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Contender]:
    import contextlib

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    sdpa = torch.nn.functional.scaled_dot_product_attention
    tensors = [tuple(map(as_torch, triple)) for triple in inputs]
    group = work.heads // work.num_kv_heads

    @contextlib.contextmanager
    def within(backend: SDPBackend | None) -> Iterator[None]:
        with torch.inference_mode(), sdpa_kernel(backend) if backend else contextlib.nullcontext():
            yield

    for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        label = f"torch[{backend.name if backend else 'default'}"
        context = lambda backend=backend: within(backend)  # noqa: E731
        if group == 1:
            call = cycled(lambda q, k, v: sdpa(q, k, v, is_causal=work.causal), tensors)
            yield Contender(f"{label}]", call, context)
            continue
        call = cycled(lambda q, k, v: sdpa(q, k, v, is_causal=work.causal, enable_gqa=True), tensors)
        yield Contender(f"{label}, enable_gqa]", call, context)
        expanded = [(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)) for q, k, v in tensors]
        call = cycled(lambda q, k, v: sdpa(q, k, v, is_causal=work.causal), expanded)
        yield Contender(f"{label}, keys and values expanded beforehand]", call, context)
        if work.seqlen == 1:  # the queries of a group as rows of one head: what a careful user would write
            folded = [(q.unflatten(1, (-1, group)).squeeze(3), k, v) for q, k, v in tensors]
            yield Contender(f"{label}, group folded into the queries]", cycled(sdpa, folded), context)


def onnxruntime_attention(work: Work, inputs: Sequence[Inputs]) -> Contender:
    """ONNX Runtime's CPU MultiHeadAttention: float32, as many key as query heads, q (B,S,H*D)."""
    import onnx
    import onnxruntime

    names = ["q", "k", "v"]
    hidden = work.heads * work.head_dim
    tensor = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(
        "MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=work.heads, unidirectional=work.causal
    )
    lengths = (work.seqlen, work.num_keys, work.num_keys)
    graph = onnx.helper.make_graph(
        [node],
        "attention",
        [onnx.helper.make_tensor_value_info(n, tensor, (work.batch, s, hidden)) for n, s in zip(names, lengths)],  # noqa: B905
        [onnx.helper.make_tensor_value_info("out", tensor, (work.batch, work.seqlen, hidden))],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # its threads spin within a run, not after it
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def bind(triple: Inputs) -> Any:
        binding = session.io_binding()
        for name, array in zip(names, triple, strict=True):
            flat = np.ascontiguousarray(array.swapaxes(1, 2)).reshape(work.batch, -1, hidden)
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(flat))
        binding.bind_output("out", "cpu")
        return binding

    turn = itertools.cycle([bind(triple) for triple in inputs])

    def call() -> Any:
        binding = next(turn)
        session.run_with_iobinding(binding)
        return binding

    return Contender("onnxruntime", call)


def numpy_textbook(work: Work, inputs: Sequence[Inputs]) -> Contender:
    """softmax(q k^T) v as one would write it down, a new array for every step; not causal."""

    def textbook(q: Array, k: Array, v: Array) -> Array:
        scores = q @ k.swapaxes(-1, -2) * q.dtype.type(q.shape[-1] ** -0.5)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True) @ v)

    return Contender("numpy textbook", cycled(textbook, inputs))


def numpy_in_place(work: Work, inputs: Sequence[Inputs]) -> Contender:
    """softmax(q k^T) v in plain NumPy, with care."""
    hidden = None
    if work.causal:
        hidden = ~np.tri(work.seqlen, work.num_keys, work.num_keys - work.seqlen, dtype=bool)
    return Contender("numpy", cycled(lambda q, k, v: naive_attention(q, k, v, hidden), inputs))


def naive_attention(q: Array, k: Array, v: Array, hidden: Array | None = None) -> Array:
    """As few passes over the (Sq,Skv) scores as NumPy allows; in the inputs' dtype."""
    scores = (q * q.dtype.type(q.shape[-1] ** -0.5)) @ k.swapaxes(-1, -2)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    out = scores @ v
    out /= scores.sum(axis=-1, keepdims=True)
    return np.asarray(out)
