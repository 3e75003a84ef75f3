"""torch.ops.foveal.*: whole under compile and export, with fake, autocast, vmap and FLOP rules."""

import pytest
import torch
from torch_cases import DTYPES, OPTIONS, Options, ops, qkv

import foveal
from foveal.compat.flash_attn import flash_attn_func, flash_attn_qkvpacked_func
from foveal.compat.torch import scaled_dot_product_attention


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_results_are_like_real_ones(rank, layout, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = [x[(0,) * (4 - rank)].transpose(0, -1).contiguous().transpose(0, -1) for x in qkv(dtype=dtype)]
    if layout == "bshd" and rank > 2:
        tensors = [x.transpose(-2, -3) for x in tensors]
    calls = [
        lambda *x: foveal.attention(*x, layout=layout),
        lambda *x: foveal.attention(*x, layout=layout, return_lse=True, return_weights=True),
        lambda *x: foveal.attention(*x, layout=layout, window=(3, 3), return_lse=True),
    ]
    for call in calls:
        real = call(*tensors)
        with FakeTensorMode() as mode:
            fake = call(*(mode.from_tensor(x) for x in tensors))
        meta = call(*(x.to("meta") for x in tensors))
        for other in (fake, meta):
            for x, y in zip(real, other, strict=True) if isinstance(real, tuple) else [(real, other)]:
                assert (x is None) == (y is None)
                if x is not None:
                    assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def op_calls():
    q, k, v = qkv(heads=2, kv_heads=1, seqlen_q=5, seqlen_kv=7, head_dim=8, value_dim=8)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    lens = torch.tensor([7, 3])
    out = torch.empty(2, 2, 5, 8)
    return {
        "plain": (ops.attention_plain, (q, k, v)),
        "plain causal": (ops.attention_plain, (q, k, v, True, 0.5)),
        "forward": (ops.attention_forward, (q, k, v)),
        "forward mask": (ops.attention_forward, (q, k, v, mask)),
        "forward all": (
            ops.attention_forward,
            (
                *(q, k, v),
                *Options(
                    mask=mask,
                    bias=torch.randn(5, 7),
                    alibi_slopes=torch.rand(2),
                    sinks=torch.rand(2),
                    kv_lens=lens,
                    q_offsets=torch.tensor([1, 2]),
                    causal=True,
                    window_left=4,
                    window_right=4,
                    scale=0.5,
                    softcap=2.0,
                    return_weights=True,
                ),
            ),
        ),
        "forward bshd": (
            ops.attention_forward,
            (*(x.transpose(1, 2) for x in (q, k, v)), *Options(causal=True, q_offset=3, bshd=True)),
        ),
        "forward float64": (ops.attention_forward, tuple(x.double() for x in (q, k, v))),
        "forward bfloat16": (ops.attention_forward, tuple(x.bfloat16() for x in (q, k, v))),
        "out": (ops.attention_forward_out, (out, q, k, v)),
        "out weights": (
            ops.attention_forward_out,
            (out, q, k, v, *Options(mask=mask, window_left=2, window_right=0, return_weights=True)),
        ),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    op, arguments = op_calls()[name]
    torch.library.opcheck(op.default, arguments)


def graph_of(f, *arguments, dynamic):
    """Compile with a backend that keeps the graphs; they must hold the op whole."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    result = torch.compile(f, fullgraph=True, dynamic=dynamic, backend=backend)(*arguments)
    (graph,) = graphs
    return result, [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_dynamo_keeps_the_op_whole(name, dynamic):
    tensors, options = qkv(), OPTIONS[name]
    result, targets = graph_of(lambda *x: foveal.attention(*x, **options), *tensors, dynamic=dynamic)
    plain = not (options.keys() - {"causal", "scale"})
    assert (ops.attention_plain.default if plain else ops.attention_forward.default) in targets
    assert torch.equal(result, foveal.attention(*tensors, **options))


def test_dynamo_keeps_one_graph_for_many_offsets():
    q, k, v = qkv()
    count = 0

    def backend(graph, _):
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(
        lambda q, k, v, i: foveal.attention(q, k, v, causal=True, q_offset=i),
        fullgraph=True,
        dynamic=True,
        backend=backend,
    )
    for i in range(2, 12):
        assert torch.equal(step(q, k, v, i), foveal.attention(q, k, v, causal=True, q_offset=i))
    assert count == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor(dynamic):
    torch._dynamo.reset()
    q, k, v = qkv()

    def block(q, k, v, out):
        first = foveal.attention(q * 2, k, v, causal=True)
        out, lse, _, _ = foveal.attention(q, k, v + 1, kv_lens=[28, 20], window=(9, None), out=out, return_lse=True)
        return first + out, lse, out * 2

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic)
    for seqlen in (35, 35, 28):
        inputs = (q, k[:, :, :seqlen], v[:, :, :seqlen])
        found = compiled(*inputs, torch.empty(2, 6, 19, 16))
        for x, y in zip(found, block(*inputs, torch.empty(2, 6, 19, 16)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


BEGINS = torch.tensor([0, 4, 9])
TWICE = {
    "self-attention": (lambda x: foveal.attention(x, x, x), [(1, 2, 4, 8)]),
    "keys are values": (
        lambda x, y: foveal.attention(x, y, y, causal=True, return_lse=True)[:2],
        [(2, 4, 8), (2, 6, 8)],
    ),
    "bias too": (lambda x: foveal.attention(x, x, x, bias=x, sinks=x[0, :, 0, 0]), [(1, 2, 8, 8)]),
    "dropout": (lambda x: foveal.attention(x, x, x, dropout_p=0.3, seed=3), [(4, 8)]),
    "packed": (lambda x: foveal.attention_varlen(x, x, x, BEGINS, BEGINS, causal=True), [(9, 2, 8)]),
    "offsets too": (lambda x: foveal.attention_varlen(x, x, x, BEGINS, BEGINS, q_offset=BEGINS[1:]), [(9, 2, 8)]),
    "compat": (lambda x: scaled_dot_product_attention(x, x, x, is_causal=True), [(3, 1, 2, 4, 8)]),
    "flash": (lambda x: flash_attn_func(x, x, x, causal=True, window_size=(2, 1)), [(1, 4, 2, 8)]),
    "flash packed": (lambda x: flash_attn_qkvpacked_func(x, softcap=2.0), [(1, 4, 3, 2, 8)]),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", TWICE)
def test_one_tensor_in_two_places_compiles_with_gradients(name, dynamic):
    call, shapes = TWICE[name]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def loss(*leaves):
        results = call(*leaves)
        return sum(x.sin().sum() for x in (results if isinstance(results, tuple) else (results,)))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_one_cache_of_keys_and_values_compiles():
    def call(x, cache, lens):
        latent = foveal.attention_kvcache(x, cache, cache[..., :4], cache_lens=lens)
        return latent, foveal.attention_kvcache(x, cache, cache, cache_lens=lens, cache_batch_idx=lens)

    inputs = (torch.randn(1, 2, 2, 8), torch.randn(1, 6, 2, 8), torch.tensor([0]))
    torch._dynamo.reset()
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs)
    for x, y in zip(found, call(*inputs), strict=True):
        assert torch.equal(x, y)


def test_compiled_transforms_and_direct_ops_have_gradients():
    x = torch.randn(3, 2, 4, 8)

    def by_function(x):
        return foveal.attention(x, x * 2, x).sin().sum()

    def by_op(x):
        return ops.attention_plain(x, x * 2, x).sin().sum()

    (expected,) = torch.autograd.grad(by_function(leaf := x.clone().requires_grad_()), leaf)
    for loss in (by_function, by_op):
        for transform in (torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss))):
            torch._dynamo.reset()
            for call in (transform, torch.compile(transform, fullgraph=True, backend="aot_eager")):
                torch.testing.assert_close(call(x), expected, rtol=1e-6, atol=1e-6)


def test_calls_of_other_ranks_compile_again():
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: foveal.attention(q, k, k, causal=True), fullgraph=True, backend="aot_eager")
    for lead in ((), (2,), (3, 2), (4, 2)):
        for lens in ((5, 7), (7, 7), (1, 9)):
            q, k = (torch.randn(*lead, n, 8) for n in lens)
            assert torch.equal(compiled(q, k), foveal.attention(q, k, k, causal=True))


class BySize(torch.nn.Module):
    """Options that are computed from sizes, so symbols while the program is traced."""

    def forward(self, q, k):
        n, m = q.shape[2], k.shape[2]
        decode = foveal.attention(q, k, k, causal=n > 1)
        shifted = foveal.attention(q, k, k, causal=True, q_offset=m - n, window=(m, None))
        return decode, shifted, scaled_dot_product_attention(q, k, k, is_causal=n > 1)


@pytest.mark.parametrize("strict", [False, True])
def test_options_may_be_symbols(strict):
    seqlen_q, seqlen_kv = torch.export.Dim("seqlen_q", min=2, max=99), torch.export.Dim("seqlen_kv", min=2, max=99)
    inputs = (torch.randn(1, 2, 8, 8), torch.randn(1, 2, 9, 8))
    dims = ({2: seqlen_q}, {2: seqlen_kv})
    program = torch.export.export(BySize(), inputs, dynamic_shapes=dims, strict=strict).module()
    for lens in ((8, 9), (12, 12), (12, 30), (30, 5)):
        q, k = (torch.randn(1, 2, n, 8) for n in lens)
        for x, y in zip(program(q, k), BySize()(q, k), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"causal": 1}, "causal has type int, expected bool"),
        ({"layout": "b"}, "layout is 'b', expected 'bhsd' or 'bshd'"),
        ({"window": (True, None)}, r"window\[0\] has type bool, expected an integer or None"),
        ({"window": 3}, r"window has type int, expected \(left, right\)"),
        ({"q_offset": "a"}, "q_offset holds a str, expected integers"),
        ({"seed": -3, "dropout_p": 0.5}, "seed is -3, expected 0 to 2"),
    ],
)
def test_fake_tensors_hear_the_same_words(options, text):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.randn(1, 2, 3, 8)
        with pytest.raises((TypeError, ValueError), match=f"^attention: {text}"):
            foveal.attention(q, q, q, **options)
        if "layout" not in options:
            with pytest.raises((TypeError, ValueError), match=f"^attention_varlen: {text}"):
                foveal.attention_varlen(q[0], q[0], q[0], torch.tensor([0, 2]), torch.tensor([0, 2]), **options)


class Layer(torch.nn.Module):
    def forward(self, q, k, v, kv_lens):
        result = foveal.attention(q, k, v, causal=True, kv_lens=kv_lens, return_lse=True)
        return result.out, result.lse, foveal.attention(q, k, v)


def test_export_and_its_round_trip(tmp_path):
    batch, seqlen = torch.export.Dim("batch", min=2), torch.export.Dim("seqlen", min=2)
    shapes = ({0: batch}, {0: batch, 2: seqlen}, {0: batch, 2: seqlen}, {0: batch})
    lens = torch.tensor([35, 12])
    program = torch.export.export(Layer(), (*qkv(), lens), dynamic_shapes=shapes)
    targets = {node.target for node in program.graph.nodes}
    assert {ops.attention_forward.default, ops.attention_plain.default} <= targets

    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    q, k, v = qkv(batch=3, seqlen_kv=50, seed=5)
    lens = torch.tensor([50, 49, 0])
    for x, y in zip(loaded(q, k, v, lens), Layer()(q, k, v, lens), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_and_v(dtype):
    q, k, v = qkv()
    bias = torch.randn(19, 35)
    for options in ({}, {"bias": bias}, {"out": torch.empty(2, 6, 19, 16, dtype=dtype)}):
        expected = foveal.attention(q.to(dtype), k.to(dtype), v.to(dtype), **options).clone()
        with torch.autocast("cpu", dtype=dtype):
            found = foveal.attention(q, k.to(dtype), v, **options)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    with torch.autocast("cpu", dtype=dtype):
        assert foveal.attention(*(x.double() for x in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_vmap(rank, layout):
    n = 3
    g = torch.Generator().manual_seed(3)
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 7, 8), "v": (2, 2, 7, 6)}
    if layout == "bshd":
        shapes = {name: (b, s, h, d) for name, (b, h, s, d) in shapes.items()}
    if rank == 2:
        shapes = {"q": (5, 8), "k": (7, 8), "v": (7, 6)}
    elif rank == 3:
        shapes = {name: shape[1:] for name, shape in shapes.items()}
    batch, heads = (2 if rank == 4 else 1), (1 if rank == 2 else 4)
    arguments = {name: torch.randn(n, *shape, generator=g) for name, shape in shapes.items()}
    per_example = {
        "mask": torch.rand(n, 5, 7, generator=g) > 0.2,
        "bias": torch.randn(n, heads, 5, 7, generator=g),
        "alibi_slopes": torch.rand(n, heads, generator=g),
        "sinks": torch.randn(n, heads, generator=g),
        "kv_lens": torch.randint(1, 8, (n, batch), generator=g),
        "q_offset": torch.randint(0, 4, (n, batch), generator=g),
    }

    def call(q, k, v, options):
        result = foveal.attention(q, k, v, **options, causal=True, layout=layout, return_lse=True, return_weights=True)
        return result[:3]

    cases = [({}, {})]
    cases += [({name: x}, {name: 0}) for name, x in per_example.items()]
    cases += [({name: x[0]}, {name: None}) for name, x in per_example.items()]
    cases += [(per_example, dict.fromkeys(per_example, 0))]
    for options, option_dims in cases:
        for dims in [(0, 0, 0), (0, None, None), (None, 0, 0), (-1, 1, 0)]:

            def place(x, dim):
                return x[0] if dim is None else x.movedim(0, dim)

            qkv_placed = [place(x, dim) for x, dim in zip(arguments.values(), dims, strict=True)]
            found = torch.vmap(call, in_dims=(*dims, option_dims))(*qkv_placed, options)
            for i in range(n):
                chosen = [x[0] if dim is None else x[i] for x, dim in zip(arguments.values(), dims, strict=True)]
                picked = {name: x if option_dims[name] is None else x[i] for name, x in options.items()}
                for x, y in zip(found, call(*chosen, picked), strict=True):
                    assert torch.equal(x[i], y)
    plain = torch.vmap(lambda q, k: foveal.attention(q, k, arguments["v"][0]) if layout == "bhsd" else q, (1, None))
    if layout == "bhsd":
        found = plain(arguments["q"].movedim(0, 1), arguments["k"][0])
        assert torch.equal(found[2], foveal.attention(arguments["q"][2], arguments["k"][0], arguments["v"][0]))


def test_nested_vmap():
    q, k, v = qkv()
    nested = torch.vmap(torch.vmap(lambda q, k, v: foveal.attention(q, k, v)))  # over batch, then over groups of heads
    grouped = [q.unflatten(1, (2, 3)), k.unflatten(1, (2, 1)), v.unflatten(1, (2, 1))]
    assert torch.equal(nested(*grouped).flatten(1, 2), foveal.attention(q, k, v))


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = qkv()
    expected = 2 * 2 * 6 * 19 * 35 * (24 + 16)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    for call in (
        lambda: foveal.attention(q, k, v, causal=True),
        lambda: foveal.attention(q, k, v, window=(1, 1), return_lse=True),
        lambda: foveal.attention(*swapped, layout="bshd"),
        lambda: foveal.attention(q, k, v, out=torch.empty(2, 6, 19, 16)),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == expected


def test_the_profiler_names_the_op():
    q, k, v = qkv()
    with torch.profiler.profile() as profile:
        foveal.attention(q, k, v)
    assert "foveal::attention_plain" in {event.key for event in profile.key_averages()}
