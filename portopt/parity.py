"""Parity: the distance of every rule from float64, beside that of its native twins.

A native optimizer, run in float64, is the reference. The same optimizer in float32 strays from it
by rounding; ours, on every backend, must not stray further. The distance of an array is the root
mean square of its difference from the reference, relative to that of the reference's movement.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from portopt import worker
from portopt.arrays import Namespace
from portopt.optimizer import Optimizer
from portopt.rules import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Ftrl,
    Lamb,
    Lion,
    Momentum,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    Rule,
)
from portopt.trace import trace

LIMIT = 1.1
"""How much further than its native twin's the parameters may be from float64: room for noise."""

SLOT_LIMIT = 1.5
"""The same for slots. PyTorch's ``lerp`` contracts a multiplication and an addition, which rounds
once where we round twice; without contraction no form of an average comes closer than ours."""

STEPS = 20
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
Twin: TypeAlias = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A rule with options, and the optimizers that are the same: class and arguments.

    Attributes:
        rule: The rule.
        torch: Its twin in ``torch.optim``.
        keras: Its twin in ``keras.optimizers``.
    """

    rule: Rule
    torch: Twin | None = None
    keras: Twin | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the parameters of `problem`: matrices for a rule that looks at it."""
        return (64, 64) if self.rule.by_shape else (4096,)

    @property
    def options(self) -> str:
        """The fields of the rule, besides ``lr``, that are not at their defaults."""
        values = {f.name: getattr(self.rule, f.name) for f in fields(self.rule) if f.name != "lr"}
        defaults = {f.name: f.default for f in fields(self.rule)}
        return _arguments({k: v for k, v in values.items() if v != defaults[k]})


LR = 2.0**-7  # Keras holds it in float32: the rounding of an input is not what is judged


def _cases(rule: type[Rule], **calls: Sequence[dict[str, Any]]) -> Iterator[Case]:
    """For each framework and each call of its native that is ``rule``: a case, at `LR`."""
    for framework, given in ((name, one) for name, each in calls.items() for one in each):
        native = next(native for native in rule.natives if native.framework == framework)
        arguments = {{"torch": "lr", "keras": "learning_rate"}[framework]: LR, **given}
        values = {**native.values, **native.fields(arguments)}
        yield Case(rule(**values), **{framework: (native.title, arguments)})


MOMENTUM, DECAY, UP = {"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}
CASES = (
    *_cases(SGD, torch=[{}, DECAY | UP], keras=[{}, DECAY]),
    *_cases(
        Momentum,
        torch=[
            MOMENTUM,
            MOMENTUM | UP | {"nesterov": True},
            MOMENTUM | DECAY | {"dampening": 0.3},
        ],
        keras=[MOMENTUM, MOMENTUM | DECAY | {"nesterov": True}],
    ),
    *_cases(
        RMSprop,
        torch=[{}, MOMENTUM | DECAY | UP | {"alpha": 0.9}, MOMENTUM | {"centered": True}],
        keras=[{}, MOMENTUM | DECAY | {"centered": True}],
    ),
    *_cases(
        Adam,
        torch=[{}, {"betas": (0.5, 0.9)}, DECAY | UP | {"amsgrad": True}],
        keras=[{}, DECAY | {"amsgrad": True}],
    ),
    *_cases(AdamW, torch=[{}, UP | {"amsgrad": True}], keras=[{}]),
    *_cases(
        Adagrad,
        torch=[{}, DECAY | UP | {"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
        keras=[{}, DECAY],
    ),
    *_cases(Adadelta, torch=[{}, DECAY | UP], keras=[{}, DECAY]),
    *_cases(Adamax, torch=[{}, DECAY | UP], keras=[{}, DECAY]),
    *_cases(RAdam, torch=[{}, DECAY | UP, DECAY | {"decoupled_weight_decay": True}]),
    *_cases(NAdam, torch=[{}, DECAY | UP | {"decoupled_weight_decay": True}], keras=[{}, DECAY]),
    *_cases(ASGD, torch=[{"t0": 5}, DECAY | UP | {"t0": 5, "lambd": 0.01, "alpha": 0.5}]),
    *_cases(Rprop, torch=[{}, UP | {"etas": (0.4, 1.5)}]),
    *_cases(Lamb, keras=[{}, DECAY]),
    *_cases(Lion, keras=[{}, DECAY]),
    *_cases(
        Adafactor,
        torch=[{}, DECAY | UP | {"eps": (1e-3, 1e-2), "d": 2.0, "beta2_decay": -0.5}],
        keras=[{}, DECAY | {"clip_threshold": 2.0}],
    ),
    *_cases(
        Muon,
        torch=[{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}],
        keras=[{}, {"nesterov": False, "ns_steps": 3}],
    ),
    *_cases(
        Ftrl,
        keras=[
            {},
            DECAY | {"l1_regularization_strength": 0.01, "beta": 0.1},
            {
                "learning_rate_power": -1.0,
                "l2_regularization_strength": 0.1,
                "l2_shrinkage_regularization_strength": 0.1,
            },
        ],
    ),
)
"""Every rule with every option that a native optimizer has too."""


def _has_float64(case: Case, framework: str) -> bool:
    """Whether a native computes in float64; if not, the rule itself on NumPy is the reference.

    PyTorch's Muon computes in bfloat16 whatever the dtype; Keras forms the norms and powers of
    Adafactor and Muon in float32 outside TensorFlow.
    """
    if framework == "torch":
        return not isinstance(case.rule, Muon)
    return worker.keras_backend() == "tensorflow" or not case.rule.by_shape


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule on a backend, beside a native twin.

    Attributes:
        rule: The rule's name.
        options: Its fields that are not at their defaults.
        backend: What ran it.
        native: The twin.
        ours: The distance of our parameters from float64.
        theirs: The native's.
        ratio: Ours over theirs, for the parameter where it is largest.
        slot_ratio: The same for the slots; 1 where there are none.
    """

    rule: str
    options: str
    backend: str
    native: str
    ours: float
    theirs: float
    ratio: float
    slot_ratio: float

    @property
    def passed(self) -> bool:
        """Whether both ratios are within their limits."""
        return self.ratio <= LIMIT and self.slot_ratio <= SLOT_LIMIT


def problem(
    dtype: str = "float32", shape: tuple[int, ...] = (4096,)
) -> tuple[Arrays, list[Arrays]]:
    """Parameters and the gradients of each step, the same numbers for every dtype and shape.

    Parameters start at ordinary size, small, and at zero, where the rounding of the weights does
    not cover that of the update. Gradients have random signs, magnitudes from 1e-9 to 10, zeros.
    """
    rng = np.random.default_rng(0)
    size = 4096
    start = {"ordinary": 1.0, "small": 1e-3, "zero": 0.0}
    params = {name: rng.standard_normal(size) * scale for name, scale in start.items()}

    def gradient() -> npt.NDArray[Any]:
        grad = rng.standard_normal(size) * 10.0 ** rng.uniform(-9, 1, size)
        return np.where(rng.random(size) < 0.05, 0.0, grad)

    def exact(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return array.astype(np.float32).astype(dtype).reshape(shape)

    grads = [{name: exact(gradient()) for name in params} for _ in range(STEPS)]
    return {name: exact(param) for name, param in params.items()}, grads


def on_numpy(rule: Rule, dtype: str = "float32") -> Arrays:
    """The parameters and slots after `problem`, through `portopt.Optimizer`."""
    params, grads = problem(dtype, Case(rule).shape)
    optimizer = Optimizer(rule, params)
    for grad in grads:
        optimizer.step(grad)
    slots = {
        f"{slot} of {name}": optimizer.state[name][slot]
        for name in params
        for slot in optimizer.state[name].keys() - {"step", *rule.numbers}
    }
    return params | slots


def on_jax(rule: Rule) -> Arrays:
    """The same through JAX, compiled, as a user's own loop would."""
    import jax

    shape = Case(rule).shape
    params, grads = problem(shape=shape)
    program, shapes = trace(rule, shape=shape), rule.slot_shapes(shape)

    def step(scalars: Any, param: Any, grad: Any, slots: Any) -> Any:
        return program.run(
            cast(Namespace, jax.numpy), scalars, {"param": param, "grad": grad, **slots}
        )

    compiled = jax.jit(step)
    results: Arrays = {}
    for name, param in params.items():
        slots = {
            slot: np.full(shapes[slot], rule.initial(slot), param.dtype) for slot in program.slots
        }
        arrays = {"param": param, **slots}
        numbers = {number: rule.initial(number) for number in program.numbers}
        for t, grad in enumerate(grads, 1):
            slots = {slot: arrays[slot] for slot in program.slots}
            scalars = program.scalars(vars(rule) | numbers, t)
            numbers = program.kept(scalars)
            arrays = compiled(scalars, arrays["param"], grad[name], slots)
        results[name] = np.asarray(arrays["param"])
        results |= {f"{slot} of {name}": np.asarray(arrays[slot]) for slot in program.slots}
    return results


def twin_name(framework: str, twin: Twin) -> str:
    """How a native optimizer is called in the table: its name and arguments but `LR`."""
    module = {"torch": "torch.optim", "keras": "keras.optimizers"}[framework]
    arguments = {k: v for k, v in twin[1].items() if k not in ("lr", "learning_rate")}
    return f"{module}.{twin[0]}({_arguments(arguments)})"


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def answer(
    framework: str,
    native: Callable[[Twin, str, tuple[int, ...]], Arrays],
    ours: Callable[[Rule], Arrays],
    path: str,
) -> None:
    """The child's part: run all cases in one framework and save the results.

    Args:
        framework: "torch" or "keras".
        native: Runs a native optimizer in a dtype on a shape.
        ours: Runs a rule in float32.
        path: The file to write.
    """
    results: dict[str, npt.NDArray[Any]] = {}
    for case in CASES:
        runs = {f"ours {case.rule}": ours(case.rule)}
        twin = getattr(case, framework)
        if twin is not None:
            for dtype in ("float32", "float64"):
                runs[f"{dtype} {twin_name(framework, twin)}"] = native(twin, dtype, case.shape)
        for run, arrays in runs.items():
            results |= {f"{run}|{name}": array for name, array in arrays.items()}
        worker.emit(done=str(case.rule))
    np.savez(path, **results)  # type: ignore[arg-type]


def ask(framework: str, progress: Callable[[str], None]) -> dict[str, Arrays]:
    """All results of one framework, from a child process: arrays by run and name.

    Raises:
        WorkerError: the child failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "results.npz")
        for event in worker.events(f"{worker.FRAMEWORKS[framework]}.parity", {"path": path}):
            progress(event["done"])
        results: dict[str, Arrays] = {}
        with np.load(path) as saved:
            for key in saved.files:
                run, name = key.split("|")
                results.setdefault(run, {})[name] = saved[key]
    return results


def distances(result: Arrays, reference: Arrays) -> dict[str, float]:
    """The distance of each array from the reference; the reference says which there are."""
    start = problem("float64")[0]

    def rms(array: npt.NDArray[Any]) -> float:
        return float(np.sqrt(np.mean(np.square(array))))

    return {
        name: rms(result[name].astype(np.float64).ravel() - expected.ravel())
        / rms(expected.ravel() - start.get(name, np.float64(0)))
        for name, expected in reference.items()
    }


def rows(
    cases: Sequence[Case],
    natives: Mapping[str, Mapping[str, Arrays]],
    backends: Mapping[str, Callable[[Rule], Arrays]],
) -> Iterator[Row]:
    """Judge every case on every backend against every native twin that there are results of.

    Args:
        cases: The rules with their twins.
        natives: For each framework, what `ask` returned.
        backends: By name, a function that runs a rule on `problem`.
    """
    start = problem()[0]
    for case in cases:
        results = {name: run(case.rule) for name, run in backends.items()}
        for framework, runs in natives.items():
            twin = getattr(case, framework)
            if twin is None:
                continue
            name = twin_name(framework, twin)
            reference = runs[f"float64 {name}"]
            if not _has_float64(case, framework):
                reference = on_numpy(case.rule, "float64")
            theirs = distances(runs[f"float32 {name}"], reference)
            for backend, result in results.items():
                ours = distances(result, reference)
                ratios = {array: _ratio(ours[array], theirs[array]) for array in reference}
                worst = max(start, key=lambda array: ratios[array])
                yield Row(
                    rule=type(case.rule).__name__,
                    options=case.options,
                    backend=backend,
                    native=name,
                    ours=ours[worst],
                    theirs=theirs[worst],
                    ratio=ratios.pop(worst),
                    slot_ratio=max((r for a, r in ratios.items() if " of " in a), default=1.0),
                )


def _ratio(ours: float, theirs: float) -> float:
    if ours == theirs:
        return 1.0
    return ours / theirs if theirs and math.isfinite(ours) else math.inf


def as_json(table: Sequence[Row]) -> list[dict[str, Any]]:
    """The table for machines."""
    return [asdict(row) | {"passed": row.passed} for row in table]


def as_markdown(table: Sequence[Row]) -> str:
    """The table for the documentation: a line for each twin, a column for each backend."""
    backends = list(dict.fromkeys(row.backend for row in table))
    head = ["rule", "options", "native twin", "native's distance", *backends]
    lines = [head, ["---"] * len(head)]
    for _, group in itertools.groupby(table, lambda row: (row.rule, row.options, row.native)):
        rows = list(group)
        first = rows[0]
        cells = [f"{row.ratio:.2f} ({row.slot_ratio:.2f})" for row in rows]
        lines.append(
            [first.rule, first.options, f"`{first.native}`", f"{first.theirs:.1e}", *cells]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
