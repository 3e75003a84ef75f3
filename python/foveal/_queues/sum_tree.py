"""SumTree: the native half draws and adds up; here are scores, of which the weights are exponentials."""

from __future__ import annotations

import copyreg
import math
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from foveal import _core

if TYPE_CHECKING:
    from numpy.typing import NDArray

TreeT = TypeVar("TreeT", bound="SumTree")

_HEADROOM = 300.0  # how far the logarithm of the largest weight may be from 0: float64 holds exp(-708) to exp(709)


class SumTree(_core.SumTree):
    """Sampling in proportion to weights that change, as in prioritised replay.

    Ids 0 .. capacity-1 have weights, all 0 at first. Setting one and drawing one take O(log capacity). A sum is always
    computed anew from what it is the sum of, so that rounding does not accumulate, however many updates there are: the
    tree is bit for bit the one that would be built from its weights at once.

    Any number of threads may use it; one at a time does. Batches release the GIL, from 128 elements on.

    Parameters
    ----------
    capacity : int
        1 to 2**32. About 8.6 bytes each.

    Raises
    ------
    IndexError
        An id is not in range(capacity).
    ValueError
        A weight is negative, NaN, so large that sums could overflow (infinity too), or an integer that float64 cannot
        hold (some beyond 2**53); in a batch nothing is changed.
    TypeError
        In batches: ids are not int32 or int64, weights not float32 or float64.

    References
    ----------
    Wong and Easton 1980, "An efficient method for weighted sampling without replacement". Schaul et al. 2016,
    "Prioritized experience replay".

    Examples
    --------
    >>> import numpy as np
    >>> from foveal import SumTree
    >>> tree = SumTree(1000)
    >>> tree[3] = 1.0
    >>> tree.update_many([10, 20], [2.0, 5.0])
    >>> tree.total
    8.0
    >>> ids, probabilities = tree.sample(3, rng=np.random.default_rng(0), replace=False)
    >>> sorted(ids.tolist())
    [3, 10, 20]
    """

    __slots__ = ("__weakref__", "_lock", "_logs", "_offset", "_temperature")

    def __new__(cls: type[TreeT], capacity: int, *arguments: Any, **keywords: Any) -> TreeT:
        return super().__new__(cls, capacity)  # the others are for the __init__ of a subclass

    def __init__(self, capacity: int) -> None:
        self._begin(None, 0.0, None)

    def _begin(self, logs: NDArray[np.float64] | None, offset: float, temperature: float | None) -> None:
        self._logs = logs  # score / temperature of each id
        self._offset = offset  # what is subtracted from them before exp
        self._temperature = temperature
        self._lock = threading.Lock()
        _trees[id(self)] = self

    def update_scores(self, ids: Any, scores: Any, *, temperature: float = 1.0) -> None:
        """Set weights to exp(score / temperature), up to a factor that all have in common.

        The factor follows the highest score, so that nothing overflows or vanishes, however high the scores are and
        wherever they go: all weights are computed anew, O(capacity), when the highest has moved by 300 temperatures.
        A score that is 400 temperatures or more below the highest may have weight 0 meanwhile. Needs 8 bytes an id
        more. Weights that were set otherwise are not kept: use one or the other in a tree.

        Parameters
        ----------
        ids : (n,) int32 or int64
            Of duplicates the last counts.
        scores : (n,) floating
            -infinity: weight 0.
        temperature : float
            Positive, the same in every call.

        Raises
        ------
        ValueError
            A score is NaN, infinity, or an integer that float64 cannot hold (some beyond 2**53); the temperature is not
            positive, or not that of the scores before.

        Examples
        --------
        >>> import numpy as np
        >>> from foveal import SumTree
        >>> tree = SumTree(3)
        >>> tree.update_scores([0, 1], [1e6, 1e6 + 1])
        >>> tree.update_scores([2], [2e6])  # far above the others
        >>> tree.update_scores([2], [1e6])
        >>> (tree.weights() / tree.total).round(3)
        array([0.212, 0.576, 0.212])
        """
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"SumTree.update_scores: temperature is {temperature}, expected a positive number")
        temperature = float(temperature)
        scores = tuple(scores) if isinstance(scores, list) else scores  # so that what is checked is what was read
        array = np.asarray(scores)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"SumTree.update_scores: scores has dtype {array.dtype}, expected a floating one")
        _core.check_not_rounded("SumTree.update_scores", "scores", scores, array)
        with np.errstate(over="ignore"):
            new = array.astype(np.float64) / temperature
        if not (new < math.inf).all() or (np.isinf(new) & (array != -math.inf)).any():
            raise ValueError(
                f"SumTree.update_scores: scores hold nan or inf (as they are or over {temperature}), expected numbers"
            )
        with self._lock, np.errstate(over="ignore"):  # to -infinity: the weight is 0
            if self._temperature not in (None, temperature):
                raise ValueError(
                    f"SumTree.update_scores: temperature is {temperature}, expected {self._temperature} (from before)"
                )
            above = new - self._offset
            # Checks ids and shapes too, before anything is kept. Whoever samples meanwhile finds the highest heaviest.
            super().update_many(ids, np.exp(np.minimum(above, _HEADROOM)))
            first = self._logs is None
            logs = np.full(self.capacity, -math.inf) if self._logs is None else self._logs
            logs[np.asarray(ids, np.int64)] = new
            self._logs, self._temperature = logs, temperature
            if first or (above > _HEADROOM).any() or self.total < math.exp(-_HEADROOM):
                self._weigh_anew(logs)

    def _weigh_anew(self, logs: NDArray[np.float64]) -> None:
        self._offset = float(np.nan_to_num(logs.max(), neginf=0.0))
        with np.errstate(over="ignore"):
            super().update_many(np.arange(self.capacity), np.exp(logs - self._offset))

    def copy(self: TreeT) -> TreeT:
        """Return another tree with the same weights."""
        other = type(self).__new__(type(self), self.capacity)
        other.__setstate__(self.__getstate__())
        return other

    __copy__ = copy

    def __repr__(self) -> str:
        """Show the size and the total."""
        return f"<foveal.{type(self).__name__}: total {self.total!r} of {self.capacity} ids>"

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), self.capacity), self.__getstate__()  # type: ignore[attr-defined]

    def __getstate__(self) -> tuple[Any, ...]:
        with self._lock:
            attributes = getattr(self, "__dict__", None)  # of a subclass
            return self.weights(), self._logs, self._offset, self._temperature, attributes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        match state:
            case (
                weights,
                (None | np.ndarray()) as logs,
                float() as offset,
                (None | float()) as temperature,
                (None | dict()) as attributes,
            ) if (logs is None or (logs.dtype, logs.shape) == (np.float64, (self.capacity,))) and (
                attributes is None or hasattr(self, "__dict__")
            ):
                super().update_many(np.arange(self.capacity), weights)
                self._begin(None if logs is None else logs.copy(), offset, temperature)
                if attributes:
                    self.__dict__.update(attributes)
            case _:
                parts = "(weights, logs, offset, temperature, attributes)"
                raise TypeError(f"SumTree.__setstate__: state is {state!r}, expected {parts}")


_trees: weakref.WeakValueDictionary[int, SumTree] = weakref.WeakValueDictionary()


def _mend_after_fork() -> None:
    """In the child: a tree's lock may be held by a thread that is not there, in the middle of its work."""
    for tree in list(_trees.values()):
        if tree._lock.locked():
            tree._lock = threading.Lock()
            if tree._logs is not None:
                tree._weigh_anew(tree._logs)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mend_after_fork)
