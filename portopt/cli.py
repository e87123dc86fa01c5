"""The command line: ``portopt COMMAND``, also as ``python -m portopt COMMAND``."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from portopt import __version__, bench, demo, parity, plots, worker
from portopt.rules import Rule, registry

NAMES = {"torch": "PyTorch", "keras": "Keras"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 if all that it checks holds, 1 if parity is lost, 2 if it could not be
        checked, 130 if it was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="portopt", description="Optimizers written once, run natively everywhere."
    )
    parser.add_argument("--version", action="version", version=f"portopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("demo", help="train on digits in every framework, and compare")
    command.add_argument("--rule", choices=demo.CASES, default="adam", help="default: adam")
    command.add_argument("--epochs", type=_positive, default=15, help="default: 15")
    command.add_argument(
        "--plot",
        type=_picture,
        default="demo.png",
        metavar="FILE",
        help="where the picture goes (.png, .svg or .pdf); default: demo.png",
    )
    command.add_argument("--json", type=_output, metavar="FILE", help="write everything as JSON")
    command.set_defaults(run=_demo)

    command = commands.add_parser("rules", help="the rules that are installed")
    command.add_argument("--json", type=_output, metavar="FILE", help="write the list as JSON")
    command.set_defaults(run=_rules)

    command = commands.add_parser("parity", help="distance of every rule from float64")
    command.add_argument("--json", type=_output, metavar="FILE", help="write the table as JSON")
    command.add_argument(
        "--markdown", type=_output, metavar="FILE", help="write it as the documentation has it"
    )
    command.set_defaults(run=_parity)

    command = commands.add_parser("bench", help="time of a step beside every native mode")
    command.add_argument(
        "--rules",
        nargs="+",
        choices=bench.RULES,
        default=[],
        metavar="RULE",
        help=_list(bench.RULES),
    )
    command.add_argument(
        "--mixes",
        nargs="+",
        choices=bench.MIXES,
        default=[],
        metavar="MIX",
        help=_list(bench.MIXES),
    )
    command.add_argument("--quick", action="store_true", help="one case each, in a minute")
    command.add_argument("--json", type=_output, metavar="FILE", help="write everything as JSON")
    command.add_argument(
        "--plot", type=_picture, metavar="FILE", help="draw bars (.png, .svg or .pdf)"
    )
    command.set_defaults(run=_bench)

    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ModuleNotFoundError, OSError) as error:
        print(f"portopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nportopt: interrupted", file=sys.stderr)
        return 130


def _list(names: Iterable[str]) -> str:
    return f"some of {', '.join(names)}; by default those that are worth their time"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def _output(text: str) -> Path:
    """A file to write, which is found out before the work and not after it."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file that can be written, got {text}")
    return path


def _picture(text: str) -> Path:
    path = _output(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"must end with .png, .svg or .pdf, got {text}")
    return path


Failures = list[worker.WorkerError]


def _each_framework() -> Iterator[str]:
    """The frameworks that can be used; says which cannot, and that each of the others starts."""
    for framework, name in NAMES.items():
        absent = worker.missing(framework)
        if absent is not None:
            print(f"{name} is left out: {absent} is not installed")
            continue
        _status(f"{name} starts ...")
        yield framework


def _demo(arguments: argparse.Namespace) -> int:
    task = demo.digits(arguments.epochs)
    case = demo.CASES[arguments.rule]
    failures: Failures = []

    def progress(run: str, epoch: int, loss: float) -> None:
        text = f"{run:36} epoch {epoch}/{task.epochs}  loss {loss:.4f}"
        _status(text, last=epoch == task.epochs)

    runs = demo.train_numpy(case, task, progress)
    for framework in _each_framework():
        try:
            runs += demo.train_child(framework, arguments.rule, arguments.epochs, progress)
        except worker.WorkerError as error:
            failures.append(error)

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
    results = {
        "rule": str(case.rule),
        "runs": [asdict(run) for run in runs],
        "differences": [asdict(d) | {"passed": d.passed} for d in found],
    }
    _write(results, arguments.json)
    try:
        plots.loss_curves(runs, found, task.steps_per_epoch).savefig(arguments.plot, dpi=120)
        print(f"\nThe curves are in {arguments.plot}")
    except (ModuleNotFoundError, OSError) as error:
        print(f"\nNo picture: {error}")
    return _verdict([d.passed for d in found], failures)


def _rules(arguments: argparse.Namespace) -> int:
    own = sorted(registry.own().items(), key=lambda pair: pair[0].casefold())
    entries = [registry.entry(name, rule) for name, rule in own]
    status = 0
    for name, point in registry.plugins().items():
        package = point.dist.name if point.dist else point.value
        try:
            entries.append(registry.entry(name, registry.load(point), package))
        except registry.PluginError as error:
            print(f"portopt: {error}", file=sys.stderr)
            status = 2
    for entry in entries:
        least, most = entry.bytes_per_parameter
        size = f"{least} bytes of state for a float32 parameter"
        size += f", {most} with every option" if most > least else ""
        origin = "" if entry.package == "portopt" else f", from {entry.package}"
        print(f"{entry.name}: {size}{origin}")
        options = (k if v is None else f"{k}={v!r}" for k, v in entry.options.items())
        for title, values in {
            "options": options,
            "slots": (*entry.slots, *(f"{slot} (an option's)" for slot in entry.further_slots)),
            "numbers": entry.numbers,
            "natives": entry.natives,
        }.items():
            text = ", ".join(values)
            if text:
                indent = " " * 10
                print(
                    textwrap.fill(
                        text, 100, initial_indent=f"  {title:8}", subsequent_indent=indent
                    )
                )
    listed = [asdict(e) | {"bytes_per_parameter": e.bytes_per_parameter} for e in entries]
    _write(listed, arguments.json)
    return status


def _parity(arguments: argparse.Namespace) -> int:
    answers = {}
    failures: Failures = []
    for framework in _each_framework():
        done = 0

        def progress(case: str, framework: str = framework) -> None:
            nonlocal done
            done += 1
            total = len(parity.CASES)
            _status(f"{NAMES[framework]}: {done} of {total} cases", last=done == total)

        try:
            answers[framework] = parity.ask(framework, progress)
        except worker.WorkerError as error:
            failures.append(error)
    if not answers and not failures:
        raise ModuleNotFoundError(
            "there is no native optimizer to compare with: pip install torch, or tensorflow"
        )

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
    for title, rows in itertools.groupby(
        table, lambda r: f"{r.rule}({r.options}) against {r.native}"
    ):
        print(f"\n{title}")
        _print_table(
            ["  backend", "ours", "native's", "ratio", "slots", ""],
            [
                [
                    f"  {r.backend}",
                    f"{r.ours:.2e}",
                    f"{r.theirs:.2e}",
                    f"{r.ratio:.3f}",
                    f"{r.slot_ratio:.3f}",
                    _word(r),
                ]
                for r in rows
            ],
        )
    print(
        "\nours, native's: distance from float64, relative to the movement; ratio: at most "
        f"{parity.LIMIT}; slots: the same ratio for the slots, at most {parity.SLOT_LIMIT}"
    )
    _write(parity.as_json(table), arguments.json)
    if arguments.markdown is not None:
        title = "# Distance from float64: ours over the native's\n\n"
        arguments.markdown.write_text(title + parity.as_markdown(table))
    return _verdict([row.passed for row in table], failures)


def _bench(arguments: argparse.Namespace) -> int:
    failures: Failures = []
    timings: list[bench.Timing] = []
    firsts: list[dict[str, Any]] = []
    for framework, needed in bench.FRAMEWORKS.items():
        absent = worker.missing(needed)
        if absent is not None:
            print(f"{framework} is left out: {absent} is not installed")
            continue
        try:
            cases = bench.plan(framework, arguments.rules, arguments.mixes, arguments.quick)
            for timing in bench.ask(framework, cases, arguments.quick, _progress(framework, cases)):
                timings.append(timing)
            _status(f"{framework}: {len(cases)} cases", last=True)
            for row in bench.first_steps(framework, arguments.quick):
                firsts.append(row)
                _status(f"{framework}: {len(firsts)} first steps")
        except worker.WorkerError as error:
            failures.append(error)
    imports = {}
    for package, base in bench.IMPORTS.items():
        if worker.missing(base) is None:
            _status(f"import {package} ...")
            imports[package] = bench.import_time(package, 1 if arguments.quick else 7)
    _status("first steps and imports", last=True)

    found = bench.groups(timings)
    for (framework, mix), some in itertools.groupby(
        found, lambda group: (group.ours.framework, group.ours.mix)
    ):
        print(f"\n{bench.TITLES[framework]}, {bench.TITLES[mix]}")
        _print_table(*bench.step_table(list(some)))
    print(
        "\nmilliseconds a step; limit: what memory allows; ratio: ours over the fastest native's;"
    )
    print("MB: peak extra memory during a step, ours and of the native that needs least\n")
    _print_table(*bench.first_table(firsts))
    print()
    _print_table(*bench.import_table(imports))
    results = {
        "machine": bench.machine(),
        "steps": [asdict(timing) for timing in timings],
        "first_steps": firsts,
        "imports": imports,
    }
    _write(results, arguments.json)
    if arguments.plot is not None:
        try:
            plots.step_times(found).savefig(arguments.plot, dpi=120)
            print(f"\nThe bars are in {arguments.plot}")
        except (ModuleNotFoundError, OSError) as error:
            print(f"\nNo picture: {error}")
    for failure in failures:
        print(f"\nportopt: {failure}", file=sys.stderr)
    return 2 if failures else 0


def _progress(framework: str, cases: list[bench.Case]) -> Callable[[bench.Case], None]:
    place = itertools.count(1)

    def progress(case: bench.Case) -> None:
        _status(f"{framework}: case {next(place)} of {len(cases)}, {case.rule} on {case.mix} ...")

    return progress


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


def _write(results: Any, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=1) + "\n")


def _verdict(passed: list[bool], failures: Failures) -> int:
    """Say the result; its exit status."""
    for failure in failures:
        print(f"\nportopt: {failure}", file=sys.stderr)
    if not all(passed):
        print("\nPARITY IS LOST: see the lines marked FAILED.")
    elif not passed:
        print("\nThere is nothing to compare with.")
    elif not failures:
        print("\nParity holds.")
    return 1 if not all(passed) else 2 if failures else 0
