"""ONNX Runtime's MultiHeadAttention (its own; float32, no groups) and Attention (of ONNX); all bound beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..work import Array, Inputs, Way, Work, as_float32, thread_counts, way_name


def ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    from onnx import helper

    hidden = work.heads * work.head_dim
    flat = [tuple(x.swapaxes(1, 2).reshape(work.batch, x.shape[2], -1) for x in triple) for triple in inputs]
    multi_head = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=work.heads,
        unidirectional=int(work.causal),
    )
    standard = helper.make_node("Attention", ["q", "k", "v"], ["out"], is_causal=int(work.causal))

    def read_flat(binding: Any) -> Array:
        return np.swapaxes(_read(binding).reshape(work.batch, work.seqlen, work.heads, work.head_dim), 1, 2)

    for threads in thread_counts(work):
        if work.dtype == "float32" and work.num_kv_heads == work.heads:
            call = _call(multi_head, flat, (work.batch, work.seqlen, hidden), threads)
            yield Way(way_name("onnxruntime", "MultiHeadAttention", threads=threads), call, read=read_flat)
        call = _call(standard, inputs, inputs[0][0].shape, threads)
        yield Way(way_name("onnxruntime", "Attention", threads=threads), call, read=_read)


def _call(node: Any, inputs: Sequence[Any], out_shape: Sequence[int], threads: int) -> Callable[[], Any]:
    import onnxruntime
    from onnx import helper

    element = helper.np_dtype_to_tensor_dtype(inputs[0][0].dtype)
    shapes = {name: x.shape for name, x in zip(node.input, inputs[0], strict=True)}
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, element, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info("out", element, out_shape)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # its threads spin within a run, not after it
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def bind(arrays: Sequence[Array]) -> Any:
        binding = session.io_binding()
        for name, array in zip(node.input, arrays, strict=True):
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out", "cpu")
        return binding

    turn = itertools.cycle([bind(arrays) for arrays in inputs])

    def call() -> Any:
        binding = next(turn)
        session.run_with_iobinding(binding)
        return binding

    return call


def _read(binding: Any) -> Array:
    return as_float32(binding.copy_outputs_to_cpu()[0])
