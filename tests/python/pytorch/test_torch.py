"""foveal.attention on PyTorch CPU tensors: the kernel, and the refusals, that NumPy callers meet."""

import decimal
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch_cases import DTYPES, FALLBACK, OPTIONS, assert_same_bits, ops, qkv, to_numpy

import foveal
from foveal import _core


def test_which_kernels_run():
    if FALLBACK:
        assert "foveal.torch.ops.fallback" in sys.modules
    else:  # in a process of its own: other tests import it for themselves
        program = "import sys, foveal.torch; sys.exit('foveal.torch.ops.fallback' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- accuracy -------------------------------------------------------------------------------------------------------

SHAPES = {  # (B,Hq,Hkv,Sq,Skv,D)
    "square": (2, 3, 3, 300, 300, 64),
    "one query": (2, 4, 4, 1, 1000, 128),
    "grouped query": (1, 8, 1, 1, 3000, 128),
    "wide": (1, 2, 2, 65, 130, 256),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_that_of_torch(dtype, shape, causal):
    batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, s, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for h, s in ((heads, seqlen_q), (kv_heads, seqlen_kv), (kv_heads, seqlen_kv))
    )
    mask = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool).tril(seqlen_kv - seqlen_q) if causal else None

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads)

    exact = to_numpy(foveal.attention(q.double(), k.double(), v.double(), causal=causal))
    np.testing.assert_allclose(exact, sdpa(q.double(), k.double(), v.double()), rtol=0, atol=1e-13)

    def error(out):
        return np.abs(to_numpy(out.double()) - exact)

    ours, theirs = error(foveal.attention(q, k, v, causal=causal)), error(sdpa(q, k, v))
    if (
        dtype != torch.float64
    ):  # there is nothing more exact to compare float64 with; test_attention.py bounds its error
        assert ours.max() <= 2 * theirs.max()
        assert ours.mean() <= 2 * theirs.mean()


# --- the same result as from NumPy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_parity_of_options(name, dtype):
    tensors, options = qkv(dtype=dtype), OPTIONS[name]
    arrays, same_options = [to_numpy(x) for x in tensors], {key: to_numpy(x) for key, x in options.items()}
    expected = foveal.attention(*arrays, **same_options, return_lse=True, return_weights=True)

    assert_same_bits(foveal.attention(*tensors, **options), expected.out)
    found = foveal.attention(*tensors, **options, return_lse=True, return_weights=True)
    assert isinstance(found, foveal.Attention)
    assert_same_bits(found.out, expected.out)
    assert_same_bits(found.lse, expected.lse)
    assert_same_bits(found.weights, expected.weights)
    assert found.stats is None

    lse_alone = foveal.attention(*tensors, **options, return_lse=True)
    assert lse_alone.weights is None
    assert_same_bits(lse_alone.lse, expected.lse)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": (4, None)}], ids=["plain", "window"])
def test_parity_of_ranks_and_layouts(rank, layout, options):
    tensors = qkv()
    if layout == "bshd":
        tensors = [x.transpose(1, 2) for x in tensors]
    if rank < 4:
        tensors = [x[0] for x in tensors]
    if rank < 3:
        tensors = [x[:, 0] if layout == "bshd" else x[0] for x in tensors]
    arrays = [to_numpy(x) for x in tensors]
    found = foveal.attention(*tensors, layout=layout, **options, return_lse=True, return_weights=True)
    expected = foveal.attention(*arrays, layout=layout, **options, return_lse=True, return_weights=True)
    for x, y in zip(found[:3], expected[:3], strict=True):
        assert x.is_contiguous()
        assert_same_bits(x, y)
    assert_same_bits(foveal.attention(*tensors, layout=layout, **options), expected.out)


@pytest.mark.parametrize(
    "restride",
    [
        lambda x: x[..., ::2],
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x[:1].expand(2, *x.shape[1:]),
        lambda x: torch.nn.functional.pad(x, (3, 5, 1, 1))[:, :, 1:-1, 3:-5],
    ],
    ids=["step", "transposed", "broadcast", "padded"],
)
def test_parity_of_strides(restride):
    tensors = [restride(x) for x in qkv()]
    assert not all(x.is_contiguous() for x in tensors)
    assert_same_bits(foveal.attention(*tensors), foveal.attention(*(to_numpy(x) for x in tensors)))


@pytest.mark.parametrize("shape", [(0, 6, 2, 19, 35), (2, 0, 0, 19, 35), (2, 6, 2, 0, 35), (2, 6, 2, 19, 0)], ids=str)
def test_parity_of_empty_dimensions(shape):
    tensors = qkv(*shape)
    found = foveal.attention(*tensors, return_lse=True, return_weights=True)
    expected = foveal.attention(*(to_numpy(x) for x in tensors), return_lse=True, return_weights=True)
    for x, y in zip(found[:3], expected[:3], strict=True):
        assert_same_bits(x, y)
    assert_same_bits(foveal.attention(*tensors), expected.out)


@pytest.mark.parametrize(
    "integers",
    [
        list,
        tuple,
        np.array,
        lambda x: np.array(x, dtype=np.uint8),
        torch.tensor,
        lambda x: torch.tensor(x, dtype=torch.int32),
        lambda x: torch.tensor(x, dtype=torch.int16),
        lambda x: torch.tensor([[n, 0] for n in x])[:, 0],
    ],
    ids=["list", "tuple", "numpy", "numpy uint8", "int64", "int32", "int16", "strided"],
)
def test_integers_of_every_kind(integers):
    q, k, v = qkv()
    expected = foveal.attention(q, k, v, causal=True, q_lens=[3, 19], kv_lens=[35, 11], q_offset=[2, 5])
    found = foveal.attention(
        q, k, v, causal=True, q_lens=integers([3, 19]), kv_lens=integers([35, 11]), q_offset=integers([2, 5])
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("offset", [5, np.int32(5), np.array(5), torch.tensor(5), torch.tensor([5, 5])], ids=repr)
def test_one_offset_for_all(offset):
    q, k, v = qkv()
    assert torch.equal(
        foveal.attention(q, k, v, causal=True, q_offset=offset), foveal.attention(q, k, v, causal=True, q_offset=[5, 5])
    )


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_out(name):
    q, k, v = qkv()
    expected = foveal.attention(q, k, v, **OPTIONS[name], return_lse=True, return_weights=True)
    for out in (torch.empty(2, 6, 19, 16), torch.empty(2, 19, 6, 32).transpose(1, 2)[..., ::2]):
        assert foveal.attention(q, k, v, **OPTIONS[name], out=out) is out
        assert torch.equal(out, expected.out)
        out.zero_()
        found = foveal.attention(q, k, v, **OPTIONS[name], out=out, return_lse=True, return_weights=True)
        assert found.out is out
        assert all(torch.equal(x, y) for x, y in zip(found[:3], expected[:3], strict=True))


@pytest.mark.skipif(FALLBACK, reason="DLPack makes the copy")
def test_copy_on_write_input_stays_shared():
    q, k, v = qkv()
    lazy = torch._lazy_clone(q)
    foveal.attention(lazy, k, v)
    assert torch._C._is_cow_tensor(lazy)


def test_negated_view_is_read_as_negated():
    q, k, v = qkv()
    assert torch.equal(foveal.attention(torch._neg_view(q), k, v), foveal.attention(-q, k, v))


def test_lists_go_to_the_device_of_q():
    q, k, v = qkv()
    with torch.device("meta"):
        found = foveal.attention(q, k, v, kv_lens=[35, 2])
    assert torch.equal(found, foveal.attention(q, k, v, kv_lens=[35, 2]))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks", "alibi_slopes"])
def test_without_a_gradient_inputs_that_require_one_change_nothing(name):
    q, k, v = qkv()
    given = {
        "q": q,
        "k": k,
        "v": v,
        "bias": torch.zeros(19, 35),
        "sinks": torch.zeros(6),
        "alibi_slopes": torch.zeros(6),
    }
    arguments = given if name in ("bias", "sinks", "alibi_slopes") else {"q": q, "k": k, "v": v}
    expected = foveal.attention(**arguments)
    arguments = {**arguments, name: given[name].requires_grad_()}
    with torch.no_grad():
        found = foveal.attention(**arguments)
        assert torch.equal(found, expected)
        assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(foveal.attention(**arguments), expected)
        with pytest.raises(TypeError, match=r"^attention: causal has type int"):
            foveal.attention(**arguments, causal=1)


def test_out_is_seen_to_change():
    q, k, v = qkv()
    w, out = torch.randn(2, 6, 19, 16, requires_grad=True), torch.ones(2, 6, 19, 16)
    loss = (w * out).sum()
    foveal.attention(q, k, v, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = out._version
    ops.attention_forward_out(out, q, k, v)
    assert out._version > version
    with torch.inference_mode():
        foveal.attention(q, k, v, out=torch.empty_like(out))


def test_an_out_that_requires_grad_is_refused():
    q, k, v = qkv()
    leaf = torch.ones(2, 6, 19, 16, requires_grad=True)
    for out in (leaf, leaf * 1):
        with pytest.raises(NotImplementedError, match=r"^attention: out is given with inputs that require grad"):
            foveal.attention(q, k, v, out=out)
        with pytest.raises(NotImplementedError, match="attention: out is given with inputs that require grad"):
            ops.attention_forward_out(out, q, k, v)
    with torch.no_grad():
        foveal.attention(q, k, v, out=leaf)
    with pytest.raises(TypeError, match=r"^attention: out is a negated view"):
        foveal.attention(q, k, v, out=torch._neg_view(torch.empty(2, 6, 19, 16)))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_forward_mode_is_refused(name):
    q, k, v = qkv()
    arrays = {"q": q, "k": k, "v": v, "bias": torch.zeros(19, 35), "sinks": torch.zeros(6)}

    def call(x):
        return foveal.attention(**{**arrays, name: x})

    x = arrays[name]
    with pytest.raises(NotImplementedError, match=r"^attention: there is no forward-mode derivative"):
        torch.func.jvp(call, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"^attention: there is no forward-mode derivative"):
            call(dual)
        if name in "qkv":
            given = [dual if n == name else arrays[n] for n in "qkv"]
            for op in (ops.attention_plain, ops.attention_forward):
                with pytest.raises(NotImplementedError, match="jvp"):
                    op(*given)
        call(x)


def test_the_plain_op_is_differentiable():
    q, k, v = (x.requires_grad_() for x in qkv())
    found = torch.autograd.grad(ops.attention_plain(q, k, v, True).sum(), (q, k, v))
    expected = torch.autograd.grad(foveal.attention(q, k, v, causal=True).sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_vmap_knows_what_requires_grad():
    q, k, v = qkv()
    stack = torch.stack([q, 2 * q])
    weights = torch.func.vmap(lambda x: foveal.attention(x, k, v, return_weights=True).weights)(stack)
    assert torch.equal(weights[1], foveal.attention(2 * q, k, v, return_weights=True).weights)
    stack.requires_grad_()
    (found,) = torch.autograd.grad(torch.func.vmap(lambda x: foveal.attention(x, k, v))(stack).sin().sum(), stack)
    (expected,) = torch.autograd.grad(sum(foveal.attention(x, k, v).sin().sum() for x in stack), stack)
    torch.testing.assert_close(found, expected)


def test_vmap_tells_what_was_wrong():
    q, k, v = qkv()
    lens = torch.ones(3, 7, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="expanded size of the tensor"):
        torch.func.vmap(lambda n: foveal.attention(q, k, v, q_lens=n))(lens)
    with pytest.raises(RuntimeError, match="attention_forward_out"):
        torch.func.vmap(lambda x: foveal.attention(x, k, v, out=torch.empty(2, 6, 19, 16)))(torch.stack([q, q]))


@pytest.mark.parametrize(
    "change",
    [
        {"k": (2, 2, 34, 24)},
        {"k": (1, 2, 35, 24)},
        {"v": (1, 2, 35, 16)},
        {"v": (2, 1, 35, 16)},
        {"k": (2, 4, 35, 24), "v": (2, 4, 35, 16)},
        {"mask": (7,)},
        {"mask": (1, 1, 2, 6, 19, 35)},
        {"bias": (5, 19, 35)},
    ],
    ids=str,
)
def test_fake_tensors_are_refused_as_real_ones(change):
    arrays = dict(zip("qkv", qkv(), strict=True))
    arrays.update(
        {n: torch.zeros(shape, dtype=torch.bool if n == "mask" else torch.float32) for n, shape in change.items()}
    )
    with pytest.raises(ValueError, match=r"^attention: ") as expected:
        foveal.attention(**arrays)
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(x) for n, x in arrays.items()}
        with pytest.raises(ValueError, match=r"^attention: ") as found:
            foveal.attention(**fakes)
    if not {"mask", "bias"} & change.keys():
        assert str(found.value) == str(expected.value)


# --- refused arguments -----------------------------------------------------------------------------------------------


def bad_calls():
    q, k, v = qkv()
    base = {"q": q, "k": k, "v": v}
    changes = {
        "head_dim": {"k": k[..., :8]},
        "rank": {"k": k[0]},
        "rank 1": {"q": q[0, 0, 0], "k": k[0, 0, 0], "v": v[0, 0, 0]},
        "rank 5": {"q": q[None], "k": k[None], "v": v[None]},
        "rank 9": {"mask": torch.ones((1,) * 9, dtype=torch.bool)},
        "heads": {"q": q[:, :5]},
        "batch": {"v": v[:1]},
        "k dtype": {"k": k.double()},
        "q dtype": {"q": q.int(), "k": k.int(), "v": v.int()},
        "q complex": {"q": q.to(torch.complex64)},
        "v uint8": {"v": v.to(torch.uint8)},
        "mask float": {"mask": torch.zeros(19, 35)},
        "mask uint8": {"mask": torch.zeros(19, 35, dtype=torch.uint8)},
        "mask int16": {"mask": torch.zeros(19, 35, dtype=torch.int16)},
        "mask shape": {"mask": torch.ones(19, 34, dtype=torch.bool)},
        "bias bool": {"bias": torch.ones(19, 35, dtype=torch.bool)},
        "bias shape": {"bias": torch.ones(3, 6, 19, 35)},
        "alibi shape": {"alibi_slopes": torch.ones(5)},
        "sinks shape": {"sinks": torch.ones(2, 6)},
        "sinks int": {"sinks": torch.ones(6, dtype=torch.int64)},
        "causal": {"causal": 1},
        "causal None": {"causal": None},
        "window negative": {"window": (-1, None)},
        "window more negative": {"window": (None, -2)},
        "window bool": {"window": (True, None)},
        "window float": {"window": (1.5, None)},
        "window int": {"window": 4},
        "window 3": {"window": (1, 2, 3)},
        "scale nan": {"scale": float("nan")},
        "scale text": {"scale": "a"},
        "softcap": {"softcap": -1.0},
        "softcap text": {"softcap": "a"},
        "layout": {"layout": "bsd"},
        "layout type": {"layout": 3},
        "lens range": {"kv_lens": [36, 1]},
        "lens negative": {"q_lens": [-1, 1]},
        "lens count": {"kv_lens": [3]},
        "lens float": {"kv_lens": [3.0, 4.0]},
        "lens bool": {"kv_lens": [True, False]},
        "lens nested": {"kv_lens": [[3, 4]]},
        "lens int": {"kv_lens": 3},
        "lens text": {"kv_lens": "ab"},
        "offset float": {"q_offset": 2.0},
        "offset text": {"q_offset": "a"},
        "offset shape": {"q_offset": [1, 2, 3]},
        "out shape": {"out": torch.empty(2, 6, 19, 15)},
        "out dtype": {"out": torch.empty(2, 6, 19, 16, dtype=torch.float64)},
        "out int16": {"out": torch.empty(2, 6, 19, 16, dtype=torch.int16)},
        "out overlaps itself": {"out": torch.empty(2, 6, 1, 16).expand(2, 6, 19, 16)},
        "out list": {"out": [1.0]},
        "window numpy float": {"window": (np.float32(2.7), None)},
        "window decimal": {"window": (None, decimal.Decimal("2.7"))},
        "window numpy bool": {"window": (np.bool_(True), None)},
        "offset bool": {"q_offset": True},
        "offset numpy bool": {"q_offset": np.bool_(True)},
        "lens some bool": {"q_lens": [True, 2]},
        "lens set": {"q_lens": {1, 2}},
        "lens dict": {"q_lens": {1: 1, 2: 2}},
        "dropout": {"dropout_p": 1.5},
        "dropout nan": {"dropout_p": math.nan},
        "dropout text": {"dropout_p": "a"},
        "seed float": {"dropout_p": 0.5, "seed": 1.5},
        "seed bool": {"dropout_p": 0.5, "seed": True},
        "seed negative": {"dropout_p": 0.5, "seed": -1},
        "seed huge": {"dropout_p": 0.5, "seed": 2**63},
        "normalizer with sinks": {"normalizer": "sparsemax", "sinks": torch.zeros(6)},
        "normalizer unknown": {"normalizer": "x"},
        "gate no pair": {"gate": 1.0},
        "gate temperature": {"gate": (0.0, 0.0)},
        "gate tau": {"gate": (torch.zeros(5, 4, 3), 1.0)},
        "span ramp": {"span": (1.0, 0.0)},
        "span z": {"span": (torch.zeros(5), 1.0)},
    }
    return {name: {**base, **change} for name, change in changes.items()}


@pytest.mark.parametrize("name", bad_calls())
def test_refused_as_from_numpy(name):
    arguments = bad_calls()[name]
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as expected:
        foveal.attention(**{key: to_numpy(x) for key, x in arguments.items()})
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as found:
        foveal.attention(**arguments)
    assert found.type is expected.type
    assert str(found.value).replace("torch.Tensor", "numpy.ndarray").replace("torch.", "") == str(expected.value)
    assert str(found.value).startswith("attention: ")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda q, k, v: {"k": k.numpy()}, "k has type numpy.ndarray, expected torch.Tensor (from q)"),
        (
            lambda q, k, v: {"mask": np.ones((19, 35), bool)},
            "mask has type numpy.ndarray, expected torch.Tensor (from q)",
        ),
        (lambda q, k, v: {"k": [1.0]}, "k has type list, expected torch.Tensor (from q)"),
        (lambda q, k, v: {"v": None}, "v has type NoneType, expected torch.Tensor (from q)"),
        (lambda q, k, v: {"k": k.to("meta")}, "k is on meta, expected cpu"),
        (lambda q, k, v: {"q": q.to("meta")}, "q is on meta, expected cpu"),
        (lambda q, k, v: {"out": torch.empty(2, 6, 19, 16, device="meta")}, "out is on meta, expected cpu"),
        (
            lambda q, k, v: {"kv_lens": torch.ones(2, dtype=torch.int64, device="meta")},
            "kv_lens is on meta, expected cpu",
        ),
        (lambda q, k, v: {"q": q.to_sparse()}, "q is a sparse_coo tensor, expected a plain dense one"),
        (
            lambda q, k, v: {"bias": torch.zeros(19, 35).to_sparse_csr()},
            "bias is a sparse_csr tensor, expected a plain dense one",
        ),
        (lambda q, k, v: {"v": v.to_mkldnn()}, "v is a mkldnn tensor, expected a plain dense one"),
        (
            lambda q, k, v: {"k": torch.quantize_per_tensor(k, 0.1, 0, torch.qint8)},
            "k is a quantized tensor, expected a plain dense one",
        ),
        (lambda q, k, v: {"q": torch.nested.nested_tensor([*q])}, "q is a nested tensor, expected a plain dense one"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, about its sparse, nested and quantized tensors
def test_other_kinds_are_refused(change, text):
    q, k, v = qkv()
    with pytest.raises(TypeError) as found:
        foveal.attention(**{"q": q, "k": k, "v": v, **change(q, k, v)})
    assert str(found.value) == f"attention: {text}"


def test_a_tensor_among_arrays_is_refused():
    q, k, v = qkv()
    with pytest.raises(TypeError, match=r"^attention: k has type torch\.Tensor, expected numpy\.ndarray \(from q\)"):
        foveal.attention(q.numpy(), k, v.numpy())


def test_the_bare_op_raises_runtime_error():
    q, k, v = qkv()
    with pytest.raises(RuntimeError if not FALLBACK else ValueError, match=r"^attention: k\.shape\[3\] is 8"):
        ops.attention_plain(q, k[..., :8], v)
    with pytest.raises(TypeError, match=r"^attention: k has dtype"):  # and leaves nothing behind for the next failure
        foveal.attention(q, k.double(), v)


@pytest.mark.skipif(FALLBACK, reason="about handles of the C shim")
def test_no_reference_is_kept():
    q, k, v = qkv()
    lens, bias, out = torch.tensor([35, 3]), torch.zeros(19, 35), torch.empty(2, 6, 19, 16)
    given = (q, k, v, lens, bias, out)
    before = [x._use_count() for x in given]
    for _ in range(3):
        result = foveal.attention(q, k, v, bias=bias, kv_lens=lens, q_offset=3, window=(2, 2), scale=1.0, out=out)
        for change in ({"k": k[..., :8]}, {"kv_lens": [99, 99]}, {"mask": bias}, {"sinks": lens}):
            with pytest.raises((TypeError, ValueError)):
                foveal.attention(**{"q": q, "k": k, "v": v, "bias": bias, "out": out, **change})
        foveal.attention(q, k, v)
    assert result is out
    assert [x._use_count() for x in given] == before


def test_memory_error():
    q = torch.empty(1, 1, 1, 1).expand(1, 1, 2**40, 1)
    with pytest.raises(MemoryError, match=r"^attention: "):
        foveal.attention(q, q[:, :, :1], torch.empty(1, 1, 1, 512))


def test_a_missing_library_is_named():
    if FALLBACK:
        pytest.skip("replaced")
    assert _core.register_torch_ops(["libtorch_of_another_house.so"]) == "libtorch_cpu"
