"""What the Keras tests share: pairs of a native optimizer and ours, and small runs of both."""

import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import support
from support import assert_agree, gradients, weights

import portopt_tf
from portopt import parity
from portopt_tf.drop_in import CLASSES

CASES = {
    "sgd": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9}),
    "nesterov": ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "rmsprop": ("RMSprop", {}),
    "centered": ("RMSprop", {"centered": True, "momentum": 0.9, "rho": 0.95, "weight_decay": 0.1}),
    "adam": ("Adam", {}),
    "amsgrad": ("Adam", {"amsgrad": True, "beta_1": 0.8, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"epsilon": 1e-5}),
}
CASES |= {  # and every other native, as `portopt parity` calls it
    "-".join([name.lower(), *arguments]).replace("-learning_rate", "", 1): (name, arguments)
    for name, arguments in (case.keras for case in parity.CASES if case.keras)
    if name not in {name for name, _ in CASES.values()}
}
NAMES = (*CLASSES,)
EACH = tuple({name: label for label, (name, _) in CASES.items()}.values())  # one of each class
MODES = ("eager", "function", "xla")
RUNS = [  # each case eagerly; what differs between them, in the slower ways too
    *((label, "eager") for label in CASES),
    *((label, mode) for mode in MODES[1:] for label in ("centered", "amsgrad")),
]
SHAPES = ((3, 4), (5,), ())


def exact_cast(x, dtype):
    """``keras.ops.cast``, which would take a float by way of float32, for the natives' own 0.96."""
    return keras.ops.cast(np.float64(x) if isinstance(x, float) else x, dtype)


def twins(name, **kwargs):
    """The native optimizer and ours with the same arguments, exact also in float64.

    On TensorFlow and PyTorch, Keras casts a float by way of float32, but not a NumPy scalar.
    """
    kwargs = {"learning_rate": 0.01, **kwargs}
    cls = getattr(keras.optimizers, name)
    for key, parameter in inspect.signature(cls).parameters.items():
        if isinstance(parameter.default, float) and key != "ema_momentum":
            kwargs.setdefault(key, parameter.default)
    if keras.config.floatx() == "float64" and keras.backend.backend() != "jax":
        kwargs = {k: np.float64(v) if isinstance(v, float) else v for k, v in kwargs.items()}
    return cls(**kwargs), getattr(portopt_tf, name)(**kwargs)


def case(label, **kwargs):
    """The twins of an entry of `CASES`."""
    name, own = CASES[label]
    return twins(name, **{**own, "learning_rate": 0.01, **kwargs})


def raw_variables(dtype="float64"):
    import tensorflow as tf

    variables = [
        tf.Variable(weights(shape, seed), dtype=dtype, name=f"w{seed}")
        for seed, shape in enumerate(SHAPES)
    ]
    for variable in variables:
        variable.path = variable.name  # without which Keras's own Muon fails
    return variables


def apply_steps(optimizer, variables, steps=6, mode="eager", seed=0, change=None):
    """Apply seeded gradients; ``change(step)`` is called before each step.

    None is subnormal: TensorFlow takes such for zeros.
    """
    import tensorflow as tf

    optimizer.build(variables)

    def apply(grads):
        optimizer.apply(grads, variables)

    if mode != "eager":
        apply = tf.function(apply, jit_compile=mode == "xla")
    streams = [gradients(v.shape, steps, seed + i) for i, v in enumerate(variables)]
    for step, grads in enumerate(zip(*streams, strict=True)):
        if change is not None:
            change(step)
        pairs = zip(grads, variables, strict=True)
        grads = [(np.where(np.abs(g) < np.finfo("float32").tiny, 0, g), v) for g, v in pairs]
        apply([tf.constant(grad, variable.dtype) for grad, variable in grads])
    return variables


def train_in_two_threads(steps):
    """What two threads make at once, each of its own; beside what each makes alone."""

    def run(results, place):
        ours = portopt_tf.RMSprop(0.125, momentum=0.5 + place / 8)
        made = apply_steps(ours, raw_variables("float32"), steps=steps, seed=place)
        results[place] = [*arrays(made), *arrays(ours.variables)]

    together, alone = {}, {}
    threads = [threading.Thread(target=run, args=(together, place)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(2):
        run(alone, place)
    return [pair for place in range(2) for pair in zip(together[place], alone[place], strict=True)]


def small_model(**kwargs):
    layers = [
        keras.layers.Dense(
            size, kernel_initializer=keras.initializers.GlorotUniform(size), **kwargs
        )
        for size in (6, 2)
    ]
    tanh = keras.layers.Activation("tanh")
    return keras.Sequential([keras.layers.Input((4,)), layers[0], tanh, layers[1]])


def pair(class_name, *args, **kwargs):
    """The native and our class called with the same arguments."""
    return [getattr(each, class_name)(*args, **kwargs) for each in (keras.optimizers, portopt_tf)]


def data(rows=24):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((rows, 4))
    return x, np.stack([x.sum(1), x.prod(1)], 1)


def fit(optimizer, epochs=3, model=None, callbacks=(), batches=3, **compile_args):
    """Train the small model; returns it."""
    model = model or small_model()
    model.compile(optimizer, "mse", **compile_args)
    x, y = data()
    options = {"shuffle": False, "verbose": 0, "callbacks": [*callbacks]}
    model.fit(x, y, batch_size=len(x) // batches, epochs=epochs, **options)
    return model


def arrays(variables):
    values = (v.numpy() if hasattr(v, "numpy") else v for v in variables)
    return [np.asarray(value).astype(np.float64) for value in values]


def assert_variables(actual, expected, kind, start=None):
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    start = arrays(start) if start is not None else [None] * len(actual)
    for index, (a, e) in enumerate(zip(arrays(actual), arrays(expected), strict=True)):
        assert_agree(a, e, kind, start=start[index], what=f"variable {index}")


def run_child(*args, **environment):
    """Run a Python child on our packages; fails with its output unless it ends well."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, Path(support.__file__).parent, root / "tests/tf")))
    result = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:portopt_tf", *map(str, args)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
