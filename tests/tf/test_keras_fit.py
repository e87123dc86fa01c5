"""compile and fit, tapes, functions, loss scaling, mixed precision, callbacks, two devices."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_runs import (
    EACH,
    assert_variables,
    case,
    data,
    fit,
    run_child,
    small_model,
)

COMPILE = {
    "function": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}
EAGER = COMPILE["eager"]  # the quickest for a few steps: nothing is traced


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("label", "how"),
    [
        ("nesterov", "function"),
        ("centered", "function"),
        ("amsgrad", "function"),
        ("amsgrad", "xla"),
        ("momentum", "eager"),
        ("adamw", "eager"),
    ],
)
def test_fit_gives_the_natives_weights(label, how):
    start = small_model().weights
    native, ours = (fit(o, epochs=2, **COMPILE[how]) for o in case(label))
    assert_variables(ours.weights, native.weights, "float64", start)


def test_eager_and_function_agree_in_float32():
    start = small_model().weights
    function, eager = (
        fit(case("amsgrad")[1], epochs=2, **COMPILE[how]) for how in ("function", "eager")
    )
    assert_variables(function.weights, eager.weights, "float32", start)


def clip_by_sign(x):  # a user's function, which autograph converts
    if tf.reduce_sum(x) > 0:
        x = x * 0.5
    return x


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("method", ("apply", "apply_gradients"))
@pytest.mark.parametrize("label", ("nesterov", "amsgrad"))
def test_inside_a_users_tf_function(label, method):
    x = tf.constant(data()[0])
    results = []
    for optimizer in case(label):
        variable = tf.Variable(np.ones((4, 2)))

        @tf.function
        def step(n, optimizer=optimizer, variable=variable):
            for _ in tf.range(n):  # autograph makes a while loop of it
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((x @ variable) ** 2)
                grad = clip_by_sign(tape.gradient(loss, variable))
                if method == "apply":
                    optimizer.apply([grad], [variable])
                else:
                    optimizer.apply_gradients([(grad, variable)])

        optimizer.build([variable])
        step(tf.constant(3))
        step(tf.constant(2))
        assert int(optimizer.iterations) == 5
        results.append(variable)
    assert_variables(results[1:], results[:1], "float64", [np.ones((4, 2))])


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("eagerly", (True, False))
def test_embedding_with_repeated_rows_trains_as_a_dense_gradient(eagerly):
    tokens = np.array([[1, 3, 1], [3, 3, 0], [2, 1, 1]])

    def run(optimizer, as_matrix):
        keras.utils.set_random_seed(0)
        table = keras.layers.Embedding(5, 4)
        layers = keras.layers
        model = keras.Sequential([layers.Input((3,)), table, layers.Flatten(), layers.Dense(1)])
        if as_matrix:  # a product with one-hot rows has a dense gradient
            table.call = lambda x: (
                tf.one_hot(tf.cast(x, "int32"), 5, dtype="float64") @ (table.embeddings.value)
            )
        model.compile(optimizer, "mse", run_eagerly=eagerly)
        model.fit(tokens, np.ones(3), epochs=4, batch_size=3, verbose=0)
        return model.weights

    native, ours = case("adam")
    assert_variables(run(ours, False), run(native, True), "float64")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("label", "how"), [*((label, "eager") for label in EACH), ("amsgrad", "function")]
)
def test_loss_scale_optimizer_around_ours(label, how):
    """A batch with an Inf is skipped, and halves the scale."""
    results = []
    for optimizer in case(label):
        wrapped = keras.optimizers.LossScaleOptimizer(optimizer, 64.0, dynamic_growth_steps=2)
        model = small_model()
        model.compile(wrapped, "mse", **COMPILE[how])
        x, y = data()
        for bad in (False, False, True, False):
            model.train_on_batch(x, np.full_like(y, np.inf) if bad else y)
        assert int(optimizer.iterations) == 3
        # Around its own, Keras loses sight of Nadam's product, and of what Adafactor has idle.
        state = [v for v in wrapped.variables if v.name != "mu_product" and v.dtype != "int32"]
        results.append([*model.weights, *state])
    assert_variables(results[1], results[0], "float64")


@pytest.mark.usefixtures("double")
@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="Keras before 3.15 has none"
)
@pytest.mark.parametrize("label", EACH)
def test_multi_optimizer_around_ours(label):
    """Kernels have one optimizer and biases another."""
    results = []
    for kernels, biases in zip(case(label), case("momentum", learning_rate=0.25), strict=True):
        model = small_model()
        chosen = {v.path: kernels for v in model.weights if v.name == "kernel"}
        optimizers = keras.optimizers.OptimizerMap(biases, chosen)
        fit(keras.optimizers.MultiOptimizer(optimizers), 2, model, batches=1, **EAGER)
        assert [int(o.iterations) for o in (kernels, biases)] == [2, 2]
        results.append([*model.weights, *model.optimizer.variables])
    assert_variables(results[1], results[0], "float64")


@pytest.mark.parametrize(
    ("label", "policy", "how"),
    [
        *((label, "mixed_bfloat16", "eager") for label in EACH),
        ("amsgrad", "mixed_bfloat16", "function"),
        ("amsgrad", "mixed_float16", "function"),
    ],
)
def test_mixed_precision(label, policy, how):
    start = small_model(dtype=policy).weights
    runs = [fit(o, 1, small_model(dtype=policy), batches=1, **COMPILE[how]) for o in case(label)]
    scaled = isinstance(runs[1].optimizer, keras.optimizers.LossScaleOptimizer)
    inner = runs[1].optimizer.inner_optimizer if scaled else runs[1].optimizer
    assert {v.dtype for v in runs[1].weights} == {"float32"}
    assert type(inner).__module__.startswith("portopt_tf")
    native, ours = (run.weights for run in runs)
    assert_variables(ours, native, policy.removeprefix("mixed_"), start)


def callbacks(folder):
    """Each epoch's file has the averages; nothing gets so much better, so it stops after two."""
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=1e9, factor=0.5),
        keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        keras.callbacks.ModelCheckpoint(folder / "{epoch}.keras"),
        keras.callbacks.EarlyStopping("loss", 1e9, patience=1, restore_best_weights=True),
    ]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("label", EACH)
def test_callbacks(label, tmp_path):
    results = []
    for folder, optimizer in zip(
        (tmp_path / "native", tmp_path / "ours"),
        case(label, learning_rate=0.25, use_ema=True, ema_momentum=0.5),
        strict=True,
    ):
        folder.mkdir()
        model = fit(optimizer, 3, callbacks=callbacks(folder), batches=1, **EAGER)
        assert model.history.epoch == [0, 1]
        assert float(optimizer.learning_rate) == 0.25 / 2**3
        saved = [keras.models.load_model(path) for path in sorted(folder.iterdir())]
        assert [type(m.optimizer) for m in saved] == [type(optimizer)] * 2
        results.append([np.array(values) for values in model.history.history.values()])
        for each in (model, *saved):
            results[-1] += [*each.weights, *each.optimizer.variables]
    assert_variables(results[1], results[0], "float64")


@pytest.mark.usefixtures("double")
def test_constraints_in_a_model():
    positive = keras.constraints.NonNeg()
    native, ours = (
        fit(o, model=small_model(kernel_constraint=positive), **EAGER) for o in case("adam")
    )
    assert_variables(ours.weights, native.weights, "float64")
    assert min(w.numpy().min() for w in ours.weights if w.name == "kernel") == 0


@pytest.mark.slow
def test_mirrored_strategy_on_two_devices():
    out = run_child("tests/tf/mirrored.py")
    assert out.splitlines()[-1] == "agreed"
