"""What was measured, beside what it is compared with, and the tables of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from portopt.bench.cases import IMPORTS, OURS, TITLES


@dataclass(frozen=True)
class Timing:
    """What was measured of one path in one case.

    Attributes:
        framework: One of `FRAMEWORKS`.
        mode: How the framework runs it; paths are compared within a mode.
        rule: The case's rule.
        mix: The case's mix.
        path: `OURS`, or the name of a native path.
        seconds: The median time of a step.
        limit: The least time that memory allows, from the bandwidth measured beside it.
        first: The time to make the optimizer and to step once.
        extra: Peak memory beyond what was there before the step, in bytes, if the system tells.
        rounds: The number of samples behind ``seconds``.
        ours: Our path's time in this mode over this path's in the same round, the median: how fast
            memory is changes from one second to the next. None where ours takes no part.
    """

    framework: str
    mode: str
    rule: str
    mix: str
    path: str
    seconds: float
    limit: float
    first: float
    extra: int | None
    rounds: int
    ours: float | None


class Group(NamedTuple):
    """Our path beside the native ones.

    Attributes:
        ours: Our timing.
        natives: Theirs, perhaps none.
    """

    ours: Timing
    natives: tuple[Timing, ...]

    @property
    def ratio(self) -> float | None:
        """Our time over that of the fastest native path, round by round."""
        return max((native.ours for native in self.natives if native.ours), default=None)


def groups(timings: Sequence[Timing]) -> list[Group]:
    """The timings that are compared with each other; where ours is missing, none is."""
    found: dict[tuple[str, ...], list[Timing]] = {}
    for timing in timings:
        key = (timing.framework, timing.mode, timing.rule, timing.mix)
        found.setdefault(key, []).append(timing)
    return [
        Group(ours, tuple(timing for timing in group if timing is not ours))
        for group in found.values()
        for ours in group
        if ours.path == OURS
    ]


Table: TypeAlias = tuple[list[str], list[list[str]]]
"""Head and lines."""


def step_table(some: Sequence[Group]) -> Table:
    """The steps of one framework and mix."""
    natives = list(dict.fromkeys(native.path for group in some for native in group.natives))
    head = ["rule", "mode", "limit", OURS, *natives, "ratio", "of limit", "MB", "native MB"]
    lines = []
    for group in some:
        ours = group.ours
        times = {native.path: native.seconds for native in group.natives}
        lines.append(
            [
                *(ours.rule, ours.mode, _milliseconds(ours.limit), _milliseconds(ours.seconds)),
                *(_milliseconds(times[path]) if path in times else "-" for path in natives),
                "-" if group.ratio is None else f"{group.ratio:.2f}",
                f"{ours.limit / ours.seconds:.0%}",
                _megabytes([ours]),
                _megabytes(group.natives),
            ]
        )
    return head, lines


def first_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """First steps, from `first_steps`."""
    return ["first step", "rule", "mix", "kernels on disk", "seconds"], [
        [
            *(f"{TITLES[row['framework']]} {row['path']}", row["rule"], row["mix"], row["cache"]),
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]


def import_table(imports: Mapping[str, float]) -> Table:
    """Import times by package."""
    return ["import", "after", "milliseconds"], [
        [package, IMPORTS[package], f"{1e3 * seconds:.0f}"] for package, seconds in imports.items()
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _megabytes(timings: Sequence[Timing]) -> str:
    known = [timing.extra for timing in timings if timing.extra is not None]
    return f"{min(known) / 1e6:.1f}" if known else "-"
