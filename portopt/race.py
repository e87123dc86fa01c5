"""The race: rules side by side on test functions of two variables.

A function is written once, in the tape's operations, which also give its gradient: float64, and the
same for every backend. Only the steps are a backend's own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from portopt import extras, tape, worker
from portopt.optimizer import Optimizer
from portopt.rules import Rule, registry

NDArray: TypeAlias = npt.NDArray[Any]
Point: TypeAlias = tuple[float, float]
Step: TypeAlias = Callable[[NDArray], NDArray]
"""One step of an optimizer: from the gradient to the new point, float64 arrays of shape (2,)."""
Begin: TypeAlias = Callable[[Rule, NDArray], Step]
"""How a backend begins: from a rule and the start to the function that makes each step."""

DEFAULT_RULES = ("sgd:lr=0.0015", "momentum:lr=0.001", "rmsprop:lr=0.03", "adam:lr=0.5")
"""With learning rates at which each gets far on Rosenbrock's function in `DEFAULT_STEPS`."""
DEFAULT_STEPS = 600

TOLERANCE = 1e-2
"""The distance from a minimum at which a rule has arrived."""


@dataclass(frozen=True)
class Function:
    """A test function of two variables.

    Attributes:
        name: Its name.
        formula: The function, of two `portopt.tape.Variable` of equal shape.
        start: Where the race begins.
        minima: Its minima, all equally deep; none if they are not known.
        x: The range of the first variable that is drawn.
        y: The range of the second.
    """

    name: str
    formula: Callable[[Any, Any], Any]
    start: Point
    minima: tuple[Point, ...]
    x: tuple[float, float]
    y: tuple[float, float]

    def __call__(self, x: npt.ArrayLike, y: npt.ArrayLike) -> NDArray:
        """Its values, float64, of the shape of ``x`` and ``y``."""
        with np.errstate(all="ignore"):  # far out they are infinite
            variables = [tape.Variable(np.asarray(v, np.float64)) for v in (x, y)]
            values: NDArray = self._evaluated(variables).value
        return values

    def gradient(self, point: NDArray) -> NDArray:
        """Its gradient at a point, float64, of shape (2,)."""
        variables = [tape.Variable(coordinate) for coordinate in point]
        with np.errstate(all="ignore"), tape.Autograd() as autograd:
            return np.array(autograd.gradients(self._evaluated(variables), variables))

    def _evaluated(self, variables: list[tape.Variable]) -> tape.Variable:
        try:
            value = self.formula(*variables)
        except Exception as error:  # it may be a user's
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.name} cannot be evaluated: {why}") from error
        shape = variables[0].shape
        if not isinstance(value, tape.Variable) or value.shape != shape:
            what = f"a portopt.tape.Variable of the shape of x and y, {shape}"
            raise ValueError(f"{self.name} must return {what}, got {value!r}")
        return value

    def distance(self, points: NDArray) -> NDArray:
        """How far points, of shape (..., 2), are from the nearest minimum; NaN if none is known."""
        if not self.minima:
            return np.full(points.shape[:-1], np.nan)
        with np.errstate(all="ignore"):
            ways = [np.moveaxis(points - minimum, -1, 0) for minimum in self.minima]
            nearest: NDArray = np.min([np.hypot(x, y) for x, y in ways], axis=0)
        return nearest


def function(
    start: Point,
    x: tuple[float, float],
    y: tuple[float, float],
    minima: tuple[Point, ...] = (),
) -> Callable[[Callable[[Any, Any], Any]], Function]:
    """Make a test function of a function: the decorator behind each of `FUNCTIONS`.

    Args:
        start: Where the race begins.
        x: The range of the first variable that is drawn: lower end, upper end.
        y: The range of the second.
        minima: Its minima, all equally deep; without them there are no distances.

    Raises:
        ValueError: a start or a minimum is not two finite numbers, or a range not two ascending
            ones.

    Example:
        >>> @function(start=(3.0, 2.0), x=(-4, 4), y=(-4, 4), minima=((1.0, 0.0),))
        ... def bowl(x, y):
        ...     return (x - 1) ** 2 + y**2
        >>> bowl.gradient(np.array([3.0, 2.0]))
        array([4., 4.])
    """
    numbered = {f"minima[{place}]": minimum for place, minimum in enumerate(minima)}
    for name, pair in {"start": start, "x": x, "y": y, **numbered}.items():
        finite = np.shape(pair) == (2,) and np.all(np.isfinite(np.asarray(pair, float)))
        if not finite or (name in "xy" and pair[0] >= pair[1]):
            what = "(lower, upper)" if name in "xy" else "two finite numbers"
            raise ValueError(f"{name} must be {what}, got {pair!r}")

    def make(formula: Callable[[Any, Any], Any]) -> Function:
        return Function(formula.__name__, formula, start, minima, x, y)

    return make


@function(start=(-1, 2), x=(-2, 2), y=(-1, 3), minima=((1, 1),))
def rosenbrock(x: Any, y: Any) -> Any:
    """A valley that curves: Rosenbrock 1960, doi.org/10.1093/comjnl/3.3.175, equation 1, plus 1."""
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2 + 1


@function(start=(1, 1), x=(-0.5, 4.5), y=(-1.5, 1.5), minima=((3, 0.5),))
def beale(x: Any, y: Any) -> Any:
    """Flat, with steep walls: Moré, Garbow & Hillstrom 1981, doi.org/10.1145/355934.355936, (5)."""
    return (1.5 - x * (1 - y)) ** 2 + (2.25 - x * (1 - y**2)) ** 2 + (2.625 - x * (1 - y**3)) ** 2


@function(
    start=(-0.5, -1),
    x=(-5, 5),
    y=(-5, 5),
    minima=(
        (3, 2),
        (-2.805118086952745, 3.131312518250573),
        (-3.779310253377747, -3.283185991286170),
        (3.584428340330492, -1.848126526964404),
    ),
)
def himmelblau(x: Any, y: Any) -> Any:
    """Four minima: Himmelblau 1972, "Applied Nonlinear Programming", problem 25."""
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


@function(start=(-4, 0.7), x=(-5, 2), y=(-1.2, 1.2), minima=((0, 0),))
def ravine(x: Any, y: Any) -> Any:
    """A hundred times as steep across as along: Boyd & Vandenberghe 2004, section 9.3.2."""
    return (x**2 + 100 * y**2) / 2


@function(start=(1.5, 0.01), x=(-2, 2), y=(-1.75, 1.75), minima=((0, 1), (0, -1)))
def saddle(x: Any, y: Any) -> Any:
    """A saddle between two minima: Nesterov 2004, "Introductory Lectures", example 1.2.2."""
    return x**2 / 2 + y**4 / 4 - y**2 / 2


@function(start=(3.3, -2.6), x=(-4.5, 4.5), y=(-4.5, 4.5), minima=((0, 0),))
def rastrigin(x: Any, y: Any) -> Any:
    """Minima everywhere: Mühlenbein et al. 1991, doi.org/10.1016/S0167-8191(05)80052-3, section 4.

    Its ``10 - 10*cos(2*pi*x)`` is ``20*sin(pi*x)**2``.
    """
    return x**2 + y**2 + 20 * (tape.sin(math.pi * x) ** 2 + tape.sin(math.pi * y) ** 2)


FUNCTIONS = {f.name: f for f in (rosenbrock, beale, himmelblau, ravine, saddle, rastrigin)}
"""The test functions by name."""


def find(text: str) -> Function:
    """The test function of a name, or of a user's file: ``valley.py:valley``.

    Raises:
        ValueError: there is none of this name; the file cannot be read or run; what it has by this
            name was not made with `function`.
    """
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    path, colon, name = text.rpartition(":")
    if not colon:
        known = ", ".join(FUNCTIONS)
        raise ValueError(f"function must be one of {known}, or FILE.py:NAME, got {text!r}")
    spec = spec_from_file_location(path, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"function must be in a Python file, FILE.py:NAME, got {text!r}")
    module = sys.modules[path] = module_from_spec(spec)  # where a dataclass looks for its module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not isinstance(found, Function):
        got = "nothing" if found is None else repr(found)
        raise ValueError(f"{name} in {path} must be made with @portopt.race.function, is {got}")
    return found


@dataclass(frozen=True)
class Trajectory:
    """The way of one rule.

    Attributes:
        points: Where it was before the first step and after each: float64, of shape (steps + 1, 2).
        losses: The function's values there: float64, of shape (steps + 1,).
        distances: How far it was there from the nearest minimum, likewise; NaN if none is known.
    """

    points: NDArray
    losses: NDArray
    distances: NDArray

    @property
    def arrived(self) -> int | None:
        """The first step after which it was within `TOLERANCE` of a minimum, if it ever was."""
        return _first(self.distances <= TOLERANCE)

    @property
    def diverged(self) -> int | None:
        """The first step after which a coordinate or the loss was not finite, if any."""
        return _first(~np.isfinite([*self.points.T, self.losses]).all(axis=0))


def _first(true: Any) -> int | None:
    return int(np.argmax(true)) if np.any(true) else None


def race(
    rules: Mapping[str, Rule], function: Function, steps: int, begin: Begin | None = None
) -> dict[str, Trajectory]:
    """Run each rule on a function, from its start.

    Args:
        rules: The rules by name.
        function: One of `FUNCTIONS`, or what `function` made.
        steps: The number of steps.
        begin: What makes the steps: `on_numpy` by default, `on_jax`, or ``begin`` of
            ``portopt_torch.race`` or ``portopt_tf.race``.

    Raises:
        TypeError: a rule is no `portopt.Rule`.
        ValueError: ``steps`` is less than 1; the function cannot be evaluated.
        ArithmeticError: a scalar of a rule overflows: names the rule and the instruction.

    Example:
        >>> from portopt import rules
        >>> ways = race({"Adam": rules.Adam(lr=0.2)}, rosenbrock, steps=100)
        >>> ways["Adam"].points.shape
        (101, 2)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    for name, rule in rules.items():
        if not isinstance(rule, Rule):
            raise TypeError(f"rules[{name!r}] must be a portopt.Rule, got {rule!r}")
    return {name: _run(rule, function, steps, begin or on_numpy) for name, rule in rules.items()}


def _run(rule: Rule, function: Function, steps: int, begin: Begin) -> Trajectory:
    points = np.empty((steps + 1, 2))
    points[0] = function.start
    step = begin(rule, points[0])
    for t in range(steps):
        points[t + 1] = step(function.gradient(points[t]))
    return Trajectory(points, function(*points.T), function.distance(points))


def on_numpy(rule: Rule, start: NDArray) -> Step:
    """Steps of `portopt.Optimizer`."""
    point: NDArray = start.copy()
    optimizer = Optimizer(rule, [point])

    def step(grad: NDArray) -> NDArray:
        optimizer.step([grad])
        return point

    return step


def on_jax(rule: Rule, start: NDArray) -> Step:
    """Steps of `portopt.jax.Optimizer`, compiled.

    Raises:
        ModuleNotFoundError: JAX is missing; says which extra to install.
    """
    from portopt.jax import Optimizer, double_precision

    jax = extras.load("jax", "jax")
    optimizer = Optimizer(rule)
    update = jax.jit(optimizer.step)
    with double_precision():
        point = jax.numpy.asarray(start)
        state = optimizer.init(point)

    def step(grad: NDArray) -> NDArray:
        nonlocal point, state
        with double_precision():
            point, state = update(point, state, jax.numpy.asarray(grad))
        new: NDArray = np.asarray(point)
        return new

    return step


BACKENDS: dict[str, Begin] = {"numpy": on_numpy, "jax": on_jax}
"""What runs in this process; each of `portopt.worker.FRAMEWORKS` in a child."""


def ask(
    framework: str, rules: list[str], function: str, steps: int
) -> Iterator[tuple[str, Trajectory]]:
    """The same in another framework, in a child process: `answer` there.

    Args:
        framework: "torch" or "keras".
        rules: Rules as `portopt.rules.registry.parse` reads them.
        function: A function as `find` reads it.
        steps: The number of steps.

    Yields:
        Each rule's text, and its trajectory.

    Raises:
        portopt.worker.WorkerError: the child failed.
    """
    place = find(function)
    spec = {"rules": rules, "function": function, "steps": steps}
    for event in worker.events(f"{worker.FRAMEWORKS[framework]}.race", spec):
        points = np.array(event["points"])
        yield event["rule"], Trajectory(points, place(*points.T), place.distance(points))


def answer(spec: dict[str, Any], begin: Begin) -> None:
    """The child's part: run each rule and send where it went."""
    for text in spec["rules"]:
        rule = {text: registry.parse(text)}
        found = race(rule, find(spec["function"]), spec["steps"], begin)[text]
        worker.emit(rule=text, points=found.points.tolist())
