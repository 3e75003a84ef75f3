"""MultiHeadAttention: beside torch's module and layers, its options written out, positions, caches, errors."""

import copy
import math

import pytest

torch = pytest.importorskip("torch")

from foveal.torch.nn import (  # noqa: E402
    KeyValueCache,
    LearnedRelativeBias,
    Llama3Scaling,
    MultiHeadAttention,
    RotaryEmbedding,
    T5RelativeBias,
    YarnScaling,
    alibi_slopes,
)

E, H = 24, 4


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padding(lens, num_keys=9):
    return torch.arange(num_keys) >= torch.tensor(lens)[:, None]


# --- in torch's place -------------------------------------------------------------------------------------------------


def torch_masks():
    hidden = torch.rand(7, 9, generator=torch.Generator().manual_seed(4)) > 0.6
    hidden[:, 0] = False
    right, left = padding([9, 5, 2]), padding([9, 5, 2]).flip(1)
    both = left.clone()
    both[:, 0] = False
    heads = torch.rand(3 * H, 7, 9, generator=torch.Generator().manual_seed(5)) > 0.5
    heads[..., 0] = False
    added = randn(7, 9, seed=6)
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "bool of heads": {"attn_mask": heads},
        "added": {"attn_mask": added},
        "added -inf": {"attn_mask": torch.zeros(7, 9).masked_fill(hidden, -torch.inf)},
        "right padding": {"key_padding_mask": right},
        "left padding": {"key_padding_mask": left},
        "added padding": {"key_padding_mask": randn(3, 9, seed=7)},
        "padding -inf": {"key_padding_mask": torch.zeros(3, 9).masked_fill(right, -torch.inf)},
        "bool, right padding": {"attn_mask": hidden, "key_padding_mask": right},
        "bool, left padding": {"attn_mask": hidden, "key_padding_mask": both},
        "added, left padding": {"attn_mask": added, "key_padding_mask": left},
        "added, added padding": {"attn_mask": added, "key_padding_mask": randn(3, 9, seed=7)},
    }


MASKS = torch_masks()


def both(batch_first=True, **sizes):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, batch_first=batch_first, **sizes)
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return theirs, MultiHeadAttention.from_torch(theirs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_equals_torch(options, batch_first):
    theirs, ours = both(batch_first, kdim=10, vdim=11)
    inputs = [randn(3, 7, E, seed=1), randn(3, 9, 10, seed=2), randn(3, 9, 11, seed=3)]
    inputs = [(x if batch_first else x.transpose(0, 1)).requires_grad_() for x in inputs]
    dout = randn(3, 7, E, seed=8)
    results = []
    for module in (theirs, ours):
        out, weights = module(*inputs, need_weights=False, **options)
        assert weights is None
        results.append((out, *torch.autograd.grad(out, inputs, dout if batch_first else dout.transpose(0, 1))))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("average", [True, False])
def test_weights_equal_those_of_torch(options, average):
    theirs, ours = both()
    q, k = randn(3, 7, E, seed=1), randn(3, 9, E, seed=2)
    with torch.no_grad():
        found, expected = (
            module(q, k, k, need_weights=True, average_attn_weights=average, **options) for module in (ours, theirs)
        )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_without_a_batch():
    theirs, ours = both()
    q, k, pad = randn(7, E, seed=1), randn(9, E, seed=2), padding([6])[0]
    with torch.no_grad():
        for found, expected in zip(
            *(module(q, k, k, need_weights=True, key_padding_mask=pad) for module in (ours, theirs)), strict=True
        ):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 9), (5, 9), (9, 5)])
def test_is_causal_as_in_torch(lengths):
    theirs, ours = both()
    q, k = (randn(2, length, E, seed=length) for length in lengths)
    hidden = torch.ones(*lengths, dtype=torch.bool).triu(1)
    expected = theirs(q, k, k, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(ours(q, k, is_causal=True)[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(q, k, attn_mask=hidden, is_causal=True)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gives_the_bias():
    _, ours = both()
    x, pad = randn(2, 9, E), padding([9, 0])
    assert torch.equal(ours(x, key_padding_mask=pad)[0][1], ours.out_proj.bias.expand(9, E))


def test_padding_costs_no_bits_and_lets_no_nan_through():
    _, ours = both()
    x = randn(2, 9, E)
    x[1, 5:] = torch.nan
    for pad, keys in ((padding([9, 5]), slice(0, 5)), (padding([9, 5]).flip(1), slice(4, 9))):
        x = x if keys.start == 0 else x.flip(1)
        out = ours(x, key_padding_mask=pad)[0][1, keys]
        torch.testing.assert_close(out, ours(x[1:, keys])[0][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 11}])
def test_state_of_torch_loads_into_a_whole_model(bias, sizes):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.MultiheadAttention(E, H, bias=bias, **sizes))
    ours = torch.nn.Sequential(torch.nn.Linear(3, 3), MultiHeadAttention(E, H, bias=bias, **sizes))
    state = theirs.state_dict()
    names = list(state)
    assert not any(ours.load_state_dict(state))
    assert list(state) == names  # the caller's is as it was
    q, k, v = (randn(7, 3, width, seed=width) for width in (E, ours[1].kdim, ours[1].vdim))
    torch.testing.assert_close(ours[1](q, k, v)[0], theirs[1](q, k, v)[0], rtol=1e-4, atol=1e-5)


def test_state_of_other_sizes_is_refused():
    state = torch.nn.MultiheadAttention(E, H).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"in_proj_weight\""):
        MultiHeadAttention(E, H, num_kv_heads=2).load_state_dict(state)
    with pytest.raises(ValueError, match="the module has add_bias_kv=True, expected False"):
        MultiHeadAttention.from_torch(torch.nn.MultiheadAttention(E, H, add_bias_kv=True))
    with pytest.raises(ValueError, match="the module has add_zero_attn=True, expected False"):
        MultiHeadAttention.from_torch(torch.nn.MultiheadAttention(E, H, add_zero_attn=True))


def test_begins_as_torch_does():
    torch.manual_seed(0)
    ours, theirs = (made(256, 4).requires_grad_(False) for made in (MultiHeadAttention, torch.nn.MultiheadAttention))
    assert ours.in_proj_weight.std() == pytest.approx(theirs.in_proj_weight.std().item(), rel=0.01)
    assert ours.in_proj_weight.abs().max() == pytest.approx(theirs.in_proj_weight.abs().max().item(), rel=0.01)
    assert ours.out_proj.weight.std() == pytest.approx(theirs.out_proj.weight.std().item(), rel=0.02)
    assert not ours.in_proj_bias.any()
    assert not ours.out_proj.bias.any()


ENCODER_CALLS = {
    "plain": {},
    "padding": {"src_key_padding_mask": padding([9, 5, 2])},
    "left padding": {"src_key_padding_mask": padding([9, 5, 2]).flip(1)},
    "causal": {"mask": torch.nn.Transformer.generate_square_subsequent_mask(9)},
    "added": {"mask": randn(9, 9, seed=3)},
    "causal padding": {
        "mask": torch.ones(9, 9, dtype=torch.bool).triu(1),
        "src_key_padding_mask": padding([9, 5, 2]),
    },
}


@pytest.fixture(params=["replaced", "built"])
def encoders(request):
    """torch's encoder, which has fused paths, and the same with ours, put in before or after the layers' copies."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, batch_first=True, dropout=0.0)
    theirs = torch.nn.TransformerEncoder(layer, 2)
    if request.param == "built":
        layer = copy.deepcopy(layer)
        layer.self_attn = MultiHeadAttention(E, H, batch_first=True)
        ours = torch.nn.TransformerEncoder(layer, 2)
        assert not any(ours.load_state_dict(theirs.state_dict()))
    else:
        ours = copy.deepcopy(theirs)
        for layer in ours.layers:
            layer.self_attn = MultiHeadAttention.from_torch(layer.self_attn)
    return theirs, ours


@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("mode", ["train", "eval", "no grad"])
@pytest.mark.parametrize("options", ENCODER_CALLS.values(), ids=ENCODER_CALLS)
def test_stands_in_encoders(encoders, options, mode, monkeypatch):
    x = randn(3, 9, E, seed=1)
    calls = []
    monkeypatch.setattr(
        MultiHeadAttention,
        "forward",
        lambda *a, _forward=MultiHeadAttention.forward, **o: calls.append(0) or _forward(*a, **o),
    )
    with torch.set_grad_enabled(mode != "no grad"):
        theirs, ours = (encoder.train(mode == "train") for encoder in encoders)
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # torch's fused layer gives NaN for a floating mask that adds
        try:
            expected = theirs(x, **options)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
        found = ours(x, **options)
    assert len(calls) == 2
    real = ~options.get("src_key_padding_mask", torch.zeros(3, 9, dtype=torch.bool))
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)


def test_stands_in_decoders_and_the_whole_transformer():
    torch.manual_seed(0)
    theirs = torch.nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    for layer in (*ours.encoder.layers, *ours.decoder.layers):
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                setattr(layer, name, MultiHeadAttention.from_torch(getattr(layer, name)))
    source, target = randn(3, 9, E, seed=1), randn(3, 6, E, seed=2)
    pad = padding([9, 5, 2])
    options = {
        "tgt_mask": torch.ones(6, 6, dtype=torch.bool).triu(1),
        "src_key_padding_mask": pad,
        "memory_key_padding_mask": pad,
    }
    for module in (theirs, ours):
        module.train()
    torch.testing.assert_close(ours(source, target, **options), theirs(source, target, **options), rtol=1e-4, atol=1e-5)
    found, expected = (module.eval()(source, target, tgt_is_causal=True, **options) for module in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_joined_weights_are_for_reading():
    theirs, ours = both()
    assert torch.equal(ours.in_proj_weight, theirs.in_proj_weight)
    assert torch.equal(ours.in_proj_bias, theirs.in_proj_bias)
    assert MultiHeadAttention(E, H, kdim=5).in_proj_weight is None
    assert MultiHeadAttention(E, H, bias=False).in_proj_bias is None


class Adapter(torch.nn.Module):
    """A low-rank adapter as libraries put it around a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = torch.nn.Linear(base.in_features, 2, False), torch.nn.Linear(2, base.out_features, False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_attach():
    _, ours = both()
    x = randn(2, 5, E)
    merged = copy.deepcopy(ours)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        assert type(getattr(ours, name)) is torch.nn.Linear
        adapter = Adapter(getattr(ours, name))
        setattr(ours, name, adapter)
        with torch.no_grad():
            getattr(merged, name).weight += adapter.up.weight @ adapter.down.weight
    torch.testing.assert_close(ours(x)[0], merged(x)[0], rtol=1e-4, atol=1e-5)
    ours(x)[0].sum().backward()
    assert {name for name, x in ours.named_parameters() if x.grad is not None} == {
        f"{role}_proj.{part}.weight" for role in ("q", "k", "v", "out") for part in ("down", "up")
    }


# --- the options, written out -----------------------------------------------------------------------------------------


def written_out(module, query, key, offset, line=None):
    """The module's formula in float64, with all pairs."""
    q, k, v = (
        projection(x).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for projection, x in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, key))
    )
    num_queries, num_keys = q.shape[2], k.shape[2]
    i, j = torch.arange(num_queries)[:, None] + offset, torch.arange(num_keys)
    if module.rotary is not None:
        q, k = turned(module.rotary, q, i[:, 0]), turned(module.rotary, k, j)
    group = module.num_heads // module.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * (module.head_dim**-0.5 if module.scale is None else module.scale)
    if module.softcap:
        s = module.softcap * torch.tanh(s / module.softcap)
    if module.slopes is not None:
        s = s - torch.tensor(module.slopes, dtype=s.dtype)[:, None, None] * (i - j).abs()
    if module.relative_bias is not None:
        s = s + module.relative_bias(j - i)
    left, right = module.window
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    seen &= (j <= i) | torch.tensor(not module.causal)
    seen &= j >= i - (10**6 if left is None else left)
    seen &= j <= i + (10**6 if right is None else right)
    s = s.masked_fill(~seen, -torch.inf)
    if module.sinks is not None:
        s = torch.cat([s, module.sinks[:, None, None].expand(*s.shape[:3], 1)], -1)
    w = s.softmax(-1).nan_to_num(0)[..., :num_keys]
    return module.out_proj((w @ v).transpose(1, 2).flatten(2))


def turned(rotary, x, positions):
    """Multiply pairs of features, as complex numbers, by exp(i * angle)."""
    n = rotary.dim // 2
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if rotary.interleaved else (slice(0, n), slice(n, 2 * n))
    angles = positions[:, None] * torch.tensor(rotary.frequencies, dtype=torch.float64)
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.full_like(angles, rotary.length), angles)
    out = x.clone()
    out[..., first], out[..., second] = z.real, z.imag
    return out


OPTIONS = {
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "causal window, grouped": {"causal": True, "window": (3, None), "num_kv_heads": 2},
    "head dim, scale": {"head_dim": 10, "scale": 0.7},
    "rotary": {"rotary": RotaryEmbedding(6)},
    "rotary interleaved": {"rotary": RotaryEmbedding(6, interleaved=True), "causal": True},
    "rotary partial": {"rotary": RotaryEmbedding(4, base=100.0), "num_kv_heads": 1},
    "rotary partial interleaved": {"rotary": RotaryEmbedding(2, interleaved=True)},
    "rotary llama3": {"rotary": RotaryEmbedding(6, scaling=Llama3Scaling(original_length=16)), "causal": True},
    "rotary yarn": {"rotary": RotaryEmbedding(6, scaling=YarnScaling(4.0, 16)), "causal": True},
    "alibi": {"alibi": True, "causal": True},
    "alibi, both sides": {"alibi": True},
    "t5": {"relative_bias": T5RelativeBias(H, num_buckets=8, max_distance=6), "scale": 1.0},
    "t5 decoder": {"relative_bias": T5RelativeBias(H, bidirectional=False), "scale": 1.0, "causal": True},
    "learned": {"relative_bias": LearnedRelativeBias(H, 3)},
    "learned, causal": {"relative_bias": LearnedRelativeBias(H, 3), "causal": True, "window": (4, None)},
    "learned, window": {"relative_bias": LearnedRelativeBias(H, 0), "window": (2, 3)},
    "sinks": {"sinks": True, "causal": True},
    "softcap": {"softcap": 1.5},
    "everything": {
        "causal": True,
        "window": (5, None),
        "num_kv_heads": 2,
        "rotary": RotaryEmbedding(4),
        "alibi": True,
        "relative_bias": LearnedRelativeBias(H, 4),
        "sinks": True,
        "softcap": 3.0,
    },
}


def with_options(options, dtype=torch.float64):
    torch.manual_seed(1)
    module = MultiHeadAttention(E, H, batch_first=True, **copy.deepcopy(options)).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("lengths", [(9, 9), (4, 9), (11, 3)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_written_out(options, lengths):
    module = with_options(options)
    query, key = (randn(2, length, E, seed=length, dtype=torch.float64) for length in lengths)
    found = module(query, key)[0]
    expected = written_out(module, query, key, lengths[1] - lengths[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    parameters, dout = tuple(module.parameters()), torch.linspace(-1, 1, found.numel()).view_as(found)
    gradients = (torch.autograd.grad((x * dout).sum(), parameters) for x in (found, expected))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [OPTIONS["learned, causal"], OPTIONS["everything"]])
def test_relative_bias_over_several_blocks_with_masks(options):
    module = with_options(options, torch.float32)
    x, pad = randn(2, 1100, E), padding([1100, 700], 1100)
    found = module(x, key_padding_mask=pad)[0]
    exact = copy.deepcopy(module).double()
    expected = [
        written_out(exact, x[b : b + 1, :n].double(), x[b : b + 1, :n].double(), 0)[0] for b, n in ((0, 1100), (1, 700))
    ]
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, :700].double(), expected[1], rtol=1e-4, atol=1e-4)
    (dense,) = torch.autograd.grad(sum(y.sum() for y in expected), exact.relative_bias.weight)
    (own,) = torch.autograd.grad(found[0].sum() + found[1, :700].sum(), module.relative_bias.weight)
    torch.testing.assert_close(own.double(), dense, rtol=1e-3, atol=1e-3 * dense.abs().max().item())


def test_relative_bias_with_masks_and_weights():
    module = with_options(OPTIONS["learned"], torch.float32)
    query, key = randn(3, 7, E, seed=1), randn(3, 9, E, seed=2)
    bias = module.relative_bias(torch.arange(9) - torch.arange(7)[:, None] - 2)
    plain = copy.deepcopy(module)
    plain.relative_bias = None
    with torch.no_grad():
        for options in MASKS.values():
            mask = options.get("attn_mask", torch.zeros(7, 9))
            mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
            mask = (
                mask.expand(12, 7, 9).unflatten(0, (3, 4)) + bias
                if mask.ndim == 2
                else mask.unflatten(0, (3, 4)) + bias
            )
            expected = plain(query, key, need_weights=True, **{**options, "attn_mask": mask.flatten(0, 1)})
            found = module(query, key, need_weights=True, **options)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_dropout():
    torch.manual_seed(0)
    module = MultiHeadAttention(E, H, dropout=0.5, batch_first=True, relative_bias=LearnedRelativeBias(H, 2))
    x = randn(2, 9, E)
    for relative in (module.relative_bias, None):
        module.relative_bias = relative
        module.train()
        torch.manual_seed(1)
        first = module(x)[0]
        assert not torch.equal(module(x)[0], first)
        torch.manual_seed(1)
        assert torch.equal(module(x)[0], first)
        with torch.no_grad():
            mean = sum(module(x)[0] for _ in range(400)) / 400
            module.eval()
            exact = module(x)[0]
        assert torch.equal(module(x)[0], exact)
        assert (mean - exact).abs().max() < 0.25 * (first - exact).abs().max()


def test_normalizer_is_for_the_kernel_to_judge():
    with pytest.raises(ValueError, match="normalizer is 'hardmax', expected 'softmax'"):
        MultiHeadAttention(E, H, normalizer="hardmax")(randn(2, 5, E))


# --- positions, as others compute them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, Llama3Scaling()),
        ({"rope_type": "yarn", "factor": 16.0}, YarnScaling(16.0, 8192)),
        ({"rope_type": "yarn", "factor": 16.0, "truncate": False}, YarnScaling(16.0, 8192, truncate=False)),
        (
            {"rope_type": "yarn", "factor": 16.0, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.5},
            YarnScaling(16.0, 8192, beta_fast=20.0, beta_slow=2.0, attention_factor=1.5),
        ),
    ],
)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_scaled_frequencies_are_those_of_transformers(parameters, scaling, base):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**parameters, "original_max_position_embeddings": 8192, "rope_theta": base}
    config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    expected, length = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    rotary = RotaryEmbedding(128, base=base, scaling=scaling)
    assert rotary.length == pytest.approx(length)
    torch.testing.assert_close(torch.tensor(rotary.frequencies), expected, rtol=1e-5, atol=0)


def test_equals_the_attention_of_llama():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=2, attn_implementation="eager"
    )
    theirs = LlamaAttention(config, 0)
    ours = MultiHeadAttention(
        E, H, bias=False, num_kv_heads=2, causal=True, batch_first=True, rotary=RotaryEmbedding(6, base=10000.0)
    )
    ours.load_state_dict({name.replace("o_proj", "out_proj"): x for name, x in theirs.state_dict().items()})
    x = randn(2, 9, E)
    mask = torch.full((9, 9), -torch.inf).triu(1).expand(2, 1, 9, 9)
    embeddings = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    expected = theirs(x, position_embeddings=embeddings, attention_mask=mask)[0]
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", [False, True])
def test_equals_the_attention_of_t5(decoder):
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    config = transformers.T5Config(d_model=E, d_kv=6, num_heads=H, dropout_rate=0.0, is_decoder=decoder)
    theirs = T5Attention(config, has_relative_attention_bias=True).eval()
    torch.nn.init.normal_(theirs.relative_attention_bias.weight)
    ours = MultiHeadAttention(
        E, H, bias=False, scale=1.0, batch_first=True, relative_bias=T5RelativeBias(H, bidirectional=not decoder)
    )
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj", "relative_attention_bias": "relative_bias"}
    ours.load_state_dict({f"{names[name.split('.')[0]]}.weight": x for name, x in theirs.state_dict().items()})
    x = randn(2, 300, E)
    expected = theirs(x, mask=torch.zeros(2, 1, 300, 300))[0]
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8) == [2.0**-n for n in range(1, 9)]
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(12) == pytest.approx([2.0**-n for n in range(1, 9)] + [2.0 ** (-n / 2) for n in (1, 3, 5, 7)])


def test_positions_stay_exact_in_bfloat16():
    """Far positions differ as those at the beginning do: only the distance counts."""
    rotary = RotaryEmbedding(64).to(torch.bfloat16)
    q, k = randn(1, 1, 1, 64, seed=1, dtype=torch.float64), randn(1, 1, 1, 64, seed=2, dtype=torch.float64)
    near, far = ((rotary(q, torch.tensor([p + 5])) * rotary(k, torch.tensor([p]))).sum() for p in (0, 1_000_000))
    torch.testing.assert_close(far, near, rtol=0, atol=1e-6)


# --- decoding ---------------------------------------------------------------------------------------------------------

CACHED = {name: options for name, options in OPTIONS.items() if options.get("causal")}


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
def test_decoding_equals_the_whole_pass(options, page_size):
    module = with_options(options, torch.float32)
    x = randn(2, 13, E)
    with torch.no_grad():
        expected = module(x)[0]
        cache = module.new_cache(2, 13, page_size=page_size)
        parts = [module(x[:, begin:end], cache=cache)[0] for begin, end in ((0, 5), (5, 6), (6, 7), (7, 13))]
    assert cache.lens.tolist() == [13, 13]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, OPTIONS["rotary partial"], OPTIONS["everything"]], ids=["", "rotary", "all"])
def test_prompts_of_unequal_length(options):
    module = with_options({**options, "causal": True}, torch.float32)
    lens, steps = [6, 2, 4], 3
    prompts, more = randn(3, 6, E, seed=1), randn(3, steps, E, seed=2)
    with torch.no_grad():
        cache = module.new_cache(3, 9, page_size=2, num_pages=5 + 3 + 4)
        first = module(prompts, key_padding_mask=padding(lens, 6), cache=cache)[0]
        assert cache.lens.tolist() == lens
        rest = [module(more[:, t : t + 1], cache=cache)[0] for t in range(steps)]
        for b, length in enumerate(lens):
            alone = module(torch.cat([prompts[b : b + 1, :length], more[b : b + 1]], 1))[0][0]
            found = torch.cat([first[b, :length], *(part[b] for part in rest)])
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_pages_go_back():
    module = with_options({"causal": True}, torch.float32)
    x = randn(2, 8, E)
    with torch.no_grad():
        expected = module(x)[0]
        cache = module.new_cache(2, 8, page_size=4, num_pages=4)
        for _ in range(3):
            torch.testing.assert_close(module(x, cache=cache)[0], expected, rtol=1e-4, atol=1e-5)
            cache.reset()
        module(x[:, :4], cache=cache)
        cache.reset([1])
        assert cache.lens.tolist() == [4, 0]
        assert "3 of 4 pages free" in repr(cache)


def test_memory_of_a_cross_attention():
    _, module = both(kdim=10, vdim=11)
    query, key, value, pad = randn(3, 4, E), randn(3, 9, 10, seed=2), randn(3, 9, 11, seed=3), padding([9, 5, 2])
    with torch.no_grad():
        for mask in (None, pad):
            memory = module.remember(key, value, mask)
            expected = module(query, key, value, key_padding_mask=mask)[0]
            for step in range(4):
                found = module(query[:, step : step + 1], cache=memory)[0]
                torch.testing.assert_close(found, expected[:, step : step + 1], rtol=1e-4, atol=1e-5)
        assert memory.lens.tolist() == [9, 5, 2]


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize(
    "options", [OPTIONS["rotary interleaved"], OPTIONS["learned, causal"]], ids=["rotary", "learned"]
)
def test_decoding_compiles_whole(options, page_size):
    module = with_options(options, torch.float32)
    x = randn(2, 6, E)
    torch.compiler.reset()
    with torch.no_grad():
        expected = module(x)[0]
        cache = module.new_cache(2, 6, page_size=page_size)
        cache.reserve(6)
        step = torch.compile(lambda token: module(token, cache=cache)[0], fullgraph=True, backend="aot_eager")
        found = torch.cat([step(x[:, t : t + 1]) for t in range(6)], 1)
    assert cache.lens.tolist() == [6, 6]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_decoding_in_bfloat16_and_autocast():
    module = with_options(OPTIONS["rotary"] | {"causal": True}, torch.float32)
    x = randn(2, 5, E)
    with torch.no_grad():
        expected = module(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            cache = module.new_cache(2, 5)
            mixed = torch.cat([module(x[:, t : t + 1], cache=cache)[0] for t in range(5)], 1)
        module.bfloat16()
        cache = module.new_cache(2, 5)
        half = torch.cat([module(x[:, t : t + 1].bfloat16(), cache=cache)[0] for t in range(5)], 1)
    assert cache.k.dtype == torch.bfloat16
    for found in (mixed, half):
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().max() / expected.abs().max() < 0.06


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_heads": 5}, "embed_dim is 24, expected a multiple of num_heads 5, or a head_dim"),
        ({"num_heads": 0}, "num_heads is 0, expected 1 or more"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of num_heads 4"),
        ({"dropout": 1.0}, "dropout is 1.0, expected at least 0 and less than 1"),
        ({"head_dim": 0}, "head_dim is 0, expected 1 or more"),
        ({"kdim": 0}, "kdim is 0, expected 1 or more"),
        ({"rotary": RotaryEmbedding(8)}, "rotary turns 8 features, expected at most head_dim 6"),
        ({"relative_bias": LearnedRelativeBias(2, 3)}, "relative_bias has 2 heads, expected num_heads 4"),
    ],
)
def test_refused_settings(options, text):
    with pytest.raises(ValueError, match=text):
        MultiHeadAttention(**{"embed_dim": E, "num_heads": H, **options})


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RotaryEmbedding(5), "RotaryEmbedding: dim is 5, expected an even number above 0"),
        (lambda: RotaryEmbedding(4, base=1.0), "RotaryEmbedding: base is 1.0, expected a number above 1"),
        (lambda: T5RelativeBias(H, num_buckets=3), "num_buckets is 3 and max_distance 128, expected at least 4"),
        (lambda: LearnedRelativeBias(H, -1), "max_distance is -1, expected 0 or more"),
        (lambda: KeyValueCache(0, 1, 1, 1), "batch_size is 0, expected 1 or more"),
        (lambda: KeyValueCache(1, 1, 1, 1, page_size=0), "page_size is 0, expected 1 or more"),
        (lambda: KeyValueCache(1, 1, 1, 1, num_pages=3), "num_pages is 3 without a page_size, expected None"),
    ],
)
def test_refused_parts(make, text):
    with pytest.raises(ValueError, match=text):
        make()


X = randn(3, 9, E)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"query": randn(9)}, ValueError, "query has 1 dimensions, expected 3, or 2 without a batch"),
        ({"query": randn(3, 9, 5)}, ValueError, r"query.shape\[-1\] is 5, expected 24"),
        ({"key": randn(3, 9, 5)}, ValueError, r"key.shape\[-1\] is 5, expected 24"),
        ({"key": randn(9, E)}, ValueError, r"key has 2 dimensions, expected 3 \(from query\)"),
        ({"key": randn(2, 9, E)}, ValueError, r"key.shape\[0\] is 2, expected batch 3 \(from query\)"),
        ({"key": X, "value": X[:, :8]}, ValueError, r"value.shape\[1\] is 8, expected length 9 \(from key\)"),
        (
            {"attn_mask": torch.ones(9, 8) > 0},
            ValueError,
            r"attn_mask has shape \(9, 8\), expected \(queries, keys\) = \(9, 9\)",
        ),
        ({"attn_mask": torch.ones(9, 9).long()}, TypeError, "attn_mask has dtype torch.int64, expected torch.bool or"),
        (
            {"key_padding_mask": padding([9, 9])},
            ValueError,
            r"key_padding_mask has shape \(2, 9\), expected .* = \(3, 9\)",
        ),
        ({"key_padding_mask": padding([9] * 3).long()}, TypeError, "key_padding_mask has dtype torch.int64"),
        ({"query": torch.nested.nested_tensor([X[0]])}, TypeError, "query is a nested tensor, expected a padded one"),
        ({"need_weights": True}, NotImplementedError, "return_weights is asked of inputs that require grad"),
    ],
)
def test_refused_inputs(arguments, error, text):
    module = MultiHeadAttention(E, H, batch_first=True)
    with pytest.raises(error, match=text):
        module(**{"query": X, **arguments})


def test_refused_with_a_cache():
    module = MultiHeadAttention(E, H, batch_first=True)
    causal = MultiHeadAttention(E, H, batch_first=True, causal=True)

    def refuses(error, text, *inputs, module=causal, **options):
        with pytest.raises(error, match=text):
            module(*inputs, **options)

    cache = causal.new_cache(3, 9)
    refuses(NotImplementedError, "an input requires grad, expected no gradient: a cache has none", X, cache=cache)
    assert cache.lens.tolist() == [0, 0, 0]
    with torch.no_grad():
        refuses(ValueError, "need_weights is given with a cache", X, need_weights=True, cache=cache)
        refuses(ValueError, "attn_mask is given with a cache", X, attn_mask=torch.ones(9, 9) > 0, cache=cache)
        refuses(ValueError, r"has a batch of 2, expected 3 \(from cache\)", X[:2], cache=cache)
        refuses(ValueError, "key has 8 tokens, expected the 9 of query", X, X[:, :8], cache=cache)
        refuses(ValueError, "key_padding_mask is .* expected a bool tensor", X, key_padding_mask=X[..., 0], cache=cache)
        left = padding([9, 5, 2]).flip(1)
        refuses(ValueError, "has padding before a token", X, key_padding_mask=left, cache=cache)
        refuses(ValueError, "in a module that is not causal", X, key_padding_mask=left, module=module, cache=cache)
        rotary = MultiHeadAttention(E, H, batch_first=True, rotary=RotaryEmbedding(4))
        refuses(ValueError, "cache is of another module", X, module=rotary, cache=cache)
        causal(X, cache=cache)
        refuses(ValueError, "1 more tokens make 10, expected at most the capacity 9", X[:, :1], cache=cache)
        pages = causal.new_cache(3, 9, page_size=4, num_pages=8)
        refuses(
            ValueError,
            "9 more tokens for each sequence need 9 pages, expected at most the 8 that are free",
            X,
            cache=pages,
        )
        memory = module.remember(X)
        refuses(
            ValueError,
            "key_padding_mask or is_causal is given with a cache of remember",
            X,
            X,
            module=module,
            cache=memory,
        )
        for made in (causal, rotary, MultiHeadAttention(E, H, window=(1, 1)), MultiHeadAttention(E, H, alibi=True)):
            with pytest.raises(ValueError, match="remember is called in a module with"):
                made.remember(X)


def test_repr_names_what_is_set():
    text = repr(MultiHeadAttention(E, H, causal=True, window=(3, None), alibi=True, softcap=2.0, num_kv_heads=2))
    assert (
        "24, 4, dropout=0.0, batch_first=False, num_kv_heads=2, causal=True, window=(3, None), softcap=2.0, alibi=True"
        in text
    )
    assert not math.isnan(RotaryEmbedding(4).length)
