"""A child process: `portopt_tf.Sharded`, on logical devices or as one of two workers, by argument.

It says "agreed" if the variables have the bits of the unsharded optimizer's on the same averaged
gradients.
"""

import sys
from functools import cache

import numpy as np
import tensorflow as tf
from bits import assert_bits
from support import gradients, weights

import portopt_tf
from portopt import rules

SHAPES = {"table": (301, 30), "bias": (37,), "scale": (), "half": (50,)}
SIZES = {"float32": 301 * 30 + 37 + 1, "float16": 50}
STEPS = 10
RULES = (
    rules.Adam(lr=0.125, amsgrad=True, weight_decay=0.25),
    rules.NAdam(lr=0.125),  # which keeps a number
)


def dtype_of(name):
    return "float16" if name == "half" else "float32"


def variables():
    return [tf.Variable(tf.cast(weights(SHAPES[name]), dtype_of(name))) for name in SHAPES]


@cache
def batches():
    """For each step the gradients of two; none subnormal, which TensorFlow takes for zeros."""

    def stream(seed):
        for grads in zip(*(gradients(x, STEPS, seed) for x in SHAPES.values()), strict=True):
            usual = [np.where(np.abs(g) < np.finfo("float32").tiny, 0, g) for g in grads]
            yield [tf.cast(g, dtype_of(name)) for name, g in zip(SHAPES, usual, strict=True)]

    return [*zip(stream(10), stream(11), strict=True)]


@cache
def unsharded(rule):
    """The variables before the first step of the rule's own optimizer, and after each."""
    made = variables()
    optimizer = portopt_tf.from_rule(rule)()
    optimizer.build(made)
    found = [[variable.numpy() for variable in made]]
    for pair in batches():
        optimizer.apply([(a + b) / 2 for a, b in zip(*pair, strict=True)], made)
        found.append([variable.numpy() for variable in made])
    return found


def check(strategy, rule, begin, end, state=None, eager=False):
    """Steps of a sharded optimizer, which goes on from a state; returns its own."""
    replicas = strategy.num_replicas_in_sync
    expected = unsharded(rule)
    with strategy.scope():
        made = variables()
        optimizer = portopt_tf.Sharded(rule, made)
    if state:
        optimizer.load(state)
    for variable, value in zip(made, expected[begin], strict=True):
        variable.assign(value)

    def replica(first, second):
        """The first two have all gradients, so that another number has the same average."""
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        own = (rank == 0, rank == min(1, replicas - 1))
        first, second = (
            [tf.where(mine, grad * (replicas / 2), 0) for grad in grads]
            for mine, grads in zip(own, (first, second), strict=True)
        )
        optimizer.apply([a + b for a, b in zip(first, second, strict=True)])

    def step(*grads):
        strategy.run(replica, grads)

    step = step if eager else tf.function(step)
    for number in range(begin, end):
        step(*batches()[number])
        for name, variable, value in zip(SHAPES, made, expected[number + 1], strict=True):
            for copy in strategy.experimental_local_results(variable):
                assert_bits(copy.numpy(), value, f"{rule}: {name}")
    for line in optimizer._lines:
        for own in line.slots.values():
            for shard in strategy.experimental_local_results(own):
                assert 0 <= shard.shape[0] - SIZES[own.dtype.name] / replicas <= 16
    return optimizer.state()


def on_devices():
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    two = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    # Groups that share a device cannot both have collectives: TensorFlow would stop.
    own = tf.distribute.ReductionToOneDevice()
    four = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(4)], cross_device_ops=own)
    check(two, RULES[0], 0, 2, eager=True)
    for rule in RULES:
        state = check(two, rule, 0, 4)
        state = check(four, rule, 4, 7, state)
        check(tf.distribute.get_strategy(), rule, 7, STEPS, state)


def on_worker():
    strategy = tf.distribute.MultiWorkerMirroredStrategy()  # TF_CONFIG says which one
    assert strategy.num_replicas_in_sync == 2
    rule = RULES[1]
    check(strategy, rule, 5, STEPS, check(strategy, rule, 0, 5))


{"devices": on_devices, "worker": on_worker}[sys.argv[1]]()
print("agreed")
