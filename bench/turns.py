"""What benchmarks of one process share: calls that take turns, and fresh processes of which the worst counts."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import foveal


def take_turns(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median seconds of each, called in turn, three times at least."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[next(iter(ways))]) < 3:
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            times[way].append(time.perf_counter() - start)
    return {way: statistics.median(found) for way, found in times.items()}


def in_a_process(*command: str) -> Any:
    """Run this Python on a script and its arguments, and read the JSON that it prints last."""
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(found: list[dict[str, float]]) -> None:
    """Print the worst median of each row, with the range: rows that end in "time" are better when they are small."""
    print(f"{foveal.info().isa}, {foveal.get_num_threads()} threads, {len(found)} processes; worst median (range)")
    for name in dict.fromkeys(name for one in found for name in one):
        ratios = [one[name] for one in found if name in one]
        worst = max(ratios) if name.endswith("time") else min(ratios)
        print(f"  {name:58} {worst:6.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
