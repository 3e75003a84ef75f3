"""foveal.attention_varlen: packed sequences have the bits of each sequence alone, whatever lies around them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16, DTYPES, assert_within, formula, random_array
from hypothesis import given, settings
from hypothesis import strategies as st

import foveal

LENS_Q = [5, 0, 17, 1, 40]
LENS_KV = [9, 3, 17, 2100, 33]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "q_offset": 0},
    "offsets": {"causal": True, "q_offset": [3, -2, 0, 700, 5]},
    "window": {"window": (4, 2), "scale": 0.5},
    "softcap": {"softcap": 2.0, "window": (None, 3)},
    "alibi": {"alibi_slopes": np.linspace(0.1, 1, 4), "causal": True},
    "alibi of each sequence": {"alibi_slopes": np.linspace(0.1, 1, 20).reshape(5, 4)},
    "sinks": {"sinks": np.linspace(-2, 2, 4)},
}


def begins(lens: list[int], first: int = 0) -> list[int]:
    return list(accumulate(lens, initial=first))


def packed(
    lens_q: list[int] = LENS_Q, lens_kv: list[int] = LENS_KV, dtype: Any = np.float32, more: int = 0
) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    total_q, total_kv = sum(lens_q) + more, sum(lens_kv) + more
    shapes = [(total_q, 4, 24), (total_kv, 2, 24), (total_kv, 2, 16)]
    q, k, v = (random_array(rng, shape, np.dtype(dtype)) for shape in shapes)
    return q, k, v


def of_sequence(options: dict[str, Any], b: int, len_q: int, len_kv: int) -> dict[str, Any]:
    """The options of sequence b alone."""
    own = dict(options)
    for name in ("q_offset", "alibi_slopes"):
        if np.ndim(own.get(name, 0)) == (1 if name == "q_offset" else 2):
            own[name] = own[name][b]
            own[name] = int(own[name]) if name == "q_offset" else own[name]
    for name in ("mask", "bias"):
        if name in own:
            array = own[name][b if own[name].shape[0] > 1 else 0]
            own[name] = array[..., : len_q if array.shape[-2] > 1 else 1, : len_kv if array.shape[-1] > 1 else 1]
    return own


def assert_bits_of_each_alone(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, begins_q: list[int], begins_kv: list[int], **options: Any
) -> foveal.Attention:
    result = foveal.attention_varlen(q, k, v, begins_q, begins_kv, **options, return_lse=True)
    out, lse = np.asarray(result.out), np.asarray(result.lse)
    assert out.shape == (q.shape[0], q.shape[1], v.shape[2])
    assert out.dtype == q.dtype
    assert lse.shape == (q.shape[1], q.shape[0])
    owned = np.zeros(q.shape[0], bool)
    for b in range(len(begins_q) - 1):
        rows, keys = slice(*begins_q[b : b + 2]), slice(*begins_kv[b : b + 2])
        owned[rows] = True
        own = of_sequence(options, b, rows.stop - rows.start, keys.stop - keys.start)
        alone: Any = foveal.attention(q[rows], k[keys], v[keys], **own, layout="bshd", return_lse=True)
        assert out[rows].tobytes() == alone.out.tobytes(), f"sequence {b}"
        assert lse[:, rows].tobytes() == alone.lse.tobytes(), f"lse of sequence {b}"
    assert not out[~owned].astype(bool).any()
    assert (lse[:, ~owned] == -np.inf).all()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_bits_of_each_sequence_alone(isa: str, name: str, dtype: Any) -> None:
    q, k, v = packed(dtype=dtype)
    assert_bits_of_each_alone(q, k, v, begins(LENS_Q), begins(LENS_KV), **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_formula(isa: str, dtype: Any) -> None:
    q, k, v = packed(dtype=dtype)
    begins_q, begins_kv = begins(LENS_Q), begins(LENS_KV)
    out = foveal.attention_varlen(q, k, v, begins_q, begins_kv, causal=True, softcap=3.0)
    for b in range(len(LENS_Q)):
        rows, keys = slice(*begins_q[b : b + 2]), slice(*begins_kv[b : b + 2])
        expected = formula(q[rows], k[keys], v[keys], causal=True, softcap=3.0, layout="bshd")
        assert_within(out[rows], expected.out, expected.out_error, f"sequence {b}")


@settings(max_examples=60)
@given(data=st.data())
def test_any_lengths_and_options(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    count = draw(st.integers(0, 5), label="sequences")
    lens_q, lens_kv = (draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)) for _ in "qk")
    first, more = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    q, k, v = packed(lens_q, lens_kv, draw(st.sampled_from(DTYPES)), first + more)
    longest = max(lens_q, default=0), max(lens_kv, default=0)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.tuples(*[st.none() | st.integers(0, 20)] * 2))
    shape = (draw(st.sampled_from([1, count])), draw(st.sampled_from([1, 4])), *longest)
    if draw(st.booleans()):
        options["mask"] = rng.random(shape) > 0.3
    if draw(st.booleans()):
        options["bias"] = rng.standard_normal(shape)
    assert_bits_of_each_alone(q, k, v, begins(lens_q, first), begins(lens_kv, first), **options)


def test_tokens_of_no_sequence_are_not_read(isa: str) -> None:
    q, k, v = packed(more=4)
    begins_q, begins_kv = begins(LENS_Q, 3), begins(LENS_KV, 2)
    expected = assert_bits_of_each_alone(q, k, v, begins_q, begins_kv, causal=True)
    for array, boundary in ((q, begins_q), (k, begins_kv), (v, begins_kv)):
        array[: boundary[0]] = np.nan
        array[boundary[-1] :] = np.nan
    again = assert_bits_of_each_alone(q, k, v, begins_q, begins_kv, causal=True)
    assert again.out.tobytes() == expected.out.tobytes()


def test_strides(isa: str) -> None:
    q, k, v = packed()
    expected = foveal.attention_varlen(q, k, v, begins(LENS_Q), begins(LENS_KV))
    wide = [np.zeros((x.shape[0] * 2, x.shape[2], x.shape[1] + 1), x.dtype) for x in (q, k, v)]
    views = [x[::-2, ::-1, 1:].swapaxes(1, 2) for x in wide]
    for view, array in zip(views, (q, k, v), strict=True):
        view[...] = array
    assert foveal.attention_varlen(*views, begins(LENS_Q), begins(LENS_KV)).tobytes() == expected.tobytes()
    heads_first = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (q, k, v)]
    assert foveal.attention_varlen(*heads_first, begins(LENS_Q), begins(LENS_KV)).tobytes() == expected.tobytes()


def test_dropout_is_that_of_a_padded_batch(isa: str) -> None:
    lens = [5, 0, 17]
    q, k, v = packed(lens, lens)
    options: dict[str, Any] = {"causal": True, "dropout_p": 0.4, "seed": 7}
    out = foveal.attention_varlen(q, k, v, begins(lens), begins(lens), **options)
    padded = [np.zeros((3, 17, *x.shape[1:]), x.dtype) for x in (q, k, v)]
    for b, n in enumerate(lens):
        for array, x in zip(padded, (q, k, v), strict=True):
            array[b, :n] = x[begins(lens)[b] :][:n]
    expected = foveal.attention(*padded, **options, q_lens=lens, kv_lens=lens, layout="bshd")
    assert out.tobytes() == np.concatenate([expected[b, :n] for b, n in enumerate(lens)]).tobytes()
    assert out.tobytes() != foveal.attention_varlen(q, k, v, begins(lens), begins(lens), causal=True).tobytes()


def test_any_number_of_threads(isa: str) -> None:
    q, k, v = packed()
    results = set()
    before = foveal.get_num_threads()
    try:
        for count in (1, 2, 3):
            foveal.set_num_threads(count)
            results.add(foveal.attention_varlen(q, k, v, begins(LENS_Q), begins(LENS_KV), causal=True).tobytes())
    finally:
        foveal.set_num_threads(before)
    assert len(results) == 1


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: np.array(x, np.int32), lambda x: np.array(x, "u1")])
def test_kinds_of_boundaries(kind: Any) -> None:
    lens = [3, 0, 9]
    q, k, v = packed(lens, lens)
    expected = foveal.attention_varlen(q, k, v, begins(lens), begins(lens))
    assert foveal.attention_varlen(q, k, v, kind(begins(lens)), kind(begins(lens))).tobytes() == expected.tobytes()


def test_no_sequences() -> None:
    q, k, v = packed(more=2)
    result = foveal.attention_varlen(q, k, v, [0], [0], return_lse=True)
    assert not result.out.any()
    assert (result.lse == -np.inf).all()
    assert foveal.attention_varlen(q[:0], k[:0], v[:0], [0, 0], [0, 0]).shape == (0, 4, 16)


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "falling": (
        {"cu_seqlens_q": [0, 5, 4, 22, 23, 63]},
        ValueError,
        r"attention_varlen: cu_seqlens_q\[2\] is 4, expected at least 5 \(cu_seqlens_q\[1\]\)",
    ),
    "negative": (
        {"cu_seqlens_kv": [-1, 9, 12, 29, 2129, 2162]},
        ValueError,
        r"attention_varlen: cu_seqlens_kv\[0\] is -1, expected at least 0",
    ),
    "beyond the tokens": (
        {"cu_seqlens_kv": [0, 9, 12, 29, 2129, 2163]},
        ValueError,
        r"attention_varlen: cu_seqlens_kv\[5\] is 2163, expected at most 2162 \(k.shape\[0\]\)",
    ),
    "other number": (
        {"cu_seqlens_kv": [0, 9]},
        ValueError,
        r"attention_varlen: cu_seqlens_kv has shape \(2,\), expected \(6,\) \(from cu_seqlens_q\)",
    ),
    "empty": (
        {"cu_seqlens_q": []},
        ValueError,
        r"attention_varlen: cu_seqlens_q has shape \(0,\), expected \(B \+ 1,\)",
    ),
    "missing": ({"cu_seqlens_q": None}, TypeError, "attention_varlen: cu_seqlens_q is None, expected"),
    "floating": ({"cu_seqlens_q": np.zeros(6)}, TypeError, "attention_varlen: cu_seqlens_q has dtype float64"),
    "4-D": (
        {"q": np.zeros((1, 63, 4, 24), np.float32)},
        ValueError,
        "attention_varlen: q has 4 dimensions, expected 3",
    ),
    "dtype": (
        {"v": np.zeros((2162, 2, 16))},
        TypeError,
        r"attention_varlen: v has dtype float64, expected float32 \(from q\)",
    ),
    "heads": (
        {"k": np.zeros((2162, 3, 24), np.float32), "v": np.zeros((2162, 3, 16), np.float32)},
        ValueError,
        r"attention_varlen: k.shape\[1\] is 3, expected a divisor of num_heads 4 \(from q\)",
    ),
    "bias of the tokens": (
        {"bias": np.zeros((63, 2162))},
        ValueError,
        r"attention_varlen: bias.shape\[0\] is 63, expected an array that broadcasts to .* \(5, 4, 40, 2100\)",
    ),
    "offsets": ({"q_offset": [0, 1]}, ValueError, "attention_varlen: q_offset has shape"),
    "window": ({"window": (-1, 0)}, ValueError, r"attention_varlen: window\[0\] is -1, expected None or at least 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refusals(name: str) -> None:
    changed, error, text = ERRORS[name]
    q, k, v = packed()
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": begins(LENS_Q), "cu_seqlens_kv": begins(LENS_KV), **changed}
    with pytest.raises(error, match="^" + text):
        foveal.attention_varlen(**arguments)
    torch = pytest.importorskip("torch")
    tensors = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in arguments.items()}
    with pytest.raises(error, match="^" + text.replace("dtype float64", "dtype (torch.)?float64")):
        foveal.attention_varlen(**tensors)


# ---- tensors --------------------------------------------------------------------------------------------------------


def tensors(dtype: Any = None, **options: Any) -> tuple[Any, ...]:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in packed(**options))
    q, k, v = (x.to(dtype or torch.float32) for x in (q, k, v))
    return q, k, v, torch.tensor(begins(LENS_Q), dtype=torch.int32), torch.tensor(begins(LENS_KV))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors_have_the_bits_of_arrays(name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    options = OPTIONS[name]
    made = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    q, k, v, begins_q, begins_kv = tensors(getattr(torch, dtype))
    arrays = [x.view(torch.int16).numpy().view(BFLOAT16) if dtype == "bfloat16" else x.numpy() for x in (q, k, v)]
    out, lse, *_ = foveal.attention_varlen(q, k, v, begins_q, begins_kv, **made, return_lse=True)
    expected = foveal.attention_varlen(*arrays, begins(LENS_Q), begins(LENS_KV), **options, return_lse=True)
    assert (
        torch.equal(out, torch.from_numpy(expected.out.view(np.int16)).view(torch.bfloat16))
        if (dtype == "bfloat16")
        else torch.equal(out, torch.from_numpy(expected.out))
    )
    assert torch.equal(lse, torch.from_numpy(expected.lse))


def test_op_is_whole_under_opcheck_compile_and_autocast() -> None:
    torch = pytest.importorskip("torch")
    import foveal.torch  # registers the ops

    inputs = tensors()
    op = torch.ops.foveal.attention_varlen_forward.default
    expected = foveal.attention_varlen(*inputs, causal=True, window=(30, None))
    torch.library.opcheck(op, inputs)
    torch.library.opcheck(op, inputs, {"causal": True, "window_left": 3, "sinks": torch.randn(4)})

    def call(*x: Any) -> Any:
        return foveal.attention_varlen(*x, causal=True, window=(30, None))

    for dynamic in (False, True):
        torch.compiler.reset()
        assert torch.equal(torch.compile(call, fullgraph=True, dynamic=dynamic)(*inputs), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(*inputs), call(*tensors(torch.bfloat16)))
    exported = torch.export.export(module_of(call), inputs).module()
    assert torch.equal(exported(*inputs), expected)


def module_of(call: Any) -> Any:
    torch = pytest.importorskip("torch")

    class Calling(torch.nn.Module):  # type: ignore[name-defined,misc]
        def forward(self, *x: Any) -> Any:
            return call(*x)

    return Calling()


def test_jagged_tensors() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, begins_q, begins_kv = tensors()
    expected = foveal.attention_varlen(q, k, v, begins_q, begins_kv, causal=True)
    nested = [
        torch.nested.nested_tensor_from_jagged(x, offsets.long())
        for x, offsets in ((q, begins_q), (k, begins_kv), (v, begins_kv))
    ]
    out = foveal.attention_varlen(*nested, causal=True)
    assert out.is_nested
    assert torch.equal(out.values(), expected)
    assert torch.equal(out.offsets(), nested[0].offsets())
    out, lse, *_ = foveal.attention_varlen(*(x.transpose(1, 2) for x in nested), causal=True, return_lse=True)
    assert out.shape[1] == 4
    assert torch.equal(out.transpose(1, 2).values(), expected)
    assert lse.shape == (4, q.shape[0])

    with pytest.raises(ValueError, match="attention_varlen: cu_seqlens_q is given, expected None"):
        foveal.attention_varlen(*nested, begins_q, begins_kv)
    with pytest.raises(TypeError, match="attention_varlen: k is no jagged nested tensor, expected one as q is"):
        foveal.attention_varlen(nested[0], k, v)
    other = torch.nested.nested_tensor_from_jagged(v, begins_kv.flip(0).neg() + begins_kv[-1])
    with pytest.raises(ValueError, match="attention_varlen: v has other lengths than k"):
        foveal.attention_varlen(nested[0], nested[1], other)
    padded = torch.nested.as_nested_tensor([torch.zeros(3, 4, 24), torch.zeros(2, 4, 24)])
    with pytest.raises(TypeError, match="attention_varlen: q is no jagged nested tensor"):
        foveal.attention_varlen(padded, padded, padded)


GRADIENT_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal window": {"causal": True, "window": (6, None)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": np.linspace(0.1, 1, 4)},
    "sinks": {"sinks": np.linspace(-2, 2, 4), "causal": True},
    "bias": {"bias": np.random.default_rng(1).standard_normal((5, 4, 20, 33))},
    "shared bias": {"bias": np.random.default_rng(1).standard_normal((1, 4, 1, 33))},
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", GRADIENT_OPTIONS)
def test_gradients_are_those_of_each_sequence_alone(isa: str, name: str, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    lens_q, lens_kv = [5, 0, 17, 1, 20], [9, 3, 17, 0, 33]
    begins_q, begins_kv = begins(lens_q, 1), begins(lens_kv, 2)
    inputs = [torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in packed(lens_q, lens_kv, more=4)]
    options = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in GRADIENT_OPTIONS[name].items()}
    learned = [options[n].requires_grad_() for n in ("bias", "sinks") if n in options]
    out, lse, *_ = foveal.attention_varlen(*inputs, begins_q, begins_kv, **options, return_lse=True)
    generator = torch.Generator().manual_seed(0)
    to_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    to_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    found = torch.autograd.grad([out, lse], [*inputs, *learned], [to_out, to_lse])

    expected = [torch.zeros_like(x) for x in inputs]
    of_learned = [torch.zeros_like(x, dtype=torch.float64) for x in learned]
    for b in range(len(lens_q)):
        rows, keys = slice(*begins_q[b : b + 2]), slice(*begins_kv[b : b + 2])
        own = [inputs[0][rows].detach(), inputs[1][keys].detach(), inputs[2][keys].detach()]
        own = [x.requires_grad_() for x in own]
        some = of_sequence(options, b, lens_q[b], lens_kv[b])
        alone: Any = foveal.attention(*own, **some, layout="bshd", return_lse=True)
        gradients = torch.autograd.grad([alone.out, alone.lse], [*own, *learned], [to_out[rows], to_lse[:, rows]])
        for total, place, gradient in zip(expected, (rows, keys, keys), gradients, strict=False):
            total[place] = gradient
        for total, gradient in zip(of_learned, gradients[3:], strict=True):
            total += gradient
    for gradient, alone in zip(found, expected, strict=False):
        assert torch.equal(gradient, alone)
    for gradient, total in zip(found[3:], of_learned, strict=True):
        torch.testing.assert_close(gradient.double(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    torch = pytest.importorskip("torch")
    lens = [3, 0, 5]
    inputs = [torch.from_numpy(x).double().requires_grad_() for x in packed(lens, lens)]
    sinks = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)

    def call(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        return foveal.attention_varlen(
            q, k, v, begins(lens), begins(lens), causal=True, sinks=sinks, dropout_p=dropout_p, seed=5, return_lse=True
        )[:2]

    assert torch.autograd.gradcheck(call, (*inputs, sinks))
    out, _ = call(*inputs, sinks)
    (gradient,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_varlen: there is no second derivative"):
        gradient.sum().backward()


def test_gradients_through_ops_compile_autocast_and_jagged_tensors() -> None:
    torch = pytest.importorskip("torch")
    *inputs, begins_q, begins_kv = tensors()
    inputs = [x.requires_grad_() for x in inputs]

    def call(q: Any, k: Any, v: Any) -> Any:
        return foveal.attention_varlen(q, k, v, begins_q, begins_kv, causal=True)

    expected = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    by_op = torch.ops.foveal.attention_varlen_forward(*inputs, begins_q, begins_kv, causal=True)[0]
    compiled = torch.compile(call, fullgraph=True)(*inputs)
    for out in (by_op, compiled):
        found = torch.autograd.grad(out.square().sum(), inputs)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    nested = [
        torch.nested.nested_tensor_from_jagged(x, offsets.long())
        for x, offsets in zip(inputs, (begins_q, begins_kv, begins_kv), strict=True)
    ]
    out = foveal.attention_varlen(*nested, causal=True).values()
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*inputs)
    assert out.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().sum(), inputs))
    torch.library.opcheck(torch.ops.foveal.attention_varlen_forward.default, (*inputs, begins_q, begins_kv))


def test_what_has_no_rule_is_refused() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, *boundaries = tensors()
    wants = q.clone().requires_grad_()
    with torch.no_grad():
        assert not foveal.attention_varlen(wants, k, v, *boundaries).requires_grad
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="attention_varlen: alibi_slopes requires grad, expected no gradient"):
        foveal.attention_varlen(q, k, v, *boundaries, alibi_slopes=slopes)
    with pytest.raises(NotImplementedError, match="attention_varlen: there is no rule for vmap"):
        torch.func.vmap(lambda x: foveal.attention_varlen(x, k, v, *boundaries))(torch.stack([q, q]))


def test_kernels_in_python_do_the_same() -> None:
    torch = pytest.importorskip("torch")
    from foveal.torch.ops import fallback as _fallback

    inputs = tensors()
    options = (
        None,
        None,
        None,
        torch.randn(4),
        None,
        None,
        None,
        None,
        torch.tensor(7),
        0.0,
        True,
        None,
        30,
        None,
        None,
        0.0,
        0.3,
        0,
    )
    out, lse = torch.ops.foveal.attention_varlen_forward(*inputs, *options)
    again, lse_again = _fallback._varlen(*inputs, *options)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.ops.foveal.attention_varlen_backward(dout, dlse, out, lse, *inputs, *options, False, True)
    again = _fallback._varlen_backward(dout, dlse, out, lse, *inputs, *options, False, True)
    assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))
    assert gradients[4].shape == (4,)
