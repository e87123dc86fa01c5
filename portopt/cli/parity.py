"""``portopt parity``: distance of every rule from float64."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

from portopt import parity, worker
from portopt.cli.console import (
    NAMES,
    Failures,
    each_framework,
    output,
    print_table,
    status,
    verdict,
    word,
    write,
)
from portopt.rules import Rule


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("parity", help="distance of every rule from float64")
    command.add_argument("--json", type=output, metavar="FILE", help="write the table as JSON")
    command.add_argument(
        "--markdown", type=output, metavar="FILE", help="write it as the documentation has it"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
    answers = {}
    failures: Failures = []
    for framework in each_framework():
        done = 0

        def progress(case: str, framework: str = framework) -> None:
            nonlocal done
            done += 1
            total = len(parity.CASES)
            status(f"{NAMES[framework]}: {done} of {total} cases", last=done == total)

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
        status(f"judged: {len(table)} rows")
    status(f"judged: {len(table)} rows", last=True)
    for title, rows in itertools.groupby(
        table, lambda r: f"{r.rule}({r.options}) against {r.native}"
    ):
        print(f"\n{title}")
        print_table(
            ["  backend", "ours", "native's", "ratio", "slots", ""],
            [
                [
                    f"  {r.backend}",
                    f"{r.ours:.2e}",
                    f"{r.theirs:.2e}",
                    f"{r.ratio:.3f}",
                    f"{r.slot_ratio:.3f}",
                    word(r),
                ]
                for r in rows
            ],
        )
    print(
        "\nours, native's: distance from float64, relative to the movement; ratio: at most "
        f"{parity.LIMIT}; slots: the same ratio for the slots, at most {parity.SLOT_LIMIT}"
    )
    write(parity.as_json(table), arguments.json)
    if arguments.markdown is not None:
        title = "# Distance from float64: ours over the native's\n\n"
        arguments.markdown.write_text(title + parity.as_markdown(table))
    return verdict([row.passed for row in table], failures)
