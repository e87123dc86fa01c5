"""Signatures, defaults, variables and state: as the native optimizers have them."""

import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import (
    CASES,
    EACH,
    NAMES,
    apply_steps,
    arrays,
    assert_variables,
    case,
    fit,
    pair,
    raw_variables,
    small_model,
)

import portopt_tf

SHARED = {
    "weight_decay": 0.1,
    "clipnorm": 1.0,
    "clipvalue": 1.0,
    "global_clipnorm": 1.0,
    "use_ema": True,
    "ema_momentum": 0.5,
    "ema_overwrite_frequency": 3,
    "loss_scale_factor": 2.0,
    "gradient_accumulation_steps": 2,
    "name": "mine",
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_defaults_are_the_natives(name):
    native, ours = pair(name)
    assert inspect.signature(type(ours)) == inspect.signature(type(native))
    assert {**ours.get_config(), "name": native.name} == native.get_config()


@pytest.mark.parametrize("name", NAMES)
def test_arguments_by_position_are_the_natives(name):
    """All of them, each with another value than its default."""

    def other(key, default):
        if key in ("clipvalue", "global_clipnorm"):
            return None  # as clipnorm is given
        if isinstance(default, bool):
            return not default
        if key == "exclude_layers":
            return ["embedding"]
        if isinstance(default, int):
            return default + 1
        return SHARED.get(key, default / 2 or 0.25 if isinstance(default, float) else default)

    parameters = inspect.signature(getattr(keras.optimizers, name)).parameters.values()
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    values = [other(p.name, p.default) for p in named]
    native, ours = pair(name, *values)
    assert ours.get_config() == native.get_config()
    assert sum(v == p.default for v, p in zip(values, named, strict=True)) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", SHARED)
def test_every_shared_keyword_is_kept(name, key):
    native, ours = pair(name, **{key: SHARED[key]})
    assert getattr(ours, key) == SHARED[key]
    if key != "name":
        ours.name = native.name
    assert ours.get_config() == native.get_config()


@pytest.mark.parametrize("name", ["Adam", "Adafactor", "Muon"])
def test_variables_that_gradients_overwrite(name):
    """As the scales of a layer in float8; they may be integers."""
    layouts = []
    for optimizer in pair(name, learning_rate=0.5):
        scales = [keras.Variable(value, dtype=dtype) for value, dtype in SCALES]
        for scale in scales:
            scale.overwrite_with_gradient = True
        variables = [keras.Variable(np.ones((2, 3), "float32")), *scales]
        for step in (1, 2):
            grads = [tf.ones((2, 3)), *(tf.cast(tf.fill(s.shape, step), s.dtype) for s in scales)]
            optimizer.apply(grads, variables)
            assert all((scale.numpy() == step).all() for scale in scales)
        assert (variables[0].numpy() < 1).all()
        layouts.append([(v.shape, v.dtype) for v in optimizer.variables])
    assert layouts[0] == layouts[1]


SCALES = ((0.0, "float32"), ([0, 0], "int32"), (np.zeros((4, 5)), "float32"))


def test_momenta_of_sgd():
    for optimizer in pair("SGD", momentum=0.9):
        optimizer.build(raw_variables("float32"))
        assert [v.shape for v in optimizer.momentums] == [v.shape for v in raw_variables()]
    for optimizer in pair("SGD"):
        optimizer.build(raw_variables("float32"))
        assert optimizer.momentums == []


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_shape_that_is_not_known(mode):
    optimizer = portopt_tf.SGD(0.5)
    variable = tf.Variable(tf.ones((2, 3)), shape=[None, 3])
    optimizer.build([variable])

    def step():
        optimizer.apply([tf.ones((2, 3))])

    {"eager": step, "graph": tf.function(step), "xla": tf.function(step, jit_compile=True)}[mode]()
    assert (variable.numpy() == 0.5).all()


def test_an_update_step_that_an_instance_is_given():
    for optimizer in pair("SGD", learning_rate=0.5):
        own = optimizer.update_step
        optimizer.update_step = lambda grad, variable, lr, own=own: own(2 * grad, variable, lr)
        variable = keras.Variable([1.0])
        optimizer.apply([tf.constant([1.0])], [variable])
        assert variable.numpy() == [0.0]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keyword_is_refused_as_natively(name):
    for module in (keras.optimizers, portopt_tf):
        with pytest.raises(ValueError, match=r"Argument\(s\) not recognized: {'lr': 0.1}"):
            getattr(module, name)(lr=0.1)


@pytest.mark.parametrize("extra", ({}, {"use_ema": True, "gradient_accumulation_steps": 2}))
@pytest.mark.parametrize("label", CASES)
def test_variables_are_the_natives(label, extra):
    def layout(optimizer):
        optimizer.build([*raw_variables("float32"), keras.Variable([1.0, 2.0], dtype="bfloat16")])
        names = [re.sub(r"variable(_\d+)?", "variable", v.path) for v in optimizer.variables]
        return [
            # Nadam's product of momenta has no name in Keras, nor Adafactor's idle ones a scope.
            (
                "mu_product" if name == "variable" and v.dtype != "int32" else name.split("/")[-1],
                tuple(v.shape),
                v.dtype,
            )
            for name, v in zip(names, optimizer.variables, strict=True)
        ]

    native, ours = case(label, **extra)
    assert layout(ours) == layout(native)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", EACH)
def test_state_moves_between_native_and_ours(label):
    native, ours = case(label)
    expected = apply_steps(native, raw_variables())
    middle = [v.numpy() for v in expected]
    weights = [v.numpy() for v in native.variables]
    apply_steps(native, expected, seed=9)

    to_ours = raw_variables()
    _, ours = case(label, learning_rate=0.5)
    ours.build(to_ours)
    ours.set_weights(weights)
    back = raw_variables()
    other, _ = case(label, learning_rate=0.5)
    other.build(back)
    for variable, value in zip(other.variables, ours.variables, strict=True):
        variable.assign(value)
    for optimizer, variables in ((ours, to_ours), (other, back)):
        for variable, value in zip(variables, middle, strict=True):
            variable.assign(value)
        apply_steps(optimizer, variables, seed=9)
        assert_variables(variables, expected, "float64", start=middle)
        assert_variables(optimizer.variables, native.variables, "float64")


@pytest.mark.parametrize("label", EACH)
def test_built_late_and_once(label):
    """By the first `apply`, or before; a second time changes nothing, and takes no variable in."""
    first, second = raw_variables("float32"), raw_variables("float32")
    for optimizer in case(label):
        assert not optimizer.built and len(optimizer.variables) == 2
        optimizer.apply(first, first)
        assert optimizer.built
        made = optimizer.variables
        optimizer.build(second)
        assert [id(v) for v in optimizer.variables] == [id(v) for v in made]
        with pytest.raises(ValueError, match=r"Unknown variable: <tf\.Variable"):
            optimizer.apply(first, second)
        with pytest.raises(ValueError, match="must already be built on a list of variables"):
            type(optimizer)().apply(first)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", ("nesterov", "amsgrad", "nadam"))
def test_layers_may_be_frozen_and_thawed(label):
    """Their slots stay; a layer that was frozen when the optimizer was built stays unknown."""
    results = []
    for optimizer in case(label):
        results.append([])
        model = small_model()
        layer = model.layers[0]
        for trainable in (True, False, True):
            layer.trainable = trainable
            before = arrays(layer.weights)
            fit(optimizer, 1, model, batches=1, run_eagerly=True)
            moved = [(a != b).any() for a, b in zip(arrays(layer.weights), before, strict=True)]
            assert moved == [trainable] * 2
            results[-1] += arrays([*model.weights, *optimizer.variables])
    assert_variables(results[1], results[0], "float64")

    for optimizer in case(label):
        optimizer.build(model.layers[-1].weights)
        with pytest.raises(ValueError, match=r"Unknown variable: <Variable"):
            fit(optimizer, 1, model, batches=1, run_eagerly=True)


@pytest.mark.parametrize("label", EACH)
def test_stateless_apply_is_refused_on_tensorflow_as_natively(label):
    for optimizer in case(label):
        variables = raw_variables("float32")
        optimizer.build(variables)
        with pytest.raises(ValueError, match="stateless_apply is not supported with the Tensor"):
            optimizer.stateless_apply(optimizer.variables, variables, variables)


def test_iterations_count_the_applies():
    for optimizer in case("adam", gradient_accumulation_steps=2):
        variables = raw_variables("float32")
        apply_steps(optimizer, variables, 5)
        assert int(optimizer.iterations) == 2
        pairs = zip(variables, variables, strict=True)
        assert int(optimizer.apply_gradients(pairs)) == 6


@pytest.mark.parametrize("mode", ("eager", "function"))
def test_a_subclass_may_have_an_update_step_of_its_own(mode):
    """It is what Keras says to override."""

    class Slow(portopt_tf.SGD):
        def update_step(self, gradient, variable, learning_rate):
            super().update_step(gradient, variable, learning_rate * 0.5)

    runs = [apply_steps(o, raw_variables(), mode=mode) for o in (portopt_tf.SGD(0.25), Slow(0.5))]
    assert_variables(runs[1], runs[0], "float64")


@pytest.mark.parametrize("label", ("adamw", "muon"))
def test_exclusion_from_weight_decay_is_felt_at_once(label):
    results = []
    for optimizer in case(label, weight_decay=0.5):
        variables = raw_variables("float32")

        def change(step, optimizer=optimizer, variables=variables):
            if step == 2:
                optimizer.exclude_from_weight_decay(var_list=variables[1:])

        results.append(apply_steps(optimizer, variables, change=change))
    assert_variables(results[1], results[0], "float32")


@pytest.mark.parametrize("mode", ("eager", "function"))
@pytest.mark.parametrize(
    ("label", "names"),
    [
        ("amsgrad", ("beta_1", "weight_decay")),
        ("nesterov", ("momentum",)),
        ("muon", ("weight_decay",)),
    ],
)
def test_a_hyperparameter_may_become_a_variable(label, names, mode):
    results = []
    for value in (lambda: 0.25, lambda: keras.Variable(0.25)):
        _, ours = case(label)
        for name in names:
            setattr(ours, name, value())
        results.append(apply_steps(ours, raw_variables("float32"), mode=mode))
    assert_variables(results[1], results[0], "float32")
