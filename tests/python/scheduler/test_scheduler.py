"""Scheduler on threads: Futures, deadlines and budgets, errors, shutdown, interrupts."""

import asyncio
import concurrent.futures
import contextlib
import copy
import doctest
import functools
import importlib
import itertools
import math
import pickle
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
from scheduler_cases import Clock, endless

import foveal
from foveal import DeadlineExceeded, Scheduler, Step

# Futures


def test_results_errors_and_every_kind_of_future_waiting():
    def fails():
        raise KeyError("why")

    with Scheduler() as scheduler:
        futures = [scheduler.submit(pow, 2, i, urgency=i) for i in range(50)]
        failing = scheduler.submit(fails)
        assert [f.result(200) for f in futures] == [2**i for i in range(50)]
        assert {f.result() for f in concurrent.futures.as_completed(futures)} == {2**i for i in range(50)}
        _, rest = concurrent.futures.wait([*futures, failing], timeout=200)
        assert not rest
        with pytest.raises(KeyError, match="why"):
            failing.result(200)
        assert isinstance(failing.exception(200), KeyError)

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
    scheduler.submit(release.wait, 2000, urgency=5.0)
    left = scheduler.submit(int)
    caught = []

    def wait():
        try:
            left.result(200)
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
    waiter.join(200)
    runner.join(200)
    assert len(caught) == 1
    assert scheduler.run().counts == {"done": 1}


def test_result_times_out():
    with Scheduler(max_in_flight=1) as scheduler:
        release = threading.Event()
        scheduler.submit(release.wait, 2000)
        future = scheduler.submit(int)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.01)
        release.set()
        assert future.result(200) == 0


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
    assert concurrent.futures.wait([gone, keep], timeout=200).not_done == set()


def test_a_running_task_is_not_cancelled_and_a_stepper_after_its_step():
    started, release = threading.Event(), threading.Event()

    def block():
        started.set()
        release.wait(200)
        return 1

    def step(budget):
        block()
        return Step(False)

    with Scheduler(max_in_flight=1) as scheduler:
        future = scheduler.submit(block)
        assert started.wait(200)
        assert not future.cancel()
        release.set()
        assert future.result(200) == 1
        started.clear()
        release.clear()
        future = scheduler.add_stepper(step, key="s")
        assert started.wait(200)
        assert scheduler.cancel("s")
        release.set()
        with pytest.raises(CancelledError):
            future.result(200)


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
        scheduler.submit(release.wait, 200)
        future = scheduler.submit(int, deadline=0.05)
        with pytest.raises(DeadlineExceeded):
            future.result(200)
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


def test_what_a_step_did_not_cost_is_left_in_the_budget():
    scheduler = Scheduler(max_in_flight=1)
    scheduler.add_stepper(lambda budget: Step(False, None, 0.25), key="s")
    assert len(scheduler.run(budget=2).decisions) == 8


def test_a_timeout_ends_a_run_that_would_not_end():
    scheduler = Scheduler(max_in_flight=1)
    scheduler.add_stepper(lambda budget: Step(False, None, time.sleep(0.001) or 1.0), key="s")
    start = time.monotonic()
    assert scheduler.run(timeout=0.1).counts == {"waiting": 1}
    assert time.monotonic() - start >= 0.1


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


def test_the_retries_of_a_stepper_begin_anew_after_a_good_step():
    calls = itertools.count(1)

    def step(budget):
        n = next(calls)
        if n % 3:
            raise OSError(n)
        return Step(n >= 30)

    scheduler = Scheduler()
    future = scheduler.add_stepper(step, key="s")
    assert scheduler.run(retries=2).counts == {"done": 1}
    assert future.result().done
    calls = itertools.count(1)
    future = scheduler.add_stepper(step, key="s")
    assert scheduler.run(retries=1).counts == {"failed": 1}


class Asynchronous:
    async def __call__(self):
        return 1

    async def method(self):
        return 1

    async def generator(self):
        yield 1


@pytest.mark.parametrize(
    "fn",
    [
        Asynchronous(),
        Asynchronous().method,
        Asynchronous().generator,
        Asynchronous.method,
        functools.partial(functools.partial(Asynchronous.method), Asynchronous()),
        functools.partial(Asynchronous()),
    ],
)
def test_asynchronous_functions_are_refused(fn):
    scheduler = Scheduler()
    with pytest.raises(TypeError, match=r"Scheduler\.submit: fn is asynchronous .* not supported yet"):
        scheduler.submit(fn)
    with pytest.raises(TypeError, match=r"Scheduler\.add_stepper: step is asynchronous"):
        scheduler.add_stepper(fn, key="s")
    assert scheduler.run().counts == {}
    scheduler.submit(Asynchronous)  # to make one is no call of it
    scheduler.submit(functools.partial(int, "3"))
    assert scheduler.run().counts == {"done": 2}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_scheduler_and_its_futures_cannot_be_copied(copied):
    scheduler = Scheduler()
    future = scheduler.submit(int)
    with pytest.raises(TypeError, match="Scheduler: cannot be copied or pickled"):
        copied(scheduler)
    with pytest.raises(TypeError, match="Future: that of task 'task-1' cannot be copied or pickled"):
        copied(future)
    assert scheduler.run().counts == {"done": 1}


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
        (lambda s: s.update("k", urgency=math.nan), ValueError, "Scheduler.update: urgency is nan"),
        (lambda s: s.update("k", importance=-math.inf), ValueError, "Scheduler.update: importance is -inf"),
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
        (lambda s: s.submit(int, urgency=None), TypeError, "Scheduler.submit: urgency has type NoneType"),
        (lambda s: s.submit(int, importance="x"), TypeError, "Scheduler.submit: importance has type str"),
        (lambda s: s.submit(int, urgency=10**400), ValueError, "urgency is an integer beyond the largest float"),
        (lambda s: s.submit(int, urgency=1.7e308, importance=1.7e308), ValueError, "urgency \\+ importance is inf"),
        (lambda s: s.submit(int, deadline="soon"), TypeError, "Scheduler.submit: deadline has type str"),
        (lambda s: s.update([], urgency=1.0), TypeError, "Scheduler.update: key has the unhashable type list"),
        (lambda s: s.update("k", urgency=1.7e308, importance=1.7e308), ValueError, "Scheduler.update: urgency \\+"),
        (lambda s: s.update("k", feedback=10**400), ValueError, "feedback is an integer beyond"),
        (lambda s: s.cancel({}), TypeError, "Scheduler.cancel: key has the unhashable type dict"),
        (lambda s: s.allocate(10**400), ValueError, "Scheduler.allocate: budget is an integer beyond"),
        (lambda s: s.run(budget=10**400), ValueError, "Scheduler.run: budget is an integer beyond"),
        (lambda s: s.run(budget="all"), TypeError, "Scheduler.run: budget has type str"),
        (lambda s: s.run(retries=None), TypeError, "Scheduler.run: retries has type NoneType, expected an integer"),
        (lambda s: s.run(retries=math.nan), TypeError, "retries has type float, expected an integer"),
        (lambda s: s.start(retries=-1), ValueError, "Scheduler.start: retries is -1"),
        (lambda s: s.replay([1]), TypeError, r"Scheduler.replay: decisions\[0\] is 1, expected a Decision"),
        (lambda s: s.add_stepper(endless, key=1, max_steps=1.5), TypeError, "max_steps has type float"),
        (lambda s: Scheduler(max_in_flight="2"), TypeError, "max_in_flight has type str, expected an integer"),
        (lambda s: Scheduler(max_in_flight=math.nan), TypeError, "max_in_flight has type float"),
        (lambda s: Scheduler(clock=5), TypeError, "clock has type int, expected a callable"),
        (lambda s: Scheduler(scorer=5), TypeError, "scorer has type int, expected a callable"),
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
        futures[0].result(200)
    assert all(f.done() for f in futures)


def test_feedback_may_be_any_number_and_never_overflows():
    calls = itertools.count(1)
    scheduler = Scheduler(max_in_flight=1, ema=1.0, policy="strict")
    future = scheduler.add_stepper(lambda budget: Step(next(calls) >= 5, np.array(1000.0), 1.0), key="a")
    scheduler.submit(int, key="b")
    for feedback in (np.float16(0.5), 1.7e308, -1.7e308, 1.7e308):
        scheduler.update("b", feedback=feedback)
    assert scheduler.run(timeout=20).counts == {"done": 2}
    assert future.done()
    assert next(calls) == 6


@pytest.mark.parametrize(
    "options", [{}, {"breadth": 1.5}, {"policy": "strict"}, {"policy": "sample"}, {"aging": 1e308}]
)
def test_scores_and_costs_as_large_as_floats_are(options):
    scheduler = Scheduler(max_in_flight=1, ema=1.0, clock=Clock(), **options)
    swings = itertools.count(1)

    def step(budget):
        n = next(swings)
        return Step(n >= 8, (-1) ** n * 1.7e308, 1.7e308 if n % 2 else 0.0)

    scheduler.add_stepper(step, key="swings", importance=1.7e308)
    for i, urgency in enumerate((1e308, -1e308, 0.0)):
        scheduler.submit(int, key=i, urgency=urgency)
    shares = scheduler.distribution()
    assert math.isclose(sum(shares.values()), 1.0)
    assert sum(scheduler.allocate(10).values()) == 10
    with pytest.raises(ValueError, match=r"urgency \+ importance is inf"):
        scheduler.update("swings", feedback=1.7e308)
    assert scheduler.distribution() == shares
    assert scheduler.run(timeout=1000).counts == {"done": 4}


def test_numpy_may_be_set_to_raise():
    with np.errstate(all="raise"):
        for options in ({}, {"breadth": 3.0}, {"policy": "sample"}, {"policy": "strict"}, {"temperature": 1e-300}):
            scheduler = Scheduler(scorer=foveal.AttentionScorer(4), **options)
            for i in range(100):
                scheduler.submit(int, urgency=(-1) ** i * 10.0 ** (3 * i), features=np.full(4, 10.0 ** (i % 20)), key=i)
            scheduler.rescore(np.arange(4.0))
            for i in range(0, 100, 7):
                scheduler.update(i, urgency=-1e-300)
            assert math.isclose(sum(scheduler.distribution().values()), 1.0)
            assert scheduler.run().counts == {"done": 100}


def test_its_repr_says_what_it_is_doing():
    scheduler = Scheduler(policy="strict")
    scheduler.submit(int)
    assert repr(scheduler) == "<Scheduler: strict, 1 waiting, 0 in flight, not running>"
    seen = []
    with scheduler:
        scheduler.submit(lambda: seen.append(repr(scheduler))).result(200)
    assert "1 in flight, running" in seen[0]
    assert repr(scheduler) == "<Scheduler: strict, 0 waiting, 0 in flight, the scheduler was shut down>"


def test_a_scorer_that_is_interrupted_does_not_keep_the_lock():
    def scorer(features):
        raise KeyboardInterrupt

    scheduler = Scheduler(scorer=scorer)
    scheduler.submit(int, features=[1.0])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            scheduler.distribution()


def test_made_up_keys_avoid_those_given():
    scheduler = Scheduler()
    given = [scheduler.submit(int, key=f"task-{n}") for n in (0, 1, 2)]
    made_up = [scheduler.submit(int) for _ in range(3)]
    assert scheduler.run(timeout=20).counts == {"done": len(given + made_up)}


def test_running_twice_and_after_shutdown():
    scheduler = Scheduler()
    with scheduler:
        with pytest.raises(RuntimeError, match="runs already"):
            scheduler.run()
        with pytest.raises(RuntimeError, match="runs already"):
            scheduler.start()
        assert scheduler.submit(int).result(200) == 0
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
    assert any(f.cancelled() for f in futures)


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
            if i == 0:
                print("ready", flush=True)
            time.sleep(0.2)
            done.append(i)
        scheduler = foveal.Scheduler(max_in_flight=2)
        futures = [scheduler.submit(work, i) for i in range(500)]
        try:
            scheduler.run()
        except KeyboardInterrupt:
            ended = sum(future.done() for future in futures)
            assert ended == len(done), (ended, done)
            assert 0 < ended < 500, ended
            assert threading.enumerate() == [threading.main_thread()]
            assert len(scheduler.distribution()) == 500 - ended
            scheduler.shutdown(cancel_futures=True)
            assert all(future.done() for future in futures)
            print("stopped", flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=200)[0] == "stopped\n"
    assert process.returncode == 0


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
