"""The examples of the queues: shortest paths against Bellman and Ford, the parts of the learner one by one, and both
as a user runs them.
"""

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def imported(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def run(name, *arguments):
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- shortest paths --------------------------------------------------------------------------------------------------


def bellman_ford(graph, source):
    sources = np.repeat(np.arange(len(graph)), np.diff(graph.starts))
    distances = np.full(len(graph), np.inf)
    distances[source] = 0.0
    while True:
        shorter = distances.copy()
        np.minimum.at(shorter, graph.neighbours, distances[sources] + graph.costs)
        if (shorter == distances).all():
            return distances
        distances = shorter


@pytest.mark.parametrize("size", [2, 3, 17])
@pytest.mark.parametrize("seed", range(3))
def test_paths_are_shortest(size, seed):
    paths = imported("shortest_paths")
    rng = np.random.default_rng(seed)
    graph = paths.grid(paths.hills(size, rng) * 3)
    source, target = rng.integers(0, size * size, 2)
    expected = bellman_ford(graph, source)
    everywhere = paths.search(graph, source)
    np.testing.assert_allclose(everywhere.distances, expected, rtol=1e-12)
    assert everywhere.settled == len(graph)

    at_least = paths.straight_lines((size, size), target)
    found = paths.search(graph, source, target, at_least)
    assert found.distances[target] == pytest.approx(expected[target], rel=1e-12)
    assert found.settled <= everywhere.settled
    assert (at_least <= bellman_ford(graph, target) * (1 + 1e-12)).all()  # the graph is the same both ways

    path = found.path_to(target)
    assert (path[0], path[-1]) == (source, target)
    cost = 0.0
    for here, there in itertools.pairwise(path):
        edges = slice(graph.starts[here], graph.starts[here + 1])
        (edge,) = np.flatnonzero(graph.neighbours[edges] == there)
        cost += graph.costs[edges][edge]
    assert cost == pytest.approx(expected[target], rel=1e-12)


def test_a_search_leaves_out_what_cannot_be_reached():
    paths = imported("shortest_paths")
    graph = paths.Graph(np.array([0, 1, 1, 2]), np.array([1, 0]), np.array([2.0, 1.0]))  # 0 -> 1, 2 -> 0
    found = paths.search(graph, 0)
    assert found.distances.tolist() == [0.0, 2.0, np.inf]
    assert (found.settled, found.path_to(1)) == (2, [0, 1])


def test_shortest_paths_as_a_user_runs_it(tmp_path):
    pytest.importorskip("scipy")
    output = run("shortest_paths.py", "--size", 40, "--png", tmp_path / "paths.png")
    assert "1600 nodes" in output
    assert "all distances agree with scipy" in output
    assert (tmp_path / "paths.png").stat().st_size > 10_000


# ---- prioritised replay ----------------------------------------------------------------------------------------------


@pytest.fixture
def replay():
    pytest.importorskip("gymnasium")
    return imported("prioritized_replay")


def test_the_network_descends_against_the_slope_of_its_loss(replay):
    rng = np.random.default_rng(0)
    network = replay.QNetwork([3, 5, 5, 2], 0.0, rng)
    states, wanted = rng.standard_normal((7, 3)), rng.standard_normal((7, 2))

    def loss():
        return ((network(states) - wanted) ** 2).sum() / 2

    network.descend(states, network(states) - wanted)  # rate 0: the moments are a tenth of the gradients
    for parameter, (mean, _) in zip(network.parameters, network.moments, strict=True):
        for place in np.ndindex(parameter.shape):
            before = parameter[place]
            parameter[place] = before + 1e-6
            above = loss()
            parameter[place] = before - 1e-6
            slope = (above - loss()) / 2e-6
            parameter[place] = before
            assert 10 * mean[place] == pytest.approx(slope, rel=1e-4, abs=1e-6)

    network = replay.QNetwork([3, 32, 32, 2], 0.01, rng)
    first = loss()
    for _ in range(500):
        network.descend(states, network(states) - wanted)
    assert loss() < first / 20


def test_the_memory_replays_in_proportion_to_its_errors(replay):
    rng = np.random.default_rng(0)
    memory = replay.Memory(8, 1, alpha=1.0)
    for i in range(11):  # the first three are overwritten
        memory.add(np.array([i]), 0, 1.0, np.array([i + 1]), True)
    assert len(memory) == 8
    assert sorted(memory.states[:, 0]) == list(range(3, 11))
    errors = np.array([0.0, 0.1, -0.2, 0.3, -0.4, 0.5, 0.6, 0.7])
    memory.learned(np.arange(8), errors)
    ids, weights = memory.sample(80_000, 1.0, rng)
    shares = (np.abs(errors) + 0.01) / (np.abs(errors) + 0.01).sum()
    np.testing.assert_allclose(np.bincount(ids, minlength=8) / len(ids), shares, atol=0.001)
    np.testing.assert_allclose(weights, shares[0] / shares[ids])  # the rarest counts 1

    memory = replay.Memory(8, 1, alpha=0.0)
    for i in range(5):
        memory.add(np.array([i]), 0, 1.0, np.array([i]), True)
    memory.learned(np.array([0, 1]), np.array([100.0, 0.0]))
    ids, weights = memory.sample(1000, 0.4, rng)
    assert np.bincount(ids).tolist() == [200] * 5
    assert (weights == 1).all()


def test_a_run_depends_on_its_seed_alone(replay):
    settings = replay.Settings(alpha=0.6, steps=700)
    first, second, other = (replay.learn(settings, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert sum(total for _, total in first) <= 700


def test_prioritized_replay_as_a_user_runs_it(replay, tmp_path):
    output = run("prioritized_replay.py", "--seeds", 1, "--steps", 1000, "--png", tmp_path / "returns.png")
    assert [line.split(":")[0].strip() for line in output.splitlines()] == ["uniform", "prioritised", "drawn"]
    assert (tmp_path / "returns.png").stat().st_size > 10_000
