"""Where the nodes of a graph of operations stand when it is drawn."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

Place: TypeAlias = tuple[int, float]
SWEEPS = 4  # the order within columns hardly changes after that


class Layout(NamedTuple):
    """Places (column, row): columns count from 0 on the left, rows from 0 in the middle."""

    nodes: dict[str, Place]
    edges: dict[tuple[str, str], list[Place]]  # operand, node: a place in every column passed


def layered(operands: Mapping[str, Sequence[str]]) -> Layout:
    """Place every node right of its operands, with few crossings of the edges.

    Args:
        operands: of each node, in the order of evaluation; none of an input.

    Source: K. Sugiyama, S. Tagawa and M. Toda, "Methods for visual understanding of hierarchical
    system structures", IEEE Trans. SMC 11(2), 1981: columns, points on edges, barycentres.
    """
    depth: dict[str, int] = {}
    for node, before in operands.items():
        depth[node] = max((depth[operand] + 1 for operand in before), default=0)
    for node, before in operands.items():
        if not before:  # an input stands beside its first use
            depth[node] = min(depth[user] for user, used in operands.items() if node in used) - 1

    paths: dict[tuple[str, str], list[Hashable]] = {}
    for node, before in operands.items():
        for operand in before:
            passed = range(depth[operand] + 1, depth[node])
            paths[operand, node] = [operand, *((operand, node, at) for at in passed), node]
    columns: list[list[Hashable]] = [[] for _ in range(1 + max(depth.values()))]
    for node, at in depth.items():
        columns[at].append(node)
    left: dict[Hashable, list[Hashable]] = {}
    right: dict[Hashable, list[Hashable]] = {}
    for (operand, _), path in paths.items():
        for at, point in enumerate(path[1:-1], depth[operand] + 1):
            columns[at].append(point)
        for a, b in pairwise(path):
            left.setdefault(b, []).append(a)
            right.setdefault(a, []).append(b)

    row: dict[Hashable, float] = {}

    def number(column: list[Hashable]) -> None:
        row.update({point: at - (len(column) - 1) / 2 for at, point in enumerate(column)})

    def barycentre(point: Hashable, beside: Mapping[Hashable, list[Hashable]]) -> float:
        rows = [row[other] for other in beside.get(point, [point])]
        return sum(rows) / len(rows)

    for column in columns:
        number(column)
    for _ in range(SWEEPS):
        for order, beside in ((columns, left), (columns[::-1], right)):
            for column in order:
                column.sort(key=lambda point: barycentre(point, beside))
                number(column)
    return Layout(
        {node: (at, row[node]) for node, at in depth.items()},
        {
            (operand, node): [(at, row[point]) for at, point in enumerate(path, depth[operand])]
            for (operand, node), path in paths.items()
        },
    )
