"""Measures the scheduler: python bench/scheduler_report.py [--rows TEXT ...] [--quick].

Every row checks its results first, then times what it compares in turn within one process, and gives medians with
quartiles. Memory is measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import heapq
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

import foveal
import weighted_completion

FULL, QUICK = 15, 3  # rounds


def nothing() -> None:
    pass


def quartiles(values: list[float], unit: str, scale: float = 1.0, digits: int = 1) -> str:
    if len(values) == 1:
        return f"{values[0] * scale:.{digits}f} {unit}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle * scale:.{digits}f} ({low * scale:.{digits}f}-{high * scale:.{digits}f}) {unit}"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def overhead(rounds: int, workers: int) -> Iterator[str]:
    """A task that does nothing, from submission to result, by the executor alone and by the scheduler on it."""
    count = 10_000
    names = ("executor, submit", "executor, in all", "Scheduler, submit", "Scheduler, in all")
    times: dict[str, list[float]] = {name: [] for name in names}

    def executor() -> None:
        with ThreadPoolExecutor(workers) as pool:
            start = time.perf_counter()
            futures = [pool.submit(nothing) for _ in range(count)]
            times["executor, submit"].append((time.perf_counter() - start) / count)
            for future in futures:
                future.result()
            times["executor, in all"].append((time.perf_counter() - start) / count)

    def scheduler() -> None:
        with ThreadPoolExecutor(workers) as pool:
            scheduler = foveal.Scheduler(pool)
            start = time.perf_counter()
            for _ in range(count):
                scheduler.submit(nothing)
            times["Scheduler, submit"].append((time.perf_counter() - start) / count)
            report = scheduler.run()
            times["Scheduler, in all"].append((time.perf_counter() - start) / count)
            assert report.counts == {"done": count}

    for round_ in tqdm(range(rounds), leave=False):
        for contender in (executor, scheduler)[:: 1 if round_ % 2 else -1]:
            contender()
    for name in names:
        yield f"{name}: {quartiles(times[name], 'us a task', 1e6)}"
    ratios = [a / b for a, b in zip(times["Scheduler, in all"], times["executor, submit"], strict=True)]
    yield f"Scheduler in all / executor's submit: {quartiles(ratios, 'times', digits=2)} (aim: at most 2)"


def producers(rounds: int) -> Iterator[str]:
    """Tasks that do nothing from eight threads at once, while the scheduler runs in the background."""
    each, threads = 2_500, 8
    times: dict[str, list[float]] = {"executor": [], "Scheduler": []}
    for _ in tqdm(range(rounds), leave=False):
        for name, make in (("executor", lambda: ThreadPoolExecutor(2)), ("Scheduler", foveal.Scheduler)):
            with make() as pool:
                done = [0] * threads

                def produce(i: int, pool: object = pool, done: list[int] = done) -> None:
                    futures = [pool.submit(nothing) for _ in range(each)]
                    for future in futures:
                        future.result()
                    done[i] = len(futures)

                workers = [threading.Thread(target=produce, args=(i,)) for i in range(threads)]
                start = time.perf_counter()
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                times[name].append(each * threads / (time.perf_counter() - start))
                assert done == [each] * threads
    for name, values in times.items():
        yield f"{name}: {quartiles(values, 'thousand tasks a second', 1e-3)}"


def update(rounds: int) -> Iterator[str]:
    """A new urgency for a random one of the waiting tasks."""
    for count in (1_000, 100_000, 1_000_000):
        scheduler = foveal.Scheduler()
        for key in range(count):
            scheduler.submit(nothing, key=key, urgency=(key * 7919 % count) / count)
        scheduler.distribution()  # submitted tasks are taken in by the first call that needs them
        rng = np.random.default_rng(0)
        times = []
        for _ in tqdm(range(rounds), leave=False):
            calls = list(zip(rng.integers(0, count, 20_000).tolist(), rng.random(20_000).tolist(), strict=True))

            def change(calls: list[tuple[int, float]] = calls, update: Callable[..., None] = scheduler.update) -> None:
                for key, urgency in calls:
                    update(key, urgency=urgency)

            times.append(seconds(change) / len(calls))
        last = dict(calls)
        rows = {row.key: row.urgency for row in scheduler.report().rows}
        assert all(rows[key] == urgency for key, urgency in last.items())
        yield f"{count:,} waiting: {quartiles(times, 'us', 1e6, 2)} (aim: under 3)"


def rescore(rounds: int) -> Iterator[str]:
    """The attention of a new focus over 100,000 waiting tasks of 64 features, and their new keys."""
    count, dim = 100_000, 64
    rng = np.random.default_rng(0)
    features = rng.standard_normal((count, dim), np.float32)
    scheduler = foveal.Scheduler(scorer=foveal.AttentionScorer(dim), floor=0.0)
    for key, row in enumerate(features):
        scheduler.submit(nothing, key=key, features=row)

    def by_numpy(state: np.ndarray) -> tuple[np.ndarray, list[tuple[float, int]]]:
        scores = features @ state
        scores /= np.float32(dim**0.5)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        heap = list(zip((-weights).tolist(), range(count), strict=True))
        heapq.heapify(heap)
        return weights, heap

    times: dict[str, list[float]] = {"Scheduler.rescore": [], "NumPy and heapq.heapify": []}
    for _ in tqdm(range(rounds), leave=False):
        state = 2 * rng.standard_normal(dim).astype(np.float32)
        times["Scheduler.rescore"].append(seconds(lambda state=state: scheduler.rescore(state)))
        times["NumPy and heapq.heapify"].append(seconds(lambda state=state: by_numpy(state)))
    shares = np.array(list(scheduler.distribution().values()))
    np.testing.assert_allclose(shares, by_numpy(state)[0], rtol=1e-4, atol=1e-9)
    aim = " (aim: under 30)"
    for name, values in times.items():
        yield f"{name}: {quartiles(values, 'ms', 1e3)}{aim}"
        aim = ""


MEMORY = """
import concurrent.futures, gc, os, sys
import foveal
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
count, kind = int(sys.argv[1]), sys.argv[2]
scheduler = foveal.Scheduler()
gc.collect()
before = resident()
if kind == "Future":
    kept = [concurrent.futures.Future() for _ in range(count)]
else:
    kept = [scheduler.submit(print, i) for i in range(count)]
    scheduler.replay([])  # takes in those that were submitted
    assert len(scheduler._ledger.backlog) == count
print((resident() - before) / count)
"""


def memory(rounds: int) -> Iterator[str]:
    """Resident memory of a million waiting tasks, of a million standard Futures alone."""
    for name, kind in (("a waiting task and its Future", "task"), ("a concurrent.futures.Future alone", "Future")):
        command = [sys.executable, "-c", MEMORY, "1000000", kind]
        nbytes = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        aim = " (aim: 2.5)" if kind == "task" else ""
        yield f"{name}: {nbytes:,.0f} bytes; a million: {nbytes * 1e6 / 2**30:.2f} GiB{aim}"


def regret(rounds: int) -> Iterator[str]:
    """How far the weighted completion time is above the oracle's, on 60 instances (weighted_completion.py)."""
    instances = 60 if rounds >= FULL else 10
    with tqdm(total=instances, leave=False) as bar:
        found = weighted_completion.regrets(instances, bar.update)
    ours = found["foveal.Scheduler, costs learned"].mean()
    for name, values in found.items():
        yield f"{name}: mean {values.mean():.2f}, max {values.max():.2f}"
    others = {name: values.mean() for name, values in found.items() if not name.startswith(("oracle", "foveal"))}
    best = min(others, key=others.__getitem__)
    yield f"the best that does not know costs is {best!r}: {others[best]:.2f} against {ours:.2f}"


ROWS: dict[str, Callable[[int], Iterator[str]]] = {
    "overhead, 1 worker": lambda rounds: overhead(rounds, 1),
    "overhead, 2 workers": lambda rounds: overhead(rounds, 2),
    "8 producers": producers,
    "update": update,
    "rescore": rescore,
    "memory": memory,
    "regret": regret,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[], help=f"those that have one of these: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    print(
        f"foveal {foveal.__version__} ({foveal.info().isa}), Python {platform.python_version()}, "
        f"NumPy {np.__version__}, {foveal.get_num_threads()} threads",
        flush=True,
    )
    for name, row in ROWS.items():
        if not options.rows or any(text in name for text in options.rows):
            print(f"\n{name}", flush=True)
            for line in row(QUICK if options.quick else FULL):
                print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
