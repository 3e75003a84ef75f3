"""What the benchmark calls a peer: every way of each, checked, timed through the whole row; the best of the medians."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import foveal
from foveal._bench.compare import can_hold, checked_ways, cold_copies, compare
from foveal._bench.measure import Contender, Spread, accepted
from foveal._bench.peers import PEERS, Peer, left_out, peers_of
from foveal._bench.show import Row, markdown, ways, worst
from foveal._bench.work import Way, Work, foveal_numpy

SMALL = Work(1, 2, 8, 16)
WORKS = [
    Work(2, 3, 8, 16),
    Work(1, 4, 8, 16, kv_heads=2, causal=True),
    Work(1, 4, 8, 16, "bfloat16", causal=True),
    Work(1, 4, 8, 16, "float16"),
    Work(1, 4, 1, 16, seqlen_kv=32, kv_heads=2),
    Work(1, 2, 40, 16, causal=True, normalizer="entmax15"),
]


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("peer", ["torch", "openvino", "onnxruntime", "jax", "numpy"])
def test_every_way_of_a_peer_agrees(peer, work):
    if not can_hold(work.dtype) or peer not in peers_of(work):
        pytest.skip(f"{peer} is not installed or does not do this")
    inputs = cold_copies(work)
    found = checked_ways(peer, work, inputs, foveal_numpy(work, inputs))  # raises where one is off
    names = [way.name for way in found]
    assert len(set(names)) == len(names)
    assert all(name.startswith(peer) for name in names)
    if foveal.get_num_threads() > 1 and peer in ("torch", "openvino", "onnxruntime"):
        assert sum("1 thread" in name for name in names) == len(names) / 2


def late_starter(work, inputs):
    """A way whose first calls are slow, and one that is never quick."""
    right = foveal_numpy(work, inputs).call()
    number = itertools.count()

    def late():
        if next(number) < 3:
            time.sleep(0.05)
        return right

    def slow():
        time.sleep(0.01)
        return right

    yield Way("late", late)
    yield Way("slow", slow)


def test_a_slow_start_does_not_hide_the_best_way(monkeypatch):
    monkeypatch.setitem(PEERS, "fake", Peer((), late_starter))
    row = compare(SMALL, peers=["fake"], budget=0.5)
    (medians,) = row.tried["fake"]
    assert set(medians) == {"late", "slow"}
    assert medians["late"] < 0.01 <= medians["slow"]
    ours = SMALL.flops / row.value / 1e9
    assert row.ratios["fake"].median < 0.01 / ours
    assert ways(row)[0].startswith("late ")


def test_a_wrong_way_stops_the_row(monkeypatch):
    def wrong(work, inputs):
        yield Way("wrong", lambda: np.zeros_like(inputs[0][0]))

    monkeypatch.setitem(PEERS, "fake", Peer((), wrong))
    with pytest.raises(RuntimeError, match="the result of wrong is off by"):
        compare(SMALL, peers=["fake"], budget=0.1)


def test_ways_that_refuse_are_left_out():
    def refuse():
        raise RuntimeError("no kernel")

    able = Contender("able", lambda: 7)
    checked = []
    assert accepted([Contender("unable", refuse), able], lambda way, result: checked.append((way, result))) == [able]
    assert checked == [(able, 7)]
    with pytest.raises(RuntimeError, match="none of the peer's ways"):
        accepted([Contender("unable", refuse)], lambda way, result: None)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(PEERS, "fake", Peer(("numpy", "no_such_module"), late_starter))
    assert "fake" not in peers_of(SMALL)
    assert "fake: left out; it is measured too after: pip install no_such_module" in left_out()


def process(value, ratio, way):
    tried = {"torch": [{"math": 2.0 - (way == "math"), "flash": 1.5}]}
    return Row("work", value, "GF/s", {"torch": Spread(ratio, ratio / 2, ratio * 2)}, value / 200, "9 rounds", tried)


def test_of_several_processes_the_worst_is_shown_with_the_range():
    rows = [process(100.0, 1.5, "flash"), process(90.0, 1.2, "math"), process(110.0, 1.9, "flash")]
    row = worst(rows)
    assert row.figure == "90.0 (90.0-110.0) GF/s"
    assert row.ratios == {"torch": Spread(1.2, 1.2, 1.9)}
    assert row.limit == 0.45
    assert "1.20 (1.20-1.90)" in markdown([row])
    assert ways(row) == ["flash 1500.0 ms (fastest in 2 of 3), math 2000.0 ms (fastest in 1 of 3)"]
    times = [Row("call", us, "us") for us in (3.0, 5.0)]
    assert worst(times).figure == "5.00 (3.00-5.00) us"
    assert worst(rows[:1]) is rows[0]


def test_the_report_measures_in_fresh_processes():
    pytest.importorskip("tqdm")
    pytest.importorskip("torch")
    script = Path(__file__).parents[3] / "bench" / "report.py"
    if not script.exists():
        pytest.skip("the source distribution has no bench/")
    command = [sys.executable, script, "--quick", "--processes", "2", "--rows", "call: numpy call"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (row,) = [line for line in result.stdout.splitlines() if line.startswith("| a call on (1,1,1,8) ")]
    assert row.split("|")[2].split()[1].startswith("(")
    refused = subprocess.run([*command[:-3], "0", "--list"], capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2
    assert "--processes is 0, expected 1 or more" in refused.stderr
