"""Bad input: an error that names the argument, its value and what is allowed; nothing changes."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import EACH, NAMES, arrays, case, raw_variables

import portopt_tf
from portopt import rules
from portopt_tf.drop_in import CLASSES

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("SGD", {"learning_rate": -0.1}, r"in \[0, inf\)"),
        ("SGD", {"learning_rate": nan}, r"in \[0, inf\)"),
        ("SGD", {"weight_decay": -1.0}, r"in \[0, inf\)"),
        ("RMSprop", {"rho": 1.5}, r"in \[0, 1\]"),
        ("RMSprop", {"momentum": -0.1}, r"in \[0, inf\)"),
        ("RMSprop", {"epsilon": inf}, r"in \[0, inf\)"),
        ("Adam", {"beta_1": 1.0}, r"in \[0, 1\)"),
        ("Adam", {"beta_2": -0.1}, r"in \[0, 1\)"),
        ("Adam", {"epsilon": nan}, r"in \[0, inf\)"),
        ("AdamW", {"weight_decay": nan}, r"in \[0, inf\)"),
    ],
)
def test_values_out_of_range(name, arguments, allowed):
    ((argument, value),) = arguments.items()
    match = rf"`{argument}` must be {allowed}. Received: {argument}={value}"
    with pytest.raises(ValueError, match=match):
        getattr(portopt_tf, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "allowed"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": "yes"}, "True or False"),
        ("SGD", {"weight_decay": "0.1"}, "a real number"),
        ("RMSprop", {"rho": None}, "a real number"),
        ("RMSprop", {"centered": 1}, "True or False"),
        ("Adam", {"beta_1": "0.9"}, "a real number"),
        ("Adam", {"beta_2": True}, "a real number"),
        ("Adam", {"amsgrad": "no"}, "True or False"),
    ],
)
def test_values_of_a_wrong_type(name, arguments, allowed):
    argument = list(arguments)[-1]
    with pytest.raises(TypeError, match=f"`{argument}` must be {allowed}.* Received: {argument}="):
        getattr(portopt_tf, name)(**arguments)


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name in NAMES for argument in CLASSES[name].fields]
)
def test_every_bad_argument_is_named(name, argument):
    default = inspect.signature(CLASSES[name]).parameters[argument].default
    cases = [("x", (TypeError, ValueError))]
    if isinstance(default, float):
        cases += [(nan, ValueError), (inf, ValueError)]
        if argument != "rms_rate":  # None turns that off
            cases.append((None, (TypeError, ValueError)))
    for value, kind in cases:
        with pytest.raises(kind, match=f"`{argument}` must be .* Received: {argument}={value!r}"):
            CLASSES[name](**{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("SGD", "momentum", -0.5),
        ("Lion", "beta_1", 1.5),
        ("Ftrl", "initial_accumulator_value", -1.0),
        ("Ftrl", "learning_rate_power", 1.0),
        ("Ftrl", "l1_regularization_strength", -1.0),
        ("Ftrl", "l2_regularization_strength", -1.0),
        ("Ftrl", "l2_shrinkage_regularization_strength", -1.0),
    ],
)
def test_a_value_that_the_native_refuses_is_refused(name, argument, value):
    for module in (keras.optimizers, portopt_tf):
        with pytest.raises(ValueError, match=f"`{argument}` (must|needs to) be"):
            getattr(module, name)(**{argument: value})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGD", {"momentum": 1.5}),
        ("SGD", {"momentum": 1}),
        ("SGD", {"momentum": "0.9"}),
        ("SGD", {"learning_rate": "fast"}),
        ("Adam", {"learning_rate": 1}),
        ("AdamW", {"weight_decay": None}),
        ("Adam", {"clipnorm": 1.0, "clipvalue": 1.0}),
        ("Adam", {"gradient_accumulation_steps": 1}),
        ("Adam", {"use_ema": True, "ema_momentum": 2.0}),
    ],
)
def test_what_the_native_refuses_is_refused_in_its_words(name, arguments):
    with pytest.raises(ValueError) as native:
        getattr(keras.optimizers, name)(**arguments)
    with pytest.raises(ValueError) as ours:
        getattr(portopt_tf, name)(**arguments)
    assert str(ours.value).startswith(str(native.value).rstrip("."))


def everything(variables, optimizer):
    return [*arrays(variables), *arrays(optimizer.variables)]


@pytest.mark.parametrize(
    ("label", "extra"),
    [
        *((label, {}) for label in EACH),
        ("amsgrad", {"gradient_accumulation_steps": 2}),
        ("amsgrad", {"use_ema": True}),
    ],
)
@pytest.mark.parametrize(
    ("grads", "match"),
    [
        ([(3, 4), (5,), (1,)], r"the gradient of 'w2:0' must have .* shape \(\), has \(1,\)"),
        ([(3, 4), (), ()], r"the gradient of 'w1:0' must have .* shape \(5,\), has \(\)"),
        ([(4, 3), (5,), ()], r"the gradient of 'w0:0' must have .* shape \(3, 4\), has \(4, 3\)"),
        ([(3, 4), (5,)], "`grads` must have one gradient for each of 3 variables. Received: 2"),
    ],
)
def test_gradients_that_do_not_fit_change_nothing(label, grads, match, extra):
    _, optimizer = case(label, **extra)
    variables = raw_variables("float32")
    optimizer.build(variables)
    before = everything(variables, optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.apply([tf.ones(shape) for shape in grads], variables)
    for a, b in zip(everything(variables, optimizer), before, strict=True):
        assert np.array_equal(a, b)


def test_rows_that_do_not_fit_change_nothing():
    _, optimizer = case("adam")
    variables = [tf.Variable(np.ones((3, 2), "float32"), name="table") for _ in range(2)]
    optimizer.build(variables)
    rows = tf.IndexedSlices(tf.ones((2, 4)), tf.constant([0, 1]), tf.constant([3, 4]))
    with pytest.raises(ValueError, match=r"'table:0' must have .* \(3, 2\), has \(3, 4\)"):
        optimizer.apply([tf.ones((3, 2)), rows], variables)
    assert all((v.numpy() == 1).all() for v in variables)


def test_shapes_are_checked_inside_a_function_where_they_are_known():
    _, optimizer = case("adam")
    variable = tf.Variable(np.ones((3, 2), "float32"))
    optimizer.build([variable])

    def apply(shape):
        signature = [tf.TensorSpec(shape, "float32")]
        return tf.function(lambda g: optimizer.apply([g], [variable]), input_signature=signature)

    for shape in (None, (None, 2), (3, 2)):
        apply(shape)(tf.ones((3, 2)))
    assert int(optimizer.iterations) == 3
    for shape in ((None,), (None, 3)):
        with pytest.raises(ValueError, match="must have the variable's shape"):
            apply(shape).get_concrete_function()


@pytest.mark.parametrize("dtype", ("int32", "complex64", "bool"))
def test_variables_that_are_no_floats_are_refused_a_gradient(dtype):
    """Before anything changes; without one they are left alone, as natively."""
    variables = [tf.Variable([1.0]), tf.Variable(tf.cast([1], dtype), name="count")]
    for optimizer in case("adam"):
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply([tf.ones(1), None], variables)
    before = [v.numpy().tolist() for v in (*variables, *optimizer.variables)]
    with pytest.raises(TypeError, match=f"variable 'count:0' must have a dtype among .*{dtype}"):
        optimizer.apply(variables, variables)
    assert [v.numpy().tolist() for v in (*variables, *optimizer.variables)] == before


def test_a_row_before_the_first_is_refused_as_natively():
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([0, -1]), tf.constant([3, 2]))
    for optimizer in case("sgd"):
        table = tf.Variable(tf.ones((3, 2)))
        with pytest.raises(tf.errors.InvalidArgumentError):
            optimizer.apply([rows], [table])
        assert (table.numpy()[2] == 1).all()


def test_state_of_another_shape_is_refused_as_natively():
    variables = raw_variables("float32")
    for optimizer in case("adam"):
        optimizer.build(variables)
        weights = [v.numpy() for v in optimizer.variables]
        weights[2] = weights[2][:1]
        with pytest.raises(ValueError, match=r"Optimizer variable .* not compatible"):
            optimizer.set_weights(weights)


def test_a_shape_that_the_rule_refuses_leaves_nothing_behind():
    ours = portopt_tf.from_rule(rules.Muon)(0.5)
    vector, matrix = keras.Variable([1.0, 2.0]), keras.Variable([[1.0, 2.0]])
    before = len(ours.variables)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2D parameters, got one of shape \(2,\)"):
            ours.build([vector])
        assert not ours.built and len(ours.variables) == before
    ours.apply([tf.ones((1, 2))], [matrix])
    assert (matrix.numpy() != [[1.0, 2.0]]).all()
