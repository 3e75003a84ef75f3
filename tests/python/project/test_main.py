"""python -m foveal, as a user runs it."""

import importlib.util
import os
import subprocess
import sys

import pytest

import foveal


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "foveal", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )


def test_info():
    result = run(FOVEAL_ISA="scalar", FOVEAL_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr
    shown = dict(line.split(maxsplit=1) for line in result.stdout.replace("instruction set", "isa").splitlines())
    assert shown["foveal"] == foveal.__version__
    assert shown["isa"].split()[0] == "scalar"
    assert all(isa in shown["isa"] for isa in foveal.info().isas)
    assert shown["threads"] == "3"
    assert set(shown) == {"foveal", "isa", "threads", "PyTorch", "CUDA"}


def test_info_names_the_choices_for_an_unknown_isa():
    result = run(FOVEAL_ISA="mmx")
    assert result.returncode == 1
    assert "mmx" in result.stderr
    assert "scalar" in result.stderr
    assert "Traceback" not in result.stderr


def test_bench_looks_for_the_pictures_folder_first(tmp_path):
    pytest.importorskip("matplotlib")
    result = run("bench", "--quick", "--png", str(tmp_path / "nowhere" / "bench.png"))
    assert result.returncode == 1
    assert "there is no folder" in result.stderr
    assert "|" not in result.stdout


def test_quick_bench(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    result = run("bench", "--quick", "--png", str(picture))
    assert result.returncode == 0, result.stderr
    header, _, *rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert "times numpy" in header
    assert ("times torch" in header) == (importlib.util.find_spec("torch") is not None)
    assert len(rows) >= 5
    assert all("GF/s" in row or "GB/s" in row for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
