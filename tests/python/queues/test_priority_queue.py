"""foveal.PriorityQueue and AsyncPriorityQueue: one set of rules, in threads and in tasks."""

import asyncio
import contextlib
import copy
import doctest
import os
import pickle
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import foveal._queues.async_queue
import foveal._queues.priority_queue
import foveal._queues.rules
import foveal.queues
from foveal import AsyncPriorityQueue, Empty, PriorityQueue, ShutDown

SHORT = 0.05  # long enough for a thread to fall asleep
LONG = 100.0  # nobody waits so long unless something is broken


class AgainstModel(RuleBasedStateMachine):
    """One thread, nothing blocks: a list of (priority, number, item, key)."""

    maxsize = 5
    max = False
    make = PriorityQueue
    KEYS = st.one_of(st.none(), st.integers(0, 4))

    def __init__(self):
        super().__init__()
        self.queue = self.make(self.maxsize, max=self.max)
        self.waiting = []
        self.unfinished = 0
        self.changes = 0
        self.is_shutdown = False

    def put_in(self, priority, item, key):
        self.waiting.append(((-priority if self.max else priority), self.changes, item, key))
        self.changes += 1

    def named(self, key):
        return [entry for entry in self.waiting if entry[3] == key and key is not None]

    @rule(priority=st.integers(-2, 2), key=KEYS)
    def put(self, priority, key):
        item = [self.changes]  # can neither be hashed nor compared to what is not a list
        if self.is_shutdown:
            with pytest.raises(ShutDown):
                self.queue.put_nowait(item, priority, key=key)
        elif self.named(key):
            with pytest.raises(ValueError, match=f"put: key {key} is waiting already"):
                self.queue.put_nowait(item, priority, key=key)
        elif len(self.waiting) == self.maxsize:
            with pytest.raises(queue.Full):
                self.queue.put_nowait(item, priority, key=key)
        else:
            self.queue.put_nowait(item, priority, key=key)
            self.put_in(priority, item, key)
            self.unfinished += 1

    @rule()
    def get(self):
        if self.waiting:
            first = min(self.waiting)
            self.waiting.remove(first)
            assert self.queue.get_nowait() is first[2]
        else:
            with pytest.raises(ShutDown if self.is_shutdown else Empty):
                self.queue.get_nowait()

    @rule(key=st.integers(0, 4), priority=st.integers(-2, 2))
    def update_priority(self, key, priority):
        if not self.named(key):
            with pytest.raises(KeyError):
                self.queue.update_priority(key, priority)
            return
        self.queue.update_priority(key, priority)
        (entry,) = self.named(key)
        if entry[0] != (-priority if self.max else priority):
            self.waiting.remove(entry)
            self.put_in(priority, *entry[2:])

    @rule(key=KEYS)
    def cancel(self, key):
        named = self.named(key)
        assert self.queue.cancel(key) is bool(named)
        if named:
            self.waiting.remove(named[0])
            self.unfinished = max(0, self.unfinished - 1)

    @rule()
    def task_done(self):
        if self.unfinished:
            self.queue.task_done()
            self.unfinished -= 1
        else:
            with pytest.raises(ValueError, match="task_done: called more often than items were put"):
                self.queue.task_done()

    @rule(immediate=st.booleans(), really=st.integers(0, 9))
    def shutdown(self, immediate, really):
        if really:
            return
        self.queue.shutdown(immediate)
        self.is_shutdown = True
        if immediate:
            self.unfinished = max(0, self.unfinished - len(self.waiting))
            self.waiting.clear()

    @invariant()
    def same(self):
        assert self.queue.qsize() == len(self.waiting)
        assert self.queue.empty() is (not self.waiting)
        assert self.queue.full() is (len(self.waiting) == self.maxsize)


class AgainstModelMax(AgainstModel):
    max = True


class AgainstModelAsync(AgainstModel):
    make = AsyncPriorityQueue


TestAgainstModel = AgainstModel.TestCase
TestAgainstModelMax = AgainstModelMax.TestCase
TestAgainstModelAsync = AgainstModelAsync.TestCase
TestAgainstModel.settings = TestAgainstModelMax.settings = TestAgainstModelAsync.settings = settings(
    max_examples=100, stateful_step_count=50
)


# ---- threads ---------------------------------------------------------------------------------------------------------


class Call(threading.Thread):
    """A call in a thread of its own, which has time to begin waiting."""

    def __init__(self, function, *args, **kwargs):
        super().__init__(daemon=True)
        self.call = lambda: function(*args, **kwargs)
        self.outcome = None
        self.start()
        time.sleep(SHORT)

    def run(self):
        try:
            self.outcome = self.call()
        except Exception as error:
            self.outcome = type(error)

    def result(self):
        self.join(LONG)
        assert not self.is_alive()
        return self.outcome


def test_get_waits_for_put_and_put_for_get():
    jobs = PriorityQueue(1)
    getter = Call(jobs.get)
    jobs.put("a", 1.0)
    assert getter.result() == "a"
    jobs.put("b", 1.0)
    putter = Call(jobs.put, "c", 0.5)
    assert jobs.full()
    assert jobs.get() == "b"
    assert putter.result() is None
    assert jobs.get(timeout=0) == "c"


def test_timeouts():
    for timeout in (-1, float("nan")):
        with pytest.raises(ValueError, match=f"get: timeout is {timeout}, expected at least 0, or None"):
            PriorityQueue().get(timeout=timeout)
    jobs = PriorityQueue(1)
    begin = time.monotonic()
    with pytest.raises(Empty):
        jobs.get(timeout=SHORT)
    with pytest.raises(queue.Empty):
        jobs.get(True, 0)
    jobs.put("a", 1.0)
    with pytest.raises(queue.Full):
        jobs.put("b", 1.0, timeout=SHORT)
    assert time.monotonic() - begin >= 2 * SHORT
    assert Call(jobs.get, timeout=1e300).result() == "a"  # longer than a lock can wait
    for call in (lambda: jobs.get(timeout=-1), lambda: jobs.put("c", 1.0, timeout=-1)):
        with pytest.raises(ValueError, match="timeout is -1, expected at least 0, or None"):
            call()
    with pytest.raises(TypeError, match=r"PriorityQueue\.get: timeout has type str, expected a real number"):
        jobs.get(timeout="1")
    with pytest.raises(OverflowError, match=r"PriorityQueue\.get: timeout is beyond float64"):
        jobs.get(timeout=10**400)
    with pytest.raises(Empty):
        jobs.get(block=False, timeout=-1)  # not looked at


def test_numbers_of_other_kinds():
    jobs = PriorityQueue()
    with pytest.raises(Empty):
        jobs.get(timeout=np.float32(0.01))
    with pytest.raises(Empty):
        jobs.get(timeout=Decimal("0.01"))
    jobs.put("b", Fraction(3, 2), timeout=10**300)
    jobs.put("a", np.float32(1.0))
    assert [jobs.get(), jobs.get()] == ["a", "b"]


@pytest.mark.parametrize("make", [PriorityQueue, AsyncPriorityQueue])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(make, duplicate):
    with pytest.raises(TypeError, match=f"{make.__name__}: a queue can be neither copied nor pickled"):
        duplicate(make())


def test_waiting_getters_are_served_in_the_order_in_which_they_came():
    jobs = PriorityQueue()
    getters = [Call(jobs.get) for _ in range(5)]
    for item in range(5):
        jobs.put(item, 1.0)
        assert getters[item].result() == item


def test_a_newcomer_does_not_overtake():
    jobs = PriorityQueue()
    served = []

    def work():
        for _ in range(200):
            served.append(("waiting", jobs.get()))

    waiting = Call(work)
    for item in range(200):
        jobs.put(item, 1.0)
        with pytest.raises(Empty):  # the item is promised, or gone
            served.append(("newcomer", jobs.get_nowait()))
        while len(served) <= item:
            time.sleep(0)
        time.sleep(0.001)  # until it waits again
    waiting.result()
    assert {who for who, _ in served} == {"waiting"}


def test_what_is_handed_out_is_decided_at_the_last_moment():
    jobs = PriorityQueue()
    getter = Call(jobs.get)
    with jobs._mutex:  # the getter was woken, but cannot go on
        jobs._insert("first", 2.0, "a")
        jobs._insert("second", 3.0, "b")
        jobs._entries.update_priority(jobs._by_key["b"], 1.0)
    assert getter.result() == "second"


def test_a_promised_item_that_is_cancelled():
    jobs = PriorityQueue()
    getter = Call(jobs.get)
    later = Call(jobs.get)
    with jobs._mutex:
        jobs._insert("a", 2.0, "a")
        jobs._entries.discard(jobs._by_key.pop("a"))
        jobs._finish(1)
    time.sleep(SHORT)
    jobs.put("b", 1.0)
    assert getter.result() == "b"  # it kept its turn
    jobs.put("c", 1.0)
    assert later.result() == "c"


def test_a_waiting_put_whose_key_is_taken_meanwhile_gives_its_room_to_the_next():
    jobs = PriorityQueue(1)
    jobs.put("x", 1.0)
    first = Call(jobs.put, "a", 1.0, key="k")
    second = Call(jobs.put, "b", 2.0)
    with jobs._mutex:  # room for the first, but somebody takes its key
        assert jobs._take() == "x"
        other = foveal._queues.rules.Entry("other", "k")
        jobs._by_key["k"] = other
    assert first.result() is ValueError
    assert second.result() is None
    assert jobs.get() == "b"


def test_a_key_is_free_again_once_its_item_was_handed_out():
    jobs = PriorityQueue()
    jobs.put("a", 1.0, key=("job", 1))
    with pytest.raises(ValueError, match="is waiting already, expected another key"):
        jobs.put("b", 1.0, key=("job", 1))
    assert jobs.get() == "a"
    jobs.put("b", 1.0, key=("job", 1))
    assert jobs.cancel(("job", 1))
    assert not jobs.cancel(("job", 1))
    jobs.put("c", 1.0)
    assert not jobs.cancel(None)  # not addressable
    with pytest.raises(KeyError):
        jobs.update_priority(None, 1.0)


@pytest.mark.parametrize("make", [PriorityQueue, AsyncPriorityQueue])
def test_refused(make):
    jobs = make()
    name = make.__name__
    for priority, error, text in [
        (float("nan"), ValueError, f"{name}.put: priority is nan, expected a number"),
        ("1", TypeError, f"{name}.put: priority has type str, expected a real number"),
        (None, TypeError, f"{name}.put: priority has type NoneType, expected a real number"),
        (bytearray(b"1"), TypeError, f"{name}.put: priority has type bytearray, expected a real number"),
        (np.str_("1"), TypeError, f"{name}.put: priority has type str_, expected a real number"),
        (10**400, OverflowError, f"{name}.put: priority is beyond float64"),
    ]:
        with pytest.raises(error) as raised:
            jobs.put_nowait("a", priority, key="a")
        assert str(raised.value) == text
    with pytest.raises(TypeError, match="unhashable"):
        jobs.put_nowait("a", 1.0, key=[])
    assert jobs.empty()
    jobs.put_nowait("a", 1.0, key="a")
    with pytest.raises(ValueError, match="update_priority: priority is nan"):
        jobs.update_priority("a", float("nan"))
    assert jobs.get_nowait() == "a"
    with pytest.raises(TypeError, match=f"{name}: maxsize has type float, expected an integer"):
        make(float("nan"))


def test_a_key_that_fails_leaves_the_item_where_it_is():
    class Key:
        broken = False

        def __hash__(self):
            if self.broken:
                raise ZeroDivisionError
            return 1

    key = Key()
    jobs = PriorityQueue()
    jobs.put("a", 1.0, key=key)
    jobs.put("b", 1.0)
    key.broken = True
    with pytest.raises(ZeroDivisionError):
        jobs.get()
    key.broken = False
    assert (jobs.get(), jobs.get(), jobs.qsize()) == ("a", "b", 0)


def test_an_item_that_uses_the_queue_as_it_goes():
    sizes = []

    class Item:
        def __del__(self):
            jobs.cancel("key")  # takes the mutex
            sizes.append(jobs.qsize())

    jobs = PriorityQueue()
    jobs.put(Item(), 1.0)
    jobs.put("b", 2.0, key="key")
    call = Call(lambda: jobs.shutdown(immediate=True))
    call.result()
    assert sizes == [0]


def test_join():
    jobs = PriorityQueue()
    jobs.join()
    jobs.put("a", 1.0)
    jobs.put("b", 1.0, key="b")
    waiting = Call(jobs.join)
    jobs.get()
    jobs.task_done()
    time.sleep(SHORT)
    assert waiting.is_alive()
    jobs.cancel("b")
    waiting.result()


def test_shutdown_drains():
    jobs = PriorityQueue(2)
    jobs.put("a", 1.0)
    jobs.put("b", 2.0)
    putters = [Call(jobs.put, "c", 1.0) for _ in range(2)]
    joining = Call(jobs.join)
    jobs.shutdown()
    assert [putter.result() for putter in putters] == [ShutDown, ShutDown]
    with pytest.raises(ShutDown):
        jobs.put_nowait("d", 1.0)
    assert jobs.get() == "a"
    assert jobs.get_nowait() == "b"
    for call in (jobs.get, jobs.get_nowait, lambda: jobs.get(timeout=LONG)):
        with pytest.raises(ShutDown):
            call()
    jobs.task_done()
    jobs.task_done()
    joining.result()


def test_shutdown_at_once():
    jobs = PriorityQueue()
    jobs.put("a", 1.0)
    assert jobs.get() == "a"
    joining = Call(jobs.join)
    jobs.put("b", 1.0)
    jobs.shutdown(immediate=True)
    assert jobs.empty()
    with pytest.raises(ShutDown):
        jobs.get()
    time.sleep(SHORT)
    assert joining.is_alive()  # "a" is still in somebody's hands
    jobs.task_done()
    joining.result()
    with pytest.raises(ValueError, match="task_done"):
        jobs.task_done()


def test_shutdown_wakes_getters():
    for immediate in (False, True):
        jobs = PriorityQueue()
        getters = [Call(jobs.get), Call(jobs.get, timeout=LONG)]
        jobs.shutdown(immediate)
        assert [getter.result() for getter in getters] == [ShutDown, ShutDown]
    assert sys.version_info < (3, 13) or ShutDown is queue.ShutDown


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("timeout", [{}, {"timeout": LONG}])
@pytest.mark.parametrize("method", ["get", "put", "join"])
def test_ctrl_c(method, timeout):
    jobs = PriorityQueue(maxsize=1)
    if method != "get":
        jobs.put("here", 0.0)
    call = {
        "get": lambda: jobs.get(**timeout),
        "put": lambda: jobs.put("b", 1.0, **timeout),
        "join": jobs.join,
    }[method]
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, SHORT)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            call()
        assert time.monotonic() - begin < LONG / 2
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not any(line.waiting or line.permitted for line in (jobs._getters, jobs._putters, jobs._joiners))
    later = Call(jobs.get)
    if method == "get":
        jobs.put("here", 1.0)
    assert later.result() == "here"
    jobs.put("still works", 1.0)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_in_a_terminal():
    program = """if True:
        import foveal, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
        jobs = foveal.PriorityQueue()
        print("waiting", flush=True)
        try:
            jobs.get()
        except KeyboardInterrupt:
            print("interrupted")
        """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "waiting\n"
            time.sleep(SHORT)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=LONG)[0] == "interrupted\n"
        finally:
            process.kill()
    assert process.returncode == 0


def test_an_interrupted_getter_gives_its_permit_on():
    jobs = PriorityQueue()
    course = jobs._get()
    next(course)  # waits, first in line
    later = Call(jobs.get)
    jobs.put("a", 1.0)  # promised to the course
    time.sleep(SHORT)
    assert later.is_alive()
    with pytest.raises(KeyboardInterrupt):
        course.throw(KeyboardInterrupt)
    assert later.result() == "a"
    assert not jobs._getters.permitted


def test_a_getter_whose_time_is_up_takes_what_was_promised():
    jobs = PriorityQueue()
    course = jobs._get()
    next(course)
    jobs.put("a", 1.0)
    with pytest.raises(StopIteration) as end:
        course.send(False)
    assert end.value.value == "a"


def test_threads_neither_lose_nor_double_an_item():
    jobs = PriorityQueue(20)
    taken = []

    def produce(first):
        for i in range(first, 4000, 4):
            jobs.put([i], i % 7, key=i if i % 2 else None)
            if i % 5 == 0 and i % 2:
                try:
                    jobs.update_priority(i, -1.0)
                except KeyError:
                    assert not jobs.cancel(i)

    def consume(timeout):
        while True:
            try:
                taken.append(jobs.get(timeout=timeout)[0])
            except Empty:
                continue
            except ShutDown:
                return
            jobs.task_done()

    consumers = [threading.Thread(target=consume, args=(timeout,)) for timeout in (None, 0.0001, 0.001)]
    producers = [threading.Thread(target=produce, args=(first,)) for first in range(4)]
    for thread in consumers + producers:
        thread.start()
    for thread in producers:
        thread.join(LONG)
    jobs.join()
    jobs.shutdown()
    for thread in consumers:
        thread.join(LONG)
    assert sorted(taken) == list(range(4000))
    assert (jobs._getters.permitted, jobs._putters.permitted) == ([], [])


def test_the_interpreter_ends_while_threads_wait():
    program = """if True:
        import threading, time, foveal
        jobs = foveal.PriorityQueue()
        for timeout in (None, 60):
            threading.Thread(target=jobs.get, kwargs={"timeout": timeout}, daemon=True).start()
        time.sleep(0.05)
        """
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG)
    assert (result.returncode, result.stderr) == (0, "")


def test_docstrings():
    results = [doctest.testmod(module) for module in (foveal._queues.priority_queue, foveal._queues.async_queue)]
    assert sum(tried for _, tried in results) > 10
    assert not any(failed for failed, _ in results)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def in_a_loop(test):
    def run():
        asyncio.run(asyncio.wait_for(test(), LONG))

    run.__name__ = test.__name__
    return run


async def begun(coroutine):
    """A task that has come as far as it can."""
    task = asyncio.ensure_future(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


@in_a_loop
async def test_async_get_waits_for_put_and_put_for_get():
    jobs = AsyncPriorityQueue(1)
    getters = [await begun(jobs.get()) for _ in range(2)]
    await jobs.put("a", 1.0)
    with pytest.raises(Empty):
        jobs.get_nowait()  # promised
    assert await getters[0] == "a"
    await jobs.put("b", 1.0)
    assert await getters[1] == "b"
    await jobs.put("c", 1.0)
    putter = await begun(jobs.put("d", 0.5))
    assert await jobs.get() == "c"
    await putter
    assert jobs.get_nowait() == "d"


@in_a_loop
async def test_async_timeouts():
    jobs = AsyncPriorityQueue(1)
    with pytest.raises(Empty):
        await jobs.get(timeout=SHORT)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(jobs.get(), SHORT)
    assert not jobs._getters.waiting
    await jobs.put("a", 1.0)
    with pytest.raises(queue.Full):
        await jobs.put("b", 1.0, timeout=0)
    with pytest.raises(queue.Full):
        await jobs.put("b", 1.0, block=False)
    with pytest.raises(ValueError, match=r"AsyncPriorityQueue\.get: timeout is -1"):
        await jobs.get(timeout=-1)


@in_a_loop
async def test_async_a_cancelled_getter_gives_its_permit_on():
    jobs = AsyncPriorityQueue()
    first, second = [await begun(jobs.get()) for _ in range(2)]
    jobs.put_nowait("a", 1.0)
    first.cancel()
    assert await second == "a"
    with pytest.raises(asyncio.CancelledError):
        await first
    assert not jobs._getters.permitted


@in_a_loop
async def test_async_getters_whose_items_are_cancelled_keep_their_turns():
    jobs = AsyncPriorityQueue()
    getters = [await begun(jobs.get()) for _ in range(4)]
    for key in "abc":
        jobs.put_nowait(key, 1.0, key=key)
    for key in "cab":
        jobs.cancel(key)
    jobs.put_nowait("first", 1.0)  # before anybody has run
    assert await getters[0] == "first"
    assert not any(getter.done() for getter in getters[1:])
    for number, getter in enumerate(getters[1:]):
        for key in range(2):
            jobs.put_nowait(key, 1.0, key=key)
        for key in range(2):
            jobs.cancel(key)
        await begun(asyncio.sleep(0))  # all who were woken are back in line
        jobs.put_nowait(number, 1.0)
        assert await getter == number
    assert not jobs._getters.permitted


@in_a_loop
async def test_async_a_getter_whose_item_is_cancelled_may_give_up():
    jobs = AsyncPriorityQueue()
    first, second = [await begun(jobs.get()) for _ in range(2)]
    jobs.put_nowait("a", 1.0, key="a")
    jobs.cancel("a")
    first.cancel()
    await begun(asyncio.sleep(0))
    jobs.put_nowait("b", 1.0)
    assert await second == "b"
    with pytest.raises(Empty):
        jobs.get_nowait()


@in_a_loop
async def test_async_join_cancel_and_shutdown():
    jobs = AsyncPriorityQueue()
    await jobs.join()
    await jobs.put("a", 1.0, key="a")
    await jobs.put("b", 2.0, key="b")
    joining = await begun(jobs.join())
    jobs.update_priority("b", 0.5)
    assert await jobs.get() == "b"
    jobs.cancel("a")
    assert not joining.done()
    jobs.task_done()
    await joining
    getter = await begun(jobs.get())
    jobs.shutdown()
    with pytest.raises(ShutDown):
        await getter
    with pytest.raises(ShutDown):
        await jobs.put("c", 1.0)


@in_a_loop
async def test_async_many_tasks():
    jobs = AsyncPriorityQueue(7)
    taken = []

    async def produce(first):
        for i in range(first, 600, 3):
            await jobs.put(i, i % 5)

    async def consume():
        while True:
            try:
                taken.append(await asyncio.wait_for(jobs.get(), 0.001))
                jobs.task_done()
            except asyncio.TimeoutError:
                await asyncio.sleep(0)
            except ShutDown:
                return

    consumers = [asyncio.ensure_future(consume()) for _ in range(4)]
    await asyncio.gather(*(produce(first) for first in range(3)))
    await jobs.join()
    jobs.shutdown()
    await asyncio.gather(*consumers)
    assert sorted(taken) == list(range(600))


STORMS = int(os.environ.get("FOVEAL_STORMS", "6"))


@pytest.mark.parametrize("seed", range(STORMS))
def test_async_a_storm_of_cancellations_loses_nothing(seed):
    rng = random.Random(seed)
    put_in, taken, dropped = [], [], []

    async def put(jobs, i):
        with contextlib.suppress(queue.Full):
            await jobs.put(i, rng.random(), key=i if i % 3 else None, timeout=rng.choice([None, None, 0, 0.0005]))
            put_in.append(i)

    async def get(jobs):
        with contextlib.suppress(Empty):
            taken.append(await jobs.get(timeout=rng.choice([None, None, 0, 0.0005])))

    @in_a_loop
    async def storm():
        jobs = AsyncPriorityQueue(rng.choice([0, 1, 5]))
        tasks = []
        for i in range(600):
            tasks += [asyncio.ensure_future(put(jobs, i)), asyncio.ensure_future(get(jobs))]
            rng.choice(tasks[-40:]).cancel()
            while rng.random() < 0.4:
                await asyncio.sleep(0)
            key = rng.randrange(i + 1)
            if key % 3 and jobs.cancel(key):
                dropped.append(key)
            assert len(jobs._getters.permitted) <= jobs.qsize()
            assert not jobs.maxsize or jobs.qsize() + len(jobs._putters.permitted) <= jobs.maxsize
        while jobs._getters.permitted or jobs._putters.permitted:
            await asyncio.sleep(0)
        assert not (jobs._getters.waiting and jobs.qsize())
        assert not (jobs._putters.waiting and not jobs.full())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not any(line.waiting or line.permitted for line in (jobs._getters, jobs._putters))
        while not jobs.empty():
            taken.append(jobs.get_nowait())

    storm()
    assert sorted(taken + dropped) == sorted(put_in)
    assert len(taken) > 100


@in_a_loop
async def test_async_waiting_getters_are_served_in_the_order_in_which_they_came():
    jobs = AsyncPriorityQueue()
    served = []

    async def get(number):
        served.append((number, await jobs.get(timeout=LONG if number % 2 else None)))

    getters = [await begun(get(number)) for number in range(20)]
    for number in (0, 3, 4, 19):
        getters[number].cancel()  # and is still in line when the first item comes
    left = [number for number in range(20) if number not in (0, 3, 4, 19)]
    for item in range(8):
        jobs.put_nowait(item, 1.0)
    jobs.put_nowait("cancelled", 2.0, key="key")
    jobs.cancel("key")
    with pytest.raises(Empty):
        jobs.get_nowait()
    for item in range(8, len(left)):
        await jobs.put(item, 1.0)
        await asyncio.sleep(0)
    await begun(asyncio.sleep(0))
    assert served == [(number, item) for item, number in enumerate(left)]


@in_a_loop
async def test_async_getters_that_wait_when_the_queue_is_shut_down_keep_their_turns():
    jobs = AsyncPriorityQueue()
    served = []

    async def get(number):
        try:
            served.append((number, await jobs.get()))
        except ShutDown:
            served.append((number, ShutDown))

    for number in range(4):
        await begun(get(number))
    jobs.put_nowait("a", 1.0)
    jobs.put_nowait("b", 1.0)
    jobs.shutdown()  # what is left is promised already
    await begun(asyncio.sleep(0))
    assert served[:2] == [(0, "a"), (1, "b")]
    assert sorted(number for number, what in served[2:] if what is ShutDown) == [2, 3]


@in_a_loop
async def test_async_a_putter_whose_key_is_taken_meanwhile_gives_its_room_to_the_next():
    jobs = AsyncPriorityQueue(1)
    await jobs.put("x", 1.0)
    first = await begun(jobs.put("a", 1.0, key="k"))
    second = await begun(jobs.put("b", 2.0))
    assert await jobs.get() == "x"
    jobs._by_key["k"] = foveal._queues.rules.Entry("other", "k")
    with pytest.raises(ValueError, match="key 'k' is waiting already"):
        await first
    await second
    del jobs._by_key["k"]
    assert jobs.get_nowait() == "b"


def test_their_repr_says_how_full_they_are():
    jobs = PriorityQueue(3)
    assert repr(jobs) == "<PriorityQueue: 0 of 3 waiting, 0 unfinished>"
    jobs.put("job", 1.0)
    jobs.put("job", 1.0)
    jobs.get()
    assert repr(jobs) == "<PriorityQueue: 1 of 3 waiting, 2 unfinished>"
    jobs.shutdown()
    assert repr(jobs).endswith("2 unfinished, shut down>")
    assert repr(AsyncPriorityQueue()) == "<AsyncPriorityQueue: 0 waiting, 0 unfinished>"
