"""Checks of what users give, with errors that name function, argument, expectation and finding."""

from __future__ import annotations

import functools
import inspect
import math
import operator
import types
from concurrent.futures import Executor
from typing import Any

from foveal import _core

_ASYNCHRONOUS = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_NEVER_ASYNCHRONOUS = (types.BuiltinFunctionType, type)


def text_of(value: object, longest: int = 80) -> str:
    """Give the repr, at most so many characters of it, or say what it is where that raises."""
    try:
        text = repr(value)
    except Exception as error:
        return f"<{type(value).__name__}, whose repr raises {type(error).__name__}>"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def check_finite(function: str, name: str, value: Any) -> None:
    """Refuse what is no finite real number."""
    if type(value) is float and value - value == 0.0:  # most are
        return
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(
            f"{function}: {name} is an integer beyond the largest float, expected a finite number"
        ) from None
    except (TypeError, ValueError):
        raise TypeError(f"{function}: {name} has type {type(value).__name__}, expected a real number") from None
    if not finite:
        raise ValueError(f"{function}: {name} is {value}, expected a finite number")


def check_score(function: str, name: str, value: Any) -> None:
    """Refuse what is no finite real number, and an integer that float64 would round: scores are compared as floats."""
    check_finite(function, name, value)
    if type(value) is not float:
        _core.as_number(function, name, value)


def check_range(
    function: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: float | None = None
) -> None:
    """Refuse what is no finite number from `low` to `high`, or not above `above`."""
    check_finite(function, name, value)
    if not low <= value <= high or (above is not None and value <= above):
        wanted = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"{function}: {name} is {value}, expected {wanted if above is None else f'above {above:g}'}")


def check_count(function: str, name: str, value: Any, low: int) -> None:
    """Refuse what is no integer of at least `low`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{function}: {name} has type {type(value).__name__}, expected an integer") from None
    if number < low:
        raise ValueError(f"{function}: {name} is {value}, expected at least {low}")


def check_priority(function: str, urgency: Any, importance: Any) -> None:
    """Refuse an urgency and an importance that are not finite, or whose sum is not."""
    check_score(function, "urgency", urgency)
    check_score(function, "importance", importance)
    check_finite(function, "urgency + importance", float(urgency) + float(importance))


def check_callable(function: str, name: str, value: Any, otherwise: str = "") -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise TypeError(f"{function}: {name} has type {type(value).__name__}, expected a callable{otherwise}")


def check_synchronous(function: str, name: str, value: Any) -> None:
    """Refuse an asynchronous function, whose call would only make a coroutine that nobody awaits."""
    code = getattr(value, "__code__", None)  # of functions and methods, which most are
    if code is None:
        if type(value) in _NEVER_ASYNCHRONOUS:
            return
        inner = value
        while isinstance(inner, functools.partial):
            inner = inner.func
        call = getattr(type(inner), "__call__", None)  # noqa: B004  # not asked whether there is one
        code = getattr(inner, "__code__", None) or getattr(call, "__code__", None)
    if code is not None and code.co_flags & _ASYNCHRONOUS:
        raise TypeError(
            f"{function}: {name} is asynchronous ({text_of(value)}), expected a function that is not: asynchronous "
            "functions are not supported yet; submit one that calls asyncio.run"
        )


def check_hashable(function: str, key: Any) -> None:
    """Refuse a key that has no hash."""
    try:
        hash(key)
    except TypeError:
        raise TypeError(f"{function}: key has the unhashable type {type(key).__name__}, expected a hashable") from None


def check_executor(function: str, executor: Any) -> None:
    """Refuse what is no executor, makes none, and is not None."""
    if executor is not None and not isinstance(executor, Executor) and not callable(executor):
        raise TypeError(
            f"{function}: executor has type {type(executor).__name__}, expected a concurrent.futures.Executor, "
            "a callable that makes one, or None"
        )
