"""Scores to shares: softmax with a floor, the temperature for an asked breadth, and whole shares that sum exactly.

The share of task i is ``floor/n + (1 - floor) * softmax(score / temperature)_i``. Its breadth, exp(entropy), is the
number of tasks that the softmax really divides its attention among (perplexity; Jelinek et al. 1977).
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foveal._scheduler.checks import text_of

Floats = NDArray[np.float64]
Policy = Literal["credit", "sample", "strict"]

# The temperature is looked for from the smallest gap/_NARROW, where the weight beside it vanishes, to the largest times
# _WIDE, where the weights differ by less than their rounding.
_NARROW, _WIDE = 1e3, 1e9
_WEIGHT_BITS = 62
_LARGE = 1e295  # scores above are scaled down, that neither a difference nor a temperature overflows


def softmax(scores: Floats, temperature: float) -> Floats:
    """Softmax of scores/temperature; a temperature of 0 shares evenly among the largest."""
    scaled = scores - scores.max(initial=-math.inf)
    with np.errstate(all="ignore"):  # what underflows is nothing
        weights: Floats = np.exp(scaled / temperature) if temperature > 0 else (scaled == 0).astype(np.float64)
        weights /= weights.sum()
    return weights


def with_floor(shares: Floats, floor: float) -> Floats:
    """Give every task floor/n, and the rest in proportion to `shares`."""
    return floor / len(shares) + (1 - floor) * shares if len(shares) else shares


def largest_remainder(budget: int, shares: Floats) -> list[int]:
    """Divide `budget` into whole shares that sum to it, each its quota rounded down or up (Hamilton's method).

    Integer arithmetic throughout, so the sum is exact for budgets of any size. Equal remainders: the first gets it.
    """
    weights = [int(x) for x in np.ldexp(shares, _WEIGHT_BITS)]
    total = sum(weights)
    wholes, remainders = [], []
    for weight in weights:
        whole, remainder = divmod(budget * weight, total)
        wholes.append(whole)
        remainders.append(remainder)
    left = budget - sum(wholes)
    for i in sorted(range(len(weights)), key=remainders.__getitem__, reverse=True)[:left]:
        wholes[i] += 1
    return wholes


@overload
def temperature_for_breadth(scores_or_qk: tuple[Any, Any], breadth: ArrayLike) -> Any: ...
@overload
def temperature_for_breadth(scores_or_qk: ArrayLike, breadth: ArrayLike) -> Any: ...
def temperature_for_breadth(scores_or_qk: Any, breadth: ArrayLike) -> Any:
    """Give the temperature T at which softmax(scores / T) has the asked breadth, exp(entropy).

    Breadth 1 is one task or key alone, breadth n all n alike; it grows with the temperature.

    Parameters
    ----------
    scores_or_qk : array (..., n), or pair (q, k) of arrays (..., d), (..., n, d)
        The scores, finite or -inf for what is masked; of a pair the scores are ``q . k / sqrt(d)``.
    breadth : float or array that broadcasts to (...)
        At least the number of scores tied for the largest, at most the number of finite scores.

    Returns
    -------
    float, or array (...)
        inf where all finite scores are to be alike, 0.0 where only the largest are to count.

    Raises
    ------
    ValueError
        No temperature gives that breadth; a score is NaN or +inf.

    Examples
    --------
    >>> import numpy as np, foveal
    >>> scores = np.array([3.0, 1.0, 0.0, -2.0])
    >>> temperature = foveal.temperature_for_breadth(scores, 2.0)
    >>> p = np.exp(scores / temperature)
    >>> p /= p.sum()
    >>> round(float(np.exp(-(p * np.log(p)).sum())), 6)
    2.0
    """
    if isinstance(scores_or_qk, tuple) and len(scores_or_qk) == 2 and np.ndim(scores_or_qk[1]) >= 2:
        q, k = (_floats(name, x) for name, x in zip("qk", scores_or_qk, strict=True))
        if q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"temperature_for_breadth: k.shape[-1] is {k.shape[-1]}, expected head_dim {q.shape[-1]} (from q)"
            )
        with np.errstate(all="ignore"):
            scores = np.einsum("...d,...nd->...n", q, k) / math.sqrt(q.shape[-1])
    else:
        scores = _floats("scores", scores_or_qk)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(f"temperature_for_breadth: scores have shape {scores.shape}, expected at least one score")
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise ValueError("temperature_for_breadth: scores hold nan or inf, expected finite scores or -inf")
    asked = _floats("breadth", breadth)
    try:
        asked = np.broadcast_to(asked, scores.shape[:-1])
    except ValueError:
        raise ValueError(
            f"temperature_for_breadth: breadth has shape {asked.shape}, expected one that broadcasts to "
            f"{scores.shape[:-1]} (from the scores)"
        ) from None
    rows = scores.reshape(-1, scores.shape[-1])
    found = np.array([_representable(row, float(b)) for row, b in zip(rows, asked.reshape(-1), strict=True)])
    return float(found[0]) if scores.ndim == 1 else found.reshape(scores.shape[:-1])


def _floats(name: str, value: Any) -> Floats:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        kind = ValueError if isinstance(error, OverflowError) else TypeError
        raise kind(f"temperature_for_breadth: {name} is {text_of(value)}, expected real numbers ({error})") from None


def _representable(scores: Floats, breadth: float) -> float:
    temperature = _solve(scores, breadth)
    finite = scores[scores > -np.inf]
    if temperature == math.inf and breadth < len(finite):
        raise ValueError(
            f"temperature_for_breadth: breadth is {breadth:g} and the scores up to {np.abs(finite).max():g}; expected "
            "one that some float is the temperature for"
        )
    return temperature


def narrowed(breadth: float, scores: Floats) -> float:
    """Give the temperature for `breadth`, or for what comes closest to it among these scores."""
    ties = int((scores == scores.max()).sum())
    return _solve(scores, min(max(breadth, ties), len(scores)))


def _solve(scores: Floats, breadth: float) -> float:
    """Give the temperature for one row of scores; inf also where it is beyond every float."""
    finite = scores[scores > -np.inf]
    halvings = 0 if not len(finite) or np.abs(finite).max() < _LARGE else 40  # so that no gap overflows
    with np.errstate(all="ignore"):  # whatever the user has set: what underflows is nothing
        temperature = math.ldexp(1.0, halvings) * _solve_for_finite(np.ldexp(finite, -halvings), breadth)
    return temperature


def _solve_for_finite(scores: Floats, breadth: float) -> float:
    gaps = scores - scores.max(initial=-math.inf)
    ties, count = int((gaps == 0).sum()), len(gaps)
    if not count or not ties <= breadth <= count:
        raise ValueError(
            f"temperature_for_breadth: breadth is {breadth:g}, expected from {ties} (scores tied for the largest) "
            f"to {count} (finite scores)"
        )
    if breadth == count:
        return math.inf
    if breadth == ties:
        return 0.0
    # The entropy's derivative in log T is the variance of gaps/T, positive: Newton inside a bracket that bisects.
    entropy = math.log(breadth)
    unit = -float(gaps.min())
    gaps /= unit
    low, high = math.log(-gaps[gaps < 0].max() / _NARROW), math.log(_WIDE)
    x = min(max(math.log(np.std(gaps)), low), high)
    for _ in range(200):
        scaled = gaps / math.exp(x)
        weights = np.exp(scaled)
        total = float(weights.sum())
        mean = float(weights @ scaled) / total
        error = math.log(total) - mean - entropy
        if abs(error) <= 1e-13 * max(1.0, entropy):
            break
        low, high = (x, high) if error < 0 else (low, x)
        slope = float(weights @ (scaled * scaled)) / total - mean * mean
        newton = x - error / slope if slope > 0 else math.nan
        x = newton if low < newton < high else (low + high) / 2
        if high - low <= 1e-15 * max(1.0, abs(x)):
            break
    return unit * math.exp(x)
