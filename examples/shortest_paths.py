"""Shortest paths over hilly land by Dijkstra's algorithm and by A*, with decrease-key, checked against SciPy.

The land is a grid of random hills; a step goes to one of eight neighbours and costs its length, more on a slope. Both
algorithms keep the open nodes in an IndexedHeap: a node that is reached on a better way gets a better priority in
place, so each node is in the heap at most once and no outdated entries come up (Dijkstra 1959; Hart, Nilsson and
Raphael 1968). What this shows is the use of the heap; for speed, all of the loop would have to leave Python.

    python examples/shortest_paths.py --size 200 --png paths.png
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import foveal
from command_line import output_file

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

STEPS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


@dataclass(frozen=True)
class Graph:
    """The neighbours of node i are neighbours[starts[i]:starts[i+1]], the costs to get there likewise."""

    starts: Ids  # (nodes + 1,)
    neighbours: Ids  # (edges,)
    costs: Floats  # (edges,)

    def __len__(self) -> int:
        return len(self.starts) - 1


@dataclass(frozen=True)
class Search:
    distances: Floats  # (nodes,) from the source; infinity where the search did not come
    parents: Ids  # (nodes,) -1: none
    settled: int  # nodes whose neighbours were looked at

    def path_to(self, node: int) -> list[int]:
        path = [node]
        while (node := int(self.parents[node])) >= 0:
            path.append(node)
        return path[::-1]


def hills(size: int, rng: np.random.Generator) -> Floats:
    """Heights (size, size): smooth noise at every scale from the whole to a few nodes, the coarser the higher."""
    heights = np.zeros((size, size))
    where = np.linspace(0, 1, size, endpoint=False)
    cells = 2
    while cells < size / 2:
        corners = rng.standard_normal((cells + 1, cells + 1))
        place, within = np.divmod(where * cells, 1)
        left, t = place.astype(int), within * within * (3 - 2 * within)
        rows = corners[left] * (1 - t)[:, None] + corners[left + 1] * t[:, None]
        heights += (rows[:, left] * (1 - t) + rows[:, left + 1] * t) / cells
        cells *= 2
    return heights


def grid(heights: Floats, steepness: float = 400.0) -> Graph:
    """A step costs its length times 1 + steepness * slope^2: never less than its length."""
    rows, columns = heights.shape
    nodes = np.arange(rows * columns).reshape(rows, columns)
    edges = []
    for down, right in STEPS:
        here = np.s_[max(-down, 0) : rows - max(down, 0), max(-right, 0) : columns - max(right, 0)]
        there = np.s_[max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)]
        length = np.hypot(down, right)
        slopes = (heights[there] - heights[here]) / length
        edges.append((nodes[here].ravel(), nodes[there].ravel(), (length * (1 + steepness * slopes**2)).ravel()))
    sources, targets, costs = (np.concatenate(part) for part in zip(*edges, strict=True))
    order = np.argsort(sources, kind="stable")
    starts = np.searchsorted(sources[order], np.arange(nodes.size + 1))
    return Graph(starts, targets[order], costs[order])


def search(graph: Graph, source: int, target: int | None = None, at_least: Floats | None = None) -> Search:
    """Dijkstra's algorithm from `source` to everywhere or until `target` is settled.

    With `at_least`, for each node no more than what is still to pay from there to the target, it is A*.
    """
    still_to_pay = np.zeros(len(graph)) if at_least is None else at_least
    distances = np.full(len(graph), np.inf)
    parents = np.full(len(graph), -1)
    distances[source] = 0.0
    settled = 0
    heap = foveal.IndexedHeap(len(graph))
    heap.push(source, still_to_pay[source])
    while len(heap):
        node, _ = heap.pop()
        settled += 1
        if node == target:
            break
        edges = slice(graph.starts[node], graph.starts[node + 1])
        neighbours, by_here = graph.neighbours[edges], distances[node] + graph.costs[edges]
        better = by_here < distances[neighbours]
        reached = neighbours[better]
        distances[reached] = by_here[better]
        parents[reached] = node
        heap.update_many(reached, distances[reached] + still_to_pay[reached], missing="insert")
    return Search(distances, parents, settled)


def straight_lines(shape: tuple[int, int], target: int) -> Floats:
    """The distance of each node from the target as the crow flies, which no way can undercut."""
    row, column = divmod(target, shape[1])
    down, right = np.ogrid[: shape[0], : shape[1]]
    return np.hypot(down - row, right - column).ravel()


def scipy_distances(graph: Graph, source: int) -> Floats:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    matrix = csr_array((graph.costs, graph.neighbours, graph.starts), shape=(len(graph), len(graph)))
    distances: Floats = dijkstra(matrix, indices=source)
    return distances


def draw(heights: Floats, path: list[int], reached: NDArray[np.bool_], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    axes.imshow(heights, cmap="terrain")
    axes.contour(reached.reshape(heights.shape), levels=[0.5], colors="black", linewidths=0.7, linestyles="dotted")
    axes.plot(np.array(path) % heights.shape[1], np.array(path) // heights.shape[1], color="red")
    axes.set_title("the cheapest way; A* looked at what is within the dotted line")
    axes.set_axis_off()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--size", type=int, default=200, metavar="N", help="a grid of N x N nodes (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=output_file, metavar="FILE", help="draw the land and the way there")
    options = parser.parse_args()
    if options.size < 2:
        parser.error("--size must be at least 2")
    needed = ["scipy"] + ["matplotlib"] * (options.png is not None)
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        sys.exit(f"shortest_paths: no module {missing[0]}; this example needs: pip install '.[queues]'")

    heights = hills(options.size, np.random.default_rng(options.seed))
    graph = grid(heights)
    source, target = 0, len(graph) - 1
    everywhere = search(graph, source)
    there = search(graph, source, target, straight_lines((options.size, options.size), target))
    expected = scipy_distances(graph, source)
    if not np.allclose(everywhere.distances, expected, rtol=1e-12, atol=0):
        raise SystemExit("Dijkstra's distances differ from SciPy's")
    if not np.isclose(there.distances[target], expected[target], rtol=1e-12, atol=0):
        raise SystemExit("A* found another distance than SciPy")

    path = there.path_to(target)
    print(f"{len(graph)} nodes, {len(graph.costs)} edges; all distances agree with scipy.sparse.csgraph.dijkstra")
    print(f"from corner to corner: {len(path) - 1} steps, cost {there.distances[target]:.2f}")
    print(f"Dijkstra settled {everywhere.settled} nodes, A* {there.settled}")
    if options.png:
        draw(heights, path, np.isfinite(there.distances), options.png)
        print(f"drawn: {options.png}")


if __name__ == "__main__":
    main()
