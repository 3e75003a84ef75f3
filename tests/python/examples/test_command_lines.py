"""What the examples' command lines refuse: in a line that names the argument, before any work is done."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.parametrize(
    ("example", "arguments", "text"),
    [
        ("semantic_search.py", ["x", "--limit-passages", "-1"], "--limit-passages: -1 is not positive"),
        ("semantic_search.py", ["x", "--cache", "nowhere/c.npz"], "--cache: there is no folder nowhere"),
        ("semantic_search.py", ["x", "--model", "nowhere"], "--model is nowhere, expected a directory with"),
        ("shortest_paths.py", ["--size", "1"], "--size must be at least 2"),
        ("shortest_paths.py", ["--png", "nowhere/p.png"], "--png: there is no folder nowhere"),
        ("prioritized_replay.py", ["--seeds", "0"], "--seeds: 0 is not positive"),
        ("prioritized_replay.py", ["--steps", "10"], "--steps is 10, expected at least 1000"),
        ("stereo_bp.py", ["--scale", "0"], "--scale: 0 is not positive"),
        ("stereo_bp.py", ["--out", "."], "--out: . is a folder"),
        ("train_char_lm.py", ["--steps", "0"], "--steps: 0 is not positive"),
        ("train_char_lm.py", ["--heads", "3"], "--width is 128, expected a multiple of the 3 heads"),
        ("train_char_lm.py", ["--dropout", "1"], "--dropout is 1.0, expected at least 0 and less than 1"),
    ],
)
def test_refused(example, arguments, text, tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / example, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    if "needs: pip install" in result.stderr or "examples need: pip install" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr
