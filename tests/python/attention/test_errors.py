"""Every bad argument raises the right class, and its text names the argument, what was found and what was expected."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from attention_cases import BFLOAT16
from numpy.lib.stride_tricks import as_strided

import foveal

F32 = np.float32
B, HQ, HKV, SQ, SKV, D, DV = 2, 4, 2, 3, 5, 8, 6


def arguments(layout: str = "bhsd", rank: int = 4) -> dict[str, Any]:
    shapes = {"q": (B, HQ, SQ, D), "k": (B, HKV, SKV, D), "v": (B, HKV, SKV, DV)}
    arrays = {name: np.ones(shape, F32) for name, shape in shapes.items()}
    if layout == "bshd":
        arrays = {name: np.ascontiguousarray(array.swapaxes(1, 2)) for name, array in arrays.items()}
    if rank < 4:
        index = (0,) * (4 - rank)
        arrays = {name: array[index] for name, array in arrays.items()}
    return {**arrays, "layout": layout}


def refuse(error: type[Exception], text: str, *, layout: str = "bhsd", rank: int = 4, **changed: Any) -> None:
    with pytest.raises(error) as caught:
        foveal.attention(**{**arguments(layout, rank), **changed})
    assert text in str(caught.value)
    assert str(caught.value).startswith("attention: ")


def misaligned(shape: tuple[int, ...], dtype: Any = F32) -> np.ndarray:
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    return np.frombuffer(bytearray(count * dtype.itemsize + 1), dtype, count, 1).reshape(shape)


def odd_strides(shape: tuple[int, ...], dtype: Any = F32) -> np.ndarray:
    """A field of a packed record: its rows are 5 or 9 bytes apart."""
    return np.zeros(shape, [("pad", "u1"), ("x", dtype)])["x"]


# ---- ranks and shapes -----------------------------------------------------------------------------------------------


def test_ranks() -> None:
    refuse(ValueError, "q has 0 dimensions, expected 2, 3 or 4", q=np.array(1, F32))
    refuse(ValueError, "q has 1 dimension, expected 2, 3 or 4", q=np.ones(8, F32))
    refuse(ValueError, "q has 5 dimensions, expected 2, 3 or 4", q=np.ones((1,) * 5, F32))
    refuse(ValueError, "q has 20 dimensions, expected 2, 3 or 4", q=np.ones((1,) * 20, F32))
    refuse(ValueError, "k has 3 dimensions, expected 4 (from q)", k=np.ones((HKV, SKV, D), F32))
    refuse(ValueError, "v has 0 dimensions, expected 4 (from q)", v=np.array(1, F32))
    refuse(ValueError, "v has 2 dimensions, expected 3 (from q)", rank=3, v=np.ones((SKV, D), F32))


@pytest.mark.parametrize(
    ("layout", "rank", "head", "seq"),
    [("bhsd", 4, 1, 2), ("bshd", 4, 2, 1), ("bhsd", 3, 0, 1), ("bshd", 3, 1, 0)],
)
def test_extents_by_the_axes_of_the_caller(layout: str, rank: int, head: int, seq: int) -> None:
    good = arguments(layout, rank)

    def grown(name: str, axis: int) -> dict[str, np.ndarray]:
        shape = list(good[name].shape)
        shape[axis] += 1
        return {name: np.ones(shape, F32)}

    last = rank - 1
    refuse(
        ValueError, f"k.shape[{last}] is 9, expected head_dim 8 (from q)", layout=layout, rank=rank, **grown("k", last)
    )
    refuse(
        ValueError,
        f"k.shape[{head}] is 3, expected a divisor of num_heads 4 (from q)",
        layout=layout,
        rank=rank,
        **grown("k", head),
        v=np.ones([n + (axis == head) for axis, n in enumerate(good["v"].shape)], F32),
    )
    refuse(
        ValueError,
        f"v.shape[{head}] is 3, expected num_kv_heads 2 (from k)",
        layout=layout,
        rank=rank,
        **grown("v", head),
    )
    refuse(
        ValueError, f"v.shape[{seq}] is 6, expected seqlen_kv 5 (from k)", layout=layout, rank=rank, **grown("v", seq)
    )
    if rank == 4:
        refuse(ValueError, "k.shape[0] is 3, expected batch 2 (from q)", layout=layout, **grown("k", 0))
        refuse(ValueError, "v.shape[0] is 3, expected batch 2 (from q)", layout=layout, **grown("v", 0))
    refuse(
        ValueError,
        f"kv_lens[0] is 6, expected 0 to 5 (k.shape[{seq}])",
        layout=layout,
        rank=rank,
        kv_lens=[6] * len(good["q"]) if rank == 4 else [6],
    )

    out = np.ones((*good["q"].shape[:-1], DV), F32)
    for axis, what in (
        (last, "value head_dim 6 (from v)"),
        (head, "num_heads 4 (from q)"),
        (seq, "seqlen_q 3 (from q)"),
    ):
        shape = [n + (a == axis) for a, n in enumerate(out.shape)]
        refuse(
            ValueError,
            f"out.shape[{axis}] is {shape[axis]}, expected {what}",
            layout=layout,
            rank=rank,
            out=np.ones(shape, F32),
        )
    refuse(ValueError, f"out has {rank - 1} dimensions, expected {rank}", layout=layout, rank=rank, out=out[0])


def test_heads_and_empty_dims() -> None:
    refuse(
        ValueError,
        "k.shape[1] is 0, expected a divisor of num_heads 4",
        k=np.ones((B, 0, SKV, D), F32),
        v=np.ones((B, 0, SKV, D), F32),
    )
    refuse(
        ValueError,
        "k.shape[1] is 8, expected a divisor of num_heads 4",
        k=np.ones((B, 8, SKV, D), F32),
        v=np.ones((B, 8, SKV, D), F32),
    )
    refuse(ValueError, "q.shape[3] is 0, expected a head_dim of at least 1", q=np.ones((B, HQ, SQ, 0), F32))
    refuse(ValueError, "v.shape[3] is 0, expected a value head_dim of at least 1", v=np.ones((B, HKV, SKV, 0), F32))


@pytest.mark.parametrize("name", ["mask", "bias"])
def test_mask_and_bias_shapes(name: str) -> None:
    dtype = bool if name == "mask" else F32
    target = "expected an array that broadcasts to (B, Hq, Sq, Skv) = (2, 4, 3, 5)"
    for shape, found in (
        ((4, 5), ".shape[0] is 4"),
        ((3, 4), ".shape[1] is 4"),
        ((3, 0), ".shape[1] is 0"),
        ((2, 3, 5), ".shape[0] is 2"),
        ((1, 4, 3, 6), ".shape[3] is 6"),
        ((3, 4, 3, 5), ".shape[0] is 3"),
        ((1, 1, 1, 3, 5), " has 5 dimensions"),
        ((1,) * 12, " has 12 dimensions"),
    ):
        refuse(ValueError, f"{name}{found}, {target}", **{name: np.ones(shape, dtype)})
    keys_by_batch = f"{name}.shape[0] is 2, {target}; one of (B, Skv) is {name}[:, None, None, :]"
    refuse(ValueError, keys_by_batch, **{name: np.ones((2, 5), dtype)})
    # In "bshd" too: the scores have one order.
    refuse(ValueError, f"{name}.shape[1] is 3, {target}", layout="bshd", **{name: np.ones((2, 3, 4, 5), dtype)})


def test_per_head_shapes() -> None:
    refuse(
        ValueError,
        "alibi_slopes has shape (3,), expected (Hq,) = (4,) or (B, Hq) = (2, 4)",
        alibi_slopes=np.ones(3, F32),
    )
    refuse(ValueError, "alibi_slopes has shape (4, 2), expected", alibi_slopes=np.ones((4, 2), F32))
    refuse(ValueError, "alibi_slopes has shape (), expected", alibi_slopes=np.array(1, F32))
    refuse(ValueError, "sinks has shape (2, 4), expected (Hq,) = (4,)", sinks=np.ones((2, 4), F32))


# ---- lengths and offsets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seqlen"), [("q_lens", SQ), ("kv_lens", SKV)])
def test_lens(name: str, seqlen: int) -> None:
    source = "q" if name == "q_lens" else "k"
    upper = f"expected 0 to {seqlen} ({source}.shape[2])"
    refuse(ValueError, f"{name}[1] is {seqlen + 1}, {upper}", **{name: [0, seqlen + 1]})
    refuse(ValueError, f"{name}[0] is -1, {upper}", **{name: np.array([-1, 0], np.int32)})
    refuse(ValueError, f"{name}[0] is 255, {upper}", **{name: np.array([255, 0], np.uint8)})
    refuse(ValueError, f"{name}[0] is 2^63 - 1 or more, {upper}", **{name: np.array([2**64 - 1, 0], np.uint64)})
    refuse(ValueError, f"{name}[1] is 2^63 - 1 or more, {upper}", **{name: [0, 10**30]})
    refuse(ValueError, f"{name}[1] is -2^63 or less, {upper}", **{name: [0, -(10**30)]})
    short_array = np.ones(3, np.int16)[1:].reshape(1, 2)  # no place for an int64
    refuse(ValueError, f"{name} has shape (1, 2), expected (B,) = (2,)", **{name: short_array})
    long_array = as_strided(np.ones(1, np.int64), (2**40,), (0,))  # to copy it would take all memory
    refuse(ValueError, f"{name} has shape ({2**40},), expected (B,) = (2,)", **{name: long_array})
    refuse(ValueError, f"{name} has shape (1,), expected (B,) = (2,)", **{name: [1]})
    refuse(ValueError, f"{name} has shape (3,), expected (B,) = (2,)", **{name: (1, 1, 1)})
    refuse(ValueError, f"{name} has shape (), expected (B,) = (2,)", **{name: 1})
    refuse(ValueError, f"{name} has shape (2, 1), expected (B,) = (2,)", **{name: np.ones((2, 1), int)})
    refuse(ValueError, f"{name} has shape (1, 1, 1, 1, 1, 1, 1, 1, ...)", **{name: np.ones((1,) * 10, int)})
    refuse(TypeError, f"{name} has dtype float64, expected integers", **{name: np.ones(2)})
    refuse(TypeError, f"{name} has dtype bool, expected integers", **{name: np.ones(2, bool)})
    refuse(TypeError, f"{name} has dtype object, expected integers", **{name: np.ones(2, object)})
    refuse(TypeError, f"{name} holds a float, expected integers", **{name: [1, 2.0]})
    refuse(TypeError, f"{name} holds a bool, expected integers", **{name: [1, True]})
    refuse(TypeError, f"{name} holds a str, expected integers", **{name: "ab"})
    refuse(ValueError, f"{name} has byte order '>'", **{name: np.ones(2, ">i4")})


def test_q_offset() -> None:
    refuse(ValueError, "q_offset has shape (3,), expected an integer or (B,) = (2,)", q_offset=[1, 2, 3])
    refuse(ValueError, f"q_offset[0] is {2**60}, expected -2^59 to 2^59", q_offset=2**60)
    refuse(ValueError, f"q_offset[1] is {-(2**59) - 1}, expected -2^59 to 2^59", q_offset=[0, -(2**59) - 1])
    refuse(ValueError, "q_offset[0] is -2^63 or less, expected -2^59 to 2^59", q_offset=-(10**30))
    refuse(TypeError, "q_offset holds a float, expected integers", q_offset=1.0)
    refuse(TypeError, "q_offset holds a bool, expected integers", q_offset=True)


# ---- dtypes and types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i4", "?", "c8", "O", "U3", "M8[s]", "g", "V4", "i2"])
def test_unsupported_dtypes(dtype: str) -> None:
    for name in ("q", "k", "v", "bias", "alibi_slopes", "sinks"):
        expected = "expected float32, float64, float16 or bfloat16"
        found = str(np.dtype(dtype))
        if name in "kv" and dtype in ("i4", "?"):
            expected = "expected float32 (from q)"
        shape = (4,) if name in ("alibi_slopes", "sinks") else arguments()[name].shape if name in "qkv" else (5,)
        refuse(TypeError, f"{name} has dtype {found}, {expected}", **{name: np.zeros(shape, dtype)})


def test_object_arrays_are_told_the_way_out() -> None:
    refuse(TypeError, "np.ascontiguousarray(q, dtype='float32')", q=np.ones((B, HQ, SQ, D), object))


def test_mixed_dtypes() -> None:
    refuse(TypeError, "k has dtype float64, expected float32 (from q)", k=np.ones((B, HKV, SKV, D)))
    refuse(TypeError, "v has dtype bfloat16, expected float32 (from q)", v=np.ones((B, HKV, SKV, DV), BFLOAT16))
    refuse(TypeError, "out has dtype float16, expected float32 (from q)", out=np.ones((B, HQ, SQ, DV), np.float16))


def test_mask_is_bool_and_bias_is_floating() -> None:
    refuse(
        TypeError,
        "mask has dtype float32, expected bool (values that are added to the scores are `bias`)",
        mask=np.ones((SQ, SKV), F32),
    )
    refuse(TypeError, "mask has dtype uint8, expected bool", mask=np.ones((SQ, SKV), np.uint8))
    refuse(TypeError, "mask has dtype int64, expected bool", mask=np.ones((SQ, SKV), int))
    refuse(
        TypeError,
        "bias has dtype bool, expected float32, float64, float16 or bfloat16 (a bool array is `mask`)",
        bias=np.ones((SQ, SKV), bool),
    )


class Foreign:
    """Neither an array nor anything near."""


def test_kinds() -> None:
    refuse(TypeError, "q has type list, expected numpy.ndarray, torch.Tensor or an array with __dlpack__", q=[[1.0]])
    refuse(TypeError, "q has type NoneType, expected numpy.ndarray", q=None)
    refuse(TypeError, "q has type numpy.float32, expected numpy.ndarray", q=F32(1))
    refuse(TypeError, "k has type NoneType, expected numpy.ndarray (from q)", k=None)
    refuse(TypeError, "v has type test_errors.Foreign, expected numpy.ndarray (from q)", v=Foreign())
    refuse(TypeError, "mask has type bool, expected numpy.ndarray (from q)", mask=True)
    refuse(TypeError, "bias has type float, expected numpy.ndarray (from q)", bias=1.0)
    refuse(TypeError, "alibi_slopes has type list, expected numpy.ndarray (from q)", alibi_slopes=[1.0] * 4)
    refuse(TypeError, "sinks has type list, expected numpy.ndarray (from q)", sinks=[1.0] * 4)
    refuse(TypeError, "out has type list, expected numpy.ndarray (from q)", out=[])


def test_masked_arrays_would_lose_their_mask() -> None:
    refuse(
        TypeError,
        "q has type numpy.ma.MaskedArray, expected a plain numpy.ndarray",
        q=np.ma.ones((B, HQ, SQ, D), dtype=F32),
    )
    refuse(TypeError, "such as mask.filled(False)", mask=np.ma.ones((SQ, SKV), dtype=bool))
    refuse(TypeError, "such as np.ma.getdata(bias)", bias=np.ma.ones((SQ, SKV), dtype=F32))


def test_tensors_and_arrays_do_not_mix() -> None:
    torch = pytest.importorskip("torch")
    for name in ("k", "v", "mask", "bias", "alibi_slopes", "sinks", "out"):
        refuse(TypeError, f"{name} has type torch.Tensor, expected numpy.ndarray (from q)", **{name: torch.ones(4)})


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_misaligned_arrays() -> None:
    for name, shape in (
        ("q", (B, HQ, SQ, D)),
        ("k", (B, HKV, SKV, D)),
        ("bias", (SQ, SKV)),
        ("sinks", (HQ,)),
        ("out", (B, HQ, SQ, DV)),
    ):
        array = misaligned(shape)
        assert not array.flags.aligned
        refuse(
            ValueError,
            f"{name} is misaligned for float32, expected an aligned array, such as np.ascontiguousarray({name}.copy())",
            **{name: array},
        )
    q = misaligned((B, HQ, SQ, D))
    assert foveal.attention(**{**arguments(), "q": np.ascontiguousarray(q.copy())}).shape == (B, HQ, SQ, DV)


def test_strides_of_a_fraction_of_an_element() -> None:
    for name, shape in (("q", (B, HQ, SQ, D)), ("v", (B, HKV, SKV, DV)), ("bias", (SQ, SKV)), ("sinks", (HQ,))):
        with pytest.raises(
            ValueError, match=rf"attention: {name}\.strides\[\d\] is \d+, expected a multiple of the item size 4"
        ):
            foveal.attention(**{**arguments(), name: odd_strides(shape)})
        refuse(ValueError, f"as in np.ascontiguousarray({name})", **{name: odd_strides(shape)})
    q = np.ascontiguousarray(odd_strides((B, HQ, SQ, D)))
    assert foveal.attention(**{**arguments(), "q": q}).shape == (B, HQ, SQ, DV)
    # The stride of an axis with one element means nothing.
    bias = as_strided(np.ones(SKV, F32), (1, SKV), (3, 4))
    foveal.attention(**arguments(), bias=bias)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
def test_byte_order(dtype: str) -> None:
    name = str(np.dtype(dtype).newbyteorder("="))
    refuse(
        ValueError,
        f"q has byte order '>', expected the native one, as in np.ascontiguousarray(q, dtype='{name}')",
        q=np.ones((B, HQ, SQ, D), dtype),
    )
    refuse(ValueError, "bias has byte order '>'", bias=np.ones((SQ, SKV), dtype))
    # The native order would not make a mask of it.
    refuse(TypeError, f"mask has dtype {name}, expected bool", mask=np.ones((SQ, SKV), dtype))


def test_our_own_byte_order_by_its_mark() -> None:
    marked = np.dtype(F32).newbyteorder("<" if sys.byteorder == "little" else ">")
    assert marked.isnative
    good = arguments()
    np.testing.assert_array_equal(foveal.attention(**{**good, "q": good["q"].view(marked)}), foveal.attention(**good))


def test_out_that_cannot_be_written() -> None:
    out = np.ones((B, HQ, SQ, DV), F32)
    out.flags.writeable = False
    refuse(ValueError, "out is read-only", out=out)
    refuse(
        ValueError,
        "out has elements that share memory",
        out=as_strided(np.ones(DV, F32), (B, HQ, SQ, DV), (0, 0, 0, 4)),
    )
    refuse(
        ValueError,
        "out has elements that share memory",
        out=as_strided(np.ones(100, F32), (B, HQ, SQ, DV), (144, 36, 12, 4)),
    )


def test_out_that_shares_memory_with_an_input() -> None:
    same = np.ones((B, HQ, SQ, D), F32)
    wide_v = {"v": np.ones((B, HKV, SKV, D), F32)}
    refuse(ValueError, "out shares memory with q, expected a separate array", q=same, out=same, **wide_v)
    refuse(ValueError, "out shares memory with q", q=same, out=same[..., ::-1], **wide_v)
    memory = np.ones(1000, F32)
    q = memory[: B * HQ * SQ * D].reshape(B, HQ, SQ, D)
    out = memory[100 : 100 + B * HQ * SQ * D].reshape(B, HQ, SQ, D)
    refuse(ValueError, "out shares memory with q", q=q, out=out, **wide_v)
    bias = np.ones((B, HQ, SQ, DV), F32)
    refuse(ValueError, "out shares memory with bias", bias=bias[..., :SKV], out=bias)


# ---- numbers and flags ----------------------------------------------------------------------------------------------


def test_numbers() -> None:
    for bad, text in ((np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")):
        refuse(ValueError, f"scale is {text}, expected a finite number", scale=bad)
        refuse(ValueError, f"softcap is {text}, expected a finite number of at least 0", softcap=bad)
    refuse(ValueError, "softcap is -0.5, expected a finite number of at least 0", softcap=-0.5)
    refuse(ValueError, "scale is beyond float64", scale=10**400)
    refuse(TypeError, "scale has type str, expected a number", scale="1")
    refuse(TypeError, "softcap has type NoneType, expected a number", softcap=None)


def test_window() -> None:
    refuse(ValueError, "window[0] is -1, expected None or at least 0", window=(-1, None))
    refuse(ValueError, "window[1] is -7, expected None or at least 0", window=(None, np.int64(-7)))
    refuse(ValueError, f"window[1] is {-(10**30)}, expected None or at least 0", window=(3, -(10**30)))
    refuse(ValueError, "window has 3 items, expected (left, right)", window=(1, 2, 3))
    refuse(TypeError, "window has type int, expected (left, right)", window=3)
    refuse(TypeError, "window has type NoneType, expected (left, right)", window=None)
    refuse(TypeError, "window[0] has type float, expected an integer or None", window=(1.0, 2))
    refuse(TypeError, "window[0] has type bool, expected an integer or None", window=(True, 2))


def test_flags() -> None:
    for bad, name in ((1, "int"), (None, "NoneType"), ("yes", "str"), (np.ones(1, bool), "numpy.ndarray")):
        refuse(TypeError, f"causal has type {name}, expected bool", causal=bad)
    with pytest.raises(ValueError, match="attention: layout is 'sbhd', expected 'bhsd' or 'bshd'"):
        foveal.attention(**{**arguments(), "layout": "sbhd"})
    with pytest.raises(TypeError, match="attention: layout has type NoneType, expected 'bhsd' or 'bshd'"):
        foveal.attention(**{**arguments(), "layout": None})


def test_normalizers() -> None:
    refuse(ValueError, "normalizer is 'hardmax', expected 'softmax'", normalizer="hardmax")
    refuse(ValueError, "normalizer is 'hardmax', expected 'softmax'", normalizer="hardmax", return_lse=True)
    refuse(TypeError, "normalizer has type int, expected a string", normalizer=1)
    for name in ("sparsemax", "entmax15", "sigmoid", "relu", "normalized_sigmoid"):
        sinks = np.zeros(arguments()["q"].shape[1], np.float32)
        refuse(NotImplementedError, f"sinks with normalizer='{name}'", normalizer=name, sinks=sinks)
        refuse(
            ValueError, f"return_lse is True, expected False with normalizer='{name}'", normalizer=name, return_lse=True
        )


def test_dropout() -> None:
    foveal.attention(**arguments(), seed=3, dropout_p=0)
    for bad in (-0.1, 1.1, np.nan, np.inf):
        refuse(ValueError, f"dropout_p is {bad:g}, expected 0 to 1", dropout_p=bad)
    refuse(TypeError, "dropout_p has type str, expected a number", dropout_p="a")
    for seed in (-1, 2**63, 10**30):
        refuse(ValueError, f"seed is {seed}, expected 0 to 2^63 - 1", dropout_p=0.1, seed=seed)
    for seed, name in ((True, "bool"), (1.0, "float"), ("a", "str")):
        refuse(TypeError, f"seed has type {name}, expected an integer or None", dropout_p=0.1, seed=seed)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_that_overflow() -> None:
    one = np.ones((1, 1, 1, 8), F32)

    def wide(*shape: int) -> np.ndarray:
        return as_strided(one, shape, (0, 0, 0, 4))

    text = "expected fewer than 2^60 elements"
    refuse(ValueError, f"q has shape (1, 1, {2**57}, 8), {text}", q=wide(1, 1, 2**57, 8), k=one, v=one)
    refuse(
        ValueError,
        f"the array of scores has shape (1, 1, {2**40}, {2**40}), {text}",
        q=wide(1, 1, 2**40, 8),
        k=wide(1, 1, 2**40, 8),
        v=wide(1, 1, 2**40, 8),
    )
    refuse(ValueError, text, q=wide(2**30, 2**27, 1, 8), k=wide(2**30, 1, 1, 8), v=wide(2**30, 1, 1, 8))
    refuse(ValueError, text, q=wide(0, 2**30, 2**27, 8), k=wide(0, 1, 1, 8), v=wide(0, 1, 1, 8))


def test_no_memory_for_the_output() -> None:
    # 2^56 elements: beyond any address space, but not beyond an int64.
    one = np.ones((1, 1, 1, 8), F32)
    q = as_strided(one, (1, 1, 2**53, 8), (0, 0, 0, 4))
    with pytest.raises(MemoryError):
        foveal.attention(q, one, one)


def test_a_failed_call_leaves_nothing_behind() -> None:
    good = foveal.attention(**arguments())
    for _ in range(3):
        refuse(TypeError, "mask has dtype", mask=np.ones((SQ, SKV), F32))
        np.testing.assert_array_equal(foveal.attention(**arguments()), good)
