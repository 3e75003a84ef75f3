"""Gradients of foveal.attention on tensors, against autograd through the plain formula in float64."""

import io
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_cases import DTYPES, FALLBACK, OPTIONS, Options, ops, qkv

import foveal


def formula(q, k, v, *, mask=None, bias=None, causal=False, q_offset=None, window=(None, None), scale=None,
            softcap=0.0, alibi_slopes=None, sinks=None, q_lens=None, kv_lens=None, layout="bhsd"):  # fmt: skip
    """(out, lse) in the dtype of q, with every option written out."""
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    (batch, heads, seqlen_q, head_dim), (_, kv_heads, seqlen_kv, _) = q.shape, k.shape
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    s = (head_dim**-0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    if softcap:
        s = softcap * torch.tanh(s / softcap)

    def column(values, default):
        return torch.as_tensor(default if values is None else values).expand(batch).reshape(batch, 1, 1, 1)

    rows, keys = column(q_lens, seqlen_q), column(kv_lens, seqlen_kv)
    i, j = torch.arange(seqlen_q).reshape(1, 1, -1, 1), torch.arange(seqlen_kv).reshape(1, 1, 1, -1)
    position = i + (keys - rows if q_offset is None else column(q_offset, None))
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape(-1, heads, 1, 1).to(s.dtype) * (position - j).abs()
    if bias is not None:
        s = s + bias.to(s.dtype)
    seen = (i < rows) & (j < keys)
    if mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & (j <= position)
    left, right = window
    if left is not None:
        seen = seen & (j >= position - left)
    if right is not None:
        seen = seen & (j <= position + right)
    s = s.masked_fill(~seen, -math.inf)
    if sinks is not None:
        extra = sinks.to(s.dtype).reshape(1, heads, 1, 1).expand(batch, heads, seqlen_q, 1)
        s = torch.cat([s, extra.masked_fill(i >= rows, -math.inf)], dim=-1)
    lse = torch.logsumexp(s, dim=-1)
    empty = torch.isneginf(lse)
    p = torch.exp(s - lse.masked_fill(empty, 0.0)[..., None])[..., :seqlen_kv]
    out = p @ v
    return (out.transpose(1, 2) if layout == "bshd" else out), lse


def gradients(call, arrays, dout, dlse=None):
    """The output and the gradients of `arrays`, which become leaves; {} where an array has none."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in arrays.items()}
    out, lse = call(**leaves)
    weighted = (out.double() * dout).sum()
    if dlse is not None:
        weighted = weighted + (lse.double().nan_to_num(neginf=0.0) * dlse).sum()
    grads = torch.autograd.grad(weighted, list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads, strict=True)}


def with_lse(**arguments):
    return foveal.attention(**arguments, return_lse=True)[:2]


def split(options):
    """What is differentiable among the options, and the rest."""
    arrays = {name: x for name, x in options.items() if name in ("bias", "sinks")}
    return arrays, {name: x for name, x in options.items() if name not in arrays}


def magnitudes(arrays, options, dout, dlse):
    """The largest sum of each gradient's terms without their signs, and how many units of rounding a weight is off."""
    exact = {name: x.double() for name, x in arrays.items()}
    q, k, v = (exact[name] for name in "qkv")
    if options.get("layout") == "bshd":
        q, k, v, dout = (x.transpose(1, 2) for x in (q, k, v, dout))
    options = {**options, "layout": "bhsd"}
    group = q.shape[1] // k.shape[1]
    given = {**options, **{name: x for name, x in exact.items() if name not in "qkv"}}
    p, lse = formula(q=q, k=k, v=torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1), **given)
    keys, values = (x.abs().repeat_interleave(group, dim=1) for x in (k, v))
    row = (dout.abs() * (p @ values)).sum(-1) + (0 if dlse is None else dlse.abs())
    m = p * (dout.abs() @ values.transpose(-1, -2) + row[..., None])
    scale = abs(options.get("scale") or q.shape[-1] ** -0.5)
    sums = {
        "q": scale * m @ keys,
        "k": scale * (m.transpose(-1, -2) @ q.abs()).unflatten(1, (-1, group)).sum(2),
        "v": (p.transpose(-1, -2) @ dout.abs()).unflatten(1, (-1, group)).sum(2),
    }
    if "bias" in exact:
        bias = exact["bias"]
        sums["bias"] = m.sum_to_size((1,) * (4 - bias.ndim) + tuple(bias.shape))
    if "sinks" in exact:
        sums["sinks"] = row.sum((0, 2))

    def largest(x):
        return x.abs().max().item() if x.numel() else 0.0

    distance = options.get("alibi_slopes", torch.zeros(1)).abs().max() * (sum(p.shape[2:]) + 200)
    score = scale * largest(q.abs() @ keys.transpose(-1, -2)) + largest(exact.get("bias", torch.zeros(1)))
    score += distance.item() + largest(lse.nan_to_num(neginf=0.0))
    return {name: largest(x) for name, x in sums.items()}, score


def check(arrays, options, *, dlse=True, seed=0):
    """Ours in the dtype of the arrays, against the formula in float64.

    Within twice the error of the formula in that dtype, and the rounding of sums in any order: a weight is off by its
    score's rounding, and dout . out by that of out, which is stored in the dtype.
    """
    g = torch.Generator().manual_seed(seed)
    q, v = arrays["q"], arrays["v"]
    dout = torch.randn(*q.shape[:-1], v.shape[-1], generator=g).to(q.dtype).double()
    shape = q.shape[:-1] if options.get("layout") != "bshd" else (q.shape[0], q.shape[2], q.shape[1])
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    dlse = torch.randn(*shape, generator=g).to(accumulator).double() if dlse else None

    def plain(**given):
        return formula(**given, **options)

    found = gradients(lambda **x: with_lse(**x, **options), arrays, dout, dlse)
    exact = gradients(plain, {name: x.double() for name, x in arrays.items()}, dout, dlse)
    naive = gradients(plain, arrays, dout, dlse)
    sums, score = magnitudes(arrays, options, dout, dlse)
    unit, stored = torch.finfo(accumulator).eps, 0.0 if q.dtype == accumulator else torch.finfo(q.dtype).eps
    for name, x in exact.items():
        assert found[name].dtype == arrays[name].dtype
        assert found[name].shape == x.shape
        off = (naive[name].double() - x).nan_to_num().abs()
        bound = 2 * off.max().item() if x.numel() else 0.0
        bound += ((16 + 2 * score) * unit + 2 * stored + torch.finfo(arrays[name].dtype).eps) * sums[name]
        bound += torch.finfo(arrays[name].dtype).smallest_normal * torch.finfo(arrays[name].dtype).eps
        torch.testing.assert_close(found[name].double(), x, rtol=0.0, atol=bound, msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, dtype, isa):
    q, k, v = qkv(dtype=dtype)
    extra, options = split(OPTIONS[name])
    check({"q": q, "k": k, "v": v, **extra}, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_layouts_and_strides(layout, dtype):
    q, k, v = qkv(head_dim=16, value_dim=16, dtype=dtype)
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"layout": layout, "causal": True}
    check({"q": q, "k": k, "v": v}, options)
    check({"q": q.flip(1), "k": k[..., :1].expand(k.shape), "v": v}, options)


@st.composite
def problems(draw):
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 4]))
    heads, seqlen_q, seqlen_kv = kv_heads * group, draw(st.integers(0, 60)), draw(st.integers(0, 140))
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from(DTYPES))
    arrays = dict(
        zip(
            "qkv",
            qkv(
                batch=batch,
                heads=heads,
                kv_heads=kv_heads,
                seqlen_q=seqlen_q,
                seqlen_kv=seqlen_kv,
                head_dim=draw(st.integers(1, 40)),
                value_dim=draw(st.integers(1, 40)),
                dtype=dtype,
                seed=seed,
            ),
            strict=True,
        )
    )
    scores = (batch, heads, seqlen_q, seqlen_kv)

    def shape():
        whole = draw(st.tuples(*[st.booleans()] * 4))
        return tuple(n if w else 1 for n, w in zip(scores, whole, strict=True))[draw(st.integers(0, 3)) :]

    options = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["mask"] = torch.rand(shape(), generator=g) < draw(st.sampled_from([0.1, 0.9]))
    if draw(st.booleans()):
        arrays["bias"] = torch.randn(shape(), generator=g, dtype=torch.float64).to(draw(st.sampled_from(DTYPES)))
    if draw(st.booleans()):
        arrays["sinks"] = torch.randn(heads, generator=g)
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(heads, generator=g)
    if draw(st.booleans()):
        options["window"] = draw(st.tuples(*[st.none() | st.integers(0, 80)] * 2))
    if draw(st.booleans()):
        options["q_offset"] = draw(st.integers(-70, 150))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([-0.3, 0.05, 1.0]))
    if draw(st.booleans()):
        options["q_lens"] = [draw(st.integers(0, seqlen_q)) for _ in range(batch)]
    if draw(st.booleans()):
        options["kv_lens"] = [draw(st.integers(0, seqlen_kv)) for _ in range(batch)]
    return arrays, options, seed


@settings(max_examples=60)
@given(problem=problems())
def test_options_together(problem, isa):
    arrays, options, seed = problem
    check(arrays, options, dlse=seed % 2 == 0, seed=seed)


@pytest.mark.parametrize("causal", [False, True])
def test_bfloat16_is_off_by_at_most_twice_what_pytorch_is(isa, causal):
    arrays = dict(zip("qkv", qkv(1, 3, 3, 500, 500, 64, 64, torch.bfloat16), strict=True))
    dout = torch.randn(1, 3, 500, 64, generator=torch.Generator().manual_seed(5)).bfloat16().double()

    def theirs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal), None

    exact = gradients(lambda **x: formula(**x, causal=causal), {name: x.double() for name, x in arrays.items()}, dout)
    ours, others = (gradients(call, arrays, dout) for call in (lambda **x: with_lse(**x, causal=causal), theirs))
    for name, x in exact.items():
        for norm in (lambda error: error.square().mean().sqrt(), lambda error: error.abs().max()):
            assert norm(ours[name].double() - x) <= 2 * norm(others[name].double() - x)


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 2, 5, 7, 6, 4, torch.float64))
    bias = torch.randn(4, 5, 1, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias, sinks):
        return with_lse(q=q, k=k, v=v, bias=bias, sinks=sinks, causal=True, window=(3, None), softcap=2.0)

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))
    for x in (q, k, v):  # one alone
        alone = [y.detach() for y in (q, k, v, bias, sinks)]
        alone["qkv".index("q" if x is q else "k" if x is k else "v")] = x
        assert torch.autograd.gradcheck(lambda *y: call(*y)[0], alone)


@pytest.mark.parametrize("rank", [2, 3])
def test_ranks(rank):
    q, k, v = (x[(0,) * (4 - rank)] for x in qkv(heads=2, kv_heads=2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(foveal.attention(*leaves, causal=True).square().sum(), leaves)
    whole = [x.clone()[(None,) * (4 - rank)].requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(foveal.attention(*whole, causal=True).square().sum(), whole)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y[(0,) * (4 - rank)])


def test_a_broadcast_gradient_of_the_output():
    q, k, v = (x.requires_grad_() for x in qkv())
    found = torch.autograd.grad(foveal.attention(q, k, v).sum(), (q, k, v))
    out = foveal.attention(q, k, v)
    for x, y in zip(found, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        assert torch.equal(x, y)


def test_an_expanded_bias_gets_the_sum():
    q, k, v = qkv(dtype=torch.float64)
    bias = torch.randn(19, 1, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(foveal.attention(q, k, v, bias=bias.expand(19, 35)).sum(), bias)
    (expected,) = torch.autograd.grad(foveal.attention(q, k, v, bias=bias).sum(), bias)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads_or_the_run(heads, dtype):
    q, k, v = (x.requires_grad_() for x in qkv(1, heads, 1, 300, 700, 32, 32, dtype))
    bias = torch.randn(1, 1, 1, 700, requires_grad=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            out = foveal.attention(q, k, v, bias=bias, causal=True)
            results.append(torch.autograd.grad(out.square().sum(), (q, k, v, bias)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_rows_masked_by_the_lowest_number_stay_finite():
    """As models mask their padding. What such a row does to its keys is lost with its lse, unless dout is 0 there."""
    q, k, v = qkv()
    bias = torch.zeros(2, 1, 19, 35).masked_fill(torch.rand(2, 1, 19, 35) < 0.3, torch.finfo(torch.float32).min)
    bias[:, :, :4] = torch.finfo(torch.float32).min
    dout = torch.randn(2, 6, 19, 16)
    dout[:, :, :4] = 0
    arrays = {"q": q, "k": k, "v": v, "bias": bias}
    found = gradients(with_lse, arrays, dout)
    hidden = {"mask": bias == 0}
    expected = gradients(
        lambda **x: formula(**x, **hidden), {n: x.double() for n, x in arrays.items() if n != "bias"}, dout
    )
    for name, x in expected.items():
        torch.testing.assert_close(found[name].double(), x, rtol=1e-4, atol=1e-5)
    assert found["bias"].isfinite().all()
    dout[:, :, :4] = 1
    assert all(x.isfinite().all() for x in gradients(with_lse, arrays, dout).values())


# --- what there is not -----------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad(foveal.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"^attention: there is no second derivative"):
        torch.autograd.grad(dq.sum(), q)


def test_inputs_without_a_gradient_are_refused():
    q, k, v = qkv()
    slopes = torch.rand(6, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"^attention: alibi_slopes requires grad, expected no gradient"):
        foveal.attention(q, k, v, alibi_slopes=slopes)
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^attention: return_weights is asked of inputs that require grad"):
        foveal.attention(q, k, v, return_weights=True)
    out = torch.empty(2, 6, 19, 16)
    with pytest.raises(NotImplementedError, match=r"^attention: out is given with inputs that require grad"):
        foveal.attention(q, k, v, out=out)
    with pytest.raises(ValueError, match=r"^attention: k.shape\[3\] is 8, expected head_dim 24"):
        foveal.attention(q, k[..., :8], v)


def test_the_op_refuses_gradients_of_another_shape():
    q, k, v = qkv()
    out, lse, _ = ops.attention_forward(q, k, v)
    with pytest.raises((RuntimeError, ValueError), match=r"attention: dout has shape \(2, 6, 19, 15\)"):
        ops.attention_backward(out[..., :-1], None, out, lse, q, k, v)


# --- torch around it -------------------------------------------------------------------------------------------------


def backward_calls():
    q, k, v = qkv(heads=2, kv_heads=1, seqlen_q=5, seqlen_kv=7, head_dim=8, value_dim=8)
    bias, sinks = torch.randn(2, 5, 1), torch.randn(2)
    calls = {}
    for name, (x, options) in {
        "plain": ((q, k, v), Options()),
        "causal bias sinks": ((q, k, v), Options(bias=bias, sinks=sinks, causal=True, window_left=3)),
        "bshd": (tuple(x.transpose(1, 2) for x in (q, k, v)), Options(bshd=True, q_offset=1, causal=True)),
        "float64": (tuple(x.double() for x in (q, k, v)), Options(scale=0.3, softcap=2.0)),
        "bfloat16": (tuple(x.bfloat16() for x in (q, k, v)), Options(kv_lens=torch.tensor([7, 2]))),
    }.items():
        out, lse, _ = ops.attention_forward(*x, *options)
        wanted = (options.bias is not None, options.sinks is not None)
        calls[name] = (torch.ones_like(out), torch.ones_like(lse), out, lse, *x, *options[:-1], *wanted)
    return calls


@pytest.mark.parametrize("name", backward_calls())
def test_opcheck_of_backward(name):
    arguments = backward_calls()[name]
    torch.library.opcheck(ops.attention_backward.default, arguments)
    torch.library.opcheck(ops.attention_backward.default, (arguments[0], None, *arguments[2:]))


@pytest.mark.parametrize("name", ["plain", "causal", "bias", "sinks", "lens tensors", "everything"])
def test_opcheck_of_forward_with_gradients(name):
    tensors = [x.requires_grad_() for x in qkv(dtype=torch.float64)]
    options = {n: x for n, x in OPTIONS[name].items() if n not in ("window", "q_offset", "q_lens", "kv_lens")}
    torch.library.opcheck(ops.attention_forward.default, tensors, options)


def test_direct_calls_of_the_op_are_differentiable():
    q, k, v = (x.requires_grad_() for x in qkv())
    found = torch.autograd.grad(ops.attention_forward(q, k, v, causal=True)[0].square().sum(), (q, k, v))
    expected = torch.autograd.grad(foveal.attention(q, k, v, causal=True).square().sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("plain", "aot_eager"), ("causal scale", "inductor"), ("bias", "aot_eager"), ("everything", "aot_eager")],
)
def test_compile(name, backend):
    extra, options = split(OPTIONS[name])
    torch._dynamo.reset()

    def loss(q, k, v, **extra):
        return foveal.attention(q, k, v, **extra, **options).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    arrays = {**dict(zip("qkv", qkv(), strict=True)), **extra}
    leaves = {n: x.detach().clone().requires_grad_() for n, x in arrays.items()}
    found = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    expected = torch.autograd.grad(loss(**leaves), list(leaves.values()))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)
        self.bias = torch.nn.Parameter(torch.randn(2, 1, 1))

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return foveal.attention(q, k, v, bias=self.bias, causal=True, layout="bshd").flatten(2)


def test_export_saved_and_loaded_trains():
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 9, 16)
    exported = torch.export.export(block, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=2, max=99)}})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    longer = torch.randn(2, 21, 16)
    torch.testing.assert_close(loaded(longer), block(longer))
    found = torch.autograd.grad(loaded(longer).square().sum(), list(loaded.parameters()))
    expected = dict(
        zip(
            [n for n, _ in block.named_parameters()],
            torch.autograd.grad(block(longer).square().sum(), list(block.parameters())),
            strict=True,
        )
    )
    for (name, _), x in zip(loaded.named_parameters(), found, strict=True):
        torch.testing.assert_close(x, expected[name])


def test_functional_gradients_and_vmap():
    q, k, v = qkv(batch=2, dtype=torch.float64)
    stack = torch.stack([q, -q, 2 * q])
    sinks = torch.randn(3, 6, dtype=torch.float64)

    def loss(q, k=k, v=v, **options):
        return foveal.attention(q, k, v, causal=True, **options).sin().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    each = torch.stack([torch.func.grad(loss)(x) for x in stack])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(stack), each)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(stack), each)
    for name, values in {"sinks": sinks, "bias": sinks[..., None, None]}.items():

        def of(x, name=name):
            return loss(q, **{name: x})

        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(of))(values), torch.stack([torch.func.grad(of)(x) for x in values])
        )
    _, pull = torch.func.vjp(lambda k: foveal.attention(q, k, v), k)
    assert pull(torch.ones(2, 6, 19, 16, dtype=torch.float64))[0].shape == k.shape


def test_autocast():
    leaves = [x.requires_grad_() for x in qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        out = foveal.attention(*leaves, causal=True)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().sum(), leaves)
    halves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(foveal.attention(*halves, causal=True).float().sum(), halves)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = (x.requires_grad_() for x in qkv(2, 6, 6, 19, 35, 24, 16))
    with FlopCounterMode(display=False) as counter:
        foveal.attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 6 * 19 * 35 * ((24 + 16) + (3 * 24 + 2 * 16))


# --- processes -------------------------------------------------------------------------------------------------------


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_memory_grows_with_the_length_not_its_square():
    code = """
        import resource, torch, foveal
        S = 16384
        q, k, v = (torch.randn(1, 1, S, 64, requires_grad=True) for _ in range(3))
        do = torch.randn(1, 1, S, 64)
        small = [x[:, :, :300].detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(foveal.attention(*small, causal=True), small, do[:, :, :300])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        torch.autograd.grad(foveal.attention(q, k, v, causal=True, window=(4096, 0)), (q, k, v), do)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    (mebibytes,) = run_python(code)
    # Output, three gradients and their sums are 4 MiB each; the array of scores would be 1024.
    assert int(mebibytes) < 64


def test_in_data_loader_workers():
    code = """
        import torch, foveal

        class Gradients(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, index):
                q = torch.full((1, 2, 65, 16), float(index)).requires_grad_()
                (foveal.attention(q, q, q) ** 2).sum().backward()
                return q.grad

        q = torch.randn(4, 8, 256, 64, requires_grad=True)
        foveal.attention(q, q, q).sum().backward()  # the parent has run a parallel region
        data = Gradients()
        for index, found in enumerate(torch.utils.data.DataLoader(data, num_workers=2, batch_size=None)):
            assert torch.equal(found, data[index])
        print("done")
    """
    assert run_python(code) == ["done"]


DISTRIBUTED = """
    import os, sys, torch, foveal
    import torch.distributed as dist
    import torch.multiprocessing as mp
    sys.path[:0] = {directories!r}

    def work(rank, port):
        from test_backward import Block
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=rank, world_size=2)
        torch.manual_seed(0)
        block = torch.nn.parallel.DistributedDataParallel(Block())
        x = torch.randn(4, 9, 16)
        block(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        if rank == 0:
            torch.manual_seed(0)
            whole = Block()
            whole(x).square().mean().backward()
            for p, q in zip(block.parameters(), whole.parameters()):
                torch.testing.assert_close(p.grad, q.grad)
            print("done", flush=True)
        dist.barrier()
        os._exit(0)  # torch's threads abort one in 25 processes that end as usual, those without foveal too

    if __name__ == "__main__":
        import socket
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        mp.spawn(work, (port,), nprocs=2)
"""


def test_data_parallel_training(tmp_path):
    script = tmp_path / "train.py"  # a file, which spawned processes can import
    script.write_text(
        textwrap.dedent(
            DISTRIBUTED.format(directories=[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))])
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


@pytest.mark.skipif(FALLBACK, reason="this is the test that turns it on")
def test_with_kernels_in_python():
    tests = "everything-torch.float32 or gradcheck or opcheck or autocast or functional"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, __file__],
        env={**os.environ, "FOVEAL_TEST_TORCH_FALLBACK": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["q_lens", "kv_lens", "q_offset"])
def test_integers_from_numpy_may_change_before_the_backward_pass(name):
    q, k, v = (torch.randn(1, 1, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(foveal.attention(q, k, v, causal=True, **{name: np.array([7])}).sum(), (q, k, v))
    integers = np.array([7])
    out = foveal.attention(q, k, v, causal=True, **{name: integers})
    integers[0] = 2
    for gradient, same in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True):
        assert torch.equal(gradient, same)
