"""The search for hyperparameters: Optuna searches, a rule's own bounds say where.

A float is searched on a logarithmic scale: a learning rate by its distance from 0, a decay by its
distance from 1, both up to `FACTOR` times more or less than the default's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from portopt import demo, extras, race
from portopt.parity import Case
from portopt.rules import Interval, Rule

FACTOR = 1000.0
EXPLORED = 50
"""How many trials are drawn at random before Optuna's sampler learns from them."""
STEPS = 100
"""How many steps a trial on Rosenbrock's function has."""
EPOCHS = 3
"""How often a trial on the digits goes through the training images."""


@dataclass(frozen=True)
class Span:
    """Where an option is searched: by its distance from an end of its interval.

    Attributes:
        end: The upper end, where it is finite, else the lower one.
        sign: -1 or 1: the value is ``end + sign * distance``.
        least: The smallest distance.
        most: The largest.
    """

    end: float
    sign: int
    least: float
    most: float

    def value(self, distance: float) -> float:
        """The option's value, of few digits, so that it can be typed again."""
        return float(f"{self.end + self.sign * float(f'{distance:.3g}'):.12g}")

    def distance(self, value: float) -> float:
        """How far a value is from the end."""
        return abs(self.end - value)

    def label(self, name: str) -> str:
        """What the distance of an option is: ``lr``, ``1 - beta1``."""
        if self.sign < 0:
            return f"{self.end:g} - {name}"
        return f"{name} - {self.end:g}" if self.end else name


def span(interval: Interval, default: float | None) -> Span | None:
    """Where to search an option; None for one that is off (0), or at the end of its interval.

    Args:
        interval: Its range.
        default: Its default; without one, a distance of 1 takes its place.

    Example:
        >>> decay = span(Interval("[0, 1)"), 0.999)
        >>> f"{decay.value(decay.least):g} to {decay.value(decay.most):g}"
        '0.999999 to 0.001'
        >>> span(Interval("[0, inf)"), 0.1)
        Span(end=0.0, sign=1, least=0.0001, most=100.0)
    """
    low, high = interval.ends
    end, sign = (high, -1) if math.isfinite(high) else (low, 1)
    distance = 1.0 if default is None else abs(end - default)
    if default == 0 or distance == 0 or not math.isfinite(end):
        return None
    most = min(distance * FACTOR, 0.999 * (high - low))  # the other end may be excluded
    return Span(end, sign, distance / FACTOR, most)


def spans(rule: type[Rule], held: Mapping[str, Any]) -> dict[str, Span]:
    """Where each float option of a rule is searched, but for those that are held.

    Raises:
        ValueError: nothing is left to search; a value that is held is not allowed.
    """
    defaults = rule.defaults()
    found = {
        name: span(interval.sensible or interval, defaults.get(name))
        for name, interval in rule.intervals().items()
        if name not in held
    }
    searched = {name: one for name, one in found.items() if one is not None}
    if not searched:
        raise ValueError(f"{rule.__name__} has no float option to search that is not held or off")
    rule(**{**held, **{name: one.value(one.least) for name, one in searched.items()}})
    return searched


@dataclass(frozen=True)
class Objective:
    """What is searched for.

    Attributes:
        title: What a score is.
        maximize: Whether more of it is better.
        score: The score of a rule.
        shown: A score, as a table has it.
        remark: What else there is to say of the best one, in a sentence.
    """

    title: str
    maximize: bool
    score: Callable[[Rule], float]
    shown: Callable[[float], str]
    remark: Callable[[Rule], str]


def rosenbrock() -> Objective:
    """Fewest steps to within 1e-2 of Rosenbrock's minimum.

    A rule that does not arrive in `STEPS`, or is not finite in the end, has the score `STEPS` and
    how close it has come.
    """
    function = race.rosenbrock

    def run(rule: Rule) -> race.Trajectory:
        try:
            return race.race({"": rule}, function, STEPS)[""]
        except ArithmeticError:  # a scalar of the rule overflows, where an array would be infinite
            points = np.full((STEPS + 1, 2), math.nan)
            points[0] = function.start
            return race.Trajectory(points, function(*points.T), function.distance(points))

    def score(rule: Rule) -> float:
        way = run(rule)
        if way.arrived is None or way.diverged is not None:
            return STEPS + float(np.nanmin(way.distances))
        return way.arrived

    def shown(score: float) -> str:
        return f"{score:.0f}" if score <= STEPS else f"{score - STEPS:.2g} away at best"

    def remark(rule: Rule) -> str:
        way = run(rule)
        if way.diverged is not None:
            return f"It is not finite from step {way.diverged} on."
        return f"After {STEPS} steps it is {way.distances[-1]:.1g} from the minimum."

    title = f"steps to within {race.TOLERANCE:g} of Rosenbrock's minimum"
    return Objective(title, False, score, shown, remark)


def digits() -> Objective:
    """Best validation accuracy of the demo's network on the digits, after `EPOCHS`.

    The last 256 training images are the validation images; the test images are for the remark.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; says which extra to install.
    """
    full = demo.digits(EPOCHS)
    x, y = full.x_train, full.y_train
    task = replace(full, x_train=x[:-256], y_train=y[:-256], x_test=x[-256:], y_test=y[-256:])

    def accuracy(rule: Rule, task: demo.Task) -> float:
        try:
            with np.errstate(all="ignore"):  # a rule that diverges
                return demo.train_numpy(Case(rule), task, lambda *_: None)[0].accuracy
        except ArithmeticError:  # and one of which a scalar overflows
            return 0.0

    def remark(rule: Rule) -> str:
        test = replace(task, x_test=full.x_test, y_test=full.y_test)
        return f"On the test images, which no trial has seen: {accuracy(rule, test):.4f}."

    title = f"validation accuracy on the digits after {EPOCHS} epochs"
    return Objective(title, True, lambda rule: accuracy(rule, task), "{:.4f}".format, remark)


OBJECTIVES = {"rosenbrock": rosenbrock, "digits": digits}


@dataclass(frozen=True)
class Trial:
    """One trial: the options that were tried, and their score."""

    values: dict[str, float]
    score: float


def tune(
    rule: type[Rule],
    held: Mapping[str, Any],
    objective: Objective,
    trials: int,
    seed: int = 0,
    storage: Path | None = None,
) -> Iterator[Trial]:
    """Search a rule's float options; each trial as it is done, those of an earlier call first.

    The draws of a trial depend on the seed and its number alone: a search that was interrupted, or
    that a later call with more trials takes up, goes on as if it had never stopped.

    Args:
        rule: The rule's class.
        held: Options that are not searched, with their values.
        objective: What is searched for, such as `rosenbrock` returns.
        trials: The number of trials, those of earlier calls included.
        seed: Another seed is another search.
        storage: An Optuna journal to keep the trials in; several searches may share it.

    Raises:
        ValueError: as for `spans`; ``storage`` is a file, but no journal.
        ModuleNotFoundError: Optuna is missing; says which extra to install.
    """
    searched = spans(rule, held)
    optuna = extras.load("optuna", "tune")
    direction = "maximize" if objective.maximize else "minimize"
    kept = optuna.create_study(
        study_name=f"{rule.__module__}.{rule.__name__} {dict(held)} {objective.title} {seed}",
        storage=storage and _journal(storage),
        direction=direction,
        load_if_exists=True,
    )
    # Trials are drawn here and kept when they are done: one that is cut off leaves no trace.
    study = optuna.create_study(direction=direction)
    study.add_trials(kept.trials[:trials])
    for trial in study.trials:
        yield Trial(_values(searched, trial), trial.value)
    for number in range(len(study.trials), trials):
        draws = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=EXPLORED, seed=draws)
        trial = study.ask()
        for name, one in searched.items():
            trial.suggest_float(name, one.least, one.most, log=True)
        values = _values(searched, trial)
        score = objective.score(rule(**{**held, **values}))
        kept.add_trial(study.tell(trial, score))
        yield Trial(values, score)


def _values(searched: Mapping[str, Span], trial: Any) -> dict[str, float]:
    return {name: one.value(trial.params[name]) for name, one in searched.items()}


def _journal(path: Path) -> Any:
    # Optuna would write its first line behind whatever stands in the file.
    if path.exists():
        with path.open(errors="replace") as file:
            first = file.readline()
        if first and '"op_code"' not in first:
            raise ValueError(f"storage must be a new file or an Optuna journal, got {path}")
    backend = extras.load("optuna.storages.journal", "tune").JournalFileBackend(str(path))
    return extras.load("optuna.storages", "tune").JournalStorage(backend)
