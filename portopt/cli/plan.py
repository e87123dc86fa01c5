"""``portopt plan``: the memory of a model's training on each of N workers."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from portopt import plots
from portopt.cli.console import checked, draw, output, picture, positive, print_table, status, write
from portopt.rules import registry
from portopt.sharding import memory

DIVIDED = ("nothing", "optimizer", "+ gradients", "+ parameters")
MOST_WORKERS = 10**6
"""The plan of a model's tensors for so many takes half a minute."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("plan", help="the memory that N workers need, and what they send")
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--params", type=_number, metavar="N", help="how many, as in 7.5e9")
    model.add_argument(
        "--model",
        metavar="MODEL",
        help="a .npz or .safetensors file, or module:callable, which returns a model or its arrays",
    )
    command.add_argument("--workers", type=_workers, required=True, metavar="N")
    command.add_argument(
        "--rule",
        type=checked(registry.parse),
        default="adam",
        metavar="RULE",
        help="an installed rule, as in adam or momentum:nesterov=True; default: adam",
    )
    command.add_argument(
        "--precision",
        choices=memory.PRECISIONS,
        default="mixed",
        help="of everything; mixed: 16 bits, with slots and a copy of the parameters in float32; "
        "default: mixed",
    )
    command.add_argument(
        "--memory", type=_number, metavar="BYTES", help="say which model would fit, as in 32e9"
    )
    command.add_argument("--json", type=output, metavar="FILE", help="write the table as JSON")
    command.add_argument(
        "--plot", type=picture, metavar="FILE", help="draw it by workers (.png, .svg or .pdf)"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
    try:
        model = _model(arguments)
    except ValueError as error:
        print(f"portopt: {error}", file=sys.stderr)
        return 2
    workers = arguments.workers
    head = ["stage", "divided", "parameters", "gradients", "optimizer", "together", "sent"]
    lines, results = [], []
    for stage in memory.STAGES:
        held, sent = model.memory(stage, workers), model.sent(stage, workers)
        result = {"stage": stage, **held._asdict(), "total": held.total, "sent": sent}
        line = [str(stage), DIVIDED[stage], *map(size, (*held, held.total, sent))]
        if arguments.memory is not None:
            result["largest"] = model.largest(stage, workers, arguments.memory)
            line.append(f"{result['largest']:.3g}")
        lines.append(line)
        results.append(result)
    title = f"{arguments.rule}, {model.elements:.3g} parameters, {arguments.precision} precision"
    print(f"{title}: bytes on the fullest of {workers} workers\n")
    if arguments.memory is not None:
        head.append(f"fit in {size(arguments.memory)}")
    print_table(head, lines)
    print("\nsent: by each worker in a step. Activations and buffers come on top.")
    described = {"rule": arguments.rule, "precision": arguments.precision, "workers": workers}
    write({**described, "params": model.elements, "stages": results}, arguments.json)
    if arguments.plot is not None:
        draw(
            arguments.plot,
            "The curves are",
            lambda path: plots.model_memory(model, title, workers, arguments.memory).savefig(
                path, dpi=100
            ),
        )
    return 0


def size(count: float) -> str:
    """A number of bytes in three digits and the decimal unit that fits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _model(arguments: argparse.Namespace) -> memory.ModelState:
    rule = registry.parse(arguments.rule)
    if arguments.params is not None:
        return memory.ModelState.of_count(arguments.params, rule, arguments.precision)
    sys.path.insert(0, str(Path.cwd()))  # a module of the user's
    status(f"{arguments.model} is read ...")
    shapes = memory.read_shapes(arguments.model)
    status(f"{arguments.model}: {len(shapes)} tensors", last=True)
    return memory.ModelState.of_shapes(shapes, rule, arguments.precision)


def _workers(text: str) -> int:
    """A number of workers, as an argument's type."""
    workers = positive(text)
    if workers > MOST_WORKERS:
        raise argparse.ArgumentTypeError(f"must be at most {MOST_WORKERS}, got {text}")
    return workers


def _number(text: str) -> float:
    """A positive number, as an argument's type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 2**63), got {text}")
    return value
