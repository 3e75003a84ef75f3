"""Depth from two pictures by belief propagation, its messages in four orders: python examples/stereo_bp.py.

The pictures are the motorcycle of the Middlebury 2014 stereo set, which scikit-image ships with its true disparities.
The message loop is C++ (stereo_bp.cc, which the script compiles); its residual order keeps the messages in
foveal::IndexedHeap, by how much computing them anew could change them. Each order runs until the mean residual has
come down to --target; then are told how many messages and seconds that took, and how many pixels it got wrong. The
disparities and the way that the residuals went are drawn to --out.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from command_line import output_file, positive

SCHEDULES = ("synchronous", "fifo", "residual", "relaxed")
FLAGS = "-std=c++20 -O3 -march=native -ffinite-math-only -fno-signed-zeros -fno-trapping-math -shared -fPIC -pthread"
HERE = Path(__file__).parent

# In parts of the census transform's bits; of the values tried on this pair at half its size, the ones with the fewest
# bad pixels were near these.
MOST_COST = 0.4  # of a label
COLOUR = 0.01  # of a grey level
SMOOTHNESS = 0.06  # of a step between neighbours; twice that where they look alike
ALIKE = 8  # grey levels
JUMP = 4  # steps; more cost no more
TOLERANCE = SMOOTHNESS / 20  # of a residual's bound, in the orders that choose


@dataclass
class Problem:
    """data: (height, width, labels), float32; weight: (height, width, 2), of the edge to the right and downwards."""

    data: np.ndarray
    weight: np.ndarray
    jump: int = JUMP

    @property
    def edges(self) -> int:
        height, width, _ = self.data.shape
        return 2 * (height * (width - 1) + (height - 1) * width)  # directed: one message each

    def energy(self, labels: np.ndarray) -> float:
        total = np.take_along_axis(self.data, labels[..., None], 2).sum(dtype=float)
        for axis, weight in ((1, self.weight[:, :-1, 0]), (0, self.weight[:-1, :, 1])):
            total += (weight * np.minimum(np.abs(np.diff(labels, axis=axis)), self.jump)).sum(dtype=float)
        return float(total)


class Propagation:
    """One run of belief propagation in `library`: messages that start at zero, in one of the orders of SCHEDULES."""

    def __init__(
        self, library: ctypes.CDLL, problem: Problem, schedule: str, threads: int = 1, tolerance: float = TOLERANCE
    ) -> None:
        self._library, self._shape = library, problem.data.shape
        self._kept = [np.ascontiguousarray(a, np.float32) for a in (problem.data, problem.weight)]
        pointers = [a.ctypes.data for a in self._kept]
        name = schedule.encode()
        self._handle = library.bp_create(*self._shape, problem.jump, *pointers, name, tolerance, threads)
        if not self._handle:
            raise ValueError(f"stereo_bp: no {schedule!r} with {threads} threads on data of {self._shape}")

    def run(self, messages: int) -> int:
        """Compute about so many messages, or fewer if that makes all residuals small enough; return how many."""
        return int(self._library.bp_run(self._handle, messages))

    def residuals(self) -> np.ndarray:
        """By how much each message would change; 0 where there is no neighbour: (height, width, sides)."""
        out = np.empty((*self._shape[:2], 4), np.float32)
        self._library.bp_residuals(self._handle, out.ctypes.data)
        return out

    def labels(self) -> np.ndarray:
        out = np.empty(self._shape[:2], np.int32)
        self._library.bp_labels(self._handle, out.ctypes.data)
        return out

    def __enter__(self) -> Propagation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._library.bp_destroy(self._handle)
        self._handle = None


def build(directory: str | Path) -> ctypes.CDLL:
    """Compile stereo_bp.cc into `directory` and load it."""
    target = Path(directory) / "stereo_bp.so"
    source, headers = HERE / "stereo_bp.cc", HERE.parent / "cpp" / "include"
    command = [os.environ.get("CXX", "c++"), *FLAGS.split(), f"-I{headers}", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.bp_create.argtypes = [*[integer] * 4, pointer, pointer, ctypes.c_char_p, ctypes.c_float, integer]
    library.bp_create.restype = pointer
    library.bp_run.argtypes, library.bp_run.restype = [pointer, ctypes.c_int64], ctypes.c_int64
    for function in (library.bp_residuals, library.bp_labels):
        function.argtypes, function.restype = [pointer, pointer], None
    library.bp_destroy.argtypes, library.bp_destroy.restype = [pointer], None
    return library


def problem_of(left: np.ndarray, right: np.ndarray, labels: int) -> Problem:
    """What disparities 0 to labels - 1 cost, where pixel x of the left picture is x - disparity of the right one.

    Both pictures (height, width, 3). The share of bits in which the census transforms differ (Zabih and Woodfill 1994),
    and the difference in colour, insensitive to sampling (Birchfield and Tomasi 1998).
    """
    height, width, _ = left.shape
    bits = census(left.mean(-1)), census(right.mean(-1))
    low, high = zip(between_samples(left), between_samples(right), strict=True)
    data = np.full((height, width, labels), MOST_COST, np.float32)
    for d in range(min(labels, width)):
        here, there = np.s_[:, d:], np.s_[:, : width - d]
        apart = (bits[0][here] != bits[1][there]).mean(-1)
        ours = np.maximum(left[here] - high[1][there], low[1][there] - left[here])
        theirs = np.maximum(right[there] - high[0][here], low[0][here] - right[there])
        colour = np.maximum(np.minimum(ours, theirs), 0).mean(-1)
        data[:, d:, d] = np.minimum(apart + COLOUR * colour, MOST_COST)
    weight = np.full((height, width, 2), SMOOTHNESS, np.float32)
    grey = left.mean(-1)
    weight[:, :-1, 0][np.abs(np.diff(grey, axis=1)) < ALIKE] *= 2
    weight[:-1, :, 1][np.abs(np.diff(grey, axis=0)) < ALIKE] *= 2
    return Problem(data, weight)


def census(grey: np.ndarray, radius: int = 2) -> np.ndarray:
    """Of each pixel, which of its neighbours are darker: (height, width, neighbours)."""
    padded = np.pad(grey, radius, mode="edge")
    height, width = grey.shape
    offsets = [(y, x) for y in range(2 * radius + 1) for x in range(2 * radius + 1) if (y, x) != (radius, radius)]
    return np.stack([padded[y : y + height, x : x + width] < grey for y, x in offsets], -1)


def between_samples(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest value within half a pixel to the left and right."""
    padded = np.pad(picture, ((0, 0), (1, 1), (0, 0)), mode="edge")
    halves = [(picture + other) / 2 for other in (padded[:, :-2], padded[:, 2:])]
    return np.minimum.reduce([picture, *halves]), np.maximum.reduce([picture, *halves])


@dataclass
class Outcome:
    schedule: str
    threads: int
    reached: bool = False
    messages: int = 0
    seconds: float = 0.0  # within the message loop
    energy: float = 0.0
    labels: np.ndarray | None = None
    course: list[tuple[float, float]] = field(default_factory=list)  # messages to each edge, mean residual


def measure(
    library: ctypes.CDLL, problem: Problem, schedule: str, threads: int, target: float, rounds: float
) -> Outcome:
    """Run until the mean residual is at most `target`, or so many messages to each edge were computed."""
    from tqdm import tqdm

    outcome = Outcome(schedule, threads)
    limit = int(rounds * problem.edges)
    with (
        Propagation(library, problem, schedule, threads) as propagation,
        tqdm(total=limit, desc=f"{schedule}, {threads} thread(s)", unit=" messages", unit_scale=True) as bar,
    ):
        while not outcome.reached and outcome.messages < limit:
            start = time.perf_counter()
            count = propagation.run(problem.edges // 4)
            outcome.seconds += time.perf_counter() - start
            outcome.messages += count
            mean = float(propagation.residuals().sum(dtype=float) / problem.edges)
            outcome.course.append((outcome.messages / problem.edges, mean))
            outcome.reached = mean <= target
            bar.update(count)
            bar.set_postfix(residual=f"{mean:.2g}")
            if count == 0:  # no bound exceeds the tolerance any more
                break
        outcome.labels = propagation.labels()
    outcome.energy = problem.energy(outcome.labels)
    return outcome


def motorcycle(scale: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right picture and disparities (nan: unknown), `scale` times smaller."""
    import skimage.data

    left, right, truth = skimage.data.stereo_motorcycle()
    height, width = (n // scale for n in truth.shape)

    def smaller(picture: np.ndarray) -> np.ndarray:
        cells = picture[: height * scale, : width * scale].astype(np.float32)
        return cells.reshape(height, scale, width, scale, 3).mean((1, 3))

    truth = truth[: height * scale : scale, : width * scale : scale] / scale
    return smaller(left), smaller(right), np.where(np.isfinite(truth), truth, np.nan)


def bad_share(labels: np.ndarray, truth: np.ndarray) -> float:
    """Of the pixels whose disparity is known, the share that is off by more than one."""
    known = np.isfinite(truth)
    return float((np.abs(labels[known] - truth[known]) > 1).mean())


def draw(path: Path, left: np.ndarray, truth: np.ndarray, outcomes: Sequence[Outcome]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best = min(outcomes, key=lambda outcome: outcome.energy)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    axes[0, 0].imshow(left.astype(np.uint8))
    axes[0, 0].set_title("left picture")
    scale = {"cmap": "turbo", "vmin": np.nanmin(truth), "vmax": np.nanmax(truth)}
    axes[0, 1].imshow(truth, **scale)
    axes[0, 1].set_title("true disparity (white: unknown)")
    axes[1, 0].imshow(best.labels, **scale)
    axes[1, 0].set_title(f"{best.schedule}: {bad_share(best.labels, truth):.1%} of the pixels off by more than 1")
    for axis in axes.flat[:3]:
        axis.axis("off")
    for outcome in outcomes:
        if outcome.threads == 1:
            axes[1, 1].plot(*zip(*outcome.course, strict=True), label=outcome.schedule)
    axes[1, 1].set(yscale="log", xscale="log", xlabel="messages to each edge", ylabel="mean residual")
    axes[1, 1].legend()
    figure.savefig(path, dpi=100)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scale", type=positive, default=2, help="work on pictures so many times smaller (default 2)")
    parser.add_argument(
        "--threads", type=positive, default=min(2, os.cpu_count() or 1), help="also with so many (default 2)"
    )
    parser.add_argument("--target", type=float, default=0.001, help="mean residual to stop at (default 0.001)")
    parser.add_argument("--rounds", type=float, default=60, help="messages to each edge before giving up (default 60)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="report the median by time of so many runs (default 3)"
    )
    parser.add_argument(
        "--out", type=output_file, default=Path("stereo_bp.png"), help="picture to write (default stereo_bp.png)"
    )
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    try:
        left, right, truth = motorcycle(options.scale)
    except ModuleNotFoundError as error:
        sys.exit(f"stereo_bp: {error}; this example needs: pip install '.[stereo]'")
    problem = problem_of(left, right, int(np.ceil(np.nanmax(truth))) + 2)
    height, width, labels = problem.data.shape
    print(f"{width} x {height} pixels, {labels} disparities, {problem.edges} messages")
    with tempfile.TemporaryDirectory() as directory:
        library = build(directory)
        runs = [(schedule, 1) for schedule in SCHEDULES]
        if options.threads > 1:
            runs += [(schedule, options.threads) for schedule in SCHEDULES if schedule != "fifo"]
        repeats = [
            [measure(library, problem, *run, options.target, options.rounds) for run in runs]
            for _ in range(options.repeats)
        ]
    outcomes = [
        sorted(same, key=lambda outcome: outcome.seconds)[len(same) // 2] for same in zip(*repeats, strict=True)
    ]
    print(f"{'order':12} threads  messages to each edge   seconds   us/message    energy   bad pixels")
    for o in outcomes:
        rounds = f"{o.messages / problem.edges:.2f}" if o.reached else f"not in {o.messages / problem.edges:.0f}"
        print(
            f"{o.schedule:12} {o.threads:7} {rounds:>22} {o.seconds:9.2f} {o.seconds / o.messages * 1e6:12.2f}"
            f" {o.energy:9.0f} {bad_share(o.labels, truth):12.2%}"
        )
    draw(options.out, left, truth, outcomes)
    print(f"{options.out} written")


if __name__ == "__main__":
    main()
