"""Gates, spans, statistics and additive attention on tensors: gradients, and torch around them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import foveal  # noqa: E402
import foveal.torch  # noqa: E402

B, HQ, HKV, SQ, SKV, D = 2, 4, 2, 21, 90, 8
NORMALIZERS = ("softmax", "sparsemax", "entmax15", "sigmoid", "relu", "normalized_sigmoid")


def qkv(dtype: Any = torch.float64, *, requires_grad: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, HQ, SQ, D), (B, HKV, SKV, D), (B, HKV, SKV, D))
    return [
        torch.randn(x, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(requires_grad) for x in shapes
    ]


def parameters(name: str, dtype: Any = torch.float64) -> dict[str, Any]:
    """Give the gate or the span of a name, and what of it is learned."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Any:
        return torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)

    tau, temperature, z = rand(B, HQ, SQ), rand(HQ) + 0.3, rand(HQ) * 50
    return {
        "gate": {"gate": (tau.requires_grad_(), temperature.requires_grad_())},
        "gate of a head": {"gate": (rand(HQ, 1).requires_grad_(), 0.5)},
        "gate of a number": {"gate": (0.2, rand().add_(0.5).requires_grad_())},
        "span": {"span": (z.requires_grad_(), 13.0)},
        "span of a batch": {"span": ((rand(B, HQ) * 50).requires_grad_(), 7.0), "causal": True},
        "both": {"gate": (rand(HQ, SQ).requires_grad_(), 0.7), "span": (z.requires_grad_(), 20.0), "causal": True},
    }[name]


NAMES = ("gate", "gate of a head", "gate of a number", "span", "span of a batch", "both")


def learned(options: dict[str, Any]) -> list[Any]:
    pairs = [*options.get("gate", ()), *options.get("span", ())]
    return [x for x in pairs if isinstance(x, torch.Tensor)]


def formula(q, k, v, normalizer="softmax", gate=None, span=None, causal=False, sinks=None):
    """Give the output and the entropy, by autograd's own means."""
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    s = q @ k.mT / D**0.5
    position = (SKV - SQ + torch.arange(SQ))[:, None]
    if gate is not None:
        tau = torch.as_tensor(gate[0], dtype=q.dtype).expand(B, HQ, SQ)[..., None]
        temperature = torch.as_tensor(gate[1], dtype=q.dtype).expand(HQ)[:, None, None]
        s = s + torch.nn.functional.logsigmoid((s - tau) / temperature)
    if span is not None:
        z = span[0].expand(B, HQ)[..., None, None]
        s = s + torch.log(((span[1] + z - (position - torch.arange(SKV)).abs()) / span[1]).clamp(0, 1))
    seen = torch.arange(SKV) <= position if causal else torch.ones(SQ, SKV, dtype=torch.bool)
    s = s.masked_fill(~seen, -torch.inf)
    n = seen.sum(-1)[:, None].to(q.dtype)
    if normalizer == "softmax" and sinks is not None:
        w = torch.softmax(torch.cat([s, sinks.reshape(1, HQ, 1, 1).expand(B, HQ, SQ, 1)], -1), -1)[..., :-1]
    elif normalizer in ("sparsemax", "entmax15"):
        w = sparse(s, normalizer)
    else:
        x = torch.sigmoid(s)
        w = {
            "softmax": lambda: torch.softmax(s, -1),
            "sigmoid": lambda: torch.sigmoid(s - n.log()),
            "relu": lambda: torch.relu(s) / n,
            "normalized_sigmoid": lambda: x / x.sum(-1, keepdim=True),
        }[normalizer]()
    p = w / w.sum(-1, keepdim=True)
    return w @ v, -torch.where(p > 0, p * torch.log(torch.where(p > 0, p, 1)), 0).sum(-1)


def sparse(s: Any, normalizer: str) -> Any:
    """Find the support without a gradient, and the threshold on it with one."""
    unit = 1.0 if normalizer == "sparsemax" else 0.5
    z = torch.where(s > -torch.inf, unit * s, -1e3)
    with torch.no_grad():
        weights = foveal.attention(
            torch.ones_like(s[..., :1, None]).flatten(0, -3)[:, None],
            s.flatten(0, -2)[:, None, :, None],
            s.flatten(0, -2)[:, None, :, None],
            scale=1.0, normalizer=normalizer, return_weights=True,
        ).weights.reshape(s.shape)  # fmt: skip
        support = weights > 0
    count = support.sum(-1, keepdim=True).to(z.dtype)
    mean = torch.where(support, z, 0).sum(-1, keepdim=True) / count
    if normalizer == "sparsemax":
        return torch.where(support, z - (mean - 1 / count), 0)
    square = torch.where(support, (z - mean) ** 2, 0).sum(-1, keepdim=True)
    tau = mean - torch.sqrt((1 - square) / count)
    return torch.where(support, (z - tau) ** 2, 0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_policies_and_of_the_entropy(name: str, normalizer: str) -> None:
    inputs, options = qkv(), parameters(name)
    inputs_and_parameters = [*inputs, *learned(options)]
    out, entropy = formula(*inputs, normalizer=normalizer, **options)
    dout, dentropy = torch.randn_like(out), torch.randn_like(entropy)
    found = foveal.attention(*inputs, normalizer=normalizer, return_stats=True, **options)
    torch.testing.assert_close(found.out, out)
    torch.testing.assert_close(found.stats.entropy, entropy)
    expected = torch.autograd.grad((out * dout).sum() + (entropy * dentropy).sum(), inputs_and_parameters)
    with_entropy = (found.out * dout).sum() + (found.stats.entropy * dentropy).sum()
    for x, y in zip(torch.autograd.grad(with_entropy, inputs_and_parameters), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)

    out, _ = formula(*inputs, normalizer=normalizer, **options)
    expected = torch.autograd.grad((out * dout).sum(), inputs_and_parameters)
    plain = foveal.attention(*inputs, normalizer=normalizer, **options)
    for x, y in zip(torch.autograd.grad((plain * dout).sum(), inputs_and_parameters), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


def test_gradients_of_the_entropy_with_sinks_and_dropout() -> None:
    inputs = qkv()
    sinks = torch.randn(HQ, dtype=torch.float64, requires_grad=True)
    _, entropy = formula(*inputs, sinks=sinks)
    dentropy = torch.randn_like(entropy)
    expected = torch.autograd.grad((entropy * dentropy).sum(), [*inputs[:2], sinks])
    found = foveal.attention(*inputs, sinks=sinks, dropout_p=0.3, seed=1, return_stats=True).stats.entropy
    for x, y in zip(torch.autograd.grad((found * dentropy).sum(), [*inputs[:2], sinks]), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


def test_breadth_has_a_gradient_and_the_others_have_none() -> None:
    inputs = qkv()
    stats = foveal.attention(*inputs, return_stats=True).stats
    _, entropy = formula(*inputs)
    expected = torch.autograd.grad(entropy.exp().sum(), inputs[:2])
    for x, y in zip(torch.autograd.grad(stats.breadth.sum(), inputs[:2]), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-7)
    assert not stats.max_weight.requires_grad
    assert not stats.argmax.requires_grad
    assert stats.threshold is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_in_other_dtypes(dtype: Any) -> None:
    exact, options = qkv(), parameters("both")
    both = [*exact, *learned(options)]
    out, entropy = formula(*exact, **options)
    expected = torch.autograd.grad(out.sum() + entropy.sum(), both)
    inputs, same = qkv(dtype), parameters("both")
    found = foveal.attention(*inputs, return_stats=True, **same)
    gradients = torch.autograd.grad(found.out.sum() + found.stats.entropy.sum(), [*inputs, *learned(same)])
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for x, y in zip(gradients, expected, strict=True):
        assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())


def test_packed_gradients() -> None:
    q, k, v = (
        torch.randn(n, h, D, dtype=torch.float64, requires_grad=True) for n, h in ((9, HQ), (12, HKV), (12, HKV))
    )
    tau = torch.randn(HQ, 9, dtype=torch.float64, requires_grad=True)
    z = (torch.rand(2, HQ, dtype=torch.float64) * 6).requires_grad_()
    learned_ = [q, k, v, tau, z]
    found = foveal.attention_varlen(q, k, v, [0, 4, 9], [0, 7, 12], gate=(tau, 0.5), span=(z, 3.0))
    dout = torch.randn_like(found)
    parts = [
        foveal.attention(q[a], k[b], v[b], gate=(tau[:, a], 0.5), span=(z[i], 3.0), layout="bshd")
        for i, (a, b) in enumerate(((slice(0, 4), slice(0, 7)), (slice(4, 9), slice(7, 12))))
    ]
    expected = torch.autograd.grad((torch.cat(parts) * dout).sum(), learned_)
    for x, y in zip(torch.autograd.grad((found * dout).sum(), learned_), expected, strict=True):
        torch.testing.assert_close(x, y)


def additive_inputs(dtype: Any = torch.float64, *, per_head: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    shapes = (
        (B, HQ, SQ, D),
        (B, HKV, SKV, D + 1),
        (B, HKV, SKV, 5),
        (D, 11),
        (D + 1, 11),
        (HQ, 11) if per_head else (11,),
    )
    return [torch.randn(x, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for x in shapes]


def additive_formula(q, k, v, w_q, w_k, u):
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    u = u if u.ndim == 1 else u[:, None, None, :]
    s = (torch.tanh((q @ w_q)[..., :, None, :] + (k @ w_k)[..., None, :, :]) * u).sum(-1)
    return torch.softmax(s, -1) @ v


@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_of_additive_attention(per_head: bool) -> None:
    inputs = additive_inputs(per_head=per_head)
    expected, found = additive_formula(*inputs), foveal.additive_attention(*inputs)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(found)
    gradients = torch.autograd.grad((expected * dout).sum(), inputs)
    for x, y in zip(torch.autograd.grad((found * dout).sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(x, y)
    penalty = foveal.additive_attention(*inputs, return_stats=True).stats.entropy.sum()
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(penalty, [*inputs[:2], *inputs[3:]]))


def test_gradients_have_the_same_bits_for_any_number_of_threads() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs, options = qkv(torch.float32), parameters("both", torch.float32)
            found = foveal.attention(*inputs, return_stats=True, **options)
            loss = found.out.sum() + found.stats.entropy.sum()
            more = additive_inputs(torch.float32)
            gradients = torch.autograd.grad(loss, [*inputs, *learned(options)])
            results.append((*gradients, *torch.autograd.grad(foveal.additive_attention(*more).sum(), more)))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(others, results[0], strict=True))


# --- torch around them -----------------------------------------------------------------------------------------------


def everything(q, k, v, tau, z):
    found = foveal.attention(q, k, v, gate=(tau, 0.5), span=(z, 9.0), causal=True, return_stats=True)
    return found.out, found.stats.entropy, found.stats.breadth, found.stats.argmax


def everything_inputs() -> list[Any]:
    return [*qkv(torch.float32), torch.rand(HQ, SQ).requires_grad_(), (torch.rand(HQ) * 40).requires_grad_()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    torch._dynamo.reset()
    inputs = everything_inputs()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend=backend)
    expected, found = everything(*inputs), compiled(*inputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    gradients = torch.autograd.grad(expected[0].sum() + expected[2].sum(), inputs)
    for x, y in zip(torch.autograd.grad(found[0].sum() + found[2].sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_compile_of_additive_attention() -> None:
    torch._dynamo.reset()
    inputs = additive_inputs(torch.float32)
    compiled = torch.compile(foveal.additive_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), foveal.additive_attention(*inputs))


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q, k, v, tau, z):
            stats = foveal.attention_stats(q, k, top_k=3, gate=(tau, 0.5), span=(z, 9.0))
            return everything(q, k, v, tau, z)[0], stats.key_mass, stats.top_keys

    inputs = [x.detach() for x in everything_inputs()]
    program = torch.export.export(Module(), tuple(inputs))
    for x, y in zip(program.module()(*inputs), Module()(*inputs), strict=True):
        assert torch.equal(x, y)


def test_opcheck() -> None:
    q, k, v = qkv(torch.float32)
    options = {
        "gate_tau": torch.rand(HQ, SQ).requires_grad_(),
        "gate_temperature": (torch.rand(HQ) + 0.5).requires_grad_(),
        "span": (torch.rand(HQ) * 40).requires_grad_(),
        "span_ramp": 9.0,
    }
    torch.library.opcheck(torch.ops.foveal.attention_forward_stats.default, (q, k, v), options)
    torch.library.opcheck(torch.ops.foveal.attention_forward.default, (q, k, v), options)
    detached = {n: x.detach() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    torch.library.opcheck(torch.ops.foveal.attention_stats.default, (q.detach(), k.detach()), {**detached, "top_k": 3})
    torch.library.opcheck(
        torch.ops.foveal.attention_forward.default, (q, k, v), {"u": torch.rand(HQ, D).requires_grad_()}
    )


@pytest.mark.parametrize("mapped", ["all", "q", "parameters"])
def test_vmap(mapped: str) -> None:
    inputs = [x.detach() for x in everything_inputs()]
    n = 3
    dims = tuple(0 if mapped == "all" or (mapped == "q") == (i == 0) else None for i in range(5))
    if mapped == "parameters":
        dims = (None, None, None, 0, 0)
    stacked = [
        torch.stack([x + 0.1 * i for i in range(n)]) if dim is not None else x
        for x, dim in zip(inputs, dims, strict=True)
    ]
    found = torch.func.vmap(everything, in_dims=dims)(*stacked)
    for i in range(n):
        one = [x if dim is None else x[i] for x, dim in zip(stacked, dims, strict=True)]
        for x, y in zip(found, everything(*one), strict=True):
            torch.testing.assert_close(x[i], y)


def test_vmap_of_statistics_and_of_additive_attention() -> None:
    q, k, _ = qkv(torch.float32, requires_grad=False)
    mapped = torch.func.vmap(lambda q, k: foveal.attention_stats(q, k, top_k=2).top_keys)(q, k)
    assert torch.equal(mapped, foveal.attention_stats(q, k, top_k=2).top_keys)
    inputs = [x.detach() for x in additive_inputs(torch.float32)]
    mapped = torch.func.vmap(foveal.additive_attention, in_dims=(0, 0, 0, None, None, None))(*inputs)
    torch.testing.assert_close(mapped, foveal.additive_attention(*inputs))


def test_autocast() -> None:
    q, k, v = qkv(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = foveal.attention(q, k, v, gate=(0.1, 0.5), return_stats=True)
        additive = foveal.additive_attention(*additive_inputs(torch.float32))
        stats = foveal.attention_stats(q.detach(), k.detach())
    assert found.out.dtype == additive.dtype == torch.bfloat16
    assert found.stats.entropy.dtype == stats.entropy.dtype == torch.float32
    half = foveal.attention(*(x.bfloat16() for x in (q, k, v)), gate=(0.1, 0.5), return_stats=True)
    assert torch.equal(found.stats.entropy, half.stats.entropy)
    assert torch.equal(stats.entropy, foveal.attention_stats(q.detach().bfloat16(), k.detach().bfloat16()).entropy)
    assert torch.autograd.grad(found.out.sum() + found.stats.entropy.sum(), q)[0].dtype == torch.float32


def test_refusals() -> None:
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"^attention_stats: an input requires grad, expected no gradient"):
        foveal.attention_stats(q, k)
    with pytest.raises(NotImplementedError, match=r"^attention: out is given with inputs that require grad"):
        foveal.attention(q, k, v, out=torch.empty_like(q), return_stats=True)
    with pytest.raises(ValueError, match=r"^attention: gate\[1\] has the element -1, expected finite numbers above 0"):
        foveal.attention(q, k, v, gate=(torch.zeros(SQ), torch.tensor(-1.0)))
    with pytest.raises(TypeError, match=r"^attention: gate\[0\] has type"):
        foveal.attention(q, k, v, gate=(np.zeros(SQ), 1.0))
    with pytest.raises(NotImplementedError, match=r"^attention: span\[1\] requires grad, expected a number"):
        foveal.attention(q, k, v, span=(1.0, torch.tensor(3.0, requires_grad=True)))
    assert torch.equal(
        foveal.attention(q, k, v, span=(1.0, torch.tensor(3.0))), foveal.attention(q, k, v, span=(1.0, 3.0))
    )
    with pytest.raises(ValueError, match=r"^attention_stats: top_k is 91, expected 0 to Skv = 90"):
        foveal.attention_stats(q.detach(), k.detach(), top_k=91)


def test_out_with_statistics() -> None:
    q, k, v = qkv(torch.float32, requires_grad=False)
    into = torch.empty_like(q)
    found = foveal.attention(q, k, v, out=into, return_stats=True)
    assert found.out is into
    assert torch.equal(into, foveal.attention(q, k, v))
