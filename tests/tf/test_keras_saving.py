"""Configurations, model files and checkpoints: training goes on as if it had never stopped."""

import copy
import json
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import (
    CASES,
    EACH,
    NAMES,
    apply_steps,
    assert_variables,
    case,
    data,
    fit,
    raw_variables,
    run_child,
    small_model,
)

import portopt_tf
from portopt import rules

decay = keras.optimizers.schedules.ExponentialDecay(0.1, 4, 0.5)
TorchAdam = portopt_tf.from_rule(rules.Adam(eps=1e-6, amsgrad=True))
Average = portopt_tf.from_rule(rules.Momentum(buffer="average"))
MAKERS = {
    "schedule": lambda: portopt_tf.RMSprop(decay, momentum=0.9, centered=True),
    "ema": lambda: portopt_tf.Adam(0.1, use_ema=True, gradient_accumulation_steps=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(portopt_tf.SGD(0.1, 0.9)),
    "rule": lambda: TorchAdam(0.1, weight_decay=0.1, maximize=True),
    "rule_schedule": lambda: Average(decay, momentum=0.5),
    **{label: lambda label=label: case(label)[1] for label in EACH},
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
    text = json.dumps(keras.optimizers.serialize(optimizer))
    for again in (
        type(optimizer).from_config(optimizer.get_config()),
        keras.optimizers.deserialize(json.loads(text)),
        keras.optimizers.get(json.loads(text)),
        pickle.loads(pickle.dumps(optimizer)),
        copy.deepcopy(optimizer),
    ):
        assert_same_kind(again, optimizer)
    assert keras.optimizers.get(optimizer) is optimizer
    assert pickle.loads(pickle.dumps(type(optimizer))) is type(optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_got_by_name(name):
    """Where Keras takes a name, ours has the one under which it is registered."""
    assert type(keras.optimizers.get(f"portopt>{name}")) is getattr(portopt_tf, name)


@pytest.mark.parametrize("maker", ("amsgrad", "rule"))
def test_a_copied_model_goes_on(maker):
    """By pickle or deepcopy; of an optimizer alone Keras copies no state."""
    model = fit(MAKERS[maker](), 1, batches=1, run_eagerly=True)
    copies = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    fit_on = [fit(m.optimizer, 1, m, batches=1, run_eagerly=True) for m in (model, *copies)]
    for again in fit_on[1:]:
        assert_same_kind(again.optimizer, model.optimizer)
        assert_variables(again.weights, model.weights, "same")
        assert_variables(again.optimizer.variables, model.optimizer.variables, "same")


def test_configuration_has_the_natives_keys_and_plain_values():
    for label in CASES:
        native, ours = case(label)
        assert ours.get_config() == {**native.get_config(), "name": ours.name}
    single = portopt_tf.RMSprop(momentum=np.float32(0), rho=np.float32(0.5), epsilon=1)
    values = [type(v) for v in (single.momentum, single.rho, single.epsilon)]
    assert values == [float] * 3
    apply_steps(single, raw_variables("float32"))


@pytest.mark.parametrize("maker", ("centered", "schedule", "ema", "scaled", "rule"))
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


def test_a_process_that_only_imports_ours_loads_a_model(tmp_path):
    x, y = data()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    makers = {label: MAKERS[label] for label in EACH}
    makers["without native"] = lambda: portopt_tf.RAdam(0.1)
    models = {maker: fit(makers[maker](), 1, batches=1, run_eagerly=True) for maker in makers}
    for maker, model in models.items():
        model.save(tmp_path / f"{maker}.keras")
    run_child("tests/tf/reloading.py", tmp_path)
    for maker, model in models.items():
        model.train_on_batch(x, y)
        again = keras.models.load_model(tmp_path / f"{maker}.keras")
        assert_same_kind(again.optimizer, model.optimizer)
        assert_variables(again.weights, model.weights, "same")
        assert_variables(again.optimizer.variables, model.optimizer.variables, "same")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", EACH)
def test_weight_files_move_between_native_and_ours(label, tmp_path):
    native, ours = case(label, learning_rate=0.25)
    back, _ = case(label)
    first = fit(native, 1, batches=1, run_eagerly=True)
    models = [first, small_model(), small_model()]
    for source, target, optimizer in zip(models, models[1:], (ours, back), strict=False):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.weights.h5"
        source.save_weights(path)
        target.compile(optimizer, "mse")
        optimizer.build(target.trainable_variables)
        target.load_weights(path)
        assert_variables(target.weights, first.weights, "same")
        assert_variables(optimizer.variables, native.variables, "same")
    assert int(back.iterations) == 1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", ("nesterov", "amsgrad", "nadam"))
def test_backup_and_restore_after_an_interruption(label, tmp_path):
    """The interrupted run ends where the native's ends that was not."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    def ours():
        return case(label, learning_rate=0.25)[1]

    options = {"batches": 1, "run_eagerly": True}
    with pytest.raises(KeyboardInterrupt):
        fit(ours(), callbacks=[backup(), Interrupt()], **options)
    restored = fit(ours(), callbacks=[backup()], **options)
    assert restored.history.epoch == [2]
    native, _ = case(label, learning_rate=0.25)
    straight = fit(native, **options)
    assert_variables(restored.weights, straight.weights, "float64")
    assert_variables(restored.optimizer.variables, native.variables, "float64")


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
