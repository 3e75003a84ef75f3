"""Prioritised experience replay: balancing a pole by deep Q-learning, replay uniform against prioritised.

A Q-network in NumPy (Mnih et al. 2015, with double Q-learning, van Hasselt et al. 2016) learns CartPole-v1 from a
memory of transitions. Prioritised replay (Schaul et al. 2016) draws a transition in proportion to
(|TD error| + 0.01)^alpha, kept in a SumTree, and weighs its gradient by (N p)^-beta to undo the bias; with alpha = 0
that is uniform replay, so both run the same code. Several seeds each; prints the returns, and draws their curves.

    python examples/prioritized_replay.py --seeds 5 --steps 10000 --png returns.png
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

try:
    import gymnasium
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"prioritized_replay: {error}; this example needs: pip install '.[queues]'")

import foveal
from command_line import output_file, positive

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    alpha: float  # 0: uniform
    steps: int
    beta: float = 0.4  # rises to 1 over the run
    capacity: int = 10_000
    batch: int = 64
    discount: float = 0.99
    hidden: int = 64
    learning_rate: float = 1e-3
    begin_at: int = 500  # steps before the first batch
    explore: float = 0.3  # of the steps; the fraction of random actions falls to 0.05 meanwhile
    copy_every: int = 250  # steps; to the network that the targets come from


# ---- the network -----------------------------------------------------------------------------------------------------


class QNetwork:
    """Two hidden layers of rectifiers; the values of all actions, (n, actions), of states (n, features)."""

    def __init__(self, sizes: list[int], learning_rate: float, rng: np.random.Generator) -> None:
        self.parameters: list[Floats] = []
        for inputs, outputs in itertools.pairwise(sizes):
            self.parameters += [rng.standard_normal((inputs, outputs)) * np.sqrt(2 / inputs), np.zeros(outputs)]
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in self.parameters]
        self.learning_rate = learning_rate
        self.updates = 0

    def __call__(self, states: Floats) -> Floats:
        return self._layers(states)[-1]

    def _layers(self, states: Floats) -> list[Floats]:
        layers = [states]
        for i in range(0, len(self.parameters), 2):
            x = layers[-1] @ self.parameters[i] + self.parameters[i + 1]
            layers.append(x if i + 2 == len(self.parameters) else np.maximum(x, 0))
        return layers

    def descend(self, states: Floats, slopes: Floats) -> None:
        """One step of Adam (Kingma and Ba 2015) against `slopes`, the derivative of the loss by the values."""
        layers = self._layers(states)
        gradients: list[Floats] = []
        for i in range(len(self.parameters) - 2, -1, -2):
            inputs = layers[i // 2]
            gradients[:0] = [inputs.T @ slopes, slopes.sum(axis=0)]
            slopes = (slopes @ self.parameters[i].T) * (inputs > 0)
        self.updates += 1
        rate = self.learning_rate * np.sqrt(1 - 0.999**self.updates) / (1 - 0.9**self.updates)
        for parameter, (mean, square), gradient in zip(self.parameters, self.moments, gradients, strict=True):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            parameter -= rate * mean / (np.sqrt(square) + 1e-8)

    def copy_from(self, other: QNetwork) -> None:
        for mine, theirs in zip(self.parameters, other.parameters, strict=True):
            mine[:] = theirs


# ---- the memory ------------------------------------------------------------------------------------------------------


class Memory:
    """The last `capacity` transitions, and how much each is worth another look."""

    def __init__(self, capacity: int, features: int, alpha: float) -> None:
        self.states, self.next_states = np.zeros((capacity, features)), np.zeros((capacity, features))
        self.actions = np.zeros(capacity, np.int64)
        self.rewards, self.goes_on = np.zeros(capacity), np.zeros(capacity)
        self.tree = foveal.SumTree(capacity)
        self.alpha = alpha
        self.added = 0
        self.largest = 1.0  # a new transition is as likely as any, until its error is known

    def __len__(self) -> int:
        return min(self.added, self.tree.capacity)

    def add(self, state: Floats, action: int, reward: float, next_state: Floats, goes_on: bool) -> None:
        place = self.added % self.tree.capacity
        self.states[place], self.next_states[place] = state, next_state
        self.actions[place], self.rewards[place], self.goes_on[place] = action, reward, goes_on
        self.tree[place] = self.largest
        self.added += 1

    def sample(self, count: int, beta: float, rng: np.random.Generator) -> tuple[Ids, Floats]:
        """Return ids, one from each of `count` equal shares of the total, and what their gradients count."""
        ids, probabilities = self.tree.sample(count, rng=rng, stratified=True)
        weights = (len(self) * probabilities) ** -beta
        return ids, weights / weights.max()

    def learned(self, ids: Ids, errors: Floats) -> None:
        weights = (np.abs(errors) + 0.01) ** self.alpha
        self.tree.update_many(ids, weights)
        self.largest = max(self.largest, float(weights.max()))


# ---- learning --------------------------------------------------------------------------------------------------------


def learn(settings: Settings, seed: int, progress: Callable[[], object] = lambda: None) -> list[tuple[int, float]]:
    """Play and learn; returns the step at which each episode ended, and its return."""
    rng = np.random.default_rng(seed)
    environment = gymnasium.make("CartPole-v1")
    state, _ = environment.reset(seed=seed)
    actions = int(environment.action_space.n)  # type: ignore[attr-defined]
    sizes = [len(state), settings.hidden, settings.hidden, actions]
    network, target = (QNetwork(sizes, settings.learning_rate, rng) for _ in range(2))
    target.copy_from(network)
    memory = Memory(settings.capacity, len(state), settings.alpha)
    episodes: list[tuple[int, float]] = []
    total = 0.0
    for step in range(settings.steps):
        exploring = max(0.05, 1 - 0.95 * step / (settings.explore * settings.steps))
        random = rng.random() < exploring
        action = int(rng.integers(actions)) if random else int(network(state[None]).argmax())
        next_state, reward, ended, cut_off, _ = environment.step(action)
        memory.add(state, action, float(reward), next_state, not ended)  # what is cut off would have gone on
        state, total = next_state, total + float(reward)
        if ended or cut_off:
            episodes.append((step, total))
            (state, _), total = environment.reset(), 0.0
        if step >= settings.begin_at:
            beta = settings.beta + (1 - settings.beta) * step / settings.steps
            learn_from_batch(network, target, memory, settings, beta, rng)
        if step % settings.copy_every == 0:
            target.copy_from(network)
        progress()
    environment.close()
    return episodes


def learn_from_batch(
    network: QNetwork, target: QNetwork, memory: Memory, settings: Settings, beta: float, rng: np.random.Generator
) -> None:
    ids, weights = memory.sample(settings.batch, beta, rng)
    row, states, next_states = np.arange(len(ids)), memory.states[ids], memory.next_states[ids]
    chosen = network(next_states).argmax(axis=1)
    future = target(next_states)[row, chosen] * memory.goes_on[ids]
    errors = network(states)[row, memory.actions[ids]] - (memory.rewards[ids] + settings.discount * future)
    slopes = np.zeros((len(ids), network.parameters[-1].size))
    slopes[row, memory.actions[ids]] = weights * np.clip(errors, -1, 1) / len(ids)  # Huber's loss
    network.descend(states, slopes)
    memory.learned(ids, errors)


# ---- the report ------------------------------------------------------------------------------------------------------


def curve(episodes: list[tuple[int, float]], steps: int, window: int = 10) -> Floats:
    """The mean return of the last `window` episodes that had ended by each of 100 moments of the run."""
    ends, returns = np.array(episodes).T
    count = np.searchsorted(ends, np.linspace(0, steps, 101)[1:])
    return np.array([returns[max(0, c - window) : c].mean() if c else np.nan for c in count])


def draw(curves: dict[str, Floats], steps: int, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    moments = np.linspace(0, steps, 101)[1:]
    for name, of_seeds in curves.items():
        (line,) = axes.plot(
            moments, np.nanmean(of_seeds, axis=0), label=f"{name}, mean over seeds (of {len(of_seeds)})"
        )
        low, high = np.nanmin(of_seeds, axis=0), np.nanmax(of_seeds, axis=0)
        axes.fill_between(moments, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel("steps")
    axes.set_ylabel("return of the last 10 episodes (shaded: lowest to highest seed)")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8000, help="of each run (default: %(default)s)")
    parser.add_argument("--png", type=output_file, metavar="FILE", help="draw the curves")
    options = parser.parse_args()
    if options.steps < 1000:
        parser.error(f"--steps is {options.steps}, expected at least 1000")

    kinds = {"uniform": 0.0, "prioritised": 0.6}
    curves: dict[str, Floats] = {}
    with tqdm(total=len(kinds) * options.seeds * options.steps, unit=" steps", mininterval=1) as bar:
        for name, alpha in kinds.items():
            bar.set_description(name)
            runs = [learn(Settings(alpha, options.steps), seed, bar.update) for seed in range(options.seeds)]
            curves[name] = np.array([curve(run, options.steps) for run in runs])
    for name, of_seeds in curves.items():
        over_the_run, at_the_end = np.nanmean(of_seeds, axis=1), of_seeds[:, -1]
        print(
            f"{name:>11}: return {over_the_run.mean():5.1f} over the run (seeds {over_the_run.min():.0f} to "
            f"{over_the_run.max():.0f}), {at_the_end.mean():5.1f} at its end ({at_the_end.min():.0f} to "
            f"{at_the_end.max():.0f})"
        )
    if options.png:
        draw(curves, options.steps, options.png)
        print(f"drawn: {options.png}")


if __name__ == "__main__":
    main()
