"""TaskBalancer: the two rules by their papers' formulas, the kinds of input, refusals, checkpoints."""

import doctest
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveal import TaskBalancer
from foveal._scheduler import balancer as module


def test_rate_is_dynamic_weight_average():
    balancer = TaskBalancer(ema=1.0, floor=0.0, temperature=1.5)
    rng = np.random.default_rng(0)
    before = None
    for _ in range(20):
        losses = rng.uniform(0.1, 5.0, 4)
        weights = balancer.update(losses)
        if before is not None:
            e = np.exp(losses / before / 1.5)
            np.testing.assert_allclose(weights, 4 * e / e.sum(), rtol=1e-12)
        before = losses


def test_difficulty_is_dynamic_task_prioritization():
    balancer = TaskBalancer("difficulty", gamma=2.0, ema=0.25, floor=0.0)
    kappa = np.array([0.9, 0.5, 0.1])
    average = kappa.copy()
    for _ in range(5):
        weights = balancer.update(np.ones(3), kpis=kappa)
        focal = -((1 - average) ** 2) * np.log(average)
        np.testing.assert_allclose(weights, 3 * focal / focal.sum(), rtol=1e-12)
        kappa = np.array([0.95, 0.4, 0.8])
        average += 0.25 * (kappa - average)


def test_averages_forget():
    smooth, rough = TaskBalancer(ema=0.1), TaskBalancer(ema=1.0)
    for losses in ([1.0, 1.0], [1.0, 3.0]):
        calm, wild = smooth.update(losses), rough.update(losses)
    assert 1 < calm[1] < wild[1]


@given(
    st.lists(st.lists(st.floats(0, 1e300), min_size=3, max_size=3), min_size=1, max_size=8),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.one_of(st.none(), st.floats(1.0, 3.0)),
)
def test_weights_sum_to_the_tasks_and_none_falls_below_the_floor(history, ema, floor, breadth):
    balancer = TaskBalancer(ema=ema, floor=floor, breadth=breadth)
    for losses in history:
        weights = balancer.update(losses)
        assert weights.sum() == pytest.approx(3.0)
        assert weights.min() >= floor * (1 - 1e-12) - 1e-300


def test_a_breadth_that_no_float_is_the_temperature_for():
    balancer = TaskBalancer(ema=1.0, floor=0.0, breadth=2.984375)
    balancer.update([2.2e-309, 0.0, 0.0])
    assert balancer.update([1.0, 0.0, 0.0]).sum() == pytest.approx(3.0)


def test_breadth():
    balancer = TaskBalancer(ema=1.0, floor=0.0, breadth=2.5)
    balancer.update([1.0, 1.0, 1.0, 1.0])
    shares = balancer.update([0.5, 0.6, 0.8, 0.9]) / 4
    assert math.exp(-(shares * np.log(shares)).sum()) == pytest.approx(2.5, rel=1e-9)
    assert list(shares) == sorted(shares)


def test_solved_tasks_share_evenly():
    np.testing.assert_array_equal(TaskBalancer("difficulty").update([0.0, 0.0], kpis=[1.0, 1.0]), 1.0)
    weights = TaskBalancer("difficulty").update([1.0, 1.0], kpis=[0.0, 0.5])
    assert np.isfinite(weights).all()
    assert weights[0] > weights[1] > 0


def test_losses_of_nothing():
    balancer = TaskBalancer(ema=1.0)
    balancer.update([0.0, 1.0])
    assert np.isfinite(balancer.update([0.0, 1.0])).all()
    assert np.isfinite(balancer.update([5e-324, 1.0])).all()
    assert np.isfinite(balancer.update([1e308, 1.0])).all()


def test_dicts_keep_their_names():
    balancer = TaskBalancer(ema=1.0)
    assert balancer.update({"depth": 1.0, "class": 2.0}) == {"depth": 1.0, "class": 1.0}
    weights = balancer.update({"depth": 1.0, "class": 1.0})
    assert weights["depth"] > 1 > weights["class"]
    with pytest.raises(ValueError, match=r"of tasks \['class', 'depth'\], expected \['depth', 'class'\]"):
        balancer.update({"class": 1.0, "depth": 1.0})


def test_tensors_come_back_as_tensors():
    torch = pytest.importorskip("torch")
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    expected, balancer, of_list = TaskBalancer(), TaskBalancer(), TaskBalancer()
    for scale in (1.0, 0.5):
        scaled = losses * torch.tensor([1.0, scale])
        weights = balancer.update(scaled)
        assert weights.dtype == torch.float32
        assert not weights.requires_grad
        np.testing.assert_allclose(weights, expected.update([1.0, 2.0 * scale]), rtol=1e-6)
        np.testing.assert_array_equal(of_list.update([scaled[0], scaled[1]]), weights)
    (weights * scaled).sum().backward()
    assert losses.grad is not None


def test_integer_losses_have_weights_that_are_no_integers():
    torch = pytest.importorskip("torch")
    balancer, expected = TaskBalancer(ema=1.0), TaskBalancer(ema=1.0)
    for losses in ([4, 2], [3, 2]):
        weights = balancer.update(torch.tensor(losses))
        np.testing.assert_allclose(weights, expected.update(np.array(losses)), rtol=1e-6)
    assert weights.dtype == torch.float32
    assert weights[0] < 1 < weights[1]


def test_numpy_may_be_set_to_raise():
    with np.errstate(all="raise"):
        for balancer in (TaskBalancer(ema=0.5), TaskBalancer(ema=0.5, breadth=1.5), TaskBalancer(temperature=1e-300)):
            for losses in ([1e-308, 1.0], [1e308, 5e-324], [5e-324, 1e308], [1.0, 1.0]):
                assert balancer.update(losses).sum() == pytest.approx(2.0)
        assert TaskBalancer("difficulty", gamma=300.0).update([1.0, 1.0], kpis=[0.9999, 0.5]).sum() == pytest.approx(2)


def test_its_repr_says_how_it_was_made():
    balancer = TaskBalancer(ema=1.0)
    assert repr(balancer) == "<TaskBalancer: rate, temperature=2, ema=1, floor=0.05, no tasks yet>"
    balancer.update([1.0, 2.0])
    assert repr(balancer).endswith("2 tasks>")
    assert "breadth=3" in repr(TaskBalancer(breadth=3.0))
    assert "difficulty, gamma=1" in repr(TaskBalancer("difficulty"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rule": "difficulty"}, r"state\['rule'\] is 'difficulty', expected 'rate'"),
        ({"names": "ab"}, r"state\['names'\] is 'ab', expected a list"),
        ({"names": []}, r"state\['names'\] is \[\], expected a list"),
        ({"names": None}, r"state\['losses'\] is \[1.0, 2.0\], expected 0 numbers"),
        ({"losses": [1.0]}, r"state\['losses'\] is \[1.0\], expected 2 numbers"),
        ({"losses": [1.0, -2.0]}, "expected 2 numbers, 0 to"),
        ({"losses": [1.0, math.nan]}, "expected 2 numbers, 0 to"),
        ({"losses": ["a", "b"]}, "expected 2 numbers, 0 to"),
        ({"kpis": [0.5, 1.5]}, r"state\['kpis'\] is \[0.5, 1.5\], expected 2 numbers, 0 to 1"),
        ({"more": 1}, "state has .*more.*, expected rule, names, losses, kpis"),
        ("state", "state has str, expected rule, names, losses, kpis"),
    ],
)
def test_refusals_of_a_checkpoint(change, text):
    first, second = TaskBalancer(), TaskBalancer()
    first.update({"a": 1.0, "b": 2.0})
    second.update([3.0, 4.0, 5.0])
    before = second.state_dict()
    with pytest.raises(ValueError, match=rf"TaskBalancer\.load_state_dict: .*{text}"):
        second.load_state_dict(change if isinstance(change, str) else first.state_dict() | change)
    assert second.state_dict() == before


def test_a_checkpoint_goes_on_where_it_was():
    first = TaskBalancer()
    first.update({"a": 1.0, "b": 2.0})
    second = TaskBalancer()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.update({"a": 0.5, "b": 2.0}) == first.update({"a": 0.5, "b": 2.0})


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: TaskBalancer("loss"), ValueError, "rule is 'loss'"),
        (lambda: TaskBalancer(temperature=0.0), ValueError, "temperature is 0.0, expected above 0"),
        (lambda: TaskBalancer(temperature=1.0, breadth=2.0), ValueError, "breadth and temperature"),
        (lambda: TaskBalancer(ema=0.0), ValueError, "ema is 0.0"),
        (lambda: TaskBalancer(floor=-0.1), ValueError, "floor is -0.1, expected 0 to 1"),
        (lambda: TaskBalancer(gamma=-1.0), ValueError, "gamma is -1.0"),
        (lambda: TaskBalancer().update([1.0, -1.0]), ValueError, "expected finite numbers of at least 0"),
        (lambda: TaskBalancer().update([1.0, math.nan]), ValueError, "losses are"),
        (lambda: TaskBalancer().update([]), ValueError, "losses is empty"),
        (lambda: TaskBalancer().update(3.0), TypeError, "losses has type float, expected K numbers"),
        (lambda: TaskBalancer().update("ab"), TypeError, "losses has type str, expected K numbers"),
        (lambda: TaskBalancer().update([10**400]), ValueError, "losses are .*, expected finite numbers"),
        (lambda: TaskBalancer().update([1.0], kpis=[1.0]), ValueError, "kpis are given, expected none"),
        (lambda: TaskBalancer(gamma=2.0), ValueError, "gamma is 2.0, expected none with the rule 'rate'"),
        (lambda: TaskBalancer("difficulty", temperature=1.0), ValueError, "temperature is 1.0, expected none"),
        (lambda: TaskBalancer("difficulty", breadth=1.0), ValueError, "breadth is 1.0, expected none"),
        (lambda: TaskBalancer(["rate"]), ValueError, r"rule is \['rate'\]"),
        (lambda: TaskBalancer(ema="x"), TypeError, "ema has type str"),
        (lambda: TaskBalancer("difficulty").update([1.0]), ValueError, "kpis is None"),
        (lambda: TaskBalancer("difficulty").update([1.0], kpis=[1.5]), ValueError, "kpis are"),
        (lambda: TaskBalancer("difficulty").update([1.0], kpis=[0.5, 0.5]), ValueError, "kpis are of tasks"),
    ],
)
def test_refusals(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_other_tasks_than_the_first_time():
    balancer = TaskBalancer()
    balancer.update([1.0, 2.0])
    with pytest.raises(ValueError, match="losses are of tasks"):
        balancer.update([1.0, 2.0, 3.0])


def test_example_of_the_docstring():
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0
