"""Equal bits whatever else runs or stands in the batch, and calls from threads, forked children and under Ctrl-C."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from attention_cases import DTYPES, random_array

import foveal

# Each a work plan of its own: many rows, one row with split keys, a GQA group in few rows, short sequences, odd sizes.
SHAPES = {
    "many rows": (2, 4, 4, 300, 300, 64, 64),
    "one row": (3, 4, 4, 1, 3000, 64, 64),
    "group": (2, 8, 2, 1, 2100, 64, 64),
    "few rows": (2, 6, 3, 3, 1500, 32, 48),
    "short": (5, 4, 2, 30, 30, 32, 32),
    "odd": (3, 3, 1, 129, 257, 17, 9),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 3), "softcap": 3.0},
}


def arrays(shape: tuple[int, ...], dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, num_heads, num_kv_heads, seqlen_q, seqlen_kv, head_dim, value_dim = shape
    rng = np.random.default_rng(4)
    return (
        random_array(rng, (batch, num_heads, seqlen_q, head_dim), np.dtype(dtype)),
        random_array(rng, (batch, num_kv_heads, seqlen_kv, head_dim), np.dtype(dtype)),
        random_array(rng, (batch, num_kv_heads, seqlen_kv, value_dim), np.dtype(dtype)),
    )


@pytest.fixture
def restore_num_threads() -> Iterator[None]:
    yield
    foveal.set_num_threads(None)


def assert_same_bits(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        if a is not None:
            assert a.tobytes() == e.tobytes()


# ---- equal bits -----------------------------------------------------------------------------------------------------

each_plan = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_plan
@each_option
@each_dtype
def test_any_number_of_threads(
    isa: str, shape: Any, options: dict[str, Any], dtype: Any, restore_num_threads: None
) -> None:
    q, k, v = arrays(shape, dtype)
    foveal.set_num_threads(1)
    expected = foveal.attention(q, k, v, return_lse=True, **options)
    for num_threads in (2, 3, 8, 2):
        foveal.set_num_threads(num_threads)
        assert_same_bits(foveal.attention(q, k, v, return_lse=True, **options), expected)


@each_plan
@each_option
@each_dtype
def test_batch_whole_or_one_by_one(isa: str, shape: Any, options: dict[str, Any], dtype: Any) -> None:
    q, k, v = arrays(shape, dtype)
    whole = foveal.attention(q, k, v, return_lse=True, **options)
    group = q.shape[1] // k.shape[1]
    for b in range(len(q)):
        alone = foveal.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], return_lse=True, **options)
        assert_same_bits([alone.out[0], alone.lse[0]], [whole.out[b], whole.lse[b]])
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            alone = foveal.attention(q[b, heads], k[b, h : h + 1], v[b, h : h + 1], return_lse=True, **options)
            assert_same_bits([alone.out, alone.lse], [whole.out[b, heads], whole.lse[b, heads]])


@each_plan
@each_option
@each_dtype
def test_padded_or_alone(isa: str, shape: Any, options: dict[str, Any], dtype: Any) -> None:
    q, k, v = arrays(shape, dtype)
    batch, seqlen_q, seqlen_kv = len(q), q.shape[2], k.shape[2]
    rng = np.random.default_rng(5)
    q_lens = rng.integers(1, seqlen_q + 1, batch)
    kv_lens = rng.integers(1, seqlen_kv + 1, batch)
    padded = foveal.attention(q, k, v, q_lens=q_lens, kv_lens=kv_lens, return_lse=True, **options)
    for b, (m, n) in enumerate(zip(q_lens, kv_lens, strict=True)):
        one = slice(b, b + 1)
        alone = foveal.attention(q[one, :, :m], k[one, :, :n], v[one, :, :n], return_lse=True, **options)
        assert_same_bits([alone.out[0], alone.lse[0]], [padded.out[b, :, :m], padded.lse[b, :, :m]])


@each_plan
@each_dtype
def test_run_to_run_wherever_the_arrays_lie(isa: str, shape: Any, dtype: Any) -> None:
    q, k, v = arrays(shape, dtype)
    expected = foveal.attention(q, k, v, return_lse=True, causal=True)
    for shift in range(4):  # other addresses relative to a cache line, other strides
        moved = []
        for array in (q, k, v):
            room = np.empty((*array.shape[:-1], array.shape[-1] + 8), array.dtype)[..., shift : shift + array.shape[-1]]
            room[...] = array
            moved.append(room)
        assert_same_bits(foveal.attention(*moved, return_lse=True, causal=True), expected)


# ---- many callers ---------------------------------------------------------------------------------------------------


def test_many_python_threads_at_once(isa: str) -> None:
    problems = [arrays(shape) for shape in SHAPES.values()]
    expected = [foveal.attention(*problem, causal=True) for problem in problems]
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(start: int) -> None:
        try:
            barrier.wait()
            for turn in range(12):
                index = (start + turn) % len(problems)
                assert_same_bits([foveal.attention(*problems[index], causal=True)], [expected[index]])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_other_threads_run_during_a_call() -> None:
    q, k, v = arrays((1, 8, 8, 2500, 2500, 64, 64))
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks[0] += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    before = ticks[0]
    for _ in range(3):
        foveal.attention(q, k, v)
    during = ticks[0] - before
    stop.set()
    ticker.join()
    assert during > 10


def test_lengths_that_another_thread_overwrites() -> None:
    # The kernel must compute with the lengths that were checked, not with what the array holds by then.
    q, k, v = arrays((2, 2, 2, 600, 600, 64, 64))
    expected = foveal.attention(q, k, v, kv_lens=[600, 300])
    shared = np.array([600, 300])
    stop = threading.Event()

    def overwrite() -> None:
        while not stop.is_set():
            shared[1] = 300
            stop.wait(0.0005)
            shared[1] = 10**12
            stop.wait(0.0005)

    writer = threading.Thread(target=overwrite)
    writer.start()
    outcomes = set()
    end = time.monotonic() + 30  # both outcomes come soon where both threads get to run
    calls = 0
    try:
        while calls < 200 or (len(outcomes) < 2 and time.monotonic() < end):
            calls += 1
            try:
                assert_same_bits([foveal.attention(q, k, v, kv_lens=shared)], [expected])
                outcomes.add("computed")
            except ValueError:
                outcomes.add("refused")
    finally:
        stop.set()
        writer.join()
    assert outcomes == {"computed", "refused"}


def test_a_daemon_thread_may_be_computing_when_the_program_ends() -> None:
    done = run_python(
        """
        import threading, time
        import numpy as np
        import foveal

        x = np.ones((1, 16, 3000, 64), np.float32)

        def compute():
            while True:
                foveal.attention(x, x, x)

        for _ in range(2):
            threading.Thread(target=compute, daemon=True).start()
        time.sleep(0.5)
        print("done")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# ---- other processes, and Ctrl-C ------------------------------------------------------------------------------------


# A process that a shell started in the background inherits that SIGINT is ignored, and so would its children.
HONOUR_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HONOUR_CTRL_C + textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_computes() -> None:
    done = run_python(
        """
        import os, signal, sys, warnings
        import numpy as np
        import foveal

        warnings.simplefilter("ignore")
        foveal.set_num_threads(2)
        x = np.random.default_rng(0).standard_normal((1, 8, 600, 64), dtype=np.float32)
        expected = foveal.attention(x, x, x)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a hanging child must not outlive the test
            same = all((foveal.attention(x, x, x) == expected).all() for _ in range(3))
            grandchild = os.fork()
            if grandchild == 0:
                os._exit(0 if (foveal.attention(x, x, x) == expected).all() else 1)
            os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 1)
        _, status = os.waitpid(child, 0)
        assert (foveal.attention(x, x, x) == expected).all()
        sys.exit(0 if status == 0 else f"the child ended with {status}")
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("child_does", "child_gets"),
    [("raise KeyboardInterrupt", "KeyboardInterrupt"), ("return", "RuntimeError")],
    ids=["raises", "returns"],
)
def test_a_signal_handler_that_forks(child_does: str, child_gets: str) -> None:
    # The child is in the middle of a parallel region, without the threads that it should wait for at its end.
    done = run_python(
        f"""
        import os, signal, sys, warnings
        import numpy as np
        import foveal

        warnings.simplefilter("ignore")
        foveal.set_num_threads(2)
        x = np.random.default_rng(0).standard_normal((1, 16, 20000, 64), dtype=np.float32)
        small = x[:, :, :300]
        expected = foveal.attention(small, small, small)
        child = None

        def fork(number, frame):
            global child
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a hanging child must not outlive the test
                {child_does}
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, fork)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            foveal.attention(x, x, x)
        except BaseException as error:
            caught = error
        if child == 0:
            same = (foveal.attention(small, small, small) == expected).all()
            right = type(caught) is {child_gets} and (isinstance(caught, KeyboardInterrupt) or "forked" in str(caught))
            os._exit(0 if same and right else 1)
        assert type(caught) is KeyboardInterrupt
        _, status = os.waitpid(child, 0)
        assert (foveal.attention(small, small, small) == expected).all()
        sys.exit(0 if status == 0 else f"the child ended with {{status}}")
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_multiprocessing_by_fork_computes() -> None:
    done = run_python(
        """
        import multiprocessing, warnings
        import numpy as np
        import foveal

        warnings.simplefilter("ignore")
        x = np.random.default_rng(0).standard_normal((1, 4, 500, 64), dtype=np.float32)

        def work(seed):
            return float(foveal.attention(x, x, x).sum())

        expected = work(0)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(work, range(6)).get(60) == [expected] * 6
        """
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_a_long_call() -> None:
    done = run_python(
        """
        import os, signal, threading, time
        import numpy as np
        import foveal

        x = np.random.default_rng(0).standard_normal((1, 16, 20000, 64), dtype=np.float32)
        small = x[:, :, :50]
        expected = foveal.attention(small, small, small)
        pressed = []

        def press():
            pressed.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

        threading.Timer(0.5, press).start()
        try:
            foveal.attention(x, x, x)
        except KeyboardInterrupt:
            print("interrupted", time.perf_counter() - pressed[0])
        else:
            print("finished")
        assert (foveal.attention(small, small, small) == expected).all()
        """
    )
    assert done.returncode == 0, done.stderr
    outcome, *seconds = done.stdout.split()
    assert outcome == "interrupted"
    assert float(seconds[0]) < 5  # one work item takes milliseconds; the rest is for a busy machine


def test_a_signal_handler_that_returns_does_not_end_the_call() -> None:
    done = run_python(
        """
        import os, signal, threading, time
        import numpy as np
        import foveal

        x = np.random.default_rng(0).standard_normal((1, 8, 5000, 64), dtype=np.float32)
        expected = foveal.attention(x, x, x)
        caught = []
        signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(time.perf_counter()))
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        out = foveal.attention(x, x, x)
        time.sleep(0.2)
        assert caught
        assert (out == expected).all()
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_call_off_the_main_thread_leaves_ctrl_c_to_the_main_thread() -> None:
    done = run_python(
        """
        import os, signal, threading, time
        import numpy as np
        import foveal

        x = np.random.default_rng(0).standard_normal((1, 8, 6000, 64), dtype=np.float32)
        results = []
        worker = threading.Thread(target=lambda: results.append(foveal.attention(x, x, x)))
        worker.start()
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            worker.join()
            print(len(results))
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
