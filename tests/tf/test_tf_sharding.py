"""The core's sharded update on TensorFlow's variables, with simulated workers."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from bits import assert_bits
from support import gradients, weights

from portopt import Around
from portopt.rules import Adam, Momentum
from portopt.sharding import Sharded, VariableBuffers, simulate

SHAPES = {"w": (301, 300), "b": (37,), "scale": ()}
GRADS = [
    dict(zip(SHAPES, step, strict=True))
    for step in zip(*(gradients(shape, 8, 9) for shape in SHAPES.values()), strict=True)
]
AROUND = Around(clip_norm=0.5, skip_nonfinite=True, ema_decay=0.75)
BUFFERS = VariableBuffers(keras.ops)


def train(rule, workers, dtype="float32", **options):
    """Every worker's parameters, from the same gradients on all of them."""

    def work(collectives):
        params = {k: tf.Variable(tf.cast(weights(shape), dtype)) for k, shape in SHAPES.items()}
        optimizer = Sharded(rule, params, collectives, around=AROUND, buffers=BUFFERS, **options)
        for grads in GRADS:
            optimizer.step({k: tf.cast(grad, dtype) for k, grad in grads.items()})
        return {k: param.numpy() for k, param in params.items()}, optimizer

    return simulate(workers, work, BUFFERS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "rule", [Momentum(lr=0.1), Adam(lr=0.1)], ids=lambda rule: type(rule).__name__
)
def test_any_number_of_workers_has_the_same_bits(rule, dtype):
    ((expected, _),) = train(rule, 1, dtype, average=False)
    assert any(np.ptp(value.astype(np.float64)) for value in expected.values())
    for workers in (2, 3):
        for params, _ in train(rule, workers, dtype, average=False):
            for name, value in expected.items():
                assert_bits(params[name], value, f"{name}, {workers} workers")


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_averaged(stage):
    """The same on all, so that the mean of two is the same bits."""
    ((expected, _),) = train(Momentum(lr=0.1), 1, average=False)
    for params, optimizer in train(Momentum(lr=0.1), 2, stage=stage):
        for name, value in expected.items():
            assert_bits(params[name], value, name)
        size = sum(int(tf.size(state["momentum_buffer"])) for state in optimizer.state.values())
        assert size == pytest.approx(sum(value.size for value in expected.values()) / 2, abs=16)


def test_gradients_that_cannot_be_zeroed_are_refused():
    def work(collectives):
        param = tf.Variable([1.0, 2.0])
        around = Around(zero_grad=True)
        optimizer = Sharded(Momentum(), [param], collectives, around=around, buffers=BUFFERS)
        with pytest.raises(ValueError, match=r"grads\[0\] must be writable for zero_grad"):
            optimizer.step([tf.constant([1.0, 1.0])])
        return param.numpy()

    assert_bits(simulate(1, work, BUFFERS)[0], np.array([1.0, 2.0], np.float32))
