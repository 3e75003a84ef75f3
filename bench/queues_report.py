"""Measures the rows on the queues in docs/benchmarks.md: python bench/queues_report.py [--rows TEXT ...] [--quick].

Each row (queue_rows.py) first checks that foveal and its peers (queue_peers.py), after the same calls, hand out the
same in the same order; then they take turns within this process (foveal/_bench/measure.py). Peers that are not
installed are left out.
With --out, writes queues.md and queues.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import itertools
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

import foveal
from foveal._bench.show import Row, markdown
from queue_peers import PEERS, IndexedHeap, PriorityMap
from queue_rows import (
    BATCH,
    SAMPLE,
    WAITING,
    async_getters_row,
    async_queue_row,
    loop_row,
    magnitude,
    queue_row,
    sum_tree_row,
    two_threads_row,
    update_many_row,
)


@dataclass(frozen=True)
class Measurement:
    """A row to be, the label that the table will print, and the aims for it: how many times faster than a peer."""

    group: str
    label: str
    measure: Callable[[str, float], Row]  # (label, seconds to spend on each contender)
    aims: dict[str, float] = dataclasses.field(default_factory=dict)

    def missed(self, row: Row) -> list[str]:
        return [
            f"{row.label}: {row.ratios[peer].median:.2f} times {peer}, aim {aim:g}"
            for peer, aim in self.aims.items()
            if peer in row.ratios and row.ratios[peer].median < aim
        ]


def measurements() -> Iterator[Measurement]:
    sizes = (1000, 100_000, 1_000_000)
    for n, work in itertools.product(sizes, ("update", "pop+push")):
        measure = functools.partial(loop_row, IndexedHeap, work, "int", n)
        label = f"IndexedHeap {work}, int keys, {magnitude(n)}"
        yield Measurement("one call an element", label, measure, {"pqdict": 10.0})
    for kind, n, (work, aim) in itertools.product(("int", "str"), sizes, (("update", 2.5), ("pop+push", 5.0))):
        measure = functools.partial(loop_row, PriorityMap, work, kind, n)
        label = f"PriorityMap {work}, {kind} keys, {magnitude(n)}"
        yield Measurement("one call an element", label, measure, {"pqdict": aim} if kind == "str" else {})
    for n in sizes:
        aims = {"C++ loop": 0.8, **dict.fromkeys(PEERS, 20.0)} if n == 100_000 else {}
        label = f"update_many of {BATCH}, {magnitude(n)}"
        yield Measurement("batches", label, functools.partial(update_many_row, n), aims)
    label = f"update_many in 2 threads, {magnitude(1_000_000)}"
    yield Measurement("threads", label, functools.partial(two_threads_row, 1_000_000), {"one thread": 1.7})
    yield Measurement("queues that block", f"PriorityQueue put+get, {magnitude(WAITING)}", queue_row)
    label = f"AsyncPriorityQueue put+get, {magnitude(WAITING)}"
    yield Measurement("queues that block", label, async_queue_row, {"asyncio.PriorityQueue": 1.0})
    for maxsize, getters, label in ((1, 1, "hand-off, maxsize=1"), (0, 20, "20 waiting getters")):
        measure = functools.partial(async_getters_row, maxsize, getters)
        aims = {"asyncio.PriorityQueue": 1 / 1.3}
        yield Measurement("queues that block", f"AsyncPriorityQueue {label}", measure, aims)
    for (work, aim), n in itertools.product((("update_many", 1.0), ("sample", 1.5)), (10_000, 1_000_000)):
        label = f"SumTree.{work} of {SAMPLE}, {magnitude(n)}"
        yield Measurement("sampling", label, functools.partial(sum_tree_row, work, n), {"torchrl": aim, "cpprb": aim})


def machine() -> dict[str, object]:
    versions = {}
    for name in ("numpy", "pqdict", "HeapDict", "cpprb", "torchrl"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    processor = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        processor = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())[0]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "foveal": foveal.__version__,
        **versions,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def report(rows: dict[str, list[Row]], missed: Sequence[str], described: dict[str, object]) -> str:
    parts = [markdown(of_group, group) for group, of_group in rows.items()]
    parts.append("\n".join(f"- {name}: {value}" for name, value in described.items()))
    if missed:
        parts.append("Short of the aim:\n\n" + "\n".join(f"- {line}" for line in missed))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows", nargs="+", metavar="TEXT", help="only rows whose group or label contains one of these"
    )
    parser.add_argument("--quick", action="store_true", help="a third of a second for each contender instead of three")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write queues.json and queues.md there")
    options = parser.parse_args()
    chosen = [m for m in measurements() if not options.rows or any(t in f"{m.group}: {m.label}" for t in options.rows)]
    if options.list:
        print("\n".join(f"{m.group}: {m.label}" for m in chosen))
        return
    if not chosen:
        parser.error(f"no row contains any of {options.rows}; --list prints them")
    rows: dict[str, list[Row]] = {}
    missed = []
    for m in tqdm(chosen, bar_format="{l_bar}{bar}| {elapsed}<{remaining}"):
        measured = m.measure(m.label, 0.33 if options.quick else 3.0)
        rows.setdefault(m.group, []).append(measured)
        missed += m.missed(measured)
        gc.collect()
    described = machine()
    text = report(rows, missed, described)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        tables = {group: [dataclasses.asdict(row) for row in of_group] for group, of_group in rows.items()}
        stored = {"machine": described, "rows": tables, "missed": missed}
        (options.out / "queues.json").write_text(json.dumps(stored, indent=1, default=str) + "\n")
        (options.out / "queues.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
