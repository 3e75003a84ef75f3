"""The lines of a report, as a table and as a picture."""

from __future__ import annotations

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
    detail: str = ""  # rounds, the ways that the peers took

    @property
    def figure(self) -> str:
        return f"{self.value:.{1 if self.value >= 10 else 2}f} {self.unit}"


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
    axes.set_xlabel("times faster than the peer (median and quartiles of the ratio within a round)")
    axes.legend()
    figure.savefig(path, dpi=150)
