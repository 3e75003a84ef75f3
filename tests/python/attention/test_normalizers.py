"""The normalisers against the papers' formulas in float64, their edges, and their gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import foveal

SPARSE = ("sparsemax", "entmax15")
HIDING = (*SPARSE, "relu")
OTHERS = (*HIDING, "sigmoid", "normalized_sigmoid")


def threshold(s: np.ndarray, normalizer: str) -> float:
    """Sort (Martins & Astudillo 2016, algorithm 1; Peters et al. 2019, algorithm 2); s less its largest, halved."""
    z = np.sort(s)[::-1]
    k = np.arange(1, len(z) + 1, dtype=z.dtype)
    mean = np.cumsum(z) / k
    if normalizer == "sparsemax":
        tau = mean - 1 / k
    else:
        spread = (1 - (np.cumsum(z * z) - k * mean**2)) / k
        tau = mean - np.sqrt(np.maximum(spread, 0))
    return float(tau[np.nonzero(tau < z)[0][-1]])


def weights_of(scores: np.ndarray, counted: np.ndarray, normalizer: str) -> np.ndarray:
    """Weigh scores (..., Skv), -inf where hidden, by a formula written for rows; ``counted``: what n counts."""
    out = np.zeros_like(scores)
    for index in np.ndindex(scores.shape[:-1]):
        s, seen, n = scores[index], scores[index] > -np.inf, scores.dtype.type(counted[index].sum())
        if not seen.any():
            continue
        x = s[seen]
        if normalizer in SPARSE:
            unit = 1.0 if normalizer == "sparsemax" else 0.5
            z = unit * (x - x.max())
            w = np.maximum(z - threshold(z, normalizer), 0) ** (1 if normalizer == "sparsemax" else 2)
        elif normalizer == "relu":
            w = np.maximum(x, 0) / n
        elif normalizer == "sigmoid":
            w = 1 / (1 + n * np.exp(-x))
        else:
            log = np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))
            w = np.exp(log - log.max())
            w /= w.sum()
        out[index][seen] = w
    return out


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Arguments of a float64 call, its scores (-inf where hidden) and which keys position and length leave."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, keys = draw(st.sampled_from([1, 2, 9, 30])), draw(st.sampled_from([1, 2, 7, 40, 130]))
    head_dim, heads = draw(st.integers(1, 9)), kv_heads * group
    q = rng.standard_normal((batch, heads, rows, head_dim)) * draw(st.sampled_from([0.1, 1.0, 6.0]))
    k = rng.standard_normal((batch, kv_heads, keys, head_dim))
    v = rng.standard_normal((batch, kv_heads, keys, 5))
    call: dict[str, Any] = {"q": q, "k": k, "v": v}
    scores = np.einsum("bhid,bhjd->bhij", q, k.repeat(group, 1)) / np.sqrt(head_dim)
    position = np.arange(rows)[:, None] + keys - rows
    counted = np.ones((batch, heads, rows, keys), bool)
    if draw(st.booleans()):
        call["softcap"] = 2.0
        scores = 2 * np.tanh(scores / 2)
    if draw(st.booleans()):
        call["q_offset"] = offset = draw(st.integers(-3, keys))
        position = np.arange(rows)[:, None] + offset
    if draw(st.booleans()):
        call["alibi_slopes"] = slopes = rng.random(heads)
        scores = scores - slopes[:, None, None] * abs(position - np.arange(keys))
    if draw(st.booleans()):
        call["causal"] = True
        counted &= np.arange(keys) <= position
    if draw(st.booleans()):
        call["window"] = (3, 2)
        counted &= (np.arange(keys) >= position - 3) & (np.arange(keys) <= position + 2)
    if "q_offset" in call and draw(st.booleans()):
        call["kv_lens"] = lens = rng.integers(0, keys + 1, batch)
        counted &= np.arange(keys) < lens[:, None, None, None]
    hidden = ~counted
    if draw(st.booleans()):
        call["mask"] = mask = rng.random((1, heads, rows, keys)) < 0.7
        hidden = hidden | ~mask
    if draw(st.booleans()):
        call["bias"] = bias = np.where(rng.random((heads, rows, keys)) < 0.1, -np.inf, rng.standard_normal(keys))
        scores = scores + bias
    return call, np.where(hidden, -np.inf, scores), counted


@pytest.mark.parametrize("normalizer", OTHERS)
@given(call=calls())
def test_float64_is_the_formula(isa: str, normalizer: str, call: Any) -> None:
    arguments, scores, counted = call
    expected = weights_of(scores, counted, normalizer)
    found = foveal.attention(**arguments, normalizer=normalizer, return_weights=True)
    scale = max(1.0, abs(scores[np.isfinite(scores)]).max(initial=0))
    np.testing.assert_allclose(found.weights, expected, rtol=0, atol=1e-12 * scale)
    heads, kv_heads = arguments["q"].shape[1], arguments["k"].shape[1]
    out = expected @ arguments["v"].repeat(heads // kv_heads, 1)
    np.testing.assert_allclose(found.out, out, rtol=0, atol=1e-12 * scale * max(1, abs(expected).sum(-1).max()))
    again = foveal.attention(**arguments, normalizer=normalizer)  # the few-rows kernel, where there are few
    np.testing.assert_allclose(again, found.out, rtol=0, atol=1e-12 * scale * max(1, abs(expected).sum(-1).max()))
    if normalizer in (*SPARSE, "normalized_sigmoid"):
        sums = found.weights.sum(-1)[(scores > -np.inf).any(-1)]
        np.testing.assert_allclose(sums, 1, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("normalizer", OTHERS)
def test_float32_is_as_good_as_the_plain_formula(isa: str, normalizer: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 4, 300, 64), dtype=np.float32)
    exact = np.einsum("bhid,bhjd->bhij", q.astype(float), k.astype(float)) / 8
    counted = np.ones(exact.shape, bool)
    truth = weights_of(exact, counted, normalizer) @ v.astype(float)
    plain = (torch.from_numpy(q) @ torch.from_numpy(k).mT / 8).numpy()
    ours = foveal.attention(q, k, v, normalizer=normalizer)
    formula = weights_of(plain, counted, normalizer) @ v  # every step in float32
    assert formula.dtype == np.float32
    assert np.sqrt(((ours - truth) ** 2).mean()) <= 2 * np.sqrt(((formula - truth) ** 2).mean())


def by_bias(scores: list[float] | np.ndarray, normalizer: str, dtype: Any = np.float64, rows: int = 1) -> np.ndarray:
    """Give the weights of one row of given scores, repeated."""
    bias = np.asarray(scores, dtype)
    zeros = np.zeros((1, 1, len(bias), 1), dtype)
    q = np.zeros((1, 1, rows, 1), dtype)
    weights = foveal.attention(q, zeros, zeros, bias=bias, normalizer=normalizer, return_weights=True).weights
    assert (weights == weights[:, :, :1]).all()
    return weights[0, 0, 0]


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edges(isa: str, dtype: Any, rows: int) -> None:
    for normalizer in (*SPARSE, "normalized_sigmoid"):
        assert by_bias([3.0], normalizer, dtype, rows) == 1  # one key
        np.testing.assert_allclose(by_bias([7.0] * 250, normalizer, dtype, rows), 1 / 250, rtol=1e-5)
    # Ties at the threshold: a key exactly there has weight 0.
    assert list(by_bias([0.0, -1.0, -1.0, -5.0], "sparsemax", dtype, rows)) == [1, 0, 0, 0]
    assert list(by_bias([0.0, -2.0, -2.0, -5.0], "entmax15", dtype, rows)) == [1, 0, 0, 0]
    assert list(by_bias([0.5, 0.0], "sparsemax", dtype, rows)) == [0.75, 0.25]
    for normalizer in SPARSE:
        for large in (1e30, -1e30):
            third = 2 * large if large < 0 else 0
            np.testing.assert_allclose(
                by_bias([large, large, third], normalizer, dtype, rows), [0.5, 0.5, 0], rtol=1e-6
            )
        assert list(by_bias([-np.inf, 2.0, -np.inf], normalizer, dtype, rows)) == [0, 1, 0]
    for normalizer in OTHERS:
        assert not by_bias([-np.inf] * 40, normalizer, dtype, rows).any()
    assert by_bias([1e30, 0.0], "sigmoid", dtype, rows)[0] == 1
    np.testing.assert_allclose(
        by_bias([-300.0, -301.0], "normalized_sigmoid", dtype, rows), [0.731058579, 0.268941421], 1e-4
    )


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("normalizer", OTHERS)
def test_nan(isa: str, normalizer: str, rows: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, n, 4), dtype=np.float32) for n in (rows, 150, 150))
    weights = foveal.attention(q, k, v, normalizer=normalizer, return_weights=True).weights
    if normalizer in HIDING:
        clean = foveal.attention(q, k, v, normalizer=normalizer)
        for key in range(0, 150, 10):
            spoilt = v.copy()
            spoilt[:, :, key] = np.nan
            found = foveal.attention(q, k, spoilt, normalizer=normalizer)
            unseen = weights[..., key] == 0
            assert (np.isnan(found).all(-1) == ~unseen).all()
            np.testing.assert_allclose(found[unseen], clean[unseen], rtol=1e-5, atol=1e-6)
    q[0, 1, 0, 2] = np.nan  # a NaN score makes its row NaN, and no other
    found = np.isnan(foveal.attention(q, k, v, normalizer=normalizer))
    assert found[0, 1, 0].all()
    assert found.sum() == 4


@pytest.mark.parametrize("normalizer", OTHERS)
def test_bits_do_not_depend_on_padding_batch_or_threads(isa: str, normalizer: str) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3, 4, n, 16), dtype=np.float32) for n in (70, 300, 300))
    q_lens, kv_lens = [70, 1, 33], [300, 257, 5]
    options = {"normalizer": normalizer, "causal": True, "q_lens": q_lens, "kv_lens": kv_lens}
    try:
        foveal.set_num_threads(1)
        one = foveal.attention(q, k, v, **options)
        foveal.set_num_threads(2)
        np.testing.assert_array_equal(foveal.attention(q, k, v, **options), one)
    finally:
        foveal.set_num_threads(None)
    for b, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        alone = foveal.attention(
            q[b : b + 1, :, :m], k[b : b + 1, :, :n], v[b : b + 1, :, :n], normalizer=normalizer, causal=True
        )
        np.testing.assert_array_equal(one[b : b + 1, :, :m], alone)
        assert not one[b, :, m:].any()


@pytest.mark.parametrize("normalizer", OTHERS)
def test_packed_sequences_and_caches(isa: str, normalizer: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((n, 4, 16), dtype=np.float32) for n in (50, 200, 200))
    out = foveal.attention_varlen(q, k, v, [0, 7, 50], [0, 30, 200], causal=True, normalizer=normalizer)
    alone = foveal.attention(q[7:], k[30:], v[30:], causal=True, layout="bshd", normalizer=normalizer)
    np.testing.assert_array_equal(out[7:], alone)

    pages = rng.standard_normal((2, 20, 16, 4, 16), dtype=np.float32)
    table = rng.permutation(20)[:12].reshape(2, 6)
    queries = rng.standard_normal((2, 1, 4, 16), dtype=np.float32)
    found = foveal.attention_kvcache(
        queries, *pages, cache_lens=[90, 33], block_table=table, causal=True, normalizer=normalizer
    )
    for b, n in enumerate((90, 33)):
        keys, values = (x[table[b]].reshape(-1, 4, 16)[:n] for x in pages)
        full = foveal.attention(queries[b], keys, values, causal=True, layout="bshd", normalizer=normalizer)
        np.testing.assert_allclose(found[b], full, rtol=2e-5, atol=1e-6)


def test_a_key_per_token_gives_what_the_full_pass_gives() -> None:
    """N counts the keys that position leaves, so a cached step is a row of the causal pass."""
    rng = np.random.default_rng(4)
    q, k, v = rng.standard_normal((3, 1, 20, 2, 8))
    for normalizer in OTHERS:
        full = foveal.attention(q, k, v, causal=True, layout="bshd", normalizer=normalizer)
        caches = np.zeros((2, 1, 20, 2, 8))
        for t in range(20):
            step = foveal.attention_kvcache(
                q[:, t : t + 1], *caches, cache_lens=[t], k=k[:, t : t + 1], v=v[:, t : t + 1], normalizer=normalizer
            )
            np.testing.assert_allclose(step, full[:, t : t + 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("normalizer", OTHERS)
def test_dropout(normalizer: str) -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((3, 1, 2, 60, 8))
    kept = foveal.attention(q, k, v, normalizer=normalizer, return_weights=True).weights
    dropped = foveal.attention(q, k, v, normalizer=normalizer, dropout_p=0.4, seed=9, return_weights=True)
    scaled = dropped.weights * 0.6
    assert (np.isclose(scaled, kept, rtol=1e-12) | (dropped.weights == 0)).all()
    np.testing.assert_allclose(dropped.out, dropped.weights @ v, atol=1e-13)


# ---- PyTorch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", OTHERS)
def test_gradients(isa: str, normalizer: str) -> None:
    torch = pytest.importorskip("torch")
    g = torch.Generator().manual_seed(6)
    shapes = [(1, 4, 5, 3), (1, 2, 9, 3), (1, 2, 9, 4)]
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes)
    bias = torch.randn(1, 4, 1, 9, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 9, generator=g) > 0.2
    for options in (
        {},
        {"causal": True, "softcap": 1.5},
        {"mask": mask, "scale": 2.0},
        {"window": (2, 3), "dropout_p": 0.3, "seed": 4},
    ):
        assert torch.autograd.gradcheck(
            lambda q, k, v, b, o=options: foveal.attention(q, k, v, bias=b, normalizer=normalizer, **o), (q, k, v, bias)
        )
    begins = [0, 2, 5], [0, 4, 9]
    packed = [x[0].transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: foveal.attention_varlen(q, k, v, *begins, causal=True, normalizer=normalizer), packed
    )


@pytest.mark.parametrize("normalizer", OTHERS)
def test_gradients_of_many_rows(isa: str, normalizer: str) -> None:
    """Several tiles and key blocks, where keys without weight are skipped, against torch's own gradient."""
    torch = pytest.importorskip("torch")
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, n, 24, generator=g, dtype=torch.float64, requires_grad=True) for n in (130, 300, 300))
    dout = torch.randn(1, 2, 130, 24, generator=g, dtype=torch.float64)
    s = q @ k.mT / 24**0.5
    if normalizer in SPARSE:  # the gradient of the papers, of weights that are given
        w = foveal.attention(q.detach(), k.detach(), v.detach(), normalizer=normalizer, return_weights=True).weights
        slope = (w > 0).double() if normalizer == "sparsemax" else w.sqrt()
        dw = dout @ v.detach().mT
        ds = slope * (dw - (slope * dw).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True))
        expected = [ds @ k / 24**0.5, ds.mT @ q / 24**0.5, w.mT @ dout]
    else:
        w = {
            "relu": lambda: s.relu() / 300,
            "sigmoid": lambda: (s - np.log(300)).sigmoid(),
            "normalized_sigmoid": lambda: s.sigmoid() / s.sigmoid().sum(-1, keepdim=True),
        }[normalizer]()
        expected = torch.autograd.grad(w @ v, (q, k, v), dout)
    found = torch.autograd.grad(foveal.attention(q, k, v, normalizer=normalizer), (q, k, v), dout)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalizer", OTHERS)
def test_compile_export_vmap_autocast(normalizer: str) -> None:
    torch = pytest.importorskip("torch")

    class Model(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return foveal.attention(q, k, v, normalizer=normalizer, causal=True)

    model = Model()
    q, k, v = torch.randn(3, 2, 2, 9, 8).unbind()
    expected = model(q, k, v)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), expected)
    assert torch.equal(torch.export.export(model, (q, k, v)).module()(q, k, v), expected)

    def loss(q: Any, k: Any, v: Any) -> Any:
        return model(q, k, v).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    for b in range(2):
        torch.testing.assert_close(each[b], torch.func.grad(loss)(q[b], k[b], v[b]))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(q, k, v)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, model(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    index = foveal._core.NORMALIZERS.index(normalizer)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.foveal.attention_forward.default, inputs, {"normalizer": index})


def test_what_a_row_saves_has_no_gradient() -> None:
    torch = pytest.importorskip("torch")
    import foveal.torch

    q, k, v = torch.randn(3, 1, 2, 9, 8).unbind()
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    for normalizer in OTHERS:
        index = foveal._core.NORMALIZERS.index(normalizer)
        out, lse, _ = torch.ops.foveal.attention_forward(*inputs, normalizer=index)
        assert out.requires_grad
        assert not lse.requires_grad
        if normalizer != "normalized_sigmoid":
            with pytest.raises(RuntimeError, match="dlse is given, expected none with normalizer"):
                torch.ops.foveal.attention_backward(out, lse, out, lse, q, k, v, normalizer=index)
