"""Where the boxes of a directed graph go: layers from the top down, few crossings, edges as straight as there is room.

The layered method of Sugiyama, Tagawa and Toda (1981): layers by longest path, long edges bent at invisible stops,
the order within a layer by the barycentres of its neighbours, and the places, which keep that order and the gaps, nearest
in squares to where the neighbours would have them (isotonic regression by pooling adjacent violators). Edges that close a
cycle are drawn and take no part. Deterministic; knows nothing of what the boxes mean.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SWEEPS = 12
STRAIGHT = 4.0
"""How much more an invisible stop pulls than a box does."""

Edge = tuple[str, str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A placed box; the place is its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass(frozen=True)
class Layout:
    """A drawing without ink."""

    boxes: Mapping[str, Box]
    routes: Mapping[Edge, Sequence[Point]]
    """Points of every edge from the bottom of its first box to the top of its second, in between only vertical passes."""
    width: float
    height: float


def layout(
    sizes: Mapping[str, tuple[float, float]], edges: Sequence[Edge], gap: float = 32.0, rise: float = 46.0
) -> Layout:
    """Place boxes of ``sizes`` (width, height).

    Args:
        sizes: by name, in the order in which equals are to stand.
        edges: (from, to) by name; repeated ones count once.
        gap: least distance between neighbours in a layer.
        rise: distance between layers.
    """
    wanted = [edge for edge in dict.fromkeys(edges) if edge[0] != edge[1]]
    ranks = _ranks(list(sizes), wanted)
    forward = [edge for edge in wanted if ranks[edge[0]] < ranks[edge[1]]]
    graph = _Layers(sizes, forward, ranks)
    graph.order()
    centres = graph.place(gap)
    tops, heights, y = [], [], 0.0
    for layer in graph.layers:
        height = max((sizes[name][1] for name in layer if name in sizes), default=0.0)
        tops.append(y)
        heights.append(height)
        y += height + rise
    boxes = {
        name: Box(centres[name] - width / 2, tops[ranks[name]] + (heights[ranks[name]] - height) / 2, width, height)
        for name, (width, height) in sizes.items()
    }
    routes = _routes(graph, wanted, boxes, centres, tops, heights)
    return Layout(boxes, routes, max((box.x + box.width for box in boxes.values()), default=0.0), max(y - rise, 0.0))


def _ranks(names: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Layers by longest path. What waits for a cycle is let go by the first of it."""
    waits = dict.fromkeys(names, 0)
    next_of: dict[str, list[str]] = defaultdict(list)
    for source, target in edges:
        waits[target] += 1
        next_of[source].append(target)
    ranks = dict.fromkeys(names, 0)
    left = dict.fromkeys(names)
    ready = [name for name in names if not waits[name]]
    while left:
        if not ready:
            ready = [next(iter(left))]
        name = ready.pop(0)
        del left[name]
        for target in next_of[name]:
            if target in left:
                ranks[target] = max(ranks[target], ranks[name] + 1)
                waits[target] -= 1
                if not waits[target]:
                    ready.append(target)
    return ranks


class _Layers:
    """The graph with invisible stops where an edge crosses a layer."""

    def __init__(
        self, sizes: Mapping[str, tuple[float, float]], edges: Sequence[Edge], ranks: Mapping[str, int]
    ) -> None:
        self.sizes = sizes
        self.layers: list[list[str]] = [[] for _ in range(max(ranks.values(), default=-1) + 1)]
        self.above: dict[str, list[str]] = defaultdict(list)
        self.below: dict[str, list[str]] = defaultdict(list)
        self.stops: dict[Edge, list[str]] = {}
        for name in sizes:
            self.layers[ranks[name]].append(name)
        for source, target in edges:
            chain = [f"\0{source}\0{target}\0{rank}" for rank in range(ranks[source] + 1, ranks[target])]
            self.stops[source, target] = chain
            for rank, stop in enumerate(chain, ranks[source] + 1):
                self.layers[rank].append(stop)
            for upper, lower in zip([source, *chain], [*chain, target], strict=True):
                self.below[upper].append(lower)
                self.above[lower].append(upper)

    def order(self) -> None:
        """Order every layer so that few edges cross: the best of some sweeps."""
        best, fewest = [list(layer) for layer in self.layers], self._crossings()
        for sweep in range(SWEEPS):
            if not fewest:
                break
            if sweep % 2 == 0:
                for upper, lower in itertools.pairwise(self.layers):
                    _sort(lower, upper, self.above)
            else:
                for lower, upper in itertools.pairwise(self.layers[::-1]):
                    _sort(upper, lower, self.below)
            if (found := self._crossings()) < fewest:
                best, fewest = [list(layer) for layer in self.layers], found
        self.layers = best

    def _crossings(self) -> int:
        count = 0
        for upper, lower in itertools.pairwise(self.layers):
            place = {name: index for index, name in enumerate(lower)}
            seen: list[int] = []
            for name in upper:
                ends = sorted(place[other] for other in self.below[name])
                count += sum(len(seen) - bisect_right(seen, end) for end in ends)
                for end in ends:
                    insort(seen, end)
        return count

    def place(self, gap: float) -> dict[str, float]:
        """The centre of everything, leftmost edge at 0."""
        centres: dict[str, float] = {}
        for layer in self.layers:
            x = 0.0
            for name in layer:
                width = self._width(name)
                centres[name] = x + width / 2
                x += width + gap
        for _ in range(SWEEPS):
            for layer in self.layers[::-1]:
                self._settle(layer, self.below, centres, gap)
            for layer in self.layers:  # last, so that what follows one another stands in line
                self._settle(layer, self.above, centres, gap)
        for layer in self.layers[::-1]:
            for name in layer:
                if name in self.sizes and not self.above[name] and self.below[name]:
                    self._settle(layer, {name: self.below[name]}, centres, gap)
        left = min((centres[name] - self._width(name) / 2 for name in centres), default=0.0)
        return {name: centre - left for name, centre in centres.items()}

    def _settle(
        self, layer: Sequence[str], near: Mapping[str, list[str]], centres: dict[str, float], gap: float
    ) -> None:
        """Move a layer as near to its neighbours on one side as its order and gaps allow."""
        offsets, offset = [], 0.0
        for index, name in enumerate(layer):
            if index:
                offset += (self._width(layer[index - 1]) + self._width(name)) / 2 + gap
            offsets.append(offset)
        pools: list[list[float]] = []  # [sum of weights, weighted mean, members]
        for name, offset in zip(layer, offsets, strict=True):
            others = [centres[other] for other in near.get(name, ())]
            wish = (sum(others) / len(others) if others else centres[name]) - offset
            weight = (1.0 if name in self.sizes else STRAIGHT) * (1.0 if others else 0.1)
            pools.append([weight, wish, 1])
            while len(pools) > 1 and pools[-2][1] > pools[-1][1]:
                weight, wish, members = pools.pop()
                first = pools[-1]
                first[1] = (first[0] * first[1] + weight * wish) / (first[0] + weight)
                first[0] += weight
                first[2] += members
        places = iter([mean for _, mean, members in pools for _ in range(int(members))])
        for name, offset in zip(layer, offsets, strict=True):
            centres[name] = next(places) + offset

    def _width(self, name: str) -> float:
        return self.sizes[name][0] if name in self.sizes else 0.0


def _sort(layer: list[str], beside: Sequence[str], neighbours: Mapping[str, list[str]]) -> None:
    """Order ``layer`` by the barycentres of its neighbours in the layer beside it; who has none keeps its place."""
    places = {name: place for place, name in enumerate(beside)}
    mean = {
        name: sum(places[other] for other in others) / len(others) if (others := neighbours[name]) else float(place)
        for place, name in enumerate(layer)
    }
    layer.sort(key=lambda name: mean[name])


def _routes(
    graph: _Layers,
    edges: Sequence[Edge],
    boxes: Mapping[str, Box],
    centres: Mapping[str, float],
    tops: Sequence[float],
    heights: Sequence[float],
) -> dict[Edge, list[Point]]:
    row = {name: index for index, layer in enumerate(graph.layers) for name in layer}
    arriving: dict[str, list[Edge]] = defaultdict(list)
    for edge in edges:
        arriving[edge[1]].append(edge)
    routes: dict[Edge, list[Point]] = {}
    for target, here in arriving.items():
        here.sort(key=lambda edge: centres[(graph.stops.get(edge) or [edge[0]])[-1]])
        step = min(18.0, boxes[target].width / (len(here) + 1))
        for index, edge in enumerate(here):
            port = boxes[target].middle + (index - (len(here) - 1) / 2) * step
            route = [(boxes[edge[0]].middle, boxes[edge[0]].bottom)]
            for stop in graph.stops.get(edge, ()):
                top = tops[row[stop]]
                route += [(centres[stop], top), (centres[stop], top + heights[row[stop]])]
            routes[edge] = [*route, (port, boxes[target].y)]
    return routes
