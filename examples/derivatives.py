"""One gradient in three ways, by symbols, by differences and by the tape, and what each costs.

    python examples/derivatives.py

Two functions: ln(x1) + x1 x2 - sin(x2), the example of Baydin et al., "Automatic differentiation in
machine learning: a survey" (JMLR 18(153), 2018), and the product of 30 factors, whose gradient
written out has 30 terms of 29 factors. Needs SymPy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import sympy

from portopt import tape

HALF_STEP = 1e-5


def survey(library: Any, x: list[Any]) -> Any:
    """The survey's function, with the `log` and `sin` of a library."""
    return library.log(x[0]) + x[0] * x[1] - library.sin(x[1])


def product(_: Any, x: list[Any]) -> Any:
    """The product of all."""
    return math.prod(x)


def by_symbols(function: Callable[..., Any], point: list[float]) -> tuple[list[float], str]:
    """Differentiate the formula, and put the numbers in."""
    x = sympy.symbols(f"x1:{len(point) + 1}")
    gradient = [sympy.diff(function(sympy, x), symbol) for symbol in x]
    numbers = dict(zip(x, point, strict=True))
    found = [float(derivative.evalf(subs=numbers)) for derivative in gradient]
    return found, f"formulas of {sympy.count_ops(gradient)} operations"


def by_differences(function: Callable[..., Any], point: list[float]) -> tuple[list[float], str]:
    """Move every input to both sides: the error is of the order of the step squared."""
    evaluations = 0
    found = []
    for place in range(len(point)):
        ends = []
        for step in (HALF_STEP, -HALF_STEP):
            moved = [*point]
            moved[place] += step
            ends.append(function(math, moved))
            evaluations += 1
        found.append((ends[0] - ends[1]) / (2 * HALF_STEP))
    return found, f"{evaluations} evaluations"


def by_tape(function: Callable[..., Any], point: list[float]) -> tuple[list[float], str]:
    """Record one evaluation, and walk it backwards once."""
    x = [tape.Variable(value) for value in point]
    with tape.Autograd() as autograd:
        y = function(tape, x)
    found = [float(gradient) for gradient in autograd.gradients(y, x)]
    return found, f"1 evaluation of {len(autograd.operations)} operations, and back"


def main() -> None:
    """Print a table for each function."""
    factors = [1 + 0.01 * place for place in range(30)]
    cases = [
        ("ln(x1) + x1 x2 - sin(x2)", survey, [2.0, 5.0], [5.5, 2 - math.cos(5.0)]),
        ("x1 x2 ... x30", product, factors, [math.prod(factors) / factor for factor in factors]),
    ]
    for title, function, point, exact in cases:
        print(f"{title}\n  {'way':12} {'dy/dx1':>12} {'dy/dx2':>12} {'error':>8} {'ms':>8}  cost")
        for way in (by_symbols, by_differences, by_tape):
            start = time.perf_counter()
            found, cost = way(function, point)
            took = 1e3 * (time.perf_counter() - start)
            error = max(abs(a - b) for a, b in zip(found, exact, strict=True))
            name = way.__name__.removeprefix("by_")
            print(f"  {name:12} {found[0]:12.8f} {found[1]:12.8f} {error:8.0e} {took:8.2f}  {cost}")


if __name__ == "__main__":
    main()
