"""foveal.compat.torch against torch's own function."""

import doctest

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa

import foveal.compat.torch
from foveal.compat.torch import scaled_dot_product_attention

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(query=(2, 4, 5, 8), key=(2, 4, 7, 8), value=None, dtype=torch.float32):
    shapes = (query, key, key if value is None else value)
    return [random(*shape, dtype=dtype, seed=n) for n, shape in enumerate(shapes)]


def assert_same_as_torch(q, k, v, *arguments, **options):
    """Compare with torch in float64; what a dtype loses in rounding the output once is all that may differ."""
    found = scaled_dot_product_attention(q, k, v, *arguments, **options)
    mask, *others = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments] or [
        options.get("attn_mask")
    ]
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    rest = {name: x for name, x in options.items() if name != "attn_mask"}
    expected, magnitude = (
        torch_sdpa(q.double(), k.double(), x, mask, *others, **rest) for x in (v.double(), v.double().abs())
    )
    assert found.shape == torch_sdpa(q, k, v, *arguments, **options).shape
    assert found.dtype == q.dtype
    # A sum of at most 70 products of numbers below 5, each weight with its error; then one rounding.
    eps = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).eps
    bound = 200 * eps + torch.finfo(q.dtype).eps * expected.abs()
    if q.dtype == torch.bfloat16:  # a few rows to a head may round their weights to bfloat16 (docs/numerics.md)
        bound += 2.0**-8 * magnitude
    assert ((found.double() - expected).abs() <= bound).all()


MASK = random(5, 7, seed=3) > -0.3
MASK[2] = False  # a query that sees nothing
BIAS = random(2, 4, 5, 7, seed=4)
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "mask": {"attn_mask": MASK},
    "mask of rows": {"attn_mask": MASK[:, :1]},
    "mask of heads": {"attn_mask": (random(4, 5, 7) > 0)},
    "mask of batch": {"attn_mask": (random(2, 1, 1, 7) > 0)},
    "bias": {"attn_mask": BIAS},
    "bias that masks": {"attn_mask": torch.zeros(5, 7).masked_fill(~MASK, -torch.inf)},
    "all": {"attn_mask": BIAS, "scale": 0.3},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    options = dict(OPTIONS[name])
    if "attn_mask" in options and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].to(dtype)
    assert_same_as_torch(*qkv(dtype=dtype), **options)


def test_float_mask_of_half_precision_query():
    assert_same_as_torch(*qkv(dtype=torch.bfloat16), attn_mask=BIAS)


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((5, 8), (7, 8), (7, 3)),
        ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
        ((3, 5, 8), (1, 7, 8), (1, 7, 2)),
        ((1, 5, 8), (3, 7, 8), (3, 7, 8)),
        ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 3)),
        ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        ((2, 4, 5, 8), (1, 4, 7, 8), (2, 4, 7, 8)),
        ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
        ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 8)),
        ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        ((2, 4, 5, 8), (4, 7, 8), (7, 8)),
        ((5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        ((3, 2, 4, 5, 8), (2, 4, 7, 8), (1, 1, 4, 7, 8)),
        ((3, 2, 1, 4, 5, 8), (3, 1, 2, 1, 7, 8), (3, 1, 1, 1, 7, 8)),
        ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
        ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
        ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
        ((2, 3, 70, 8), (2, 3, 33, 8), (2, 3, 33, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_shapes(query, key, value, is_causal):
    arrays = qkv(query, key, value)
    assert_same_as_torch(*arrays, is_causal=is_causal)
    lead = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    for shape in {(), lead[-1:], lead[-2:], lead}:
        mask = random(*shape, query[-2], key[-2]) > 0
        assert_same_as_torch(*arrays, attn_mask=mask)
        assert_same_as_torch(*arrays, attn_mask=mask.to(torch.float32))


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)),
        ((6, 5, 8), (2, 7, 8), (2, 7, 8)),
        ((2, 6, 5, 8), (1, 2, 7, 8), (2, 2, 7, 8)),
        ((2, 6, 5, 8), (2, 2, 7, 8), (2, 3, 7, 8)),
        ((3, 2, 6, 5, 8), (3, 2, 2, 7, 8), (2, 2, 7, 8)),
        ((2, 6, 5, 8), (2, 6, 7, 8), (2, 6, 7, 8)),
    ],
    ids=str,
)
def test_grouped_heads(query, key, value):
    arrays = qkv(query, key, value)
    assert_same_as_torch(*arrays, enable_gqa=True)
    assert_same_as_torch(*arrays, attn_mask=random(6, 5, 7) > 0, enable_gqa=True)


@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1)], ids=str)
def test_causal_is_aligned_at_the_first_key(sizes):
    num_queries, num_keys = sizes
    q, k, v = qkv((1, 2, num_queries, 8), (1, 2, num_keys, 8))
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril()
    assert torch.equal(
        scaled_dot_product_attention(q, k, v, is_causal=True), scaled_dot_product_attention(q, k, v, attn_mask=seen)
    )
    mask = random(num_queries, num_keys) > 0
    assert torch.equal(
        scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True),
        scaled_dot_product_attention(q, k, v, attn_mask=mask & seen),
    )


def test_arguments_are_those_of_torch():
    q, k, v = qkv()
    assert_same_as_torch(q, k, v, BIAS, 0.0, False)
    assert torch.equal(
        scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=True),
        scaled_dot_product_attention(q, k, v, None, 0.0, True),
    )
    for call in (torch_sdpa, scaled_dot_product_attention):
        with pytest.raises(TypeError, match="positional"):
            call(q, k, v, None, 0.0, True, 0.5)


def test_a_masked_key_never_leaks():
    q, k, v = qkv()
    expected = scaled_dot_product_attention(q, k[:, :, :6], v[:, :, :6])
    k[:, :, 6], v[:, :, 6] = torch.nan, torch.inf
    mask = torch.arange(7) < 6
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(5, 7))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_compiles_whole():
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="eager")
    q, k, v = qkv()
    for options in ({}, {"is_causal": True}, {"attn_mask": MASK}, {"attn_mask": BIAS}):
        assert torch.equal(compiled(q, k, v, **options), scaled_dot_product_attention(q, k, v, **options))
    grouped = qkv((2, 6, 5, 8), (1, 2, 7, 8))
    assert torch.equal(compiled(*grouped, enable_gqa=True), scaled_dot_product_attention(*grouped, enable_gqa=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": (8,)}, ValueError, "query has 1 dimensions, expected 2 or more"),
        ({"key": (2, 2, 7, 8)}, ValueError, "have the leading shapes (2, 4), (2, 2) and (2, 4), expected shapes that"),
        (
            {"key": (2, 3, 7, 8), "enable_gqa": True},
            ValueError,
            "key.shape[-3] is 3, expected a divisor of 4 (from query): enable_gqa is True",
        ),
        (
            {"value": (2, 0, 7, 8), "enable_gqa": True},
            ValueError,
            "value.shape[-3] is 0, expected a divisor of 4 (from query): enable_gqa is True",
        ),
        ({"key": (7, 8), "enable_gqa": True}, ValueError, "key has 2 dimensions, expected 3 or more"),
        ({"attn_mask": torch.ones(7, dtype=torch.bool)}, ValueError, "attn_mask has 1 dimensions, expected 2 or more"),
        (
            {"attn_mask": torch.ones(5, 7, dtype=torch.int32)},
            TypeError,
            "attn_mask has dtype torch.int32, expected torch.bool or a floating dtype",
        ),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask has type list, expected torch.Tensor"),
        ({"query": None}, TypeError, "query has type NoneType, expected torch.Tensor"),
        ({"value": "v"}, TypeError, "value has type str, expected torch.Tensor"),
        (
            {"query": (1, 1, 1, 5, 8), "attn_mask": torch.ones(1, 1, 1, 1, 5, 7, dtype=torch.bool)},
            ValueError,
            "attn_mask has 6 dimensions, expected 5 or fewer",
        ),
    ],
)
def test_refused(change, error, text):
    options = {"query": (2, 4, 5, 8), "key": (2, 4, 7, 8), "value": (2, 4, 7, 8), **change}
    arguments = {name: random(*x) if isinstance(x, tuple) else x for name, x in options.items()}
    with pytest.raises(error) as found:
        scaled_dot_product_attention(**arguments)
    assert str(found.value).startswith("scaled_dot_product_attention: ")
    assert text in str(found.value)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"key": random(2, 4, 7, 9)}, ValueError),
        ({"value": random(2, 4, 3, 8)}, ValueError),
        ({"key": random(2, 4, 7, 8).double()}, TypeError),
        ({"attn_mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError),
        ({"is_causal": 1}, TypeError),
        ({"scale": float("nan")}, ValueError),
    ],
)
def test_refused_by_attention(change, error):
    arguments = dict(zip(("query", "key", "value"), qkv(), strict=True))
    with pytest.raises(error, match=rf"^scaled_dot_product_attention: {'|'.join(change)}"):
        scaled_dot_product_attention(**{**arguments, **change})


def test_examples_in_docstrings():
    failed, tried = doctest.testmod(foveal.compat.torch)
    assert tried > 2
    assert failed == 0
