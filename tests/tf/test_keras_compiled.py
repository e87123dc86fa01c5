"""Updates on TensorFlow run as few compiled calls where no kernel can, and give NumPy's bits."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import EACH, MODES, apply_steps, arrays, case, raw_variables, train_in_two_threads
from support import assert_agree, gradients, weights

import portopt_tf
from portopt import parity, rules
from portopt.trace import trace
from portopt_tf import compiled, launch, optimizer

CACHES = (compiled._step, compiled._stacked, compiled._on_variables)
LIMITS = {"stacked": compiled.SMALL, "alone": 0, "both": 5}
RULES = [
    *(c.rule for c in parity.CASES if trace(c.rule).elementwise),  # others are not compiled
    rules.RMSprop(centered=True, momentum=0.9, eps_form="inside", buffer="velocity"),
    rules.Adam(amsgrad=True, eps_form="hat", weight_decay=0.1, decoupled=True, maximize=True),
    rules.Momentum(dampening=0.5, weight_decay=0.1),
    rules.Momentum(nesterov=True, buffer="velocity"),
]


@pytest.fixture(autouse=True)
def no_launches(monkeypatch):
    """As on other devices than CPUs, where eager steps are compiled, too."""
    monkeypatch.setattr(launch.Plan, "run", lambda self, scalars, grads: False)


@pytest.fixture(params=LIMITS)
def limit(request, monkeypatch):
    """Where the border between small and large tensors is: the test's shapes on either side."""
    monkeypatch.setattr(compiled, "SMALL", LIMITS[request.param])
    return request.param


def traces():
    return sum(cached.cache_info().misses for cached in CACHES)


def normal(values):
    """Without subnormal numbers, which TensorFlow's threads take for zero."""
    return np.where(np.abs(values) < np.finfo("float32").tiny, 0, values)


def one_by_one(monkeypatch):
    """Let the optimizer update each variable by itself, operation by operation."""
    monkeypatch.setattr(optimizer, "_can_be_compiled", lambda variables: False)


@pytest.mark.parametrize(
    ("rule", "fused"), [*((rule, True) for rule in RULES), *((rule, False) for rule in RULES[-4:])]
)
def test_compiled_steps_have_numpys_bits(rule, fused):
    shape, program = (41, 25), trace(rule)
    dtypes = (tf.float32,) * len(program.operands)
    step = compiled._step(compiled._Kind(program, dtypes, fused))
    expected = {slot: np.full(shape, rule.initial(slot), "float32") for slot in program.slots}
    expected["param"] = weights(shape)
    actual = dict(expected)
    numbers = {number: rule.initial(number) for number in program.numbers}
    for t, grad in enumerate(gradients(shape, 20), 1):
        expected["grad"] = actual["grad"] = normal(grad)
        scalars = program.scalars(vars(rule) | numbers, t)
        numbers = program.kept(scalars)
        expected |= {k: normal(x) for k, x in program.run(np, scalars, expected).items()}
        values = [scalars[name] for name in program.scalar_names]
        vector = tf.constant([*values, 1.0], tf.float64)
        results = step(vector, *(tf.constant(actual[name]) for name in program.operands))
        written = [name for name, _ in program.outputs]
        actual |= {k: normal(x.numpy()) for k, x in zip(written, results, strict=True)}
    for name in program.operands:
        assert_agree(actual[name], expected[name], "same", what=name)


@pytest.mark.parametrize(
    ("label", "mode", "limit"),
    [
        *((label, "eager", "both") for label in EACH),
        *itertools.product(("centered", "amsgrad"), MODES[1:], LIMITS),
    ],
    indirect=["limit"],
)
def test_same_bits_as_one_by_one(label, mode, limit, monkeypatch):
    results = []
    for path in ("compiled", "one by one"):
        if path == "one by one":
            one_by_one(monkeypatch)
            mode = "eager"
        _, ours = case(label, learning_rate=0.25)
        made = apply_steps(ours, raw_variables("float32"), mode=mode)
        results.append([*arrays(made), *arrays(ours.variables)])
    for actual, expected in zip(*results, strict=True):
        assert_agree(normal(actual), normal(expected), "same")


@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float64"))
def test_same_bits_of_other_dtypes(dtype, limit, monkeypatch):
    results = []
    for path in ("compiled", "one by one"):
        if path == "one by one":
            one_by_one(monkeypatch)
        optimizer = portopt_tf.AdamW(0.125, amsgrad=True)
        half = [keras.Variable(v, dtype=dtype) for v in raw_variables("float32")]
        mixed = [*half, *raw_variables("float32")]
        optimizer.build(mixed)
        for grads in zip(*(gradients(v.shape, 4) for v in mixed), strict=True):
            optimizer.apply([tf.constant(normal(g)) for g in grads], mixed)  # float32 for all
        assert [str(v.dtype) for v in half] == [dtype] * 3
        results.append([*arrays(mixed), *arrays(optimizer.variables)])
    for actual, expected in zip(*results, strict=True):
        assert_agree(normal(actual), normal(expected), "same")


def test_nothing_is_traced_for_new_numbers(limit):
    rate = tf.Variable(0.5)
    for given in (0.5, lambda: rate, keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)):
        ours = portopt_tf.AdamW(given, weight_decay=0.25)
        variables = raw_variables("float32")
        ours.build(variables)
        grads = [tf.ones(v.shape) for v in variables]
        ours.apply(grads, variables)
        before, count = arrays(variables), traces()
        ours.apply(grads, variables)
        steps = [b - v for b, v in zip(before, arrays(variables), strict=True)]
        before = arrays(variables)
        rate.assign(0.125)
        if given == 0.5:
            ours.learning_rate = 0.125
        ours.weight_decay = 0.5
        ours.apply(grads, variables)
        assert traces() == count
        for step, b, v in zip(steps, before, arrays(variables), strict=True):
            assert (np.abs(b - v) < np.abs(step)).all()
        rate.assign(0.5)


def test_another_subset_of_gradients_is_traced_once(limit):
    ours = portopt_tf.Adam(0.5)
    variables = raw_variables("float32")
    grads = [tf.ones(v.shape) for v in variables]
    ours.apply(grads, variables)
    counts = []
    for _ in range(2):
        before, count = arrays(variables), traces()
        ours.apply(grads[:2], variables[:2])  # as with a frozen layer
        ours.apply(grads, variables)
        ours.apply(grads[1:], variables[1:])
        counts.append(traces() - count)
        assert int(ours.iterations) in (4, 7)
        assert all((a != b).all() for a, b in zip(arrays(variables), before, strict=True))
    assert counts[0] <= 4 and counts[1] == 0


@pytest.mark.parametrize("mode", MODES)
def test_shapes_known_only_when_it_runs_are_checked(mode):
    ours = portopt_tf.Adam()
    variable = tf.Variable(np.ones((3, 2), "float32"))
    ours.build([variable])
    apply = tf.function(
        lambda g: ours.apply([g], [variable]),
        input_signature=[tf.TensorSpec((None, None))],
        jit_compile=mode == "xla",
    )
    with pytest.raises(tf.errors.InvalidArgumentError):
        apply(tf.ones((2, 3)))
    assert (variable.numpy() == 1).all()
    apply(tf.ones((3, 2)))
    assert (variable.numpy() != 1).all()


def test_a_scalar_that_is_no_number_changes_nothing():
    ours = portopt_tf.from_rule(rules.Adam)(0.5, weight_decay=0.5, decoupled=True)
    variables = raw_variables("float32")
    ours.exclude_from_weight_decay(var_list=[variables[1]])
    ours.build(variables)
    ours.beta1 = 1.0  # 1 - beta1**t is 0
    with pytest.raises(ArithmeticError, match="Adam, step 1"):
        ours.apply([tf.ones(v.shape) for v in variables], variables)
    for variable, start in zip(variables, raw_variables("float32"), strict=True):
        assert_agree(variable.numpy(), start.numpy(), "same")


def test_two_threads_at_once(limit):
    for actual, expected in train_in_two_threads(steps=40):
        assert_agree(normal(actual), normal(expected), "same")


def test_overwritten_variables_take_their_gradient(limit):
    ours = portopt_tf.Adam(0.5, use_ema=True)
    scale, weight = keras.Variable([1.0, 2.0]), keras.Variable([1.0, 2.0])
    scale.overwrite_with_gradient = True
    ours.build([scale, weight])
    ours.apply([tf.constant([5.0, 6.0]), tf.constant([1.0, 1.0])], [scale, weight])
    assert scale.numpy().tolist() == [5.0, 6.0]
    assert_agree(weight.numpy(), [0.5, 1.5], "float32")


def test_a_variable_may_be_the_gradient(limit):
    ours = portopt_tf.SGD(0.5)
    variables = raw_variables("float32")
    ours.apply(variables, variables)
    for variable, start in zip(variables, raw_variables("float32"), strict=True):
        assert_agree(variable.numpy(), start.numpy() / 2, "same")
