"""Configurations, model files and checkpoints: training goes on as if it had never stopped."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import (
    CASES,
    apply_steps,
    assert_variables,
    case,
    data,
    fit,
    raw_variables,
)

import portopt_tf
from portopt import rules

decay = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
TorchAdam = portopt_tf.from_rule(rules.Adam(eps=1e-6, amsgrad=True))
Average = portopt_tf.from_rule(rules.Momentum(buffer="average"))
MAKERS = {
    "nesterov": lambda: case("nesterov")[1],
    "centered": lambda: case("centered")[1],
    "amsgrad": lambda: case("amsgrad")[1],
    "schedule": lambda: portopt_tf.RMSprop(decay, momentum=0.9, centered=True),
    "ema": lambda: portopt_tf.Adam(0.1, use_ema=True, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(portopt_tf.SGD(0.1, 0.9)),
    "rule": lambda: TorchAdam(0.1, weight_decay=0.1, maximize=True),
    "rule_schedule": lambda: Average(decay, momentum=0.5),
}


def assert_same_kind(optimizer, other):
    """Of one class, or, by `from_rule`, of one rule: presets show in the configuration."""
    kinds = [(type(o).__mro__[1], getattr(o, "rule_class", None)) for o in (optimizer, other)]
    assert kinds[0] == kinds[1]
    assert optimizer.get_config() == other.get_config()
    meant = [getattr(o, "inner_optimizer", o).rule_of() for o in (optimizer, other)]
    assert meant[0] == meant[1]


@pytest.mark.parametrize("maker", MAKERS)
def test_configuration_round_trip(maker):
    optimizer = MAKERS[maker]()
    for copy in (
        type(optimizer).from_config(optimizer.get_config()),
        keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer)))),
    ):
        assert_same_kind(copy, optimizer)


def test_configuration_has_the_natives_keys_and_plain_values():
    for label in CASES:
        native, ours = case(label)
        assert ours.get_config() == {**native.get_config(), "name": ours.name}
    single = portopt_tf.RMSprop(momentum=np.float32(0), rho=np.float32(0.5), epsilon=1)
    values = [type(v) for v in (single.momentum, single.rho, single.epsilon)]
    assert values == [float] * 3
    apply_steps(single, raw_variables("float32"))


@pytest.mark.parametrize("maker", MAKERS)
def test_saved_model_goes_on_bit_for_bit(maker, tmp_path):
    model = fit(MAKERS[maker](), epochs=2, run_eagerly=True)
    model.save(tmp_path / "model.keras")
    x, y = data()
    again = keras.models.load_model(tmp_path / "model.keras")
    assert_same_kind(again.optimizer, model.optimizer)
    for each in (model, again):
        each.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert_variables(again.weights, model.weights, "same")
    assert_variables(again.optimizer.variables, model.optimizer.variables, "same")


def test_backup_and_restore_after_an_interruption(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    with pytest.raises(KeyboardInterrupt):
        fit(portopt_tf.Adam(0.1), epochs=4, callbacks=[backup(), Interrupt()])
    restored = fit(portopt_tf.Adam(0.1), epochs=4, callbacks=[backup()])
    straight = fit(portopt_tf.Adam(0.1), epochs=4)
    assert_variables(restored.weights, straight.weights, "same")


@pytest.mark.parametrize("maker", ("nesterov", "centered", "amsgrad", "rule"))
def test_checkpoint_of_tensorflow(maker, tmp_path):
    variables, optimizer = raw_variables("float32"), MAKERS[maker]()
    apply_steps(optimizer, variables)
    path = tf.train.Checkpoint(variables=variables, optimizer=optimizer).save(tmp_path / "c")
    apply_steps(optimizer, variables, seed=9)
    later, other = raw_variables("float32"), MAKERS[maker]()
    other.build(later)
    status = tf.train.Checkpoint(variables=later, optimizer=other).restore(path)
    status.assert_consumed()
    apply_steps(other, later, seed=9)
    assert_variables(later, variables, "same")
    assert_variables(other.variables, optimizer.variables, "same")
