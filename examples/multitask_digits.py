"""Weights for three losses at once, on scikit-learn's digits: python examples/multitask_digits.py.

One network with a shared hidden layer learns three tasks: which digit it is, whether that is odd, and how much ink
there is, the last with so much noise that most of its loss can never be learned. How should the losses be weighted?

- equal: all the same
- tuned: fixed weights, the best of a grid on the validation part of seeds of their own
- DWA: Dynamic Weight Average (Liu et al. 2019), foveal.TaskBalancer(ema=1, floor=0)
- uncertainty: learned with the network (Kendall et al. 2018)
- rate: foveal.TaskBalancer() as it comes
- difficulty: foveal.TaskBalancer("difficulty"), with the tasks' scores on the validation part

Every method trains from the same start on the same split for each seed. Printed are the means of the test scores, and
how much better than "equal" a method is over the three tasks on the same seed, with 95% confidence intervals
(Student's t).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

import foveal

try:
    import torch
    from scipy.stats import t as student
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.nn import functional
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"multitask_digits: {error}; the example needs: pip install '.[examples]' torch")

TASKS = ("digit", "odd", "ink")
GRID = (0.1, 0.3, 1.0, 3.0)
NOISE = 3.0  # standard deviations of the ink
HIDDEN, BATCH, RATE = 32, 128, 3e-3


@dataclass(frozen=True)
class Part:
    """Images and what is to be known of them: the digit, whether it is odd, and its (noisy) ink."""

    images: torch.Tensor  # (N, 64)
    digits: torch.Tensor  # (N,)
    odd: torch.Tensor
    ink: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, generator: torch.Generator) -> Iterator[Part]:
        for rows in torch.randperm(len(self), generator=generator).split(BATCH):
            yield Part(self.images[rows], self.digits[rows], self.odd[rows], self.ink[rows])


class Network(nn.Module):
    """A hidden layer that all tasks share, and a linear head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, 10), nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.shared(images)
        return [head(hidden) for head in self.heads]

    def losses(self, part: Part) -> torch.Tensor:
        digit, odd, ink = self(part.images)
        return torch.stack(
            [
                functional.cross_entropy(digit, part.digits),
                functional.binary_cross_entropy_with_logits(odd[:, 0], part.odd),
                functional.mse_loss(ink[:, 0], part.ink),
            ]
        )

    @torch.no_grad()
    def scores(self, part: Part, clean_ink: torch.Tensor) -> list[float]:
        """Accuracy, accuracy, and R^2 against the ink without noise."""
        digit, odd, ink = self(part.images)
        wrong = functional.mse_loss(ink[:, 0], clean_ink) / clean_ink.var(correction=0)
        return [
            float((digit.argmax(1) == part.digits).float().mean()),
            float(((odd[:, 0] > 0) == (part.odd > 0)).float().mean()),
            float(1 - wrong),
        ]


class Weighting:
    """How the losses are weighted; this one: by fixed weights."""

    def __init__(self, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        self.weights = torch.tensor(weights)

    def parameters(self) -> list[torch.Tensor]:
        return []

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        return (self.weights * losses).sum()

    def after_epoch(self, losses: torch.Tensor, scores: list[float]) -> None:
        pass


class Balanced(Weighting):
    def __init__(self, rule: Literal["rate", "difficulty"] = "rate", **options: float) -> None:
        super().__init__()
        self.balancer = foveal.TaskBalancer(rule, **options)
        self.wants_kpis = rule == "difficulty"

    def after_epoch(self, losses: torch.Tensor, scores: list[float]) -> None:
        kpis = [max(0.0, score) for score in scores] if self.wants_kpis else None
        self.weights = self.balancer.update(losses, kpis=kpis)


class Uncertainty(Weighting):
    """exp(-s) loss + s/2 for each task, s learned: the homoscedastic uncertainty of Kendall, Gal & Cipolla 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.s = torch.zeros(3, requires_grad=True)

    def parameters(self) -> list[torch.Tensor]:
        return [self.s]

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        return (torch.exp(-self.s) * losses + self.s / 2).sum()


METHODS: dict[str, Callable[[], Weighting]] = {
    "equal": Weighting,
    "DWA": lambda: Balanced(ema=1.0, floor=0.0),
    "uncertainty": Uncertainty,
    "rate": Balanced,
    "difficulty": lambda: Balanced("difficulty"),
}


def split(seed: int) -> tuple[list[Part], list[torch.Tensor]]:
    """Training, validation and test parts, and their ink without noise."""
    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    images, digits = images[order] / 16, digits[order]
    ink = images.mean(axis=1)
    ink = (ink - ink.mean()) / ink.std()
    noisy = ink + NOISE * rng.standard_normal(len(ink))
    arrays = (images, digits % 2, noisy, ink)
    images, odd, noisy, ink = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    bounds = [slice(0, 1000), slice(1000, 1300), slice(1300, None)]
    target = torch.tensor(digits)
    return [Part(images[b], target[b], odd[b], noisy[b]) for b in bounds], [ink[b] for b in bounds]


def train(weighting: Weighting, seed: int, epochs: int) -> tuple[list[float], list[float]]:
    """Give the scores on the validation and on the test part."""
    (training, validation, test), (_, validation_ink, test_ink) = split(seed)
    torch.manual_seed(seed)
    network = Network()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*network.parameters(), *weighting.parameters()], lr=RATE)
    for _ in range(epochs):
        sums, count = torch.zeros(3), 0
        for batch in training.batches(generator):
            losses = network.losses(batch)
            optimizer.zero_grad()
            weighting.total(losses).backward()
            optimizer.step()
            sums += losses.detach()
            count += 1
        weighting.after_epoch(sums / count, network.scores(validation, validation_ink))
    return network.scores(validation, validation_ink), network.scores(test, test_ink)


def tune(seeds: range, epochs: int) -> tuple[float, ...]:
    """The fixed weights, that of the digit being 1, with the best mean score on the validation parts."""
    grid = [(1.0, odd, ink) for odd, ink in itertools.product(GRID, GRID)]
    means = []
    for weights in tqdm(grid, desc="tuning", unit="weights"):
        means.append(np.mean([train(Weighting(weights), seed, epochs)[0] for seed in seeds]))
    return grid[int(np.argmax(means))]


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of the 95% confidence interval."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def plot(results: dict[str, np.ndarray], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, column, title in zip(figure.subplots(1, 4), [0, 1, 2, None], [*TASKS, "mean, minus equal"], strict=True):
        for y, scores in enumerate(results.values()):
            values = scores[:, column] if column is not None else (scores - results["equal"]).mean(axis=1)
            mean, half = interval(values)
            axes.errorbar(mean, y, xerr=half, fmt="o", capsize=3, color=f"C{y}")
        axes.set_yticks(range(len(results)), list(results) if column == 0 else [""] * len(results))
        axes.invert_yaxis()
        axes.set_title(title)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tuning-seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--png", default="multitask_digits.png", help="where the picture goes ('' for none)")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}, expected at least 2: an interval needs two")
    torch.set_num_threads(1)  # the matrices are small
    tuned = tune(range(1000, 1000 + options.tuning_seeds), options.epochs)
    methods = {**METHODS, f"tuned {tuned[1]:g}, {tuned[2]:g}": lambda: Weighting(tuned)}

    found: dict[str, list[list[float]]] = {name: [] for name in methods}
    for seed in tqdm(range(options.seeds), desc="training", unit="seed"):
        for name, make in methods.items():
            found[name].append(train(make(), seed, options.epochs)[1])
    results = {name: np.array(scores) for name, scores in found.items()}

    print(f"\ntest scores, means over {options.seeds} seeds; better than equal by, with 95% confidence intervals")
    print(f"{'':20s}" + "".join(f"{task:>8s}" for task in TASKS) + f"{'mean':>8s}   than equal")
    for name, scores in results.items():
        mean, half = interval((scores - results["equal"]).mean(axis=1))
        by = "" if name == "equal" else f"{mean:+.4f} +- {half:.4f}"
        print(f"{name:20s}" + "".join(f"{x:8.4f}" for x in scores.mean(axis=0)) + f"{scores.mean():8.4f}   {by}")
    if options.png:
        try:
            plot(results, options.png)
        except ImportError as error:
            print(f"no picture: {error}")


if __name__ == "__main__":
    main()
