"""``portopt rules``: the rules that are installed."""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import asdict
from typing import Any

from portopt.cli.console import output, write
from portopt.rules import registry


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("rules", help="the rules that are installed")
    command.add_argument("--json", type=output, metavar="FILE", help="write the list as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
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
        size = f"{least:.3g} bytes of state for a float32 parameter"
        size += f", {most:.3g} with every option" if most > least else ""
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
    listed = [asdict(entry) for entry in entries]
    write(listed, arguments.json)
    return status
