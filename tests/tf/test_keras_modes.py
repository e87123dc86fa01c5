"""The schedule-free rules in Keras: the bits of NumPy in both modes, and what is refused."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import fit
from support import assert_agree, gradients, weights

import portopt_tf
from portopt import Optimizer, rules

# Keras holds the learning rate in float32.
OPTIONS = {"weight_decay": 0.125, "warmup_steps": 3.0}
NAMES = ("ScheduleFreeSGD", "ScheduleFreeAdamW")


@pytest.mark.parametrize("name", NAMES)
def test_both_modes_have_numpys_bits(name):
    variable, array = keras.Variable(weights(23)), weights(23)
    ours = getattr(portopt_tf, name)(learning_rate=0.125, **OPTIONS)
    plain = Optimizer(getattr(rules, name)(lr=0.125, **OPTIONS), [array])
    ours.eval()  # there is nothing yet
    for t, grad in enumerate(gradients(23, 8)):
        grad = np.where(abs(grad) < 1e-30, 0, grad).astype("float32")  # TensorFlow's subnormals
        ours.apply([keras.ops.convert_to_tensor(grad)], [variable])
        plain.step([grad])
        if t == 3:
            for optimizer in (ours, plain):
                optimizer.eval()
                optimizer.train()
        assert_agree(variable.numpy(), array, "same")
    for optimizer in (ours, plain):
        optimizer.eval()
    assert_agree(variable.numpy(), array, "same")
    with pytest.raises(RuntimeError, match=r"those of eval\(\): call train\(\) first"):
        ours.apply([keras.ops.ones(23)], [variable])


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_saved_in_its_mode(name, tmp_path):
    model = fit(getattr(portopt_tf, name)(learning_rate=0.125))
    trained = [w.numpy() for w in model.weights]
    model.optimizer.eval()
    assert any((w.numpy() != t).any() for w, t in zip(model.weights, trained, strict=True))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    again.optimizer.train()
    for weight, value in zip(again.weights, trained, strict=True):
        assert_agree(weight.numpy(), value, "float32")


def test_variables_that_take_their_gradient_have_no_modes():
    """As the scales of float8 do."""
    scale, weight = keras.Variable([1.0]), keras.Variable([1.0])
    scale.overwrite_with_gradient = True
    ours = portopt_tf.ScheduleFreeSGD(0.5)
    for grad in (1.0, 2.0):
        ours.apply([keras.ops.array([grad])] * 2, [scale, weight])
    trained = weight.numpy()
    ours.eval()
    assert scale.numpy() == 2.0 and weight.numpy() != trained
    ours.train()
    assert_agree(weight.numpy(), trained, "float32")


@pytest.mark.parametrize("jit_compile", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_goes_on_from_the_weights_to_train(name, jit_compile):
    """As it cannot be refused in evaluation mode."""
    results = []
    for forgets in (False, True):
        ours, variable = getattr(portopt_tf, name)(0.125), tf.Variable(weights(23))
        ours.build([variable])
        step = tf.function(
            lambda grad, ours=ours, variable=variable: ours.apply([grad], [variable]),
            jit_compile=jit_compile,
        )
        for t, grad in enumerate(gradients(23, 6)):
            if t == 3:
                ours.eval()
                if not forgets:
                    ours.train()
            step(tf.constant(grad))
        results += [variable.numpy()]
        ours.eval()  # which it is no longer in
        results += [variable.numpy()]
    assert (results[0] != results[1]).any()
    for actual, expected in zip(results[2:], results[:2], strict=True):
        assert_agree(actual, expected, "float32")
