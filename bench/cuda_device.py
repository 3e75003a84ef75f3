"""A case of cuda_problems.py on a device: its memory, and the passes over it, whose results are poisoned before each.

The device is a GPU, or the emulated one of tests/cpp/cuda_emulation.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import cuda_problems as problems
from cuda_problems import Case


def load_binding() -> ModuleType:
    """`foveal/_cuda.py` alone, so that the report runs where the package is not built."""
    path = Path(__file__).parent.parent / "python" / "foveal" / "_cuda.py"
    spec = importlib.util.spec_from_file_location("foveal_cuda_binding", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cuda = load_binding()
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block may have
_PROT_NONE = 0
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class HostMemory:
    """Device memory of the emulated device. An inaccessible page follows every array: reading past an end is fatal."""

    stream = 0

    def upload(self, array: np.ndarray) -> tuple[int, Any]:
        """Return a pointer to a copy, and what keeps it alive."""
        room = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = np.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), np.uint8)
        if _mprotect(pages.ctypes.data + room, mmap.PAGESIZE, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        start = (room - array.nbytes) // 16 * 16  # 16-byte aligned, as the fast paths require
        pages[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return pages.ctypes.data + start, pages[start : start + array.nbytes]

    def download(self, keep: Any) -> np.ndarray:
        """Return the bytes."""
        return np.array(keep)


class TorchMemory:
    """A GPU's memory through torch's allocator."""

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def upload(self, array: np.ndarray) -> tuple[int, Any]:
        """Return a pointer to a copy on the GPU, and the tensor that owns it."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        tensor = self.torch.empty(max(raw.size, 1), dtype=self.torch.uint8, device="cuda")
        tensor[: raw.size].copy_(self.torch.from_numpy(raw.copy()))
        return tensor.data_ptr(), tensor[: raw.size]

    def download(self, keep: Any) -> np.ndarray:
        """Return the bytes; waits for the stream."""
        return keep.cpu().numpy()

    @property
    def stream(self) -> int:
        """The current stream."""
        return self.torch.cuda.current_stream().cuda_stream


def element_strides(array: np.ndarray) -> list[int]:
    return [s // array.itemsize for s in array.strides]


class Run:
    """A case on the device: inputs uploaded once, outputs poisoned before every launch."""

    def __init__(self, library: Any, memory: Any, case: Case, arrays: dict[str, np.ndarray]) -> None:
        self.library, self.memory, self.case = library, memory, case
        self.keep: list[Any] = []
        self.packed = False
        p = self.problem = cuda.Problem()
        for name in ("q", "k", "v"):
            setattr(p, name, self._operand(arrays[name], case))
        for name in ("mask", "bias"):
            if name in arrays:
                setattr(p, name, self._view(arrays[name], "bool" if name == "mask" else case.bias))
        if "alibi_slopes" in arrays:
            p.alibi_slopes = self._view(arrays["alibi_slopes"], "float32")
        if "sinks" in arrays:
            p.sinks = self._view(arrays["sinks"], "float32")
        for name in ("q_lens", "kv_lens"):
            if name in arrays:
                setattr(p, name, self._view(arrays[name], "int32"))
        if case.q_offset is not None:
            p.q_offset = self._view(np.full(case.batch, case.q_offset, np.int64), "int64")
        p.causal = case.causal
        p.window_left, p.window_right = (cuda.UNLIMITED if side is None else side for side in case.window)
        p.has_scale = case.scale is not None
        p.scale = case.scale or 0.0
        p.softcap = case.softcap
        self.out_shape = (case.batch, case.num_heads, case.seqlen_q, case.value_dim)
        self.lse_dtype = "float64" if case.dtype == "float64" else "float32"

    def _view(self, array: np.ndarray, dtype: str) -> Any:
        pointer, keep = self.memory.upload(array)
        self.keep.append(keep)
        return cuda.view(pointer, dtype, array.shape, element_strides(np.ascontiguousarray(array)))

    def _operand(self, array: np.ndarray, case: Case) -> Any:
        if case.strided:
            array = np.stack([array, np.zeros_like(array)], axis=-1).reshape(*array.shape[:-1], -1)
        if case.layout == "bshd":
            view = self._view(np.ascontiguousarray(array.swapaxes(1, 2)), case.dtype)
            view.shape[1], view.shape[2] = view.shape[2], view.shape[1]
            view.stride[1], view.stride[2] = view.stride[2], view.stride[1]
        else:
            view = self._view(array, case.dtype)
        if case.strided:
            view.shape[3] //= 2
            view.stride[3] = 2
        return view

    @staticmethod
    def drop_batch(target: Any, names: tuple[str, ...]) -> None:
        """Turn views (1,H,T,...) of packed arrays into (T,H,...), of lse into (H,T)."""
        for name in names:
            view = getattr(target, name)
            axes = (2, 1, 3) if view.rank == 4 else (1, 2)
            shape, stride = [view.shape[i] for i in axes], [view.stride[i] for i in axes]
            view.rank -= 1
            for i in range(len(axes)):
                view.shape[i], view.stride[i] = shape[i], stride[i]

    def pack(self, begins: dict[str, np.ndarray]) -> None:
        """Make the one batch element of the case packed sequences."""
        self.drop_batch(self.problem, ("q", "k", "v"))
        self.problem.cu_seqlens_q = self._view(begins["q"], "int32")
        self.problem.cu_seqlens_kv = self._view(begins["kv"], "int32")
        self.problem.layout = 1
        self.packed = True

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) as float64, from one launch into NaN."""
        nan = problems.to_dtype(np.full(self.out_shape, np.nan), self.case.dtype)
        out_pointer, out_keep = self.memory.upload(nan)
        lse = np.full(self.out_shape[:3], np.nan, self.lse_dtype)
        lse_pointer, lse_keep = self.memory.upload(lse)
        self.problem.out = cuda.view(out_pointer, self.case.dtype, self.out_shape, element_strides(nan))
        self.problem.lse = cuda.view(lse_pointer, self.lse_dtype, lse.shape, element_strides(lse))
        if self.packed:
            self.drop_batch(self.problem, ("out", "lse"))
        nbytes = self.library.workspace_nbytes(self.problem, variant=self.case.variant)
        workspace, keep = self.memory.upload(np.full(nbytes, 255, np.uint8))
        self.library.forward(
            self.problem,
            stream=self.memory.stream,
            workspace=workspace,
            workspace_nbytes=nbytes,
            variant=self.case.variant,
        )
        self.keep_last = (out_keep, lse_keep, keep)  # the backward pass reads out and lse
        out = self.memory.download(out_keep).view(nan.dtype).reshape(self.out_shape).astype(np.float64)
        return out, self.memory.download(lse_keep).view(lse.dtype).reshape(lse.shape).astype(np.float64)


class Backward:
    """The backward pass of a run whose forward pass is done, gradients poisoned before every launch."""

    def __init__(self, run: Run, given: dict[str, np.ndarray], variant: int = -1) -> None:
        self.run, self.variant = run, variant
        self.given = cuda.Gradients()
        self.given.dout = run._operand(given["dout"], run.case)
        self.given.dlse = run._view(given["dlse"], run.lse_dtype)

    def __call__(self) -> dict[str, np.ndarray]:
        """Gradients by name as float64, from one call into NaN."""
        run, case = self.run, self.run.case
        keeps = {}
        for name in ("q", "k", "v", "bias", "sinks"):
            view = getattr(run.problem, name)
            if view.rank < 0:
                continue
            dtype = case.dtype if name in ("q", "k", "v") else run.lse_dtype
            shape = tuple(view.shape[: view.rank])
            if run.packed and name in ("q", "k", "v"):
                shape = (1, shape[1], shape[0], shape[2])
            nan = problems.to_dtype(np.full(shape, np.nan), dtype)
            pointer, keep = run.memory.upload(nan)
            setattr(self.given, "d" + name, cuda.view(pointer, dtype, nan.shape, element_strides(nan)))
            if run.packed and name in ("q", "k", "v"):
                run.drop_batch(self.given, ("d" + name,))
            keeps["d" + name] = (nan, keep)
        nbytes = run.library.workspace_nbytes(run.problem, gradients=self.given)
        workspace, keep_workspace = run.memory.upload(np.full(nbytes, 255, np.uint8))
        run.library.backward(
            run.problem,
            self.given,
            stream=run.memory.stream,
            workspace=workspace,
            workspace_nbytes=nbytes,
            variant=self.variant,
        )
        results = {
            name: run.memory.download(keep).view(nan.dtype).reshape(nan.shape).astype(np.float64)
            for name, (nan, keep) in keeps.items()
        }
        del keep_workspace
        return results
