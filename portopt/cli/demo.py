"""``portopt demo``: train on digits in every framework, and compare."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from portopt import demo, plots, worker
from portopt.cli.console import (
    Failures,
    draw,
    each_framework,
    output,
    picture,
    positive,
    print_table,
    status,
    verdict,
    word,
    write,
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("demo", help="train on digits in every framework, and compare")
    command.add_argument("--rule", choices=demo.CASES, default="adam", help="default: adam")
    command.add_argument("--epochs", type=positive, default=15, help="default: 15")
    command.add_argument(
        "--plot",
        type=picture,
        default="demo.png",
        metavar="FILE",
        help="where the picture goes (.png, .svg or .pdf); default: demo.png",
    )
    command.add_argument("--json", type=output, metavar="FILE", help="write everything as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
    task = demo.digits(arguments.epochs)
    case = demo.CASES[arguments.rule]
    failures: Failures = []

    def progress(run: str, epoch: int, loss: float) -> None:
        text = f"{run:36} epoch {epoch}/{task.epochs}  loss {loss:.4f}"
        status(text, last=epoch == task.epochs)

    runs = demo.train_numpy(case, task, progress)
    for framework in each_framework():
        try:
            runs += demo.train_child(framework, arguments.rule, arguments.epochs, progress)
        except worker.WorkerError as error:
            failures.append(error)

    found = demo.differences(runs, task.steps_per_epoch)
    print()
    print_table(
        ["framework", "optimizer", "final loss", "test accuracy", "seconds"],
        [
            [
                r.framework,
                r.optimizer,
                f"{r.losses[-1]:.6f}",
                f"{r.accuracy:.4f}",
                f"{r.seconds:.2f}",
            ]
            for r in runs
        ],
    )
    if found:
        print()
        print_table(
            ["largest difference of the loss", "against", "in steps", "is", "limit", ""],
            [
                [
                    *map(": ".join, d.between),
                    f"1-{d.steps}",
                    f"{d.largest:.1e}",
                    f"{d.limit:.0e}",
                    word(d),
                ]
                for d in found
            ],
        )
    results = {
        "rule": str(case.rule),
        "runs": [asdict(run) for run in runs],
        "differences": [asdict(d) | {"passed": d.passed} for d in found],
    }
    write(results, arguments.json)
    draw(
        arguments.plot,
        "The curves are",
        lambda path: plots.loss_curves(runs, found, task.steps_per_epoch).savefig(path, dpi=120),
    )
    return verdict([d.passed for d in found], failures)
