"""What must hold on a device: every case against float64, twice for the same bits, padded, packed and in pages."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import numpy as np

import cuda_problems as problems
from cuda_device import HOPPER_SHARED, Backward, Run
from cuda_problems import Case


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
    plan = library.plan(run.problem, HOPPER_SHARED, case.variant, backward.given)
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
    plan = library.plan(run.problem, HOPPER_SHARED, case.variant)
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
    forward_path = run.library.plan(run.problem, HOPPER_SHARED)["path"]
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
        if library.plan(single.problem, HOPPER_SHARED)["path"] == forward_path:
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
    path, path_in_rows = (library.plan(r.problem, HOPPER_SHARED)["path"] for r in (run, in_rows))
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
