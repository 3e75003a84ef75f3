"""foveal and its peers under pytest-benchmark: pytest bench --benchmark-group-by=param:work [--benchmark-autosave].

For tracking one machine over time, and for a look at single cases. The ratios in docs/benchmarks.md come from
report.py, whose contenders take turns; here each runs for itself: of a peer,
the way that is fastest in five seconds of turns, whose name is kept with the result.
"""

import pytest

from foveal._bench.compare import check_ours, checked_ways, cold_copies
from foveal._bench.measure import take_turns
from foveal._bench.peers import PEERS, peers_of
from foveal._bench.work import Work, foveal_numpy

WORKS = [
    Work(1, 8, 1024, 64),
    Work(1, 8, 1024, 64, causal=True),
    Work(1, 8, 4096, 128),
    Work(1, 8, 4096, 128, causal=True),
    Work(8, 12, 128, 64),
    Work(32, 12, 32, 32),
    Work(1, 8, 1024, 64, "bfloat16"),
    Work(1, 8, 1024, 64, "float16"),
    Work(1, 8, 8192, 64, causal=True, window=256),
    Work(1, 8, 1, 64, seqlen_kv=64),
    Work(1, 32, 1, 128, seqlen_kv=4096),
    Work(1, 32, 1, 128, "bfloat16", seqlen_kv=16384, kv_heads=4),
]


@pytest.mark.parametrize("contender", ["foveal", *PEERS])
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_attention(benchmark, work, contender):
    if work.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    if contender in PEERS and contender not in peers_of(work):
        pytest.skip(f"{contender} is not installed or does not do this")
    inputs = cold_copies(work)
    ours = foveal_numpy(work, inputs)
    check_ours(work, inputs[0], ours)
    timed = ours
    if contender in PEERS:
        ways = checked_ways(contender, work, inputs, ours)
        timed = take_turns(ways, budget=5.0).best(ways)
    with timed.within():
        benchmark(timed.call)
    benchmark.extra_info["GF/s"] = work.flops / benchmark.stats.stats.median / 1e9
    benchmark.extra_info["way"] = timed.name
