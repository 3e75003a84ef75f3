"""The stereo example: its message loop against one in NumPy, exactness on chains in every order, a known pair."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"
RUNS = [("synchronous", 1), ("synchronous", 3), ("fifo", 1), ("residual", 1), ("residual", 3), ("relaxed", 3)]

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler: the example has a C++ part"
)


@pytest.fixture(scope="module")
def stereo_bp():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import stereo_bp
    finally:
        sys.path.remove(str(EXAMPLES))
    return stereo_bp


@pytest.fixture(scope="module")
def library(stereo_bp, tmp_path_factory):
    return stereo_bp.build(tmp_path_factory.mktemp("stereo_bp"))


def random_problem(stereo_bp, height, width, labels, jump, seed):
    random = np.random.default_rng(seed)
    data = random.random((height, width, labels), np.float32)
    weight = random.uniform(0.05, 0.4, (height, width, 2)).astype(np.float32)
    return stereo_bp.Problem(data, weight, jump)


def numpy_rounds(problem, rounds):
    """All messages `rounds` times from those of the round before: the beliefs, and what the next round would change."""
    height, width, labels = problem.data.shape
    steps = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}  # the side that a message comes from
    apart = np.minimum(np.abs(np.subtract.outer(np.arange(labels), np.arange(labels))), problem.jump)

    def weight(y, x, side):
        dy, dx = steps[side]
        return problem.weight[min(y, y + dy), min(x, x + dx), int(side >= 2)]

    def next_round(messages):
        new, change = np.zeros_like(messages), np.zeros(messages.shape[:3])
        for y, x, side in np.ndindex(height, width, 4):
            fy, fx = y + steps[side][0], x + steps[side][1]
            if not (0 <= fy < height and 0 <= fx < width):
                continue
            h = problem.data[fy, fx] + messages[fy, fx].sum(0) - messages[fy, fx, side ^ 1]
            message = (h[:, None] + weight(y, x, side) * apart).min(0)
            new[y, x, side] = message - message.min()
            difference = new[y, x, side] - messages[y, x, side]
            change[y, x, side] = difference.max() - difference.min()
        return new, change

    messages = np.zeros((height, width, 4, labels))
    for _ in range(rounds):
        messages, _ = next_round(messages)
    return problem.data + messages.sum(2), next_round(messages)[1]


@pytest.mark.parametrize("labels", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("jump", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_synchronous_rounds_are_those_of_numpy(stereo_bp, library, labels, jump, threads):
    problem = random_problem(stereo_bp, 4, 5, labels, jump, seed=labels)
    for rounds in (0, 1, 4):
        beliefs, residuals = numpy_rounds(problem, rounds)
        with stereo_bp.Propagation(library, problem, "synchronous", threads, tolerance=-1) as propagation:
            assert propagation.run(rounds * problem.edges) == rounds * problem.edges
            np.testing.assert_allclose(propagation.residuals(), residuals, atol=2e-6)
            np.testing.assert_array_equal(propagation.labels(), beliefs.argmin(-1))


def lowest_energy_of_chain(problem):
    """Viterbi."""
    data, weight = problem.data[0], problem.weight[0, :, 0]
    labels = np.arange(data.shape[1])
    apart = np.minimum(np.abs(np.subtract.outer(labels, labels)), problem.jump)
    best = data[0].astype(float)
    for x in range(1, len(data)):
        best = (best[:, None] + weight[x - 1] * apart).min(0) + data[x]
    return best.min()


@pytest.mark.parametrize(("schedule", "threads"), RUNS)
def test_chains_are_solved_exactly(stereo_bp, library, schedule, threads):
    for seed in range(5):
        problem = random_problem(stereo_bp, 1, 200, 9, 2, seed)
        with stereo_bp.Propagation(library, problem, schedule, threads, tolerance=1e-6) as propagation:
            while propagation.run(10**6):
                pass
            assert propagation.residuals().max() < 1e-5
            energy = problem.energy(propagation.labels())
        assert energy == pytest.approx(lowest_energy_of_chain(problem), rel=1e-5)


@pytest.mark.parametrize(("schedule", "threads"), RUNS)
def test_what_is_left_is_below_the_tolerance(stereo_bp, library, schedule, threads):
    """A grid with strong data, on which every order converges."""
    problem = random_problem(stereo_bp, 20, 30, 12, 2, seed=1)
    problem.weight *= 0.2
    with stereo_bp.Propagation(library, problem, schedule, threads, tolerance=0.01) as propagation:
        for _ in range(100):
            if propagation.run(problem.edges) == 0:
                break
        else:
            pytest.fail("did not end")
        # The synchronous order knows what the last round changed, of which up to three messages meet in the next.
        assert propagation.residuals().max() <= (0.03 if schedule == "synchronous" else 0.01) + 1e-6


def test_residual_order_needs_fewer_messages(stereo_bp, library):
    """Where little is going on: information enters at the few pixels that prefer a label."""
    problem = stereo_bp.Problem(np.zeros((40, 40, 8), np.float32), np.full((40, 40, 2), 0.1, np.float32), 4)
    random = np.random.default_rng(0)
    for y, x, label in zip(*random.integers(0, [[40], [40], [8]], (3, 20)), strict=True):
        problem.data[y, x] = 1
        problem.data[y, x, label] = 0
    messages = {
        schedule: stereo_bp.measure(library, problem, schedule, 1, 1e-3, 200).messages
        for schedule in ("synchronous", "residual")
    }
    assert messages["residual"] < messages["synchronous"]


def test_a_shifted_pattern_is_found(stereo_bp, library):
    random = np.random.default_rng(3)
    truth = np.full((40, 80), 3)
    truth[10:30, 30:60] = 9
    right = random.uniform(0, 255, (40, 80, 3)).astype(np.float32)
    left = np.take_along_axis(right, (np.arange(80) - truth)[..., None] % 80, 1)
    problem = stereo_bp.problem_of(left, right, 12)
    for schedule in stereo_bp.SCHEDULES:
        outcome = stereo_bp.measure(library, problem, schedule, 1, 1e-3, 100)
        assert stereo_bp.bad_share(outcome.labels[:, 12:], truth[:, 12:]) < 0.02, schedule
        assert outcome.energy == pytest.approx(problem.energy(outcome.labels))


@pytest.mark.parametrize(
    ("schedule", "threads", "labels", "jump"),
    [("fifo", 2, 3, 1), ("best", 1, 3, 1), ("residual", 1, 257, 1), ("residual", 1, 3, 9)],
)
def test_arguments_that_do_not_go_together(stereo_bp, library, schedule, threads, labels, jump):
    problem = random_problem(stereo_bp, 2, 2, labels, jump, seed=0)
    with pytest.raises(ValueError, match=schedule):
        stereo_bp.Propagation(library, problem, schedule, threads)


def test_the_command(tmp_path):
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("needs the pictures: pip install '.[stereo]'")
    out = tmp_path / "out.png"
    options = ["--scale", "4", "--rounds", "20", "--repeats", "1", "--out", str(out)]
    command = [sys.executable, str(EXAMPLES / "stereo_bp.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {tuple(line.split()[:2]): line.split() for line in done.stdout.splitlines() if line.endswith("%")}
    assert {schedule for schedule, _ in rows} == {"synchronous", "fifo", "residual", "relaxed"}
    assert all(float(row[-1].rstrip("%")) < 20 for row in rows.values())
    assert out.read_bytes().startswith(b"\x89PNG")
