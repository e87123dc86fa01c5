"""``portopt bench``: time of a step beside every native mode."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from portopt import bench, plots, worker
from portopt.cli.console import (
    Failures,
    draw,
    output,
    picture,
    print_table,
    status,
    write,
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
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
    command.add_argument("--quick", action="store_true", help="AdamW on one tensor, in a minute")
    command.add_argument("--json", type=output, metavar="FILE", help="write everything as JSON")
    command.add_argument(
        "--plot", type=picture, metavar="FILE", help="draw bars (.png, .svg or .pdf)"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
    failures: Failures = []
    timings: list[bench.Timing] = []
    firsts: list[dict[str, Any]] = []
    for framework, needed in bench.FRAMEWORKS.items():
        absent = next(filter(None, map(worker.missing, needed)), None)
        if absent is not None:
            print(f"{framework} is left out: {absent} is not installed")
            continue
        try:
            cases = bench.plan(framework, arguments.rules, arguments.mixes, arguments.quick)
            for timing in bench.ask(framework, cases, arguments.quick, _progress(framework, cases)):
                timings.append(timing)
            status(f"{framework}: {len(cases)} cases", last=True)
            for row in bench.first_steps(framework, arguments.quick):
                firsts.append(row)
                status(f"{framework}: {len(firsts)} first steps")
        except worker.WorkerError as error:
            failures.append(error)
    imports = {}
    for package, base in bench.IMPORTS.items():
        if worker.missing(base) is None:
            status(f"import {package} ...")
            imports[package] = bench.import_time(package, 1 if arguments.quick else 7)
    status("first steps and imports", last=True)

    found = bench.groups(timings)
    for (framework, mix), some in itertools.groupby(
        found, lambda group: (group.ours.framework, group.ours.mix)
    ):
        print(f"\n{bench.TITLES[framework]}, {bench.TITLES[mix]}")
        print_table(*bench.step_table(list(some)))
    print(
        "\nmilliseconds a step; limit: what memory allows; ratio: ours over the fastest native's;"
    )
    print("MB: peak extra memory during a step, ours and of the native that needs least\n")
    print_table(*bench.first_table(firsts))
    print()
    print_table(*bench.import_table(imports))
    results = {
        "machine": bench.machine(),
        "steps": [asdict(timing) for timing in timings],
        "first_steps": firsts,
        "imports": imports,
    }
    write(results, arguments.json)
    if arguments.plot is not None:
        draw(
            arguments.plot,
            "The bars are",
            lambda path: plots.step_times(found).savefig(path, dpi=120),
        )
    for failure in failures:
        print(f"\nportopt: {failure}", file=sys.stderr)
    return 2 if failures else 0


def _list(names: Iterable[str]) -> str:
    return (
        f"some of {', '.join(names)}; by default those that are worth their time, or all if the "
        "other is given"
    )


def _progress(framework: str, cases: list[bench.Case]) -> Callable[[bench.Case], None]:
    place = itertools.count(1)

    def progress(case: bench.Case) -> None:
        status(f"{framework}: case {next(place)} of {len(cases)}, {case.rule} on {case.mix} ...")

    return progress
