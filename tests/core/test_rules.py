"""The rules: their formulas, the same bits everywhere, their hyperparameters and docstrings."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from dataclasses import (
    FrozenInstanceError,
    dataclass,
    fields,
    make_dataclass,
    replace,
)
from fractions import Fraction
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from support import Halved, assert_agree, begun, gradients, numbered, rounded, weights

import portopt
from portopt import Optimizer, Rule, trace
from portopt.arrays import compute_dtype, namespace
from portopt.rules import (
    SGD,
    Adam,
    AdamW,
    Ftrl,
    HyperparameterError,
    HyperparameterTypeError,
    Momentum,
    RMSprop,
    Slots,
)
from portopt.rules.base import presets
from portopt.rules.schedule_free import ScheduleFree

SIZE, STEPS = 23, 5
CLASSES = [
    cls
    for cls in (getattr(portopt.rules, name) for name in portopt.rules.__all__)
    if inspect.isclass(cls) and issubclass(cls, Rule) and cls is not Rule
]


def op_by_op(rule, xp, asarray, dtype=np.float32):
    """The final parameter and slots of `STEPS` steps of the rule itself, as NumPy arrays."""
    param = asarray(weights(SIZE, dtype=dtype))
    slots = {name: asarray(x) for name, x in begun(rule, weights(SIZE, dtype=dtype)).items()}
    slots |= rounded({name: rule.initial(name) for name in rule.numbers}, dtype)
    for t, grad in enumerate(gradients(SIZE, STEPS, dtype=dtype), 1):
        param, slots = rule.step(xp, t, param, asarray(grad), Slots(slots))
        slots |= rounded({name: slots[name] for name in rule.numbers}, dtype)
    kept = {"param": param, **{name: slots[name] for name in rule.slots}}
    return {name: np.asarray(array) for name, array in kept.items()}


def interpreted(rule, dtype):
    program = trace(rule)
    arrays = {"param": weights(SIZE, dtype=dtype)}
    arrays |= begun(rule, arrays["param"])
    values = numbered(rule, dtype)
    for t, grad in enumerate(gradients(SIZE, STEPS, dtype=dtype), 1):
        scalars = program.scalars(values, t)
        values |= rounded(program.kept(scalars), dtype)
        arrays = program.run(np, scalars, {**arrays, "grad": grad})
    return arrays


def optimized(rule, dtype):
    param = weights(SIZE, dtype=dtype)
    optimizer = Optimizer(rule, [param])
    for grad in gradients(SIZE, STEPS, dtype=dtype):
        optimizer.step([grad])
    state = optimizer.state[0]
    return {"param": param, **{name: state[name] for name in rule.slots}}


def assert_all_agree(actual, expected, kind, where=slice(None)):
    assert list(actual) == list(expected)
    for name, array in expected.items():
        start = weights(SIZE)[where] if name == "param" else None
        assert_agree(np.asarray(actual[name])[where], array[where], kind, start=start, what=name)


NORMAL = np.arange(SIZE) != 1
"""Where gradients are not subnormal: XLA and TensorFlow take such for zeros, and lose their signs,
which is all that some rules ask for."""


def test_every_public_rule_is_covered(rules, by_shape):
    assert {type(rule) for rule in (*rules, *by_shape)} == set(CLASSES)


def test_every_option_is_covered(rules, by_shape):
    for cls in CLASSES:
        made = [rule for rule in (*rules, *by_shape) if type(rule) is cls]
        hints = get_type_hints(cls)
        for name in (field.name for field in fields(cls)):
            choices = (False, True) if hints[name] is bool else get_args(hints[name])
            if issubclass(cls, ScheduleFree) and name == "decoupled":
                continue  # it has to be False
            assert {getattr(rule, name) for rule in made} >= set(choices), (cls, name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_op_by_op_interpreted_and_optimizer_give_the_same_bits(rule, dtype):
    expected = op_by_op(rule, np, np.asarray, dtype)
    assert all(array.dtype == dtype for array in expected.values())
    for path in (interpreted, optimized):
        assert_all_agree(path(rule, dtype), expected, "same")


def test_every_rule_keeps_to_the_standard(rule):
    strict = pytest.importorskip("array_api_strict")
    expected = op_by_op(rule, np, np.asarray)
    assert_all_agree(op_by_op(rule, strict, strict.asarray), expected, "same")


def test_every_rule_runs_on_torch(rule):
    torch = pytest.importorskip("torch")
    xp = namespace(torch.ones(1))
    actual = op_by_op(rule, xp, lambda array: torch.tensor(array))
    assert_all_agree(actual, op_by_op(rule, np, np.asarray), "float32")


def test_every_rule_runs_on_jax(rule):
    jnp = pytest.importorskip("jax.numpy")
    xp = namespace(jnp.ones(1))
    actual = op_by_op(rule, xp, jnp.asarray)
    assert_all_agree(actual, op_by_op(rule, np, np.asarray), "float32", NORMAL)


def test_every_form_runs_under_jax_jit(forms):
    jax = pytest.importorskip("jax")
    for rule in forms:

        @jax.jit
        def step(t, param, grad, slots, rule=rule):
            return rule.step(jax.numpy, t, param, grad, Slots(slots))

        param = weights(SIZE)
        slots = begun(rule, param)
        slots |= {name: rule.initial(name) for name in rule.numbers}
        for t, grad in enumerate(gradients(SIZE, STEPS), 1):
            param, slots = step(float(t), param, grad, slots)
        actual = {"param": np.asarray(param), **{name: slots[name] for name in rule.slots}}
        assert_all_agree(actual, op_by_op(rule, np, np.asarray), "float32", NORMAL)


TENSORFLOW = """
import pickle, sys
from keras import ops
from test_rules import op_by_op
rules = pickle.load(sys.stdin.buffer)
results = [op_by_op(rule, ops, ops.convert_to_tensor) for rule in rules]
sys.stdout.buffer.write(pickle.dumps(results))
"""


def test_every_rule_runs_on_tensorflow(rules):
    """In a process of its own: torch and TensorFlow do not always bear one another."""
    for module in ("keras", "tensorflow"):
        if not importlib.util.find_spec(module):
            pytest.skip(f"{module} is not installed")
    paths = [os.path.dirname(__file__), *sys.path]
    env = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    child = subprocess.run(
        [sys.executable, "-c", TENSORFLOW],
        input=pickle.dumps(rules),
        env=env,
        capture_output=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr.decode()[-2000:]
    for rule, actual in zip(rules, pickle.loads(child.stdout), strict=True):
        assert_all_agree(actual, op_by_op(rule, np, np.asarray), "float32", NORMAL)


# The conventions, each written once more, plainly, in float64. `s` holds the slots.

LR, MU, WD, EPS, B1, B2 = 0.1, 0.9, 0.3, 1e-4, 0.8, 0.95


def plain(p, g, s, t, lr):
    return p - lr * g


def coupled(p, g, s, t, lr):
    return p - lr * (g + WD * p)


def decoupled(p, g, s, t, lr):
    return p - lr * WD * p - lr * g


def ascent(p, g, s, t, lr):
    return p + lr * g


def torch_momentum(p, g, s, t, lr, dampening=0.0, nesterov=False):
    s["b"] = g if t == 1 else MU * s["b"] + (1 - dampening) * g
    return p - lr * (g + MU * s["b"] if nesterov else s["b"])


def torch_dampened(p, g, s, t, lr):
    return torch_momentum(p, g, s, t, lr, dampening=0.4)


def torch_nesterov(p, g, s, t, lr):
    return torch_momentum(p, g, s, t, lr, nesterov=True)


def torch_ascent_with_decay(p, g, s, t, lr):
    return torch_momentum(p, -g + WD * p, s, t, lr)


def keras_momentum(p, g, s, t, lr):
    s["v"] = MU * s.get("v", 0) - lr * g
    return p + s["v"]


def keras_nesterov(p, g, s, t, lr):
    s["v"] = MU * s.get("v", 0) - lr * g
    return p + MU * s["v"] - lr * g


def keras_momentum_with_decay(p, g, s, t, lr):
    return keras_momentum(p - p * WD * lr, g, s, t, lr)


def teaching_momentum(p, g, s, t, lr):
    s["a"] = MU * s.get("a", 0) + (1 - MU) * g
    return p - lr * s["a"]


def square_average(g, s, centered):
    s["v"] = B2 * s.get("v", 0) + (1 - B2) * g**2
    s["a"] = B2 * s.get("a", 0) + (1 - B2) * g
    return s["v"] - s["a"] ** 2 if centered else s["v"]


def torch_rmsprop(p, g, s, t, lr, centered=False, momentum=0.0):
    v = square_average(g, s, centered)
    s["b"] = momentum * s.get("b", 0) + g / (np.sqrt(v) + EPS)
    return p - lr * s["b"]


def torch_rmsprop_centered_momentum(p, g, s, t, lr):
    return torch_rmsprop(p, g, s, t, lr, centered=True, momentum=MU)


def keras_rmsprop(p, g, s, t, lr, centered=False, momentum=0.0):
    v = square_average(g, s, centered)
    s["m"] = momentum * s.get("m", 0) + lr * g / np.sqrt(v + EPS)
    return p - s["m"]


def keras_rmsprop_centered_momentum(p, g, s, t, lr):
    return keras_rmsprop(p, g, s, t, lr, centered=True, momentum=MU)


def adam_averages(g, s):
    s["m"] = B1 * s.get("m", 0) + (1 - B1) * g
    s["v"] = B2 * s.get("v", 0) + (1 - B2) * g**2
    s["max"] = np.maximum(s.get("max", 0), s["v"])


def torch_adam(p, g, s, t, lr, v="v"):
    adam_averages(g, s)
    return p - lr * (s["m"] / (1 - B1**t)) / (np.sqrt(s[v] / (1 - B2**t)) + EPS)


def torch_amsgrad(p, g, s, t, lr):
    return torch_adam(p, g, s, t, lr, v="max")


def torch_adam_with_decay(p, g, s, t, lr):
    return torch_adam(p, g + WD * p, s, t, lr)


def torch_adamw(p, g, s, t, lr):
    return torch_adam(p * (1 - lr * WD), g, s, t, lr)


def torch_adamw_ascent(p, g, s, t, lr):
    return torch_adamw(p, -g, s, t, lr)


def keras_adam(p, g, s, t, lr, v="v"):
    adam_averages(g, s)
    alpha = lr * np.sqrt(1 - B2**t) / (1 - B1**t)
    return p - s["m"] * alpha / (np.sqrt(s[v]) + EPS)


def keras_amsgrad(p, g, s, t, lr):
    return keras_adam(p, g, s, t, lr, v="max")


def keras_adamw(p, g, s, t, lr):
    return keras_adam(p - p * WD * lr, g, s, t, lr)


def teaching_adam(p, g, s, t, lr):
    adam_averages(g, s)
    return p - lr * (s["m"] / (1 - B1**t)) / np.sqrt(s["v"] / (1 - B2**t) + EPS)


RMS = {"alpha": B2, "eps": EPS}
ADAM = {"beta1": B1, "beta2": B2, "eps": EPS}
CENTERED = {"centered": True, "momentum": MU}
HAT = {**ADAM, "eps_form": "hat"}
CONVENTIONS = {
    plain: SGD(),
    coupled: SGD(weight_decay=WD),
    decoupled: SGD(weight_decay=WD, decoupled=True),
    ascent: SGD(maximize=True),
    torch_momentum: Momentum(momentum=MU),
    torch_dampened: Momentum(momentum=MU, dampening=0.4),
    torch_nesterov: Momentum(momentum=MU, nesterov=True),
    torch_ascent_with_decay: Momentum(momentum=MU, weight_decay=WD, maximize=True),
    keras_momentum: Momentum(momentum=MU, buffer="velocity"),
    keras_nesterov: Momentum(momentum=MU, buffer="velocity", nesterov=True),
    keras_momentum_with_decay: Momentum(
        momentum=MU, buffer="velocity", weight_decay=WD, decoupled=True
    ),
    teaching_momentum: Momentum(momentum=MU, buffer="average"),
    torch_rmsprop: RMSprop(**RMS),
    torch_rmsprop_centered_momentum: RMSprop(**RMS, **CENTERED),
    keras_rmsprop: RMSprop(**RMS, eps_form="inside"),
    keras_rmsprop_centered_momentum: RMSprop(
        **RMS, **CENTERED, eps_form="inside", buffer="velocity"
    ),
    torch_adam: Adam(**ADAM),
    torch_amsgrad: Adam(**ADAM, amsgrad=True),
    torch_adam_with_decay: Adam(**ADAM, weight_decay=WD),
    torch_adamw: AdamW(**ADAM, weight_decay=WD),
    torch_adamw_ascent: AdamW(**ADAM, weight_decay=WD, maximize=True),
    keras_adam: Adam(**HAT),
    keras_amsgrad: Adam(**HAT, amsgrad=True),
    keras_adamw: AdamW(**HAT, weight_decay=WD),
    teaching_adam: Adam(**ADAM, eps_form="inside"),
}


def compare(rule, formula):
    """Raise unless the rule follows the formula, with a learning rate that changes on the way."""
    start = weights(SIZE, dtype=np.float64)
    param, expected, memory = start, start, {}
    slots = {name: np.zeros(SIZE) for name in rule.slots}
    for t, grad in enumerate(gradients(SIZE, 6, dtype=np.float64), 1):
        lr = LR if t <= 3 else LR / 8
        expected = formula(expected, grad, memory, t, lr)
        param, slots = replace(rule, lr=lr).step(np, t, param, grad, Slots(slots))
        assert_agree(param, expected, "float64", start=start, what=f"step {t}")


@pytest.mark.parametrize("formula", CONVENTIONS, ids=lambda formula: formula.__name__)
def test_the_conventions(formula):
    compare(CONVENTIONS[formula], formula)


class FarOn(Adam):
    """No bias correction: as if it had run for ever."""

    def update(self, xp, t, param, grad, slot):
        return super().update(xp, 10**9, param, grad, slot)


class FromTwo(Adam):
    """Counts the steps from 2."""

    def update(self, xp, t, param, grad, slot):
        return super().update(xp, t + 1, param, grad, slot)


class DampedAtOnce(Momentum):
    """Dampens the first gradient too."""

    def update(self, xp, t, param, grad, slot):
        return super().update(xp, t + 1, param, grad, slot)


class Forgetful(Adam):
    """amsgrad that keeps the average, not the largest one."""

    def update(self, xp, t, param, grad, slot):
        param, new = super().update(xp, t, param, grad, slot)
        return param, new | {"max_exp_avg_sq": new["exp_avg_sq"]}


SWAPPED = {"beta1": B2, "beta2": B1, "eps": EPS}
MUTANTS = {
    "no bias correction": (torch_adam, FarOn(**ADAM)),
    "no bias correction, hat": (keras_adam, FarOn(**HAT)),
    "off by one step": (torch_adam, FromTwo(**ADAM)),
    "off by one step, hat": (keras_adam, FromTwo(**HAT)),
    "betas swapped": (torch_adam, Adam(**SWAPPED)),
    "eps hat for outside": (torch_adam, Adam(**HAT)),
    "eps outside for hat": (keras_adam, Adam(**ADAM)),
    "eps inside for outside": (torch_adam, Adam(**ADAM, eps_form="inside")),
    "eps inside for outside, RMSprop": (torch_rmsprop, RMSprop(**RMS, eps_form="inside")),
    "eps too small": (torch_adam, Adam(**{**ADAM, "eps": EPS / 2})),
    "decay coupled": (torch_adamw, AdamW(**ADAM, weight_decay=WD, decoupled=False)),
    "decay decoupled": (torch_adam_with_decay, AdamW(**ADAM, weight_decay=WD)),
    "decay dropped": (coupled, SGD()),
    "dampened at step 1": (torch_dampened, DampedAtOnce(momentum=MU, dampening=0.4)),
    "dampening dropped": (torch_dampened, Momentum(momentum=MU)),
    "nesterov dropped": (torch_nesterov, Momentum(momentum=MU)),
    "nesterov dropped, velocity": (keras_nesterov, Momentum(momentum=MU, buffer="velocity")),
    "lr inside the buffer": (torch_momentum, Momentum(momentum=MU, buffer="velocity")),
    "lr outside the buffer": (keras_momentum, Momentum(momentum=MU)),
    "sum for average": (teaching_momentum, Momentum(momentum=MU)),
    "not centered": (torch_rmsprop_centered_momentum, RMSprop(**RMS, momentum=MU)),
    "amsgrad forgets": (torch_amsgrad, Forgetful(**ADAM, amsgrad=True)),
    "amsgrad dropped": (keras_amsgrad, Adam(**HAT)),
    "maximize dropped": (ascent, SGD()),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_rule_is_seen(mutant):
    formula, wrong = MUTANTS[mutant]
    compare(CONVENTIONS[formula], formula)
    with pytest.raises(AssertionError, match=r"step .: difference"):
        compare(wrong, formula)


# Hyperparameters


def described(kind):
    """(rule class, field, type, what the annotation says) for each field of one kind."""
    found = []
    for cls in CLASSES:
        hints = get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            hint, note = hints[field.name], None
            if get_origin(hint) is Annotated:
                hint, note, *_ = get_args(hint)
            if get_origin(hint) is Literal:
                hint, note = Literal, get_args(hint)
            if hint is kind:
                found.append(pytest.param(cls, field.name, note, id=f"{cls.__name__}-{field.name}"))
    return found


def assert_refused(cls, name, value, error, words):
    with pytest.raises(error) as caught:
        cls(**{name: value})
    assert str(caught.value) == f"{name} must be {words}, got {value!r}"
    assert (caught.value.name, caught.value.value) == (name, value) or value != value


@pytest.mark.parametrize(("cls", "name", "interval"), described(float))
def test_float_fields_keep_their_bounds(cls, name, interval):
    text = interval.text
    low, high = map(float, text[1:-1].split(","))
    inside, outside = [low] if text[0] == "[" else [], [np.inf, -np.inf, np.nan, 10**400]
    outside += [] if text[0] == "[" else [low]
    inside += [high] if text[-1] == "]" else [np.nextafter(high, low).item()]
    outside += [np.nextafter(high, np.inf).item()] if text[-1] == "]" else [high]
    outside += [np.nextafter(low, -np.inf).item(), -1e300] if np.isfinite(low) else []
    for value in inside:
        assert getattr(cls(**{name: value}), name) == value
    for value in outside:
        assert_refused(cls, name, value, HyperparameterError, f"in {text}")


@pytest.mark.parametrize(("cls", "name", "interval"), described(float))
@pytest.mark.parametrize("value", ["0.5", None, True, 1j, [0.5], np.bool_(True), b"1"], ids=repr)
def test_float_fields_take_real_numbers_alone(cls, name, interval, value):
    words = f"a real number in {interval.text}"
    assert_refused(cls, name, value, HyperparameterTypeError, words)


def test_an_array_is_no_float():
    with pytest.raises(HyperparameterTypeError, match="lr must be a real number"):
        SGD(lr=np.array(0.5))
    assert issubclass(HyperparameterTypeError, TypeError | ValueError)


@pytest.mark.parametrize(("cls", "name", "interval"), described(float))
@pytest.mark.parametrize("kind", [int, np.float32, np.float64, np.float16, np.int64, Fraction])
def test_float_fields_become_floats(cls, name, interval, kind):
    allowed = [kind(v) for v in (-1, 0, 0.5, 2) if v in interval and kind(v) == v]
    assert allowed or kind in (int, np.int64)
    for value in allowed:
        made = getattr(cls(**{name: value}), name)
        assert type(made) is float
        assert made == value


@pytest.mark.parametrize(("cls", "name", "_"), described(bool))
@pytest.mark.parametrize("value", [0, 1, "True", None, 0.0])
def test_bool_fields_take_bools_alone(cls, name, _, value):
    assert_refused(cls, name, value, HyperparameterTypeError, "True or False")


@pytest.mark.parametrize(("cls", "name", "choices"), described(Literal))
@pytest.mark.parametrize("value", ["", "Outside", None, 0, False, ["sum"], ("sum",)])
def test_choices(cls, name, choices, value):
    for choice in choices:
        assert getattr(cls(**{name: choice}), name) == choice
    if value in choices:
        return
    words = f"one of {', '.join(map(repr, choices))}"
    assert_refused(cls, name, value, HyperparameterError, words)


def test_a_choice_is_not_compared_with_an_array():
    with pytest.raises(HyperparameterError, match="buffer must be one of 'sum', 'velocity'"):
        RMSprop(buffer=np.array(["sum", "velocity"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": 0.5, "buffer": "velocity"}, "dampening must be 0 unless buffer is 'sum'"),
        ({"dampening": -0.5, "buffer": "average"}, "dampening must be 0 unless buffer is 'sum'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov must be False with momentum 0"),
        ({"nesterov": True, "dampening": 0.1}, "nesterov must be False with momentum 0"),
        ({"nesterov": True, "buffer": "average"}, "nesterov must be False with momentum 0"),
    ],
)
def test_options_that_exclude_one_another(options, message):
    with pytest.raises(HyperparameterError, match=f"^{message}"):
        Momentum(**options)


@pytest.mark.parametrize("power", [0.0, 0.01, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0, 1.2])
def test_ftrl_begins_with_nothing_accumulated(power):
    rule = Ftrl(lr=0.5, lr_power=-power, initial_accumulator_value=0.0)
    param, grad = np.ones(3), np.array([2.0, 1e-3, 1e-60])
    with np.errstate(divide="ignore"):  # the logarithm of 0
        new, _ = rule.step(np, 1, param, grad, Slots({"accumulator": 0 * grad, "linear": 0 * grad}))
    n, before = (grad * grad) ** power, np.zeros(3) ** power
    assert_agree(new * n / ((n - before) - 0.5 * grad), np.ones(3), "float64")


@pytest.mark.parametrize("how", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("value", [-1.0, "x"])
def test_errors_are_copied(value, how):
    with pytest.raises(HyperparameterError) as caught:
        Adam(lr=value)
    again = how(caught.value)
    assert type(again) is type(caught.value) and vars(again) == vars(caught.value)
    assert str(again) == str(caught.value)


@pytest.mark.parametrize("cls", CLASSES)
def test_rules_are_frozen_values(cls):
    rule = cls(lr=0.5)
    with pytest.raises(FrozenInstanceError):
        rule.lr = 0.25
    assert rule == cls(lr=0.5) != cls(lr=0.25)
    assert hash(rule) == hash(cls(lr=0.5))
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert replace(rule, lr=0.25) == cls(lr=0.25)
    with pytest.raises(TypeError, match="unexpected keyword"):
        cls(learning_rate=0.5)
    with pytest.raises(TypeError):
        cls(0.5)


def test_replace_checks_again():
    with pytest.raises(HyperparameterError, match=r"^beta1 must be in \[0, 1\), got 1.0$"):
        replace(Adam(), beta1=1.0)


def test_a_users_fields_are_checked_by_their_annotation():
    @dataclass(frozen=True, kw_only=True)
    class Custom(Rule):
        scale: Annotated[float, "a note", portopt.rules.Interval("(0, 2]")] = 1.0
        free: float = 0.0
        words: object = None

        def update(self, xp, t, param, grad, slot):
            return param, {}

    assert Custom(lr=1, scale=2, free=-5, words=[1]).free == -5.0
    for value in (0, 2.5):
        assert_refused(lambda **k: Custom(lr=1, **k), "scale", value, ValueError, "in (0, 2]")
    with pytest.raises(TypeError, match="lr"):
        Custom()
    with pytest.raises(TypeError, match="abstract"):
        Rule(lr=0.1)


def test_slots_are_read_only():
    slots = Slots({"b": 1})
    assert (slots.b, slots["b"], list(slots), len(slots), dict(slots)) == (1, 1, ["b"], 1, {"b": 1})
    with pytest.raises(AttributeError, match="no slot 'c': the rule's slots are b"):
        _ = slots.c
    with pytest.raises(AttributeError, match=r"slot.b cannot be assigned"):
        slots.b = 2
    with pytest.raises(TypeError):
        slots["b"] = 2


# Arrays


def test_namespaces_and_dtypes():
    assert namespace(np.ones(1)).sqrt(np.float64(4.0)) == 2.0
    for value in ([1.0], 1.0, "x", None):
        with pytest.raises(TypeError):
            namespace(value)
    wanted = {"float16": "float32", "bfloat16": "float32", "float32": "float32"}
    assert {storage: compute_dtype(storage) for storage in wanted} == wanted
    assert compute_dtype("float64") == "float64"
    with pytest.raises(TypeError, match=r"dtype must be one of float16, .*, got int32"):
        compute_dtype("int32")


# Docstrings

SECTIONS = ["Update", "Args", "State", "Cost", "Raises", "Differs", "Source", "Example"]


def section(cls, name):
    """One section of a rule's docstring, from its heading to the next."""
    doc = inspect.cleandoc(cls.__doc__)
    (text,) = re.findall(rf"(?ms)^({name}\b.*?)(?=^[A-Z]\w+\b[^\n]*:|\Z)", doc)
    return text


@pytest.mark.parametrize("cls", CLASSES)
def test_docstrings_have_every_section(cls):
    doc = inspect.cleandoc(cls.__doc__)
    assert re.match(r"[A-Z].*\.\n\n", doc)
    shared = re.search(r"^Args, State, Cost, Raises: as `(\w+)`, but (.*?)\n\n", doc, re.M | re.S)
    missing = [name for name in SECTIONS if not re.search(rf"(?m)^{name}\b.*:", doc)]
    if shared:  # what is the same stands once, at the base; what differs is said
        base = getattr(portopt.rules, shared[1])
        assert issubclass(cls, base)
        assert missing == ["State", "Cost", "Raises"]
        for field in fields(base):
            default = getattr(cls(), field.name)
            if default != field.default:
                words = rf"``{field.name}`` (is )?{re.escape(repr(default))}"
                assert re.search(words, shared[2])
    else:
        assert not missing


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not AdamW])
def test_docstrings_say_what_the_fields_say(cls):
    hints = get_type_hints(cls, include_extras=True)
    entries = dict(re.findall(r"(?ms)^    (\w+): (.*?)(?=^    \w+: |\Z)", section(cls, "Args")))
    assert set(entries) == {field.name for field in fields(cls)}
    for field in fields(cls):
        entry = " ".join(entries[field.name].split())
        assert entry.endswith(f" {field.default!r} by default.")
        for note in get_args(hints[field.name])[1:]:
            if isinstance(note, portopt.rules.Interval):
                assert f"in {note.text}" in entry or "any real number" in entry
        if get_origin(hints[field.name]) is Literal:
            assert all(repr(choice) in entry for choice in get_args(hints[field.name]))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not AdamW])
def test_docstrings_say_state_and_cost(cls, rules, by_shape):
    made = [rule for rule in (*rules, *by_shape) if type(rule) is cls]
    slots = {slot for rule in made for slot in (*rule.slots, *rule.numbers)}
    names = re.findall(r"(?m)^    (\w+(?:, \w+)*): ", section(cls, "State"))
    assert set(", ".join(names).split(", ")) == (slots or {""})
    if not slots:
        assert section(cls, "State").startswith("State: none.")
    cost = f"Cost: {4 * (3 + 2 * len(cls().slots))} bytes per float32 element"
    if "of state" in section(cls, "Cost"):  # whose slots are smaller than the parameter
        least = portopt.rules.registry.entry("", cls).bytes_per_parameter[0]
        cost = f"Cost: {least:.2f} bytes of state per float32 element of a 1024x1024 matrix"
    assert section(cls, "Cost").startswith(cost)
    assert "HyperparameterError: " in section(cls, "Raises")
    assert "https://" in section(cls, "Source")
    assert 0 < section(cls, "Example").count(">>>") < 10


MODULES = [
    module.name
    for module in pkgutil.walk_packages(portopt.__path__, "portopt.")
    if not re.match(r"portopt\.(tape|__main__)", module.name)
]


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    if name == "portopt.jax":
        pytest.importorskip("optax")
    # portopt.trace, the function, stands before portopt.trace, the module.
    importlib.import_module(name)
    assert doctest.testmod(sys.modules[name]).failed == 0


def test_there_are_doctests():
    examples = [doctest.DocTestFinder().find(cls)[0].examples for cls in CLASSES]
    assert all(examples)


def test_a_bare_float_keeps_the_range_of_the_field_it_redeclares():
    cls = dataclass(frozen=True, kw_only=True)(
        type("Custom", (SGD,), {"__annotations__": {"lr": float}, "lr": 0.5})
    )
    with pytest.raises(ValueError, match=r"lr must be in \[0, inf\), got -1"):
        cls(lr=-1)


def test_a_type_that_is_not_known_in_its_module_is_named():
    Unit = Annotated[float, portopt.rules.Interval("[0, 1]")]  # noqa: N806

    @dataclass(frozen=True, kw_only=True)
    class Custom(SGD):
        scale: Unit = 0.5

    with pytest.raises(TypeError, match=r"^Custom.scale: its type has the name 'Unit', which must"):
        Custom()


def test_a_field_that_cannot_be_given():
    param = np.ones(2)
    optimizer = Optimizer(Halved(), [param])
    optimizer.param_groups[0]["lr"] = 2.0
    optimizer.step([np.ones(2)])
    assert_agree(param, np.zeros(2), "same")
    given = ["lr", "weight_decay", "decoupled", "maximize"]
    assert sorted(optimizer.param_groups[0]) == sorted([*given, "params"])
    for rule in (Halved, Halved()):
        assert sorted(presets(rule)[1]) == sorted(given)


def test_a_default_factory_is_a_default():
    cls = make_dataclass(
        "Custom",
        [("steps", tuple, dataclasses.field(default_factory=lambda: (1,)))],
        bases=(SGD,),
        frozen=True,
        kw_only=True,
    )
    assert cls.unchecked().steps == cls().steps == (1,)


def test_a_scalar_that_is_no_real_number():
    class Custom(SGD):
        def update(self, xp, t, param, grad, slot):
            return param - (self.lr - 1) ** 0.5 * (1 / (t - 2)) * grad, {}

    program = trace(Custom(lr=0.5))
    with pytest.raises(ArithmeticError, match=r"Custom, step 1: s\d = pow\(-0.5, 0.5\): it is"):
        program.scalars({**vars(Custom(lr=0.5))}, 1)
    with pytest.raises(ArithmeticError, match=r"Custom, step 2: s\d = div\(1, 0\): division"):
        program.scalars({**vars(Custom(lr=2.0))}, 2)


def test_an_integer_beyond_every_float_changes_nothing():
    class Custom(SGD):
        def update(self, xp, t, param, grad, slot):
            return xp.minimum(param - self.lr * grad, 2**t), {}

    param = np.ones(2)
    optimizer = Optimizer(Custom(lr=0.5), [param])
    optimizer.step([param])
    optimizer.state[0]["step"] = 1023
    with pytest.raises(ArithmeticError, match=r"Custom, step 1024: s1 = pow\(2, 1024\): int too l"):
        optimizer.step([param])
    assert optimizer.state[0]["step"] == 1023
    assert_agree(param, [0.5, 0.5], "same")
