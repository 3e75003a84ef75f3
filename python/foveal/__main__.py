"""`python -m foveal`: what this build can do on this machine. `python -m foveal bench`: how fast it is here."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import foveal


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m foveal", description="What this build of foveal can do here.")
    parser.add_argument("--version", action="version", version=f"foveal {foveal.__version__}")
    bench = parser.add_subparsers(dest="command", title="commands").add_parser(
        "bench",
        help="compare foveal with NumPy, and with PyTorch, OpenVINO, ONNX Runtime and JAX where they are installed",
    )
    bench.add_argument("--png", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    bench.add_argument("--quick", action="store_true", help="0.7 seconds for each peer of a row instead of 4")
    options = parser.parse_args(arguments)
    print_info()
    if options.command == "bench":
        if options.png and importlib.util.find_spec("matplotlib") is None:
            sys.exit("foveal bench: --png needs matplotlib: pip install matplotlib")
        if options.png and not options.png.parent.is_dir():
            sys.exit(f"foveal bench: --png is {options.png}, and there is no folder {options.png.parent}")
        print_bench(quick=options.quick, png=options.png)


def print_info() -> None:
    try:
        info = foveal.info()
    except ValueError as error:  # an unknown FOVEAL_ISA
        sys.exit(str(error))
    others = ", ".join(isa for isa in info.isas if isa != info.isa)
    print(f"foveal           {info.version}")
    print(f"instruction set  {info.isa} (also available: {others or 'none'})")
    print(f"threads          {info.num_threads}")
    print(f"PyTorch          {info.torch or 'not installed'}")
    print(f"CUDA             {'yes' if info.cuda else 'no'}")


def print_bench(*, quick: bool, png: Path | None) -> None:
    from foveal._bench.compare import can_hold, compare, fma_peak, share_of_cores
    from foveal._bench.peers import left_out
    from foveal._bench.show import markdown, plot, ways
    from foveal._bench.work import Work

    works = [
        Work(1, 8, 1024, 64),
        Work(1, 8, 1024, 64, causal=True),
        Work(8, 12, 128, 64),
        Work(32, 12, 32, 32),
        Work(1, 8, 1024, 64, "bfloat16"),
        Work(1, 32, 1, 128, seqlen_kv=4096),
        Work(1, 8, 512, 64, normalizer="entmax15"),
    ]
    if not quick:
        works[2:2] = [Work(1, 8, 4096, 64), Work(1, 8, 4096, 64, causal=True), Work(1, 8, 4096, 128)]
    not_held = {work.dtype for work in works if not can_hold(work.dtype)}
    works = [work for work in works if work.dtype not in not_held]
    budget = 0.7 if quick else 4.0
    threads = foveal.get_num_threads()
    share = share_of_cores(threads)
    with progress_bar(len(works)) as bar:
        rows = [compare(work, budget=budget, progress=bar(place, str(work))) for place, work in enumerate(works)]
    share = min(share, share_of_cores(threads))
    print(
        f"\n{markdown(rows)}\n\n"
        "times a peer: how many times faster foveal is; median (quartiles) of the ratio within a round of turns.\n"
        "of the machine: of its FMA peak, measured in turn with each row (now "
        f"{fma_peak(threads) / 1e9:.0f} GF/s on {threads} thread{'s' * (threads != 1)}); where the\n"
        "figure is GB/s, of its read bandwidth, measured likewise."
    )
    print("\nThe ways of the peers, the fastest of each first:\n")
    print("\n".join(f"- {row.label}: {'; '.join(ways(row))}" for row in rows))
    print("".join(f"\n{line}" for line in left_out()))
    if not_held:
        print(f"{', '.join(not_held)}: left out; NumPy has it with: pip install ml_dtypes")
    if share < 0.8:
        print(
            f"THIS MACHINE IS BUSY: other work left {share:.0%} of {threads} core{'s' * (threads != 1)}, "
            "so these figures say little. Try again when it is quiet."
        )
    if png:
        plot(rows, png)
        print(f"wrote {png}")


@contextlib.contextmanager
def progress_bar(count: int) -> Iterator[Callable[[int, str], Callable[[float], object]]]:
    """bar(place, text) gives the callback that moves the bar within that place; a plain line each without tqdm."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:

        def line(place: int, text: str) -> Callable[[float], object]:
            print(f"[{place + 1}/{count}] {text}", file=sys.stderr)
            return lambda fraction: None

        yield line
        return
    with tqdm(total=count, bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False) as progress:

        def bar(place: int, text: str) -> Callable[[float], object]:
            progress.set_description_str(f"{text:<32}")

            def move(fraction: float) -> None:
                progress.n = place + fraction
                progress.refresh()

            return move

        yield bar


if __name__ == "__main__":
    main()
