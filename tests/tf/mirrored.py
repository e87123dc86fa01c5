"""A child process: `MirroredStrategy` on two logical CPU devices, native and ours."""

import keras
import numpy as np
import tensorflow as tf
from keras_runs import assert_variables, case, exact_cast, fit, small_model

import portopt_tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
keras.src.ops.cast = exact_cast
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")


def loop(optimizer, function=False):
    """A user's own loop, eagerly or inside a function."""
    variable = tf.Variable(np.ones(3))
    optimizer.build([variable])

    def replica(scale):
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        optimizer.apply([variable * scale * tf.cast(rank + 1, "float64")], [variable])

    def run():
        strategy.run(replica, args=(0.5,))

    run = tf.function(run) if function else run
    run()
    run()
    return optimizer, variable


results = []
for index in range(2):
    with strategy.scope():
        model = fit(case("amsgrad")[index], epochs=2, model=small_model(), jit_compile=False)
        assert len(model.weights[0].value.values) == 2
        loops = [loop(case("centered")[index], function=True)]
        loops += [loop(case(label)[index]) for label in ("amsgrad", "nadam", "lamb")]
    results.append(model.weights)
    for optimizer, looped in loops:
        optimizer.apply([tf.ones(3, "float64")], [looped])  # outside the strategy's scope
        results[-1] += looped.values
assert_variables(results[1], results[0], "float64")


def refuses(optimizer):
    """Whether a variable from outside the strategy, one for both replicas, is left alone."""
    outside = tf.Variable(np.ones(3))
    optimizer.build([outside])
    try:
        strategy.run(lambda: optimizer.apply([tf.ones(3, "float64")], [outside]))
    except AssertionError:  # TensorFlow's
        return bool((outside.numpy() == 1).all() and optimizer.iterations.numpy() == 0)
    return False


assert [refuses(optimizer) for optimizer in case("centered")] == [True, True]

with strategy.scope():  # built in a replica: each has its slots' values
    weight, free = tf.Variable(np.ones(3)), portopt_tf.ScheduleFreeSGD(0.125)
for _ in range(2):
    strategy.run(lambda: free.apply([weight * 1.0], [weight]))
assert np.array_equal(*(value.numpy() for value in weight.values))
print("agreed")
