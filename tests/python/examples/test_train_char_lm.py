"""The training example, as a user runs it, but short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[3] / "examples" / "train_char_lm.py"

SMALL = [
    *("--steps", "12", "--batch-size", "2", "--context", "64", "--layers", "2", "--width", "32", "--heads", "2"),
    *("--letters", "20", "--learning-rate", "1e-2"),
]


def run(*options):
    command = [sys.executable, EXAMPLE, *SMALL, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_models_learn_the_same():
    out = run("--prompt", "The ")
    steps = re.findall(r"step +(\d+): loss ([\d.]+) \(foveal\), ([\d.]+) \(torch\)", out)
    assert [int(number) for number, *_ in steps] == [1, 2, 4, 6, 8, 10, 12]
    for _, ours, theirs in steps:
        assert abs(float(ours) - float(theirs)) < 1e-3
    assert float(steps[-1][1]) < float(steps[0][1]) - 0.5
    assert re.search(r"foveal: loss [\d.]+ on unseen text, [\d.]+ s", out)
    assert "torch: loss" in out
    assert len(out.split("\n\n", 1)[1]) == len("The ") + 20 + 1


def test_with_dropout():
    out = run("--attention", "foveal", "--dropout", "0.2")
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) \(foveal\)", out)]
    assert losses[-1] < losses[0] - 0.5
    assert "torch" not in out


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_seed_decides(seed):
    def losses():
        return re.findall(
            r"loss [\d.]+", run("--attention", "foveal", "--seed", seed, "--steps", "2", "--dropout", "0.1")
        )

    assert losses() == losses()
