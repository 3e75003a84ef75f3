"""Who is next: order, shares, starvation, determinism and replay, allocation."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_cases import Clock, endless

from foveal import Scheduler, Step
from foveal._scheduler import backlog
from foveal._scheduler.future import Task
from foveal.scheduler import Decision


def turns(scheduler, budget):
    """How many turns each task gets of so many."""
    return Counter(decision.key for decision in scheduler.run(budget=budget).decisions)


# Order and shares


def test_equal_tasks_are_first_in_first_out_however_many_times_the_slots_are_used_up():
    scheduler, order = Scheduler(max_in_flight=1), []
    for round_ in range(5):
        for i in range(150):
            scheduler.submit(order.append, (round_, i))
        if round_ % 2:
            scheduler.run(budget=120)
    scheduler.run()
    assert order == sorted(order)
    assert len(order) == 750


@pytest.mark.parametrize("policy", ["credit", "strict"])
def test_the_more_urgent_goes_first_and_a_priority_counts_until_the_start(policy):
    scheduler, order = Scheduler(max_in_flight=1, policy=policy, floor=0.0), []
    for i in range(6):
        scheduler.submit(order.append, i, urgency=0.5 * i, key=i)
    scheduler.update(0, urgency=9.0)
    scheduler.update(5, importance=-9.0)
    scheduler.run()
    assert order == [0, 4, 3, 2, 1, 5]


def test_distribution_is_softmax_with_a_floor():
    scheduler = Scheduler(temperature=2.0, floor=0.1)
    scores = {"a": 1.0, "b": -0.5, "c": 3.0}
    for key, score in scores.items():
        scheduler.submit(int, key=key, urgency=score - 1, importance=1.0)
    total = sum(math.exp(s / 2) for s in scores.values())
    expected = {key: 0.1 / 3 + 0.9 * math.exp(s / 2) / total for key, s in scores.items()}
    assert scheduler.distribution() == pytest.approx(expected, abs=1e-15)
    assert Scheduler().distribution() == {}


@pytest.mark.parametrize("policy", ["credit", "sample"])
def test_service_follows_the_distribution(policy):
    scheduler = Scheduler(max_in_flight=1, policy=policy, floor=0.2, seed=1)
    for i, urgency in enumerate([0.0, 1.0, 2.0, -1.0]):
        scheduler.add_stepper(endless, key=i, urgency=urgency)
    expected = scheduler.distribution()
    n = 6000
    got = turns(scheduler, n)
    for key, share in expected.items():
        slack = 4 if policy == "credit" else 5 * math.sqrt(n * share * (1 - share))
        assert abs(got[key] - n * share) <= slack, key


def test_service_is_counted_in_cost():
    scheduler = Scheduler(max_in_flight=1, floor=0.0)
    scheduler.add_stepper(lambda budget: Step(False, None, 5.0), key="dear")
    scheduler.add_stepper(lambda budget: Step(False, None, 1.0), key="cheap")
    got = turns(scheduler, 600)
    assert abs(got["dear"] * 5 - got["cheap"]) <= 6


def test_feedback_moves_the_urgency_and_so_the_service():
    scheduler = Scheduler(max_in_flight=1, ema=0.5, floor=0.0)
    scheduler.add_stepper(lambda budget: Step(False, 3.0), key="up")
    scheduler.add_stepper(lambda budget: Step(False, 0.0), key="same")
    got = turns(scheduler, 400)
    assert got["up"] / got["same"] == pytest.approx(math.exp(3), rel=0.2)
    scheduler.update("same", feedback=4.0)
    rows = {row.key: row for row in scheduler.report().rows}
    assert rows["same"].urgency == 2.0


def test_strict_starves_and_says_so_no_more_than_that():
    scheduler = Scheduler(max_in_flight=1, policy="strict")
    scheduler.add_stepper(endless, key="high", urgency=1.0)
    scheduler.add_stepper(endless, key="low")
    assert turns(scheduler, 300) == {"high": 300}


def test_aging_lifts_what_has_waited():
    now = [0.0]
    scheduler, order = Scheduler(max_in_flight=1, policy="strict", aging=0.1, clock=lambda: now[0]), []
    scheduler.submit(order.append, "old")
    now[0] = 30.0
    scheduler.submit(order.append, "new", urgency=2.0)
    scheduler.submit(order.append, "newest and most urgent", urgency=4.0)
    scheduler.run()
    assert order == ["newest and most urgent", "old", "new"]


def test_scores_of_any_size_keep_their_order():
    scheduler, order = Scheduler(max_in_flight=1, floor=0.0, temperature=0.01), []
    scores = [1e6, -1e6, 0.0, 1e300, 5.0, -3.0, 1e6 + 1, 4.99]
    for score in scores:
        scheduler.submit(order.append, score, urgency=score)
    scheduler.run()
    assert order[0] == 1e300
    assert set(order) == set(scores)
    # The largest of all leaves, and those that it made alike are told apart again, as soon as a pass over them pays.
    scheduler, order = Scheduler(max_in_flight=1, floor=0.0), []
    scheduler.submit(order.append, 1e4, urgency=1e4)
    for score in range(-200, 200):
        scheduler.submit(order.append, score, urgency=float(score) / 10)
    scheduler.run()
    assert order[0] == 1e4
    assert np.mean(order[1:51]) > 160
    assert np.mean(np.abs(np.array(order[1:]) - np.arange(199, -201, -1))) < 10  # a temperature


def test_breadth_is_kept_as_tasks_come_and_go():
    scheduler = Scheduler(breadth=3.0, floor=0.0)
    rng = random.Random(0)
    for i in range(200):
        scheduler.submit(int, urgency=rng.gauss(0, 5), key=i)
        if i >= 3:
            p = np.array(list(scheduler.distribution().values()))
            p = p[p > 0]
            assert math.exp(-(p * np.log(p)).sum()) == pytest.approx(3.0, rel=1e-6)
    scheduler.run()


@pytest.mark.parametrize("step", [3.0, 50.0, 1e5, -3.0, -50.0])
def test_scores_that_run_away_cost_no_pass_over_all_tasks_each(step, monkeypatch):
    passes = Counter()
    rebase = backlog.Backlog._rebase

    def counting(self, *args, **kwargs):
        passes["rebase"] += 1
        passes["work"] += len(self._slots)
        rebase(self, *args, **kwargs)

    monkeypatch.setattr(backlog.Backlog, "_rebase", counting)
    n = 4000
    scheduler = Scheduler(max_in_flight=1, breadth=None)
    for i in range(n):
        scheduler.submit(int, key=i, urgency=step * i)
    for i in range(n):
        scheduler.update(i, urgency=step * (n + i))
    assert scheduler.run().counts == {"done": n}
    assert passes["work"] <= 3 * 16 * 3 * n  # thrice a change of each task, and some


@pytest.mark.parametrize("gap", [5.0, 100.0])
def test_each_new_task_far_above_all_others_is_next(gap):
    scheduler, order = Scheduler(max_in_flight=1, floor=0.0), []

    def work(i):
        order.append(i)
        if i < 300:
            scheduler.submit(work, i + 1, urgency=gap * (i + 1))

    for _ in range(10):
        scheduler.submit(order.append, -1)
    scheduler.submit(work, 1, urgency=gap)
    scheduler.run()
    assert order == [*range(1, 301), *[-1] * 10]


# No starvation


class Adversary:
    """Raises every other task above the victim as far as numbers go, and higher after every turn."""

    def __init__(self):
        self.level = 1.0

    def __call__(self, budget):
        self.level = min(self.level * 2, 1e100)
        return Step(False, self.level)


@pytest.mark.parametrize("others", [1, 4, 30])
@pytest.mark.parametrize("floor", [0.05, 0.3, 1.0])
def test_no_gap_is_longer_than_the_bound_whatever_feedback_says(others, floor):
    scheduler = Scheduler(max_in_flight=1, ema=1.0, floor=floor)
    scheduler.add_stepper(lambda budget: Step(False, -1e100), key="victim", urgency=-1e9)
    for i in range(others):
        scheduler.add_stepper(Adversary(), key=i)
    decisions = scheduler.run(budget=30 * (others + 1) / floor).decisions
    served = [i for i, decision in enumerate(decisions) if decision.key == "victim"]
    bound = (others + 1) / floor
    assert len(served) >= 25
    assert max(np.diff([-1, *served])) <= bound + 1
    assert len(served) >= floor / (others + 1) * len(decisions) - 2


def test_the_floor_holds_in_expectation_when_sampling():
    scheduler = Scheduler(max_in_flight=1, policy="sample", floor=0.1, ema=1.0, seed=3)
    scheduler.add_stepper(lambda budget: Step(False, -1e100), key="victim", urgency=-1e9)
    for i in range(4):
        scheduler.add_stepper(Adversary(), key=i)
    n = 5000
    expected = 0.1 / 5 * n
    assert turns(scheduler, n)["victim"] >= expected - 5 * math.sqrt(expected)


def test_urgent_arrivals_without_end_do_not_starve_an_old_task():
    scheduler, order = Scheduler(max_in_flight=1, floor=0.1), []

    def again(i):
        order.append(i)
        if i < 400:
            scheduler.submit(again, i + 1, urgency=50.0)

    scheduler.submit(order.append, "old", urgency=-50.0)
    scheduler.submit(again, 0, urgency=50.0)
    scheduler.run()
    assert order.index("old") <= 2 / 0.1


# Determinism and replay


def random_feedback(seed):
    rng = random.Random(seed)
    return lambda budget: Step(rng.random() < 0.02, rng.gauss(0, 2), rng.expovariate(1.0))


def scene(policy, seed=5):
    scheduler = Scheduler(max_in_flight=1, policy=policy, seed=seed, clock=Clock(), aging=0.01)
    for i in range(20):
        scheduler.add_stepper(random_feedback(i), key=i, urgency=i % 3)
    return scheduler


@pytest.mark.parametrize("policy", ["credit", "sample", "strict"])
def test_the_same_seed_and_clock_give_the_same_log(policy):
    first, second = (scene(policy).run().decisions for _ in range(2))
    assert first == second
    assert len(first) > 200


def test_another_seed_gives_another_log():
    assert scene("sample", 1).run().decisions != scene("sample", 2).run().decisions


def test_a_log_can_be_replayed_whatever_the_policy_and_seed():
    log = scene("sample").run().decisions
    scheduler = scene("credit", seed=77)
    scheduler.replay(log)
    assert [decision.key for decision in scheduler.run().decisions] == [decision.key for decision in log]


def test_replay_names_a_task_that_is_missing_and_goes_on_when_asked_again():
    scheduler = Scheduler(max_in_flight=1)
    future = scheduler.submit(int, key="there")
    scheduler.replay([Decision(0.0, "not there", False)])
    with pytest.raises(ValueError, match=r"Scheduler\.replay: the log's next task is 'not there'"):
        scheduler.run()
    assert scheduler.run().counts == {"done": 1}
    assert future.result() == 0


# allocate


@given(
    urgencies=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    budget=st.integers(1, 10**30),
    floor=st.floats(0, 1),
    temperature=st.floats(1e-3, 1e3),
)
@settings(deadline=None, max_examples=150)
def test_allocate_sums_exactly_and_rounds_quotas(urgencies, budget, floor, temperature):
    scheduler = Scheduler(floor=floor, temperature=temperature)
    for urgency in urgencies:
        scheduler.submit(int, urgency=urgency)
    parts = scheduler.allocate(budget)
    shares = scheduler.distribution()
    assert sum(parts.values()) == budget
    assert list(parts) == list(shares)
    for key, part in parts.items():
        assert isinstance(part, int)
        assert abs(part - budget * shares[key]) <= 1 + budget * 1e-13
    order = sorted(shares, key=shares.get)
    assert all(parts[a] <= parts[b] for a, b in itertools.pairwise(order) if shares[a] < shares[b])
    assert sum(scheduler.allocate(float(budget), integer=False).values()) == pytest.approx(budget, rel=1e-12)


def test_allocate_by_hand():
    scheduler = Scheduler(floor=0.0)
    for key, weight in [("a", 0.4), ("b", 0.35), ("c", 0.25)]:
        scheduler.submit(int, key=key, urgency=math.log(weight))
    assert scheduler.allocate(5) == {"a": 2, "b": 2, "c": 1}
    assert scheduler.allocate(1) == {"a": 1, "b": 0, "c": 0}
    assert Scheduler().allocate(3) == {}


# The backlog by itself


def tasks_of(scores):
    return [Task(key, None, (), None, float(score), 0.0, 0.0) for key, score in enumerate(scores)]


def test_a_task_in_flight_keeps_its_place_in_the_rotation():
    queue = backlog.Backlog("credit", 1.0, 1.0, None, 0.0, None)
    tasks = tasks_of([0.0] * 5)
    for task in tasks:
        queue.push(task)
    first = queue.pop()
    queue.push(first)  # now behind the others
    absent = queue.take(tasks[1])  # in flight, though the rotation has not served it
    assert [queue.pop().key for _ in range(2)] == [2, 3]
    queue.push(absent)
    assert [queue.pop().key for _ in range(3)] == [1, 4, 0]


def test_serving_those_far_below_leaves_digits_for_the_others():
    queue = backlog.Backlog("credit", 0.0, 1.0, None, 0.0, None)
    tasks = tasks_of([0.0, -30.0, *[-60.0] * 2000, -58.0])
    for task in tasks[:-1]:
        queue.push(task)
    assert [queue.pop().key for _ in range(3)] == [0, 1, 2]
    queue.push(tasks[-1])  # higher than the 1999 that wait
    assert [queue.pop().key for _ in range(3)] == [2002, 3, 4]


# How long a task waits


def stream(urgencies, share, floor=0.0):
    """Serve tasks and, one after another, newcomers of that share; give what each kind had to wait.

    Of newcomers the worst integral of share over service; of the others the worst wait times the share at the start.
    """
    queue = backlog.Backlog("credit", floor, 1.0, None, 0.0, 0)
    weights = {}

    def come(urgency):
        task = Task(len(weights), None, (), None, urgency, 0.0, 0.0)
        weights[task] = math.exp(urgency)
        queue.push(task)
        return task

    total = start = sum(map(math.exp, urgencies))
    olds = {come(urgency) for urgency in urgencies}
    owed, turn, worst_new, worst_old = 0.0, 0, 0.0, 0.0
    newcomer = None
    while olds:
        if newcomer is None and turn:  # the first comes when all others are as good as due
            left = math.fsum(weights[task] for task in olds) if len(olds) < 50 else total
            newcomer = come(math.log(left * share / (1 - share)))
            total, since = left + weights[newcomer], owed
        task = queue.pop()
        turn += 1
        if not task.by_rotation:
            owed += 1.0 / total
        total -= weights[task]
        if newcomer is not None:
            worst_new = max(worst_new, weights[newcomer] * (owed - since))
        if task is newcomer:
            newcomer = None
        else:
            olds.remove(task)
            worst_old = max(worst_old, turn * weights[task] / start * (1 - share))
        queue.settle(task, 1.0)
    return worst_new, worst_old


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 10, 100, 10_000])
def test_neither_newcomers_nor_equals_wait_longer_than_the_bound(count, share):
    newcomers, equals = stream([0.0] * count, share)
    assert newcomers <= 3.0
    assert equals <= 1.0 + 3.0 / count  # a multiple of N / (1 - share)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("spread", [0.001, 0.05, 1.0, 3.0])
def test_weights_that_are_nearly_equal_hold_up_nobody_nor_do_others(spread, share):
    rng = random.Random(0)
    newcomers, others = stream([rng.gauss(0.0, spread) for _ in range(2000)], share)
    assert newcomers <= 3.0
    assert others <= 3.0


def test_the_floor_adds_its_turns_and_no_more_to_a_wait():
    newcomers, equals = stream([0.0] * 1000, 0.5, floor=0.3)
    assert newcomers <= 3.0  # of the proportional server's service
    assert equals <= 1.0 + 3.0 / 1000


def test_an_urgent_newcomer_an_update_and_a_rescore_count_after_equals_have_been_served():
    for change in ("submit", "update"):
        scheduler, order = Scheduler(max_in_flight=1), []

        def work(i, scheduler=scheduler, order=order, change=change):
            order.append(i)
            if i == 0 and change == "submit":
                scheduler.submit(work, "alarm", urgency=50.0)
            elif i == 0:
                scheduler.update(700, urgency=50.0)

        for i in range(1000):
            scheduler.submit(work, i, key=i)
        scheduler.run()
        assert order.index("alarm" if change == "submit" else 700) <= 2

    def favour(rows):
        return np.asarray(rows)[:, 0]

    scheduler, order = Scheduler(max_in_flight=1, floor=0.0, scorer=favour), []
    rng = np.random.default_rng(0)
    for i, row in enumerate(rng.standard_normal((1000, 1)).astype(np.float32) * 3):
        scheduler.submit(order.append, (i, float(row[0])), features=row)
    scheduler.run(budget=200)
    scheduler.rescore()
    scheduler.run()
    best = sorted((x for _, x in order), reverse=True)[:50]
    assert sum(x >= best[-1] for _, x in order[:100]) >= 30


def test_steppers_let_a_newcomer_in():
    scheduler = Scheduler(max_in_flight=1, floor=0.0)
    for i in range(500):
        scheduler.add_stepper(endless, key=i)
    scheduler.run(budget=750)
    scheduler.add_stepper(endless, key="new", urgency=math.log(500))
    assert 45 <= turns(scheduler, 100)["new"] <= 55


def entropy_of(counts):
    p = np.array([x for x in counts if x], np.float64)
    p /= p.sum()
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize("policy", ["credit", "sample"])
def test_breadth_is_kept_as_scores_move(policy):
    scheduler = Scheduler(max_in_flight=1, breadth=3.0, floor=0.0, policy=policy, seed=0)
    for i in range(10):
        scheduler.add_stepper(endless, key=i, urgency=float(i))
    for i in range(10):
        scheduler.update(i, urgency=i * 0.1)
    assert entropy_of(turns(scheduler, 4000).values()) == pytest.approx(3.0, rel=0.1)
    for i in range(10, 30):
        scheduler.add_stepper(endless, key=i, urgency=1.0 + (i % 5) / 7)
        scheduler.update(i - 10, feedback=2.0)
    assert entropy_of(turns(scheduler, 4000).values()) == pytest.approx(3.0, rel=0.1)
    assert entropy_of(scheduler.distribution().values()) == pytest.approx(3.0, rel=1e-9)


@pytest.mark.parametrize("policy", ["credit", "sample"])
def test_the_floor_is_a_share_of_service_not_of_turns(policy):
    scheduler, service = Scheduler(max_in_flight=1, policy=policy, seed=0, floor=0.2), Counter()

    def step(i, cost):
        service[i] += cost
        return Step(False, None, cost)

    for i, (cost, urgency) in enumerate([(0.01, -5.0), (1.0, 0.0), (1.0, 0.0), (4.0, -9.0)]):
        scheduler.add_stepper(lambda budget, i=i, cost=cost: step(i, cost), key=i, urgency=urgency)
    expected = scheduler.distribution()
    scheduler.run(budget=2500)
    for i, share in expected.items():
        expected_service = share * sum(service.values())
        slack = 8.0 if policy == "credit" else 0.25 * expected_service  # two of the dearest turns
        assert abs(service[i] - expected_service) <= slack, i
