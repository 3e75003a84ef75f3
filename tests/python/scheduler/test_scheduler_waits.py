"""Waits that can never end are refused, in every shape; those that can go on as if nobody looked."""

import concurrent.futures
import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest

from foveal import DeadlineExceeded, Scheduler, Step

pytestmark = pytest.mark.timeout(100)
ENDLESS = "could never end"


def by_result(future):
    return future.result()


def by_exception(future):
    error = future.exception()
    if error is not None:
        raise error
    return future.result()


def by_wait(future):
    concurrent.futures.wait([future])
    return future.result()


def by_first(future):
    concurrent.futures.wait([future], return_when=concurrent.futures.FIRST_COMPLETED)
    return future.result()


def by_as_completed(future):
    return next(concurrent.futures.as_completed([future])).result()


class Derived(ThreadPoolExecutor):
    """Is given every task."""


WAYS = [by_result, by_exception, by_wait, by_first, by_as_completed]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [lambda: None, lambda: ThreadPoolExecutor(1), lambda: Derived(1)])
def test_a_task_that_waits_for_one_that_no_slot_is_left_for(way, make):
    scheduler = Scheduler(make(), max_in_flight=1)
    inner = []

    def outer():
        inner.append(scheduler.submit(pow, 5, 2))
        return way(inner[0])

    future = scheduler.submit(outer)
    assert scheduler.run().counts == {"failed": 1, "done": 1}
    with pytest.raises(RuntimeError, match=ENDLESS):
        future.result()
    assert inner[0].result() == 25


@pytest.mark.parametrize("way", WAYS)
def test_a_task_that_waits_for_itself(way):
    with Scheduler(max_in_flight=2) as scheduler:
        own, ready = [], threading.Event()

        def outer():
            ready.wait(100)
            return way(own[0])

        own.append(scheduler.submit(outer))
        ready.set()
        with pytest.raises(RuntimeError, match=ENDLESS):
            own[0].result()  # this wait is not refused: the task's is


@pytest.mark.parametrize("number", [2, 3])
def test_a_ring_of_tasks_is_broken_at_one_of_them(number):
    scheduler, futures, ready = Scheduler(max_in_flight=number), [], threading.Event()

    def member(i):
        ready.wait(100)
        try:
            return futures[(i + 1) % number].result()
        except RuntimeError as error:
            return "refused" if ENDLESS in str(error) else str(error)

    futures += [scheduler.submit(member, i) for i in range(number)]
    with scheduler:
        ready.set()
        assert [f.result() for f in futures] == ["refused"] * number  # what the one returned goes round


@pytest.mark.parametrize("make", [lambda: None, lambda: Derived(1)])
def test_a_callback_that_waits(make):
    scheduler, errors = Scheduler(make(), max_in_flight=1), []

    def callback(_):
        try:
            last.result()
        except RuntimeError as error:
            errors.append(str(error))

    first = scheduler.submit(int, urgency=5.0)
    first.add_done_callback(callback)
    last = scheduler.submit(pow, 5, 2)
    assert scheduler.run().counts == {"done": 2}
    assert len(errors) == 1
    assert ENDLESS in errors[0]


def test_nested_schedulers():
    outer, inner = Scheduler(max_in_flight=1), Scheduler(max_in_flight=1)
    refusals = []

    def within():
        try:
            return outer.submit(pow, 5, 2).result()
        except RuntimeError as error:
            refusals.append(str(error))

    def by_run():
        inner.submit(within)
        inner.run()

    def by_future():
        with inner:
            return inner.submit(within).result()

    for task in (by_run, by_future):
        future = outer.submit(task)
        counts = outer.run().counts
        assert sum(counts.values()) == 2
        if future.exception() is not None:  # the wait that was refused is this one
            assert task is by_future
            refusals.append(str(future.exception()))
    assert len(refusals) >= 2
    assert all(ENDLESS in refusal for refusal in refusals)


def test_threads_of_a_pool_that_is_shared():
    with ThreadPoolExecutor(1) as pool, Scheduler(pool, max_in_flight=4) as scheduler:

        def waits():
            return scheduler.submit(int).result()

        for future in (pool.submit(waits), scheduler.submit(waits)):
            with pytest.raises(RuntimeError, match=ENDLESS):
                future.result(50)


@pytest.mark.parametrize("end", ["budget", "timeout"])
def test_a_wait_for_what_the_run_does_not_reach(end):
    scheduler, later = Scheduler(max_in_flight=2, policy="strict"), []  # so that the later task is the last

    def outer():
        later.append(scheduler.submit(int, urgency=-9.0))
        return later[0].result()

    future = scheduler.submit(outer)
    scheduler.submit(time.sleep, 0.2)
    scheduler.submit(time.sleep, 0.2)
    scheduler.run(**({"budget": 3} if end == "budget" else {"timeout": 0.1}))
    with pytest.raises(RuntimeError, match=ENDLESS):
        future.result()
    scheduler.run()
    assert later[0].result() == 0


def test_waits_that_can_end_go_on():
    with Scheduler(max_in_flight=2) as scheduler:
        busy = [scheduler.submit(time.sleep, 0.4, urgency=9.0)]

        def outer(way):
            return way(scheduler.submit(pow, 5, 2))

        for way in WAYS:
            assert scheduler.submit(outer, way).result() == 25  # after the other slot is free
            busy.append(scheduler.submit(time.sleep, 0.4, urgency=9.0))

    scheduler = Scheduler(max_in_flight=1)

    def with_a_timeout():
        inner = scheduler.submit(int)
        with pytest.raises(concurrent.futures.TimeoutError):
            inner.result(0.3)
        assert concurrent.futures.wait([inner], timeout=0.3).not_done == {inner}
        with pytest.raises(concurrent.futures.TimeoutError):
            next(concurrent.futures.as_completed([inner], timeout=0.3))
        return "ended"

    def for_a_deadline():
        with pytest.raises(DeadlineExceeded):
            scheduler.submit(int, deadline=0.3).result()
        return "ended"

    def for_any_with_one_of_elsewhere():
        done, _ = concurrent.futures.wait([scheduler.submit(int), elsewhere], return_when="FIRST_COMPLETED")
        return "ended" if done == {elsewhere} else "not"

    elsewhere = Future()
    threading.Timer(0.5, elsewhere.set_result, [1]).start()
    tasks = (with_a_timeout, for_a_deadline, for_any_with_one_of_elsewhere)
    futures = [scheduler.submit(task, urgency=5.0) for task in tasks]
    scheduler.run()
    assert [f.result() for f in futures] == ["ended"] * 3


def test_a_wait_of_an_executor_that_runs_tasks_in_the_scheduler_s_thread():
    class Inline(Executor):
        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)
            return future

    scheduler = Scheduler(Inline(), max_in_flight=3)
    future = scheduler.submit(lambda: scheduler.submit(int).result())
    assert scheduler.run().counts == {"failed": 1, "done": 1}
    with pytest.raises(RuntimeError, match=ENDLESS):
        future.result()


def test_a_stepper_that_waits_for_another():
    scheduler = Scheduler(max_in_flight=1)
    future = scheduler.add_stepper(lambda budget: Step(bool(scheduler.submit(int).result())), key="s")
    assert scheduler.run().counts == {"failed": 1, "done": 1}
    assert ENDLESS in str(future.exception())
