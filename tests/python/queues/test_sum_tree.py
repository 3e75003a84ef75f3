"""foveal.SumTree: sums, samples by their statistics, weights that are exponentials, threads and forks."""

import copy
import doctest
import fractions
import math
import os
import pickle
import subprocess
import sys
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from foveal import SumTree
from foveal._queues import sum_tree as _sum_tree

CAPACITIES = [1, 2, 15, 16, 17, 255, 256, 257, 1000, 4097]


def tree_of(weights):
    tree = SumTree(len(weights))
    tree.update_many(np.arange(len(weights)), weights)
    return tree


class Points:
    """As a generator whose numbers are known."""

    def __init__(self, points):
        self.points = np.array(points, float)

    def random(self, k):
        assert k == len(self.points)
        return self.points


def chi_squared_is_plausible(counts, expected):
    """Whether the counts could come from the expected ones: within 6 standard deviations of the statistic."""
    some = expected > 0
    assert not counts[~some].any()
    statistic = ((counts[some] - expected[some]) ** 2 / expected[some]).sum()
    freedom = some.sum() - 1
    return abs(statistic - freedom) < 6 * np.sqrt(2 * freedom)


# ---- sums ------------------------------------------------------------------------------------------------------------

WEIGHTS = st.one_of(st.just(0.0), st.floats(0, 1e300), st.floats(0, 1), st.integers(0, 5).map(float))


@given(st.data(), st.sampled_from(CAPACITIES))
@settings(max_examples=100)
def test_weights_and_total(data, capacity):
    tree, model = SumTree(capacity), np.zeros(capacity)
    ids = st.integers(0, capacity - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        batch = data.draw(st.lists(st.tuples(ids, WEIGHTS), max_size=40))
        if data.draw(st.booleans()):
            tree.update_many([id for id, _ in batch], [weight for _, weight in batch])
        else:
            for id, weight in batch:
                tree[id] = weight
        for id, weight in batch:
            model[id] = weight
    assert (tree.weights() == model).all()
    assert all(tree[id] == model[id] for id in range(min(capacity, 50)))
    exact = sum(map(fractions.Fraction, model.tolist()))
    assert abs(fractions.Fraction(tree.total) - exact) <= exact * 30 * fractions.Fraction(2) ** -53


class AgainstModel(RuleBasedStateMachine):
    """Any sequence of calls, against a list of the weights."""

    capacity = 20
    ids = st.integers(0, capacity - 1)
    batches = st.lists(st.tuples(ids, WEIGHTS), max_size=30)

    def __init__(self):
        super().__init__()
        self.tree, self.model = SumTree(self.capacity), [0.0] * self.capacity
        self.rng = np.random.default_rng(0)

    @rule(id=ids, weight=WEIGHTS)
    def set(self, id, weight):
        self.tree[id] = weight
        self.model[id] = weight

    @rule(batch=batches)
    def update_many(self, batch):
        self.tree.update_many([id for id, _ in batch], [weight for _, weight in batch])
        for id, weight in batch:
            self.model[id] = weight

    @rule(
        batch=batches,
        bad=st.sampled_from([(-1, 1.0), (capacity, 1.0), (0, -1.0), (0, math.nan), (0, math.inf)]),
        place=st.integers(0, 30),
    )
    def update_many_refused(self, batch, bad, place):
        batch.insert(place, bad)
        with pytest.raises((ValueError, IndexError)):
            self.tree.update_many([id for id, _ in batch], [weight for _, weight in batch])

    @precondition(lambda self: any(self.model))
    @rule(k=st.integers(0, 40), stratified=st.booleans())
    def sample(self, k, stratified):
        ids, probabilities = self.tree.sample(k, rng=self.rng, stratified=stratified)
        assert all(self.model[id] > 0 for id in ids)
        assert probabilities.tolist() == [self.model[id] / self.tree.total for id in ids]
        if stratified:
            assert ids.tolist() == sorted(ids.tolist())

    @rule(k=st.integers(0, 25))
    def sample_without_replacement(self, k):
        if k > sum(weight > 0 for weight in self.model):
            with pytest.raises(ValueError, match=f"k is {k}, expected at most"):
                self.tree.sample(k, rng=self.rng, replace=False)
            return
        ids, probabilities = self.tree.sample(k, rng=self.rng, replace=False)
        left = list(self.model)
        for id, probability in zip(ids.tolist(), probabilities.tolist(), strict=True):
            assert left[id] > 0  # not drawn before
            assert probability == pytest.approx(left[id] / math.fsum(left), rel=1e-12)
            left[id] = 0.0

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, SumTree.copy, lambda t: pickle.loads(pickle.dumps(t))]))
    def copy(self, how):
        old, self.tree = self.tree, how(self.tree)
        old[0] = 1.0 if self.model[0] != 1.0 else 2.0

    @invariant()
    def is_the_same(self):
        assert self.tree.weights().tolist() == self.model
        assert self.tree.total == tree_of(self.model).total  # to the last bit


TestAgainstModel = AgainstModel.TestCase
TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_rounding_does_not_accumulate(capacity):
    rng = np.random.default_rng(capacity)
    tree = SumTree(capacity)
    for _ in range(100):
        ids = rng.integers(0, capacity, 1000)
        tree.update_many(ids, 10.0 ** rng.uniform(-12, 12, 1000))
        tree[int(ids[0])] = rng.random()
    assert tree.total == tree_of(tree.weights()).total  # bit for bit
    tree.update_many(np.arange(capacity), np.zeros(capacity))
    assert tree.total == 0.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tensors_and_strides(dtype):
    torch = pytest.importorskip("torch")
    tree = SumTree(100)
    weights = torch.arange(100, dtype=getattr(torch, dtype))
    tree.update_many(torch.arange(100).flip(0)[::3], weights[::3])
    assert tree[99] == 0
    assert tree[0] == 99
    assert tree[96] == 3
    tree.update_many(np.arange(100, dtype=np.int32)[::-1], weights.numpy())
    assert tree.total == 99 * 50


# ---- samples ---------------------------------------------------------------------------------------------------------


@given(st.lists(WEIGHTS, min_size=1, max_size=600), st.floats(0, 1, exclude_max=True))
def test_a_point_falls_into_the_share_of_its_id(weights, point):
    weights = np.array(weights)
    tree = tree_of(weights)
    if tree.total == 0:
        return
    ids, probabilities = tree.sample(1, rng=Points([point]))
    id = int(ids[0])
    assert weights[id] > 0
    assert probabilities[0] == weights[id] / tree.total
    begin = fractions.Fraction(0) + sum(map(fractions.Fraction, weights[:id].tolist()))
    share = fractions.Fraction(float(weights[id]))
    slack = fractions.Fraction(tree.total) * fractions.Fraction(2) ** -44
    assert begin - slack <= fractions.Fraction(point * tree.total) <= begin + share + slack


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("capacity", [2, 17, 300, 5000])
def test_samples_are_in_proportion(capacity, stratified):
    rng = np.random.default_rng(capacity)
    weights = rng.random(capacity) * (rng.random(capacity) < 0.7)
    weights[0] = capacity / 10
    tree = tree_of(weights)
    k = 200 * capacity
    ids, probabilities = tree.sample(k, rng=rng, stratified=stratified)
    assert (ids.dtype, probabilities.dtype, len(ids)) == (np.int64, np.float64, k)
    expected = weights / weights.sum()
    counts = np.bincount(ids, minlength=capacity)
    np.testing.assert_allclose(probabilities, expected[ids], rtol=1e-12)
    if stratified:
        assert (np.abs(counts - k * expected) < 2 + 1e-6).all()  # every share is hit as often as it must be
        another = tree.sample(k, rng=rng, stratified=True)[0]
        assert capacity == 2 or not np.array_equal(ids, another)  # but where in it is left to chance
    else:
        assert chi_squared_is_plausible(counts, k * expected)


def test_without_replacement():
    weights = np.array([0.0, 1.0, 2.0, 3.0, 0.0, 4.0])
    tree = tree_of(weights)
    rng = np.random.default_rng(0)
    pairs = np.zeros((6, 6))
    rounds = 20_000
    for _ in range(rounds):
        ids, probabilities = tree.sample(2, rng=rng, replace=False)
        first, second = ids.tolist()
        pairs[first, second] += 1
        assert probabilities.tolist() == [weights[first] / 10, weights[second] / (10 - weights[first])]
    assert (tree.weights() == weights).all()
    assert tree.total == 10.0
    expected = np.outer(weights / 10, weights) / np.maximum(10 - weights[:, None], 1e-9)
    np.fill_diagonal(expected, 0)
    assert chi_squared_is_plausible(pairs.ravel(), rounds * expected.ravel())
    ids, probabilities = tree.sample(4, rng=rng, replace=False)
    assert sorted(ids.tolist()) == [1, 2, 3, 5]
    assert probabilities[-1] == 1.0


def test_large_without_replacement():
    weights = np.random.default_rng(1).random(3000)
    tree = tree_of(weights)
    before = tree.total
    ids, _ = tree.sample(3000, rng=np.random.default_rng(2), replace=False)
    assert sorted(ids.tolist()) == list(range(3000))
    assert tree.total == before
    assert tree.weights()[ids[:300]].mean() > weights.mean() * 1.2  # the heavy ones tend to come first


def test_the_last_point_never_falls_on_a_weight_of_zero():
    for capacity in CAPACITIES:
        weights = np.zeros(capacity)
        weights[: (capacity + 1) // 2] = 0.1
        tree = tree_of(weights)
        assert tree.sample(1, rng=Points([np.nextafter(1, 0)]))[0][0] == (capacity + 1) // 2 - 1


# ---- scores ----------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from([0.5, 1.0, 30.0]))
@settings(max_examples=80)
def test_scores_are_softmax_weights_wherever_they_go(data, temperature):
    capacity = 40
    tree, scores = SumTree(capacity), np.full(capacity, -np.inf)
    for _ in range(data.draw(st.integers(1, 8))):
        center = data.draw(st.sampled_from([0.0, 1.0, -500.0, 700.0, 1e6, -1e8, 1e300]))
        batch = data.draw(
            st.lists(st.tuples(st.integers(0, capacity - 1), st.floats(-40, 40)), min_size=1, max_size=50)
        )
        tree.update_scores([id for id, _ in batch], [center + offset for _, offset in batch], temperature=temperature)
        for id, offset in batch:
            scores[id] = center + offset
        with np.errstate(under="ignore"):
            expected = np.exp(scores / temperature - (scores / temperature).max())
        np.testing.assert_allclose(tree.weights() / tree.total, expected / expected.sum(), rtol=1e-9, atol=1e-120)


def test_scores_refused():
    tree = SumTree(5)
    tree.update_scores([0, 1], [-np.inf, 5.0])
    assert tree.weights().tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    for call, error, text in [
        (lambda: tree.update_scores([0], [np.nan]), ValueError, "scores hold nan or inf"),
        (lambda: tree.update_scores([0], [np.inf]), ValueError, "scores hold nan or inf"),
        (lambda: tree.update_scores([0], [1.0], temperature="1"), TypeError, "not supported between"),
        (lambda: tree.update_scores([0], ["1"]), TypeError, "scores has dtype <U1, expected a floating one"),
        (lambda: tree.update_scores([0], [1j]), TypeError, "scores has dtype complex128, expected a floating one"),
        (
            lambda: tree.update_scores([0], [1.0], temperature=0.0),
            ValueError,
            "temperature is 0.0, expected a positive",
        ),
        (lambda: tree.update_scores([0], [1.0], temperature=2.0), ValueError, "expected 1.0 (from before)"),
        (lambda: tree.update_scores([5], [1e9]), IndexError, "ids[0] is 5, expected 0 to 4"),
        (lambda: tree.update_scores([0, 1], [1e9]), ValueError, "weights has shape (1,), expected (2,)"),
    ]:
        with pytest.raises(error) as raised:
            call()
        assert text in str(raised.value)
        assert tree.weights().tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]


# ---- the rest --------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda t: SumTree(0), ValueError, "SumTree: capacity is 0, expected 1 to 4294967296"),
        (lambda t: SumTree(2**33), ValueError, "SumTree: capacity is 8589934592"),
        (lambda t: SumTree("3"), TypeError, "SumTree: capacity has type str, expected an integer"),
        (lambda t: t[5], IndexError, "SumTree.__getitem__: id is 5, expected 0 to 4"),
        (lambda t: t[-1], IndexError, "SumTree.__getitem__: id is -1, expected 0 to 4"),
        (lambda t: t.__setitem__(5, 1.0), IndexError, "SumTree.__setitem__: id is 5, expected 0 to 4"),
        (lambda t: t.__setitem__(0, -1.0), ValueError, "SumTree.__setitem__: weight is -1.0, expected 0 to 1.79769313"),
        (lambda t: t.__setitem__(0, np.inf), ValueError, "SumTree.__setitem__: weight is inf, expected 0 to"),
        (lambda t: t.__setitem__(0, np.nan), ValueError, "SumTree.__setitem__: weight is nan, expected a number"),
        (lambda t: t.__delitem__(0), TypeError, "SumTree: an id cannot be deleted, expected a weight of 0"),
        (
            lambda t: t.update_many([0, 1], [1.0, -1.0]),
            ValueError,
            "SumTree.update_many: weights[1] is -1.0, expected 0",
        ),
        (lambda t: t.update_many([0, 1], [1.0, np.nan]), ValueError, "SumTree.update_many: weights[1] is nan"),
        (lambda t: t.update_many([0, 1], [1.0, np.inf]), ValueError, "SumTree.update_many: weights[1] is inf"),
        (lambda t: t.update_many([0, 7], [1.0, 1.0]), IndexError, "SumTree.update_many: ids[1] is 7, expected 0 to 4"),
        (
            lambda t: t.update_many([0], [1.0, 1.0]),
            ValueError,
            "SumTree.update_many: weights has shape (2,), expected (1,)",
        ),
        (
            lambda t: t.update_many([0.5], [1.0]),
            TypeError,
            "SumTree.update_many: ids has dtype float64, expected int32",
        ),
        (lambda t: t.sample(-1, rng=RNG), ValueError, "SumTree.sample: k is -1, expected at least 0"),
        (lambda t: t.sample(1), TypeError, "SumTree.sample: rng is missing"),
        (
            lambda t: t.sample(1, rng=3),
            TypeError,
            "SumTree.sample: rng has type int, expected a numpy.random.Generator",
        ),
        (lambda t: t.sample(1, rng=Points([1.0])), ValueError, "rng.random(k) holds a number outside [0, 1)"),
        (
            lambda t: t.sample(3, rng=RNG, replace=False),
            ValueError,
            "SumTree.sample: k is 3, expected at most 2, the number",
        ),
        (
            lambda t: t.sample(10**18, rng=RNG, replace=False),
            ValueError,
            "SumTree.sample: k is 1000000000000000000, expected at most 2, the number",
        ),
        (
            lambda t: SumTree(4).sample(1, rng=RNG),
            ValueError,
            "SumTree.sample: all weights are 0, expected a positive one",
        ),
        (lambda t: t.sample(1, rng=RNG, replace=1), TypeError, "SumTree.sample: replace is 1, expected a bool"),
        (
            lambda t: t.sample(1, rng=RNG, replace=False, stratified=True),
            ValueError,
            "SumTree.sample: stratified is True, expected False with replace=False",
        ),
    ],
)
def test_refused(call, error, text):
    tree = tree_of([0.0, 1.0, 0.0, 3.0, 0.0])
    with pytest.raises(error) as raised:
        call(tree)
    assert text in str(raised.value)
    assert tree.weights().tolist() == [0.0, 1.0, 0.0, 3.0, 0.0]
    assert tree.total == 4.0


def test_the_largest_weights_do_not_overflow():
    capacity = 1000
    tree = SumTree(capacity)
    with pytest.raises(ValueError, match=r"weight is 1\.79") as raised:
        tree[0] = sys.float_info.max
    most = float(str(raised.value).split()[-1])
    tree.update_many(np.arange(capacity), np.full(capacity, most))
    assert np.isfinite(tree.total)
    assert len(set(tree.sample(1000, rng=RNG, stratified=True)[0].tolist())) > 900


def test_nothing_drawn():
    for kind in ({}, {"replace": False}, {"stratified": True}):
        ids, probabilities = SumTree(3).sample(0, rng=RNG, **kind)
        assert (ids.shape, probabilities.shape) == ((0,), (0,))


def test_copies():
    tree = SumTree(20)
    tree.update_scores([1, 2], [3.0, 4.0], temperature=2.0)
    for other in (tree.copy(), copy.copy(tree), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert (other.weights() == tree.weights()).all()
        other.update_scores([1], [1e5], temperature=2.0)
        assert other.sample(1, rng=RNG)[0][0] == 1
        with pytest.raises(ValueError, match="from before"):
            other.update_scores([1], [1e5])
    assert tree.total < 2
    assert repr(tree_of([1.0, 2.0])) == "<foveal.SumTree: total 3.0 of 2 ids>"
    assert sys.getsizeof(SumTree(1_000_000)) < 9_000_000


class Buffer(SumTree):
    def __init__(self, capacity, fill, *, log=False):
        super().__init__(capacity)
        self.stored = [fill] * capacity
        self.log = log


def test_attributes_of_subclasses_are_copied_too():
    buffer = Buffer(3, None, log=True)
    buffer[1] = 2.0
    for make in (SumTree.copy, copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))):
        other = make(buffer)
        assert (type(other), other.stored, other.log, other.total) == (Buffer, [None] * 3, True, 2.0)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        SumTree(3, 4)
    with pytest.raises(TypeError, match=r"SumTree\.__setstate__: state is 3"):
        buffer.__setstate__(3)


@pytest.mark.filterwarnings("error")
def test_scores_as_far_apart_as_can_be():
    tree = SumTree(3)
    tree.update_scores([0, 1], [sys.float_info.max, -sys.float_info.max])
    assert tree.weights().tolist() == [1.0, 0.0, 0.0]
    for score in (1e300, -1e300):
        with pytest.raises(ValueError, match="hold nan or inf"):
            SumTree(3).update_scores([0], [score], temperature=1e-300)
    tree = SumTree(3)
    tree.update_scores([0], [sys.float_info.max])
    tree.update_scores([1], [-sys.float_info.max])
    assert tree.weights().tolist() == [1.0, 0.0, 0.0]


def test_equal_shares_of_the_smallest_weights():
    tree = tree_of([1e-322, 1e-322])  # 20 times the smallest number each: a hundredth of both is none
    ids, probabilities = tree.sample(100, rng=RNG, stratified=True)
    assert 45 <= ids.sum() <= 55
    assert set(probabilities.tolist()) == {0.5}


@pytest.mark.parametrize(
    "change",
    [
        {0: np.zeros(2)},
        {1: [0.0, 0.0, 0.0]},
        {1: np.zeros(2)},
        {1: np.zeros(3, np.float32)},
        {2: "0"},
        {3: "1"},
        {4: 5},
        {4: {"a": 1}},
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change):
    tree = SumTree(3)
    tree.update_scores([0, 1], [1.0, 2.0])
    before = repr(tree.__getstate__())
    state = [np.ones(3), None, 0.0, None, None]
    for part, wrong in change.items():
        state[part] = wrong
    with pytest.raises((TypeError, ValueError)):
        tree.__setstate__(tuple(state))
    assert repr(tree.__getstate__()) == before
    tree.update_scores([2], [2.0])
    assert tree[1] == tree[2]


def test_whoever_samples_while_scores_rise_finds_a_positive_weight():
    n = 50_000
    everything = np.arange(n)
    tree = SumTree(n)
    tree.update_scores(everything, np.zeros(n))
    done = threading.Event()
    failures = []

    def rise():
        for score in range(1000, 101_000, 1000):
            tree.update_scores(everything, np.full(n, float(score)))
        done.set()

    def sample():
        rng = np.random.default_rng(0)
        try:
            while not done.is_set():
                tree.sample(1, rng=rng)
        except ValueError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for work in (rise, sample)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_docstrings():
    failed, tried = doctest.testmod(_sum_tree)
    assert tried > 10
    assert failed == 0


def test_threads():
    capacity = 5000
    tree = tree_of(np.ones(capacity))
    failures = []

    def write(seed):
        rng = np.random.default_rng(seed)
        mine = np.arange(seed, capacity, 2)
        for _ in range(100):
            tree.update_many(rng.permutation(mine), rng.random(len(mine)) + 0.5)
            tree[int(mine[0])] = 1.0

    def read(seed):
        rng = np.random.default_rng(seed)
        for i in range(200):
            ids, probabilities = tree.sample(500, rng=rng, replace=i % 4 != 0)
            if not (0.1 / capacity < probabilities.min() and (i % 4 or len(set(ids.tolist())) == 500)):
                failures.append((ids, probabilities))

    threads = [threading.Thread(target=work, args=(seed,)) for work in (write, read) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tree.total == tree_of(tree.weights()).total


PROGRAM = """
import os, signal, sys, threading, time
import numpy as np
from foveal import SumTree

capacity = 100_000
tree = SumTree(capacity)
tree.update_many(np.arange(capacity), np.ones(capacity))
scored = SumTree(capacity)

def score():
    scores = np.zeros(capacity)
    while True:
        scores += 301.0  # so that all weights are computed anew each time
        scored.update_scores(np.arange(capacity), scores)

threading.Thread(target=score, daemon=True).start()

def work(seed):
    rng = np.random.default_rng(seed)
    while True:
        tree.update_many(rng.integers(0, capacity, 20_000), rng.random(20_000))
        tree.sample(1000, rng=rng, replace=bool(seed))

for seed in range(3):
    threading.Thread(target=work, args=(seed,), daemon=True).start()
time.sleep(0.05)
"""

FORK = """
for _ in range(20):
    time.sleep(0.003)
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        total = tree.total
        again = SumTree(capacity)
        again.update_many(np.arange(capacity), tree.weights())
        ids, _ = tree.sample(1000, rng=np.random.default_rng(0), replace=False)
        scored.copy().update_scores([0], [0.0])
        scored.update_scores([0, 1], [1e9, 1e9])
        weights = scored.weights()
        right = (
            total == again.total
            and len(set(ids.tolist())) == 1000
            and weights[0] == weights[1] == 1.0
            and not weights[2:].any()
        )
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


@pytest.mark.parametrize("program", [pytest.param(FORK, id="fork"), pytest.param("", id="the interpreter ends")])
def test_while_threads_are_in_the_middle_of_something(program):
    if program and not hasattr(os, "fork"):
        pytest.skip("there is no fork here")
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM + program],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (result.returncode, result.stderr) == (0, "")
