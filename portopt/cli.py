"""The command line: ``portopt COMMAND``, also as ``python -m portopt COMMAND``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from portopt import __version__, worker
from portopt.rules import Rule

NAMES = {"torch": "PyTorch", "keras": "Keras"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 if all it checks holds, 1 if not, 2 for bad usage."""
    parser = argparse.ArgumentParser(
        prog="portopt", description="Optimizers written once, run natively everywhere."
    )
    parser.add_argument("--version", action="version", version=f"portopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="train on digits in every framework, and compare")
    command.add_argument(
        "--rule",
        choices=["sgd", "momentum", "rmsprop", "adam", "adamw"],
        default="adam",
        help="default: adam",
    )
    command.add_argument("--epochs", type=_positive, default=15, help="default: 15")
    command.add_argument(
        "--plot",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE",
        help="where the picture goes; default: demo.png",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    command.set_defaults(run=_demo)

    command = commands.add_parser("parity", help="distance of every rule from float64")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON")
    command.set_defaults(run=_parity)

    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ModuleNotFoundError, worker.WorkerError, OSError) as error:
        print(f"portopt: {error}", file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _installed() -> list[str]:
    """The frameworks that can be used; says which cannot."""
    found = []
    for framework, name in NAMES.items():
        absent = worker.missing(framework)
        if absent is None:
            found.append(framework)
        else:
            print(f"{name} is left out: {absent} is not installed")
    return found


def _demo(arguments: argparse.Namespace) -> int:
    from portopt import demo

    task = demo.digits(arguments.epochs)
    case = demo.CASES[arguments.rule]
    frameworks = _installed()

    def progress(run: str, epoch: int, loss: float) -> None:
        text = f"{run:36} epoch {epoch}/{task.epochs}  loss {loss:.4f}"
        _status(text, last=epoch == task.epochs)

    runs = demo.train_numpy(case, task, progress)
    for framework in frameworks:
        _status(f"{NAMES[framework]} starts ...")
        runs += demo.train_child(framework, arguments.rule, arguments.epochs, progress)

    found = demo.differences(runs, task.steps_per_epoch)
    print()
    _print_table(
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
        _print_table(
            ["largest difference of the loss", "against", "in steps", "is", "limit", ""],
            [
                [
                    *map(": ".join, d.between),
                    f"1-{d.steps}",
                    f"{d.largest:.1e}",
                    f"{d.limit:.0e}",
                    _word(d),
                ]
                for d in found
            ],
        )
    try:
        from portopt import plots

        plots.loss_curves(runs, found, task.steps_per_epoch).savefig(arguments.plot, dpi=120)
        print(f"\nThe curves are in {arguments.plot}")
    except ModuleNotFoundError as error:
        print(f"\nNo picture: {error}")
    results = {
        "rule": str(case.rule),
        "runs": [asdict(run) for run in runs],
        "differences": [asdict(d) | {"passed": d.passed} for d in found],
    }
    return _finish(results, arguments.json, [d.passed for d in found])


def _parity(arguments: argparse.Namespace) -> int:
    from portopt import parity

    frameworks = _installed()
    if not frameworks:
        raise ModuleNotFoundError(
            "there is no native optimizer to compare with: pip install 'portable-optimizers[torch]'"
        )
    answers = {}
    for framework in frameworks:
        done = 0

        def progress(case: str, framework: str = framework) -> None:
            nonlocal done
            done += 1
            total = len(parity.CASES)
            _status(f"{NAMES[framework]}: {done} of {total} cases", last=done == total)

        _status(f"{NAMES[framework]} starts ...")
        answers[framework] = parity.ask(framework, progress)

    backends: dict[str, Callable[[Rule], parity.Arrays]] = {"numpy": parity.on_numpy}
    if worker.missing("jax") is None:
        backends["jax"] = parity.on_jax
    for framework, runs in answers.items():
        backends[framework] = lambda rule, runs=runs: runs[f"ours {rule}"]  # type: ignore[misc]

    table = []
    for row in parity.rows(parity.CASES, answers, backends):
        table.append(row)
        _status(f"judged: {len(table)} rows")
    _status(f"judged: {len(table)} rows", last=True)
    print()
    _print_table(
        ["rule", "options", "backend", "native", "ours", "native's", "ratio", "slots", ""],
        [
            [
                r.rule,
                r.options,
                r.backend,
                r.native,
                f"{r.ours:.2e}",
                f"{r.theirs:.2e}",
                f"{r.ratio:.3f}",
                f"{r.slot_ratio:.3f}",
                _word(r),
            ]
            for r in table
        ],
    )
    print(
        "\nours, native's: distance from float64, relative to the movement; ratio: at most "
        f"{parity.LIMIT}; slots: the same ratio for the slots, at most {parity.SLOT_LIMIT}"
    )
    return _finish(parity.as_json(table), arguments.json, [row.passed for row in table])


def _status(text: str, last: bool = False) -> None:
    """A line of progress that the next one overwrites; in a file, only the last one is kept."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="\n" if last else "", flush=True)
    elif last:
        print(text, flush=True)


def _word(checked: Any) -> str:
    return "ok" if checked.passed else "FAILED"


def _print_table(head: list[str], lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, ["-" * width for width in widths], *lines):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _finish(results: Any, path: Path | None, passed: list[bool]) -> int:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")
    if not passed:
        print("\nThere is nothing to compare with.")
    elif all(passed):
        print("\nParity holds.")
    else:
        print("\nPARITY IS LOST: see the lines marked FAILED.")
    return 0 if all(passed) else 1
