"""A child process: `portopt_tf.shard_slots` on JAX, with two devices that are simulated."""

import keras
import numpy as np
import pytest
from keras_runs import fit, small_model

import portopt_tf


def trained(*, sharded):
    keras.utils.set_random_seed(0)
    model = small_model()
    optimizer = portopt_tf.Adam(0.01)
    optimizer.build(model.trainable_variables)
    if sharded:
        portopt_tf.shard_slots(optimizer)
    return fit(optimizer, model=model)


def sizes(variable):
    """How many elements each device has."""
    return [part.data.size for part in variable.value.addressable_shards]


optimizer = portopt_tf.Adam()
with pytest.raises(RuntimeError, match="under None"):
    portopt_tf.shard_slots(optimizer)
keras.distribution.set_distribution(keras.distribution.DataParallel())
with pytest.raises(ValueError, match="must be built"):
    portopt_tf.shard_slots(optimizer)
whole, divided = (trained(sharded=sharded) for sharded in (False, True))
for one, other in zip(whole.weights, divided.weights, strict=True):
    np.testing.assert_array_equal(one, other)
for model, devices in ((whole, 1), (divided, 2)):
    for weight in model.weights:
        assert sizes(weight) == [np.prod(weight.shape)] * 2
    _, _, *slots = model.optimizer.variables  # after the step count and the learning rate
    for slot in slots:
        assert sizes(slot) == [np.prod(slot.shape) // devices] * 2
print("agreed")
