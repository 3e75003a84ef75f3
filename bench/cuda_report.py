"""One command for the CUDA backend: correctness first, then speed against PyTorch's own backends.

    python bench/cuda_report.py --library libfoveal_cuda.so --json report.json

check     every case of `correctness_grid` and `gradient_grid` (cuda_problems.py) against float64 on the rounded inputs,
          outputs poisoned before each run, run twice for bitwise equality, and padded against unpadded batches
ceilings  device-to-device copy and 8192^3 matrix product
ratios    forward: ours, CUDNN, FLASH, EFFICIENT in turn in one process, median and spread over rounds
gradients the same of the backward pass alone
decode    one query row over a long cache, CUDA-graph replay over rotated caches larger than L2, in GB/s
sweep     every kernel variant on the shapes of `ratios`
tiny      a few small launches for compute-sanitizer

Stages stop at their share of `--minutes`. With the library of the emulated device (tests/cpp/cuda_emulation),
`--device cpu --small --stages check` runs without a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.util
import json
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
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


def check_gradients(library: Any, memory: Any, case: Case) -> dict[str, Any]:
    """Errors of the gradients of one case, from the library's own out and lse, and whether they pass."""
    arrays = problems.make_inputs(case)
    given = problems.make_gradients(case)
    run = Run(library, memory, dataclasses.replace(case, variant=-1), arrays)
    run()
    backward = Backward(run, given, case.variant)
    found, again = backward(), backward()
    errors = problems.gradient_errors(found, *problems.reference_gradients(case, arrays, given))
    repeats = all(np.array_equal(found[name], again[name], equal_nan=True) for name in found)
    plan = library.plan(run.problem, 227 * 1024, case.variant, backward.given)
    return {
        "case": case.name(),
        "path": plan["path"],
        "variants": [step["variant"] for step in plan["steps"]],
        "error": max(errors.values()),
        "errors": errors,
        "repeats": repeats,
        "passed": max(errors.values()) <= problems.GRADIENT_TOLERANCE[case.dtype] and repeats,
    }


def check_case(library: Any, memory: Any, case: Case) -> dict[str, Any]:
    """Errors of one case and whether they pass."""
    arrays = problems.make_inputs(case)
    run = Run(library, memory, case, arrays)
    out, lse = run()
    again, lse_again = run()
    expected, expected_lse = problems.reference(case, arrays)
    error = problems.relative_error(out, expected)
    lse_error = problems.absolute_error(lse, expected_lse)
    repeats = np.array_equal(out, again, equal_nan=True) and np.array_equal(lse, lse_again, equal_nan=True)
    passed = error <= problems.TOLERANCE[case.dtype] and lse_error <= problems.LSE_TOLERANCE[case.dtype] and repeats
    plan = library.plan(run.problem, 227 * 1024, case.variant)
    return {
        "case": case.name(),
        "path": plan["path"],
        "variant": plan["variant"],
        "error": error,
        "lse_error": lse_error,
        "repeats": repeats,
        "passed": passed,
    }


def check_padding(library: Any, memory: Any, case: Case) -> dict[str, Any]:
    """Check that a padded batch equals each of its sequences alone, bit for bit."""
    assert case.kv_lens is not None
    arrays = problems.make_inputs(case)
    out, lse = Run(library, memory, case, arrays)()
    passed = True
    for b, kv_len in enumerate(case.kv_lens):
        alone = dataclasses.replace(case, batch=1, seqlen_kv=kv_len, kv_lens=None)
        part = {"q": arrays["q"][b : b + 1], **{n: arrays[n][b : b + 1, :, :kv_len] for n in ("k", "v")}}
        if "sinks" in arrays:
            part["sinks"] = arrays["sinks"]
        out_alone, lse_alone = Run(library, memory, alone, part)()
        passed &= np.array_equal(out[b], out_alone[0]) and np.array_equal(lse[b], lse_alone[0])
    return {"case": "padding " + case.name(), "passed": bool(passed)}


def check_padded_gradients(library: Any, memory: Any, case: Case) -> dict[str, Any]:
    """The same of dq, dk and dv, for the keys and rows that each sequence has."""
    assert case.kv_lens is not None
    assert case.q_lens is not None
    arrays, given = problems.make_inputs(case), problems.make_gradients(case)
    run = Run(library, memory, case, arrays)
    run()
    padded = Backward(run, given)()
    passed = True
    for b, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        alone = dataclasses.replace(case, batch=1, seqlen_q=q_len, seqlen_kv=kv_len, kv_lens=None, q_lens=None)
        part = {"q": arrays["q"][b : b + 1, :, :q_len]}
        part |= {n: arrays[n][b : b + 1, :, :kv_len] for n in ("k", "v")}
        run = Run(library, memory, alone, part)
        run()
        found = Backward(run, {name: a[b : b + 1, :, :q_len] for name, a in given.items()})()
        passed &= np.array_equal(padded["dq"][b, :, :q_len], found["dq"][0])
        passed &= not padded["dq"][b, :, q_len:].any()
        for name in ("dk", "dv"):
            passed &= np.array_equal(padded[name][b, :, :kv_len], found[name][0])
            passed &= not padded[name][b, :, kv_len:].any()
    return {"case": "padded gradients " + case.name(), "passed": bool(passed)}


def check_packed(library: Any, memory: Any, case: Case, margin: int = 3) -> dict[str, Any]:
    """Check packed sequences, with `margin` tokens of none at both ends, against float64 and against each alone.

    `case` has the lengths in q_lens and kv_lens. Bits are compared where the sequence alone takes the same path, which
    is not the decoding one.
    """
    assert case.q_lens is not None
    assert case.kv_lens is not None
    arrays, given = problems.make_inputs(case), problems.make_gradients(case)
    alones = []
    for b, (q_len, kv_len) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
        alone = dataclasses.replace(case, batch=1, seqlen_q=q_len, seqlen_kv=kv_len, kv_lens=None, q_lens=None)
        part = {name: a for name, a in arrays.items() if name in ("alibi_slopes", "sinks")}
        part["q"] = arrays["q"][b : b + 1, :, :q_len]
        part |= {name: arrays[name][b : b + 1, :, :kv_len] for name in ("k", "v")}
        alones.append((alone, part, {name: a[b : b + 1, :, :q_len] for name, a in given.items()}))

    def pack(parts: list[np.ndarray], fill: float) -> np.ndarray:
        ends = np.full_like(parts[0][0][:, :1], fill).repeat(margin, 1)
        return np.concatenate([ends, *(part[0] for part in parts), ends], axis=1)[None]  # (1,H,T,...)

    packed = dict(arrays)
    for name in ("q", "k", "v"):
        packed[name] = pack([part[name] for _, part, _ in alones], np.nan)
    rows = {name: pack([grads[name] for _, _, grads in alones], np.nan) for name in given}
    begins = {
        side: margin + np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        for side, lens in (("q", case.q_lens), ("kv", case.kv_lens))
    }
    total = {side: int(b[-1]) + margin for side, b in begins.items()}
    whole = dataclasses.replace(
        case, batch=1, seqlen_q=total["q"], seqlen_kv=total["kv"], q_lens=None, kv_lens=None, layout="bshd"
    )
    run = Run(library, memory, whole, {name: a for name, a in packed.items() if not name.endswith("_lens")})
    run.pack(begins)
    if case.q_offset is not None:
        run.problem.q_offset = run._view(np.full(len(case.q_lens), case.q_offset, np.int64), "int64")
    out, lse = run()
    backward = Backward(run, rows)
    run.drop_batch(backward.given, ("dout", "dlse"))
    gradients = backward()

    failed = []

    def expect(what: str, passed: bool) -> None:
        if not passed:
            failed.append(what)

    worst = 0.0
    forward_path = run.library.plan(run.problem, 227 * 1024)["path"]
    for b, (alone, part, grads) in enumerate(alones):
        q_at = slice(begins["q"][b], begins["q"][b + 1])
        kv_at = slice(begins["kv"][b], begins["kv"][b + 1])
        expected, expected_lse = problems.reference(alone, part)
        error = problems.relative_error(out[0, :, q_at], expected[0])
        expect(f"out {b}: {error}", error <= problems.TOLERANCE[case.dtype])
        lse_error = problems.absolute_error(lse[0, :, q_at], expected_lse[0])
        expect(f"lse {b}: {lse_error}", lse_error <= problems.LSE_TOLERANCE[case.dtype])
        worst = max(worst, error)
        wanted, magnitude = problems.reference_gradients(alone, part, grads)
        found = {name: gradients[name][0][:, q_at if name == "dq" else kv_at][None] for name in ("dq", "dk", "dv")}
        for name, error in problems.gradient_errors(found, wanted, {}).items():
            expect(f"{name} {b}: {error}", error <= problems.GRADIENT_TOLERANCE[case.dtype])
        if "sinks" in arrays and b == 0:
            sums, sizes = np.zeros(case.num_heads), np.zeros(case.num_heads)
        if "sinks" in arrays:
            sums += wanted["dsinks"]
            sizes += magnitude["dsinks"]
        single = Run(library, memory, dataclasses.replace(alone, layout="bshd"), part)
        out_alone, lse_alone = single()
        if library.plan(single.problem, 227 * 1024)["path"] == forward_path:
            expect(f"bits of out {b}", np.array_equal(out[0, :, q_at], out_alone[0]))
            expect(f"bits of lse {b}", np.array_equal(lse[0, :, q_at], lse_alone[0]))
            again = Backward(single, grads)()
            for name in found:
                expect(f"bits of {name} {b}", np.array_equal(found[name], again[name]))
    if "sinks" in arrays:
        error = float(np.linalg.norm(gradients["dsinks"] - sums) / np.linalg.norm(sizes))
        expect(f"dsinks: {error}", error <= problems.GRADIENT_TOLERANCE[case.dtype])
    for array, begin in ((out, begins["q"]), (gradients["dq"], begins["q"]), (gradients["dk"], begins["kv"])):
        none = np.concatenate([array[0, :, : begin[0]], array[0, :, begin[-1] :]], axis=1)
        expect("zeros of tokens of no sequence", bool(none.size == 0 or not none.any()))
    ends = np.concatenate([lse[0, :, : begins["q"][0]], lse[0, :, begins["q"][-1] :]], axis=1)
    expect("lse of rows of no sequence", bool(np.isneginf(ends).all()))
    return {
        "case": "packed " + case.name(),
        "error": worst,
        "path": forward_path,
        "failed": failed,
        "passed": not failed,
    }


def check_paged(library: Any, memory: Any, case: Case, page_size: int) -> dict[str, Any]:
    """Check that keys in shuffled pages, NaN wherever no key lies, give the bits of keys in a row (same path only)."""
    assert case.kv_lens is not None
    arrays = problems.make_inputs(case)
    in_rows = Run(library, memory, case, arrays)
    expected, expected_lse = in_rows()
    pages_each = -(-case.seqlen_kv // page_size)
    num_pages = case.batch * pages_each + 3
    rng = np.random.default_rng(page_size)
    table = rng.permutation(num_pages)[: case.batch * pages_each].reshape(case.batch, pages_each).astype(np.int32)
    paged = dict(arrays)
    for name in ("k", "v"):
        source = arrays[name]
        pages = np.full((num_pages, case.num_kv_heads, page_size, source.shape[3]), np.nan).astype(source.dtype)
        for b, kv_len in enumerate(case.kv_lens):
            for j in range(kv_len):
                pages[table[b, j // page_size], :, j % page_size] = source[b, :, j]
        paged[name] = pages
    for b, kv_len in enumerate(case.kv_lens):
        table[b, -(-kv_len // page_size) :] = -(10**6)  # never read
    run = Run(library, memory, case, paged)
    run.problem.block_table = run._view(table, "int32")
    out, lse = run()
    path, path_in_rows = (library.plan(r.problem, 227 * 1024)["path"] for r in (run, in_rows))
    same = np.array_equal(out, expected) and np.array_equal(lse, expected_lse)
    reference, _ = problems.reference(case, arrays)
    error = problems.relative_error(out, reference)
    passed = error <= problems.TOLERANCE[case.dtype] and (same or path != path_in_rows)
    return {"case": f"pages of {page_size} {case.name()}", "path": path, "same": same, "error": error, "passed": passed}


def paged_cases() -> list[tuple[Case, int]]:
    """Pages that are whole tiles of the decoding kernel, and pages that are not."""
    shape: dict[str, Any] = {"batch": 3, "num_heads": 4, "num_kv_heads": 2, "seqlen_q": 2, "seqlen_kv": 340}
    shape |= {"head_dim": 64, "value_dim": 64, "kv_lens": (340, 0, 259), "causal": True}
    return [
        (Case(**shape, dtype="bfloat16"), 16),
        (Case(**shape, dtype="float16", sinks=True), 64),
        (Case(**shape, dtype="float16", softcap=9.0), 24),
        (Case(**{**shape, "head_dim": 128, "value_dim": 120, "window": (300, None)}, dtype="bfloat16"), 1),
        (Case(**shape, dtype="float32"), 8),
        (Case(**{**shape, "seqlen_q": 40}, dtype="bfloat16"), 32),
    ]


def packed_cases() -> list[Case]:
    """Lengths of none, one, whole and ragged blocks; the batch is as wide as its longest sequence."""
    q_lens, kv_lens = (70, 0, 1, 64, 9, 33), (90, 5, 30, 64, 0, 140)
    shape: dict[str, Any] = {"batch": 6, "num_heads": 4, "num_kv_heads": 2, "seqlen_q": 70, "seqlen_kv": 140}
    shape |= {"head_dim": 64, "value_dim": 64, "q_lens": q_lens, "kv_lens": kv_lens}
    return [
        Case(**shape, dtype="bfloat16", causal=True, sinks=True),
        Case(**shape, dtype="float16", window=(20, 5), alibi=True),
        Case(**shape, dtype="float32", causal=True),
        Case(**{**shape, "head_dim": 128, "value_dim": 72}, dtype="float16", softcap=7.0, q_offset=3, causal=True),
    ]


def stage_check(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Check the whole grid; the table names what failed."""
    results = []
    complete = True
    forward = [(check_case, case) for case in problems.correctness_grid(small=args.small)]
    backward = [(check_gradients, case) for case in problems.gradient_grid(small=args.small)]
    for check, case in forward + backward:
        if args.filter and args.filter not in case.name():
            continue
        if time.monotonic() > deadline:
            complete = False
            break
        results.append(check(library, memory, case))
    for dtype in ("bfloat16", "float16", "float32"):
        for seqlen_q in (2, 90):
            case = Case(3, 4, 2, seqlen_q, 400, 64, 64, dtype, causal=True, kv_lens=(400, 100, 257), sinks=True)
            if not args.filter:
                results.append(check_padding(library, memory, case))
        case = Case(3, 4, 2, 90, 150, 64, 64, dtype, causal=True, q_lens=(90, 70, 33), kv_lens=(150, 100, 57))
        if not args.filter:
            results.append(check_padded_gradients(library, memory, case))
    if not args.filter:
        results += [check_packed(library, memory, case) for case in packed_cases()]
        results += [check_paged(library, memory, case, page_size) for case, page_size in paged_cases()]
    failed = [r for r in results if not r["passed"]]
    for r in failed:
        print("FAILED", json.dumps(r))
    worst: dict[str, float] = {}
    for r in results:
        if "error" in r and not r["case"].startswith(("packed", "pages")):
            key = f"{r['path']} {r['case'].split()[4]}"
            worst[key] = max(worst.get(key, 0.0), r["error"])
    for key, error in sorted(worst.items()):
        print(f"  worst ||err||/||ref|| {key:20s} {error:.2e}")
    print(f"check: {len(results) - len(failed)} of {len(results)} passed{'' if complete else ', cut short by time'}")
    return {
        "passed": not failed and complete,
        "count": len(results),
        "failed": failed,
        "worst": worst,
        "results": results,
    }


def stage_tiny(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """One small launch of every path and policy, for a checker to watch."""
    done = 0
    for head_dim in (64, 128, 256):
        for seqlen_q in (1, 70):
            for softcap in (0.0, 5.0):
                for dtype in ("bfloat16", "float32"):
                    case = Case(
                        1, 2, 1, seqlen_q, 300, head_dim, head_dim, dtype, causal=True, softcap=softcap, sinks=True
                    )
                    assert check_case(library, memory, case)["passed"], case.name()
                    assert check_gradients(library, memory, case)["passed"], case.name()
                    done += 2
    for case in packed_cases():
        assert check_packed(library, memory, case)["passed"], case.name()
    for case, page_size in paged_cases():
        assert check_paged(library, memory, case, page_size)["passed"], case.name()
    done += len(packed_cases()) + len(paged_cases())
    print(f"tiny: {done} problems")
    return {"passed": True, "count": done}


def time_cuda(torch: Any, function: Callable[[], Any], launches: int) -> float:
    """Seconds of one call, from events around `launches` of them."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(launches):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / launches


def stage_ceilings(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and the bf16 matrix product on random data."""
    torch = memory.torch
    source = torch.randn(1 << 30, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = statistics.median(time_cuda(torch, partial(target.copy_, source), 5) for _ in range(5))
    del source, target
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    time_cuda(torch, partial(torch.matmul, a, b), 3)
    product = statistics.median(time_cuda(torch, partial(torch.matmul, a, b), 10) for _ in range(5))
    result = {"copy_gb_s": 2 * 4 * (1 << 30) / copy / 1e9, "gemm_tflop_s": 2 * 8192**3 / product / 1e12}
    print(f"ceilings: copy {result['copy_gb_s']:.0f} GB/s, 8192^3 bf16 {result['gemm_tflop_s']:.0f} TFLOP/s")
    return result


class TorchForward:
    """Our forward on torch CUDA tensors, outputs and workspace allocated once."""

    def __init__(self, library: Any, q: Any, k: Any, v: Any, causal: bool, variant: int = -1) -> None:
        import torch

        self.library, self.variant, self.keep = library, variant, (q, k, v)
        self.out = torch.empty(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype)
        p = self.problem = cuda.Problem()
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", self.out)):
            dtype = str(tensor.dtype).removeprefix("torch.")
            setattr(p, name, cuda.view(tensor.data_ptr(), dtype, tensor.shape, tensor.stride()))
        p.causal = causal
        nbytes = library.workspace_nbytes(p, variant=variant)
        self.workspace = torch.empty(max(nbytes, 1), device=q.device, dtype=torch.uint8)
        self.torch = torch

    def __call__(self) -> Any:
        """Launch once."""
        self.library.forward(
            self.problem,
            stream=self.torch.cuda.current_stream().cuda_stream,
            workspace=self.workspace.data_ptr(),
            workspace_nbytes=self.workspace.numel(),
            variant=self.variant,
        )
        return self.out


class TorchBackward:
    """Our backward on torch CUDA tensors, after one forward; everything allocated once."""

    def __init__(self, library: Any, q: Any, k: Any, v: Any, dout: Any, causal: bool, variant: int = -1) -> None:
        forward = TorchForward(library, q, k, v, causal)
        self.variant = variant
        torch, self.forward = forward.torch, forward
        lse = torch.empty(q.shape[:3], device=q.device, dtype=torch.float32)
        forward.problem.lse = cuda.view(lse.data_ptr(), "float32", lse.shape, lse.stride())
        forward()
        self.gradients = [torch.empty_like(x) for x in (q, k, v)]
        self.given = cuda.Gradients()
        for name, tensor in zip(("dout", "dq", "dk", "dv"), (dout, *self.gradients), strict=True):
            dtype = str(tensor.dtype).removeprefix("torch.")
            setattr(self.given, name, cuda.view(tensor.data_ptr(), dtype, tensor.shape, tensor.stride()))
        nbytes = library.workspace_nbytes(forward.problem, gradients=self.given)
        self.workspace = torch.empty(nbytes, device=q.device, dtype=torch.uint8)
        self.keep = (lse, dout)

    def __call__(self) -> Any:
        """Launch once."""
        self.forward.library.backward(
            self.forward.problem,
            self.given,
            stream=self.forward.torch.cuda.current_stream().cuda_stream,
            workspace=self.workspace.data_ptr(),
            workspace_nbytes=self.workspace.numel(),
            variant=self.variant,
        )
        return self.gradients


def speed_shapes() -> list[tuple[int, int, int, int, bool]]:
    """(batch, heads, length, head_dim, causal) with batch * length = 16k and heads * head_dim = 2048."""
    return [
        (16384 // s, 2048 // d, s, d, causal)
        for d in (64, 128)
        for s in (512, 2048, 4096, 16384)
        for causal in (False, True)
    ]


def flop(batch: int, heads: int, seqlen: int, head_dim: int, causal: bool) -> float:
    return 4.0 * batch * heads * seqlen * seqlen * head_dim * (0.5 if causal else 1.0)


def peers(torch: Any, q: Any, k: Any, v: Any, causal: bool) -> dict[str, Callable[[], Any]]:
    """PyTorch's backends that accept this problem."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def run_peer(backend: Any) -> Any:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    found = {}
    for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
        call = partial(run_peer, getattr(SDPBackend, name))
        try:
            call()
            found[name.split("_")[0]] = call
        except RuntimeError as error:
            print(f"  {name} does not take this problem: {str(error).splitlines()[0]}")
    return found


def times_in_turn(
    torch: Any, candidates: dict[str, Callable[[], Any]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds a call of each candidate, round by round, after a few to warm up."""
    for call in candidates.values():
        time_cuda(torch, call, 3)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, call in candidates.items():
            times[name].append(time_cuda(torch, call, args.launches))
    return times


def stage_ratios(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Median ratio of ours to each peer's rate; every output is compared with cuDNN's before it is timed."""
    torch = memory.torch
    rows = []
    for batch, heads, seqlen, head_dim, causal in speed_shapes():
        if time.monotonic() > deadline:
            print("  cut short by time")
            break
        q, k, v = (torch.randn(batch, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        ours = TorchForward(library, q, k, v, causal)
        candidates = {"ours": ours, **peers(torch, q, k, v, causal)}
        wanted = next(call for name, call in candidates.items() if name != "ours")().float()
        difference = float((ours().float() - wanted).norm() / wanted.norm())
        assert difference < 8e-3, f"ours differs from the peer by {difference}"
        times = times_in_turn(torch, candidates, args)
        work = flop(batch, heads, seqlen, head_dim, causal) / 1e12
        row: dict[str, Any] = {"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim, "causal": causal}
        for name, samples in times.items():
            row[name] = work / statistics.median(samples)
            if name != "ours":
                ratios = [peer / own for peer, own in zip(samples, times["ours"], strict=True)]
                row["ratio_" + name] = [min(ratios), statistics.median(ratios), max(ratios)]
        rows.append(row)
        text = "  ".join(
            f"{n} {row[n]:.0f}" + (f" (x{row['ratio_' + n][1]:.2f})" if n != "ours" else "") for n in times
        )
        print(f"  d{head_dim} s{seqlen} {'causal' if causal else 'full  '} TFLOP/s: {text}")
    return {"rows": rows}


def stage_gradients(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Median rates of the backward pass alone, five products counted, ours and each peer's that has one."""
    torch = memory.torch
    rows = []
    for batch, heads, seqlen, head_dim, causal in speed_shapes():
        if time.monotonic() > deadline:
            print("  cut short by time")
            break
        q, k, v, dout = (
            torch.randn(batch, heads, seqlen, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=i < 3)
            for i in range(4)
        )
        ours = TorchBackward(library, q.detach(), k.detach(), v.detach(), dout, causal)
        candidates: dict[str, Callable[[], Any]] = {"ours": ours}
        for name, call in peers(torch, q, k, v, causal).items():
            candidates[name] = partial(torch.autograd.grad, call(), (q, k, v), dout, retain_graph=True)
        wanted = next(call for name, call in candidates.items() if name != "ours")()
        for mine, theirs in zip(ours(), wanted, strict=True):
            difference = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
            assert difference < 1e-2, f"ours differs from the peer by {difference}"
        times = times_in_turn(torch, candidates, args)
        work = 2.5 * flop(batch, heads, seqlen, head_dim, causal) / 1e12
        row: dict[str, Any] = {"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim, "causal": causal}
        row |= {name: work / statistics.median(samples) for name, samples in times.items()}
        rows.append(row)
        text = "  ".join(
            f"{n} {row[n]:.0f}" + (f" (x{row['ours'] / row[n]:.2f})" if n != "ours" else "") for n in times
        )
        print(f"  d{head_dim} s{seqlen} {'causal' if causal else 'full  '} backward TFLOP/s: {text}")
    return {"rows": rows}


def stage_decode(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Bytes of K and V read per second, graphs replayed over caches that together pass L2 many times."""
    torch = memory.torch
    rows = []
    for batch, heads, kv_heads, seqlen_kv, head_dim in (
        (1, 32, 8, 131072, 128),
        (8, 32, 8, 32768, 128),
        (64, 32, 8, 4096, 128),
        (16, 32, 32, 4096, 64),
        (64, 64, 8, 8192, 64),
    ):
        if time.monotonic() > deadline:
            print("  cut short by time")
            break
        nbytes = 2 * 2 * batch * kv_heads * seqlen_kv * head_dim
        copies = max(2, -(-(1 << 30) // nbytes))
        q = torch.randn(batch, heads, 1, head_dim, device="cuda", dtype=torch.bfloat16)
        caches = [
            [torch.randn(batch, kv_heads, seqlen_kv, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(copies)
        ]
        ours = [TorchForward(library, q, k, v, causal=False) for k, v in caches]
        calls: dict[str, list[Callable[[], Any]]] = {"ours": list(ours)}
        for k, v in caches:
            for name, call in peers(torch, q, k, v, False).items():
                calls.setdefault(name, []).append(call)
        graphs = {}
        for name, functions in calls.items():
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                for function in functions:
                    function()
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                for function in functions:
                    function()
        row = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seqlen_kv": seqlen_kv, "head_dim": head_dim}
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(args.rounds):
            for name, graph in graphs.items():
                samples[name].append(time_cuda(torch, graph.replay, 3) / copies)
        for name, times in samples.items():
            row[name] = nbytes / statistics.median(times) / 1e9
        rows.append(row)
        print(
            f"  b{batch} h{heads}/{kv_heads} kv{seqlen_kv} d{head_dim} GB/s: "
            + "  ".join(f"{n} {row[n]:.0f}" for n in samples)
        )
    return {"rows": rows}


def stage_sweep(library: Any, memory: Any, args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Rates of every forward kernel without policies, and of the backward pass with every kernel of its launches."""
    torch = memory.torch
    rows = []
    kernels = {64: (0, 1, 80, 83, 90, 93), 128: (2, 3, 4, 81, 84, 91, 94), 256: (5, 6, 82, 92)}
    for head_dim, variants in kernels.items():
        for causal in (False, True):
            q, k, v, dout = (
                torch.randn(4, 2048 // head_dim, 4096, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
            )
            calls: dict[int, Callable[[], Any]] = {}
            for variant in variants:
                if variant < 80:
                    calls[variant] = TorchForward(library, q, k, v, causal, variant)
                else:
                    calls[variant] = TorchBackward(library, q, k, v, dout, causal, variant)
            for call in calls.values():
                time_cuda(torch, call, 3)
            for variant, call in calls.items():
                seconds = statistics.median(time_cuda(torch, call, args.launches) for _ in range(args.rounds))
                work = flop(4, 2048 // head_dim, 4096, head_dim, causal) * (1.0 if variant < 80 else 2.5)
                rate = work / seconds / 1e12
                rows.append({"head_dim": head_dim, "causal": causal, "variant": variant, "tflop_s": rate})
                print(f"  d{head_dim} {'causal' if causal else 'full  '} variant {variant}: {rate:.0f} TFLOP/s")
    return {"rows": rows}


STAGES = {
    "check": stage_check,
    "tiny": stage_tiny,
    "ceilings": stage_ceilings,
    "ratios": stage_ratios,
    "gradients": stage_gradients,
    "decode": stage_decode,
    "sweep": stage_sweep,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="the backend's shared object")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the emulated device")
    parser.add_argument(
        "--stages", default="check,ceilings,ratios,gradients,decode,sweep", help="comma separated, in this order"
    )
    parser.add_argument("--small", action="store_true", help="sizes that an emulated device can run")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all stages together")
    parser.add_argument("--json", type=Path, help="where to write everything")
    args = parser.parse_args(argv)
    args.stages = args.stages.split(",")
    unknown = [name for name in args.stages if name not in STAGES]
    if unknown:
        parser.error(f"--stages has {unknown[0]!r}, expected some of {', '.join(STAGES)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the stages; exit status 1 when a check failed."""
    args = parse_arguments(argv)
    begin = time.monotonic()
    library = cuda.Library(args.library.resolve())
    report: dict[str, Any] = {"arguments": {k: str(v) for k, v in vars(args).items()}}
    if args.device == "cuda":
        memory: Any = TorchMemory()
        torch = memory.torch
        properties = torch.cuda.get_device_properties(0)
        report["machine"] = {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        print(json.dumps(report["machine"]))
    else:
        memory = HostMemory()
    passed = True
    for i, name in enumerate(args.stages):
        left = args.minutes * 60 - (time.monotonic() - begin)
        deadline = time.monotonic() + left / (len(args.stages) - i) * (1.5 if i + 1 < len(args.stages) else 1.0)
        started = time.monotonic()
        report[name] = STAGES[name](library, memory, args, deadline)
        report[name]["seconds"] = time.monotonic() - started
        passed &= report[name].get("passed", True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
