"""The CUDA kernels of ``torch.ops.foveal.*``, over the emulated device and CPU tensors in the place of CUDA ones."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
foveal = pytest.importorskip("foveal")
pytest.importorskip("foveal.torch")

from foveal import _cuda  # noqa: E402
from foveal.torch.ops import cuda as _cuda_ops  # noqa: E402
from foveal.torch.ops.records import PackedOptions  # noqa: E402


def on_the_gpu(op: Any) -> Any:
    """Call an op of CPU tensors on a GPU."""

    def call(*values: Any) -> Any:
        result = op(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in values))
        return result.cpu() if isinstance(result, torch.Tensor) else tuple(x.cpu() for x in result)

    return call


@pytest.fixture(scope="module", params=["emulated", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The ops by name: over the emulated device, and those that the package registered where there is a GPU."""
    if request.param == "cuda":
        if not (torch.cuda.is_available() and _cuda.experimental() and _cuda.is_built()):
            pytest.skip("needs a GPU, a package with the CUDA backend and FOVEAL_CUDA=experimental")
        names = [n for n in dir(torch.ops.foveal) if n.startswith("attention_")]
        return {name: on_the_gpu(getattr(torch.ops.foveal, name)) for name in names}
    library = _cuda.Library(request.getfixturevalue("emulated_cuda"))
    return _cuda_ops.kernels(library, lambda device: 0)


def tensors(dtype: Any, *shape: int, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(3)]


def expect_close(found: Any, expected: Any, dtype: Any) -> None:
    tolerance = {torch.float32: 3e-6, torch.float16: 7e-4, torch.bfloat16: 6e-3}[dtype]
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert float(error) <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_ops_agree_with_the_cpu(kernels: Any, dtype: Any) -> None:
    q, k, v = tensors(dtype, 2, 4, 40, 64)
    expect_close(kernels["attention_plain"](q, k, v, True), torch.ops.foveal.attention_plain(q, k, v, True), dtype)
    mask = torch.rand(2, 1, 40, 40) < 0.6
    bias = torch.randn(4, 1, 40)
    named = {"mask": mask, "bias": bias, "sinks": torch.randn(4), "softcap": 8.0, "window_left": 9, "q_offset": 3}
    options = _cuda_ops.Options(**named, kv_lens=torch.tensor([40, 17]))
    found = kernels["attention_forward"](q, k, v, *options)
    expected = torch.ops.foveal.attention_forward(q, k, v, *options)
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(torch.isinf(mine), torch.isinf(theirs))
        expect_close(mine.nan_to_num(neginf=0.0), theirs.nan_to_num(neginf=0.0), dtype)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("bshd", [False, True])
def test_every_rank_and_layout(kernels: Any, rank: int, bshd: bool) -> None:
    q, k, v = tensors(torch.float16, *(2, 3, 5, 8)[4 - rank :])
    options = _cuda_ops.Options(causal=True, bshd=bshd)
    out, lse, weights = kernels["attention_forward"](q, k, v, *options)
    expected = torch.ops.foveal.attention_forward(q, k, v, *options)
    assert out.shape == expected[0].shape
    assert lse.shape == expected[1].shape
    assert weights.numel() == 0
    expect_close(out, expected[0], torch.float16)


def test_weights(kernels: Any) -> None:
    q, k, v = tensors(torch.float32, 1, 2, 20, 32)
    options = _cuda_ops.Options(causal=True, return_weights=True)
    found = kernels["attention_forward"](q, k, v, *options)
    expected = torch.ops.foveal.attention_forward(q, k, v, *options)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-6)


def test_a_mask_of_packed_sequences_is_refused(kernels: Any) -> None:
    q, k, v = tensors(torch.float16, 20, 2, 64)
    begins = torch.tensor([0, 8, 20])
    mask = torch.ones(12, 12, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="attention: mask is given with cu_seqlens on cuda"):
        kernels["attention_varlen_forward"](q, k, v, begins, begins, mask)


def check_gradients(kernels: Any, name: str, dtype: Any, arguments: list[Any], options: list[Any]) -> None:
    """The gradients of an op and those of the CPU's kernel, from the same out and lse."""
    out, lse = getattr(torch.ops.foveal, f"{name}_forward")(*arguments, *options)[:2]
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(out.shape, generator=generator).to(dtype)
    dlse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype)
    flags = [True, True]
    given = [dout, dlse, out, lse, *arguments, *options, *flags]
    found = kernels[f"{name}_backward"](*given)
    expected = getattr(torch.ops.foveal, f"{name}_backward")(*given)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        if mine.numel():
            expect_close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bshd", [False, True])
def test_gradients_agree_with_the_cpu(kernels: Any, dtype: Any, bshd: bool) -> None:
    q, k, v = tensors(dtype, 2, 40, 40, 64)
    q, k, v = (x[:, :, :8].transpose(1, 2) if not bshd else x[:, :, :8] for x in (q, k, v))
    problem = _cuda_ops.BackwardOptions(
        causal=True, bias=torch.randn(8, 1, 40), sinks=torch.randn(8), softcap=8.0, bshd=bshd
    )
    check_gradients(kernels, "attention", dtype, [q, k, v], list(problem)[: len(_cuda_ops.Options._fields) - 1])


def test_an_expanded_dout(kernels: Any) -> None:
    q, k, v = tensors(torch.float16, 1, 2, 33, 64)
    out, lse, _ = torch.ops.foveal.attention_forward(q, k, v)
    dout = torch.ones((), dtype=torch.float16).expand(out.shape)
    found = kernels["attention_backward"](dout, None, out, lse, q, k, v)
    expected = torch.ops.foveal.attention_backward(dout, None, out, lse, q, k, v)
    expect_close(found[2], expected[2], torch.float16)
    assert found[3].numel() == found[4].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_sequences_agree_with_the_cpu(kernels: Any, dtype: Any) -> None:
    q, k, v = tensors(dtype, 60, 4, 64)
    begins = [torch.tensor([0, 9, 9, 50]), torch.tensor([5, 20, 31, 60])]
    scores = [None, None, None, torch.randn(4), *(None,) * 5, 0.0, True, None, 30, None]
    found = kernels["attention_varlen_forward"](q, k, v, *begins, *scores)
    expected = torch.ops.foveal.attention_varlen_forward(q, k, v, *begins, *scores)
    expect_close(found[0], expected[0], dtype)
    torch.testing.assert_close(torch.isinf(found[1]), torch.isinf(expected[1]))
    full = list(PackedOptions(*scores))
    check_gradients(kernels, "attention_varlen", dtype, [q, k, v, *begins], full)


@pytest.mark.parametrize("kind", ["rows", "chosen rows", "pages"])
@pytest.mark.parametrize("appended", [0, 3])
def test_a_cache_agrees_with_the_cpu(kernels: Any, kind: str, appended: int) -> None:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, 3, heads, 64, generator=generator).half() for heads in (4, 2, 2))
    k, v = (x[:, :appended] if appended else None for x in (k, v))
    shape = {"rows": (2, 40, 2, 64), "chosen rows": (5, 40, 2, 64), "pages": (9, 16, 2, 64)}[kind]
    caches = [torch.randn(shape, generator=generator).half() for _ in range(2)]
    table = torch.tensor([[3, 8, 1], [0, 7, 5]], dtype=torch.int32) if kind == "pages" else None
    chosen = torch.tensor([4, 1]) if kind == "chosen rows" else None
    lens = torch.tensor([29, 5], dtype=torch.int32)
    mine, theirs = ([x.clone() for x in caches] for _ in range(2))
    last = [lens, k, v, table, chosen, None, None, None, None, False, *(None,) * 9, 0.0, True]
    expected = torch.ops.foveal.attention_kvcache(q, *theirs, *last)
    on_gpu = torch.cuda.is_available() and _cuda.experimental()
    arguments = [x.cuda() if on_gpu and isinstance(x, torch.Tensor) else x for x in (q, *mine, *last)]
    op = torch.ops.foveal.attention_kvcache if on_gpu else kernels["attention_kvcache"]
    found = op(*arguments)
    expect_close(found[0].cpu(), expected[0], torch.float16)
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-3, atol=1e-3)
    for cache, wanted in zip(arguments[1:3], theirs, strict=True):
        torch.testing.assert_close(cache.cpu(), wanted, rtol=0, atol=0)


def test_what_a_cache_on_the_gpu_lacks_is_named(kernels: Any) -> None:
    q, k, v = tensors(torch.float16, 1, 8, 2, 64)
    tables = [torch.zeros(8, 32)] * 2
    with pytest.raises(NotImplementedError, match="attention_kvcache: rotary_cos is given, which the CUDA backend"):
        kernels["attention_kvcache"](q, k, v, torch.tensor([4]), None, None, None, None, None, None, *tables)


def test_out_may_have_any_strides(kernels: Any) -> None:
    q, k, v = tensors(torch.float16, 1, 2, 33, 64)
    out = torch.zeros(1, 33, 64, 2, dtype=torch.float16).permute(0, 3, 1, 2)
    device = "cuda" if torch.cuda.is_available() and _cuda.experimental() else "cpu"
    moved = [x.to(device) for x in (out, q, k, v)]
    op = kernels["attention_forward_out"] if device == "cpu" else torch.ops.foveal.attention_forward_out
    op(*moved)
    out = moved[0].cpu()
    expect_close(out, torch.ops.foveal.attention_plain(q, k, v), torch.float16)


def test_arguments_are_refused_in_the_words_of_the_cpu(kernels: Any) -> None:
    q, k, v = tensors(torch.float16, 1, 2, 33, 64)
    with pytest.raises(ValueError, match=r"attention: window\[0\] is -3, expected at least 0"):
        kernels["attention_forward"](q, k, v, *_cuda_ops.Options(window_left=-3))
    with pytest.raises(TypeError, match=r"attention: mask has dtype float32, expected bool"):
        kernels["attention_forward"](q, k, v, *_cuda_ops.Options(mask=torch.ones(33, 33)))
    with pytest.raises(TypeError, match=r"attention: bias is on meta, expected cpu \(from q\)"):
        kernels["attention_forward"](q, k, v, *_cuda_ops.Options(bias=torch.ones(33, 33, device="meta")))


def test_nothing_is_registered_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOVEAL_CUDA", raising=False)
    assert not _cuda_ops.register(torch.library.Library("foveal", "FRAGMENT"), "attention_plain")
