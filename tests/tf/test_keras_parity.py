"""The numbers are those of the native optimizers, computed in float64."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import (
    CASES,
    EACH,
    MODES,
    RUNS,
    apply_steps,
    arrays,
    assert_variables,
    case,
    pair,
    raw_variables,
    twins,
)
from support import assert_agree

import portopt_tf
from portopt import rules

OPTIONS = {
    "clipnorm": {"clipnorm": 0.5},
    "clipvalue": {"clipvalue": 0.01},
    "global_clipnorm": {"global_clipnorm": 0.5},
    "ema": {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 3},
    "accumulation": {"gradient_accumulation_steps": 2, "weight_decay": 0.1},
    "loss_scale": {"loss_scale_factor": 8.0},
    "all": {
        "weight_decay": 0.2,
        "clipvalue": 0.1,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "loss_scale_factor": 2.0,
        "gradient_accumulation_steps": 3,
    },
}


def both(optimizers, dtype="float64", **kwargs):
    """Run both twins from the same weights; the start, the native's and our variables."""
    native, ours = (apply_steps(o, raw_variables(dtype), **kwargs) for o in optimizers)
    return raw_variables(dtype), native, ours


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("label", "mode"), RUNS)
def test_every_case_agrees_in_float64(label, mode):
    optimizers = case(label)
    start, native, ours = both(optimizers, mode=mode)
    assert_variables(ours, native, "float64", start)
    assert_variables(optimizers[1].variables, optimizers[0].variables, "float64")


@pytest.mark.parametrize(("label", "mode"), RUNS)
def test_float32_is_near_float64(label, mode):
    name, own = CASES[label]
    if "Adam" in name:
        own = {**own, "beta_2": 0.99999}  # 1 - beta_2 formed in float32 is 1.3e-3 off
    # Adadelta's steps begin as small as its epsilon.
    own = {**own, "learning_rate": 64.0 if name == "Adadelta" else 0.25}
    _, ours = twins(name, **own)
    actual = apply_steps(ours, raw_variables("float32"), mode=mode)
    keras.config.set_floatx("float64")
    native, _ = twins(name, **own)
    start, expected = raw_variables(), apply_steps(native, raw_variables())
    keras.config.set_floatx("float32")
    assert_variables(actual, expected, "float32", start)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("label", "mode", "option"),
    [
        *((label, "eager", "all") for label in EACH),
        *(("momentum", "eager", option) for option in OPTIONS),
        *(("adam", "function", option) for option in OPTIONS),
    ],
)
def test_every_option_of_keras_agrees(label, option, mode):
    optimizers = case(label, **OPTIONS[option])
    start, native, ours = both(optimizers, mode=mode, steps=7)
    assert_variables(ours, native, "float64", start)
    assert_variables(optimizers[1].variables, optimizers[0].variables, "float64")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("label", "mode", "by"),
    [
        *((label, "eager", "name") for label in EACH),
        ("adamw", "eager", "list"),
        ("adamw", "function", "name"),
        ("adamw", "function", "list"),
    ],
)
def test_excluded_variables_do_not_decay(label, mode, by):
    results = []
    for optimizer in case(label, weight_decay=0.5):
        variables = raw_variables()
        if by == "name":
            optimizer.exclude_from_weight_decay(var_names=["w0", "w2"])
        else:
            optimizer.exclude_from_weight_decay(var_list=[variables[1]])
        results.append(apply_steps(optimizer, variables, mode=mode))
    native, ours = results
    assert_variables(ours, native, "float64", raw_variables())
    _, plain = case(label, weight_decay=0.5)
    plain = apply_steps(plain, raw_variables())
    differs = [not np.array_equal(*pair) for pair in zip(arrays(plain), arrays(ours), strict=True)]
    assert differs == ([True, False, True] if by == "name" else [False, True, False])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("label", "mode"), [("momentum", "eager"), ("amsgrad", "function")])
@pytest.mark.parametrize("kind", ("schedule", "callable", "assigned"))
def test_learning_rate_changes(kind, label, mode):
    rate = tf.Variable(0.25, dtype="float64")
    decay = keras.optimizers.schedules.ExponentialDecay(0.25, 2, 0.5)
    given = {"schedule": decay, "callable": lambda: rate, "assigned": 0.25}[kind]
    results = []
    for optimizer in case(label, learning_rate=given):

        def change(step, optimizer=optimizer):
            new = 0.25 if step < 3 else 0.03125
            if kind == "assigned":
                optimizer.learning_rate = new
            rate.assign(new)

        results.append(apply_steps(optimizer, raw_variables(), mode=mode, change=change))
    assert_variables(results[1], results[0], "float64", raw_variables())
    _, constant = case(label, learning_rate=0.25)
    constant = apply_steps(constant, raw_variables())
    assert not np.array_equal(constant[0].numpy(), results[1][0].numpy())


@pytest.mark.parametrize("value", (0.1, np.float64(0.1)))
def test_a_float_learning_rate_is_not_rounded_to_float32(value):
    for mode in MODES[:2]:
        variable = tf.Variable([0.0], dtype="float64")
        optimizer = portopt_tf.SGD(lambda: value)
        apply = lambda o=optimizer, v=variable: o.apply([tf.ones(1, "float64")], [v])  # noqa: E731
        (tf.function(apply) if mode == "function" else apply)()
        assert_agree(variable.numpy(), [-0.1], "float64")


@pytest.mark.parametrize(
    ("dtype", "mode"), [("bfloat16", "eager"), ("bfloat16", "function"), ("float16", "eager")]
)
@pytest.mark.parametrize("label", ("momentum", "centered", "amsgrad", "adamw"))
def test_half_precision_variables_are_near_float64(dtype, label, mode):
    results = []
    for storage in (dtype, "float64"):
        variable = tf.Variable(np.linspace(0.5, 1.5, 8), dtype=storage)
        _, ours = case(label, learning_rate=0.125)
        ours.build([variable])
        apply = lambda o=ours, v=variable: o.apply([tf.ones_like(v)], [v])  # noqa: E731
        apply = tf.function(apply) if mode == "function" else apply
        for _ in range(5):
            apply()
        assert variable.dtype == storage
        results.append(arrays([variable])[0])
    assert_agree(*results, dtype, start=np.linspace(0.5, 1.5, 8))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("label", ("momentum", "centered", "amsgrad"))
def test_nan_and_inf_stand_where_they_do_natively(label, mode):
    results = []
    for optimizer in case(label):
        variable = tf.Variable(np.ones(5))
        optimizer.build([variable])
        apply = lambda g, o=optimizer, v=variable: o.apply([g], [v])  # noqa: E731
        apply = tf.function(apply) if mode == "function" else apply
        apply(tf.constant([np.nan, np.inf, -np.inf, 0.0, 2.0], "float64"))
        results.append([variable.numpy(), *arrays(optimizer.variables)])
    assert_variables(results[1], results[0], "float64")
    assert np.isnan(results[1][0][0]) and not np.isfinite(results[1][0][1:3]).any()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("label", "mode", "option"),
    [
        *((label, "eager", {}) for label in EACH),
        *itertools.product(("adam",), MODES, ({}, {"clipnorm": 1.0, "loss_scale_factor": 4.0})),
    ],
)
def test_repeated_rows_are_summed_as_in_a_dense_gradient(label, mode, option):
    indices = tf.constant([3, 0, 3, 3])
    values = tf.constant(np.arange(8.0).reshape(4, 2) - 3)
    shape = None if mode == "eager" else tf.constant([5, 2])
    results = []
    for optimizer, sparse in zip(case(label, **option), (False, True), strict=True):
        variable = tf.Variable(np.ones((5, 2)))
        variable.path = variable.name  # without which Keras's own Muon fails
        optimizer.build([variable])

        def apply(o=optimizer, v=variable, sparse=sparse):
            rows = tf.IndexedSlices(values, indices, shape)
            o.apply([rows if sparse else tf.math.unsorted_segment_sum(values, indices, 5)], [v])

        if mode != "eager":
            apply = tf.function(apply, jit_compile=mode == "xla")
        for _ in range(3):
            apply()
        results.append(variable)
    assert_variables(results[1:], results[:1], "float64", [np.ones((5, 2))])


def test_keras_itself_sums_the_squares_of_repeated_rows():
    """So there is no native to agree with, but the native's dense gradient."""
    rows = tf.IndexedSlices(tf.constant([[1.0], [2.0]]), [0, 0], tf.constant([1, 1]))
    sums = []
    for optimizer in pair("Adagrad", initial_accumulator_value=0.0):
        variable = tf.Variable([[1.0]])
        optimizer.apply([rows], [variable])
        sums.append(optimizer.variables[2].numpy().item())
    assert sums == [1.0**2 + 2.0**2, (1.0 + 2.0) ** 2]


@pytest.mark.parametrize("label", EACH)
def test_variables_without_gradient_stay(label):
    results = []
    for optimizer in case(label):
        variables = raw_variables("float32")
        with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['w1:0'\]"):
            optimizer.apply([tf.ones((3, 4)), None, tf.ones(())], variables)
        results.append(variables)
        with pytest.raises(ValueError, match="No gradients provided for any variable"):
            optimizer.apply([None] * 3, variables)
        assert int(optimizer.iterations) == 1
    native, ours = results
    assert_agree(ours[1].numpy(), raw_variables("float32")[1].numpy(), "same")
    assert_variables(ours, native, "float32")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", EACH)
def test_constraints_hold(label):
    results = []
    for optimizer in case(label, learning_rate=0.5):
        variable = keras.Variable(np.ones(6))
        variable.constraint = keras.constraints.NonNeg()
        apply_steps(optimizer, [variable])
        results.append(variable)
    assert_variables(results[1:], results[:1], "float64", [np.ones(6)])
    assert results[1].numpy().min() >= 0


def test_dense_5x5_with_momentum_as_in_the_issue():
    """Two bias-free Dense(5), momentum 0.9, lr 0.01, 100 steps of train_on_batch."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 100, 16, 5)).astype("float32")
    losses = []
    for module in (keras.optimizers, portopt_tf):
        keras.utils.set_random_seed(3)
        layers = [keras.layers.Dense(5, use_bias=False) for _ in range(2)]
        model = keras.Sequential([keras.layers.Input((5,)), *layers])
        model.compile(module.SGD(learning_rate=0.01, momentum=0.9), "mse")
        losses.append([])
        for step in range(100):
            loss = model.train_on_batch(x[step], y[step])
            losses[-1].append(float(loss))
    assert losses[0][-1] < losses[0][0]
    assert np.max(np.abs(np.subtract(*losses))) <= 1e-6


def rosenbrock(optimizer, steps):
    point = tf.Variable([-1.0, 2.0], dtype="float64")
    path = []
    for _ in range(steps):
        with tf.GradientTape() as tape:
            x, y = point[0], point[1]
            loss = (1 - x) ** 2 + 100 * (y - x**2) ** 2
        optimizer.apply_gradients([(tape.gradient(loss, point), point)])
        path.append(point.numpy())
    return np.ravel(path)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", ("sgd", "momentum", "rmsprop", "adam"))
def test_rosenbrock_from_minus_1_2(label):
    rate = 1e-4 if label in ("sgd", "momentum") else 1e-2
    native, ours = (rosenbrock(o, 50) for o in case(label, learning_rate=rate))
    assert_agree(ours, native, "float64", start=np.tile([-1.0, 2.0], 50))


def teaching_momentum(state, g, t):
    a = state["a"] = 0.9 * state.get("a", 0) + 0.1 * g
    return 1e-4 * a


def teaching_rmsprop(state, g, t):
    v = state["v"] = 0.9 * state.get("v", 0) + 0.1 * g**2
    return 1e-2 * g / np.sqrt(v + 1e-6)


def teaching_adam(state, g, t):
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    return 1e-2 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t) + 1e-6)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        (rules.Momentum(lr=1e-4, buffer="average"), teaching_momentum),
        (rules.RMSprop(lr=1e-2, alpha=0.9, eps=1e-6, eps_form="inside"), teaching_rmsprop),
        (rules.Adam(lr=1e-2, eps=1e-6, eps_form="inside"), teaching_adam),
    ],
    ids=("momentum", "rmsprop", "adam"),
)
def test_teaching_forms_on_rosenbrock(rule, formula):
    actual = rosenbrock(portopt_tf.from_rule(rule)(), 50)
    point, state, expected = np.array([-1.0, 2.0]), {}, []
    for t in range(1, 51):
        x, y = point
        inner = y - x**2
        grad = np.array([-2 * (1 - x) - 400 * x * inner, 200 * inner])
        point = point - formula(state, grad, t)
        expected.append(point)
    assert_agree(actual, np.ravel(expected), "float64", start=np.tile([-1.0, 2.0], 50))
