"""The CUDA backend without a GPU.

The kernels' own source runs on the emulated device of tests/cpp/cuda_emulation (its cuda/device.h says what it proves),
through the C interface and the binding that a GPU would use. What needs nvcc (`test_cuda_build.py`) is apart.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench"))
import cuda_checks  # noqa: E402
import cuda_problems as problems  # noqa: E402
import cuda_report  # noqa: E402
from cuda_device import HOPPER_SHARED, Backward, HostMemory, Run, cuda  # noqa: E402
from cuda_problems import Case  # noqa: E402

AMPERE_CONSUMER_SHARED = 99 * 1024


@pytest.fixture(scope="session")
def emulated(emulated_cuda: Path) -> Any:
    """The backend on the emulated device."""
    return cuda.Library(emulated_cuda)


# --- kernels ---------------------------------------------------------------------------------------------------------


def emulated_cases() -> list[Case]:
    """All 16-bit cases; of the plain path, which takes one emulated second each, every fifth."""
    cases = list(problems.correctness_grid(small=True))
    tensor_core = [c for c in cases if c.dtype in ("bfloat16", "float16")]
    plain = [c for c in cases if c.dtype in ("float32", "float64")]
    return tensor_core + plain[::5]


@pytest.mark.parametrize("part", range(8))
def test_kernels_agree_with_float64(emulated: Any, part: int) -> None:
    failed = []
    for case in emulated_cases()[part::8]:
        result = cuda_checks.check_case(emulated, HostMemory(), case)
        if not result["passed"]:
            failed.append(result)
    assert not failed


@pytest.mark.parametrize("part", range(8))
def test_gradients_agree_with_float64(emulated: Any, part: int) -> None:
    failed = []
    cases = list(problems.gradient_grid(small=True))
    of = {dtype: [c for c in cases if c.dtype == dtype] for dtype in problems.GRADIENT_TOLERANCE}
    # The dtypes differ in two instructions each: all options once, of the others every third or seventh.
    chosen = of["bfloat16"] + of["float16"][::3] + of["float32"][::7] + of["float64"][3::7]
    for case in chosen[part::8]:
        result = cuda_checks.check_gradients(emulated, HostMemory(), case)
        if not result["passed"]:
            failed.append(result)
    assert not failed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_of_a_padded_batch_equal_each_sequence_alone(emulated: Any, dtype: str) -> None:
    case = Case(3, 4, 2, 90, 150, 64, 64, dtype, causal=True, q_lens=(90, 70, 33), kv_lens=(150, 100, 57))
    assert cuda_checks.check_padded_gradients(emulated, HostMemory(), case)["passed"]


def test_gradients_are_zero_where_there_is_nothing_to_attend(emulated: Any) -> None:
    no_keys = Case(1, 2, 1, 5, 0, 64, 64, "float16", sinks=True)
    result = cuda_checks.check_gradients(emulated, HostMemory(), no_keys)
    assert result["passed"], result
    no_rows = Case(2, 2, 1, 0, 9, 64, 64, "float16", bias="float32", bias_axes="k")
    result = cuda_checks.check_gradients(emulated, HostMemory(), no_rows)
    assert result["passed"], result


@pytest.mark.parametrize("index", range(len(cuda_checks.packed_cases())))
def test_packed_sequences(emulated: Any, index: int) -> None:
    result = cuda_checks.check_packed(emulated, HostMemory(), cuda_checks.packed_cases()[index])
    assert not result["failed"]


def test_packed_sequences_without_a_token(emulated: Any) -> None:
    case = Case(1, 2, 1, 20, 30, 64, 64, "float16", q_lens=(20,), kv_lens=(0,))
    assert not cuda_checks.check_packed(emulated, HostMemory(), case, margin=0)["failed"]


@pytest.mark.parametrize("index", range(len(cuda_checks.paged_cases())))
def test_keys_in_pages(emulated: Any, index: int) -> None:
    case, page_size = cuda_checks.paged_cases()[index]
    result = cuda_checks.check_paged(emulated, HostMemory(), case, page_size)
    assert result["passed"], result
    assert result["path"] == ("plain" if case.dtype == "float32" or case.seqlen_q > 32 else "decode")


def test_padded_rows_have_no_gradient_beside_a_nan_key(emulated: Any) -> None:
    case = Case(1, 1, 1, 70, 32, 64, 64, "float16", q_lens=(33,))
    arrays = problems.make_inputs(case)
    arrays["k"][:, :, 5] = np.nan
    run = Run(emulated, HostMemory(), case, arrays)
    run()
    dq = Backward(run, problems.make_gradients(case))()["dq"]
    assert np.isnan(dq[:, :, :33]).all()
    assert not dq[:, :, 33:].any()


@pytest.mark.parametrize("seqlen_q", [2, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_padded_batch_equals_each_sequence_alone(emulated: Any, dtype: str, seqlen_q: int) -> None:
    case = Case(3, 4, 2, seqlen_q, 400, 64, 64, dtype, causal=True, kv_lens=(400, 100, 257), sinks=True)
    assert cuda_checks.check_padding(emulated, HostMemory(), case)["passed"]


def test_lengths_beyond_the_arrays_are_cut(emulated: Any) -> None:
    case = Case(1, 1, 1, 5, 40, 64, 64, "float16", kv_lens=(40,))
    arrays = problems.make_inputs(case)
    expected, _ = Run(emulated, HostMemory(), case, arrays)()
    arrays["kv_lens"] = np.array([10**6], np.int32)
    found, _ = Run(emulated, HostMemory(), case, arrays)()
    np.testing.assert_array_equal(found, expected)


# --- plan ------------------------------------------------------------------------------------------------------------


def plan_of(
    library: Any, case: Case, shared_limit: int = HOPPER_SHARED, backward: bool = False, dbias: str | None = None
) -> dict[str, Any]:
    """What would be launched, for views whose memory is never touched."""
    problem, gradients = cuda.Problem(), cuda.Gradients()
    addresses = itertools.count(1)
    extents = {"b": case.batch, "h": case.num_heads, "q": case.seqlen_q, "k": case.seqlen_kv}

    def put(target: Any, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
        setattr(target, name, cuda.view(next(addresses) << 40, dtype, shape, strides))

    for name, heads, seqlen, dim in (
        ("q", case.num_heads, case.seqlen_q, case.head_dim),
        ("k", case.num_kv_heads, case.seqlen_kv, case.head_dim),
        ("v", case.num_kv_heads, case.seqlen_kv, case.value_dim),
        ("out", case.num_heads, case.seqlen_q, case.value_dim),
    ):
        shape = (case.batch, heads, seqlen, dim)
        put(problem, name, case.dtype, shape)
        put(gradients, "d" + name, case.dtype, shape)
    put(problem, "lse", "float64" if case.dtype == "float64" else "float32", shape[:3])
    problem.softcap = case.softcap
    if dbias is not None:
        bias = tuple(n if axis in dbias else 1 for axis, n in extents.items())
        put(problem, "bias", "float32", bias)
        put(gradients, "dbias", "float64" if case.dtype == "float64" else "float32", bias)
    if case.sinks:
        put(problem, "sinks", "float32", (case.num_heads,))
        put(gradients, "dsinks", "float64" if case.dtype == "float64" else "float32", (case.num_heads,))
    return dict(library.plan(problem, shared_limit, case.variant, gradients if backward else None))


BASE = Case(2, 8, 2, 1000, 1000, 128, 128, "bfloat16")


@pytest.mark.parametrize(
    ("changes", "path", "variant"),
    [
        ({}, "forward", 2),
        ({"head_dim": 64, "value_dim": 64}, "forward", 0),
        ({"head_dim": 64, "value_dim": 96}, "forward", 2),
        ({"head_dim": 256, "value_dim": 256}, "forward", 5),
        ({"softcap": 5.0}, "forward", 21),
        ({"seqlen_q": 16}, "decode", 42),
        ({"seqlen_q": 17}, "forward", 2),
        ({"head_dim": 100, "value_dim": 100}, "plain", 60),
        ({"dtype": "float32"}, "plain", 60),
        ({"dtype": "float64"}, "plain", 61),
        ({"seqlen_q": 0}, "empty", -1),
        ({"variant": 4}, "forward", 4),
    ],
)
def test_path_and_kernel(emulated: Any, changes: dict[str, Any], path: str, variant: int) -> None:
    plan = plan_of(emulated, dataclasses.replace(BASE, **changes))
    assert (plan["path"], plan["variant"]) == (path, variant)


def test_a_device_with_less_shared_memory_gets_a_smaller_kernel(emulated: Any) -> None:
    large = dataclasses.replace(BASE, head_dim=256, value_dim=256)
    assert plan_of(emulated, large, AMPERE_CONSUMER_SHARED)["variant"] == 6
    few = dataclasses.replace(BASE, seqlen_q=1)
    assert plan_of(emulated, few, AMPERE_CONSUMER_SHARED)["variant"] == 43
    for dim in (64, 128, 256):
        for changes in ({}, {"softcap": 1.0}, {"seqlen_q": 1}, {"dtype": "float64"}):
            case = dataclasses.replace(BASE, head_dim=dim, value_dim=dim, **changes)
            assert plan_of(emulated, case, AMPERE_CONSUMER_SHARED)["shared_nbytes"] <= AMPERE_CONSUMER_SHARED


def test_splits_depend_on_neither_batch_nor_heads(emulated: Any) -> None:
    decode = dataclasses.replace(BASE, seqlen_q=1, seqlen_kv=10_000)
    splits = {
        plan_of(emulated, dataclasses.replace(decode, batch=b, num_heads=h, num_kv_heads=h))["num_splits"]
        for b in (1, 200)
        for h in (1, 64)
    }
    assert splits == {40}
    few = plan_of(emulated, decode)
    many = plan_of(emulated, dataclasses.replace(decode, batch=6))
    assert many["num_blocks"] == 3 * few["num_blocks"]


@pytest.mark.parametrize(
    ("changes", "path", "kernels"),
    [
        ({}, "backward", [100, 81, 91]),
        ({"head_dim": 64, "value_dim": 64, "sinks": True}, "backward", [100, 80, 90, 104]),
        ({"head_dim": 64, "value_dim": 136}, "backward", [100, 82, 92]),
        ({"head_dim": 100, "value_dim": 100}, "backward_plain", [100, 101, 102]),
        ({"dtype": "float32"}, "backward_plain", [100, 101, 102]),
        ({"dtype": "float64", "sinks": True}, "backward_plain", [105, 106, 107, 109]),
        ({"seqlen_q": 0}, "backward", [91]),
        ({"seqlen_kv": 0}, "backward", [100, 81]),
        ({"batch": 0}, "empty", []),
    ],
)
def test_steps_of_the_backward_pass(emulated: Any, changes: dict[str, Any], path: str, kernels: list[int]) -> None:
    plan = plan_of(emulated, dataclasses.replace(BASE, **changes), backward=True)
    assert (plan["path"], [step["variant"] for step in plan["steps"]]) == (path, kernels)


def test_a_variant_changes_its_own_launch_of_the_backward_pass(emulated: Any) -> None:
    for variant, kernels in ((84, [100, 84, 91]), (94, [100, 81, 94])):
        plan = plan_of(emulated, dataclasses.replace(BASE, variant=variant), backward=True)
        assert [step["variant"] for step in plan["steps"]] == kernels
    for changes in ({"variant": 83}, {"variant": 84, "dtype": "float32"}, {"variant": 2}):
        with pytest.raises(ValueError, match=r"variant is \d+, which does not fit"):
            plan_of(emulated, dataclasses.replace(BASE, **changes), backward=True)


def test_backward_grids_and_workspace(emulated: Any) -> None:
    plan = plan_of(emulated, BASE, backward=True, dbias="hk")
    blocks = {step["variant"]: step["num_blocks"] for step in plan["steps"]}
    assert plan["workspace_nbytes"] == 2 * 4 * (2 * 8 * 1024)  # lse and delta of rows padded to 64
    assert blocks == {100: 2 * 8 * 1024 // 64, 81: 2 * 8 * 8, 91: 2 * 2 * 16, 103: 8 * 32}
    small = plan_of(
        emulated, dataclasses.replace(BASE, head_dim=256, value_dim=256), AMPERE_CONSUMER_SHARED, True, "hk"
    )
    assert max(step["shared_nbytes"] for step in small["steps"]) <= AMPERE_CONSUMER_SHARED
    wide = dataclasses.replace(BASE, head_dim=256, value_dim=256, dtype="float64")
    small = plan_of(emulated, wide, AMPERE_CONSUMER_SHARED, True, "hk")
    assert max(step["shared_nbytes"] for step in small["steps"]) <= AMPERE_CONSUMER_SHARED


# --- errors ----------------------------------------------------------------------------------------------------------


def test_arguments_are_judged_as_on_the_cpu(emulated: Any) -> None:
    problem = cuda.Problem()
    problem.q = cuda.view(1 << 44, "float16", (2, 4, 5, 64), (1280, 320, 64, 1))
    problem.k = cuda.view(2 << 44, "float16", (2, 4, 5, 96), (1920, 480, 96, 1))
    problem.v = cuda.view(3 << 44, "float16", (2, 4, 5, 64), (1280, 320, 64, 1))
    with pytest.raises(ValueError, match=r"attention: k\.shape\[3\] is 96, expected head_dim 64 \(from q\)"):
        emulated.plan(problem, HOPPER_SHARED)
    problem.k = cuda.view(2 << 44, "float32", (2, 4, 5, 64), (1280, 320, 64, 1))
    with pytest.raises(TypeError, match="attention: k has dtype float32, expected float16"):
        emulated.plan(problem, HOPPER_SHARED)


def test_limits_are_named(emulated: Any) -> None:
    with pytest.raises(NotImplementedError, match="head_dim is 264, the CUDA backend takes at most 256"):
        plan_of(emulated, dataclasses.replace(BASE, head_dim=264))
    with pytest.raises(ValueError, match="variant is 0, which does not fit"):
        plan_of(emulated, dataclasses.replace(BASE, variant=0))


def test_a_workspace_that_is_too_small_is_refused(emulated: Any) -> None:
    case = Case(1, 1, 1, 1, 600, 64, 64, "float16")
    run = Run(emulated, HostMemory(), case, problems.make_inputs(case))
    run()
    with pytest.raises(MemoryError, match=r"the workspace has 8 bytes, expected 780"):
        emulated.forward(run.problem, workspace_nbytes=8)


def spliced(fields: list[Any], after: str, new: Any) -> list[Any]:
    """Put a field behind the one of a name."""
    place = [name for name, *_ in fields].index(after) + 1
    return [*fields[:place], new, *fields[place:]]


SIZE = ctypes.sizeof(cuda.Problem)
SIZES = f"AttentionProblem is {SIZE} there, {SIZE - 8} here"


def exchanged(fields: list[Any], one: str, other: str) -> list[Any]:
    """Name each of two fields as the other."""
    names = {one: other, other: one}
    return [(names.get(name, name), kind) for name, kind in fields]


@pytest.mark.parametrize(
    ("structure", "changed", "named"),
    [
        ("Problem", lambda fields: [*fields, ("more", ctypes.c_int64)], "AttentionProblem.more is absent there"),
        ("Problem", lambda fields: exchanged(fields, "softcap", "dropout_p"), "AttentionProblem.dropout_p is"),
        ("Problem", lambda fields: exchanged(fields, "layout", "causal"), "AttentionProblem.causal is"),
        # Where one byte after `causal` is free, so that no size tells.
        (
            "Problem",
            lambda fields: spliced(fields, "causal", ("spare", ctypes.c_uint8)),
            "spare is absent",
        ),
        ("Problem", lambda fields: fields[:-1], SIZES),
        ("Gradients", lambda fields: exchanged(fields, "dk", "dv"), "AttentionGradients.dv is"),
        ("View", lambda fields: exchanged(fields, "shape", "stride"), "TensorView.stride is"),
        ("_Launch", lambda fields: exchanged(fields, "stream", "workspace"), "Launch.workspace is"),
    ],
)
def test_a_library_from_another_tree_is_refused(
    emulated: Any, monkeypatch: pytest.MonkeyPatch, structure: str, changed: Any, named: str
) -> None:
    fields = changed(list(getattr(cuda, structure)._fields_))
    monkeypatch.setattr(cuda, structure, type(structure, (ctypes.Structure,), {"_fields_": fields}))
    with pytest.raises(ImportError, match=rf"({named}).*rebuild foveal"):
        cuda.Library(emulated.path)


def test_numbers_from_another_tree_are_refused(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DTYPES", {**cuda.DTYPES, "int8": 6, "int32": 5})
    with pytest.raises(ImportError, match=r"DType\.int8 is 5 there, 6 here; rebuild foveal"):
        cuda.Library(emulated.path)


def test_what_the_backend_lacks_is_refused_by_name(emulated: Any) -> None:
    case = Case(1, 1, 1, 4, 6, 64, 64, "float16")
    run = Run(emulated, HostMemory(), case, problems.make_inputs(case))
    run()
    run.problem.dropout_p = 0.5
    with pytest.raises(NotImplementedError, match="attention: dropout_p is not 0, which the CUDA backend lacks"):
        emulated.plan(run.problem, HOPPER_SHARED)


def test_gradients_are_judged_as_on_the_cpu(emulated: Any) -> None:
    case = Case(1, 1, 1, 4, 6, 64, 64, "float16")
    run = Run(emulated, HostMemory(), case, problems.make_inputs(case))
    run()
    backward = Backward(run, problems.make_gradients(case))
    backward()
    backward.given.dk.shape[2] = 5
    with pytest.raises(ValueError, match=r"attention: dk has shape \(1, 1, 5, 64\)"):
        emulated.backward(run.problem, backward.given)
    backward.given.dk.shape[2] = 6
    with pytest.raises(MemoryError, match=r"the workspace has 0 bytes, expected 512"):
        emulated.backward(run.problem, backward.given)


# --- the oracle and the report ---------------------------------------------------------------------------------------


def test_the_reference_equals_a_softmax_written_out() -> None:
    case = Case(1, 2, 1, 3, 4, 8, 8, "float64", causal=True)
    arrays = problems.make_inputs(case)
    out, lse = problems.reference(case, arrays)
    for head in range(2):
        scores = arrays["q"][0, head] @ arrays["k"][0, 0].T / np.sqrt(8)
        scores[np.arange(4)[None, :] > np.arange(3)[:, None] + 1] = -np.inf
        weights = np.exp(scores)
        np.testing.assert_allclose(lse[0, head], np.log(weights.sum(1)), rtol=1e-14)
        weights /= weights.sum(1, keepdims=True)
        np.testing.assert_allclose(out[0, head], weights @ arrays["v"][0, 0], rtol=1e-13)


def test_errors_see_what_they_must() -> None:
    good = np.array([[1.0, -2.0], [np.nan, 3.0]])
    assert problems.relative_error(good, good) == 0.0
    assert problems.relative_error(np.array([[1.0, np.nan], [np.nan, 3.0]]), good) == np.inf
    assert problems.relative_error(np.array([[1.0, -2.0], [0.0, 3.0]]), good) == np.inf
    assert problems.absolute_error(np.array([-np.inf, 1.0]), np.array([-np.inf, 1.5])) == 0.5
    assert problems.absolute_error(np.array([0.0, 1.5]), np.array([-np.inf, 1.5])) == np.inf


def test_arguments_of_the_report() -> None:
    args = cuda_report.parse_arguments(["--library", "x.so", "--stages", "check,ratios"])
    assert args.stages == ["check", "ratios"]
    with pytest.raises(SystemExit):
        cuda_report.parse_arguments(["--library", "x.so", "--stages", "speed"])


def test_the_report_writes_what_it_found(emulated: Any, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    options = f"--library {emulated.path} --device cpu --small --stages check --json {target}"
    assert cuda_report.main([*options.split(), "--filter", "s1x1 d64/64 float16"]) == 0
    assert '"failed": []' in target.read_text()
