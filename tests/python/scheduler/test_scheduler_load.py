"""The scheduler under load: many tasks, many threads that submit, change and cancel, tasks that fail."""

import itertools
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from foveal import DeadlineExceeded, Scheduler


def test_many_tasks_from_many_producers():
    ran = Counter()
    with Scheduler(max_in_flight=4) as scheduler:
        futures = []

        def produce(name):
            futures.extend(scheduler.submit(ran.update, [(name, i)], urgency=i % 7) for i in range(1500))

        with ThreadPoolExecutor(8) as producers:
            list(producers.map(produce, range(8)))
    assert len(futures) == 12_000
    assert all(f.result() is None for f in futures)
    assert len(ran) == 12_000
    assert set(ran.values()) == {1}


def soak(seconds, seed):
    """Random submissions, cancels, failures and priority changes; each Future's callbacks count."""
    rng = random.Random(seed)
    resolved, ran, cancelled = Counter(), Counter(), 0
    lock = threading.Lock()

    def work(i, fails):
        with lock:
            ran[i] += 1
        if fails:
            raise OSError(i)
        return i

    def on_done(future):
        with lock:
            resolved[future.number] += 1

    def poke(stop, seed):
        rng = random.Random(seed)
        while not stop.is_set():
            future = rng.choice(futures[-50:] or [None])
            if future is not None:
                try:
                    scheduler.update(future, urgency=rng.gauss(0, 100), importance=rng.random())
                except KeyError:
                    assert future.done() or future.running()
            time.sleep(0)

    futures = []
    with Scheduler(max_in_flight=3, breadth=20.0, seed=seed) as scheduler, ThreadPoolExecutor(2) as threads:
        stop = threading.Event()
        pokers = [threads.submit(poke, stop, i) for i in range(2)]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            deadline = rng.choice([None, None, None, 0.0, 0.01])
            future = scheduler.submit(
                work, len(futures), rng.random() < 0.1, urgency=rng.gauss(0, 9), deadline=deadline
            )
            future.number = len(futures)
            future.add_done_callback(on_done)
            futures.append(future)
            if rng.random() < 0.2:
                cancelled += rng.choice(futures[-100:]).cancel()
            if rng.random() < 0.01:
                time.sleep(0.002)
        stop.set()
        for poker in pokers:
            poker.result()
    assert all(f.done() for f in futures)
    assert resolved == Counter(range(len(futures)))
    kinds = Counter()
    for i, future in enumerate(futures):
        if future.cancelled():
            kinds["cancelled"] += 1
            assert ran[i] == 0
        elif isinstance(future.exception(), DeadlineExceeded):
            kinds["expired"] += 1
            assert ran[i] == 0
        else:
            kinds["failed" if future.exception() else "done"] += 1
            assert ran[i] == 1
    assert not scheduler._ledger.tasks
    assert not scheduler._ledger.backlog
    return kinds


SOAK_SECONDS = float(os.environ.get("FOVEAL_SOAK_SECONDS", "3"))


@pytest.mark.timeout(300 + 2 * SOAK_SECONDS)
def test_soak_loses_nothing_and_resolves_every_future_once():
    until, kinds = time.monotonic() + SOAK_SECONDS, Counter()
    for seed in itertools.count():
        kinds += soak(min(3.0, until - time.monotonic()), seed)
        if time.monotonic() >= until:
            break
    print(dict(kinds))
    assert set(kinds) == {"done", "failed", "cancelled", "expired"}
