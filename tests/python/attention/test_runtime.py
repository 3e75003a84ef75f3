"""Threads, instruction sets and info: settings, their order, and what a wrong environment variable does."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foveal
from foveal import _core, _cuda, _runtime
from foveal._attention import dense as _attention

CALL = "import numpy as np, foveal; x = np.ones((1, 1, 2, 8), np.float32); foveal.attention(x, x, x); "


def run_python(program: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    merged: dict[str, Any] = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", program],
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_is_that_of_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", foveal.__version__)
    assert foveal.info().version == foveal.__version__


def test_info() -> None:
    info = foveal.info()
    assert info.isa == info.isas[0] == _core.isas()[0]
    assert info.isas[-1] == "scalar"
    assert info.num_threads == foveal.get_num_threads() >= 1


def test_info_says_whether_cuda_kernels_were_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libfoveal_cuda.so"
    monkeypatch.setattr(_cuda, "LIBRARY_PATH", library)
    assert foveal.info().cuda is False
    library.touch()
    assert foveal.info().cuda is True


def test_info_names_torch_without_importing_it() -> None:
    torch = pytest.importorskip("torch")
    assert foveal.info().torch == torch.__version__
    from_metadata = torch.__version__.split("+")[0]  # which some builds of torch leave the local part out of
    done = run_python("import foveal, sys; print(foveal.info().torch); assert 'torch' not in sys.modules")
    assert done.stdout.strip() in (torch.__version__, from_metadata), done.stderr


def test_modules_are_there_whatever_was_imported_before() -> None:
    pytest.importorskip("torch")
    done = run_python("import foveal; foveal.torch.register_transformers, foveal.scheduler.Scheduler")
    assert done.returncode == 0, done.stderr
    done = run_python("import sys; sys.modules['torch'] = None; import foveal; assert not hasattr(foveal, 'torch')")
    assert done.returncode == 0, done.stderr
    assert "TYPE_CHECKING" not in dir(foveal)
    assert {*foveal.__all__} <= {*dir(foveal)}


def test_import_and_a_call_leave_torch_alone() -> None:
    done = run_python(CALL + "import sys; assert not {'torch', 'ml_dtypes', 'matplotlib'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


# ---- instruction sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _core.isas())
def test_foveal_isa_chooses(name: str) -> None:
    done = run_python(CALL + "print(foveal.info().isa)", FOVEAL_ISA=name)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("name", ["avx1024", "AVX2", " "])
def test_an_unknown_foveal_isa_raises_at_first_use(name: str) -> None:
    choices = ", ".join(_core.isas())
    expected = f"ValueError: FOVEAL_ISA is '{name}', expected one of: {choices}"
    for use in ("foveal.info()", CALL):
        done = run_python(f"import foveal; print('imported'); {use}", FOVEAL_ISA=name)
        assert done.stdout.strip() == "imported"
        assert done.stderr.strip().endswith(expected)


def test_an_empty_foveal_isa_is_none() -> None:
    assert run_python("import foveal; print(foveal.info().isa)", FOVEAL_ISA="").stdout.strip() == _core.isas()[0]


def test_use_isa_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="use_isa: name is 'sse9', expected one of: "):
        _core.use_isa("sse9")
    assert _core.isa() == _core.isas()[0]


def test_instruction_sets_agree() -> None:
    x = np.random.default_rng(0).standard_normal((1, 2, 40, 32), dtype=np.float32)
    results = []
    for name in _core.isas():
        _core.use_isa(name)
        results.append(foveal.attention(x, x, x))
    _core.use_isa(None)
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=2e-6)  # 16 roundings of values of about 1


# ---- threads --------------------------------------------------------------------------------------------------------


def num_threads(program: str = "pass", **environment: str | None) -> int:
    clean: dict[str, str | None] = {"FOVEAL_NUM_THREADS": None, "OMP_NUM_THREADS": None, **environment}
    done = run_python(f"import foveal; {program}; print(foveal.get_num_threads())", **clean)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_order_of_thread_settings() -> None:
    assert num_threads(OMP_NUM_THREADS="3") == 3
    assert num_threads(OMP_NUM_THREADS="3", FOVEAL_NUM_THREADS="5") == 5
    assert num_threads(OMP_NUM_THREADS="3", FOVEAL_NUM_THREADS="") == 3
    assert num_threads("foveal.set_num_threads(7)", OMP_NUM_THREADS="3", FOVEAL_NUM_THREADS="5") == 7
    assert num_threads("foveal.set_num_threads(7); foveal.set_num_threads(None)", FOVEAL_NUM_THREADS="5") == 5
    if hasattr(os, "sched_getaffinity"):
        assert num_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("text", ["0", "-1", "two", "2x", " 2", "5000", "99999999999"])
def test_a_wrong_foveal_num_threads_raises_at_first_use(text: str) -> None:
    expected = f"ValueError: FOVEAL_NUM_THREADS is '{text}', expected an integer from 1 to 4096"
    for use in ("foveal.info()", "foveal.get_num_threads()", CALL):
        done = run_python(f"import foveal; print('imported'); {use}", FOVEAL_NUM_THREADS=text)
        assert done.stdout.strip() == "imported"
        assert done.stderr.strip().endswith(expected)


def test_a_wrong_foveal_num_threads_can_be_put_right() -> None:
    program = """
import os, foveal
def count():
    try:
        return foveal.get_num_threads()
    except ValueError as error:
        return str(error).split(",")[0]
print(count())
os.environ["FOVEAL_NUM_THREADS"] = "five"
print(count())
os.environ["FOVEAL_NUM_THREADS"] = "5"
print(count())
del os.environ["FOVEAL_NUM_THREADS"]
print(count())
"""
    done = run_python(program, FOVEAL_NUM_THREADS="four")
    expected = ["FOVEAL_NUM_THREADS is 'four'", "FOVEAL_NUM_THREADS is 'five'", "5", "5"]  # once right, it is kept
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize("text", ["100000", "99999999999", str(2**32), str(2**31)])
def test_omp_num_threads_is_bounded(text: str) -> None:
    assert 1 <= num_threads(OMP_NUM_THREADS=text) <= 4096
    # Where there are no so many threads to be had, libgomp ends the process: a call takes no more than it has work for.
    rows = "x = np.ones((8, 1, 64, 64), np.float32); foveal.attention(x, x, x); "
    done = run_python(CALL + rows + "print('done')", OMP_NUM_THREADS=text, FOVEAL_NUM_THREADS=None)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("bad", [0, -1, 4097, 10**20])
def test_set_num_threads_refuses(bad: int) -> None:
    before = foveal.get_num_threads()
    with pytest.raises(ValueError, match=f"set_num_threads: n is {bad}, expected 1 to 4096, or None"):
        foveal.set_num_threads(bad)
    assert foveal.get_num_threads() == before


# ---- docstrings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [_attention, _runtime], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module: Any) -> None:
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0
