"""The lines of a report, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .measure import Spread


@dataclass(frozen=True)
class Row:
    """One line of a report."""

    label: str
    value: float  # of foveal
    unit: str  # GF/s, GB/s, us, ms, MiB
    ratios: dict[str, Spread] = field(default_factory=dict)  # how many times faster than each peer
    limit: float | None = None  # fraction of what the machine can do
    detail: str = ""  # rounds and the like
    tried: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # for each peer, process, way: seconds
    span: tuple[float, float] | None = None  # of the value, over several processes

    @property
    def figure(self) -> str:
        digits = 1 if self.value >= 10 else 2
        span = "" if self.span is None else f" ({self.span[0]:.{digits}f}-{self.span[1]:.{digits}f})"
        return f"{self.value:.{digits}f}{span} {self.unit}"


def worst(rows: Sequence[Row]) -> Row:
    """The same row from several processes as one: of each median the one that is worst for foveal, with the range."""
    if len(rows) == 1:
        return rows[0]
    first = rows[0]
    values = [row.value for row in rows]
    ratios = {}
    for peer in first.ratios:
        medians = [row.ratios[peer].median for row in rows]
        ratios[peer] = Spread(min(medians), min(medians), max(medians))
    return Row(
        first.label,
        min(values) if first.unit.endswith("/s") else max(values),
        first.unit,
        ratios,
        None if first.limit is None else min(row.limit for row in rows if row.limit is not None),
        "; ".join(dict.fromkeys(row.detail for row in rows)),
        {peer: [way for row in rows for way in row.tried[peer]] for peer in first.tried},
        (min(values), max(values)),
    )


def ways(row: Row) -> list[str]:
    """A line for each peer: what its ways took (the median of the processes), the fastest first."""
    lines = []
    for processes in row.tried.values():
        best = Counter(min(seconds, key=seconds.__getitem__) for seconds in processes)
        medians = {way: statistics.median(seconds[way] for seconds in processes) for way in processes[0]}
        often = {way: f" (fastest in {n} of {len(processes)})" for way, n in best.items() if n < len(processes)}
        ordered = sorted(medians, key=lambda way: (-best[way], medians[way]))
        lines.append(", ".join(f"{way} {_time(medians[way])}{often.get(way, '')}" for way in ordered))
    return lines


def _time(seconds: float) -> str:
    scaled, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{scaled:.{1 if scaled >= 10 else 2}f} {unit}"


def markdown(rows: Sequence[Row], work: str = "work (B,H,S,D)") -> str:
    """The rows as a table, aligned for reading as it is; `work` heads their labels."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratios))
    limited = any(row.limit is not None for row in rows)
    table = [[work, "foveal", *["of the machine"] * limited, *(f"times {peer}" for peer in peers)]]
    for row in rows:
        limit = ["" if row.limit is None else f"{row.limit:.0%}"] * limited
        table.append([row.label, row.figure, *limit, *(_shown(row.ratios.get(peer)) for peer in peers)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"
        for cells in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _shown(ratio: Spread | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratios, one group a row, as a picture."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.ratios]
    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratios))
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        with_peer = [(place, row.ratios[peer]) for place, row in enumerate(rows) if peer in row.ratios]
        medians = [ratio.median for _, ratio in with_peer]
        errors = [[r.median - r.low for _, r in with_peer], [r.high - r.median for _, r in with_peer]]
        places = [place + (number - (len(peers) - 1) / 2) * height for place, _ in with_peer]
        bars = axes.barh(places, medians, height, xerr=errors, label=peer, error_kw={"linewidth": 0.8})
        axes.bar_label(bars, [f"{median:.2f}" for median in medians], padding=3, fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("times faster than the peer")
    axes.legend()
    figure.savefig(path, dpi=150)
