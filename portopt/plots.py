"""Plots: results that people would rather see than read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(12, 5), layout="constrained")
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


def _by_epoch(values: Any, steps_per_epoch: int) -> npt.NDArray[Any]:
    return np.reshape(values, (-1, steps_per_epoch))
