"""``portopt race``: rules side by side on a test function."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from portopt import extras, plots, race, worker
from portopt.cli.console import (
    checked,
    draw,
    output,
    picture,
    positive,
    print_table,
    status,
    write,
)
from portopt.rules import registry

EXTRAS = {"jax": "jax", "torch": "torch", "keras": "tf"}
"""What to install for each backend but NumPy."""


def animation(text: str) -> Path:
    """An `output` that is a GIF."""
    path = output(text)
    if path.suffix != ".gif":
        raise argparse.ArgumentTypeError(f"must end with .gif, got {text}")
    return path


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "race",
        help="rules side by side on a test function",
        epilog="A function of your own: @portopt.race.function(start=, x=, y=, minima=) above a "
        "function of x and y in portopt.tape's operations, given as FILE.py:NAME.",
    )
    command.add_argument(
        "rules",
        nargs="*",
        type=checked(registry.parse),
        metavar="RULE",
        help="an installed rule, with options as in adam:lr=0.1,beta1=0.8; "
        f"default: {' '.join(race.DEFAULT_RULES)}",
    )
    command.add_argument(
        "--function",
        type=checked(race.find),
        default="rosenbrock",
        help=f"one of {', '.join(race.FUNCTIONS)}, or FILE.py:NAME; default: rosenbrock",
    )
    command.add_argument(
        "--steps",
        type=positive,
        default=race.DEFAULT_STEPS,
        help=f"default: {race.DEFAULT_STEPS}",
    )
    command.add_argument(
        "--backend",
        choices=[*race.BACKENDS, *worker.FRAMEWORKS],
        default="numpy",
        help="what makes the steps; default: numpy",
    )
    command.add_argument(
        "--plot",
        type=picture,
        default="race.png",
        metavar="FILE",
        help="where the picture goes (.png, .svg or .pdf); default: race.png",
    )
    command.add_argument("--gif", type=animation, metavar="FILE", help="write an animation")
    command.add_argument("--json", type=output, metavar="FILE", help="write everything as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
    rules = list(dict.fromkeys(arguments.rules)) or list(race.DEFAULT_RULES)
    function = race.find(arguments.function)
    ways = {}
    try:
        for rule, way in _ways(rules, arguments):
            ways[rule] = way
            status(f"{arguments.backend}: {rule}, {len(ways)} of {len(rules)}")
    except (worker.WorkerError, ValueError, ArithmeticError) as error:  # a rule that does not fit
        print(f"\nportopt: {error}", file=sys.stderr)
        return 2
    title = f"{function.name}, {arguments.steps} steps on {arguments.backend}"
    status(title, last=True)
    print()
    print_table(
        ["rule", "final loss", "distance to the minimum", f"first within {race.TOLERANCE:g}"],
        [[rule, *_cells(way)] for rule, way in ways.items()],
    )
    results = {
        "function": arguments.function,
        "steps": arguments.steps,
        "backend": arguments.backend,
        "rules": {rule: _as_json(way) for rule, way in ways.items()},
    }
    write(results, arguments.json)
    draw(
        arguments.plot,
        "The trajectories are",
        lambda path: plots.trajectories(function, ways, title).savefig(path, dpi=100),
    )
    if arguments.gif is not None:
        status("drawing the animation ...")
        draw(
            arguments.gif,
            "They move",
            lambda path: plots.animate(path, function, ways, title),
        )
    return 0


def _ways(rules: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, race.Trajectory]]:
    function, steps, backend = arguments.function, arguments.steps, arguments.backend
    if backend != "numpy":
        absent = worker.missing(backend)
        if absent is not None:
            extra = absent if absent in ("torch", "jax") else EXTRAS[backend]  # what Keras runs on
            raise extras.missing(absent, extra)
    status(f"{backend} starts ...")
    if backend in worker.FRAMEWORKS:
        yield from race.ask(backend, rules, function, steps)
        return
    for rule in rules:
        made = {rule: registry.parse(rule)}
        yield from race.race(made, race.find(function), steps, race.BACKENDS[backend]).items()


def _cells(way: race.Trajectory) -> list[str]:
    """What the table says of a way."""
    if way.diverged is not None:
        return [f"not finite from step {way.diverged} on", "", _step(way.arrived)]
    distance = way.distances[-1]
    return [
        f"{way.losses[-1]:.6g}",
        "not known" if math.isnan(distance) else f"{distance:.3g}",
        _step(way.arrived),
    ]


def _step(number: int | None) -> str:
    return "-" if number is None else f"step {number}"


def _as_json(way: race.Trajectory) -> dict[str, Any]:
    """A way with null for what is not finite, as JSON has no other word for it."""

    def finite(values: Any) -> Any:
        if isinstance(values, list):
            return [finite(value) for value in values]
        return values if math.isfinite(values) else None

    return {
        "points": finite(way.points.tolist()),
        "losses": finite(way.losses.tolist()),
        "distances": finite(way.distances.tolist()),
        "arrived": way.arrived,
        "diverged": way.diverged,
    }
