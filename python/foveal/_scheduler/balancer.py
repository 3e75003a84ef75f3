"""TaskBalancer: the weights of the losses in multi-task learning, from how the losses move.

Two rules, both with averages that forget and the scheduler's softmax and floor:

- "rate", Dynamic Weight Average (Liu, Johns & Davison, CVPR 2019): a task whose loss goes down more slowly than the
  others' gets more: r_k = loss_k(t) / loss_k(t-1), weights = K softmax(r / T). With ``ema=1`` and ``floor=0`` it is
  theirs.
- "difficulty", Dynamic Task Prioritization (Guo et al., ECCV 2018): a task that is solved worse gets more, by the focal
  term of its key performance indicator kappa in (0, 1], like accuracy: w_k ~ -(1 - kappa_k)^gamma log kappa_k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from foveal._scheduler.checks import check_range, text_of
from foveal._scheduler.shares import Floats, narrowed, softmax, with_floor

_RULES = ("rate", "difficulty")
_LEAST_KPI = 1e-6  # below, the weight of a task that is not solved at all would have no bound


class TaskBalancer:
    """Gives weights to the losses of several tasks: :meth:`update` once an epoch, or every so many steps.

    Parameters
    ----------
    rule : {"rate", "difficulty"}
        "rate": more for losses that fall more slowly (Liu 2019). "difficulty": more for tasks with a lower indicator
        (Guo 2018); :meth:`update` then wants `kpis`.
    temperature : float
        Of the softmax of "rate", above 0, default 2; higher shares more evenly.
    breadth : float, optional
        Of "rate": how many tasks share the weight, as exp(entropy), instead of a temperature.
    gamma : float
        Of "difficulty", at least 0, default 1: higher takes more from what is nearly solved.
    ema : float
        Above 0, up to 1: how far an average moves towards a new loss, or indicator.
    floor : float
        From 0 to 1: the part of the weight that is shared evenly, so that no task is given up.

    Examples
    --------
    >>> import foveal
    >>> balancer = foveal.TaskBalancer(ema=1.0)
    >>> balancer.update([2.0, 8.0])  # nothing to compare with yet
    array([1., 1.])
    >>> balancer.update([1.0, 8.0]).round(3)  # the first has halved, the second stands still
    array([0.882, 1.118])
    """

    def __init__(
        self,
        rule: Literal["rate", "difficulty"] = "rate",
        *,
        temperature: float | None = None,
        breadth: float | None = None,
        gamma: float | None = None,
        ema: float = 0.3,
        floor: float = 0.05,
    ) -> None:
        if rule not in _RULES:
            raise ValueError(f"TaskBalancer: rule is {text_of(rule)}, expected 'rate' or 'difficulty'")
        of_rate = {"temperature": temperature, "breadth": breadth}
        for name, value in {"gamma": gamma}.items() if rule == "rate" else of_rate.items():
            if value is not None:
                raise ValueError(f"TaskBalancer: {name} is {text_of(value)}, expected none with the rule {rule!r}")
        if breadth is not None and temperature is not None:
            raise ValueError(
                "TaskBalancer: breadth and temperature are both given, expected one: breadth solves for it"
            )
        check_range("TaskBalancer", "temperature", 2.0 if temperature is None else temperature, above=0.0)
        if breadth is not None:
            check_range("TaskBalancer", "breadth", breadth, 1.0)
        gamma = 1.0 if gamma is None else gamma
        check_range("TaskBalancer", "gamma", gamma, 0.0)
        check_range("TaskBalancer", "ema", ema, 0.0, 1.0, above=0.0)
        check_range("TaskBalancer", "floor", floor, 0.0, 1.0)
        self._rule, self._breadth, self._gamma, self._ema, self._floor = rule, breadth, gamma, ema, floor
        self._temperature = 2.0 if temperature is None else temperature
        self._names: list[Any] | None = None
        self._losses: Floats | None = None  # averages
        self._kpis: Floats | None = None

    def update(self, losses: Any, *, kpis: Any = None) -> Any:
        """Take note of the tasks' losses and give their weights, which sum to the number of tasks.

        Parameters
        ----------
        losses : array, torch.Tensor, sequence (K,) of numbers or 0-d tensors, or dict of them
            At least 0 and finite; the same tasks every time. Gradients are left alone.
        kpis : the same, optional
            Of "difficulty": indicators from 0 to 1, where 1 is solved.

        Returns
        -------
        weights
            float64 array (K,); of tensors a tensor on their device, with no gradient, of their dtype, or float32 where
            that is of integers; of a dict a dict of floats.

        Raises
        ------
        ValueError
            A loss is negative, NaN or infinite; the tasks are not those of the first time; "difficulty" without `kpis`,
            or "rate" with them.
        TypeError
            The losses are no numbers.
        """
        if self._rule == "rate" and kpis is not None:
            raise ValueError("TaskBalancer.update: kpis are given, expected none with the rule 'rate'")
        names, values = _numbers("losses", losses)
        if not ((values >= 0) & (values < np.inf)).all():
            raise ValueError(f"TaskBalancer.update: losses are {values}, expected finite numbers of at least 0")
        self._check_tasks("losses", names, len(values))
        if self._rule == "difficulty":
            if kpis is None:
                raise ValueError("TaskBalancer.update: kpis is None, expected indicators from 0 to 1 for 'difficulty'")
            kpi_names, indicators = _numbers("kpis", kpis)
            self._check_tasks("kpis", kpi_names, len(indicators))
            if not ((indicators >= 0) & (indicators <= 1)).all():
                raise ValueError(f"TaskBalancer.update: kpis are {indicators}, expected 0 to 1")
            self._kpis = self._average(self._kpis, indicators)
            shares = self._by_difficulty(self._kpis)
        else:
            before, self._losses = self._losses, self._average(self._losses, values)
            shares = self._by_rate(before, self._losses)
        return _like(losses, names, len(shares) * with_floor(shares, self._floor))

    def state_dict(self) -> dict[str, Any]:
        """Give what the balancer has learned, for a checkpoint: the rule, the tasks' names, the averages."""
        averages = {"losses": self._losses, "kpis": self._kpis}
        state = {"rule": self._rule, "names": self._names}
        return state | {k: None if v is None else v.tolist() for k, v in averages.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, of a balancer with the same rule.

        Raises
        ------
        ValueError
            It is of another rule, or not what :meth:`state_dict` gives; the balancer stays as it is.
        """
        at = "TaskBalancer.load_state_dict: state"
        if not isinstance(state, Mapping) or set(state) != {"rule", "names", "losses", "kpis"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"{at} has {found}, expected rule, names, losses, kpis")
        if state["rule"] != self._rule:
            raise ValueError(f"{at}['rule'] is {text_of(state['rule'])}, expected {self._rule!r}")
        names = state["names"]
        if names is not None and (not isinstance(names, list) or not names):
            raise ValueError(f"{at}['names'] is {text_of(names)}, expected a list, or None")
        averages: list[Floats | None] = []
        for name, highest in (("losses", np.finfo(np.float64).max), ("kpis", 1.0)):
            if state[name] is None:
                averages.append(None)
                continue
            try:
                average = np.array(state[name], np.float64)
            except (TypeError, ValueError, OverflowError):
                average = np.empty(0)
            count = 0 if names is None else len(names)
            if not count or average.shape != (count,) or not ((average >= 0) & (average <= highest)).all():
                raise ValueError(
                    f"{at}[{name!r}] is {text_of(state[name])}, expected {count} numbers, 0 to {highest:g}"
                )
            averages.append(average)
        self._names = None if names is None else list(names)
        self._losses, self._kpis = averages

    def __repr__(self) -> str:
        """Say how it was made, and of which tasks it knows."""
        if self._rule == "difficulty":
            how = f"gamma={self._gamma:g}"
        elif self._breadth is not None:
            how = f"breadth={self._breadth:g}"
        else:
            how = f"temperature={self._temperature:g}"
        tasks = "no tasks yet" if self._names is None else f"{len(self._names)} tasks"
        return f"<TaskBalancer: {self._rule}, {how}, ema={self._ema:g}, floor={self._floor:g}, {tasks}>"

    def _by_rate(self, before: Floats | None, now: Floats) -> Floats:
        if before is None:
            return np.full(len(now), 1 / len(now))
        with np.errstate(all="ignore"):  # a huge multiple of a loss that was next to nothing
            rates = np.divide(now, before, out=np.ones_like(now), where=before > 0)
        rates = np.minimum(rates, np.finfo(np.float64).max / 4)
        return softmax(rates, self._temperature if self._breadth is None else narrowed(self._breadth, rates))

    def _by_difficulty(self, kpis: Floats) -> Floats:
        kappa = np.clip(kpis, _LEAST_KPI, 1.0)
        with np.errstate(all="ignore"):  # what underflows is nothing
            focal = -((1 - kappa) ** self._gamma) * np.log(kappa)
            total = float(focal.sum())
            return focal / total if total > 0 else np.full(len(kpis), 1 / len(kpis))

    def _average(self, average: Floats | None, new: Floats) -> Floats:
        with np.errstate(all="ignore"):
            return new.copy() if average is None else average + self._ema * (new - average)

    def _check_tasks(self, argument: str, names: list[Any], count: int) -> None:
        if self._names is None:
            if not count:
                raise ValueError(f"TaskBalancer.update: {argument} is empty, expected at least one")
            self._names = names
        if names != self._names:
            raise ValueError(f"TaskBalancer.update: {argument} are of tasks {names}, expected {self._names}")


def _numbers(argument: str, values: Any) -> tuple[list[Any], Floats]:
    """Give the tasks' names (their numbers, where they have none) and the values."""
    names = list(values) if isinstance(values, Mapping) else None
    if isinstance(values, Mapping):
        values = list(values.values())
    if hasattr(values, "tolist"):  # at once: a tensor's elements one by one may each cost a trip to a device
        values = values.tolist()
    try:
        numbers = np.array([float(value.item() if hasattr(value, "item") else value) for value in values], np.float64)
    except OverflowError:
        raise ValueError(f"TaskBalancer.update: {argument} are {text_of(values)}, expected finite numbers") from None
    except (TypeError, ValueError):
        raise TypeError(
            f"TaskBalancer.update: {argument} has type {type(values).__name__}, expected K numbers: an array, "
            "a tensor, a sequence or a dict"
        ) from None
    return list(range(len(numbers))) if names is None else names, numbers


def _like(given: Any, names: list[Any], weights: Floats) -> Any:
    """Give the weights as the losses were given."""
    if isinstance(given, Mapping):
        return dict(zip(names, weights.tolist(), strict=True))
    first = given[0] if isinstance(given, Sequence) else given
    if not hasattr(first, "new_tensor"):
        return weights
    like = first if first.is_floating_point() else first.float()
    return like.new_tensor(weights.tolist()).detach()
