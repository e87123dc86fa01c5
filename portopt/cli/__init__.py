"""The command line: ``portopt COMMAND``, also as ``python -m portopt COMMAND``.

A command is a module with a function ``add``, which adds its parser, and a function ``run``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from portopt import __version__
from portopt.cli import bench, demo, parity, plan, race, rules, tune

COMMANDS = (demo, rules, parity, bench, race, tune, plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 if all that it checks holds, 1 if parity is lost, 2 if it could not be
        checked, 130 if it was interrupted, 141 if nobody reads its output any more.
    """
    parser = argparse.ArgumentParser(
        prog="portopt", description="Optimizers written once, run natively everywhere."
    )
    parser.add_argument("--version", action="version", version=f"portopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    arguments = parser.parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except (ModuleNotFoundError, OSError) as error:
        print(f"portopt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nportopt: interrupted", file=sys.stderr)
        return 130
