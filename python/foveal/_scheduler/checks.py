"""Checks of what users give, with errors that name function, argument, expectation and finding."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any


def check_finite(function: str, name: str, value: Any) -> None:
    """Refuse what is no finite real number."""
    if type(value) is float and value - value == 0.0:  # most are
        return
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise TypeError(f"{function}: {name} has type {type(value).__name__}, expected a real number") from None
    if not finite:
        raise ValueError(f"{function}: {name} is {value}, expected a finite number")


def check_range(
    function: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: float | None = None
) -> None:
    """Refuse what is no finite number from `low` to `high`, or not above `above`."""
    check_finite(function, name, value)
    if not low <= value <= high or (above is not None and value <= above):
        wanted = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{function}: {name} is {value}, expected {wanted if above is None else f'above {above:g}'}")


def wrong_with_step(key: Hashable, step: Any) -> BaseException | None:
    """Say what is wrong with what the step of task `key` returned."""
    at = f"Scheduler: the step of {key!r}"
    if not isinstance(step, tuple) or not 1 <= len(step) <= 3:
        return TypeError(f"{at} returned {step!r:.80}, expected foveal.Step(done, feedback, cost)")
    done, feedback, cost = tuple(step) + (None, 1.0)[len(step) - 1 :]
    try:
        if feedback is not None and not math.isfinite(feedback):
            return ValueError(f"{at} gave feedback {feedback}, expected a finite number or None")
        if not (math.isfinite(cost) and cost >= 0):
            return ValueError(f"{at} gave cost {cost}, expected at least 0 and finite")
        bool(done)
    except Exception as error:
        return TypeError(f"{at} returned {step!r:.80}: {error}")
    return None
