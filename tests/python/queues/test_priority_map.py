"""foveal.PriorityMap against a sorted list, with keys that make every kind of trouble a dict's keys can make."""

import collections.abc
import contextlib
import copy
import doctest
import gc
import itertools
import math
import pickle
import threading
import weakref

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from foveal import Empty, PriorityMap
from foveal._queues import priority_map as _priority_map


class Clash:
    """A key that shares its hash with many others, and is never the same object twice."""

    def __init__(self, name):
        self.name = name

    def __hash__(self):
        return self.name % 3

    def __eq__(self, other):
        return isinstance(other, Clash) and self.name == other.name

    def __repr__(self):
        return f"Clash({self.name})"


KEYS = st.one_of(
    st.integers(0, 12),
    st.integers(0, 5).map(lambda i: i << 40),  # the same low bits
    st.sampled_from(["a", "b", "ab", ("a", 1), None, 2.5, 3.0, True]),
    st.integers(0, 12).map(Clash),
)
PRIORITIES = st.one_of(st.integers(-2, 2).map(float), st.integers(-2, 2), st.floats(allow_nan=False))


class Sorted:
    """Keys in the order of their priorities, and of their last changes among equals."""

    def __init__(self, *, max):
        self.sign = -1 if max else 1
        self.of = {}
        self.changes = 0

    def set(self, key, priority):
        if key not in self.of or self.of[key][0] != priority:
            self.of[key] = (float(priority), self.changes)
            self.changes += 1

    def ordered(self):
        rank = sorted(self.of.items(), key=lambda item: (self.sign * item[1][0], item[1][1]))
        return [(key, priority) for key, (priority, _) in rank]

    def pop(self):
        entry = self.ordered()[0]
        del self.of[entry[0]]
        return entry


class AgainstModel(RuleBasedStateMachine):
    max = False

    def __init__(self):
        super().__init__()
        self.map = PriorityMap(max=self.max)
        self.model = Sorted(max=self.max)

    @rule(key=KEYS, priority=PRIORITIES)
    def push(self, key, priority):
        if key in self.model.of:
            with pytest.raises(ValueError, match=r"PriorityMap.push: key .* is present"):
                self.map.push(key, priority)
        else:
            self.map.push(key, priority)
            self.model.set(key, priority)

    @rule(key=KEYS, priority=PRIORITIES)
    def set(self, key, priority):
        self.map[key] = priority
        self.model.set(key, priority)

    @rule(key=KEYS, priority=PRIORITIES)
    def update_priority(self, key, priority):
        if key in self.model.of:
            self.map.update_priority(key=key, priority=priority)
            self.model.set(key, priority)
        else:
            with pytest.raises(KeyError) as raised:
                self.map.update_priority(key, priority)
            assert raised.value.args == (key,)

    @rule(key=KEYS, delta=st.integers(-3, 3))
    def adjust(self, key, delta):
        if key in self.model.of:
            before = self.model.of[key][0]
            expected = before + delta
            if abs(expected) >= 2**53 and math.isfinite(before) and int(expected) != int(before) + delta:
                with pytest.raises(ValueError, match="expected a sum that float64 can hold, or a float delta"):
                    self.map.adjust(key, delta)
                delta = float(delta)
            assert self.map.adjust(key, delta) == expected
            self.model.set(key, expected)
        else:
            with pytest.raises(KeyError):
                self.map.adjust(key, delta)

    @rule(key=KEYS)
    def look(self, key):
        expected = self.model.of.get(key, (None,))[0]
        assert self.map.get(key) == expected
        assert self.map.get(key, "none") == ("none" if expected is None else expected)
        assert (key in self.map) is (expected is not None)
        if expected is None:
            with pytest.raises(KeyError) as raised:
                self.map[key]
            assert raised.value.args == (key,)
        else:
            assert self.map[key] == expected

    @rule(key=KEYS, how=st.sampled_from(["discard", "pop", "pop with a default", "del"]))
    def remove(self, key, how):
        expected = self.model.of.pop(key, (None,))[0]
        if how == "discard":
            assert self.map.discard(key) is (expected is not None)
        elif how == "pop with a default":
            assert self.map.pop(key, None) == expected
        elif expected is None:
            with pytest.raises(KeyError):
                self.map.pop(key) if how == "pop" else self.map.__delitem__(key)
        elif how == "pop":
            assert self.map.pop(key) == expected
        else:
            del self.map[key]

    @rule(key=KEYS, priority=PRIORITIES)
    def pushpop(self, key, priority):
        if key in self.model.of:
            with pytest.raises(ValueError, match=r"PriorityMap.pushpop: key .* is present"):
                self.map.pushpop(key, priority)
        else:
            self.model.set(key, priority)
            assert self.map.pushpop(key, priority) == self.model.pop()

    @precondition(lambda self: self.model.of)
    @rule()
    def popitem(self):
        assert self.map.popitem() == self.model.pop()

    @precondition(lambda self: not self.model.of)
    @rule()
    def nothing_to_pop(self):
        for take in (self.map.popitem, self.map.peekitem):
            with pytest.raises(Empty, match="the map is empty"):
                take()

    @rule(data=st.dictionaries(KEYS, PRIORITIES, max_size=30))
    def update(self, data):
        self.map.update(data)
        for key, priority in data.items():
            self.model.set(key, priority)

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, PriorityMap.copy, lambda m: pickle.loads(pickle.dumps(m))]))
    def go_on_with_a_copy(self, how):
        other = how(self.map)
        self.map.clear()
        assert len(self.map) == 0
        assert list(self.map) == []
        self.map = other

    @invariant()
    def same(self):
        expected = self.model.ordered()
        assert len(self.map) == len(expected)
        assert list(self.map.iter_sorted()) == expected
        assert self.map == dict(expected)
        assert dict(self.map.items()) == dict(expected)
        if expected:
            assert self.map.peekitem() == expected[0]


class AgainstModelMax(AgainstModel):
    max = True


TestAgainstModel = AgainstModel.TestCase
TestAgainstModelMax = AgainstModelMax.TestCase
TestAgainstModel.settings = TestAgainstModelMax.settings = settings(max_examples=150, stateful_step_count=40)


def test_many_keys_of_every_pattern():
    for keys in (
        range(3000),
        range(0, 3000 << 20, 1 << 20),
        [f"{i:x}" for i in range(3000)],
        [-i for i in range(3000)],
    ):
        keys = list(keys)
        order = PriorityMap((key, (i * 7919) % 3001) for i, key in enumerate(keys))
        for key in keys[::2]:
            del order[key]
        for i, key in enumerate(keys[::2]):
            order[key] = -i
        assert [key for key, _ in order.iter_sorted()][:1500] == keys[::2][::-1]
        assert sorted(order, key=str) == sorted(keys, key=str)


def test_first_in_first_out_among_equals():
    order = PriorityMap([("a", 1), ("b", 1), ("c", 1)])
    order["a"] = 1.0  # unchanged: keeps its place
    order["b"] = 2.0
    order["b"] = 1.0  # back, behind its equals
    order.adjust("c", 0)
    assert [key for key, _ in order.iter_sorted()] == ["a", "c", "b"]
    assert order.pushpop("d", 1.0) == ("a", 1.0)
    assert [key for key, _ in pickle.loads(pickle.dumps(order)).iter_sorted()] == ["c", "b", "d"]


def test_is_a_mutable_mapping():
    order = PriorityMap({"a": 2.0})
    assert isinstance(order, collections.abc.MutableMapping)
    order.update(b=1.0)
    assert order.setdefault("a", 5.0) == 2.0
    assert order.setdefault("c", 5.0) == 5.0
    assert (set(order), sorted(order.values())) == ({"a", "b", "c"}, [1.0, 2.0, 5.0])
    assert order == {"a": 2, "b": 1, "c": 5}
    assert order != {"a": 2}
    assert not hasattr(order, "__dict__")
    with pytest.raises(TypeError, match="unhashable"):
        hash(order)


def test_made_from():
    assert list(PriorityMap([("a", 1), ("b", 0), ("a", 2)]).iter_sorted()) == [("b", 0.0), ("a", 2.0)]
    assert PriorityMap(PriorityMap({"a": 1})) == {"a": 1}
    assert PriorityMap((c, i) for i, c in enumerate("abc")).popitem() == ("a", 0.0)
    assert PriorityMap({"a": 1, "b": 2}, max=True).popitem() == ("b", 2.0)
    assert PriorityMap().max is False

    class KeysOnly:
        def keys(self):
            return ["a", "b"]

        def __getitem__(self, key):
            return {"a": 2, "b": 1}[key]

    assert PriorityMap(KeysOnly()) == dict(KeysOnly()) == {"a": 2, "b": 1}


def test_setdefault_takes_what_the_default_inserts_meanwhile():
    order = PriorityMap()

    class Number:
        def __float__(self):
            order["a"] = 5.0
            return 1.0

    assert order.setdefault("a", Number()) == 5.0
    assert dict(order) == {"a": 5.0}
    with pytest.raises(TypeError, match="setdefault: default has type NoneType"):
        order.setdefault("b")
    assert order.setdefault("a") == 5.0


def test_views_are_of_one_moment():
    order = PriorityMap({"a": 1.0, "b": 2.0})
    assert [(key, order.clear()) for key, _ in order.items()] == [("a", None), ("b", None)]
    order.update(a=1.0, b=2.0)
    assert [(priority, order.clear()) for priority in order.values()] == [(1.0, None), (2.0, None)]
    order["a"] = 1.0
    assert 1.0 in order.values()
    assert 2.0 not in order.values()
    assert ("a", 1.0) in order.items()
    assert order.items() & {("a", 1.0), ("b", 1.0)} == {("a", 1.0)}
    assert len(order.items()) == len(order.values()) == 1


class Labelled(PriorityMap):
    def __init__(self, data=(), *, label, max=False):
        super().__init__(data, max=max)
        self.label = label


def test_attributes_of_subclasses_are_copied_too():
    order = Labelled({"a": 1.0, "b": 2.0}, label=["x"], max=True)
    for make in (PriorityMap.copy, copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = make(order)
        assert (type(other), other.label, other.max, other.popitem()) == (Labelled, ["x"], True, ("b", 2.0))
    assert copy.copy(order).label is order.label
    assert copy.deepcopy(order).label is not order.label
    assert list(order.iter_sorted()) == [("b", 2.0), ("a", 1.0)]


def test_a_repr_that_comes_back():
    class Key:
        def __repr__(self):
            return repr(order)

    order = PriorityMap({Key(): 1.0})
    assert repr(order) == "PriorityMap({...: 1.0})"


def test_repr_and_pickle():
    order = PriorityMap({"a": 1.0, "b": 0.5}, max=True)
    assert repr(order) == "PriorityMap({'a': 1.0, 'b': 0.5}, max=True)"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(order, protocol))
        assert (again.max, list(again.iter_sorted())) == (True, [("a", 1.0), ("b", 0.5)])


@pytest.mark.parametrize("attributes", [5, {"a": 1}])
def test_a_state_that_does_not_fit_changes_nothing(attributes):
    order = PriorityMap({"a": 1.0})
    with pytest.raises(TypeError, match=r"PriorityMap\.__setstate__: attributes are .*, expected a dict, or None"):
        order.__setstate__((True, [("b", 2.0)], attributes))
    assert (order.max, dict(order)) == (False, {"a": 1.0})


def test_zero_and_infinity():
    infinity = float("inf")
    for max in (False, True):
        order = PriorityMap({"+": infinity, "-": -infinity, "0": -0.0}, max=max)
        assert str(order["0"]) == "0.0"
        assert [key for key, _ in order.iter_sorted()] == (["+", "0", "-"] if max else ["-", "0", "+"])
        order["0"] = 0.0
        with pytest.raises(ValueError, match=r"adjust: the priority would be inf \+ -inf, expected a number"):
            order.adjust("+", -infinity)
        assert order["+"] == infinity


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m.push("b", float("nan")), ValueError, "PriorityMap.push: priority is nan, expected a number"),
        (
            lambda m: m.__setitem__("a", "1"),
            TypeError,
            "PriorityMap.__setitem__: priority has type str, expected a real",
        ),
        (lambda m: m.push(["b"], 1.0), TypeError, "unhashable type: 'list'"),
        (lambda m: m.push("b"), TypeError, "PriorityMap.push: priority is missing"),
        (lambda m: m.popitem(last=True), TypeError, "PriorityMap.popitem: arguments given, expected none"),
        (
            lambda m: m.adjust("a", None),
            TypeError,
            "PriorityMap.adjust: delta has type NoneType, expected a real number",
        ),
        (lambda m: PriorityMap(3), TypeError, "'int' object is not iterable"),
        (lambda m: m.__init__([("b", 1), "abc"]), TypeError, "PriorityMap: data holds 'abc', expected (key, priority)"),
        (lambda m: m.__init__([("b", 1), 5]), TypeError, "PriorityMap: data holds 5, expected (key, priority)"),
        (lambda m: m.__init__({"b": float("nan")}), ValueError, "PriorityMap: priority is nan"),
        (lambda m: PriorityMap({}, max=1), TypeError, "PriorityMap: max is 1, expected a bool"),
        (lambda m: PriorityMap({}, True), TypeError, "PriorityMap: 2 positional arguments given, expected at most 1"),
        (lambda m: m.__setstate__([]), TypeError, "PriorityMap.__setstate__: state is [], expected (max, "),
    ],
)
def test_refused(call, error, text):
    order = PriorityMap({"a": 1.0})
    with pytest.raises(error) as raised:
        call(order)
    assert text in str(raised.value)
    assert list(order.iter_sorted()) == [("a", 1.0)]


# ---- keys that run code ----------------------------------------------------------------------------------------------


class Intruder(Clash):
    """A key whose comparison does something else first, once."""

    def __init__(self, name, act):
        super().__init__(name)
        self.act = act

    __hash__ = Clash.__hash__

    def __eq__(self, other):
        act, self.act = self.act, None
        if act:
            act()
        return super().__eq__(other)


@pytest.mark.parametrize("intrusion", ["clear", "grow", "remove it", "put it in", "init"])
@pytest.mark.parametrize("call", ["set", "push", "update", "del", "pop", "in", "pushpop", "get"])
def test_a_comparison_that_changes_the_map(intrusion, call):
    order = PriorityMap((Clash(i), i) for i in range(0, 12, 3))
    wanted = 9 if call in ("update", "del", "pop", "in", "get") and intrusion != "put it in" else 12

    def act():
        if intrusion == "clear":
            order.clear()
        elif intrusion == "grow":
            order.update((Clash(i), i) for i in range(100, 200))
        elif intrusion == "remove it":
            order.discard(Clash(wanted))
        elif intrusion == "put it in":
            order[Clash(wanted)] = 5.0
        else:
            order.__init__([(Clash(wanted), 2.0)])

    key = Intruder(wanted, act)
    with contextlib.suppress(KeyError, ValueError):
        {
            "set": lambda: order.__setitem__(key, 1.0),
            "push": lambda: order.push(key, 1.0),
            "update": lambda: order.update_priority(key, 1.0),
            "del": lambda: order.__delitem__(key),
            "pop": lambda: order.pop(key),
            "in": lambda: key in order,
            "pushpop": lambda: order.pushpop(key, 1.0),
            "get": lambda: order.get(key),
        }[call]()
    assert key.act is None
    # Whatever it did, keys and heap agree.
    expected = dict(order.items())
    assert len(expected) == len(order)
    popped = [order.popitem() for _ in range(len(order))]
    assert dict(popped) == expected
    assert [priority for _, priority in popped] == sorted(priority for _, priority in popped)
    assert len(order) == 0


def test_a_key_that_fails_to_compare_or_to_hash():
    def fail():
        raise ArithmeticError("no")

    order = PriorityMap({Clash(0): 0.0})
    for call in (order.__getitem__, order.discard, lambda key: order.push(key, 1.0)):
        with pytest.raises(ArithmeticError):
            call(Intruder(3, fail))
    assert list(order.items()) == [(Clash(0), 0.0)]


def test_a_removed_key_that_uses_the_map_as_it_goes():
    order = PriorityMap()
    seen = []

    class Key:
        def __del__(self):
            seen.append(len(order))
            order["last words"] = 1.0

    order[Key()] = 0.0
    order.clear()
    assert (seen, list(order)) == ([0], ["last words"])
    order[Key()] = 0.0
    order.popitem()
    assert (seen, list(order)) == ([0, 1], ["last words"])


def test_a_collection_of_garbage_that_changes_the_map_while_it_is_listed():
    order = PriorityMap()

    class Garbage:
        def __init__(self):
            self.cycle = self

        def __del__(self):
            while len(order) > 3:
                order.popitem()

    before = gc.get_threshold()
    try:
        gc.set_threshold(20)
        for listed in (lambda m: list(m.items()), list, repr, pickle.dumps, PriorityMap.copy) * 4:
            order.update((i, i) for i in range(300))
            Garbage()
            listed(order)
    finally:
        gc.set_threshold(*before)


def test_a_comparison_that_always_changes_the_map():
    changes = itertools.count()

    class Key:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            if next(changes) < 5000:  # each time the search begins anew
                order.push(Key2(), 0.0)
            return self is other

    class Key2:
        pass

    order = PriorityMap({Key(): 0.0})
    assert Key() not in order
    assert len(order) == 5001


def test_references_are_given_back():
    key = Clash(1)
    alive = weakref.ref(key)
    order = PriorityMap({key: 1.0})
    order.pushpop(Clash(2), 5.0)
    order.update_priority(Clash(2), 3.0)
    del key
    assert alive() is None
    assert order.copy() == order


def test_a_cycle_through_a_key_is_collected():
    key = Clash(1)
    order = PriorityMap({key: 1.0})
    key.map = order
    alive = weakref.ref(key)
    del key, order
    gc.collect()
    assert alive() is None


def test_threads():
    order = PriorityMap({i: float(i) for i in range(1000)})
    taken = []

    def work(first):
        for i in range(first, 40_000, 4):
            order[i % 997] = float(i)
            order.push(("mine", i), -float(i))
            if i % 3 == 0:
                taken.append(order.popitem()[0])

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mine = [key for key in taken if isinstance(key, tuple)]
    mine += [key for key in order if isinstance(key, tuple)]
    assert sorted(mine) == [("mine", i) for i in range(40_000)]


def test_docstrings():
    failed, tried = doctest.testmod(_priority_map)
    assert tried > 5
    assert failed == 0
