"""The plan: which rank updates which elements."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

from portopt.kernels.cpu import SPAN

ALIGN = 16
"""Tensors are cut at multiples of so many elements: 64 bytes of float32 are a cache line, and the
widest vector of a processor, so that no line has two owners and only a tensor's end is ragged."""
CHUNK = SPAN
"""The elements whose squares are added in one go, so that a norm's bits know of no cut."""
SHOWN = 4
"""The most spans of a rank that are printed."""


class Span(NamedTuple):
    """Elements of a tensor that lie side by side.

    Attributes:
        tensor: The place of the tensor among all of them.
        start: Its first element of the span.
        length: The number of elements.
    """

    tensor: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """The element after the last one."""
        return self.start + self.length


@dataclass(frozen=True)
class Plan:
    """Who updates what: every element of every tensor belongs to one rank.

    Attributes:
        sizes: For each tensor, its number of elements.
        widths: For each tensor, how much one element of it counts.
        spans: For each rank its spans, in the order of the tensors; of a tensor at most one.
    """

    sizes: tuple[int, ...]
    widths: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return len(self.spans)

    @property
    def shares(self) -> tuple[int, ...]:
        """For each rank, what its elements count."""
        return tuple(sum(s.length * self.widths[s.tensor] for s in mine) for mine in self.spans)

    def chunks(self, rank: int) -> list[Span]:
        """The chunks of `CHUNK` elements, counted from a tensor's start, that begin in a rank."""
        return [
            Span(tensor, start, min(CHUNK, self.sizes[tensor] - start))
            for tensor, begin, length in self.spans[rank]
            for start in range(-(-begin // CHUNK) * CHUNK, begin + length, CHUNK)
        ]

    def heads(self, rank: int) -> list[Span]:
        """What a rank has of chunks that begin in another one: less than a chunk a tensor."""
        heads = (
            Span(tensor, start, min(length, -start % CHUNK))
            for tensor, start, length in self.spans[rank]
        )
        return [head for head in heads if head.length]

    def extended(self, other: Plan) -> Plan:
        """The plan of these tensors and, numbered after them, those of another plan."""
        moved = [
            tuple(span._replace(tensor=span.tensor + len(self.sizes)) for span in theirs)
            for theirs in other.spans
        ]
        spans = (mine + theirs for mine, theirs in zip(self.spans, moved, strict=True))
        return Plan(self.sizes + other.sizes, self.widths + other.widths, tuple(spans))

    def __str__(self) -> str:
        """A table, a line for each rank."""
        shares = self.shares
        equal = sum(shares) / self.ranks or 1
        lines = ["rank      elements  share  spans"]
        for rank, (mine, share) in enumerate(zip(self.spans, shares, strict=True)):
            shown = [self._text(span) for span in mine[:SHOWN]]
            if len(mine) > SHOWN:
                shown.append(f"and {len(mine) - SHOWN} more")
            elements = sum(span.length for span in mine)
            lines.append(f"{rank:4}  {elements:12,}  {share / equal:.3f}  {', '.join(shown)}")
        return "\n".join(lines)

    def _text(self, span: Span) -> str:
        if span.length == self.sizes[span.tensor]:
            return str(span.tensor)
        return f"{span.tensor}[{span.start}:{span.stop}]"


def divide(
    sizes: Sequence[int],
    ranks: int,
    *,
    whole: Collection[int] = (),
    widths: Sequence[int] | None = None,
    align: int = ALIGN,
) -> Plan:
    """Divide tensors among ranks, so that all have the same.

    The tensors lie one after another on a line, which is cut into pieces of equal length; a cut
    within a tensor moves to the nearest multiple of ``align``, or to its end. So a rank is off from
    an equal share by at most ``align`` elements. Tensors that must stay whole are handed out first,
    the largest before the others, each to the rank that has least so far; what may be cut then
    fills up the rest, as water would. Tensors without elements are the first rank's: there is
    something to keep for them, too, such as a number of steps.

    Args:
        sizes: For each tensor, its number of elements.
        ranks: The number of ranks.
        whole: The places of the tensors that must not be cut.
        widths: What an element of each tensor counts, such as the bytes of its state; 1 by default.
        align: Cuts are multiples of this from the start of a tensor.

    Returns:
        The plan. It depends on the arguments alone: every rank makes the same.

    Raises:
        ValueError: a size is negative, ``ranks``, ``align`` or a width is less than 1, or there is
            no tensor at a place in ``whole``.

    Source:
        Largest first: Graham 1969, "Bounds on Multiprocessing Timing Anomalies", theorem 2: at most
        4/3 of the best. https://doi.org/10.1137/0117039

    Example:
        >>> print(divide([100, 10, 50], 2))
        rank      elements  share  spans
           0            80  1.000  0[0:80]
           1            80  1.000  0[80:100], 1, 2
    """
    each = tuple(widths) if widths is not None else (1,) * len(sizes)
    _check(sizes, ranks, whole, each, align)
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap: the least loaded rank first
    for tensor in sorted(set(whole), key=lambda tensor: -sizes[tensor] * each[tensor]):
        if sizes[tensor]:
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + sizes[tensor] * each[tensor], rank))
            spans[rank].append(Span(tensor, 0, sizes[tensor]))
    spans[0] += [Span(tensor, 0, 0) for tensor, size in enumerate(sizes) if not size]
    divided = [tensor for tensor in range(len(sizes)) if sizes[tensor] and tensor not in set(whole)]
    ends = list(accumulate(sizes[tensor] * each[tensor] for tensor in divided))
    if divided:
        filled = accumulate(load for load, _ in sorted(loads))
        level = min(Fraction(ends[-1] + load, n) for n, load in enumerate(filled, 1))
        room = [max(level - load, Fraction()) for load, _ in sorted(loads, key=lambda x: x[1])]

        def cut(position: Fraction) -> tuple[int, int]:
            """A place in ``divided``, and how many of that tensor's elements are before the cut."""
            place = bisect_left(ends, position)
            size, width = sizes[divided[place]], each[divided[place]]
            before = size - (ends[place] - position) / width
            below = before // align * align
            above = min(below + align, size)
            return place, below if before - below < above - before else above

        cuts = map(cut, accumulate(room, initial=Fraction()))
        for mine, ((first, begin), (last, end)) in zip(spans, pairwise(cuts), strict=True):
            for place in range(first, last + 1):
                start = begin if place == first else 0
                stop = end if place == last else sizes[divided[place]]
                if stop > start:
                    mine.append(Span(divided[place], start, stop - start))
    return Plan(tuple(sizes), each, tuple(tuple(sorted(mine)) for mine in spans))


def _check(
    sizes: Sequence[int], ranks: int, whole: Collection[int], widths: tuple[int, ...], align: int
) -> None:
    for name, value in (("ranks", ranks), ("align", align)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for place, size in enumerate(sizes):
        if size < 0:
            raise ValueError(f"sizes[{place}] must be at least 0, got {size}")
    if len(widths) != len(sizes) or min(widths, default=1) < 1:
        raise ValueError(f"widths must be {len(sizes)} numbers of at least 1, got {widths}")
    for place in whole:
        if not 0 <= place < len(sizes):
            raise ValueError(f"whole must have places in [0, {len(sizes)}), got {place}")
