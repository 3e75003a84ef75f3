"""AttentionScorer and temperature_for_breadth against float64 NumPy, and what a scorer does to a scheduler."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import foveal
from foveal import AttentionScorer, Scheduler


def entropy_breadth(scores, temperature):
    gaps = scores - scores.max()
    p = np.exp(gaps / temperature) if temperature else (gaps == 0).astype(float)
    p /= p.sum()
    p = p[p > 0]
    return math.exp(-(p * np.log(p)).sum())


# temperature_for_breadth


@given(
    scores=arrays(np.float64, st.integers(2, 50), elements=st.floats(-1e3, 1e3).map(lambda x: round(x, 9))),
    part=st.floats(0.01, 0.99),
)
def test_the_temperature_gives_the_breadth(scores, part):
    ties = int((scores == scores.max()).sum())
    breadth = ties + part * (len(scores) - ties)
    temperature = foveal.temperature_for_breadth(scores, breadth)
    assert entropy_breadth(scores, temperature) == pytest.approx(breadth, rel=1e-9)


@pytest.mark.parametrize("scores", [[1e-295, 0.0], [0.0, 1e-200, 1.0, 1e200], [1e300, -1e300, 0.0], [3.0, 3.0, -1e5]])
@pytest.mark.parametrize("part", [1e-3, 0.5, 1 - 1e-3])
def test_gaps_of_every_size(scores, part):
    scores = np.array(scores)
    ties = int((scores == scores.max()).sum())
    breadth = ties + part * (len(scores) - ties)
    temperature = foveal.temperature_for_breadth(scores, breadth)
    assert entropy_breadth(scores, temperature) == pytest.approx(breadth, rel=1e-9)


@pytest.mark.parametrize("scores", [[1.7e308, -1.7e308, 0.0], [1e308, 9e307, -1e308, -1e308]])
def test_gaps_beyond_the_largest_float(scores):
    temperature = foveal.temperature_for_breadth(scores, 1.5)
    halves = np.array(scores) / 4
    assert entropy_breadth(halves, temperature / 4) == pytest.approx(1.5, rel=1e-9)
    with pytest.raises(ValueError, match="expected one that some float is the temperature for"):
        foveal.temperature_for_breadth(scores, len(scores) - 1e-9)


def test_batches_and_masks():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((3, 2, 20))
    scores[0, 0, 5:] = -np.inf
    breadth = np.array([[2.0, 7.0], [3.0, 3.0], [19.0, 1.5]])
    found = foveal.temperature_for_breadth(scores, breadth)
    assert found.shape == (3, 2)
    for i in np.ndindex(3, 2):
        assert entropy_breadth(scores[i], found[i]) == pytest.approx(breadth[i], rel=1e-9)


def test_the_ends():
    assert foveal.temperature_for_breadth([1.0, 2.0, 3.0], 3) == math.inf
    assert foveal.temperature_for_breadth([1.0, 2.0, 3.0], 1) == 0.0
    assert foveal.temperature_for_breadth([3.0, 2.0, 3.0], 2) == 0.0
    assert foveal.temperature_for_breadth([5.0], 1) in (0.0, math.inf)


def test_scores_of_queries_and_keys():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((4, 16)), rng.standard_normal((4, 30, 16))
    found = foveal.temperature_for_breadth((q, k), 5.0)
    scores = np.einsum("bd,bnd->bn", q, k) / 4
    np.testing.assert_allclose(found, foveal.temperature_for_breadth(scores, 5.0), rtol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1.0, 2.0], 3.0), "breadth is 3, expected from 1"),
        (([1.0, 1.0, 0.0], 1.5), r"expected from 2 \(scores tied"),
        (([1.0, math.nan], 1.5), "nan or inf"),
        (([1.0, math.inf], 1.5), "nan or inf"),
        (([], 1.0), "at least one score"),
        ((2.0, 1.0), "at least one score"),
        (((np.zeros(3), np.zeros((5, 4))), 2.0), r"k.shape\[-1\] is 4, expected head_dim 3"),
        (([-math.inf, -math.inf], 1.0), "expected from"),
        (([1.0, 2.0], 10**400), "temperature_for_breadth: breadth is 1000.*, expected real numbers"),
        (([1.0, 2.0], [1.5, 1.5]), r"breadth has shape \(2,\), expected one that broadcasts to \(\)"),
        (([1.0, 2.0], math.nan), "breadth is nan"),
    ],
)
def test_refusals_of_a_breadth(arguments, text):
    with pytest.raises(ValueError, match=text):
        foveal.temperature_for_breadth(*arguments)


@pytest.mark.parametrize("arguments", [("scores", 2.0), ([1.0, 2.0], "wide"), ([{}, 2.0], 1.5)])
def test_a_breadth_of_no_numbers(arguments):
    with pytest.raises(TypeError, match=r"temperature_for_breadth: (scores|breadth) is .*, expected real numbers"):
        foveal.temperature_for_breadth(*arguments)


# AttentionScorer


@pytest.mark.parametrize("count", [1, 2, 17, 1000])
@pytest.mark.parametrize("states", [1, 3])
def test_scores_are_those_of_attention(count, states):
    rng = np.random.default_rng(count)
    w_q, w_k = rng.standard_normal((5, 24)), rng.standard_normal((7, 24))
    scorer = AttentionScorer(5, 7, w_q=w_q, w_k=w_k)
    state, features = rng.standard_normal((states, 5)), rng.standard_normal((count, 7))
    scorer.focus(state if states > 1 else state[0])
    scores = (features @ w_k) @ (state @ w_q).T / math.sqrt(24)
    expected = np.log(np.exp(scores).mean(axis=1))
    found = scorer(scorer.keys(features))
    assert found.dtype == np.float64
    # float32: 24 products, the weights' logarithm and the log-sum-exp, each with its rounding relative to its size.
    bound = 64 * 2.0**-24 * (1 + np.abs(scores).max())
    np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


def test_a_task_alone_has_the_score_that_it_has_among_others():
    rng = np.random.default_rng(0)
    scorer = AttentionScorer(8)
    scorer.focus(rng.standard_normal(8))
    keys = scorer.keys(rng.standard_normal((50, 8)))
    alone = [scorer(keys[i : i + 1])[0] for i in range(50)]
    np.testing.assert_allclose(alone, scorer(keys), atol=1e-5)


def test_before_the_first_focus_all_are_alike():
    scorer = AttentionScorer(4)
    np.testing.assert_allclose(scorer(scorer.keys(np.eye(4))), 0.0, atol=1e-6)


def test_dims_of_a_scorer_are_integers():
    with pytest.raises(TypeError, match="AttentionScorer: query_dim has type str, expected an integer"):
        AttentionScorer("2")
    with pytest.raises(TypeError, match="AttentionScorer: feature_dim has type float"):
        AttentionScorer(2, 2.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: AttentionScorer(0), "expected at least 1"),
        (lambda: AttentionScorer(3, 4), "queries have 3 features and keys 4"),
        (lambda: AttentionScorer(3, w_q=np.eye(4)), r"w_q has shape \(4, 4\), expected \(3, d\)"),
        (lambda: AttentionScorer(3).focus(np.zeros(4)), r"state has shape \(4,\), expected \(..., 3\)"),
        (lambda: AttentionScorer(3).focus([1.0, math.nan, 0.0]), "state holds nan"),
        (lambda: AttentionScorer(3).keys(np.full(3, np.inf)), "features holds nan"),
        (lambda: AttentionScorer(3).focus(np.zeros((0, 3))), "expected one state or several"),
    ],
)
def test_refusals_of_a_scorer(call, text):
    with pytest.raises(ValueError, match=text):
        call()


# In a scheduler


def scheduler_of(features, **options):
    scheduler = Scheduler(scorer=AttentionScorer(features.shape[1]), max_in_flight=1, **options)
    futures = [scheduler.submit(int, features=row, key=i) for i, row in enumerate(features)]
    return scheduler, futures


def test_the_distribution_is_the_attention_of_the_focus():
    rng = np.random.default_rng(3)
    features, state = rng.standard_normal((40, 16)), rng.standard_normal(16)
    scheduler, _ = scheduler_of(features, floor=0.0)
    scheduler.rescore(state)
    _, _, weights, _ = foveal.attention(state[None], features, features, return_weights=True)
    np.testing.assert_allclose(list(scheduler.distribution().values()), weights[0], rtol=1e-5)


def test_a_new_focus_changes_what_comes_next_and_late_arrivals_are_scored_by_it():
    features = np.repeat(8 * np.eye(4), 5, axis=0)
    scheduler, _ = scheduler_of(features, policy="strict")
    scheduler.rescore(np.eye(4)[2])
    assert [d.key // 5 for d in scheduler.run(budget=3).decisions] == [2, 2, 2]
    scheduler.rescore(np.eye(4)[1])
    assert [d.key // 5 for d in scheduler.run(budget=2).decisions] == [1, 1]
    scheduler.submit(int, features=9 * np.eye(4)[1], key="late")
    assert [d.key for d in scheduler.run(budget=1).decisions] == ["late"]


def test_attention_adds_to_urgency_and_breadth_steers_it():
    rng = np.random.default_rng(4)
    scheduler, _ = scheduler_of(rng.standard_normal((60, 8)), breadth=6.0, floor=0.0)
    scheduler.rescore(rng.standard_normal(8))
    shares = np.array(list(scheduler.distribution().values()))
    assert math.exp(-(shares * np.log(shares)).sum()) == pytest.approx(6.0, rel=1e-9)
    least = int(shares.argmin())
    scheduler.update(least, urgency=50.0)
    assert max(scheduler.distribution(), key=scheduler.distribution().get) == least
    scheduler.rescore(rng.standard_normal(8))
    assert max(scheduler.distribution(), key=scheduler.distribution().get) == least


def test_tasks_with_and_without_features_and_the_slots_they_leave():
    rng = np.random.default_rng(5)
    scheduler = Scheduler(scorer=AttentionScorer(6), policy="strict", max_in_flight=1)
    features = {}
    for i in range(500):
        row = rng.standard_normal(6) if i % 3 else None
        features[i] = np.zeros(6) if row is None else row
        scheduler.submit(int, features=row, key=i)
        if i % 7 == 0:
            scheduler.cancel(i - 3)
            features.pop(i - 3, None)
        if i % 50 == 49:
            state = rng.standard_normal(6)
            scheduler.rescore(state)
            scores = {key: row @ state for key, row in features.items()}
            for decision in scheduler.run(budget=20).decisions:
                best = max(scores.values())
                assert scores.pop(decision.key) == pytest.approx(best, abs=1e-5)
                del features[decision.key]


def test_a_scorer_of_a_users_own():
    scheduler = Scheduler(scorer=lambda features: features[:, 0], policy="strict", max_in_flight=1)
    order = []
    for x in (1.0, 3.0, 2.0):
        scheduler.submit(order.append, x, features=[x, 0.0])
    scheduler.rescore()
    scheduler.run()
    assert order == [3.0, 2.0, 1.0]
    with pytest.raises(TypeError, match="expected an AttentionScorer"):
        scheduler.rescore([1.0])


def test_a_scorer_that_fails_loses_nothing():
    answers = {"wrong": False}

    def scorer(features):
        return np.full(len(features), np.nan if answers["wrong"] else 1.0)

    scheduler = Scheduler(scorer=scorer, max_in_flight=1)
    good = scheduler.submit(int, features=[1.0])

    def fails_once():
        answers["wrong"] = True
        raise OSError("once")

    tried_again = scheduler.submit(fails_once, features=[2.0])
    assert scheduler.run(retries=3).counts == {"done": 1, "failed": 1}
    assert good.result() == 0
    with pytest.raises(ValueError, match="the scorer gave"):
        tried_again.result()
    unlucky = scheduler.submit(int, features=[1.0])
    assert scheduler.run().counts == {"failed": 1}
    with pytest.raises(ValueError, match="the scorer gave"):
        unlucky.result()


def test_a_rescore_that_fails_leaves_every_task_as_it_was():
    focus = [np.array([0.0, 1.0])]
    scheduler = Scheduler(scorer=lambda features: features @ focus[0], policy="strict", max_in_flight=1)
    for i in range(20):
        scheduler.submit(int, features=[1.0, float(i)], key=i)
    before = scheduler.distribution()
    focus[0] = np.zeros(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="matmul"):
            scheduler.rescore()
    assert scheduler.distribution() == before
    scheduler._ledger.is_whole = False  # a section that is broken off, and mended without the scorer
    assert scheduler.distribution() == before
    focus[0] = np.array([0.0, -1.0])
    scheduler.rescore()
    report = scheduler.run()
    assert report.counts == {"done": 20}
    assert [decision.key for decision in report.decisions] == list(range(20))


def test_a_focus_whose_attention_is_not_finite_is_not_turned_to():
    class Blind(AttentionScorer):
        def __call__(self, keys):
            return super().__call__(keys) if self._queries[0, 0] < 5.0 else np.full(len(keys), np.nan)

    scheduler = Scheduler(scorer=Blind(2), max_in_flight=1, floor=0.0)
    for i in range(3):
        scheduler.submit(int, features=[float(i), 0.0], key=i)
    scheduler.rescore([2.0, 0.0])
    before = scheduler.distribution()
    with pytest.raises(ValueError, match="the scorer gave"):
        scheduler.rescore([9.0, 0.0])
    assert scheduler.distribution() == before
    scheduler.submit(int, features=[1.0, 0.0], key="late")
    shares = scheduler.distribution()
    assert shares["late"] == pytest.approx(shares[1])


@pytest.mark.parametrize(
    ("features", "text"),
    [([1.0, 2.0], r"\(2,\), expected \(..., 3\)"), (np.zeros((2, 3)), r"expected \(3,\)"), ([1, 2, math.nan], "nan")],
)
def test_refusals_of_features(features, text):
    scheduler = Scheduler(scorer=AttentionScorer(3))
    scheduler.submit(int, features=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=text):
        scheduler.submit(int, features=features)
    assert scheduler.run().counts == {"done": 1}
