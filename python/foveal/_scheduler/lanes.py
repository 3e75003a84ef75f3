"""The proportional server: turns in the ratio of weights, that newcomers and equals wait for within a bound.

A task's *rate* is weight/charge: how many turns it deserves while others of weight 1 get one unit of service. Tasks
whose rates are within a factor of sqrt(2) of each other share a *lane*; those far below all others share the lowest.

- **Between lanes** ("credit" alone has more than one): what a turn costs is poured into the lanes' credits in the ratio
  of their weights, and the lane that is served pays it. So a credit is the service that a lane is owed. A lane is *due*
  when it is owed a turn; of the lanes that are due the one that is owed most, beyond its turn, is next. When none is
  due it is, of those that are owed something, the one that will be due first. That is the emptier's part in the game of
  cups (Dietz and Sleator, STOC 1987), with the eligibility of WF2Q (Bennett and Zhang, INFOCOM 1996); docs/scheduler.md
  has the bound and its proof. Because a lane is owed service for all its tasks together, however many fall due at the
  same time, they hold up nobody else.
- **Within a lane** the smallest key is next: V + charge/weight, where V is the lane's key served last: self-clocked
  fair queueing (Golestani, INFOCOM 1994). Equal weights are first in, first out.

"sample" has one lane, with key V + charge*E/weight, E exponential: each turn is a fresh draw in proportion to the
weights. "strict" has one, with key -score.

A weight that changes takes what is left of its key, key - V, along, scaled by old weight/new weight (Waldspurger and
Weihl 1995), which is exact for "sample".

A lane's numbers are sums over the tasks in it. Rounding is left in them when tasks leave, so they begin anew when the
lane is empty, and in `rebuild`.
"""

from __future__ import annotations

import math
from array import array

import numpy as np
from numpy.typing import NDArray

from foveal._scheduler.shares import Floats, Policy
from foveal.queues import IndexedHeap

_CAPACITY = 16  # of the smallest heap
_LANES_PER_E = 2.0 / math.log(2.0)
_LOWEST, _FASTEST = math.floor(-24.0 * _LANES_PER_E), 600.0  # a lane's number; the log of a rate
_LIGHTEST = 1e-290  # what rounding may leave of a lane's weight
_ROUNDING = 1e-9  # of credits


class Lane:
    """Tasks of nearly the same rate."""

    __slots__ = ("charges", "credit", "heap", "moment", "slots", "v", "weight")

    def __init__(self) -> None:
        self.heap = IndexedHeap(_CAPACITY)
        self.slots = array("q")  # by the heap's id, which is the order of arrival in this lane
        self.v = 0.0
        self.credit = 0.0
        self.weight = self.charges = self.moment = 0.0  # sums over the tasks: w, charge, w log w


class Lanes:
    """The proportional server over slots 0, 1, ... of the backlog; see the module."""

    def __init__(self, policy: Policy, *, measures_breadth: bool) -> None:
        self._has_many = policy == "credit"
        self._measures_breadth = measures_breadth
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._lanes: dict[int, Lane] = {}
        # By slot: the lane's number, the id and the key in its heap, the weight, the expected charge.
        self._numbers, self._ids = array("i"), array("q")
        self._keys, self._weights, self._charges = array("d"), array("d"), array("d")

    def push(self, log_weight: float, charge: float, left: float, credit: float) -> None:
        """Let the task of the next slot wait for `left` at its weight; its lane gets `credit`."""
        number = self._number(log_weight, charge)
        slot = len(self._numbers)
        self._numbers.append(number)
        self._ids.append(0)
        self._keys.append(left)
        self._weights.append(0.0)
        self._charges.append(charge)
        self._join(slot, number, math.exp(log_weight), charge, left).credit += credit

    def weight(self, slot: int) -> float:
        """Give a task's weight."""
        return self._weights[slot]

    def remove(self, slot: int) -> float:
        """Take a task out; give the credit of its lane if that is empty now, else 0."""
        number = self._numbers[slot]
        lane = self._lanes[number]
        heap = lane.heap
        heap.remove(self._ids[slot])
        if not len(heap):
            del self._lanes[number]
            return lane.credit
        weight = self._weights[slot]
        left = lane.weight - weight
        lane.weight = left if left > _LIGHTEST else _LIGHTEST
        lane.charges -= self._charges[slot]
        if self._measures_breadth:
            lane.moment -= weight * math.log(weight)
        return 0.0

    def rekey(self, slot: int, key: float) -> None:
        """Give a task this key, where V is always 0."""
        self._keys[slot] = key
        self._lanes[self._numbers[slot]].heap.update(self._ids[slot], key)

    def update(self, slot: int, log_weight: float) -> None:
        """Change a weight."""
        number = self._numbers[slot]
        lane = self._lanes[number]
        new_number = self._number(log_weight, charge := self._charges[slot])
        weight, old_weight = math.exp(log_weight), self._weights[slot]
        left = (self._keys[slot] - lane.v) * old_weight
        if new_number == number:
            self._weights[slot] = weight
            self._keys[slot] = key = lane.v + left / weight
            lane.heap.update(self._ids[slot], key)
            lane.weight = max(_LIGHTEST, lane.weight + (weight - old_weight))
            if self._measures_breadth:
                lane.moment += weight * math.log(weight) - old_weight * math.log(old_weight)
            return
        part = old_weight / lane.weight
        credit = lane.credit * part if part < 1.0 else lane.credit
        lane.credit -= credit
        self.remove(slot)
        self._numbers[slot] = new_number
        self._join(slot, new_number, weight, charge, left).credit += credit

    def first(self) -> int:
        """Give the slot of the task that is next."""
        lanes = self._lanes
        if len(lanes) == 1:
            (lane,) = lanes.values()
        else:
            lane = self._first_lane()
        return lane.slots[lane.heap.peek()[0]]

    def left(self, slot: int) -> float:
        """Say what is left to wait, in charge."""
        v = self._lanes[self._numbers[slot]].v
        return max(0.0, self._keys[slot] - v) * self._weights[slot]

    def serve(self, slot: int, charge: float) -> float:
        """Give all lanes their parts of a turn, and let the task's lane pay it; return the task's share."""
        lane = self._lanes[self._numbers[slot]]
        if len(self._lanes) > 1:
            total = self.pour(charge)
            lane.credit -= charge
        else:
            total = lane.weight
        return min(1.0, self._weights[slot] / total)

    def move_v(self, slot: int) -> float:
        """Let V of the task's lane follow its key; give V."""
        lane = self._lanes[self._numbers[slot]]
        lane.v = max(lane.v, self._keys[slot])
        return lane.v

    def pour(self, service: float) -> float:
        """Add service to the credits in the ratio of the weights; give the sum of these."""
        lanes = self._lanes.values()
        total = sum([lane.weight for lane in lanes])
        if total:
            part = service / total
            for lane in lanes:
                lane.credit += lane.weight * part
        return total

    def breadth(self) -> float:
        """Give exp(entropy) of the weights, from the lanes' sums."""
        total = sum(lane.weight for lane in self._lanes.values())
        entropy = math.log(total) - sum(lane.moment for lane in self._lanes.values()) / total
        return math.exp(min(max(0.0, entropy), 700.0))

    def lefts(self, slots: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Say for many what is left to wait, in charge, and their parts of the credits."""
        numbers = np.frombuffer(self._numbers, np.int32)[slots]
        lowest = min(self._lanes)
        vs, rates = np.zeros((2, max(self._lanes) - lowest + 1))
        for number, lane in self._lanes.items():
            vs[number - lowest] = lane.v
            rates[number - lowest] = lane.credit / lane.weight
        with np.errstate(all="ignore"):
            weights = np.frombuffer(self._weights)[slots]
            left = np.maximum(np.frombuffer(self._keys)[slots] - vs[numbers - lowest], 0.0) * weights
            return left, rates[numbers - lowest] * weights

    def rebuild(self, slots: NDArray[np.int64], log_weights: Floats, left: Floats, credits: Floats) -> None:
        """Begin anew with these tasks, which are moved to slots 0, 1, ... in their order."""
        charges = np.frombuffer(self._charges)[slots]
        with np.errstate(all="ignore"):
            weights = np.exp(log_weights)
            keys = left / weights
            numbers = np.zeros(len(slots), np.int32)
            if self._has_many:
                rates = np.minimum(log_weights - np.log(charges), _FASTEST)
                numbers = np.maximum(np.floor(rates * _LANES_PER_E), _LOWEST).astype(np.int32)
        self._fill(numbers, keys, weights, charges)
        for number, members in self._split(numbers):
            lane = self._lane_of(number, members, keys[members])
            lane.weight = max(_LIGHTEST, float(weights[members].sum()))
            if self._measures_breadth:
                lane.moment = float((weights[members] * log_weights[members]).sum())
            lane.charges = float(charges[members].sum())
            lane.credit = float(credits[members].sum()) if self._has_many else 0.0

    def _fill(self, numbers: NDArray[np.int32], keys: Floats, weights: Floats, charges: Floats) -> None:
        self._lanes = {}
        self._numbers = array("i", numbers.tobytes())
        self._ids = array("q", bytes(8 * len(numbers)))
        self._keys, self._weights = array("d", keys.tobytes()), array("d", weights.tobytes())
        self._charges = array("d", charges.tobytes())

    def _split(self, numbers: NDArray[np.int32]) -> list[tuple[int, NDArray[np.int64]]]:
        order = np.argsort(numbers.astype(np.int16), kind="stable")
        ends = np.flatnonzero(np.diff(numbers[order])) + 1
        return [(int(numbers[members[0]]), members) for members in np.split(order, ends)]

    def _lane_of(self, number: int, slots: NDArray[np.int64], keys: Floats) -> Lane:
        lane = self._lanes[number] = Lane()
        ids = np.arange(len(slots))
        np.frombuffer(self._ids, np.int64)[slots] = ids
        lane.slots = array("q", slots.astype(np.int64).tobytes())
        lane.heap = IndexedHeap.from_arrays(ids, keys, max(_CAPACITY, 2 * len(slots)))
        return lane

    def _number(self, log_weight: float, charge: float) -> int:
        if not self._has_many:
            return 0
        if charge != 1.0:
            log_weight = min(log_weight - math.log(charge), _FASTEST) if charge > 0.0 else _FASTEST
        number = math.floor(log_weight * _LANES_PER_E)
        return number if number > _LOWEST else _LOWEST

    def _join(self, slot: int, number: int, weight: float, charge: float, left: float) -> Lane:
        """Let the task of this slot wait for `left` in the lane of this number; give the lane."""
        lane = self._lanes.get(number)
        if lane is None:
            lane = self._lanes[number] = Lane()
        heap, slots = lane.heap, lane.slots
        id_ = len(slots)
        if id_ == heap.capacity:
            self._make_room(lane)
            heap, slots = lane.heap, lane.slots
            id_ = len(slots)
        lane.weight += weight
        lane.charges += charge
        if self._measures_breadth:
            lane.moment += weight * math.log(weight)
        self._weights[slot] = weight
        self._keys[slot] = key = lane.v + left / weight
        self._ids[slot] = id_
        heap.push(id_, key)
        slots.append(slot)
        return lane

    def _make_room(self, lane: Lane) -> None:
        """Move a lane's tasks together, in order, into a heap of twice their number."""
        ids = np.sort(np.fromiter(lane.heap, np.int64, len(lane.heap)))
        slots = np.frombuffer(lane.slots, np.int64)[ids]
        new_ids = np.arange(len(slots))
        np.frombuffer(self._ids, np.int64)[slots] = new_ids
        keys = np.frombuffer(self._keys)[slots]
        lane.slots = array("q", slots.tobytes())
        lane.heap = IndexedHeap.from_arrays(new_ids, keys, max(_CAPACITY, 2 * len(slots)))

    def _first_lane(self) -> Lane:
        lanes = self._lanes.values()
        next_due, most_due = None, None
        soonest, most = math.inf, -_ROUNDING
        for lane in lanes:
            credit = lane.credit
            beyond = credit - lane.charges / len(lane.heap)
            if beyond >= most:
                most, most_due = beyond, lane
            elif credit >= -_ROUNDING and beyond > soonest * -lane.weight:
                soonest, next_due = -beyond / lane.weight, lane
        if most_due is not None:
            return most_due
        if next_due is not None:
            return next_due
        # More was paid than is owed, since lanes that were owed something have gone: as if time had passed.
        first = min(lanes, key=lambda lane: -lane.credit / lane.weight)
        missing = -first.credit / first.weight
        for lane in lanes:
            lane.credit += lane.weight * missing
        return first
