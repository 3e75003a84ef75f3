"""foveal.compat.flash_attn against the formula in plain torch operations."""

import doctest
import inspect
import math
import os
import subprocess
import sys

import pytest
import torch
from flash_attn_reference import DTYPES, assert_close, plain_attention, random

from foveal.compat import flash_attn
from foveal.compat.flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

# In the original's order, with its defaults (flash-attn 2.8).
TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
NONE = inspect.Parameter.empty
VARLEN = {"cu_seqlens_q": NONE, "cu_seqlens_k": NONE, "max_seqlen_q": NONE, "max_seqlen_k": NONE}
SIGNATURES = {
    "flash_attn_func": {"q": NONE, "k": NONE, "v": NONE, **TAIL},
    "flash_attn_kvpacked_func": {"q": NONE, "kv": NONE, **TAIL},
    "flash_attn_qkvpacked_func": {"qkv": NONE, **TAIL},
    "flash_attn_varlen_func": {"q": NONE, "k": NONE, "v": NONE, **VARLEN, **TAIL, "block_table": None},
    "flash_attn_varlen_kvpacked_func": {"q": NONE, "kv": NONE, **VARLEN, **TAIL},
    "flash_attn_varlen_qkvpacked_func": {"qkv": NONE, "cu_seqlens": NONE, "max_seqlen": NONE, **TAIL},
    "flash_attn_with_kvcache": {
        "q": NONE,
        "k_cache": NONE,
        "v_cache": NONE,
        "k": None,
        "v": None,
        "rotary_cos": None,
        "rotary_sin": None,
        "cache_seqlens": None,
        "cache_batch_idx": None,
        "cache_leftpad": None,
        "block_table": None,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert list(parameters) == list(SIGNATURES[name])
    assert {key: x.default for key, x in parameters.items()} == SIGNATURES[name]
    assert all(x.kind is x.POSITIONAL_OR_KEYWORD for x in parameters.values())


def qkv(seqlen_q=13, seqlen_k=19, dtype=torch.float32):
    return (
        random(2, seqlen_q, 6, 16, dtype=dtype, seed=0),
        random(2, seqlen_k, 2, 16, dtype=dtype, seed=1),
        random(2, seqlen_k, 2, 16, dtype=dtype, seed=2),
    )


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (4, 2)},
    "left window": {"window_size": (4, -1)},
    "right window": {"window_size": (-1, 1)},
    "causal window": {"causal": True, "window_size": (3, 5)},
    "scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 1.5, "softmax_scale": 2.0},
    "alibi": {"alibi_slopes": torch.arange(1.0, 7.0) / 8, "causal": True},
    "alibi of batch": {"alibi_slopes": torch.arange(12.0).reshape(2, 6) / 16},
    "everything": {"causal": True, "window_size": (9, 0), "softcap": 5.0, "alibi_slopes": torch.ones(6) / 4},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(13, 19), (19, 13), (16, 16), (1, 40)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, sizes, dtype):
    q, k, v = qkv(*sizes, dtype=dtype)
    found = flash_attn_func(q, k, v, **OPTIONS[name], deterministic=True)
    expected, expected_lse = plain_attention(q, k, v, **OPTIONS[name])
    assert_close(found, expected, plain_attention(q, k, v.abs(), **OPTIONS[name])[0].double())
    out, lse, dropped = flash_attn_func(q, k, v, **OPTIONS[name], return_attn_probs=True)
    assert torch.equal(out, found)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(lse, expected_lse)
    assert dropped.numel() == 0


def test_positional_arguments():
    q, k, v = qkv()
    slopes = torch.ones(6) / 4
    found = flash_attn_func(q, k, v, 0.0, 0.5, True, (5, 0), 3.0, slopes, False, True)
    expected = flash_attn_func(
        q, k, v, softmax_scale=0.5, causal=True, window_size=(5, 0), softcap=3.0, alibi_slopes=slopes
    )
    assert torch.equal(found[0], expected)


def test_causal_is_aligned_at_the_last_key():
    # One score per row matters: with v the identity, the output is the row of weights.
    eye = torch.eye(2).reshape(1, 2, 1, 2)
    found = flash_attn_func(torch.zeros(1, 5, 1, 2), torch.zeros(1, 2, 1, 2), eye, causal=True)
    assert found[0, :, 0].tolist() == [[0, 0], [0, 0], [0, 0], [1, 0], [0.5, 0.5]]
    eye = torch.eye(5).reshape(1, 5, 1, 5)
    found = flash_attn_func(torch.zeros(1, 2, 1, 5), torch.zeros(1, 5, 1, 5), eye, causal=True)
    assert found[0, :, 0].tolist() == [[0.25, 0.25, 0.25, 0.25, 0], [pytest.approx(0.2)] * 5]


def test_a_query_without_keys():
    q, k, v = qkv(19, 13)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :6] == 0).all()
    assert (lse[:, :, :6] == -math.inf).all()
    assert lse[:, :, 6:].isfinite().all()


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_packed(name):
    q, _, _ = qkv()
    kv = random(2, 19, 2, 2, 16)
    assert torch.equal(
        flash_attn_kvpacked_func(q, kv, **OPTIONS[name]), flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], **OPTIONS[name])
    )
    qkv_packed = random(2, 19, 3, 6, 16)
    expected = flash_attn_func(*qkv_packed.unbind(2), **OPTIONS[name])
    assert torch.equal(flash_attn_qkvpacked_func(qkv_packed, **OPTIONS[name]), expected)
    found = flash_attn_qkvpacked_func(qkv_packed, **OPTIONS[name], return_attn_probs=True)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_whole(name):
    torch._dynamo.reset()
    compiled = torch.compile(flash_attn_func, fullgraph=True, backend="eager")
    q, k, v = qkv()
    assert torch.equal(compiled(q, k, v, **OPTIONS[name]), flash_attn_func(q, k, v, **OPTIONS[name]))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed):
    qkv = random(2, 13, 3, 4, 16, dtype=torch.float64).requires_grad_()
    dout = random(2, 13, 4, 16, dtype=torch.float64, seed=1)
    out = flash_attn_qkvpacked_func(qkv, causal=True) if packed else flash_attn_func(*qkv.unbind(2), causal=True)
    (found,) = torch.autograd.grad(out, qkv, dout)
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected.transpose(1, 2), qkv, dout)[0])
    torch.manual_seed(3)
    dropped = flash_attn_qkvpacked_func(qkv, 0.5, causal=True)
    assert not torch.equal(dropped, out)
    torch.manual_seed(3)
    assert torch.equal(flash_attn_func(*qkv.unbind(2), 0.5, causal=True), dropped)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": random(13, 6, 16)}, ValueError, "flash_attn_func: q has 3 dimensions, expected 4"),
        ({"v": None}, TypeError, "flash_attn_func: v has type NoneType, expected torch.Tensor"),
        ({"window_size": 3}, ValueError, "flash_attn_func: window_size is 3, expected (left, right)"),
        ({"window_size": (1.5, 0)}, ValueError, "flash_attn_func: window_size is (1.5, 0), expected (left, right)"),
        ({"softcap": -1.0}, ValueError, "flash_attn_func: softcap is -1.0, expected 0.0 or more"),
        ({"softcap": None}, TypeError, "flash_attn_func: softcap has type NoneType, expected a number"),
        (
            {"dropout_p": 0.5, "return_attn_probs": True},
            NotImplementedError,
            "flash_attn_func: return_attn_probs is True and dropout_p is 0.5, expected one of them alone",
        ),
        ({"k": random(2, 19, 4, 16)}, ValueError, "attention: "),
        ({"alibi_slopes": torch.ones(5)}, ValueError, "attention: alibi_slopes"),
        ({"causal": 1}, TypeError, "attention: causal has type int"),
    ],
)
def test_refused(change, error, text):
    arguments = dict(zip("qkv", qkv(), strict=True))
    with pytest.raises(error) as found:
        flash_attn_func(**{**arguments, **change})
    assert str(found.value).startswith(text)


def test_refused_packs():
    with pytest.raises(ValueError, match=r"^flash_attn_qkvpacked_func: qkv.shape\[2\] is 2, expected 3"):
        flash_attn_qkvpacked_func(random(2, 5, 2, 6, 16))
    with pytest.raises(ValueError, match=r"^flash_attn_kvpacked_func: kv has 4 dimensions, expected 5"):
        flash_attn_kvpacked_func(random(2, 5, 6, 16), random(2, 5, 6, 16))


@pytest.mark.parametrize(
    "function", [flash_attn_func, flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache]
)
def test_examples_in_docstrings(function):
    failed, tried = doctest.testmod(sys.modules[function.__module__])
    assert tried > 2
    assert failed == 0


# --- install ---------------------------------------------------------------------------------------------------------


def run(code, path=None):
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, env=environment
    ).stdout.strip()


def test_install_makes_the_name_importable():
    out = run(
        "import foveal.compat.flash_attn as ours, importlib.util, sys\n"
        "assert importlib.util.find_spec('flash_attn') is None\n"
        "assert ours.install() and ours.install()\n"
        "import flash_attn, flash_attn.flash_attn_interface as interface\n"
        "from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache\n"
        "from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input\n"
        "assert flash_attn_func is interface.flash_attn_func is ours.flash_attn_func\n"
        "assert importlib.util.find_spec('flash_attn') is not None\n"
        "assert int(flash_attn.__version__.split('.')[0]) == 2\n"
        "try:\n"
        "    import flash_attn.layers\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error.name)\n"
    )
    assert out == "flash_attn.layers"


def test_install_leaves_an_installed_flash_attn_alone(tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("here = 'the real one'\n")
    code = (
        "from foveal.compat.flash_attn import install; print(install(), {}); import flash_attn; print(flash_attn.here)"
    )
    assert run(code.format("install()"), tmp_path).split("\n") == ["False False", "the real one"]
    code = "import flash_attn; " + code
    assert run(code.format("install()"), tmp_path).split("\n") == ["False False", "the real one"]
