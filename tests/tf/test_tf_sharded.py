"""`portopt_tf.Sharded`: as the unsharded optimizer, under `tf.distribute`'s strategies."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from keras_runs import run_child

import portopt_tf
from portopt import rules

CHILD = Path(__file__).with_name("sharded_replicas.py")


@pytest.mark.slow
def test_two_devices_have_the_bits_of_one_and_half_of_the_slots_each():
    assert run_child(CHILD, "devices") == "agreed\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_workers_have_the_bits_of_one_and_half_of_the_slots_each():
    with ExitStack() as stack:  # two ports that are free at the same time
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        workers = [f"127.0.0.1:{own.getsockname()[1]}" for own in sockets]

    def run(index):
        task = {"type": "worker", "index": index}
        config = json.dumps({"cluster": {"worker": workers}, "task": task})
        return run_child(CHILD, "worker", TF_CONFIG=config)

    with ThreadPoolExecutor() as pool:
        assert [*pool.map(run, range(2))] == ["agreed\n"] * 2


@pytest.mark.slow
def test_keras_on_jax_divides_slots_and_trains_to_the_same_bits():
    pytest.importorskip("jax", reason="JAX is not installed")
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert run_child(CHILD.with_name("sharded_jax.py"), KERAS_BACKEND="jax", **two) == "agreed\n"


def test_slots_are_not_laid_out_on_tensorflow():
    with pytest.raises(RuntimeError, match="not on tensorflow"):
        portopt_tf.shard_slots(portopt_tf.Adam())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (rules.Lamb(), "each element by itself, Lamb looks at whole"),
        (rules.Muon(lr=0.1), "each element by itself, Muon looks at whole"),
        (rules.ScheduleFreeSGD(lr=0.1), "one set of weights, ScheduleFreeSGD evaluates"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_rules_that_cannot_be_cut_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        portopt_tf.Sharded(rule, [tf.Variable([1.0, 2.0])])


def test_variables_that_cannot_be_sharded_are_refused():
    variable, rule = tf.Variable([1.0, 2.0]), rules.SGD()
    with pytest.raises(TypeError, match=r"rule must be a portopt\.Rule"):
        portopt_tf.Sharded("adam", [variable])
    with pytest.raises(ValueError, match="at least one variable"):
        portopt_tf.Sharded(rule, [])
    with pytest.raises(ValueError, match="there twice"):
        portopt_tf.Sharded(rule, [variable, variable])
    with pytest.raises(TypeError, match="has int32"):
        portopt_tf.Sharded(rule, [tf.Variable([1, 2])])
    one = tf.distribute.OneDeviceStrategy("CPU:0")
    with one.scope(), pytest.raises(ValueError, match="in the scope of this strategy"):
        portopt_tf.Sharded(rule, [variable])


def test_gradients_are_checked_before_anything_changes():
    variable = tf.Variable([1.0, 2.0], name="w")
    optimizer = portopt_tf.Sharded(rules.Adam(), [variable])
    for grads, message in [
        ([], "one for each of 1 variables, got 0"),
        ([None], "'w:0' must have a gradient"),
        ([tf.constant([1.0])], "the variable's shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.apply(grads)
    one = tf.distribute.OneDeviceStrategy("CPU:0")
    with pytest.raises(RuntimeError, match=r"in strategy\.run of its own strategy"):
        one.run(optimizer.apply, ([tf.constant([1.0, 1.0])],))
    assert optimizer.state()["step"] == 0 and variable.numpy().tolist() == [1.0, 2.0]


def test_a_state_of_another_rule_or_other_shapes_is_refused():
    optimizer = portopt_tf.Sharded(rules.Momentum(), [tf.Variable([1.0, 2.0])])
    with pytest.raises(ValueError, match="must have step, momentum_buffer, has step"):
        optimizer.load({"step": 1})
    with pytest.raises(ValueError, match=r"\['momentum_buffer'\] must have shapes \[\(2,\)\]"):
        optimizer.load({"step": 1, "momentum_buffer": [np.zeros(3)]})
    for step, buffer in (("x", [1, 1]), ([1, 2], [1, 1]), (None, [1, 1]), (1, ["x", "y"])):
        with pytest.raises(ValueError, match="state must have numbers"):
            optimizer.load({"step": step, "momentum_buffer": [np.array(buffer)]})
    state = optimizer.state()
    assert state["step"] == 0 and not state["momentum_buffer"][0].any()


def test_the_learning_rate_can_be_changed_and_rows_of_a_table_are_summed():
    table = tf.Variable(tf.zeros((3, 2)))
    optimizer = portopt_tf.Sharded(rules.SGD(lr=1.0), [table])
    apply = tf.function(optimizer.apply)
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]), tf.constant([3, 2]))
    apply([rows])
    optimizer.learning_rate.assign(0.5)
    apply([rows])
    assert table.numpy().tolist() == [[0.0, 0.0], [-3.0, -3.0], [0.0, 0.0]]
