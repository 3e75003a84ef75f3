"""Measures every row of docs/benchmarks.md: python bench/report.py [--rows TEXT ...] [--processes N] [--out DIR].

Each row first checks the results against each other and a float64 computation, then times foveal and its peers in turn
(foveal/_bench/measure.py), in a fresh process. With --processes, several of them one after another measure every row,
and the worst of their medians is printed, with the range. With --out, the table is written there as report.md, with
report.json and report.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

import foveal
from foveal._bench.compare import cache_nbytes, compare, fma_peak, read_bandwidth, share_of_cores
from foveal._bench.peers import PEERS, left_out
from foveal._bench.show import Row, markdown, plot, ways, worst
from foveal._bench.work import Work
from process_rows import call_overhead, import_time, peak_memory, peak_training_memory, window_against_full
from serving_rows import packed_sequences, paged_decode, paged_int8_decode
from training_rows import train
from whole_model import continue_prompt, encode_passages

Progress = Callable[[float], object]


@dataclass(frozen=True)
class Measurement:
    """A row to be, and the aims for it: times faster than a peer, fraction of the machine's limit, value at most."""

    group: str
    label: str
    measure: Callable[[float, Progress], Row]  # (seconds to spend, progress)
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    limit: float | None = None
    at_most: float | None = None

    def missed(self, row: Row) -> list[str]:
        short = [
            f"{row.ratios[peer].median:.2f} times {peer}, aim {aim:g}"
            for peer, aim in self.times.items()
            if peer in row.ratios and row.ratios[peer].median < aim
        ]
        if self.limit is not None and row.limit is not None and row.limit < self.limit:
            short.append(f"{row.limit:.0%} of the machine, aim {self.limit:.0%}")
        if self.at_most is not None and row.value > self.at_most:
            short.append(f"{row.figure}, aim {self.at_most:g} {row.unit}")
        return short


def attention(
    group: str, work: Work, times: float | None = None, limit: float | None = None, **options: Any
) -> Measurement:
    def measure(budget: float, progress: Progress) -> Row:
        return compare(work, budget=budget, progress=progress, **options)

    return Measurement(group, str(work), measure, {} if times is None else {"torch": times}, limit)


def training(work: Work, times: float) -> Measurement:
    def measure(budget: float, progress: Progress) -> Row:
        return train(work, budget, progress)

    return Measurement("training", f"{work}, forward and backward", measure, {"torch": times})


def measurements() -> list[Measurement]:
    half = itertools.product(("bfloat16", "float16"), ((1024, 64), (4096, 128)), (False, True))
    one_thread = itertools.product((64, 128), (False, True))
    return [
        attention("forward", Work(1, 8, 4096, 64), 1.25, 0.75),
        attention("forward", Work(1, 8, 4096, 64, causal=True), 1.35, 0.70),
        attention("forward", Work(1, 8, 4096, 128), 1.15, 0.83),
        attention("forward", Work(1, 8, 4096, 128, causal=True), 1.3, 0.75),
        *(
            attention("one thread", Work(1, 8, 4096, d, causal=causal), threads=1, peers=["torch"])
            for d, causal in one_thread
        ),
        attention("bert", Work(8, 12, 128, 64), 1.8),
        attention("bert", Work(4, 12, 512, 64), 1.3),
        attention("tiny", Work(32, 12, 32, 32), 2.5),
        attention("tiny", Work(32, 12, 32, 32, causal=True), 2.5),
        *(attention("half", Work(1, 8, s, d, dtype, causal), 1.3) for dtype, (s, d), causal in half),
        attention("one query", Work(1, 8, 1, 64, seqlen_kv=64), 2.0, in_microseconds=True),
        attention(
            "one query", Work(1, 8, 1, 64, seqlen_kv=64), 2.0, in_microseconds=True, tensors=True, peers=["torch"]
        ),
        attention("decode", Work(1, 32, 1, 128, seqlen_kv=4096), 1.0, 0.85),
        attention("decode", Work(1, 32, 1, 128, "bfloat16", seqlen_kv=4096), 6.0, 0.80),
        attention("decode", Work(1, 32, 1, 128, "float16", seqlen_kv=4096), 1.7, 0.80),
        attention("decode", Work(1, 32, 1, 128, "bfloat16", seqlen_kv=16384, kv_heads=4), 6.0, 0.80),
        *(training(Work(1, 8, s, 64, causal=c), 1.5 if c else 1.25) for s in (1024, 4096) for c in (False, True)),
        training(Work(8, 12, 128, 64), 1.3),
        *(training(Work(1, 8, 1024, 64, "bfloat16", causal), 2.0) for causal in (False, True)),
        *(training(Work(1, 8, 1024, 64, "float16", causal), 20.0) for causal in (False, True)),
        Measurement("window", "window", window_against_full, {"own full causal": 10.0}),
        dataclasses.replace(
            attention("numpy", Work(1, 8, 1024, 64), peers=["numpy", "numpy textbook"]), times={"numpy textbook": 5.0}
        ),
        *(
            Measurement(
                "serving",
                f"packed sequences {dtype}",
                functools.partial(packed_sequences, dtype=dtype),
                {"torch padded": 3.0, "torch call by call": 1.3},
            )
            for dtype in ("float32", "bfloat16")
        ),
        Measurement("serving", "paged decode", paged_decode, limit=0.75),
        Measurement("serving", "paged int8 decode", paged_int8_decode, {"own bf16 cache": 1.6}),
        Measurement("model", "all-MiniLM-L6-v2", encode_passages, {"torch": 1.0}),
        Measurement("model", "llama", continue_prompt, {"torch": 1.0}),
        Measurement("memory", "extra memory", peak_memory, at_most=64.0),
        Measurement("memory", "extra memory, forward and backward", peak_training_memory, at_most=64.0),
        Measurement("call", "numpy call", functools.partial(call_overhead, tensors=False), at_most=8.0),
        Measurement("call", "torch call", functools.partial(call_overhead, tensors=True), at_most=12.0),
        Measurement(
            "call", "torch call with grad", functools.partial(call_overhead, tensors=True, grad=True), at_most=60.0
        ),
        Measurement("import", "import", import_time, at_most=100.0),
    ]


def in_fresh_process(number: int, budget: float, progress: Progress) -> Row:
    """The row of `measurements()[number]`: what one row left behind, pools of threads too, disturbs no other."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(number, budget, theirs))
    process.start()
    theirs.close()
    try:
        while isinstance(said := ours.recv(), float):
            progress(said)
    except EOFError:
        process.join()
        raise RuntimeError(f"the measuring process ended with {process.exitcode} before it had a result") from None
    process.join()
    if isinstance(said, str):
        raise RuntimeError(said)
    return said


def _measure(number: int, budget: float, pipe: Connection) -> None:
    try:
        before = quiet_share(4 * budget)
        row = measurements()[number].measure(budget, lambda fraction: pipe.send(float(fraction)))
        free = min(before, share_of_cores(foveal.get_num_threads()))
        left = f"other work left {free:.0%} of the cores" if free < 0.9 else ""
        pipe.send(dataclasses.replace(row, detail="; ".join(filter(None, (row.detail, left)))))
    except Exception as error:  # as text: not every error can be sent
        pipe.send(f"{type(error).__name__}: {error}")


def quiet_share(patience: float) -> float:
    """Waits until other work leaves nine tenths of the cores, at most `patience` seconds; returns what it leaves."""
    until = time.monotonic() + patience
    while (share := share_of_cores(foveal.get_num_threads())) < 0.9 and time.monotonic() < until:
        time.sleep(0.5)
    return share


def machine() -> dict[str, object]:
    """Where and with what this was measured."""
    threads = foveal.get_num_threads()
    processor = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        processor = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())[0]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "last-level cache": f"{cache_nbytes() >> 20} MiB",
        **{f"FMA peak, {n} thread{'s' * (n > 1)}": f"{fma_peak(n) / 1e9:.0f} GF/s" for n in {1, threads}},
        **{f"read bandwidth, {n} thread{'s' * (n > 1)}": f"{read_bandwidth(n) / 1e9:.0f} GB/s" for n in {1, threads}},
        **{f"foveal {name}": value for name, value in foveal.info()._asdict().items()},
        **{module: metadata.version(module) for peer in PEERS.values() for module in peer.modules if not peer.missing},
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def report(rows: Sequence[Row], missed: Sequence[str], described: dict[str, object]) -> str:
    return "\n".join(
        [
            markdown(rows),
            "",
            *(f"- {name}: {value}" for name, value in described.items()),
            "",
            *(f"- {row.label}: {'; '.join([row.detail, *ways(row)])}" for row in rows if row.detail),
            *(f"- {line}" for line in left_out()),
            "",
            *([f"Short of the aim:\n\n{''.join(f'- {line}{chr(10)}' for line in missed)}"] if missed else []),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows", nargs="+", metavar="TEXT", help="only rows whose group or label contains one of these"
    )
    parser.add_argument("--quick", action="store_true", help="a second for each peer of a row instead of eight")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="fresh processes for each row; 1")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.json, report.md and report.png there")
    options = parser.parse_args()

    if options.processes < 1:
        parser.error(f"--processes is {options.processes}, expected 1 or more")
    chosen = {
        number: m
        for number, m in enumerate(measurements())
        if not options.rows or any(text in f"{m.group}: {m.label}" for text in options.rows)
    }
    if options.list:
        print("\n".join(f"{m.group}: {m.label}" for m in chosen.values()))
        return
    if not chosen:
        parser.error(f"no row contains any of {options.rows}; --list prints them")
    described = machine()
    found: dict[int, list[Row]] = {number: [] for number in chosen}
    failed = []
    turns = list(itertools.product(range(options.processes), chosen.items()))  # a row's processes lie far apart
    with tqdm(total=len(turns), bar_format="{l_bar}{bar}| {elapsed}<{remaining}", mininterval=1) as bar:
        for place, (process, (number, m)) in enumerate(turns):
            bar.set_description_str(f"{m.group}: {m.label}{f', process {process + 1}' * (options.processes > 1)}")

            def progress(fraction: float, place: int = place) -> None:
                bar.update(place + fraction - bar.n)

            try:
                found[number].append(in_fresh_process(number, 1.0 if options.quick else 8.0, progress))
            except RuntimeError as error:  # the other rows are still worth having
                failed.append(f"{m.group}: {m.label}: {error}")
        bar.update(len(turns) - bar.n)
    complete = {number: worst(some) for number, some in found.items() if len(some) == options.processes}
    rows = list(complete.values())
    missed = [
        f"{chosen[number].group}: {row.label}: {text}"
        for number, row in complete.items()
        for text in chosen[number].missed(row)
    ]
    text = report(rows, missed, described)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stored = {"machine": described, "rows": [dataclasses.asdict(row) for row in rows], "missed": missed}
        (options.out / "report.json").write_text(json.dumps(stored, indent=1, default=str) + "\n")
        (options.out / "report.md").write_text(text + "\n")
        plot(rows, options.out / "report.png")
    if failed:
        sys.exit("rows that failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
