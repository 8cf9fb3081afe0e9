"""Boxes and arrows -> places: a graph in layers from left to right, with few crossings and calm lines.

Each node stands right of all that it comes from. An arrow over several layers gets a joint in each of them; arrows
from one node share their joints, so that they run as one line up to where they part.
"""

import math
from bisect import bisect_right, insort
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 16  # orders hardly change after this many
GAP_X, GAP_Y = 28.0, 12.0
WIDEST, SLOPE = 160.0, 0.12  # how wide a gap gets, and how much of the height that its steepest arrow climbs
JOINT = 6.0  # how much height a passing line takes
STRAIGHT = 4.0  # how much rather a line bends beside a node than between two joints

Point = tuple[float, float]
Spot = tuple[str, int]
"""A node, or the joint of its arrows, in a layer."""


@dataclass(frozen=True, slots=True)
class Box:
    """A node's size, and where its upper left corner is."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True, slots=True)
class Arranged:
    """A drawing.

    Attributes:
        routes: For each arrow the points where it leaves and enters columns, from node to node.
    """

    boxes: Mapping[str, Box]
    routes: Mapping[tuple[str, str], Sequence[Point]]
    width: float
    height: float


def arranged(boxes: Mapping[str, Box], arrows: Sequence[tuple[str, str]]) -> Arranged:
    """Place boxes; `arrows` have no cycle."""
    if not boxes:
        return Arranged({}, {}, 0.0, 0.0)
    rank = ranks(list(boxes), arrows)
    paths = {(s, t): [(s, r) for r in range(rank[s], rank[t])] + [(t, rank[t])] for s, t in arrows}
    hops = sorted({hop for path in paths.values() for hop in pairwise(path)})
    layers = _ordered(_layers(boxes, rank, hops), hops)
    heights = {spot: boxes[spot[0]].height if rank[spot[0]] == spot[1] else JOINT for layer in layers for spot in layer}
    joints = {spot for spot in heights if rank[spot[0]] != spot[1]}
    middles = _middles(layers, hops, heights, joints)
    widths = [max((boxes[n].width for n, r in layer if rank[n] == r), default=0.0) for layer in layers]
    gaps = _gaps(hops, middles, len(layers))
    lefts = [sum(widths[:i]) + sum(gaps[:i]) for i in range(len(widths))]
    placed = {
        n: Box(widths[rank[n]], b.height, lefts[rank[n]], middles[n, rank[n]] - b.height / 2) for n, b in boxes.items()
    }
    routes = {arrow: _route(path, middles, lefts, widths) for arrow, path in paths.items()}
    height = max(y + heights[spot] / 2 for spot, y in middles.items())
    return Arranged(placed, routes, lefts[-1] + widths[-1], height)


def ranks(nodes: Iterable[str], arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Layers by longest path; then each node goes as far right as that shortens its arrows."""
    before: dict[str, list[str]] = {n: [] for n in nodes}
    after: dict[str, list[str]] = {n: [] for n in before}
    for source, target in arrows:
        before[target].append(source)
        after[source].append(target)
    rank: dict[str, int] = {}
    while len(rank) < len(before):
        for node, sources in before.items():
            if node not in rank and all(s in rank for s in sources):
                rank[node] = max((rank[s] + 1 for s in sources), default=0)
    for node in sorted(before, key=lambda n: -rank[n]):
        # Arrows out of a node are one line up to where they part, so one that comes in costs as much as all of them.
        if after[node] and len(before[node]) <= 1:
            rank[node] = min(rank[t] for t in after[node]) - 1
    return rank


def crossings(layers: Sequence[Sequence[Spot]], hops: Iterable[tuple[Spot, Spot]]) -> int:
    """How often hops between neighbouring layers cross."""
    place = _places(layers)
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for one, other in hops:
        by_layer.setdefault(one[1], []).append((place[one], place[other]))
    found = 0
    for pairs in by_layer.values():
        seen: list[int] = []
        for _, right in sorted(pairs):
            found += len(seen) - bisect_right(seen, right)
            insort(seen, right)
    return found


def spread(wished: Sequence[float], apart: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The places nearest to those wished, in least squares, with at least `apart[i]` between i and i + 1."""
    offsets = [sum(apart[:i]) for i in range(len(wished))]
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many: pooled where they would overlap
    for wish, offset, weight in zip(wished, offsets, weights, strict=True):
        block = (wish - offset, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, heavy, count = blocks.pop()
            total = heavy + block[1]
            block = ((mean * heavy + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return [m + o for m, o in zip(means, offsets, strict=True)]


def _layers(nodes: Iterable[str], rank: Mapping[str, int], hops: Iterable[tuple[Spot, Spot]]) -> list[list[Spot]]:
    layers: list[list[Spot]] = [[] for _ in range(max(rank.values()) + 1)]
    for node in nodes:
        layers[rank[node]].append((node, rank[node]))
    for one, _ in hops:
        if rank[one[0]] != one[1]:
            layers[one[1]].append(one)
    return [list(dict.fromkeys(layer)) for layer in layers]


def _ordered(layers: list[list[Spot]], hops: Sequence[tuple[Spot, Spot]]) -> list[list[Spot]]:
    """The layers with each one's spots near the middle of their neighbours: of several orders the best."""
    before, after = _neighbours(hops)
    best, fewest = layers, crossings(layers, hops)
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        layers = [list(layer) for layer in layers]
        place = _places(layers)
        for layer in layers if forward else reversed(layers):
            beside = before if forward else after
            middle = {
                s: sum(place[o] for o in beside[s]) / len(beside[s]) if beside.get(s) else place[s] for s in layer
            }
            layer.sort(key=middle.__getitem__)
            place.update({spot: i for i, spot in enumerate(layer)})
        found = crossings(layers, hops)
        if found < fewest:
            best, fewest = layers, found
    return best


def _middles(
    layers: Sequence[Sequence[Spot]],
    hops: Sequence[tuple[Spot, Spot]],
    heights: Mapping[Spot, float],
    joints: Container[Spot],
) -> dict[Spot, float]:
    """How high the middle of each spot lies: near its neighbours', none over another."""
    before, after = _neighbours(hops)
    middle: dict[Spot, float] = {}
    aparts = [[(heights[a] + heights[b]) / 2 + GAP_Y for a, b in pairwise(layer)] for layer in layers]
    for layer, apart in zip(layers, aparts, strict=True):
        middle.update(zip(layer, spread([0.0] * len(layer), apart, [1.0] * len(layer)), strict=True))
    for sweep in range(4 * SWEEPS):
        order = range(len(layers)) if sweep % 2 == 0 else range(len(layers) - 1, -1, -1)
        for i in order:
            wished, weights = [], []
            for spot in layers[i]:
                beside = [*before.get(spot, ()), *after.get(spot, ())]
                pull = [STRAIGHT if spot in joints and other in joints else 1.0 for other in beside]
                total = sum(pull)
                near = sum(p * middle[o] for p, o in zip(pull, beside, strict=True))
                wished.append(near / total if total else middle[spot])
                weights.append(max(total, 1.0))
            middle.update(zip(layers[i], spread(wished, aparts[i], weights), strict=True))
    _straighten(middle, layers, aparts, hops, joints)
    top = min(m - heights[s] / 2 for s, m in middle.items())
    return {s: m - top for s, m in middle.items()}


def _straighten(
    middle: dict[Spot, float],
    layers: Sequence[Sequence[Spot]],
    aparts: Sequence[Sequence[float]],
    hops: Sequence[tuple[Spot, Spot]],
    joints: Container[Spot],
) -> None:
    """Make a line that runs on level, and one that goes nowhere else: least squares bend each a little."""
    before, after = _neighbours(hops)
    for layer, apart in zip(layers, aparts, strict=True):
        for i, spot in enumerate(layer):
            low = middle[layer[i - 1]] + apart[i - 1] if i else -math.inf
            high = middle[layer[i + 1]] - apart[i] if i < len(apart) else math.inf
            levels = [middle[o] for o in before.get(spot, ()) if len(after[o]) == 1 or (spot in joints and o in joints)]
            if levels:
                level = min(levels, key=lambda y: abs(y - middle[spot]))
                middle[spot] = min(max(level, low), high)


def _gaps(hops: Sequence[tuple[Spot, Spot]], middles: Mapping[Spot, float], layers: int) -> list[float]:
    """How wide the room after each layer is: wider where arrows climb far, or they would lie on one another."""
    climbs = [0.0] * layers
    for one, other in hops:
        climbs[one[1]] = max(climbs[one[1]], abs(middles[one] - middles[other]))
    return [min(max(GAP_X, SLOPE * climb), WIDEST) for climb in climbs]


def _route(
    path: Sequence[Spot], middles: Mapping[Spot, float], lefts: Sequence[float], widths: Sequence[float]
) -> list[Point]:
    points = []
    for i, spot in enumerate(path):
        left, right = lefts[spot[1]], lefts[spot[1]] + widths[spot[1]]
        if i > 0:
            points.append((left, middles[spot]))
        if i < len(path) - 1:
            points.append((right, middles[spot]))
    return points


def _places(layers: Sequence[Sequence[Spot]]) -> dict[Spot, int]:
    return {spot: i for layer in layers for i, spot in enumerate(layer)}


def _neighbours(hops: Iterable[tuple[Spot, Spot]]) -> tuple[dict[Spot, list[Spot]], dict[Spot, list[Spot]]]:
    before: dict[Spot, list[Spot]] = {}
    after: dict[Spot, list[Spot]] = {}
    for one, other in hops:
        after.setdefault(one, []).append(other)
        before.setdefault(other, []).append(one)
    return before, after
