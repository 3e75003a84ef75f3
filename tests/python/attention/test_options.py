"""The one list of options against the literal signatures, the core's functions and the schemas of the ops."""

import inspect

import pytest

import foveal
from foveal import _core
from foveal._options import (
    ADDITIVE,
    ATTENTION,
    FUNCTIONS,
    KVCACHE,
    NAMES,
    OPTIONS,
    REQUESTS,
    STATS,
    core_arguments,
    op_arguments,
)


def keywords(function):
    parameters = inspect.signature(getattr(foveal, function)).parameters
    return {name: x.default for name, x in parameters.items() if x.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_signatures_have_the_options_of_the_list(function):
    listed = {option.name: option.default for option in OPTIONS if function in option.functions and option.name != "u"}
    found = {name: default for name, default in keywords(function).items() if name in NAMES}
    assert found == listed
    others = keywords(function).keys() - set(NAMES)
    requests = {
        ATTENTION: {"out", "return_lse", "return_weights", "return_stats"},
        STATS: {"top_k"},
        ADDITIVE: {"out", "return_weights", "return_stats"},
    }.get(function, {"return_lse"})
    cache = {"cache_lens", "k", "v", "block_table", "cache_batch_idx", "k_scale", "v_scale"}
    cache |= {"rotary_cos", "rotary_sin", "rotary_interleaved"}
    assert others == requests | (cache if function == KVCACHE else set())


@pytest.mark.parametrize("name", [x for x in dir(_core) if "attention" in x and callable(getattr(_core, x))])
def test_core_functions_take_the_list_in_its_order(name):
    text = getattr(_core, name).__text_signature__
    names = [x.strip() for x in text.strip("()").split(",")]
    names = [x for x in names if x not in ("$module", "/")]
    assert names[:3] == ["q", "k", "v"]
    assert names[3 : 3 + len(NAMES) + len(REQUESTS)] == [*NAMES, *REQUESTS]


def test_core_arguments_keep_the_order():
    given = core_arguments({"layout": "bshd", "mask": 1}, return_lse=True)
    assert list(given) == [*NAMES, *REQUESTS]
    assert given == {**{option.name: option.default for option in OPTIONS}, **REQUESTS, **given}
    assert (given["mask"], given["layout"], given["return_lse"]) == (1, "bshd", True)


def test_ops_have_the_arguments_of_the_list():
    torch = pytest.importorskip("torch")
    import foveal.torch  # noqa: F401  registers the ops

    for op, function in (
        ("attention_forward", ATTENTION),
        ("attention_forward_out", ATTENTION),
        ("attention_backward", ATTENTION),
        ("attention_varlen_forward", FUNCTIONS[1]),
        ("attention_varlen_backward", FUNCTIONS[1]),
        ("attention_kvcache", KVCACHE),
        ("attention_forward_stats", ATTENTION),
        ("attention_stats", STATS),
    ):
        schema = getattr(torch.ops.foveal, op).default._schema
        found = {x.name: x.default_value for x in schema.arguments}
        listed = {x.name: x.default for x in op_arguments(function)}
        assert {name: found[name] for name in listed} == listed, op
        assert [name for name in found if name in listed] == list(listed), op
        types = {x.name: str(x.real_type) for x in schema.arguments}
        for x in op_arguments(function):
            assert (
                types[x.name].replace("Optional[", "").rstrip("]")
                in {
                    "Tensor?": ("Tensor",),
                    "bool": ("bool",),
                    "SymInt?": ("SymInt", "int"),
                    "float?": ("float",),
                    "float": ("float",),
                    "int": ("int",),
                }[x.type]
            ), (op, x)
