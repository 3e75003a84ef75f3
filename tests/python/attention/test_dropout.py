"""Dropout of foveal.attention: the mask by Philox, the same for every kind of array, kernel and cut, and backward."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backward import formula, gradients, run_python
from torch_cases import DTYPES, FALLBACK, OPTIONS, Options, ops, qkv

import foveal


def philox(counter, key):
    """Philox 4x32-10 of Salmon et al. 2011, on arrays of uint64 that hold 32-bit words."""
    c = list(np.broadcast_arrays(*[np.asarray(x, np.uint64) for x in counter]))
    k, low = [key & 0xFFFFFFFF, key >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]),
            a & low,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def factors(shape, dropout_p, seed):
    """What the weights (B, Hq, Sq, Skv) are multiplied by."""
    b, h, i, j = np.ogrid[tuple(slice(n) for n in shape)]
    words = np.stack(philox((j // 4, i, h, b), seed))
    word = np.take_along_axis(words, np.broadcast_to(j % 4, shape)[None], axis=0)[0]
    scale = 0.0 if dropout_p == 1 else 1 / (1 - dropout_p)
    return torch.from_numpy((word >= round(dropout_p * 2**32)) * scale)


def test_philox_itself():
    """The known answers that come with Random123, the authors' implementation."""
    full = 0xFFFFFFFF
    for counter, key, words in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        assert tuple(int(x) for x in philox(counter, key)) == words


def dropped_formula(*, dropout_p, seed, q, k, **arguments):
    """(out, lse) of the formula: softmax first, which the identity for v gives, then the factors."""
    swap = arguments.get("layout") == "bshd"
    v = arguments.pop("v")
    values, keys = (x.transpose(1, 2) if swap else x for x in (v, k))
    eye = torch.eye(keys.shape[2], dtype=q.dtype).expand(*keys.shape[:2], -1, -1)
    p, lse = formula(q=q, k=k, v=eye.transpose(1, 2) if swap else eye, **arguments)
    p = p.transpose(1, 2) if swap else p
    p = p * factors(p.shape, dropout_p, seed).to(p.dtype)
    out = p @ values.repeat_interleave(p.shape[1] // values.shape[1], dim=1)
    return (out.transpose(1, 2) if swap else out), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "mask", "bias", "sinks", "lens", "everything"])
def test_forward(name, dtype, isa):
    q, k, v = qkv(dtype=dtype)
    seed, dropout_p = 2**62 + 12345, 0.3
    found = foveal.attention(q, k, v, **OPTIONS[name], dropout_p=dropout_p, seed=seed, return_lse=True)
    wide = {n: x.double() if n in ("bias", "sinks") else x for n, x in OPTIONS[name].items()}
    exact, lse = dropped_formula(q=q.double(), k=k.double(), v=v.double(), dropout_p=dropout_p, seed=seed, **wide)
    torch.testing.assert_close(found.lse.double(), lse, rtol=1e-5, atol=1e-5)
    bound = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(found.out.double(), exact, rtol=0, atol=bound * 2 * v.abs().max().item())


def test_weights_hold_what_is_left(isa):
    q, k, v = qkv(dtype=torch.float64)
    given = {"causal": True, "dropout_p": 0.5, "seed": 3}
    result = foveal.attention(q, k, v, **given, return_weights=True)
    torch.testing.assert_close(result.out, result.weights @ v.repeat_interleave(3, dim=1))
    plain = foveal.attention(q, k, v, causal=True, return_weights=True).weights
    torch.testing.assert_close(result.weights, plain * factors(plain.shape, 0.5, 3))
    assert torch.equal(result.out, foveal.attention(q, k, v, **given))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_rows(rows):
    """Shapes that a decoding kernel takes without dropout; keys that are cut into parts."""
    q, k, v = qkv(batch=1, heads=2, kv_heads=1, seqlen_q=rows, seqlen_kv=5000, dtype=torch.float64)
    exact, _ = dropped_formula(q=q, k=k, v=v, dropout_p=0.25, seed=9)
    torch.testing.assert_close(foveal.attention(q, k, v, dropout_p=0.25, seed=9), exact)


def test_every_kind_of_array_drops_the_same():
    q, k, v = qkv()
    tensor = foveal.attention(q, k, v, dropout_p=0.4, seed=5, causal=True)
    array = foveal.attention(*(x.numpy() for x in (q, k, v)), dropout_p=0.4, seed=np.int32(5), causal=True)
    assert np.array_equal(tensor.numpy(), array)
    assert torch.equal(tensor, foveal.attention(q, k, v, dropout_p=0.4, seed=torch.tensor(5), causal=True))
    swapped = foveal.attention(
        *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.4, seed=5, causal=True, layout="bshd"
    )
    assert torch.equal(tensor, swapped.transpose(1, 2))


def test_extremes():
    q, k, v = qkv()
    plain = foveal.attention(q, k, v)
    assert torch.equal(foveal.attention(q, k, v, dropout_p=0, seed=1), plain)
    assert torch.equal(foveal.attention(q, k, v, dropout_p=1.0, seed=1), torch.zeros_like(plain))
    assert torch.equal(foveal.attention(q, k, v, dropout_p=1e-12, seed=1), foveal.attention(q, k, v, dropout_p=1e-11))
    leaf = q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(foveal.attention(leaf, k, v, dropout_p=1.0).sum(), leaf)
    assert torch.equal(dq, torch.zeros_like(q))


def test_the_share_of_dropped_weights():
    q, k, v = qkv(batch=1, heads=2, kv_heads=2, seqlen_q=200, seqlen_kv=200)
    for seed in range(3):
        left = foveal.attention(q, k, v, dropout_p=0.1, seed=seed, return_weights=True).weights != 0
        count = left.numel()
        assert abs((~left).sum().item() - 0.1 * count) < 6 * (0.1 * 0.9 * count) ** 0.5
        for other in (left.flip(-1), left.flip(-2), left.flip(-3)):  # and apart from each other
            together = (left & other).sum().item() / count
            assert abs(together - 0.81) < 6 * (0.81 * 0.19 / count) ** 0.5


def test_seeds():
    q, k, v = qkv()

    def call(**given):
        return foveal.attention(q, k, v, dropout_p=0.5, **given)

    torch.manual_seed(7)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(call(seed=1), call(seed=2))
    assert not torch.equal(call(seed=1), call(seed=1 + 2**32))
    arrays = [x.numpy() for x in (q, k, v)]
    assert not np.array_equal(foveal.attention(*arrays, dropout_p=0.5), foveal.attention(*arrays, dropout_p=0.5))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "causal", "softcap scale", "bias", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(name, dtype, isa):
    extra = {n: x for n, x in OPTIONS[name].items() if n in ("bias", "sinks")}
    options = {n: x for n, x in OPTIONS[name].items() if n not in extra}
    dropped = {"dropout_p": 0.3, "seed": 77}
    arrays = {**dict(zip("qkv", qkv(dtype=dtype), strict=True)), **extra}
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(2, 6, 19, 16, dtype=torch.float64, generator=generator).to(dtype).double()
    found = gradients(lambda **x: foveal.attention(**x, **options, **dropped, return_lse=True)[:2], arrays, dout)
    exact = gradients(
        lambda **x: dropped_formula(**x, **options, **dropped), {n: x.double() for n, x in arrays.items()}, dout
    )
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for n, x in exact.items():
        stored = torch.finfo(arrays[n].dtype).eps + (0 if dtype == accumulator else torch.finfo(dtype).eps)
        bound = (256 * torch.finfo(accumulator).eps + 4 * stored) * (1 + x.abs().max().item()) * 4
        torch.testing.assert_close(found[n].double(), x, rtol=0, atol=bound, msg=lambda m, n=n: f"d{n}: {m}")


def test_gradcheck():
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 2, 5, 7, 6, 4, torch.float64))
    bias = torch.randn(4, 5, 1, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, bias):
        return foveal.attention(q, k, v, bias=bias, causal=True, softcap=2.0, dropout_p=0.4, seed=4)

    assert torch.autograd.gradcheck(call, (q, k, v, bias))


@settings(max_examples=25)
@given(
    seqlen_q=st.integers(1, 500), seqlen_kv=st.integers(1, 900), threads=st.integers(2, 6), seed=st.integers(0, 2**62)
)
def test_bits_do_not_depend_on_threads(seqlen_q, seqlen_kv, threads, seed):
    q, k, v = (x.requires_grad_() for x in qkv(1, 3, 1, seqlen_q, seqlen_kv, 8, 8, seed=seed % 100))
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out = foveal.attention(q, k, v, causal=True, dropout_p=0.2, seed=seed)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# --- torch around it -------------------------------------------------------------------------------------------------


def test_the_op():
    q, k, v = qkv(dtype=torch.float64)
    options = Options(dropout_p=0.5, seed=torch.tensor(3))
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, *options))
    torch.library.opcheck(ops.attention_forward.default, ([x.requires_grad_() for x in (q, k, v)] + [*options]))
    refused = (
        (None, "seed is absent"),
        (torch.ones(2), "seed is no int64 tensor"),
        (torch.tensor(-1), r"seed is -1, expected 0 to 2\^63 - 1"),
    )
    for seed, text in refused:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"attention: {text}"):
            ops.attention_forward(*(x.detach() for x in (q, k, v)), dropout_p=0.5, seed=seed)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    q, k, v = (x.requires_grad_() for x in qkv())
    torch._dynamo.reset()

    def call(seed):
        return foveal.attention(q, k, v, causal=True, dropout_p=0.3, seed=seed)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    found = torch.autograd.grad(compiled(11).sin().sum(), (q, k, v))
    expected = torch.autograd.grad(call(11).sin().sum(), (q, k, v))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    first, second = compiled(None), compiled(None)
    assert not torch.equal(first, second)
    # One seed for both passes: dv is linear in the weights that are left, and so is out.
    (dv,) = torch.autograd.grad(first, v, torch.ones_like(first))
    torch.testing.assert_close((dv * v).sum(), first.sum(), rtol=1e-4, atol=1e-4)


def test_export():
    class Call(torch.nn.Module):
        def forward(self, q, k, v):
            return foveal.attention(q, k, v, dropout_p=0.3, seed=8)

    q, k, v = qkv()
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(Call(), (q, k, v)), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    assert torch.equal(loaded(q, k, v), foveal.attention(q, k, v, dropout_p=0.3, seed=8))


def test_vmap():
    q, k, v = qkv()
    stack = torch.stack([q, q])

    def call(q):
        return foveal.attention(q, k, v, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(stack)
    same = torch.func.vmap(call, randomness="same")(stack)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(call, randomness="different")(stack)
    assert not torch.equal(different[0], different[1])
    each = torch.func.vmap(torch.func.grad(lambda q: call(q).sum()), randomness="different")(stack)
    assert not torch.equal(each[0], each[1])


@pytest.mark.skipif(FALLBACK, reason="this is the test that turns it on")
def test_with_kernels_in_python():
    code = """
        import os, sys
        os.environ["FOVEAL_TEST_TORCH_FALLBACK"] = "1"
        import pytest
        sys.exit(pytest.main(["-q", "-x", "-k", "every_kind or gradcheck or seeds or the_op", {file!r}]))
    """
    assert run_python(code.format(file=__file__))
