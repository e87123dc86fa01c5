"""``portopt tune``: a search for a rule's hyperparameters."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from portopt import extras, plots, tune
from portopt.cli.console import (
    checked,
    draw,
    output,
    picture,
    positive,
    print_table,
    status,
    whole,
)
from portopt.rules import registry

SHOWN = 5
"""How many of the trials the table has."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("tune", help="a search for a rule's hyperparameters")
    command.add_argument(
        "rule",
        type=checked(lambda text: tune.spans(*registry.read(text))),
        metavar="RULE",
        help="an installed rule; options that are given, as in adam:eps_form=inside,beta1=0.9, "
        "are not searched",
    )
    command.add_argument(
        "--objective",
        choices=tune.OBJECTIVES,
        default="rosenbrock",
        help="rosenbrock: fewest steps to its minimum; digits: best validation accuracy; "
        "default: rosenbrock",
    )
    command.add_argument("--trials", type=positive, default=300, help="default: 300")
    command.add_argument("--seed", type=whole, default=0, help="default: 0")
    command.add_argument(
        "--storage",
        type=output,
        metavar="FILE",
        help="an Optuna journal that keeps the trials: a second call goes on",
    )
    command.add_argument(
        "--plot", type=picture, metavar="FILE", help="draw the search (.png, .svg or .pdf)"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit status, as `portopt.cli.main` returns it."""
    rule, held = registry.read(arguments.rule)
    logging = extras.load("optuna.logging", "tune")
    logging.set_verbosity(logging.WARNING)
    objective = tune.OBJECTIVES[arguments.objective]()
    sign = -1 if objective.maximize else 1
    trials: list[tune.Trial] = []
    search = tune.tune(rule, held, objective, arguments.trials, arguments.seed, arguments.storage)
    try:
        for trial in search:
            trials.append(trial)
            best = min(trials, key=lambda trial: sign * trial.score)
            status(f"trial {len(trials)} of {arguments.trials}: best {objective.shown(best.score)}")
    except ValueError as error:
        print(f"\nportopt: {error}", file=sys.stderr)
        return 2
    status(f"{len(trials)} trials of {rule.__name__}: {objective.title}", last=True)
    print()
    ranked = sorted(trials, key=lambda trial: sign * trial.score)
    print_table(
        [objective.title, *best.values],
        [
            [objective.shown(trial.score), *map(repr, trial.values.values())]
            for trial in ranked[:SHOWN]
        ],
    )
    given = "," if ":" in arguments.rule else ":"
    options = ",".join(f"{name}={value!r}" for name, value in best.values.items())
    found = f"{arguments.rule}{given}{options}"
    print(f"\n{objective.remark(registry.parse(found))}")
    print(f"The best: {found}")
    if arguments.objective == "rosenbrock":
        print(f"Its race: {_command('race', found)}")
    print(
        "The search again: "
        + _command(
            *("tune", arguments.rule, "--objective", arguments.objective),
            *("--trials", arguments.trials, "--seed", arguments.seed),
        )
    )
    if arguments.plot is not None:
        draw(
            arguments.plot,
            "The search is",
            lambda path: plots.search(
                trials, tune.spans(rule, held), objective, rule.__name__
            ).savefig(path, dpi=100),
        )
    return 0


def _command(*words: Any) -> str:
    return shlex.join(["portopt", *map(str, words)])
