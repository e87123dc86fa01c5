"""Signatures, defaults, variables and state: as the native optimizers have them."""

import inspect
import re

import keras
import pytest
from keras_runs import CASES, apply_steps, assert_variables, case, raw_variables

import portopt_tf

NAMES = ("SGD", "RMSprop", "Adam", "AdamW")
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
    ours, native = (
        inspect.signature(getattr(module, name)).parameters
        for module in (portopt_tf, keras.optimizers)
    )
    named = [key for key, p in ours.items() if p.kind is not p.VAR_KEYWORD]
    assert named == list(native)[: len(named)]
    assert {k: ours[k].default for k in named} == {k: native[k].default for k in named}
    assert set(native) - set(named) - {"kwargs"} in ({*SHARED} - {"weight_decay"}, set())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", SHARED)
def test_every_shared_keyword_is_kept(name, key):
    ours, native = (
        getattr(module, name)(**{key: SHARED[key]}) for module in (portopt_tf, keras.optimizers)
    )
    assert getattr(ours, key) == SHARED[key]
    expected = native.get_config()
    assert {k: v for k, v in ours.get_config().items() if k != "name"} == {
        k: v for k, v in expected.items() if k != "name"
    }


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
        names = [re.sub(r"variable(_\d+)?_", "variable_", v.path) for v in optimizer.variables]
        return [
            (name.split("/", 1)[1], tuple(v.shape), v.dtype)
            for name, v in zip(names, optimizer.variables, strict=True)
        ]

    native, ours = case(label, **extra)
    assert layout(ours) == layout(native)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", CASES)
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


def test_built_late_and_once():
    optimizer = portopt_tf.Adam()
    assert not optimizer.built and len(optimizer.variables) == 2
    first, second = raw_variables("float32"), raw_variables("float32")
    apply_steps(optimizer, first, 1)
    made = optimizer.variables
    optimizer.build(second)
    assert [id(v) for v in optimizer.variables] == [id(v) for v in made]
    for native in (keras.optimizers.Adam(), optimizer):
        native.build(first)
        with pytest.raises(ValueError, match=r"Unknown variable: <tf\.Variable"):
            native.apply(first, second)


def test_iterations_count_the_applies():
    for optimizer in case("adam", gradient_accumulation_steps=2):
        variables = raw_variables("float32")
        apply_steps(optimizer, variables, 5)
        assert int(optimizer.iterations) == 2
        pairs = zip(variables, variables, strict=True)
        assert int(optimizer.apply_gradients(pairs)) == 6
