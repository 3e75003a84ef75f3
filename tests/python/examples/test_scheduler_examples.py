"""The examples of the scheduler, as a user runs them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name, *arguments, cwd, timeout=250):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(tmp_path):
    out = run("quickstart_scheduler.py", cwd=tmp_path)
    assert "of 100 turns: {" in out
    assert "7 done in" in out
    for key in ("mail", "backup", "report", "learner 0", "learner 3"):
        assert key in out
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "quickstart_scheduler.png").stat().st_size > 1000


def test_multitask_digits(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    arguments = ["--seeds", "2", "--tuning-seeds", "1", "--epochs", "2", "--png", "picture.png"]
    lines = run("multitask_digits.py", *arguments, cwd=tmp_path).splitlines()
    table = {line[:20].strip(): line[20:] for line in lines}
    assert table[""].split() == ["digit", "odd", "ink", "mean", "than", "equal"]
    for name in ("DWA", "uncertainty", "rate", "difficulty"):
        scores = [float(text) for text in table[name].split()[:4]]
        assert 0.1 < scores[0] <= 1
        assert 0.4 < scores[1] <= 1
        assert "+-" in table[name]
    assert any(name.startswith("tuned ") for name in table)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "picture.png").stat().st_size > 1000
