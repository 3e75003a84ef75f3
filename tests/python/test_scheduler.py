"""Scheduler on threads: order, shares, starvation, determinism, Futures, deadlines, errors, interrupts, many tasks."""

import asyncio
import concurrent.futures
import contextlib
import doctest
import importlib
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import foveal
from foveal import DeadlineExceeded, Scheduler, Step
from foveal._scheduler import backlog
from foveal.scheduler import Decision


class Clock:
    """Goes on by a second each time it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def endless(budget):
    return Step(False)


def turns(scheduler, budget):
    """How many turns each task gets of so many."""
    return Counter(decision.key for decision in scheduler.run(budget=budget).decisions)


# Order and shares


def test_equal_tasks_are_first_in_first_out_however_many_times_the_slots_are_used_up():
    scheduler, order = Scheduler(max_in_flight=1), []
    for round_ in range(5):
        for i in range(150):
            scheduler.submit(order.append, (round_, i))
        if round_ % 2:
            scheduler.run(budget=120)
    scheduler.run()
    assert order == sorted(order)
    assert len(order) == 750


@pytest.mark.parametrize("policy", ["credit", "strict"])
def test_the_more_urgent_goes_first_and_a_priority_counts_until_the_start(policy):
    scheduler, order = Scheduler(max_in_flight=1, policy=policy, floor=0.0), []
    for i in range(6):
        scheduler.submit(order.append, i, urgency=0.5 * i, key=i)
    scheduler.update(0, urgency=9.0)
    scheduler.update(5, importance=-9.0)
    scheduler.run()
    assert order == [0, 4, 3, 2, 1, 5]


def test_distribution_is_softmax_with_a_floor():
    scheduler = Scheduler(temperature=2.0, floor=0.1)
    scores = {"a": 1.0, "b": -0.5, "c": 3.0}
    for key, score in scores.items():
        scheduler.submit(int, key=key, urgency=score - 1, importance=1.0)
    total = sum(math.exp(s / 2) for s in scores.values())
    expected = {key: 0.1 / 3 + 0.9 * math.exp(s / 2) / total for key, s in scores.items()}
    assert scheduler.distribution() == pytest.approx(expected, abs=1e-15)
    assert Scheduler().distribution() == {}


@pytest.mark.parametrize("policy", ["credit", "sample"])
def test_service_follows_the_distribution(policy):
    scheduler = Scheduler(max_in_flight=1, policy=policy, floor=0.2, seed=1)
    for i, urgency in enumerate([0.0, 1.0, 2.0, -1.0]):
        scheduler.add_stepper(endless, key=i, urgency=urgency)
    expected = scheduler.distribution()
    n = 6000
    got = turns(scheduler, n)
    for key, share in expected.items():
        slack = 4 if policy == "credit" else 5 * math.sqrt(n * share * (1 - share))
        assert abs(got[key] - n * share) <= slack, key


def test_service_is_counted_in_cost():
    scheduler = Scheduler(max_in_flight=1, floor=0.0)
    scheduler.add_stepper(lambda budget: Step(False, None, 5.0), key="dear")
    scheduler.add_stepper(lambda budget: Step(False, None, 1.0), key="cheap")
    got = turns(scheduler, 600)
    assert abs(got["dear"] * 5 - got["cheap"]) <= 6


def test_feedback_moves_the_urgency_and_so_the_service():
    scheduler = Scheduler(max_in_flight=1, ema=0.5, floor=0.0)
    scheduler.add_stepper(lambda budget: Step(False, 3.0), key="up")
    scheduler.add_stepper(lambda budget: Step(False, 0.0), key="same")
    got = turns(scheduler, 400)
    assert got["up"] / got["same"] == pytest.approx(math.exp(3), rel=0.2)
    scheduler.update("same", feedback=4.0)
    rows = {row.key: row for row in scheduler.report().rows}
    assert rows["same"].urgency == 2.0


def test_strict_starves_and_says_so_no_more_than_that():
    scheduler = Scheduler(max_in_flight=1, policy="strict")
    scheduler.add_stepper(endless, key="high", urgency=1.0)
    scheduler.add_stepper(endless, key="low")
    assert turns(scheduler, 300) == {"high": 300}


def test_aging_lifts_what_has_waited():
    now = [0.0]
    scheduler, order = Scheduler(max_in_flight=1, policy="strict", aging=0.1, clock=lambda: now[0]), []
    scheduler.submit(order.append, "old")
    now[0] = 30.0
    scheduler.submit(order.append, "new", urgency=2.0)
    scheduler.submit(order.append, "newest and most urgent", urgency=4.0)
    scheduler.run()
    assert order == ["newest and most urgent", "old", "new"]


def test_scores_of_any_size_keep_their_order():
    scheduler, order = Scheduler(max_in_flight=1, floor=0.0, temperature=0.01), []
    scores = [1e6, -1e6, 0.0, 1e300, 5.0, -3.0, 1e6 + 1, 4.99]
    for score in scores:
        scheduler.submit(order.append, score, urgency=score)
    scheduler.run()
    assert order[0] == 1e300
    assert set(order) == set(scores)
    # The largest of all leaves, and those that it made alike are told apart again, as soon as a pass over them pays.
    scheduler, order = Scheduler(max_in_flight=1, floor=0.0), []
    scheduler.submit(order.append, 1e4, urgency=1e4)
    for score in range(-200, 200):
        scheduler.submit(order.append, score, urgency=float(score) / 10)
    scheduler.run()
    assert order[0] == 1e4
    assert order[1:] == list(range(199, -201, -1))


def test_breadth_is_kept_as_tasks_come_and_go():
    scheduler = Scheduler(breadth=3.0, floor=0.0)
    rng = random.Random(0)
    for i in range(200):
        scheduler.submit(int, urgency=rng.gauss(0, 5), key=i)
        if i >= 3:
            p = np.array(list(scheduler.distribution().values()))
            p = p[p > 0]
            assert math.exp(-(p * np.log(p)).sum()) == pytest.approx(3.0, rel=1e-6)
    scheduler.run()


# No starvation


class Adversary:
    """Raises every other task above the victim as far as numbers go, and higher after every turn."""

    def __init__(self):
        self.level = 1.0

    def __call__(self, budget):
        self.level = min(self.level * 2, 1e100)
        return Step(False, self.level)


@pytest.mark.parametrize("others", [1, 4, 30])
@pytest.mark.parametrize("floor", [0.05, 0.3, 1.0])
def test_no_gap_is_longer_than_the_bound_whatever_feedback_says(others, floor):
    scheduler = Scheduler(max_in_flight=1, ema=1.0, floor=floor)
    scheduler.add_stepper(lambda budget: Step(False, -1e100), key="victim", urgency=-1e9)
    for i in range(others):
        scheduler.add_stepper(Adversary(), key=i)
    decisions = scheduler.run(budget=30 * (others + 1) / floor).decisions
    served = [i for i, decision in enumerate(decisions) if decision.key == "victim"]
    bound = (others + 1) / floor
    assert len(served) >= 25
    assert max(np.diff([-1, *served])) <= bound + 1
    assert len(served) >= floor / (others + 1) * len(decisions) - 2


def test_the_floor_holds_in_expectation_when_sampling():
    scheduler = Scheduler(max_in_flight=1, policy="sample", floor=0.1, ema=1.0, seed=3)
    scheduler.add_stepper(lambda budget: Step(False, -1e100), key="victim", urgency=-1e9)
    for i in range(4):
        scheduler.add_stepper(Adversary(), key=i)
    n = 5000
    expected = 0.1 / 5 * n
    assert turns(scheduler, n)["victim"] >= expected - 5 * math.sqrt(expected)


def test_urgent_arrivals_without_end_do_not_starve_an_old_task():
    scheduler, order = Scheduler(max_in_flight=1, floor=0.1), []

    def again(i):
        order.append(i)
        if i < 400:
            scheduler.submit(again, i + 1, urgency=50.0)

    scheduler.submit(order.append, "old", urgency=-50.0)
    scheduler.submit(again, 0, urgency=50.0)
    scheduler.run()
    assert order.index("old") <= 2 / 0.1


# Determinism and replay


def random_feedback(seed):
    rng = random.Random(seed)
    return lambda budget: Step(rng.random() < 0.02, rng.gauss(0, 2), rng.expovariate(1.0))


def scene(policy, seed=5):
    scheduler = Scheduler(max_in_flight=1, policy=policy, seed=seed, clock=Clock(), aging=0.01)
    for i in range(20):
        scheduler.add_stepper(random_feedback(i), key=i, urgency=i % 3)
    return scheduler


@pytest.mark.parametrize("policy", ["credit", "sample", "strict"])
def test_the_same_seed_and_clock_give_the_same_log(policy):
    first, second = (scene(policy).run().decisions for _ in range(2))
    assert first == second
    assert len(first) > 200


def test_another_seed_gives_another_log():
    assert scene("sample", 1).run().decisions != scene("sample", 2).run().decisions


def test_a_log_can_be_replayed_whatever_the_policy_and_seed():
    log = scene("sample").run().decisions
    scheduler = scene("credit", seed=77)
    scheduler.replay(log)
    assert [decision.key for decision in scheduler.run().decisions] == [decision.key for decision in log]


def test_replay_names_a_task_that_is_missing_and_goes_on_when_asked_again():
    scheduler = Scheduler(max_in_flight=1)
    future = scheduler.submit(int, key="there")
    scheduler.replay([Decision(0.0, "not there", False)])
    with pytest.raises(ValueError, match=r"Scheduler\.replay: the log's next task is 'not there'"):
        scheduler.run()
    assert scheduler.run().counts == {"done": 1}
    assert future.result() == 0


# allocate


@given(
    urgencies=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    budget=st.integers(1, 10**30),
    floor=st.floats(0, 1),
    temperature=st.floats(1e-3, 1e3),
)
@settings(deadline=None, max_examples=150)
def test_allocate_sums_exactly_and_rounds_quotas(urgencies, budget, floor, temperature):
    scheduler = Scheduler(floor=floor, temperature=temperature)
    for urgency in urgencies:
        scheduler.submit(int, urgency=urgency)
    parts = scheduler.allocate(budget)
    shares = scheduler.distribution()
    assert sum(parts.values()) == budget
    assert list(parts) == list(shares)
    for key, part in parts.items():
        assert isinstance(part, int)
        assert abs(part - budget * shares[key]) <= 1 + budget * 1e-13
    order = sorted(shares, key=shares.get)
    assert all(parts[a] <= parts[b] for a, b in itertools.pairwise(order) if shares[a] < shares[b])
    assert sum(scheduler.allocate(float(budget), integer=False).values()) == pytest.approx(budget, rel=1e-12)


def test_allocate_by_hand():
    scheduler = Scheduler(floor=0.0)
    for key, weight in [("a", 0.4), ("b", 0.35), ("c", 0.25)]:
        scheduler.submit(int, key=key, urgency=math.log(weight))
    assert scheduler.allocate(5) == {"a": 2, "b": 2, "c": 1}
    assert scheduler.allocate(1) == {"a": 1, "b": 0, "c": 0}
    assert Scheduler().allocate(3) == {}


# Futures


def test_results_errors_and_every_kind_of_future_waiting():
    def fails():
        raise KeyError("why")

    with Scheduler() as scheduler:
        futures = [scheduler.submit(pow, 2, i, urgency=i) for i in range(50)]
        failing = scheduler.submit(fails)
        assert [f.result(10) for f in futures] == [2**i for i in range(50)]
        assert {f.result() for f in concurrent.futures.as_completed(futures)} == {2**i for i in range(50)}
        _, rest = concurrent.futures.wait([*futures, failing], timeout=10)
        assert not rest
        with pytest.raises(KeyError, match="why"):
            failing.result(10)
        assert isinstance(failing.exception(10), KeyError)

        async def use():
            return await asyncio.wrap_future(scheduler.submit(pow, 3, 3))

        assert asyncio.run(use()) == 27


def test_result_raises_instead_of_hanging_while_nothing_runs():
    scheduler = Scheduler()
    future = scheduler.submit(int)
    for method in (future.result, future.exception):
        with pytest.raises(RuntimeError, match="nothing runs the task"):
            method()
    scheduler.run()
    assert future.result() == 0


def test_result_stops_waiting_when_the_run_ends_without_the_task():
    release = threading.Event()
    scheduler = Scheduler(max_in_flight=1)
    scheduler.submit(release.wait, 10, urgency=5.0)
    left = scheduler.submit(int)
    caught = []

    def wait():
        try:
            left.result(20)
        except RuntimeError as error:
            caught.append(error)

    runner = threading.Thread(target=lambda: scheduler.run(budget=1))
    runner.start()
    while not scheduler._ledger.in_flight:
        time.sleep(0.001)
    waiter = threading.Thread(target=wait)
    waiter.start()
    time.sleep(0.05)
    release.set()
    waiter.join(10)
    runner.join(10)
    assert len(caught) == 1
    assert scheduler.run().counts == {"done": 1}


def test_result_times_out():
    with Scheduler(max_in_flight=1) as scheduler:
        release = threading.Event()
        scheduler.submit(release.wait, 10)
        future = scheduler.submit(int)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.01)
        release.set()
        assert future.result(10) == 0


def test_cancel_takes_a_waiting_task_out_and_frees_its_key():
    scheduler, ran = Scheduler(), []
    keep = scheduler.submit(ran.append, "keep", key="keep")
    gone = scheduler.submit(ran.append, "gone", key="gone")
    called = []
    gone.add_done_callback(called.append)
    assert gone.cancel()
    assert gone.cancel()
    assert gone.cancelled()
    assert called == [gone]
    assert not scheduler.cancel("gone")
    scheduler.submit(ran.append, "again", key="gone")
    assert scheduler.cancel("gone")
    with pytest.raises(CancelledError):
        gone.result()
    assert scheduler.run().counts == {"cancelled": 2, "done": 1}
    assert ran == ["keep"]
    assert not keep.cancel()
    assert concurrent.futures.wait([gone, keep], timeout=5).not_done == set()


def test_a_running_task_is_not_cancelled_and_a_stepper_after_its_step():
    started, release = threading.Event(), threading.Event()

    def block():
        started.set()
        release.wait(10)
        return 1

    def step(budget):
        block()
        return Step(False)

    with Scheduler(max_in_flight=1) as scheduler:
        future = scheduler.submit(block)
        assert started.wait(10)
        assert not future.cancel()
        release.set()
        assert future.result(10) == 1
        started.clear()
        release.clear()
        future = scheduler.add_stepper(step, key="s")
        assert started.wait(10)
        assert scheduler.cancel("s")
        release.set()
        with pytest.raises(CancelledError):
            future.result(10)


def test_a_future_alone_is_smaller_than_the_standard_one():
    import tracemalloc

    def nbytes(make):
        tracemalloc.start()
        kept = [make() for _ in range(1000)]
        size = tracemalloc.get_traced_memory()[0] / 1000
        tracemalloc.stop()
        return size, kept

    scheduler = Scheduler()
    assert nbytes(lambda: scheduler.submit(int))[0] < nbytes(concurrent.futures.Future)[0]


# Deadlines, budgets, time


def test_a_missed_deadline_is_not_started():
    now = [0.0]
    scheduler, ran = Scheduler(clock=lambda: now[0], max_in_flight=1), []
    late = scheduler.submit(ran.append, "late", deadline=5.0, urgency=9.0)
    fine = scheduler.submit(ran.append, "fine", deadline=7.0)
    now[0] = 6.0
    report = scheduler.run()
    with pytest.raises(DeadlineExceeded, match="'task-1' was not started before its deadline"):
        late.result()
    assert fine.result() is None
    assert ran == ["fine"]
    assert report.counts == {"expired": 1, "done": 1}


def test_a_deadline_expires_while_the_workers_are_busy():
    release = threading.Event()
    with Scheduler(max_in_flight=1) as scheduler:
        scheduler.submit(release.wait, 20)
        future = scheduler.submit(int, deadline=0.05)
        with pytest.raises(DeadlineExceeded):
            future.result(10)
        release.set()


def test_a_budget_is_spent_and_the_rest_waits():
    scheduler, granted = Scheduler(max_in_flight=1), []

    def step(budget):
        granted.append(budget)
        return Step(False, None, budget)

    scheduler.add_stepper(step, key="s")
    assert scheduler.run(budget=2.5).counts == {"waiting": 1}
    assert granted == [1.0, 1.0, 0.5]
    assert scheduler.run(budget=1).rows[0].cost == 3.5


def test_a_timeout_ends_a_run_that_would_not_end():
    scheduler = Scheduler(max_in_flight=1)
    scheduler.add_stepper(lambda budget: Step(False, None, time.sleep(0.001) or 1.0), key="s")
    start = time.monotonic()
    assert scheduler.run(timeout=0.1).counts == {"waiting": 1}
    assert 0.1 <= time.monotonic() - start < 5


def test_max_steps():
    scheduler = Scheduler()
    future = scheduler.add_stepper(lambda budget: Step(False, 1.0, 0.5), key="s", max_steps=7)
    assert scheduler.run().rows[0].turns == 7
    assert future.result() == Step(False, 1.0, 0.5)


def test_a_clock_that_runs_backwards_stands_still():
    times = itertools.chain([10.0, 9.0, 8.0, -5.0], itertools.repeat(3.0))
    scheduler = Scheduler(clock=lambda: next(times))
    futures = [scheduler.submit(int, deadline=0.0) for _ in range(5)]
    report = scheduler.run()
    assert [f.result() for f in futures] == [0] * 5
    assert {decision.time for decision in report.decisions} == {10.0}


# What goes wrong


def test_retries_and_what_is_left_of_them():
    tries = Counter()

    def flaky(name, succeeds_at):
        tries[name] += 1
        if tries[name] < succeeds_at:
            raise OSError(name)
        return name

    scheduler = Scheduler()
    good, bad = scheduler.submit(flaky, "good", 3), scheduler.submit(flaky, "bad", 9)
    report = scheduler.run(retries=2)
    assert good.result() == "good"
    with pytest.raises(OSError, match="bad"):
        bad.result()
    assert tries == {"good": 3, "bad": 3}
    assert report.counts == {"done": 1, "failed": 1}


def test_on_error_raise_ends_the_run_and_keeps_the_rest():
    scheduler, ran = Scheduler(max_in_flight=1), []
    scheduler.submit(ran.append, 1)
    scheduler.submit(lambda: 1 / 0)
    last = scheduler.submit(ran.append, 2)
    with pytest.raises(ZeroDivisionError):
        scheduler.run(on_error="raise")
    assert ran == [1]
    assert not last.done()
    scheduler.run()
    assert ran == [1, 2]


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_base_exception_goes_to_its_future(kind):
    def leave():
        raise kind("bye")

    scheduler = Scheduler()
    bad, good = scheduler.submit(leave), scheduler.submit(int)
    assert scheduler.run().counts == {"failed": 1, "done": 1}
    assert isinstance(bad.exception(), kind)
    assert good.result() == 0


@pytest.mark.parametrize(
    ("step", "kind", "text"),
    [
        (lambda budget: None, TypeError, "returned None, expected foveal.Step"),
        (lambda budget: (True, 1.0, 1.0, 1.0), TypeError, "returned \\(True"),
        (lambda budget: Step(False, math.nan), ValueError, "gave feedback nan"),
        (lambda budget: Step(False, None, -1.0), ValueError, "gave cost -1.0"),
        (lambda budget: Step(False, None, math.inf), ValueError, "gave cost inf"),
        (lambda budget: Step(False, "urgent"), TypeError, "returned Step"),
    ],
)
def test_a_step_that_returns_nonsense(step, kind, text):
    scheduler = Scheduler()
    bad = scheduler.add_stepper(step, key="s")
    good = scheduler.submit(int)
    scheduler.run()
    with pytest.raises(kind, match=f"the step of 's' {text}"):
        bad.result()
    assert good.result() == 0


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda s: s.submit(int, urgency=math.nan), ValueError, "Scheduler.submit: urgency is nan"),
        (lambda s: s.submit(int, importance=math.inf), ValueError, "Scheduler.submit: importance is inf"),
        (lambda s: s.submit(int, key="k"), ValueError, "key 'k' is that of an unfinished task"),
        (lambda s: s.submit(3), TypeError, "Scheduler.submit: fn has type int"),
        (lambda s: s.submit(int, key=[]), TypeError, "unhashable"),
        (lambda s: s.submit(int, deadline=-1.0), ValueError, "deadline is -1.0, expected at least 0"),
        (lambda s: s.submit(int, features=[1.0]), TypeError, "expected a scheduler with a scorer"),
        (lambda s: s.add_stepper(endless, key="k"), ValueError, "Scheduler.add_stepper: key 'k'"),
        (lambda s: s.add_stepper(endless, key=None), TypeError, "key is None"),
        (lambda s: s.add_stepper(endless, key=1, max_steps=0), ValueError, "max_steps is 0"),
        (lambda s: s.update("none", urgency=1.0), KeyError, "'none' is no task"),
        (lambda s: s.update("k", feedback=math.nan), ValueError, "Scheduler.update: feedback is nan"),
        (lambda s: s.update("k", urgency="1"), TypeError, "Scheduler.update: urgency has type str"),
        (lambda s: s.allocate(0), ValueError, "budget is 0, expected above 0"),
        (lambda s: s.allocate(-3), ValueError, "budget is -3"),
        (lambda s: s.allocate(2.5), ValueError, "budget is 2.5, expected a whole number"),
        (lambda s: s.run(budget=0), ValueError, "Scheduler.run: budget is 0"),
        (lambda s: s.run(budget=math.nan), ValueError, "Scheduler.run: budget is nan"),
        (lambda s: s.run(timeout=-1), ValueError, "timeout is -1"),
        (lambda s: s.run(retries=-1), ValueError, "retries is -1"),
        (lambda s: s.run(on_error="ignore"), ValueError, "on_error is 'ignore'"),
        (lambda s: s.rescore(), TypeError, "has no scorer"),
        (lambda s: Scheduler(breadth=2.0, temperature=1.0), ValueError, "breadth and temperature"),
        (lambda s: Scheduler(temperature=0.0), ValueError, "temperature is 0.0, expected above 0"),
        (lambda s: Scheduler(floor=1.5), ValueError, "floor is 1.5, expected 0 to 1"),
        (lambda s: Scheduler(breadth=0.5), ValueError, "breadth is 0.5, expected at least 1"),
        (lambda s: Scheduler(policy="fair"), ValueError, "policy is 'fair'"),
        (lambda s: Scheduler(max_in_flight=0), ValueError, "max_in_flight is 0"),
        (lambda s: Scheduler(3), TypeError, "executor has type int"),
        (lambda s: Scheduler(aging=-1.0), ValueError, "aging is -1.0"),
        (lambda s: Scheduler(ema=2.0), ValueError, "ema is 2.0"),
    ],
)
def test_refusals(call, kind, text):
    scheduler = Scheduler()
    future = scheduler.submit(int, key="k")
    with pytest.raises(kind, match=text):
        call(scheduler)
    assert scheduler.run().counts == {"done": 1}
    assert future.result() == 0


def test_a_clock_that_raises_ends_the_run_and_loses_nothing():
    ticks = itertools.count()

    def clock():
        if next(ticks) == 9:
            raise OSError("no clock")
        return 0.0

    scheduler = Scheduler(clock=clock, max_in_flight=2)
    futures = [scheduler.submit(pow, i, 2) for i in range(6)]
    with pytest.raises(OSError, match="no clock"):
        scheduler.run()
    assert not all(f.done() for f in futures)
    scheduler.run()
    assert [f.result() for f in futures] == [0, 1, 4, 9, 16, 25]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_callback_that_raises_is_logged_and_hurts_nobody(caplog, kind):
    def callback(future):
        raise kind("callback")

    scheduler = Scheduler(max_in_flight=1)
    futures = [scheduler.submit(pow, i, 2) for i in range(4)]
    futures[1].add_done_callback(callback)
    assert scheduler.run().counts == {"done": 4}
    assert [f.result() for f in futures] == [0, 1, 4, 9]
    assert "exception calling callback" in caplog.text


def test_a_callback_and_a_task_may_submit_update_and_cancel():
    scheduler, ran = Scheduler(max_in_flight=1), []

    def work(i):
        ran.append(i)
        if i == 0:
            scheduler.cancel("victim")
            scheduler.update("last", urgency=-10.0)
            scheduler.submit(work, 1).add_done_callback(lambda _: scheduler.submit(work, 2))

    scheduler.submit(work, 3, key="last")
    victim = scheduler.submit(work, 4, key="victim")
    scheduler.submit(work, 0, urgency=1.0)
    assert scheduler.run().counts == {"done": 4, "cancelled": 1}
    assert ran == [0, 1, 2, 3]
    assert victim.cancelled()


def test_the_future_of_another_scheduler_is_no_key():
    scheduler, other = Scheduler(), Scheduler()
    future = other.submit(int)
    assert not scheduler.cancel(future)
    with pytest.raises(KeyError, match="is no task"):
        scheduler.update(future, urgency=1.0)


def test_an_executor_that_is_shut_down_loses_nothing():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    scheduler = Scheduler(executor)
    futures = [scheduler.submit(pow, i, 2) for i in range(5)]
    with pytest.raises(RuntimeError, match="the executor takes no tasks"):
        scheduler.run()
    assert set(scheduler.distribution()) == {f.key for f in futures}
    with scheduler, pytest.raises(RuntimeError, match="the executor takes no tasks"):
        futures[0].result(10)
    assert all(f.done() for f in futures)


def test_running_twice_and_after_shutdown():
    scheduler = Scheduler()
    with scheduler:
        with pytest.raises(RuntimeError, match="runs already"):
            scheduler.run()
        with pytest.raises(RuntimeError, match="runs already"):
            scheduler.start()
        assert scheduler.submit(int).result(10) == 0
        assert scheduler.report().counts == {"done": 1}
    for call in (scheduler.run, scheduler.start, lambda: scheduler.submit(int)):
        with pytest.raises(RuntimeError, match="was shut down"):
            call()


def test_leaving_the_block_runs_what_waits_and_after_an_exception_cancels_it():
    with Scheduler(max_in_flight=1) as scheduler:
        futures = [scheduler.submit(time.sleep, 0.001) for _ in range(30)]
    assert all(f.done() and not f.cancelled() for f in futures)
    with contextlib.suppress(ZeroDivisionError), Scheduler(max_in_flight=1) as scheduler:
        futures = [scheduler.submit(time.sleep, 0.05) for _ in range(30)]
        raise ZeroDivisionError
    assert all(f.done() for f in futures)
    assert sum(f.cancelled() for f in futures) >= 25


def test_shutdown_of_what_never_ran_cancels():
    scheduler = Scheduler()
    future = scheduler.submit(int)
    scheduler.shutdown()
    assert future.cancelled()


def test_no_thread_is_left():
    before = set(threading.enumerate())
    scheduler = Scheduler()
    scheduler.submit(int)
    scheduler.run()
    with Scheduler() as scheduler:
        scheduler.submit(int)
    assert set(threading.enumerate()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_stops_waits_for_what_runs_and_leaves_no_thread():
    program = textwrap.dedent(
        """
        import signal, threading, time
        import foveal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        done = []
        def work(i):
            time.sleep(0.2)
            done.append(i)
        scheduler = foveal.Scheduler(max_in_flight=2)
        futures = [scheduler.submit(work, i) for i in range(500)]
        print("ready", flush=True)
        try:
            scheduler.run()
        except KeyboardInterrupt:
            ended = sum(future.done() for future in futures)
            assert ended == len(done), (ended, done)
            assert 2 <= ended < 100, ended
            assert threading.enumerate() == [threading.main_thread()]
            assert len(scheduler.distribution()) == 500 - ended
            scheduler.shutdown(cancel_futures=True)
            assert all(future.done() for future in futures)
            print("stopped", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "stopped\n"
    assert process.returncode == 0


# Reports


def report_of_three():
    scheduler = Scheduler(clock=Clock(), max_in_flight=1)
    scheduler.submit(int, key="good", urgency=2.0)
    scheduler.submit(lambda: 1 / 0, key="bad")
    scheduler.add_stepper(endless, key="long", max_steps=3)
    return scheduler.run()


def test_report_as_table_dict_and_rows():
    report = report_of_three()
    text = str(report)
    for word in ("good", "bad", "long", "failed", "ZeroDivisionError", "2 done, 1 failed"):
        assert word in text
    data = report.to_dict()
    assert data["counts"] == {"done": 2, "failed": 1}
    assert {task["key"]: task["turns"] for task in data["tasks"]} == {"good": 1, "bad": 1, "long": 3}
    assert len(data["decisions"]) == len(data["spans"]) == 5
    assert all(span["start"] < span["stop"] for span in data["spans"])


def test_report_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = str(report_of_three()).splitlines()
    assert lines[1].split() == ["task", "status", "urgency", "importance", "waited", "took", "turns", "cost", "error"]
    assert len(lines) == 6


def test_a_long_report_is_cut():
    scheduler = Scheduler()
    for _ in range(100):
        scheduler.submit(int)
    assert "..." in str(scheduler.run())


def test_report_to_pandas():
    pd = pytest.importorskip("pandas")
    frame = report_of_three().to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame.set_index("key").loc["long", "cost"] == 3.0


def test_gantt_chart(tmp_path):
    pytest.importorskip("matplotlib")
    ax = report_of_three().plot(tmp_path / "gantt.png")
    assert (tmp_path / "gantt.png").stat().st_size > 1000
    assert [label.get_text() for label in ax.get_yticklabels()] == ["good", "bad", "long"]


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress(capsys, monkeypatch, has_tqdm):
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    scheduler = Scheduler()
    for _ in range(10):
        scheduler.submit(int)
    scheduler.run(progress=True)
    shown = capsys.readouterr().err
    assert ("10/10" if has_tqdm else "10 of 10 tasks") in shown


# Many tasks, many threads


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
    with Scheduler(max_in_flight=3, breadth=20.0, seed=seed) as scheduler:
        stop = threading.Event()
        pokers = [threading.Thread(target=poke, args=(stop, i)) for i in range(2)]
        for poker in pokers:
            poker.start()
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
            poker.join()
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


def test_import_stays_light():
    program = "import sys, foveal; assert not {'foveal.scheduler', 'matplotlib', 'torch'} & set(sys.modules)"
    program += "; foveal.Scheduler; assert not {'matplotlib', 'pandas', 'rich', 'torch'} & set(sys.modules)"
    program += "; assert {'Scheduler', 'Step'} <= set(dir(foveal))"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = foveal.nothing


@pytest.mark.parametrize("module", ["scheduler", "scorer", "shares"])
def test_examples_of_the_docstrings(module):
    failed, tried = doctest.testmod(importlib.import_module(f"foveal._scheduler.{module}"))
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("step", [3.0, 50.0, 1e5, -3.0, -50.0])
def test_scores_that_run_away_cost_no_pass_over_all_tasks_each(step, monkeypatch):
    passes = Counter()
    rebase = backlog.Backlog._rebase

    def counting(self, *args, **kwargs):
        passes["rebase"] += 1
        passes["work"] += len(self._slots)
        rebase(self, *args, **kwargs)

    monkeypatch.setattr(backlog.Backlog, "_rebase", counting)
    n = 4000
    scheduler = Scheduler(max_in_flight=1, breadth=None)
    for i in range(n):
        scheduler.submit(int, key=i, urgency=step * i)
    for i in range(n):
        scheduler.update(i, urgency=step * (n + i))
    assert scheduler.run().counts == {"done": n}
    assert (
        passes["work"] <= 3 * 16 * 3 * n
    )  # three changes a task, each worth a pass over 16, three times that for luck


@pytest.mark.parametrize("gap", [5.0, 100.0])
def test_each_new_task_far_above_all_others_is_next(gap):
    scheduler, order = Scheduler(max_in_flight=1, floor=0.0), []

    def work(i):
        order.append(i)
        if i < 300:
            scheduler.submit(work, i + 1, urgency=gap * (i + 1))

    for _ in range(10):
        scheduler.submit(order.append, -1)
    scheduler.submit(work, 1, urgency=gap)
    scheduler.run()
    assert order == [*range(1, 301), *[-1] * 10]
