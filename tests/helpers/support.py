"""What tests share: seeded inputs, and the one comparison with its one table of tolerances."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from portopt import Rule

# Largest difference allowed, relative to how far the expected values moved or reach.
TOLERANCE = {
    "same": 0.0,  # bit for bit
    "float64": 1e-11,  # two orders of the same float64 arithmetic
    "float32": 1e-5,  # two float32 forms of one formula over some steps
    "float16": 2e-2,
    "bfloat16": 1e-1,
}


def gradients(shape, steps, seed=0, dtype=np.float32):
    """Gradients of random sign, magnitudes from 1e-9 to 10, with zeros and a subnormal."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        grad = rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 1, shape)
        flat = np.atleast_1d(grad).reshape(-1)
        flat[::7] = 0.0
        flat[1:2] = 1e-40
        yield flat.reshape(shape).astype(np.float32).astype(dtype)


def weights(shape, seed=1, dtype=np.float32):
    """Starting weights, half of them small."""
    rng = np.random.default_rng(seed)
    scale = np.where(rng.random(shape) < 0.5, 1.0, 1e-3)
    return np.asarray(rng.standard_normal(shape) * scale).astype(np.float32).astype(dtype)


def assert_agree(actual, expected, kind, *, start=None, what="values"):
    """Raise unless ``actual`` is within ``TOLERANCE[kind]`` of ``expected``.

    The difference is the largest one, relative to the largest movement of ``expected`` from
    ``start`` (its largest magnitude, without one). NaN and Inf must stand in the same places.
    """
    actual, expected = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {actual.shape} is not {expected.shape}")
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        raise AssertionError(f"{what}: NaN or Inf in other places")
    difference = np.max(np.abs(actual[finite] - expected[finite]), initial=0.0)
    origin = 0.0 if start is None else np.asarray(start, np.float64)[finite]
    scale = np.max(np.abs(expected[finite] - origin), initial=0.0)
    if not difference <= TOLERANCE[kind] * scale:
        raise AssertionError(
            f"{what}: difference {difference:.3g} is more than {TOLERANCE[kind]:g} of {scale:.3g}"
        )


def begun(rule, param, dtype=None):
    """The slots of a parameter before the first step."""
    slots = {}
    for slot, shape in rule.slot_shapes(param.shape).items():
        value = rule.initial(slot)
        value = param if isinstance(value, str) else value  # a copy of the parameter
        slots[slot] = np.full(shape, value, dtype or param.dtype)
    return slots


def rounded(numbers, dtype=np.float32):
    """A rule's numbers as they are kept beside parameters of a dtype."""
    return {name: float(np.dtype(dtype).type(value)) for name, value in numbers.items()}


def numbered(rule, dtype=np.float32):
    """What `Program.scalars` asks for before the first step: hyperparameters, and numbers."""
    return vars(rule) | rounded({name: rule.initial(name) for name in rule.numbers}, dtype)


@dataclass(frozen=True, kw_only=True)
class Halved(Rule):
    """Steps half as far, by a field that cannot be given."""

    lr: float = 1.0
    half: float = field(init=False, default=0.5)

    def update(self, xp, t, param, grad, slot):
        return param - self.half * self.lr * grad, {}


@dataclass(frozen=True, kw_only=True)
class Rowwise(Rule):
    """Has operations on each element alone, but a slot that is one row for a whole matrix."""

    by_shape = True
    lr: float = 0.5
    slots = ("row",)

    def slot_shapes(self, shape):
        return {"row": (1, *shape[1:])}

    def update(self, xp, t, param, grad, slot):
        row = slot.row + 1
        return param - self.lr * row * grad, {"row": row}


def interrupted(monkeypatch, error, before):
    """Raise ``error`` around the next job of the pool; returns a list of one entry for each run.

    Python handles a signal when compiled code has returned, or ``before`` it begins.
    """
    from portopt.kernels import pool

    functions, runs = pool._functions(), []

    def run(*args):
        runs.append(1)
        if before and len(runs) == 1:
            raise error
        done = functions.run(*args)
        if len(runs) == 1:
            raise error
        return done

    monkeypatch.setattr(pool, "_functions", lambda: functions._replace(run=run))
    return runs
