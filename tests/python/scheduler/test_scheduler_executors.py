"""Scheduler on executors of every kind: processes that die, Dask, MPI, pools that break, executors of a user's own."""

import concurrent.futures
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

import foveal
from foveal import Scheduler, Step


def square(i):
    return i * i


def whose():
    time.sleep(0.01)
    return os.getpid()


def fails(i):
    raise ValueError(i)


def dies(path=None):
    """Kill the process that runs it; with a path only the first that comes to it."""
    if path is not None:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "alive"
    os.kill(os.getpid(), signal.SIGKILL)


def one_step(budget):
    return Step(False, 0.5, budget)


def processes():
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def pool():
    with processes() as pool:
        yield pool


# Processes


def test_processes(pool):
    scheduler = Scheduler(pool)
    futures = [scheduler.submit(square, i, urgency=i % 3) for i in range(60)]
    failing = scheduler.submit(fails, 7)
    stepper = scheduler.add_stepper(one_step, key="s", max_steps=5)
    assert scheduler.run().counts == {"done": 61, "failed": 1}
    assert [f.result() for f in futures] == [i * i for i in range(60)]
    with pytest.raises(ValueError, match="7"):
        failing.result()
    assert stepper.result() == Step(False, 0.5, 1.0)


def test_several_processes_work(pool):
    scheduler = Scheduler(pool)
    futures = [scheduler.submit(whose) for _ in range(100)]
    scheduler.run()
    found = {f.result() for f in futures}
    assert os.getpid() not in found
    assert len(found) == 2


def test_what_cannot_be_pickled_fails_on_its_future_alone(pool):
    scheduler = Scheduler(pool)
    bad = [scheduler.submit(lambda: 1), scheduler.submit(square, threading.Lock())]
    good = [scheduler.submit(square, i) for i in range(5)]
    assert scheduler.run().counts == {"failed": 2, "done": 5}
    for future in bad:
        assert "pickle" in str(future.exception()).lower()
    assert [f.result() for f in good] == [0, 1, 4, 9, 16]


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_worker_that_is_killed_loses_no_task_and_blames_nobody_else():
    with processes() as given:
        scheduler = Scheduler(given, max_in_flight=4)
        good = [scheduler.submit(square, i) for i in range(30)]
        deadly = scheduler.submit(dies, urgency=0.1)
        assert scheduler.run(retries=1).counts == {"done": 30, "failed": 1}
        assert [f.result() for f in good] == [i * i for i in range(30)]
        assert isinstance(deadly.exception(), BrokenProcessPool)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_a_task_whose_worker_was_killed_by_chance_is_run_again(tmp_path):
    scheduler = Scheduler(processes, max_in_flight=3)
    futures = [scheduler.submit(dies, str(tmp_path / "died")) for _ in range(6)]
    scheduler.start(retries=1)
    assert [f.result(200) for f in futures] == ["alive"] * 6
    scheduler.shutdown()


# Pools that break or refuse


def test_a_pool_whose_threads_cannot_begin_loses_no_task():
    def initializer():
        raise OSError("no licence")

    scheduler = Scheduler(ThreadPoolExecutor(2, initializer=initializer))
    futures = [scheduler.submit(square, i) for i in range(5)]
    with pytest.raises(RuntimeError, match="the executor takes no tasks"):
        scheduler.run()
    assert not any(f.done() for f in futures)
    assert len(scheduler.distribution()) == 5


def test_processes_that_cannot_begin_end_the_run():
    scheduler = Scheduler(lambda: ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=fails))
    futures = [scheduler.submit(square, i) for i in range(3)]
    assert scheduler.run().counts == {"failed": 3}
    assert all(isinstance(f.exception(), BrokenExecutor) for f in futures)


def test_a_pool_that_is_shut_down_under_a_run():
    pool = ThreadPoolExecutor(1)
    scheduler = Scheduler(pool, policy="strict")  # so that the pool goes after the futures and before the rest
    futures = [scheduler.submit(square, i) for i in range(3)]
    futures.append(scheduler.submit(time.sleep, 0.01))
    futures += [scheduler.submit(square, i) for i in range(3)]
    shutter = scheduler.submit(pool.shutdown, wait=False, cancel_futures=True, urgency=-1.0)
    rest = [scheduler.submit(time.sleep, 0.01, urgency=-5.0) for _ in range(3)]
    with pytest.raises(RuntimeError, match="the executor takes no tasks"):
        scheduler.run()
    assert shutter.done()
    assert all(f.done() for f in futures)
    left = [f for f in rest if not f.done()]
    assert left
    assert list(scheduler.distribution()) == [f.key for f in left]


# Executors of a user's own


class Inline(Executor):
    """Runs a task in submit itself."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def test_an_executor_that_runs_tasks_at_once_and_ever_so_many():
    scheduler = Scheduler(Inline(), max_in_flight=1)
    order = []
    for i in range(5000):
        scheduler.submit(order.append, i)
    failing = scheduler.submit(fails, 1)
    assert scheduler.run().counts == {"done": 5000, "failed": 1}
    assert order == list(range(5000))
    assert isinstance(failing.exception(), ValueError)


class Counting(ThreadPoolExecutor):
    """A derived pool, whose submit is to be called for every task."""

    submitted = 0

    def submit(self, fn, /, *args, **kwargs):
        self.submitted += 1
        return super().submit(fn, *args, **kwargs)


def test_a_derived_pool_of_threads_sees_every_task():
    with Counting(2) as pool:
        scheduler = Scheduler(pool)
        futures = [scheduler.submit(square, i) for i in range(200)]
        scheduler.run()
        assert pool.submitted == 200
        assert [f.result() for f in futures] == [i * i for i in range(200)]


class Refusing(Executor):
    """Takes every second task and refuses the others for a reason of its own."""

    def __init__(self):
        self.asked = 0

    def submit(self, fn, /, *args, **kwargs):
        self.asked += 1
        if self.asked % 2:
            raise TypeError("cannot encode that")
        return Inline.submit(self, fn, *args, **kwargs)


def test_a_task_that_the_executor_cannot_take_fails_alone():
    scheduler = Scheduler(Refusing(), max_in_flight=1)
    futures = [scheduler.submit(square, i) for i in range(6)]
    assert scheduler.run().counts == {"failed": 3, "done": 3}
    assert [type(f.exception()) for f in futures] == [TypeError, type(None)] * 3


def test_an_executor_whose_submit_gives_no_future_ends_the_run():
    class Silent(Executor):
        def submit(self, fn, /, *args, **kwargs):
            return None

    scheduler = Scheduler(Silent(), max_in_flight=1)
    first, second = (scheduler.submit(square, i) for i in range(2))
    with pytest.raises(TypeError, match="submit of the executor Silent returned NoneType, expected a concurrent"):
        scheduler.run(retries=3)
    assert isinstance(first.exception(), TypeError)  # who knows whether it was run
    assert list(scheduler.distribution()) == [second.key]


def breaks():
    raise BrokenProcessPool("a pool of the task's own")


@pytest.mark.parametrize("kind", [Counting, processes, ThreadPoolExecutor])
def test_a_task_that_raises_broken_executor_is_the_only_one_that_fails(kind):
    with kind() as given:
        scheduler = Scheduler(given, max_in_flight=2)
        broken = scheduler.submit(breaks, urgency=9.0)
        good = [scheduler.submit(square, i) for i in range(5)]
        assert scheduler.run().counts == {"failed": 1, "done": 5}
        assert isinstance(broken.exception(), BrokenProcessPool)
        assert [f.result() for f in good] == [0, 1, 4, 9, 16]
        assert given.submit(square, 3).result(200) == 9  # it was not replaced


def test_others_get_their_turn_in_a_pool_that_the_scheduler_fills():
    with ThreadPoolExecutor(1) as pool, Scheduler(pool) as scheduler:
        futures = [scheduler.submit(time.sleep, 0.001) for _ in range(300)]
        assert pool.submit(square, 3).result(200) == 9
        assert not futures[-1].done()


def test_no_more_are_in_flight_than_asked():
    lock, now, most = threading.Lock(), 0, 0

    def work():
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    with ThreadPoolExecutor(8) as pool:
        scheduler = Scheduler(pool, max_in_flight=3)
        for _ in range(60):
            scheduler.submit(work)
        scheduler.run()
    assert most == 3


# Executors that are gone


def test_what_an_executor_that_was_shut_down_leaves_runs_on_another():
    gone = ThreadPoolExecutor(1)
    scheduler = Scheduler(gone)
    futures = [scheduler.submit(square, i) for i in range(5)]
    gone.shutdown()
    with pytest.raises(RuntimeError, match="the executor takes no tasks"):
        scheduler.run()
    with pytest.raises(TypeError, match=r"Scheduler\.run: executor has type int, expected a concurrent"):
        scheduler.run(executor=3)
    with ThreadPoolExecutor(1) as pool:
        assert scheduler.run(executor=pool).counts == {"done": 5}
        assert [f.result() for f in futures] == [i * i for i in range(5)]
        name = scheduler.submit(lambda: threading.current_thread())
        scheduler.run()  # on the same from then on
        assert name.result() in pool._threads
    scheduler.submit(square, 2)
    assert scheduler.run(executor=lambda: ThreadPoolExecutor(1)).counts == {"done": 1}
    with scheduler:
        assert scheduler.submit(square, 3).result(100) == 9
        with pytest.raises(RuntimeError, match="runs already"):
            scheduler.run(executor=Inline())
        assert scheduler.submit(square, 4).result(100) == 16


class Closed(Executor):
    """Like Dask's once its client is closed: no RuntimeError says so."""

    class ClosedError(Exception):
        pass

    def submit(self, fn, /, *args, **kwargs):
        raise self.ClosedError("the client is closed")


def test_an_executor_that_is_closed_in_its_own_words_loses_no_task():
    scheduler = Scheduler(Closed(), max_in_flight=2)
    futures = [scheduler.submit(square, i) for i in range(5)]
    with pytest.raises(RuntimeError, match=r"takes no tasks \(the client is closed\); none is lost"):
        scheduler.run()
    assert not any(f.done() for f in futures)
    assert scheduler.run(executor=Inline()).counts == {"done": 5}


class Endless(Executor):
    """Gives Futures that nobody resolves, and keeps them."""

    def __init__(self):
        self.futures = []

    def submit(self, fn, /, *args, **kwargs):
        self.futures.append(Future())
        return self.futures[-1]


def test_shutdown_gives_up_what_never_comes_back_after_its_timeout():
    executor = Endless()
    scheduler = Scheduler(executor, max_in_flight=2).start()
    futures = [scheduler.submit(square, i) for i in range(5)]
    while len(executor.futures) < 2:
        time.sleep(0.001)
    with pytest.raises(ValueError, match="timeout is given with wait=False"):
        scheduler.shutdown(wait=False, timeout=1.0)
    with pytest.raises(ValueError, match="timeout is -1"):
        scheduler.shutdown(timeout=-1)
    scheduler.shutdown(wait=False)
    assert not any(f.done() for f in futures)
    scheduler.shutdown(timeout=0.05)
    assert not scheduler._engine.is_running()
    assert all(f.done() for f in futures)
    given_up = [f for f in futures if not f.cancelled()]
    assert len(given_up) == 2
    for future in given_up:
        with pytest.raises(RuntimeError, match="waited for any more; who knows whether it is done"):
            future.result()
    for late in executor.futures:
        late.set_result(0)
    assert scheduler.report().counts == {"failed": 2, "cancelled": 3}


def test_shutdown_gives_up_a_thread_after_its_timeout():
    release, ended = threading.Event(), threading.Event()

    def stuck():
        release.wait(100)
        ended.set()

    with ThreadPoolExecutor(1) as pool:
        scheduler = Scheduler(pool).start()
        future = scheduler.submit(stuck)
        rest = scheduler.submit(square, 1)
        while not future.running():
            time.sleep(0.001)
        scheduler.shutdown(timeout=0.05)
        assert isinstance(future.exception(), RuntimeError)
        assert rest.cancelled()
        release.set()
        assert ended.wait(100)
        assert pool.submit(square, 3).result(100) == 9  # the thread is free again
    assert isinstance(future.exception(), RuntimeError)


def test_a_timeout_that_is_long_enough_gives_up_nothing():
    scheduler = Scheduler(max_in_flight=1).start()
    futures = [scheduler.submit(time.sleep, 0.01) for _ in range(5)]
    scheduler.shutdown(timeout=100)
    assert [f.result() for f in futures] == [None] * 5


def test_the_end_of_the_interpreter_does_not_wait_for_what_shutdown_did_not_wait_for():
    program = """
    import concurrent.futures, foveal
    class Endless(concurrent.futures.Executor):
        def submit(self, fn, /, *args, **kwargs):
            return concurrent.futures.Future()
    scheduler = foveal.Scheduler(Endless(), max_in_flight=1).start()
    futures = [scheduler.submit(int) for _ in range(3)]
    scheduler.shutdown(wait=False)
    print("end")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "end\n")


# Dask and MPI


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_dask(tmp_path):
    distributed = pytest.importorskip("distributed")
    dask = pytest.importorskip("dask")
    options = {
        "distributed.scheduler.allowed-failures": 0,
        "temporary-directory": str(tmp_path),
        "distributed.admin.tick.limit": "1h",  # a busy machine is no reason to warn
    }
    with (
        dask.config.set(options),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        scheduler = Scheduler(client.get_executor(pure=False), max_in_flight=4)
        futures = [scheduler.submit(square, i) for i in range(40)]
        failing = scheduler.submit(fails, 7)
        workers = [scheduler.submit(whose) for _ in range(40)]
        assert scheduler.run().counts == {"done": 80, "failed": 1}
        assert [f.result() for f in futures] == [i * i for i in range(40)]
        assert len({f.result() for f in workers}) == 2
        assert isinstance(failing.exception(), ValueError)
        # A worker that is killed: Dask starts another, and what it did is tried again.
        futures = [scheduler.submit(dies, str(tmp_path / "died"), urgency=1.0)]
        futures += [scheduler.submit(square, i) for i in range(20)]
        assert scheduler.run(retries=3).counts == {"done": 21}
        assert [f.result() for f in futures] == ["alive", *(i * i for i in range(20))]
        # A client that is closed, and another.
        futures = [scheduler.submit(square, i) for i in range(20)]
        client.close()
        with pytest.raises(RuntimeError, match="the executor takes no tasks"):
            scheduler.run()
        assert not any(f.done() for f in futures)
        with distributed.Client(cluster) as another:
            assert scheduler.run(executor=another.get_executor(pure=False)).counts == {"done": 20}


def test_mpi(tmp_path):
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    try:
        from mpi4py import MPI  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no MPI library: {error}")
    program = textwrap.dedent(
        """
        import os, foveal
        from mpi4py.futures import MPIPoolExecutor

        def work(i):
            if i == 13:
                raise ValueError(i)
            return i * i, os.getpid()

        if __name__ == "__main__":
            with MPIPoolExecutor(2) as executor:
                scheduler = foveal.Scheduler(executor)
                futures = [scheduler.submit(work, i) for i in range(20)]
                print(sorted(scheduler.run().counts.items()))
                results = [f.result() for i, f in enumerate(futures) if i != 13]
                print([r[0] for r in results] == [i * i for i in range(20) if i != 13])
                print(os.getpid() not in {r[1] for r in results}, type(futures[13].exception()).__name__)
        """
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=250)
    if done.returncode and "spawn" in done.stderr.lower():
        pytest.skip("this MPI cannot start processes")
    assert done.stdout.splitlines() == ["[('done', 19), ('failed', 1)]", "True", "True ValueError"], done.stderr


def test_a_future_of_the_scheduler_is_a_standard_future():
    scheduler = Scheduler()
    future = scheduler.submit(square, 2)
    assert isinstance(future, concurrent.futures.Future)
    assert isinstance(foveal.scheduler.Future, type)
    scheduler.run()
    assert list(concurrent.futures.as_completed([future])) == [future]
