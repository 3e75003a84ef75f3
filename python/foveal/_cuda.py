"""The CUDA backend's shared object: found and opened on first use, driven through its C interface.

The structures mirror `cpp/include/foveal/tensor_view.h`, `attention.h` and `cpp/cuda/foveal_cuda.h`. Their layout is
checked against the library's own when it is opened, so a drift raises instead of reading wrong fields. Nothing here
imports the rest of the package, NumPy or torch: pointers come in as integers.

`FOVEAL_CUDA` in the environment: `off` never opens the library; `experimental` allows what no GPU has verified yet.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIBRARY_PATH = Path(__file__).with_name("libfoveal_cuda.so")
MAX_RANK = 8
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3, "bool": 4, "int8": 5, "int32": 6, "int64": 7}
UNLIMITED = -1
DEVICE_CUDA = 1
CUDA_ERROR_BASE = 1000
PATHS = ("empty", "plain", "forward", "decode", "backward", "backward_plain")
MAX_STEPS = 5
DEFAULT_VARIANT = -1

_ERRORS: dict[int, type[Exception]] = {1: TypeError, 2: ValueError, 3: NotImplementedError, 4: MemoryError}
_TEXT_NBYTES = 512


class Device(ctypes.Structure):
    """`foveal::Device`."""

    _fields_ = [("type", ctypes.c_uint8), ("index", ctypes.c_int32)]


class View(ctypes.Structure):
    """`foveal::TensorView`; absent unless made by `view`."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_uint8),
        ("device", Device),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("stride", ctypes.c_int64 * MAX_RANK),
    ]

    def __init__(self) -> None:
        super().__init__(rank=-1)


VIEWS = (
    "q",
    "k",
    "v",
    "out",
    "lse",
    "weights",
    "entropy",
    "mass",
    "max_weight",
    "threshold",
    "argmax",
    "key_mass",
    "top_keys",
    "top_weights",
    "additive",
    "mask",
    "bias",
    "alibi_slopes",
    "sinks",
    "gate_tau",
    "gate_temperature",
    "span",
    "q_lens",
    "kv_lens",
    "q_offset",
    "cu_seqlens_q",
    "cu_seqlens_kv",
    "block_table",
    "k_scale",
    "v_scale",
)


class Problem(ctypes.Structure):
    """`foveal::AttentionProblem`: what the library reads is judged there, with the texts of the CPU."""

    _fields_ = [
        *((name, View) for name in VIEWS),
        ("layout", ctypes.c_uint8),
        ("causal", ctypes.c_bool),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("has_scale", ctypes.c_bool),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("span_ramp", ctypes.c_double),
        ("normalizer", ctypes.c_uint8),
        ("dropout_p", ctypes.c_double),
        ("seed", ctypes.c_uint64),
    ]

    def __init__(self) -> None:
        super().__init__(window_left=UNLIMITED, window_right=UNLIMITED)
        for name in VIEWS:
            getattr(self, name).rank = -1


_GRADIENTS = (
    "dout",
    "dlse",
    "dentropy",
    "dq",
    "dk",
    "dv",
    "dbias",
    "dsinks",
    "dgate_tau",
    "dgate_temperature",
    "dspan",
    "dadditive",
)


class Gradients(ctypes.Structure):
    """`foveal::AttentionGradients`."""

    _fields_ = [(name, View) for name in _GRADIENTS]

    def __init__(self) -> None:
        super().__init__()
        for name in _GRADIENTS:
            getattr(self, name).rank = -1


class _Launch(ctypes.Structure):
    _fields_ = [
        ("problem", ctypes.c_void_p),
        ("problem_nbytes", ctypes.c_uint64),
        ("gradients", ctypes.c_void_p),
        ("gradients_nbytes", ctypes.c_uint64),
        ("variant", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_nbytes", ctypes.c_uint64),
        ("text", ctypes.c_void_p),
        ("text_nbytes", ctypes.c_uint64),
    ]


def view(pointer: int, dtype: str, shape: Sequence[int], strides: Sequence[int], device: int = 0) -> View:
    """Make a view of device memory; strides count elements."""
    result = View()
    result.data = pointer
    result.dtype = DTYPES[dtype]
    result.device = Device(DEVICE_CUDA, device)
    result.rank = len(shape)
    for i, (extent, stride) in enumerate(zip(shape, strides, strict=True)):
        result.shape[i] = extent
        result.stride[i] = stride
    return result


def window_side(side: str, width: int) -> int:
    """Make a limited side of the window; -1 would read as unlimited, so a negative one is refused here."""
    if width < 0:
        raise ValueError(f"attention: window[{0 if side == 'left' else 1}] is {width}, expected at least 0")
    return min(width, 2**62)


def _interface() -> dict[str, str]:
    """Describe the mirror as `foveal_cuda_interface` describes what it mirrors."""
    structures: dict[str, type[ctypes.Structure]] = {
        "Device": Device,
        "TensorView": View,
        "AttentionProblem": Problem,
        "AttentionGradients": Gradients,
        "Launch": _Launch,
    }
    described = {}
    for name, structure in structures.items():
        for base in reversed(structure.__mro__):
            for field, *_ in vars(base).get("_fields_", ()):
                place = getattr(structure, field)
                described[f"{name}.{field}"] = f"{place.offset}:{place.size}"
        described[name] = str(ctypes.sizeof(structure))
    numbers = {
        **{f"DType.{name}": code for name, code in DTYPES.items()},
        **{f"ErrorKind.{error.__name__}": code for code, error in _ERRORS.items()},
        "Layout.bshd": 1,
        "DeviceType.cuda": DEVICE_CUDA,
        "kUnlimited": UNLIMITED,
        "kCudaErrorBase": CUDA_ERROR_BASE,
        "kMaxRank": MAX_RANK,
        "kMaxSteps": MAX_STEPS,
        "kDefaultVariant": DEFAULT_VARIANT,
    }
    return described | {name: str(number) for name, number in numbers.items()}


def _compare_interfaces(path: str | os.PathLike[str], dll: ctypes.CDLL) -> None:
    try:
        text_of = dll.foveal_cuda_interface
    except AttributeError:
        raise ImportError(f"{path}: the library does not tell its layout; rebuild foveal") from None
    text_of.restype = ctypes.c_char_p
    theirs = dict(line.rsplit(" ", 1) for line in text_of().decode().splitlines())
    ours = _interface()
    for name in [*ours, *theirs]:
        there, here = theirs.get(name, "absent"), ours.get(name, "absent")
        if there != here:
            raise ImportError(f"{path}: {name} is {there} there, {here} here; rebuild foveal")


class CudaError(RuntimeError):
    """The CUDA runtime refused; `code` is its cudaError_t."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"CUDA error {code}: {text}")
        self.code = code


class Library:
    """An opened backend. Thread-safe: it keeps no state."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._dll = ctypes.CDLL(str(path))
        _compare_interfaces(path, self._dll)

    def device_count(self) -> int:
        """How many GPUs the runtime sees; `CudaError` without a driver."""
        count = ctypes.c_int32()
        text = ctypes.create_string_buffer(_TEXT_NBYTES)
        _raise(self._dll.foveal_cuda_device_count(ctypes.byref(count), text, ctypes.c_uint64(_TEXT_NBYTES)), text)
        return count.value

    def plan(
        self,
        problem: Problem,
        shared_limit: int,
        variant: int = DEFAULT_VARIANT,
        gradients: Gradients | None = None,
    ) -> dict[str, Any]:
        """Tell what would be launched on a device whose blocks may have `shared_limit` bytes of shared memory.

        `steps` are the launches in order; beside them stands the first one's, or the default's where there is none.
        """
        launch, text = _launch(problem, gradients, variant)
        values = (ctypes.c_int64 * (4 + 4 * MAX_STEPS))()
        _raise(self._dll.foveal_cuda_attention_plan(ctypes.byref(launch), ctypes.c_int32(shared_limit), values), text)
        path, num_splits, workspace_nbytes, num_steps = values[:4]
        names = ("variant", "num_blocks", "num_threads", "shared_nbytes")
        steps = [dict(zip(names, values[i : i + 4], strict=True)) for i in range(4, 4 + 4 * MAX_STEPS, 4)]
        return {
            "path": PATHS[path],
            "num_splits": num_splits,
            "workspace_nbytes": workspace_nbytes,
            "steps": steps[:num_steps],
            **steps[0],
        }

    def workspace_nbytes(
        self, problem: Problem, variant: int = DEFAULT_VARIANT, gradients: Gradients | None = None
    ) -> int:
        """Bytes of device memory that `forward` (with gradients: `backward`) needs beside the outputs."""
        launch, text = _launch(problem, gradients, variant)
        nbytes = ctypes.c_uint64()
        _raise(self._dll.foveal_cuda_attention_workspace(ctypes.byref(launch), ctypes.byref(nbytes)), text)
        return nbytes.value

    def forward(
        self,
        problem: Problem,
        *,
        stream: int = 0,
        workspace: int = 0,
        workspace_nbytes: int = 0,
        variant: int = DEFAULT_VARIANT,
    ) -> None:
        """Enqueue the forward pass on `stream`; returns before it has run."""
        self._enqueue(problem, None, stream, workspace, workspace_nbytes, variant)

    def backward(
        self,
        problem: Problem,
        gradients: Gradients,
        *,
        stream: int = 0,
        workspace: int = 0,
        workspace_nbytes: int = 0,
        variant: int = DEFAULT_VARIANT,
    ) -> None:
        """Enqueue the backward pass of a problem whose `out` and `lse` the forward pass has filled or will fill."""
        self._enqueue(problem, gradients, stream, workspace, workspace_nbytes, variant)

    def _enqueue(
        self,
        problem: Problem,
        gradients: Gradients | None,
        stream: int,
        workspace: int,
        workspace_nbytes: int,
        variant: int,
    ) -> None:
        launch, text = _launch(problem, gradients, variant)
        launch.stream = stream
        launch.workspace = workspace
        launch.workspace_nbytes = workspace_nbytes
        _raise(self._dll.foveal_cuda_attention(ctypes.byref(launch)), text)


def _launch(problem: Problem, gradients: Gradients | None, variant: int) -> tuple[_Launch, ctypes.Array[ctypes.c_char]]:
    text = ctypes.create_string_buffer(_TEXT_NBYTES)
    launch = _Launch(
        problem=ctypes.addressof(problem),
        problem_nbytes=ctypes.sizeof(problem),
        variant=variant,
        text=ctypes.addressof(text),
        text_nbytes=_TEXT_NBYTES,
    )
    if gradients is not None:
        launch.gradients = ctypes.addressof(gradients)
        launch.gradients_nbytes = ctypes.sizeof(gradients)
    return launch, text


def _raise(status: int, text: ctypes.Array[ctypes.c_char]) -> None:
    if status == 0:
        return
    reason = text.value.decode()
    if status >= CUDA_ERROR_BASE:
        raise CudaError(status - CUDA_ERROR_BASE, reason)
    raise _ERRORS.get(status, RuntimeError)(reason)


_lock = threading.Lock()
_library: Library | None = None


def is_built() -> bool:
    """Whether this package was built with the backend; whether there is a GPU, only its driver knows."""
    return LIBRARY_PATH.exists()


def library() -> Library | None:
    """Open the backend that was built with this package, once; None where there is none or FOVEAL_CUDA=off."""
    global _library
    if os.environ.get("FOVEAL_CUDA", "").lower() == "off":
        return None
    with _lock:
        if _library is None and is_built():
            _library = Library(LIBRARY_PATH)
        return _library


def experimental() -> bool:
    """Whether the user asked for kernels that no GPU has verified."""
    return os.environ.get("FOVEAL_CUDA", "").lower() == "experimental"
