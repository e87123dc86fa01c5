"""Plots: results that people would rather see than read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from portopt import extras
from portopt.bench import TITLES, Group
from portopt.demo import Difference, Run
from portopt.race import Function, Trajectory
from portopt.sharding.memory import STAGES, ModelState
from portopt.tune import Objective, Span, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from portopt.tape import Trace


def loss_curves(runs: list[Run], found: list[Difference], steps_per_epoch: int) -> Figure:
    """The demo as a picture: the loss by epoch, and by step how far curves are apart.

    Args:
        runs: The runs.
        found: The differences to draw, each with its limit.
        steps_per_epoch: The number of batches of an epoch.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
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
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
        ValueError: there are no groups.
    """
    figure = _figure(14, 1.0)
    if not groups:
        raise ValueError("nothing was measured")
    from matplotlib.patches import Patch

    panels: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        panels.setdefault((group.ours.framework, group.ours.mix), []).append(group)
    bars = [timing for group in groups for timing in (group.ours, *group.natives)]
    top = max(bar.seconds / bar.limit for bar in bars)
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
        if len(ticks) > 12:  # or one would lie on the next
            axis.tick_params("x", labelrotation=30, labelsize="small")
        axis.set(title=f"{TITLES[framework]}, {TITLES[mix]}", ylabel="times the memory limit")
        axis.set(yscale="log", ylim=(0.3, 2 * top), xlim=(-1, max(left - 1, 24)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    handles = [Patch(color=color, label=path) for path, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def trajectories(function: Function, ways: Mapping[str, Trajectory], title: str = "") -> Figure:
    """A race as a picture: the ways on the function's contours, and the loss by step.

    A way ends where it diverges, and leaves the picture where it leaves the function's ranges.

    Args:
        function: Where they ran.
        ways: What `portopt.race.race` returned.
        title: What to say above; the function's name by default.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
    """
    return _trajectories(function, ways, title)[0]


def animate(
    path: Path, function: Function, ways: Mapping[str, Trajectory], title: str = ""
) -> None:
    """Write `trajectories` as an animated GIF, of at most 60 frames.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
    """
    animation = extras.load("matplotlib.animation", "plot")
    figure, show = _trajectories(function, ways, title)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a layout for each frame would take most of the time
    last = max(len(way.points) for way in ways.values()) - 1
    frames = np.unique(np.linspace(1, last, 60).round().astype(int))
    movie = animation.FuncAnimation(figure, show, frames, init_func=list)
    movie.save(path, writer=animation.PillowWriter(fps=15), dpi=70)


@np.errstate(all="ignore")  # a user's function may be infinite, or NaN
def _trajectories(
    function: Function, ways: Mapping[str, Trajectory], title: str
) -> tuple[Figure, Callable[[int], None]]:
    """The figure, and the function that leaves only so many steps of it."""
    figure = _figure(12, 5.2)
    left, right = figure.subplots(1, 2)
    x, y = (np.linspace(*ends, 201) for ends in (function.x, function.y))
    surface = function(*np.meshgrid(x, y))
    lowest = np.min(surface, where=np.isfinite(surface), initial=np.inf)
    floor = function(*function.minima[0]) if function.minima else lowest
    above = surface - floor
    highest = np.max(above, where=np.isfinite(above), initial=0)
    if highest > 0:  # or it is flat, and has no contours
        levels = np.geomspace(1e-4, 1, 17) * highest
        logarithms = np.log10(np.maximum(above, levels[0]))
        left.contourf(x, y, logarithms, np.log10(levels), cmap="Blues_r", alpha=0.7)
        left.contour(x, y, above, levels, colors="white", linewidths=0.5)
    reach = np.array([function.x, function.y]).T
    low, high = reach[0] - np.ptp(reach, axis=0), reach[1] + np.ptp(reach, axis=0)
    first = function(*function.start) - floor
    ceiling = 100 * first if first > 0 else np.inf
    lines = []
    for place, (name, way) in enumerate(ways.items()):
        points = np.clip(way.points[: way.diverged], low, high)
        losses = np.clip(way.losses[: way.diverged] - floor, 1e-16, ceiling)
        label = name if way.diverged is None else f"{name} (diverges)"
        color = {"color": f"C{place + 1}", "label": label}
        steps = np.arange(len(losses))
        lines += [
            (left.plot(*points.T, ".-", markersize=3, linewidth=1.2, **color)[0], *points.T),
            (right.plot(steps, losses, **color)[0], steps, losses),
        ]
    left.plot(*function.start, "o", color="black", label="start")
    for minimum in function.minima:
        once = {"label": "minimum"} if minimum == function.minima[0] else {}
        star = {"markersize": 16, "color": "gold", "markeredgecolor": "black", "zorder": 5}
        left.plot(*minimum, "*", **star, **once)
    left.set(title=title or function.name, xlabel="x", ylabel="y", xlim=function.x, ylim=function.y)
    right.set(title="Loss", xlabel="step", ylabel="loss above the minimum", yscale="log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6)

    def show(steps: int) -> None:
        for line, horizontal, vertical in lines:
            line.set_data(horizontal[: steps + 1], vertical[: steps + 1])

    return figure, show


def computation(trace: Trace) -> Figure:
    """A traced computation of some tens of operations as a graph, its inputs on the left.

    On the nodes stand values and adjoints (of arrays the shapes), on the edges local derivatives.

    Args:
        trace: What `portopt.tape.trace` returned.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
    """
    figure = _figure(1, 1)
    from matplotlib.patches import Patch, Rectangle

    from portopt.tape.evaluation import shown
    from portopt.tape.layout import layered

    nodes = {line.node: line for line in trace.lines}
    layout = layered(
        {name: [x for x in line.operands if x in nodes] for name, line in nodes.items()}
    )
    texts = {}
    for name, line in nodes.items():
        call = f" = {line.name}({', '.join(line.operands)})" if line.operands else ""
        adjoint = "" if line.adjoint is None else f"\nadjoint {shown(line.adjoint)}"
        texts[name] = f"{name}{call}\nvalue {shown(line.value)}{adjoint}"
    longest = max(len(row) for text in texts.values() for row in text.split("\n"))
    # The unit of the axes is an inch.
    width, height = 0.3 + 0.08 * longest, 0.65
    right, down = width + 0.9, height + 0.35
    columns, rows = zip(*(place for path in layout.edges.values() for place in path), strict=True)
    x_limits = -width / 2 - 0.1, right * max(columns) + width / 2 + 0.1
    y_limits = down * max(rows) + height / 2 + 0.1, down * min(rows) - height / 2 - 0.1
    figure.set_size_inches(x_limits[1] - x_limits[0], y_limits[0] - y_limits[1] + 0.4)
    axis = figure.subplots()
    axis.set(xlim=x_limits, ylim=y_limits, aspect="equal")
    axis.set_axis_off()

    colors = {"input": "#cfe3f5", "constant": "#e3e3e3", "operation": "#fbe6c8"}
    kinds = {
        name: line.name if line.name in colors else "operation" for name, line in nodes.items()
    }
    for name, (column, row) in layout.nodes.items():
        x, y = right * column, down * row
        corner = x - width / 2, y - height / 2
        color = colors[kinds[name]]
        axis.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor="0.3"))
        axis.text(x, y, texts[name], ha="center", va="center", size=9)
    for (operand, name), path in layout.edges.items():
        points = [(right * column, down * row) for column, row in path]
        points[0] = points[0][0] + width / 2, points[0][1]
        points[-1] = points[-1][0] - width / 2, points[-1][1]
        axis.plot(*zip(*points[:-1], strict=True), color="0.3", linewidth=1)
        arrow = {"arrowstyle": "-|>", "color": "0.3", "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", points[-1], points[-2], arrowprops=arrow)
        pairs = zip(nodes[name].inputs, nodes[name].shown_local(), strict=False)
        local = ", ".join(text for variable, text in pairs if variable == operand)
        if local:
            middle = np.mean(points[-2:], axis=0)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axis.text(middle[0], middle[1], local, ha="center", va="center", size=8, bbox=box)
    handles = [
        Patch(facecolor=color, edgecolor="0.3", label=kind)
        for kind, color in colors.items()
        if kind in kinds.values()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def search(
    trials: Sequence[Trial], spans: Mapping[str, Span], objective: Objective, title: str
) -> Figure:
    """A search as a picture: the score by trial, and by the value of each option.

    Args:
        trials: What `portopt.tune.tune` yielded.
        spans: Where it searched, as `portopt.tune.spans` says.
        objective: What was searched for.
        title: What to say above: the rule's name.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
    """
    figure = _figure(4 * (len(spans) + 1), 4)
    scores = [trial.score for trial in trials]
    numbers = np.arange(1, len(trials) + 1)
    first, *others = figure.subplots(1, len(spans) + 1, sharey=True)
    best = (np.maximum if objective.maximize else np.minimum).accumulate(scores)
    first.plot(numbers, scores, "o", color="grey", markersize=4, label="trial")
    first.plot(numbers, best, color="C1", drawstyle="steps-post", label="best so far")
    first.set(xlabel="trial", ylabel="score")
    first.legend()
    winner = scores.index(best[-1])
    for axis, (name, span) in zip(others, spans.items(), strict=True):
        distances = [span.distance(trial.values[name]) for trial in trials]
        points = axis.scatter(distances, scores, c=numbers, s=16)
        axis.plot(distances[winner], best[-1], "*", color="C1", markersize=14, label="best")
        axis.set(xlabel=span.label(name), xscale="log")
    others[0].legend(loc="center right")
    figure.colorbar(points, ax=others[-1], label="trial")
    figure.suptitle(f"{title}: {objective.title}")
    return figure


def model_memory(model: ModelState, title: str, workers: int, limit: float | None = None) -> Figure:
    """The memory of a model's training on one worker, by the number of workers, for each stage.

    Args:
        model: The model.
        title: What to say above.
        workers: The number of workers to mark.
        limit: Bytes of memory to mark.

    Raises:
        ModuleNotFoundError: matplotlib is missing; says which extra to install.
    """
    figure = _figure(7, 4.5)
    axis = figure.subplots()
    counts = [2**power for power in range(max(11, workers.bit_length() + 1))]
    for stage in STAGES:
        totals = [model.memory(stage, count).total / 1e9 for count in counts]
        axis.plot(counts, totals, ".-", label=f"stage {stage}")
        here = model.memory(stage, workers).total / 1e9
        axis.annotate(f"{here:.3g}", (workers, here), (4, 4), textcoords="offset points", size=9)
    axis.axvline(workers, color="grey", linestyle=":", linewidth=1)
    if limit is not None:
        axis.axhline(limit / 1e9, color="black", linestyle="--", linewidth=1, label="memory")
    axis.set(title=title, xlabel="workers", ylabel="GB on the fullest worker")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(loc="lower left")
    return figure


def _figure(width: float, height: float) -> Figure:
    figure: Figure = extras.load("matplotlib.figure", "plot").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure


def _by_epoch(values: Any, steps_per_epoch: int) -> npt.NDArray[Any]:
    return np.reshape(values, (-1, steps_per_epoch))
