"""The scheduler broken off anywhere: Ctrl-C, errors and destructors in the middle of a step, fork, Python's end."""

import concurrent.futures
import contextlib
import gc
import linecache
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from foveal import AttentionScorer, Scheduler, Step
from foveal._scheduler import ledger as ledger_module

HERE = os.path.dirname(ledger_module.__file__)
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
starts_threads_at_the_end = pytest.mark.skipif(
    sys.version_info[:2] == (3, 12), reason="Python 3.12 may start no thread any more when the interpreter ends"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def run_program(program, *arguments, forks=False):
    """Run a program of its own and give what it prints; a hang ends it with all its stacks."""
    watch = "" if forks else "import faulthandler; faulthandler.dump_traceback_later(100, exit=True)\n"
    arguments = [sys.executable, "-c", watch + textwrap.dedent(program), *arguments]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Ctrl-C


class Interrupter:
    """Raises KeyboardInterrupt in this thread at the nth line of the scheduler's code, as Ctrl-C may.

    Not at a ``with``: the second event there comes between the block and __exit__, where CPython looks for no signal.
    And not around the call of a callback: one that is interrupted as it begins is not called again.
    """

    def __init__(self, at):
        self.left = at
        self.line = None

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if os.path.dirname(frame.f_code.co_filename) != HERE or frame.f_code.co_name == "_invoke_callbacks":
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event in ("call", "line") and not text.lstrip().startswith("with "):
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                self.line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self.trace


def calls_of_every_kind(scheduler, futures, resolved):
    """What a user does before and while it runs; each Future's callback counts."""

    def submit(**options):
        future = scheduler.submit(int, **options)
        futures.append(future)
        future.add_done_callback(lambda future: resolved.update([future.key]))

    for i in range(3):
        submit(key=i, urgency=float(i), features=[1.0, float(i)], deadline=1e6 if i else None)
    scheduler.update(1, urgency=5.0)
    scheduler.distribution()
    scheduler.rescore([1.0, 0.0])
    futures[0].cancel()
    scheduler.allocate(10)
    submit(key=3)
    scheduler.replay([])
    scheduler.run(budget=1)
    submit(key=4)
    scheduler.start()
    scheduler.cancel(4)
    scheduler.report()
    scheduler.shutdown(cancel_futures=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that comes in a generator's end
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", ["credit", "strict"])
def test_an_interrupt_at_any_line_loses_nothing(policy):
    """Wherever Ctrl-C comes: no lock is kept, no task is lost or done twice, and the next run does what is left."""
    with ThreadPoolExecutor(1) as pool:
        stride = 1 if "FOVEAL_SOAK_SECONDS" in os.environ else 13
        lines = set()
        at = random.Random(policy).randrange(stride)
        while True:
            scheduler = Scheduler(pool, breadth=2.0, scorer=AttentionScorer(2), policy=policy)
            futures, resolved = [], Counter()
            interrupter = Interrupter(at)
            with contextlib.suppress(KeyboardInterrupt), interrupter:
                calls_of_every_kind(scheduler, futures, resolved)
            if interrupter.line is None:
                break
            lines.add(interrupter.line)
            what = f"after Ctrl-C at {interrupter.line}, the {at}th line"
            if not scheduler._engine.refusal:
                scheduler.distribution()
                scheduler.submit(int, key="later")
                if scheduler._engine.is_running():  # was broken off at the very end of start
                    scheduler.shutdown()
                else:
                    scheduler.run()
            scheduler.shutdown(cancel_futures=True)
            assert all(future.done() for future in futures), what
            assert not scheduler._ledger.unfinished(), what
            assert not scheduler._ledger.over, what
            assert set(resolved.values()) <= {1}, what
            # The last one's callback is added after submit, and may have been interrupted before.
            assert set(resolved) >= {future.key for future in futures[:-1]}, what
            at += stride
    assert len(lines) > 100 / stride


@needs_signals
def test_interrupts_at_random_moments():
    """The same with true signals, which come in the middle of C code too; some end in a destructor, where Python drops
    the exception."""
    program = """
    import os, random, signal, sys, threading, time, foveal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng = random.Random(int(sys.argv[1]))
    caught = 0
    for _ in range(int(sys.argv[2])):
        futures, scheduler, sent = [], foveal.Scheduler(max_in_flight=2), []

        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            sent.append(time.monotonic())

        def goes_on():
            return not sent or time.monotonic() < sent[0] + 0.3

        try:
            timer = threading.Timer(rng.uniform(0.0, 0.05), interrupt)
            if rng.random() < 0.5:
                with scheduler:
                    timer.start()
                    while goes_on():
                        futures.append(scheduler.submit(int, urgency=rng.random()))
                        if rng.random() < 0.3:
                            futures[-1].cancel()
                        if rng.random() < 0.3:
                            scheduler.cancel(futures[-1]) or scheduler.distribution()
            else:
                timer.start()
                while goes_on():
                    futures += [scheduler.submit(int, urgency=rng.random()) for _ in range(20)]
                    scheduler.run()
        except KeyboardInterrupt:
            caught += 1
        scheduler.shutdown(cancel_futures=True)
        assert all(future.done() for future in futures)
    assert caught
    print("fine")
    """
    assert run_program(program, "0", "15") == "fine\n"


@needs_signals
def test_ctrl_c_in_a_callback_of_cancel_reaches_the_caller():
    program = """
    import os, signal, time, foveal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scheduler = foveal.Scheduler()
    future = scheduler.submit(int)
    future.add_done_callback(lambda future: (os.kill(os.getpid(), signal.SIGINT), time.sleep(1)))
    try:
        future.cancel()
    except KeyboardInterrupt:
        print("interrupted", future.cancelled(), scheduler.run().counts)
    """
    assert run_program(program) == "interrupted True {'cancelled': 1}\n"


@pytest.mark.parametrize("is_started", [True, False])
def test_a_run_that_is_interrupted_while_its_thread_starts_does_not_go_on(monkeypatch, is_started):
    scheduler, ran, start = Scheduler(max_in_flight=1), [], threading.Thread.start
    for i in range(5):
        scheduler.submit(ran.append, i, key=i)

    def interrupted(thread):
        if is_started:
            start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scheduler.run()
    before = len(ran)
    assert not scheduler._engine.is_running()
    assert len(scheduler.run().rows) >= 5 - before
    assert ran == list(range(5))


class Derived(ThreadPoolExecutor):
    """A pool that is given every task."""


# Errors in the middle of a step


def test_a_thread_that_cannot_start_leaves_the_scheduler_as_it_was(monkeypatch):
    scheduler = Scheduler()
    future = scheduler.submit(int)

    def start(thread):
        raise RuntimeError("can't start new thread")

    for call in (scheduler.run, scheduler.start):
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(RuntimeError, match="can't start new thread"):
                call()
    assert scheduler.run().counts == {"done": 1}
    assert future.result() == 0


def test_a_pool_that_cannot_start_its_thread_ends_the_run_and_runs_nothing_twice(monkeypatch):
    """ThreadPoolExecutor.submit raises then, but has queued what it was given, and runs it with the next."""
    pool, start = ThreadPoolExecutor(1), threading.Thread.start
    ran = []
    scheduler = Scheduler(pool)
    for i in range(3):
        scheduler.submit(ran.append, i)

    def fails_for_the_pool(thread):
        if "ThreadPool" in thread.name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails_for_the_pool)
        with pytest.raises(RuntimeError, match=r"takes no tasks \(can't start new thread\); none is lost"):
            scheduler.run()
    assert ran == []
    assert scheduler.run().counts == {"done": 3}
    assert ran == [0, 1, 2]
    pool.shutdown()


def test_a_runner_that_comes_too_late_for_its_run_does_not_end_the_next(monkeypatch):
    """It makes room for others in the pool and goes behind them, while the rest is done and the pool is closed."""
    scheduler, submit, late = Scheduler(max_in_flight=2), ThreadPoolExecutor.submit, threading.Event()

    def is_late(pool, fn, /, *arguments):
        if threading.current_thread().name.startswith("ThreadPoolExecutor") and not late.is_set():
            late.set()
            while not pool._shutdown:
                time.sleep(0.001)
        return submit(pool, fn, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", is_late)
    while not late.is_set():
        futures = [scheduler.submit(time.sleep, 0.001) for _ in range(30)]
        scheduler.run()
        assert all(future.done() for future in futures)
    scheduler.submit(int)
    assert scheduler.run().counts == {"done": 1}


@pytest.mark.parametrize(("method", "times"), [("settle", 1), ("settle", 2), ("pop", 1)])
@pytest.mark.parametrize("kind", [ThreadPoolExecutor, Derived])
def test_an_error_of_the_scheduler_itself_is_no_hang_and_loses_no_task(monkeypatch, method, times, kind):
    """Stands for whatever nobody has thought of: a part of it raises."""
    with kind(2) as pool:
        scheduler = Scheduler(pool)
        futures = [scheduler.submit(pow, i, 2) for i in range(10)]
        backlog = scheduler._ledger.backlog
        real, raised = getattr(backlog, method), []

        def raises(*arguments):
            if len(scheduler._ledger.backlog) < 5 and len(raised) < times:
                raised.append(1)
                raise MemoryError("once")
            return real(*arguments)

        monkeypatch.setattr(backlog, method, raises)
        if method == "pop":  # nothing was begun: the run ends, and another one does the rest
            with pytest.raises(MemoryError, match="once"):
                scheduler.run()
            assert 0 < sum(future.done() for future in futures) < 10
            assert scheduler.run().counts == {"done": 10}
            assert [future.result() for future in futures] == [i * i for i in range(10)]
        else:  # a task was done, and who knows what has become of its result
            assert scheduler.run().counts == {"done": 10 - times, "failed": times}
            assert sum(isinstance(future.exception(), MemoryError) for future in futures) == times


class Key:
    """Raises in its second comparison."""

    compared = 0

    def __hash__(self):
        return 1

    def __eq__(self, other):
        Key.compared += 1
        if Key.compared > 1:
            raise ValueError("no comparison")
        return self is other


def test_a_key_that_cannot_be_compared_loses_no_task(monkeypatch):
    monkeypatch.setattr(Key, "compared", 0)
    scheduler = Scheduler(max_in_flight=1)
    futures = [scheduler.submit(int, key=Key()) for _ in range(2)]
    assert [f.key for f in futures]
    assert scheduler.run().counts == {"done": 2}
    assert [f.result() for f in futures] == [0, 0]
    assert scheduler.distribution() == {}


class Unlike:
    """A key whose comparison with others fails when it is told to."""

    fails = False

    def __hash__(self):
        return 1

    def __eq__(self, other):
        if Unlike.fails:
            raise ValueError("no comparison")
        return self is other


def test_a_key_that_fails_while_a_task_ends_or_is_cancelled_ends_no_run(monkeypatch, caplog):
    monkeypatch.setattr(Unlike, "fails", False)
    scheduler = Scheduler(max_in_flight=1)
    keys = [Unlike() for _ in range(4)]
    futures = [scheduler.submit(int, key=key, urgency=-float(i)) for i, key in enumerate(keys)]
    scheduler.replay([(0.0, key, False) for key in keys])
    Unlike.fails = True
    assert futures[3].cancel()  # behind the others in the table of keys: to find it asks them
    assert "exception comparing the key" in caplog.text
    assert scheduler._ledger.is_whole
    Unlike.fails = False
    scheduler.replay([])
    Unlike.fails = True
    assert scheduler.run().counts == {"cancelled": 1, "done": 3}
    assert [f.result() for f in futures[:3]] == [0, 0, 0]


class Mute(Exception):
    """Cannot be shown."""

    def __repr__(self):
        raise ValueError("no repr")


def test_what_has_no_repr_is_reported_on_all_the_same():
    class Nameless:
        __repr__ = Mute.__repr__

    def fails():
        raise Mute

    key = Nameless()
    scheduler = Scheduler()
    future = scheduler.submit(fails, key=key)
    with pytest.raises(ValueError, match="<Nameless, whose repr raises ValueError> is that of an unfinished task"):
        scheduler.submit(int, key=key)
    scheduler.add_stepper(lambda budget: Nameless(), key="step")
    late = scheduler.submit(int, deadline=0.0, key=Nameless())
    time.sleep(0.01)
    report = scheduler.run()
    assert report.counts == {"failed": 2, "expired": 1}
    assert "whose" in str(report)  # rich breaks the rest where its columns end
    assert any("Mute, whose repr raises ValueError" in (row.error or "") for row in report.rows)
    assert isinstance(future.exception(), Mute)
    assert "Nameless" in str(late.exception())


# Those whom the scheduler calls call the scheduler


class Called:
    """A callable that does something when it goes."""

    def __init__(self, at_the_end):
        self.at_the_end = at_the_end

    def __call__(self):
        return 1

    def __del__(self):
        self.at_the_end()


def test_a_destructor_may_cancel_and_update():
    scheduler, errors = Scheduler(max_in_flight=1), []

    def at_the_end():
        try:
            scheduler.update("kept", urgency=-9.0)
            victim.cancel()
        except BaseException as error:
            errors.append(error)

    victim = scheduler.submit(int, urgency=-5.0)
    scheduler.submit(int, urgency=-4.0, key="kept")
    scheduler.submit(Called(at_the_end))
    assert scheduler.run().counts == {"done": 2, "cancelled": 1}
    assert victim.cancelled()
    assert not errors


def test_a_destructor_in_the_middle_of_a_step_neither_hangs_nor_sees_half_a_change(monkeypatch):
    """The garbage collector calls destructors anywhere: here when a task is queued again."""
    scheduler, refused = Scheduler(max_in_flight=1), []
    victim = scheduler.submit(int, urgency=-5.0, key="victim")
    push = scheduler._ledger.backlog.push

    def collects(task, attention=0.0):
        if task.key == "again":
            victim.cancel()
            for call in (scheduler.distribution, scheduler.report, lambda: scheduler.update("again", urgency=1.0)):
                with pytest.raises(RuntimeError, match="in the middle of a step of the scheduler"):
                    call()
                refused.append(call)
        push(task, attention)

    monkeypatch.setattr(scheduler._ledger.backlog, "push", collects)
    steps = iter([False, True])
    scheduler.add_stepper(lambda budget: Step(next(steps)), key="again")
    assert scheduler.run().counts == {"done": 1, "cancelled": 1}
    assert victim.cancelled()
    assert len(refused) >= 3


def test_a_scorer_that_calls_the_scheduler_fails_its_task_with_a_clear_error():
    scheduler = Scheduler(scorer=lambda features: scheduler.distribution())
    future = scheduler.submit(int, features=[1.0])
    assert scheduler.run().counts == {"failed": 1}
    with pytest.raises(RuntimeError, match=r"Scheduler\.distribution: called by a scorer"):
        future.result()


# Shutdown from within


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, Derived, None])
def test_shutdown_in_a_task_and_in_a_callback_does_not_wait_for_itself(kind):
    for how in ("task", "callback", "callback of a run", "callback of cancel"):
        pool = kind and kind(1)
        scheduler = Scheduler(pool)
        if how == "task":
            scheduler.start()
            first = scheduler.submit(scheduler.shutdown)
        else:
            first = scheduler.submit(int)
            first.add_done_callback(lambda _, scheduler=scheduler: scheduler.shutdown())
        rest = [scheduler.submit(int, urgency=-1.0) for _ in range(3)] if how != "task" else []
        if how == "callback":
            scheduler.start()
        elif how == "callback of a run":
            assert scheduler.run().counts == {"done": 4}
        elif how == "callback of cancel":
            with scheduler:
                first.cancel()
        concurrent.futures.wait([first, *rest], timeout=100)
        assert all(f.done() for f in (first, *rest))
        scheduler.shutdown()
        assert not scheduler._engine.is_running()
        if pool:
            pool.shutdown()


def test_shutdown_during_a_run_with_a_budget_cancels_what_the_run_leaves():
    scheduler = Scheduler(max_in_flight=1)
    first = scheduler.submit(lambda: scheduler.shutdown(wait=False), urgency=9.0)
    rest = [scheduler.submit(int) for _ in range(3)]
    assert scheduler.run(budget=2).counts == {"done": 2, "cancelled": 2}
    assert first.result() is None
    assert all(f.done() for f in rest)


# Fork and the end of the interpreter


@needs_fork
def test_a_fork_of_a_running_scheduler_refuses_and_does_not_hang():
    program = """
    import os, sys, threading, time, foveal
    scheduler = foveal.Scheduler(max_in_flight=1).start()
    release = threading.Event()
    scheduler.submit(release.wait, 100)
    waits = scheduler.submit(int)
    idle = foveal.Scheduler()
    later = idle.submit(int)
    pid = os.fork()
    if not pid:
        for call in (waits.result, lambda: scheduler.submit(int), scheduler.run, scheduler.start):
            try:
                call()
            except RuntimeError as error:
                assert "when this process was forked" in str(error), error
            else:
                raise AssertionError
        scheduler.shutdown()
        idle.run()
        assert later.result() == 0
        print("child", flush=True)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    release.set()
    assert waits.result(100) == 0
    scheduler.shutdown()
    idle.run()
    print("parent")
    """
    assert run_program(program, forks=True) == "child\nparent\n"


@needs_fork
def test_forks_while_other_threads_use_the_scheduler():
    """The child finds no lock that is held by nobody, and no change that is half made."""
    program = """
    import os, threading, foveal
    scheduler = foveal.Scheduler(breadth=3.0)
    stop = threading.Event()

    def use():
        while not stop.is_set():
            future = scheduler.submit(int)
            scheduler.update(future, urgency=1.0)
            scheduler.distribution()
            future.cancel()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        pid = os.fork()
        if not pid:
            future = scheduler.submit(int)
            scheduler.run()
            os._exit(0 if future.result() == 0 else 1)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    for thread in threads:
        thread.join()
    print("fine")
    """
    assert run_program(program, forks=True) == "fine\n"


@starts_threads_at_the_end
@pytest.mark.parametrize("executor", ["None", "ThreadPoolExecutor(1)", "lambda: ProcessPoolExecutor(1)"])
def test_what_waits_in_the_background_is_run_at_the_end_of_the_interpreter(executor):
    program = f"""
    import atexit, time, foveal
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    scheduler = foveal.Scheduler({executor}, max_in_flight=1).start()
    futures = [scheduler.submit(time.sleep, 0.01) for _ in range(20)]
    atexit.register(lambda: print(sum(f.done() and not f.cancelled() and not f.exception() for f in futures)))
    """
    assert run_program(program) == "20\n"


@starts_threads_at_the_end
def test_a_run_in_a_thread_that_is_awaited_is_not_cut_off_by_the_end_of_the_interpreter():
    program = """
    import threading, time, foveal
    scheduler = foveal.Scheduler(max_in_flight=1)
    for _ in range(20):
        scheduler.submit(time.sleep, 0.01)
    threading.Thread(target=lambda: print(scheduler.run().counts)).start()
    time.sleep(0.05)
    """
    assert run_program(program) == "{'done': 20}\n"


@needs_signals
def test_ctrl_c_at_the_end_of_the_interpreter_cancels_what_waits():
    program = """
    import atexit, signal, time, foveal
    signal.signal(signal.SIGINT, signal.default_int_handler)
    scheduler = foveal.Scheduler(max_in_flight=1).start()
    futures = [scheduler.submit(time.sleep, 0.05) for _ in range(1000)]
    futures[0].add_done_callback(lambda _: print("ready", flush=True))
    atexit.register(lambda: print(all(f.done() for f in futures), sum(f.cancelled() for f in futures) > 900))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[0] == "True True\n"


def test_a_future_of_a_scheduler_that_has_gone_is_no_leak():
    class Big:
        pass

    scheduler = Scheduler()
    big = Big()
    seen = weakref.ref(big)
    future = scheduler.submit(lambda big: big, big)
    del big
    scheduler.start()
    assert isinstance(future.result(100), Big)
    del future
    for _ in range(100):
        gc.collect()
        if seen() is None:
            break
        time.sleep(0.01)
    assert seen() is None, "the history of the background keeps a result"
    scheduler.shutdown()
