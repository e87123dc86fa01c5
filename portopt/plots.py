"""Plots: results that people would rather see than read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from portopt.bench import TITLES, Group
from portopt.demo import Difference, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_curves(runs: list[Run], found: list[Difference], steps_per_epoch: int) -> Figure:
    """The demo as a picture: the loss by epoch, and by step how far curves are apart.

    Args:
        runs: The runs.
        found: The differences to draw, each with its limit.
        steps_per_epoch: The number of batches of an epoch.

    Raises:
        ModuleNotFoundError: matplotlib is missing; names it.
    """
    figure = _figure(12, 5)
    left, right = figure.subplots(1, 2)
    # The curves lie on each other: the first is drawn widest, so that all are seen.
    for width, run in zip(np.linspace(16, 1.5, len(runs)), runs, strict=True):
        means = _by_epoch(run.losses, steps_per_epoch).mean(axis=1)
        label = f"{run.framework}: {run.optimizer}"
        left.plot(range(1, len(means) + 1), means, linewidth=width, label=label)
    left.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy", yscale="log")
    left.legend()
    curves = {(run.framework, run.optimizer): run.losses for run in runs}
    for difference in found:
        a, b = (curves[run] for run in difference.between)
        largest = _by_epoch(np.abs(np.subtract(a, b)), steps_per_epoch).max(axis=1)
        label = " against ".join(": ".join(run) for run in difference.between)
        # Nothing at all has no place on a logarithmic axis: draw it below the last bit.
        right.plot(range(1, len(largest) + 1), np.maximum(largest, 1e-9), ".-", label=label)
    for limit in sorted({difference.limit for difference in found}):
        right.axhline(limit, color="grey", linestyle="--", linewidth=1)
        right.annotate(f"limit {limit:g}", (1, limit), va="bottom", color="grey")
    right.set(
        title="Largest difference of the loss",
        xlabel="epoch",
        ylabel="absolute difference at any step",
        yscale="log",
        ylim=(5e-10, 1),
    )
    if found:
        right.legend(loc="upper right")
    return figure


def step_times(groups: Sequence[Group]) -> Figure:
    """The benchmarks as bars: the time of a step over the memory limit, one panel a mix.

    Args:
        groups: What `portopt.bench.groups` returned.

    Raises:
        ModuleNotFoundError: matplotlib is missing; names it.
    """
    figure = _figure(14, 1.0)
    from matplotlib.patches import Patch

    panels: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        panels.setdefault((group.ours.framework, group.ours.mix), []).append(group)
    bars = [timing for group in groups for timing in (group.ours, *group.natives)]
    top = max((bar.seconds / bar.limit for bar in bars), default=1.0)
    colors = {
        path: f"C{place}" for place, path in enumerate(dict.fromkeys(bar.path for bar in bars))
    }
    figure.set_figheight(1 + 2.5 * len(panels))
    axes = figure.subplots(len(panels), squeeze=False, sharey=True).flat
    for axis, ((framework, mix), some) in zip(axes, panels.items(), strict=True):
        left = 0
        ticks = {}
        for group in some:
            timings = (group.ours, *group.natives)
            for place, timing in enumerate(timings, left):
                height = timing.seconds / timing.limit
                axis.bar(place, height, 0.9, color=colors[timing.path])
                above = max(height, 1.0) if height > 0.6 else height  # clear of the line
                label = f"{height:.2g}" if height < 100 else f"{height:.0f}"
                axis.annotate(label, (place, above), ha="center", va="bottom", size=7)
            mode = "" if group.ours.mode in ("step", "jit") else f"\n{group.ours.mode}"
            ticks[left + (len(timings) - 1) / 2] = group.ours.rule + mode
            left += len(timings) + 1
        axis.axhline(1, color="black", linestyle="--", linewidth=1)
        axis.set_xticks([*ticks], [*ticks.values()])
        axis.set(title=f"{TITLES[framework]}, {TITLES[mix]}", ylabel="times the memory limit")
        axis.set(yscale="log", ylim=(0.3, 2 * top), xlim=(-1, max(left - 1, 24)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    handles = [Patch(color=color, label=path) for path, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def _by_epoch(values: Any, steps_per_epoch: int) -> npt.NDArray[Any]:
    return np.reshape(values, (-1, steps_per_epoch))
