"""foveal.IndexedHeap against a sorted list; its arrays, its refusals; threads, forks, the end of the interpreter."""

import copy
import doctest
import gc
import math
import os
import pickle
import queue
import subprocess
import sys
import threading
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import foveal
from foveal import Empty, IndexedHeap

PRIORITIES = st.one_of(st.integers(-3, 3).map(float), st.floats(allow_nan=False), st.just(-0.0))


class SortedList:
    """What an indexed heap is: (id, priority) pairs in order, found by looking at all of them."""

    def __init__(self, *, max):
        self.sign = -1.0 if max else 1.0
        self.of = {}

    def ordered(self):
        return sorted(self.of.items(), key=lambda entry: (self.sign * entry[1], entry[0]))

    def pop(self):
        entry = self.ordered()[0]
        del self.of[entry[0]]
        return entry


class AgainstModel(RuleBasedStateMachine):
    capacity = 70  # two levels above the leaves
    max = False

    def __init__(self):
        super().__init__()
        self.heap = IndexedHeap(self.capacity, max=self.max)
        self.model = SortedList(max=self.max)

    ids = st.integers(0, capacity - 1)
    batches = st.lists(st.tuples(ids, PRIORITIES), max_size=20)

    @rule(id=ids, priority=PRIORITIES)
    def push(self, id, priority):
        if id in self.model.of:
            with pytest.raises(ValueError, match=f"push: id {id} is present"):
                self.heap.push(id, priority)
        else:
            self.heap.push(id, priority)
            self.model.of[id] = priority + 0.0

    @rule(id=ids, priority=PRIORITIES)
    def update(self, id, priority):
        if id in self.model.of:
            self.heap.update(id=id, priority=priority)
            self.model.of[id] = priority + 0.0
        else:
            with pytest.raises(KeyError, match=f"update: id {id} is absent"):
                self.heap.update(id, priority)

    @rule(id=ids, priority=PRIORITIES)
    def upsert(self, id, priority):
        assert self.heap.upsert(id, priority) is (id in self.model.of)
        self.model.of[id] = priority + 0.0

    @rule(id=ids)
    def remove(self, id):
        if id in self.model.of:
            assert self.heap.remove(id) == self.model.of.pop(id)
        else:
            with pytest.raises(KeyError, match=f"remove: id {id} is absent"):
                self.heap.remove(id)

    @rule(id=ids)
    def discard(self, id):
        assert self.heap.discard(id) is (self.model.of.pop(id, None) is not None)

    @rule(id=ids)
    def look(self, id):
        assert (id in self.heap) is (id in self.model.of)
        if id in self.model.of:
            assert self.heap.priority(id) == self.model.of[id]
        else:
            with pytest.raises(KeyError, match=f"priority: id {id} is absent"):
                self.heap.priority(id)

    @precondition(lambda self: self.model.of)
    @rule()
    def pop(self):
        assert self.heap.pop() == self.model.pop()

    @precondition(lambda self: not self.model.of)
    @rule()
    def nothing_to_pop(self):
        for take in (self.heap.pop, self.heap.peek):
            with pytest.raises(Empty, match="the heap is empty"):
                take()

    @rule(k=st.integers(0, 12))
    def pop_many(self, k):
        expected = [self.model.pop() for _ in range(min(k, len(self.model.of)))]
        ids, priorities = self.heap.pop_many(k)
        assert (ids.dtype, priorities.dtype) == (np.int64, np.float64)
        assert list(zip(ids.tolist(), priorities.tolist(), strict=True)) == expected

    @rule(k=st.integers(0, 12))
    def pop_many_relaxed(self, k):
        before = dict(self.model.of)
        ids, priorities = self.heap.pop_many(k, relaxed=True)
        assert len(set(ids.tolist())) == len(ids) == min(k, len(before))
        for id, priority in zip(ids.tolist(), priorities.tolist(), strict=True):
            assert self.model.of.pop(id) == priority

    @rule(batch=batches, missing=st.sampled_from(["raise", "insert", "ignore"]))
    def update_many(self, batch, missing):
        ids, priorities = [id for id, _ in batch], [priority for _, priority in batch]
        absent = [i for i, id in enumerate(ids) if id not in self.model.of]
        if missing == "raise" and absent:
            with pytest.raises(
                KeyError, match=rf"update_many: ids\[{absent[0]}\] is {ids[absent[0]]}, which is absent"
            ):
                self.heap.update_many(ids, priorities)
            return
        self.heap.update_many(ids, priorities, missing=missing)
        writes = {id: priority + 0.0 for id, priority in batch}  # of duplicates the last
        self.model.of.update({id: p for id, p in writes.items() if missing == "insert" or id in self.model.of})

    @rule(batch=batches)
    def push_many(self, batch):
        ids, priorities = [id for id, _ in batch], [priority for _, priority in batch]
        present = [i for i, id in enumerate(ids) if id in self.model.of]
        if present:
            with pytest.raises(
                ValueError, match=rf"push_many: ids\[{present[0]}\] is {ids[present[0]]}, which is pres"
            ):
                self.heap.push_many(ids, priorities)
            return
        self.heap.push_many(ids, priorities)
        self.model.of.update({id: priority + 0.0 for id, priority in batch})

    @rule(
        how=st.sampled_from(
            [copy.copy, copy.deepcopy, lambda heap: heap.copy(), lambda h: pickle.loads(pickle.dumps(h))]
        )
    )
    def go_on_with_a_copy(self, how):
        other = how(self.heap)
        self.heap.clear()
        assert len(self.heap) == 0
        self.heap = other

    @invariant()
    def same(self):
        assert len(self.heap) == len(self.model.of)
        assert sorted(self.heap) == sorted(self.model.of)
        assert list(self.heap.iter_sorted()) == self.model.ordered()
        if self.model.of:
            assert self.heap.peek() == self.model.ordered()[0]
            assert not any(math.copysign(1, self.heap.priority(id)) < 0 for id, p in self.model.of.items() if p == 0)


class AgainstModelMax(AgainstModel):
    max = True


TestAgainstModel = AgainstModel.TestCase
TestAgainstModelMax = AgainstModelMax.TestCase
TestAgainstModel.settings = TestAgainstModelMax.settings = settings(max_examples=150, stateful_step_count=40)


# ---- arrays ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 50),
    st.sampled_from(["int32", "int64"]),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([slice(None), slice(None, None, 2), slice(None, None, -1), slice(7, None, -3)]),
)
@settings(max_examples=60)
def test_arrays_of_any_stride_and_width(seed, id_dtype, dtype, where):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(200).astype(id_dtype)[where]
    priorities = rng.standard_normal(200).astype(dtype)[where]
    expected = {int(id): float(p) for id, p in zip(ids, priorities, strict=True)}
    pushed, built, updated = IndexedHeap(200), IndexedHeap.from_arrays(ids, priorities, 200), IndexedHeap(200)
    pushed.push_many(ids, priorities)
    updated.push_many(ids, np.zeros(len(ids)))
    updated.update_many(ids, priorities)
    for heap in (pushed, built, updated):
        assert {id: heap.priority(id) for id in heap} == expected


def test_strides_of_a_fraction_of_an_element_and_broadcasts():
    records = np.zeros(300, dtype=[("kind", "i1"), ("id", "i4"), ("priority", "f8")])  # packed: nothing is aligned
    records["id"] = np.arange(300)[::-1]
    records["priority"] = np.arange(300) / 7
    heap = IndexedHeap(300)
    heap.push_many(records["id"], records["priority"])
    assert heap.pop() == (299, 0.0)
    heap.update_many(np.arange(299), np.broadcast_to(np.float32(2.5), 299))
    assert set(heap.pop_many(1000)[1].tolist()) == {2.5}


@pytest.mark.parametrize("id_dtype", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tensors(id_dtype, dtype):
    torch = pytest.importorskip("torch")
    ids = torch.arange(40, dtype=getattr(torch, id_dtype))[::2]
    priorities = torch.linspace(1, -1, 40, dtype=getattr(torch, dtype))[::2]
    heap = IndexedHeap.from_arrays(ids, priorities)
    assert heap.capacity == 39
    heap.update_many(ids[:2], -priorities[:2])
    assert heap.pop_many(3)[0].tolist() == [0, 38, 2]
    with pytest.raises(TypeError, match=r"update_many: priorities cannot be read: .*gradient"):
        heap.update_many(ids[2:4], priorities[2:4].requires_grad_(), missing="ignore")
    with pytest.raises(TypeError, match="push_many: priorities cannot be read: "):
        heap.push_many(ids[:1], priorities[:1].detach().to(torch.bfloat16))


def test_a_tensor_that_torch_has_not_negated_yet():
    torch = pytest.importorskip("torch")
    lazy = torch.conj(torch.tensor([1 + 2j, 3 + 4j])).imag
    assert lazy.is_neg()
    heap = IndexedHeap(2)
    heap.push_many([0, 1], lazy)
    assert list(heap.iter_sorted()) == [(1, -4.0), (0, -2.0)]


def test_ctrl_c_while_arrays_are_read():
    class Slow:
        def __array__(self, *args, **kwargs):
            raise KeyboardInterrupt

        __dlpack__ = __dlpack_device__ = __array__

    heap = IndexedHeap(2)
    for priorities in (Slow(), [Slow()]):
        with pytest.raises(KeyboardInterrupt):
            heap.push_many([0], priorities)
    assert len(heap) == 0


def test_from_arrays():
    heap = IndexedHeap.from_arrays([3, 1, 3], [1.0, 2.0, 3.0])
    assert (heap.capacity, len(heap), heap.peek(), heap.max) == (4, 2, (1, 2.0), False)
    assert IndexedHeap.from_arrays([3, 1], [1.0, 2.0], 10, max=True).peek() == (1, 2.0)
    assert len(IndexedHeap.from_arrays([], [], capacity=5)) == 0
    with pytest.raises(ValueError, match="from_arrays: ids is empty, expected ids or a capacity"):
        IndexedHeap.from_arrays([], [])
    with pytest.raises(IndexError, match=r"from_arrays: ids\[1\] is 9, expected 0 to 4"):
        IndexedHeap.from_arrays([1, 9], [1.0, 2.0], 5)


def test_memory():
    assert sys.getsizeof(IndexedHeap(1_000_000)) <= 24 * 1_000_000


def test_repr_and_pickle_keep_the_order():
    heap = IndexedHeap.from_arrays([3, 1], [1.0, 2.0], 10, max=True)
    assert repr(heap) == "<foveal.IndexedHeap, max: 2 of 10 ids, first (1, 2.0)>"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(heap, protocol))
        assert (again.max, again.capacity, list(again.iter_sorted())) == (True, 10, [(1, 2.0), (3, 1.0)])
    assert repr(IndexedHeap(5)) == "<foveal.IndexedHeap: 0 of 5 ids>"


def test_subclasses():
    class Named(IndexedHeap):
        def __new__(cls, name):
            self = super().__new__(cls, 10)
            self.name = name
            return self

    heap = Named("a")
    heap.push(1, 2.0)
    for other in (heap.copy(), copy.copy(heap)):
        assert (other.name, other.capacity, type(other), other.pop()) == ("a", 10, Named, (1, 2.0))


class Labelled(IndexedHeap):
    pass


def test_attributes_of_subclasses_are_copied_too():
    heap = Labelled(10, max=True)
    heap.labels = ["a"]
    heap.push(1, 2.0)
    for make in (IndexedHeap.copy, copy.copy, copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))):
        other = make(heap)
        assert (type(other), other.labels, other.max, other.pop()) == (Labelled, ["a"], True, (1, 2.0))
    assert copy.copy(heap).labels is heap.labels
    assert copy.deepcopy(heap).labels is not heap.labels


@pytest.mark.parametrize("attributes", [5, {"a": 1}])
def test_a_state_that_does_not_fit_changes_nothing(attributes):
    heap = IndexedHeap.from_arrays([1], [2.0], 10)
    with pytest.raises(TypeError, match=r"IndexedHeap\.__setstate__: attributes are .*, expected a dict, or None"):
        heap.__setstate__((np.array([5]), np.array([9.0]), attributes))
    with pytest.raises(ValueError, match=r"priorities\[0\] is nan"):
        heap.__setstate__((np.array([5]), np.array([np.nan]), None))
    assert list(heap.iter_sorted()) == [(1, 2.0)]


def test_a_cycle_through_an_iterator_is_collected():
    heap = Labelled(10)
    heap.iterator = iter(heap)
    gone = weakref.ref(heap)
    del heap
    gc.collect()
    assert gone() is None


def test_relaxed_pop_stays_near_the_front():
    n = 1 << 14
    heap = IndexedHeap.from_arrays(np.arange(n), np.arange(n, dtype=float))  # priorities that rise with the id
    ids, _ = heap.pop_many(n // 8, relaxed=True)
    passed_over = ids - np.arange(len(ids))  # of 0 .. id-1, at most i were popped before
    assert passed_over.mean() < 256


def test_empty_is_what_both_queues_and_mappings_raise():
    assert issubclass(Empty, queue.Empty)
    assert issubclass(Empty, KeyError)
    assert pickle.loads(pickle.dumps(Empty("x"))).args == ("x",)


def test_docstrings():
    (test,) = doctest.DocTestFinder(recurse=False).find(
        IndexedHeap, "IndexedHeap", module=False, globs={"foveal": foveal}
    )
    result = doctest.DocTestRunner().run(test)
    assert result.attempted > 5
    assert result.failed == 0


# ---- refusals --------------------------------------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda h: IndexedHeap(0), ValueError, "IndexedHeap: capacity is 0, expected 1 to 268435456"),
        (lambda h: IndexedHeap(-1), ValueError, "IndexedHeap: capacity is -1"),
        (lambda h: IndexedHeap(2**28 + 1), ValueError, "IndexedHeap: capacity is 268435457"),
        (lambda h: IndexedHeap(2**100), ValueError, f"IndexedHeap: capacity is {2**100}, expected 1 to 268435456"),
        (lambda h: h.push(0, 10**400), OverflowError, "IndexedHeap.push: priority is beyond float64"),
        (lambda h: h.push_many([[0], [1, 2]], [1.0, 2.0]), ValueError, "IndexedHeap.push_many: ids is no array"),
        (lambda h: IndexedHeap(1.5), TypeError, "IndexedHeap: capacity has type float, expected an integer"),
        (lambda h: IndexedHeap(), TypeError, "IndexedHeap: capacity is missing"),
        (lambda h: IndexedHeap(3, True), TypeError, "IndexedHeap: 2 positional arguments given, expected at most 1"),
        (lambda h: IndexedHeap(3, max=1), TypeError, "IndexedHeap: max is 1, expected a bool"),
        (lambda h: IndexedHeap(3, min=True), TypeError, "IndexedHeap: there is no parameter 'min'"),
        (lambda h: h.push(10, 1.0), IndexError, "IndexedHeap.push: id is 10, expected 0 to 9"),
        (lambda h: h.push(-1, 1.0), IndexError, "IndexedHeap.push: id is -1, expected 0 to 9"),
        (lambda h: h.upsert(10**30, 1.0), IndexError, f"IndexedHeap.upsert: id is {10**30}, expected 0 to 9"),
        (lambda h: h.push(1.0, 1.0), TypeError, "IndexedHeap.push: id has type float, expected an integer"),
        (lambda h: h.push(1, "2"), TypeError, "IndexedHeap.push: priority has type str, expected a real number"),
        (lambda h: h.push(1, NAN), ValueError, "IndexedHeap.push: priority is nan, expected a number"),
        (lambda h: h.update(3, NAN), ValueError, "IndexedHeap.update: priority is nan, expected a number"),
        (lambda h: h.push(1), TypeError, "IndexedHeap.push: priority is missing"),
        (lambda h: h.push(1, 2, priority=3), TypeError, "IndexedHeap.push: priority is given twice"),
        (lambda h: h.pop(1), TypeError, "IndexedHeap.pop: arguments given, expected none"),
        (lambda h: h.pop_many(-1), ValueError, "IndexedHeap.pop_many: k is -1, expected at least 0"),
        (lambda h: h.pop_many(2.0), TypeError, "IndexedHeap.pop_many: k has type float, expected an integer"),
        (lambda h: h.pop_many(1, relaxed=1), TypeError, "IndexedHeap.pop_many: relaxed is 1, expected a bool"),
        (
            lambda h: h.update_many([3], [1.0], missing="skip"),
            ValueError,
            "IndexedHeap.update_many: missing is 'skip', expected 'raise', 'insert' or 'ignore'",
        ),
        (lambda h: "a" in h, TypeError, "IndexedHeap.__contains__: id has type str, expected an integer"),
        (lambda h: h.__setstate__(3), TypeError, "IndexedHeap.__setstate__: state is 3, expected (ids, "),
    ],
)
def test_refused(call, error, text):
    heap = IndexedHeap(10)
    heap.push(3, 1.0)
    with pytest.raises(error) as raised:
        call(heap)
    assert text in str(raised.value)
    assert list(heap.iter_sorted()) == [(3, 1.0)]


@pytest.mark.parametrize("method", ["push_many", "update_many", "__setstate__"])
@pytest.mark.parametrize(
    ("ids", "priorities", "error", "text"),
    [
        ([1, 2], [1.0], ValueError, "priorities has shape (1,), expected (2,)"),
        ([[1, 2]], [1.0], ValueError, "ids has shape (1, 2), expected (n,)"),
        (np.array(3), np.ones(1), ValueError, "ids has shape (), expected (n,)"),
        ([1], [[1.0]], ValueError, "priorities has shape (1, 1), expected (1,)"),
        ([1.0], [1.0], TypeError, "ids has dtype float64, expected int32 or int64"),
        (np.array([1], np.uint64), [1.0], TypeError, "ids has dtype uint64, expected int32 or int64"),
        (np.array([True]), [1.0], TypeError, "ids has dtype bool, expected int32 or int64"),
        (np.array([1], ">i4"), [1.0], ValueError, "ids has dtype >i4, expected the native byte order"),
        ([1], ["a"], TypeError, "priorities has dtype <U1, expected float32 or float64"),
        ([1], np.ones(1, np.float16), TypeError, "priorities has dtype float16, expected float32 or float64"),
        ([1], np.ones(1, complex), TypeError, "priorities has dtype complex128, expected float32 or float64"),
        ([1], np.ones(1, int), TypeError, "priorities has dtype int64, expected float32 or float64"),
        ([1], [10**400], TypeError, "priorities has dtype object, expected float32 or float64"),
        (np.ma.array([1]), [1.0], TypeError, "ids is a masked array, expected a plain numpy.ndarray"),
        ("12", [1.0], TypeError, "ids has type str, expected an array, a tensor or a list"),
        ([1, 10], [1.0, 2.0], IndexError, "ids[1] is 10, expected 0 to 9"),
        ([1, -1], [1.0, 2.0], IndexError, "ids[1] is -1, expected 0 to 9"),
        ([1, 2, 3], [1.0, 2.0, NAN], ValueError, "priorities[2] is nan, expected a number"),
        ([1, 2, 3], np.array([1.0, NAN, NAN], np.float32), ValueError, "priorities[1] is nan, expected a number"),
    ],
)
def test_a_bad_batch_changes_nothing(method, ids, priorities, error, text):
    heap = IndexedHeap.from_arrays([1, 2, 3], [4.0, 5.0, 6.0], 10)
    if method == "push_many":
        heap.clear()
    before = list(heap.iter_sorted())
    with pytest.raises(error) as raised:
        heap.__setstate__((ids, priorities, None)) if method == "__setstate__" else getattr(heap, method)(
            ids, priorities
        )
    assert f"IndexedHeap.{method}: {text}" in str(raised.value)
    assert list(heap.iter_sorted()) == before


# ---- threads, forks, the end -----------------------------------------------------------------------------------------


def run_all(*targets):
    """Run them in threads at once; the first exception of one is raised here."""
    failures = []

    def guarded(target):
        try:
            target()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("relaxed", [False, True])
def test_threads_neither_lose_nor_double_an_element(relaxed):
    n, producers = 30_000, 2
    heap = IndexedHeap(n)
    taken = []
    left = [0, 1]
    done = threading.Event()

    def produce(first):
        rng = np.random.default_rng(first)
        for ids in np.array_split(np.arange(first, n, producers), 25):
            heap.push_many(ids, rng.random(len(ids)))
            heap.update_many(ids, rng.random(len(ids)), missing="ignore")
            for id in ids[:20].tolist():
                try:
                    heap.update(id, rng.random())
                except KeyError:
                    assert id not in heap  # nobody pushes it again
        left.remove(first)
        if not left:
            done.set()

    def consume_batches():
        while True:
            last = done.is_set()
            ids = heap.pop_many(300, relaxed=relaxed)[0].tolist()
            taken.extend(ids)
            if last and not ids:
                return

    def consume_one_by_one():
        while True:
            last = done.is_set()
            try:
                taken.append(heap.pop()[0])
            except Empty:
                if last:
                    return

    run_all(lambda: produce(0), lambda: produce(1), *2 * [consume_batches], *2 * [consume_one_by_one])
    assert sorted(taken) == list(range(n))
    assert len(heap) == 0
    assert not list(heap)


def test_a_batch_that_pops_sees_what_another_is_pushing():
    n = 200_000
    ids, priorities = np.arange(n), np.zeros(n)
    priorities[0] = -1.0  # from its push on the first
    for _ in range(50):
        heap = IndexedHeap(n)
        found = []

        def pop(heap=heap, found=found):
            while True:
                try:
                    heap.peek()
                except Empty:
                    continue
                found.append((heap.pop_many(1)[0].tolist(), len(heap)))
                return

        run_all(pop, lambda heap=heap: heap.push_many(ids, priorities))
        ((popped, seen),) = found
        assert popped == [0]
        assert len(heap) == n - 1
        if seen < n - 1:  # it came between
            return
    pytest.fail("no thread ever came between")


def test_a_batch_skips_what_another_thread_removes_and_says_so():
    n = 20_000
    ids = np.arange(n)
    for _ in range(500):
        heap = IndexedHeap.from_arrays(ids, np.full(n, 1.0))
        text = ""

        def update(heap=heap):
            nonlocal text
            try:
                heap.update_many(ids, np.full(n, 2.0))
            except KeyError as error:
                text = error.args[0]

        def remove(heap=heap):
            for id in range(n - 1, n // 2, -1):
                heap.remove(id)

        run_all(update, remove)
        if "absent" not in text:  # it got past the check
            assert set(heap.pop_many(n)[1].tolist()) == {2.0}
        if "removed meanwhile" in text:
            assert "update_many: removed meanwhile by another thread: ids " in text
            assert "the others were written" in text
            return
    pytest.fail("no thread ever came between")


PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
import foveal

n = 20_000
heap = foveal.IndexedHeap.from_arrays(np.arange(n), np.random.default_rng(0).random(n))

def work(seed):
    rng = np.random.default_rng(seed)
    while True:
        ids, priorities = heap.pop_many(500)
        heap.update_many(ids, rng.random(len(ids)), missing="insert")
        heap.update_many(rng.integers(0, n, 2000), rng.random(2000), missing="ignore")
        for id in ids[:20].tolist():
            heap.upsert(id, rng.random())

for seed in range(3):
    threading.Thread(target=work, args=(seed,), daemon=True).start()
time.sleep(0.05)
"""

FORK = """
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        taken = []
        while True:
            try:
                taken.append(heap.pop()[0])
            except foveal.Empty:
                break
        heap.push_many(np.arange(n), np.arange(n) / n)
        heap.update_many(np.arange(n), -np.arange(n) / n)
        right = n - 1500 <= len(set(taken)) == len(taken) and heap.pop_many(3)[0].tolist() == [n - 1, n - 2, n - 3]
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


def run_program(program):
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork_while_threads_are_in_the_middle_of_something():
    run_program(FORK)


@pytest.mark.parametrize("time", range(3))
def test_the_interpreter_ends_while_threads_are_in_the_middle_of_something(time):
    run_program("")
