"""OpenVINO's ScaledDotProductAttention, and the formula in its operations.

Both are compiled for the shapes, and their inputs set beforehand. Half precision is asked for by
INFERENCE_PRECISION_HINT, with inputs of that type and with float32 ones of the same values. OpenVINO computes in
float32 where the processor has no instructions for the type.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..work import Array, Inputs, Way, Work, as_float32, numpy_dtype, thread_counts, visible, way_name, without_groups


def ways(work: Work, inputs: Sequence[Inputs]) -> Iterator[Way]:
    graphs = {"ScaledDotProductAttention": _operation, "formula": _formula}
    if work.causal:
        graphs["ScaledDotProductAttention with a mask"] = _masked_operation
    dtypes = dict.fromkeys((work.dtype, "float32"))
    for name, arranged in without_groups(work, inputs):
        for threads, (graph, build), dtype in itertools.product(thread_counts(work), graphs.items(), dtypes):
            arrays = [tuple(x.astype(numpy_dtype(dtype), copy=False) for x in triple) for triple in arranged]
            types = "" if len(dtypes) == 1 else f"{dtype} inputs"
            yield Way(
                way_name("openvino", graph, types, name, threads=threads),
                _call(work, build, arrays, threads),
                read=_read,
            )


def _operation(work: Work, q: Any, k: Any, v: Any) -> Any:
    from openvino import opset13 as ops

    return ops.scaled_dot_product_attention(q, k, v, causal=work.causal)


def _masked_operation(work: Work, q: Any, k: Any, v: Any) -> Any:
    from openvino import opset13 as ops

    return ops.scaled_dot_product_attention(q, k, v, _bias(work, q), causal=False)


def _formula(work: Work, q: Any, k: Any, v: Any) -> Any:
    from openvino import opset13 as ops

    scale = ops.constant(work.head_dim**-0.5, q.get_element_type())
    scores = ops.matmul(ops.multiply(q, scale), k, False, True)
    if work.causal:
        scores = ops.add(scores, _bias(work, q))
    return ops.matmul(ops.softmax(scores, -1), v, False, False)


def _bias(work: Work, q: Any) -> Any:
    """The causal mask (1,1,Sq,Skv) as what is added to the scores."""
    from openvino import opset13 as ops

    return ops.constant(np.where(visible(work), 0.0, -np.inf)[None, None], q.get_element_type())


def _call(work: Work, build: Callable[..., Any], inputs: Sequence[Sequence[Array]], threads: int) -> Callable[[], Any]:
    import openvino
    from openvino import opset13 as ops

    element = _element_type(inputs[0][0].dtype.name)
    parameters = [ops.parameter(x.shape, element) for x in inputs[0]]
    model = openvino.Model([build(work, *parameters)], parameters, "attention")
    hints = {
        "INFERENCE_PRECISION_HINT": _element_type(work.dtype),
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def request(arrays: Sequence[Array]) -> Any:
        made = compiled.create_infer_request()
        for number, array in enumerate(arrays):
            made.set_input_tensor(number, openvino.Tensor(_plain(array), array.shape, element))  # shares the memory
        return made

    turn = itertools.cycle([request(arrays) for arrays in inputs])

    def call() -> Any:
        current = next(turn)
        current.infer(share_outputs=True)
        return current

    return call


def _element_type(dtype: str) -> Any:
    import openvino

    return {"float32": openvino.Type.f32, "float16": openvino.Type.f16, "bfloat16": openvino.Type.bf16}[dtype]


def _plain(array: Array) -> Array:
    """The same memory in a dtype of NumPy's own."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _read(request: Any) -> Array:
    out = request.get_output_tensor(0)
    if out.element_type.get_type_name() == "bf16":
        return as_float32(out.data.view(np.uint16).view(numpy_dtype("bfloat16")))
    return as_float32(out.data)
