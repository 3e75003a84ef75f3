"""Integers as priorities and weights: exact in float64, or refused, by every queue and method alike."""

import contextlib
import heapq
import re
from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from foveal import AsyncPriorityQueue, IndexedHeap, PriorityMap, PriorityQueue, Scheduler, SumTree

NOW = 1_700_000_000_000_000_001  # a time.time_ns()


class Index:
    """An integer that is no int."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __str__(self):
        return str(self.value)


def kinds():
    yield "int", NOW
    yield "negative", -NOW
    yield "just beyond", 2**53 + 1
    yield "beyond int64", 2**80 + 1
    yield "int64", np.int64(NOW)
    yield "uint64", np.uint64(2**64 - 1)
    yield "0-d array", np.array(NOW)
    yield "subclass of int", type("Int", (int,), {})(NOW)
    yield "__index__", Index(NOW)
    with contextlib.suppress(ImportError):
        import torch

        yield "tensor", torch.tensor(NOW)


def heap():
    return IndexedHeap.from_arrays([3], [1.0], 10)


def a_map():
    return PriorityMap({"a": 1.0})


def a_queue(make):
    made = make()
    made.put_nowait("a", 1.0, key="a")
    return made


def a_scheduler():
    made = Scheduler()
    made.submit(int, key="a")
    return made


def coroutine(call):
    """What awaits nothing, run to its end."""
    with pytest.raises(StopIteration):
        call.send(None)


SCALARS = {
    "IndexedHeap.push: priority": lambda n: heap().push(1, n),
    "IndexedHeap.update: priority": lambda n: heap().update(3, n),
    "IndexedHeap.upsert: priority": lambda n: heap().upsert(3, n),
    "PriorityMap: priority": lambda n: PriorityMap({"b": n}),
    "PriorityMap: priority of pairs": lambda n: PriorityMap([("b", n)]),
    "PriorityMap.push: priority": lambda n: a_map().push("b", n),
    "PriorityMap.__setitem__: priority": lambda n: a_map().__setitem__("a", n),
    "PriorityMap.__setitem__: priority in update": lambda n: a_map().update({"b": n}),
    "PriorityMap.update_priority: priority": lambda n: a_map().update_priority("a", n),
    "PriorityMap.adjust: delta": lambda n: a_map().adjust("a", n),
    "PriorityMap.pushpop: priority": lambda n: a_map().pushpop("b", n),
    "PriorityMap.setdefault: default": lambda n: a_map().setdefault("b", n),
    "PriorityQueue.put: priority": lambda n: a_queue(PriorityQueue).put("b", n),
    "PriorityQueue.update_priority: priority": lambda n: a_queue(PriorityQueue).update_priority("a", n),
    "AsyncPriorityQueue.put: priority": lambda n: a_queue(AsyncPriorityQueue).put_nowait("b", n),
    "AsyncPriorityQueue.put: priority awaited": lambda n: coroutine(a_queue(AsyncPriorityQueue).put("b", n)),
    "AsyncPriorityQueue.update_priority: priority": lambda n: a_queue(AsyncPriorityQueue).update_priority("a", n),
    "SumTree.__setitem__: weight": lambda n: SumTree(4).__setitem__(0, n),
    "Scheduler.submit: urgency": lambda n: Scheduler().submit(int, urgency=n),
    "Scheduler.submit: importance": lambda n: Scheduler().submit(int, importance=n),
    "Scheduler.add_stepper: urgency": lambda n: Scheduler().add_stepper(int, key="a", urgency=n),
    "Scheduler.update: urgency": lambda n: a_scheduler().update("a", urgency=n),
    "Scheduler.update: feedback": lambda n: a_scheduler().update("a", feedback=n),
}

BATCHES = {
    "IndexedHeap.push_many: priorities": lambda n: heap().push_many([1, 2], n),
    "IndexedHeap.update_many: priorities": lambda n: heap().update_many([3, 3], n),
    "IndexedHeap.update_many: priorities to insert": lambda n: heap().update_many([1, 2], n, missing="insert"),
    "IndexedHeap.from_arrays: priorities": lambda n: IndexedHeap.from_arrays([1, 2], n),
    "SumTree.update_many: weights": lambda n: SumTree(4).update_many([0, 1], n),
    "SumTree.update_scores: scores": lambda n: SumTree(4).update_scores([0, 1], n, temperature=1e300),
}


@pytest.mark.parametrize("where", SCALARS)
@pytest.mark.parametrize("kind", dict(kinds()))
def test_a_rounded_integer_is_refused(where, kind):
    number = dict(kinds())[kind]
    with pytest.raises(ValueError, match="that float64 can hold") as raised:
        SCALARS[where](number)
    name = " ".join(where.split()[:2])
    assert str(raised.value).startswith(f"{name} is {number!s}, expected a float, or an integer")
    assert "2**53" in str(raised.value)


@pytest.mark.parametrize("where", BATCHES)
@pytest.mark.parametrize("kind", dict(kinds()))
@pytest.mark.parametrize("beside", [0, 0.5, np.float32(0.5), True])
@pytest.mark.parametrize("made", [list, tuple])
def test_a_rounded_integer_in_a_batch_is_refused(where, kind, beside, made):
    number = dict(kinds())[kind]
    batch = made([beside, number])
    if np.asarray(batch).dtype == object:  # NumPy makes no number of it
        with pytest.raises(TypeError, match="has dtype object"):
            BATCHES[where](batch)
        return
    with pytest.raises(ValueError, match="that float64 can hold") as raised:
        BATCHES[where](batch)
    name = " ".join(where.split()[:2])
    assert re.match(rf"{re.escape(name)}\[1\] is (tensor\()?{int(number)}\)?, expected a float", str(raised.value))


@pytest.mark.parametrize("where", BATCHES)
def test_a_range_and_what_only_int64_and_uint64_hold(where):
    for batch, text in [
        (range(NOW, NOW + 2), f"[0] is {NOW}"),
        ([2**63, 2**63 + 1], f"[1] is {2**63 + 1}"),
        ([2**63 + 1, -1], f"[0] is {2**63 + 1}"),  # NumPy makes floats of them
        ([0, 2**63 - 1], f"[1] is {2**63 - 1}"),
        ([-(2**63) + 1, 0], f"[0] is {-(2**63) + 1}"),
    ]:
        with pytest.raises(ValueError, match="that float64 can hold") as raised:
            BATCHES[where](batch)
        assert text in str(raised.value)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_arrays_of_scores(dtype):
    tree = SumTree(3)
    tree.update_scores([0, 1], np.array([2**60, 2**60 + 2**20], dtype), temperature=2.0**20)
    assert tree.weights()[1] / tree.weights()[0] == pytest.approx(np.e)
    before = tree.weights()
    with pytest.raises(ValueError, match=rf"SumTree\.update_scores: scores\[1\] is {2**60 + 1}, expected a float"):
        tree.update_scores([0, 1], np.array([0, 7, 2**60 + 1], dtype)[::2], temperature=2.0**20)
    assert (tree.weights() == before).all()


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("where", list(BATCHES)[:-1])
def test_arrays_of_integers_are_refused_as_a_whole(where, dtype):
    with pytest.raises(TypeError, match=f"has dtype {dtype.__name__}, expected float32 or float64"):
        BATCHES[where](np.array([0, NOW], dtype))


def test_a_refused_integer_changes_nothing():
    of = heap()
    for call in (
        lambda: of.push(1, NOW),
        lambda: of.update(3, NOW),
        lambda: of.update_many([3, 1], [2, NOW], missing="insert"),
    ):
        with pytest.raises(ValueError, match="that float64 can hold"):
            call()
    assert list(of.iter_sorted()) == [(3, 1.0)]
    mapping = a_map()
    for call in (lambda: mapping.push("b", NOW), lambda: mapping.update_priority("a", NOW)):
        with pytest.raises(ValueError, match="that float64 can hold"):
            call()
    assert dict(mapping) == {"a": 1.0}


@given(st.lists(st.one_of(st.integers(-(2**70), 2**70), st.integers(2**53 - 4, 2**53 + 4)), max_size=20))
def test_integers_leave_in_their_order_or_do_not_come_in(integers):
    mapping, accepted = PriorityMap(), []
    for number in integers:
        try:
            mapping.push(len(accepted), number)
        except ValueError:
            assert int(float(number)) != number
        else:
            assert int(float(number)) == number
            heapq.heappush(accepted, number)
    assert [priority for _, priority in mapping.iter_sorted()] == sorted(accepted)


@given(st.integers(-(2**64), 2**64), st.integers(-(2**64), 2**64))
def test_adjust_by_an_integer_is_exact_or_refused(before, delta):
    before, delta = int(float(before)), int(float(delta))
    mapping = PriorityMap({"a": before})
    if int(float(before + delta)) == before + delta:
        assert mapping.adjust("a", delta) == before + delta
    else:
        with pytest.raises(ValueError, match=r"PriorityMap\.adjust: the priority would be .*, expected a sum that"):
            mapping.adjust("a", delta)
        assert mapping["a"] == before
        with pytest.raises(ValueError, match="expected a sum that"):
            mapping.adjust("a", Index(delta))
        assert mapping.adjust("a", float(delta)) == float(before) + float(delta)


def test_adjust_of_what_is_no_integer_rounds():
    mapping = PriorityMap({"a": 0.5, "b": float("inf"), "c": 1e308})
    assert mapping.adjust("a", 2**53) == 0.5 + 2.0**53
    assert mapping.adjust("b", 2**60) == float("inf")
    with pytest.raises(ValueError, match="expected a sum that float64 can hold"):
        mapping.adjust("c", int(1.7e308))
    assert mapping.adjust("c", 1.7e308) == float("inf")


def test_other_numbers_round_as_float_does():
    mapping = PriorityMap()
    for number in (Decimal(NOW), Fraction(NOW), Decimal("0.1"), Fraction(1, 3), float(NOW), np.float64(NOW), 2**60):
        mapping["a"] = number
        assert mapping["a"] == float(number)
    of = heap()
    of.push_many([1, 2], [2**63, -1.0])
    of.push_many([4, 5, 6], [float(NOW), np.float64(NOW), 0.0])
    assert of.priority(5) == float(NOW)


def test_a_list_that_its_elements_change_is_read_once():
    batch = [0.5, None]

    class Number(Index):
        def __array__(self, dtype=None, copy=None):
            batch.clear()
            return np.array(7)

    batch[1] = Number(7)
    of = heap()
    of.push_many([1, 2], batch)
    assert (of.priority(2), batch) == (7.0, [])
