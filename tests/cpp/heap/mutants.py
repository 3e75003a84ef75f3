"""Heaps with one rule changed, each of which a test must refuse.

    python3 tests/cpp/heap/mutants.py [--long] [--jobs N] [--only NAME ...] [--compiler CXX]

Each mutant is a copy of the heap's headers with some text replaced (mutant_list.py). The text must be there as often
as is said, so that a change of the headers cannot turn a mutant into the heap itself. The test that the mutant names,
as it stands in the C++ tests, is compiled against the copy and must fail (exit status 1). With --long,
heap_model_check is run on every mutant instead, and says what the random scenarios find without the known ones;
--cheap as in heap_model_check.
Exit status 1 when a mutant survives.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from mutant_list import HEAP, MUTANTS, TREE, WORD, X86_ONLY, Mutant

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[2] / "cpp" / "include" / "foveal"


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    caught: bool
    by: str
    seconds: float


class Runner:
    """Compiles a check against the headers of a mutant, and runs it."""

    def __init__(self, compiler: str, scratch: Path, timeout: float) -> None:
        self.compiler = compiler
        self.scratch = scratch
        self.timeout = timeout

    def write_headers(self, directory: Path, mutant: Mutant) -> None:
        (directory / "foveal").mkdir(parents=True)
        for header in (WORD, TREE, HEAP):
            text = (HEADERS / header).read_text()
            for change in mutant.changes:
                if change.header != header:
                    continue
                found = text.count(change.old)
                if found != change.count:
                    raise SystemExit(
                        f"mutants: {mutant.name}: {header} has {found} times, expected {change.count}: {change.old!r}"
                    )
                text = text.replace(change.old, change.new)
            (directory / "foveal" / header).write_text(text)

    def run(self, mutant: Mutant, check: str, *arguments: str) -> Outcome:
        directory = self.scratch / mutant.name
        self.write_headers(directory, mutant)
        program = directory / check
        include = [f"-I{directory}", f"-I{HERE.parent}"]
        source = HERE / f"{check}.cc"
        subprocess.run(
            [self.compiler, "-std=c++20", "-O1", "-UNDEBUG", "-w", *include, source, "-o", program, "-pthread"],
            check=True,
        )
        start = time.monotonic()
        try:
            done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=self.timeout)
        except subprocess.TimeoutExpired:
            return Outcome(mutant, False, f"not ended after {self.timeout:g} s", self.timeout)
        seconds = time.monotonic() - start
        if done.returncode == 1:
            return Outcome(mutant, True, self.reason(check, done.stdout, done.stderr), seconds)
        return Outcome(mutant, False, f"exit status {done.returncode} of {check}", seconds)

    @staticmethod
    def reason(check: str, out: str, err: str) -> str:
        """The scenario that failed, else the first check that did."""
        for line in out.splitlines():
            if " states  " in line and not line.endswith("correct") and "pop_push_atomic" not in line:
                scenario, verdict = line.split("  ")[0], line.rsplit("states  ")[1]
                return f"{check}: {scenario}: {verdict}"
            if "|" in line and ": " in line and not line.startswith(" "):
                return f"{check}: {line}"
        return f"{check}: {err.splitlines()[0].split(': ', 1)[-1] if err else out[:80]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every mutant of the heap must be refused by a test.")
    parser.add_argument("--long", action="store_true", help="run heap_model_check instead of the short tests")
    parser.add_argument("--cheap", action="store_true", help="with --long: only the shapes that .ci/run searches")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--compiler", default=os.environ.get("CXX", "c++"))
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a check may take")
    options = parser.parse_args()
    unknown = sorted(set(options.only or []) - {m.name for m in MUTANTS})
    if unknown:
        parser.error(f"--only: no mutant is named {', '.join(unknown)}")
    chosen = [m for m in MUTANTS if not options.only or m.name in options.only]
    if platform.machine() not in {"x86_64", "AMD64"}:
        chosen = [m for m in chosen if m.name not in X86_ONLY]

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.jobs) as pool:
        runner = Runner(options.compiler, Path(scratch), options.timeout)

        def attempt(m: Mutant) -> Outcome:
            if options.long:
                return runner.run(m, "heap_model_check", *(["--cheap", "1"] if options.cheap else []))
            return runner.run(m, m.test)

        survivors = 0
        for outcome in (future.result() for future in as_completed([pool.submit(attempt, m) for m in chosen])):
            survivors += not outcome.caught
            print(f"{outcome.mutant.name:30} {'caught' if outcome.caught else 'NOT CAUGHT'}, {outcome.seconds:.1f} s, "
                  f"by {outcome.by}", flush=True)  # fmt: skip
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
