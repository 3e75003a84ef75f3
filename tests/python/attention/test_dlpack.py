"""Arrays of other libraries: borrowed by DLPack, results in the caller's kind."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest
from attention_cases import assert_within, formula

import foveal
from foveal import _core

torch = pytest.importorskip("torch")


class Lender:
    """An array library as small as can be: a tensor that says nothing but DLPack."""

    versioned = True
    device = (1, 0)
    read_only = False

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **unknown: Any) -> Any:
        assert not unknown
        if self.read_only:
            return np_read_only(self.tensor).__dlpack__(max_version=max_version)
        return self.tensor.__dlpack__(max_version=max_version if self.versioned else None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __array_namespace__(self) -> Any:
        return Library

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype


def np_read_only(tensor: Any) -> np.ndarray:
    array = tensor.numpy()
    array.flags.writeable = False
    return array


class Library:
    @staticmethod
    def from_dlpack(source: Any) -> Lender:
        return Lender(torch.from_dlpack(source))


class Unversioned(Lender):
    """From before DLPack 1.0."""

    versioned = False

    def __dlpack__(self) -> Any:  # type: ignore[override]
        return self.tensor.__dlpack__()


class Remote(Lender):
    device = (2, 3)


class ReadOnly(Lender):
    read_only = True


class Mute:
    """DLPack, but no way back."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def tensors(dtype: Any = torch.float32) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 8)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)  # type: ignore[return-value]


def as_float64(tensor: Any) -> np.ndarray:
    result: np.ndarray = tensor.to(torch.float64).numpy()
    return result


@pytest.mark.parametrize("kind", [Lender, Unversioned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_results_are_of_the_callers_kind(kind: type[Lender], dtype: Any) -> None:
    q, k, v = tensors(dtype)
    result = foveal.attention(kind(q), kind(k), kind(v), causal=True, return_lse=True, return_weights=True)
    expected = formula(*(as_float64(x) for x in (q, k, v)), causal=True)
    for array, wanted in zip(result[:3], expected[:3], strict=True):
        assert isinstance(array, Lender)
        # Two roundings to the dtype, of values of about 1.
        np.testing.assert_allclose(as_float64(array.tensor), wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert result.out.dtype == result.weights.dtype == dtype
    assert result.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert isinstance(foveal.attention(kind(q), kind(k), kind(v)), Lender)


@pytest.mark.parametrize("kind", [Lender, Unversioned])
def test_the_same_bits_as_from_numpy(kind: type[Lender]) -> None:
    q, k, v = tensors()
    strided = [q.flip(0), k[:, :, ::2], v.transpose(1, 2).contiguous().transpose(1, 2)[:, :, ::2]]
    expected = foveal.attention(*(x.numpy() for x in strided), causal=True, window=(2, None))
    out = foveal.attention(*(kind(x) for x in strided), causal=True, window=(2, None))
    np.testing.assert_array_equal(out.tensor.numpy(), expected)


def test_every_array_argument() -> None:
    q, k, v = tensors()
    generator = torch.Generator().manual_seed(1)
    arrays = {
        "mask": torch.rand(5, 9, generator=generator) < 0.7,
        "bias": torch.randn(4, 1, 9, generator=generator).to(torch.bfloat16),
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "sinks": torch.tensor([0.5, -1, 0, 2], dtype=torch.float16),
    }
    lent = {name: Lender(x) for name, x in arrays.items()}
    plain = {name: x.numpy() if name == "mask" else as_float64(x) for name, x in arrays.items()}
    expected = formula(*(x.numpy() for x in (q, k, v)), kv_lens=[9, 4], **plain)
    all_kv_lens = (
        [9, 4],
        np.array([9, 4]),
        torch.tensor([9, 4]),
        Lender(torch.tensor([9, 4], dtype=torch.int16)),
        Unversioned(torch.tensor([9, 4], dtype=torch.uint8)),
    )
    for kv_lens in all_kv_lens:
        out = foveal.attention(*map(Lender, (q, k, v)), kv_lens=kv_lens, **lent)
        assert_within(out.tensor.numpy(), expected.out, expected.out_error, "out")
    out = foveal.attention(*map(Lender, (q, k, v)), causal=True, q_offset=Lender(torch.tensor(2)))
    expected_out = foveal.attention(q.numpy(), k.numpy(), v.numpy(), causal=True, q_offset=2)
    np.testing.assert_array_equal(out.tensor.numpy(), expected_out)


def test_lengths_as_tensors_beside_numpy() -> None:
    q, k, v = (x.numpy() for x in tensors())
    expected = foveal.attention(q, k, v, kv_lens=[9, 4], q_offset=[1, 2], causal=True)
    lens = {"kv_lens": torch.tensor([9, 4]), "q_offset": torch.tensor([1, 2], dtype=torch.int32)}
    np.testing.assert_array_equal(foveal.attention(q, k, v, causal=True, **lens), expected)


def test_out() -> None:
    q, k, v = tensors()
    out = Lender(torch.empty(2, 4, 5, 8))
    assert foveal.attention(*map(Lender, (q, k, v)), out=out) is out
    np.testing.assert_array_equal(out.tensor.numpy(), foveal.attention(q.numpy(), k.numpy(), v.numpy()))
    for kind in (Unversioned, ReadOnly):
        # Before 1.0 a lender cannot say that its memory may be written, and JAX's may not.
        with pytest.raises(ValueError, match="attention: out is read-only"):
            foveal.attention(*map(Lender, (q, k, v)), out=kind(torch.empty(2, 4, 5, 8)))


def test_empty_results() -> None:
    q, k, v = tensors()
    out = foveal.attention(*(Lender(x[:0]) for x in (q, k, v)))
    assert out.tensor.shape == (0, 4, 5, 8)


def test_read_only_inputs() -> None:
    q, k, v = tensors()
    expected = foveal.attention(q.numpy(), k.numpy(), v.numpy())
    np.testing.assert_array_equal(foveal.attention(*map(ReadOnly, (q, k, v))).tensor.numpy(), expected)


def test_refusals() -> None:
    q, k, v = map(Lender, tensors())
    with pytest.raises(TypeError, match="attention: q is on DLPack device type 2, expected the CPU"):
        foveal.attention(Remote(q.tensor), k, v)
    with pytest.raises(TypeError, match=r"attention: k has type numpy\.ndarray, expected .*Lender \(from q\)"):
        foveal.attention(q, k.tensor.numpy(), v)
    with pytest.raises(TypeError, match=r"attention: k has type torch\.Tensor, expected .*Lender \(from q\)"):
        foveal.attention(q, k.tensor, v)
    with pytest.raises(TypeError, match=r"attention: v has type list, expected .*Lender \(from q\)"):
        foveal.attention(q, k, [1.0])
    with pytest.raises(TypeError, match=r"attention: k has type .*Lender, expected numpy\.ndarray \(from q\)"):
        foveal.attention(q.tensor.numpy(), k, v)
    with pytest.raises(TypeError, match=r"attention: q has dtype torch\.complex64, expected float32"):
        foveal.attention(Lender(q.tensor.to(torch.complex64)), k, v)
    with pytest.raises(TypeError, match=r"attention: kv_lens has dtype torch\.float32, expected integers"):
        foveal.attention(q, k, v, kv_lens=torch.ones(2))
    with pytest.raises(ValueError, match=r"attention: k.shape\[3\] is 15, expected head_dim 16 \(from q\)"):
        foveal.attention(q, Lender(k.tensor[..., :15]), v)


class _Tensor(ctypes.Structure):
    """DLManagedTensor of the standard's dlpack.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Liar(Lender):
    """Says of a tensor what a broken library might say; `fields` are those of the capsule's struct."""

    device: Any = (1, 0)

    def __init__(self, tensor: Any, shape: tuple[int, ...] | None = None, **fields: int) -> None:
        super().__init__(tensor)
        shape = tuple(tensor.shape) if shape is None else shape
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        given = {"device_type": 1, "ndim": len(shape), "code": 2, "bits": 32, "lanes": 1, "shape": self.shape, **fields}
        self.struct = _Tensor(data=tensor.data_ptr(), **given)

    def __dlpack__(self, **options: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.struct), b"dltensor", None)


class NoCapsule(Lender):
    def __dlpack__(self, **options: Any) -> Any:
        return 3


def test_what_breaks_the_protocol() -> None:
    q, k, v = tensors()
    expected = foveal.attention(*map(Lender, (q, k, v))).tensor
    assert foveal.attention(Liar(q), Lender(k), Liar(v)).tensor.equal(expected)

    def refuse(error: type[Exception], text: str, **arguments: Any) -> None:
        with pytest.raises(error, match=rf"attention: {text}"):
            foveal.attention(**{"q": Lender(q), "k": Lender(k), "v": Lender(v), **arguments})

    refuse(ValueError, "k has -1 dimensions, expected at least 0", k=Liar(k, ndim=-1))
    refuse(ValueError, "mask has -5 dimensions, expected at least 0", mask=Liar(k, ndim=-5, code=6, bits=8))
    for axis in range(4):
        shape = tuple(-n if i == axis else n for i, n in enumerate(q.shape))
        refuse(ValueError, rf"q.shape\[{axis}\] is {shape[axis]}, expected at least 0", q=Liar(q, shape))
    refuse(TypeError, "v is on DLPack device type 2, expected the CPU", v=Liar(v, device_type=2))
    refuse(TypeError, r"k.__dlpack__\(\) gave 3, expected a capsule named", k=NoCapsule(k))
    for device in ("cpu", (None,), (1,), None):
        strange = Liar(k)
        strange.device = device
        text = rf"k.__dlpack_device__\(\) gave {device!r}, expected".replace("(None,)", r"\(None,\)")
        refuse(TypeError, text.replace("(1,)", r"\(1,\)"), k=strange)
    lengths = torch.tensor([2, 2])
    for bits in (1, 4, 128):
        text = f"q_lens has {bits}-bit integers, expected those of 8, 16, 32 or 64 bits"
        refuse(TypeError, text, q_lens=Liar(lengths, code=0, bits=bits))
    # So long that to copy it first would take all memory.
    refuse(ValueError, rf"q_lens has shape \({2**40},\), expected", q_lens=Liar(lengths, (2**40,), code=0, bits=64))
    refuse(ValueError, r"q_lens.shape\[0\] is -2, expected at least 0", q_lens=Liar(lengths, (-2,), code=0, bits=64))


def test_a_kind_without_a_way_back() -> None:
    with pytest.raises((AttributeError, TypeError)):
        foveal.attention(*map(Mute, tensors()))


def test_borrowed_memory_is_given_back() -> None:
    lent = []

    class Counting(Lender):
        def __dlpack__(self, **options: Any) -> Any:
            source = self.tensor.numpy().copy()  # which the capsule alone keeps
            lent.append(weakref.ref(source))
            return source.__dlpack__(**options)

    q, k, v = tensors()
    result = foveal.attention(*map(Counting, (q, k, v)))
    with pytest.raises(ValueError, match=r"k.shape\[3\] is 9"):
        foveal.attention(Counting(q), Counting(k[..., :9]), Counting(v))
    gc.collect()
    assert len(lent) == 6
    assert not any(source() is not None for source in lent)
    np.testing.assert_array_equal(result.tensor.numpy(), foveal.attention(q.numpy(), k.numpy(), v.numpy()))


def test_host_array_speaks_both_versions() -> None:
    q, k, v = map(Lender, tensors())
    seen: list[Any] = []

    class Spying(Lender):
        def __array_namespace__(self) -> Any:
            class Namespace:
                from_dlpack = staticmethod(seen.append)

            return Namespace

    foveal.attention(Spying(q.tensor), k, v)
    (array,) = seen
    assert isinstance(array, _core.HostArray)
    assert array.__dlpack_device__() == (1, 0)
    assert '"dltensor"' in repr(array.__dlpack__())
    assert '"dltensor"' in repr(array.__dlpack__(max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(array.__dlpack__(max_version=(1, 1)))
    expected = foveal.attention(q.tensor.numpy(), k.tensor.numpy(), v.tensor.numpy())
    first, second = np.from_dlpack(array), np.from_dlpack(array)
    assert first.ctypes.data == second.ctypes.data
    assert first.ctypes.data % 64 == 0
    del array, second
    seen.clear()
    gc.collect()
    np.testing.assert_array_equal(first, expected)


# ---- the libraries themselves, where they are installed -------------------------------------------------------------


def test_jax() -> None:
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    q, k, v = (x.numpy() for x in tensors())
    for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
        jq, jk, jv = (jnp.asarray(x, dtype) for x in (q, k, v))
        expected = formula(*(np.asarray(x.astype(jnp.float32)) for x in (jq, jk, jv)), causal=True)
        result = foveal.attention(jq, jk, jv, causal=True, return_lse=True, kv_lens=jnp.array([9, 9]))
        assert isinstance(result.out, jax.Array)
        assert result.out.dtype == dtype
        assert result.lse.dtype == jnp.float32
        atol = 4 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(result.out.astype(jnp.float32)), expected.out, rtol=0, atol=atol)
    mask = jnp.ones((5, 9), bool)
    lazy = jnp.dot(jq, jnp.eye(16, dtype=jq.dtype))  # perhaps not computed yet
    assert isinstance(foveal.attention(lazy, jk, jv, mask=mask), jax.Array)
    with pytest.raises(ValueError, match="attention: out is read-only"):
        foveal.attention(jq, jk, jv, out=jnp.zeros((2, 4, 5, 8), jq.dtype))


def test_array_api_strict() -> None:
    strict = pytest.importorskip("array_api_strict")
    q, k, v = (x.numpy() for x in tensors())
    arrays = [strict.asarray(x) for x in (q, k, v)]
    out = foveal.attention(*arrays)
    assert type(out) is type(arrays[0])
    np.testing.assert_array_equal(np.from_dlpack(out), foveal.attention(q, k, v))
