"""foveal.attention on tensors in a process: threads, forks, imports, signals."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch_cases import FALLBACK, qkv

import foveal


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


COUNT_THREADS = """
    import os, torch, foveal
    q = torch.randn(4, 8, 256, 64)
    def started(count):
        torch.set_num_threads(count)  # starts threads of its own
        before = len(os.listdir("/proc/self/task"))
        foveal.attention(q, q, q)
        return len(os.listdir("/proc/self/task")) - before
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_threads_follow_torch_after_our_own_settings():
    assert run_python(COUNT_THREADS + "    print(started(1), started(3))") == ["0", "2"]
    assert run_python(COUNT_THREADS + "    print(started(3))", FOVEAL_NUM_THREADS="1") == ["0"]
    assert run_python(COUNT_THREADS + "    foveal.set_num_threads(1); print(started(3))") == ["0"]
    assert run_python(COUNT_THREADS + "    foveal.set_num_threads(2); print(started(1))") == ["1"]


def test_a_daemon_thread_may_be_computing_when_the_program_ends():
    code = """
        import threading, time, torch, foveal
        q = torch.ones(1, 16, 20000, 64)
        threading.Thread(target=lambda: foveal.attention(q, q, q), daemon=True).start()
        time.sleep(0.5)
        print("done")
    """
    assert run_python(code) == ["done"]


def test_many_threads_call_at_once():
    inputs = [qkv(seqlen_q=64, seqlen_kv=64, seed=seed) for seed in range(8)]
    expected = [foveal.attention(*x, causal=True) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            for x, y in zip(pool.map(lambda x: foveal.attention(*x, causal=True), inputs), expected, strict=True):
                assert torch.equal(x, y)


def test_in_a_data_loader_worker():
    code = """
        import torch, foveal
        q = torch.randn(4, 8, 256, 64)
        expected = foveal.attention(q, q, q)  # a parallel region before the fork

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, i):
                return foveal.attention(q[i], q[i], q[i])

        rows = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork")
        assert torch.equal(torch.cat(list(rows)), expected)
        print("done")
    """
    assert run_python(code) == ["done"]


ORDERS = ["import torch, foveal", "import foveal, torch", "import numpy, foveal, foveal.torch, torch"]


@pytest.mark.parametrize("imports", ORDERS)
def test_import_order(imports):
    code = f"""
        {imports}
        torch.manual_seed(0)
        q = torch.randn(2, 8, 300, 64)
        torch.mm(q[0, 0], q[0, 0].T)
        out = foveal.attention(q, q, q, causal=True)
        torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))
        with open("/proc/self/maps") as maps:
            print(len({{line.split()[-1] for line in maps if "libgomp" in line}}))
    """
    assert run_python(code) == ["1"]


def test_foveal_alone_does_not_import_torch():
    assert run_python("import sys, foveal; print('torch' in sys.modules)") == ["False"]


def test_compile_may_come_before_the_first_call():
    code = """
        import torch, foveal
        q = torch.randn(1, 2, 3, 8)
        f = torch.compile(lambda q: foveal.attention(q, q, q), fullgraph=True, backend="eager")
        print(torch.equal(f(q), foveal.attention(q, q, q)))
    """
    assert run_python(code) == ["True"]


INTERRUPT = """
    import signal, sys, time, torch, foveal
    from concurrent.futures import ThreadPoolExecutor

    class Alarm(Exception):
        pass

    def raise_alarm(*_):
        raise Alarm

    signal.signal(signal.SIGALRM, raise_alarm)
    q = torch.randn(1, 16, 16384, 64)
    foveal.attention(q[:, :, :8], q[:, :, :8], q[:, :, :8])
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    start = time.perf_counter()
    try:
        {call}
        print("finished")
    except Alarm:
        print("interrupted", time.perf_counter() - start < 2.0)
    print(foveal.attention(q[:, :, :8], q[:, :, :8], q[:, :, :8]).shape[2])
"""


def test_a_signal_handler_may_end_a_long_call():
    assert run_python(INTERRUPT.format(call="foveal.attention(q, q, q)")) == ["interrupted", "True", "8"]


@pytest.mark.skipif(FALLBACK, reason="about exceptions from C++")
def test_what_a_signal_handler_raised_follows_the_error_of_a_bare_op():
    call = """
        try:
            torch.ops.foveal.attention_plain(q, q, q)
        except RuntimeError as error:
            assert str(error) == "attention: interrupted"
    """
    assert run_python(INTERRUPT.format(call=textwrap.indent(textwrap.dedent(call), "        ").strip())) == [
        "interrupted",
        "True",
        "8",
    ]


@pytest.mark.skipif(FALLBACK, reason="would run itself")
def test_fallback_passes_the_same_tests():
    here = Path(__file__).parent
    chosen = "not (inductor or dynamo or export)"  # which see the schema and the fake kernel alone
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen),
            *(str(here / name) for name in ("test_torch.py", "test_torch_ops.py")),
        ],
        env={**os.environ, "FOVEAL_TEST_TORCH_FALLBACK": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
