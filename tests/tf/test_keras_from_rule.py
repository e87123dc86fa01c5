"""A user's own rule becomes a Keras optimizer without an adapter."""

import doctest
import importlib
from dataclasses import dataclass

import keras
import numpy as np
import plugin
import pytest
import tensorflow as tf
from keras_runs import assert_variables, fit, small_model
from support import Halved, Rowwise, assert_agree

import portopt_tf
from portopt import rules
from portopt.rules.base import Decay, Rule, ema


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Chen et al. 2023, algorithm 2."""

    beta1: Decay = 0.9
    beta2: Decay

    slots = ("exp_avg",)

    def update(self, xp, t, param, grad, slot):
        direction = xp.sign(ema(slot.exp_avg, grad, self.beta1))
        return param - self.lr * direction, {"exp_avg": ema(slot.exp_avg, grad, self.beta2)}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("jit_compile", (False, True))
def test_lion_trains_as_keras_lion(jit_compile):
    ours = portopt_tf.from_rule(Lion)(0.0625, beta1=0.75, beta2=0.875)
    native = keras.optimizers.Lion(0.0625, np.float64(0.75), np.float64(0.875))
    runs = [fit(o, jit_compile=jit_compile) for o in (native, ours)]
    assert_variables(runs[1].weights, runs[0].weights, "float64", small_model().weights)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slot_of_another_shape_goes_through_no_kernel(compiled):
    optimizer, variable = portopt_tf.from_rule(Rowwise)(0.5), keras.Variable(np.zeros((4, 6), "f4"))
    optimizer.build([variable])
    step = lambda: optimizer.apply([tf.ones((4, 6))], [variable])  # noqa: E731
    step = tf.function(step) if compiled else step
    for _ in range(3):
        step()
    assert_agree(variable.numpy(), np.full((4, 6), -0.5 * (1 + 2 + 3)), "same")


@pytest.mark.parametrize("rule", [Halved, Halved(lr=3.0)], ids=["class", "rule"])
def test_a_field_that_cannot_be_given(rule):
    variable, optimizer = keras.Variable(np.zeros(3, "f4")), portopt_tf.from_rule(rule)(2.0)
    type(optimizer).from_config(optimizer.get_config()).apply([tf.ones(3)], [variable])
    assert (variable.numpy() == -1).all()


def test_a_rule_without_a_default_learning_rate_takes_a_schedule():
    decay = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = portopt_tf.from_rule(Lion)(decay, beta2=0.5)
    variable = tf.Variable([0.0])
    for _ in range(2):
        optimizer.apply([tf.ones(1)], [variable])
    assert_agree(variable.numpy(), [-0.75], "same")


@pytest.mark.parametrize("name", ("ScheduleFreeSGD", "Rprop", "ASGD"))
def test_slots_begin_alike_when_built_inside_a_function(name):
    """They begin with the weights, or with the learning rate."""
    results = []
    for wrap in (lambda step: step, tf.function):
        ours, variable = portopt_tf.get(name)(0.125), tf.Variable([0.0, 1.0, 2.0])
        step = wrap(lambda grad, ours=ours, variable=variable: ours.apply([grad], [variable]))
        for _ in range(2):
            step(tf.constant([0.0, 1.0, -1.0]))
        results.append(variable.numpy())
    assert_agree(results[1], results[0], "same")


def test_a_callable_learning_rate_is_called_once_a_step():
    rates = iter((0.5, 0.25))
    ours, variable = portopt_tf.SGD(lambda: next(rates)), tf.Variable([1.0])
    for _ in range(2):
        ours.apply([tf.ones(1)], [variable])
    assert variable.numpy() == 0.25


def test_a_learning_rate_that_cannot_be_had_leaves_nothing_half_built():
    rates = {}
    ours, variable = portopt_tf.Rprop(lambda: rates["first"]), tf.Variable([1.0])
    with pytest.raises(KeyError):
        ours.apply([tf.ones(1)], [variable])
    rates["first"] = 0.5
    ours.apply([tf.ones(1)], [variable])
    assert variable.numpy() == 0.5


def test_a_rules_values_are_the_defaults():
    optimizer = portopt_tf.from_rule(rules.Adam(lr=0.25, beta1=0.5, weight_decay=0.125))
    given, preset = optimizer(0.5, 0.25, beta1=0.75), optimizer()
    got = [(float(o.learning_rate), o.weight_decay, o.beta1, o.beta2) for o in (given, preset)]
    assert got == [(0.5, 0.25, 0.75, 0.999), (0.25, 0.125, 0.5, 0.999)]
    assert optimizer is portopt_tf.from_rule(rules.Adam(lr=0.25, beta1=0.5, weight_decay=0.125))
    assert optimizer.__name__ == "Adam"


@pytest.mark.usefixtures("double")
def test_weight_decay_is_coupled_as_in_the_rule():
    variable = tf.Variable([2.0], dtype="float64")
    portopt_tf.from_rule(rules.SGD)(0.5, weight_decay=0.25).apply(
        [tf.ones(1, "float64")], [variable]
    )
    assert_agree(variable.numpy(), [2 - 0.5 * (1 + 0.25 * 2)], "float64")


@dataclass(frozen=True, kw_only=True)
class Clashing(Rule):
    clipnorm: float = 1.0

    def update(self, xp, t, param, grad, slot):
        return param - self.lr * grad, {}


@dataclass(frozen=True, kw_only=True)
class Undefined(Rule):
    slots = ("seen",)

    def update(self, xp, t, param, grad, slot):
        return param, {}


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: portopt_tf.from_rule(3), TypeError, "rule must be a portopt.Rule"),
        (lambda: portopt_tf.from_rule(dict), TypeError, "rule must be a portopt.Rule"),
        (lambda: portopt_tf.from_rule([]), TypeError, "rule must be a portopt.Rule"),
        (lambda: portopt_tf.from_rule(Lion)(0.1), TypeError, "missing argument 'beta2'"),
        (lambda: portopt_tf.from_rule(Lion)(beta2=0.5), ValueError, "Argument `learning_rate`"),
        (lambda: portopt_tf.from_rule(Lion)(0.1, beta2=1.0), ValueError, "`beta2` must be in"),
        (lambda: portopt_tf.from_rule(rules.SGD)(0.1, mu=1.0), ValueError, "Argument.s. not rec"),
        (lambda: portopt_tf.from_rule(rules.SGD)(lr=0.1), ValueError, "Argument.s. not rec"),
        (lambda: portopt_tf.from_rule(Clashing)(0.1), TypeError, "'clipnorm' cannot be"),
        (
            lambda: portopt_tf.from_rule(Undefined)(0.1).apply([tf.ones(1)], [tf.Variable([1.0])]),
            TypeError,
            "Undefined.update must return the slots",
        ),
    ],
)
def test_mistakes_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_classes_by_name(tmp_path, monkeypatch):
    assert portopt_tf.get("adam") is portopt_tf.Adam
    assert portopt_tf.get("nadam") is portopt_tf.Nadam
    assert portopt_tf.get("radam") is portopt_tf.RAdam is portopt_tf.from_rule(rules.RAdam)
    plugin.install(tmp_path)  # a package that brings a rule
    monkeypatch.syspath_prepend(tmp_path)
    variable = keras.Variable([1.0, 1.0])
    portopt_tf.get("signs")(0.5).apply([keras.ops.array([2.0, -3.0])], [variable])
    assert variable.numpy().tolist() == [0.5, 1.5]
    with pytest.raises(AttributeError, match="has no attribute 'Adm'"):
        _ = portopt_tf.Adm


@pytest.mark.parametrize("name", ["drop_in", "from_rule", "layout", "optimizer", "sharded"])
def test_doctests(name):
    assert doctest.testmod(importlib.import_module(f"portopt_tf.{name}")).failed == 0


def test_what_there_is_can_be_had():
    assert {"Adam", "Lion", "RAdam", "Sharded", "get"} <= {*dir(portopt_tf)}
    assert all(hasattr(portopt_tf, name) for name in dir(portopt_tf))
