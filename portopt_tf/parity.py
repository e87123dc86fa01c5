"""The part of ``portopt parity`` that runs in Keras: ``python -m portopt_tf.parity SPEC``."""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import keras
import numpy as np

import portopt_tf
from portopt.parity import Arrays, Case, Twin, answer, problem
from portopt.rules import Rule


def run(optimizer: Any, dtype: str, shape: tuple[int, ...], slots: Any = None) -> Arrays:
    """The parameters and slots after `portopt.parity.problem`.

    Args:
        optimizer: Any Keras optimizer, not built yet.
        dtype: The variables' dtype.
        shape: Their shape.
        slots: One of ours, whose slots stand in the same order; the optimizer itself by default.
    """
    start, grads = problem(dtype, shape)
    variables = {name: keras.Variable(array, dtype=dtype) for name, array in start.items()}
    optimizer.build(list(variables.values()))
    if slots is None:
        slots = optimizer
    else:
        slots.build(list(variables.values()))
    for grad in grads:
        optimizer.apply([keras.ops.convert_to_tensor(grad[name]) for name in variables])
    dtypes = {keras.backend.standardize_dtype(v.dtype) for v in optimizer.variables[2:]}
    if dtypes - {dtype}:
        raise TypeError(f"Keras on {keras.backend.backend()} did not compute in {dtype}")
    results = dict(variables)
    rule_class, values = slots.rule_of()
    for slot in rule_class.unchecked(**values).slot_shapes(shape):
        for name, variable in zip(variables, slots._slots[slot], strict=True):
            place = [id(v) for v in slots.variables].index(id(variable))
            results[f"{slot} of {name}"] = optimizer.variables[place]
    return {name: keras.ops.convert_to_numpy(value) for name, value in results.items()}


def native(twin: Twin, dtype: str, shape: tuple[int, ...]) -> Arrays:
    """A run of the native optimizer."""
    name, arguments = twin
    native_class = getattr(keras.optimizers, name)
    if dtype == "float64":
        # A Python float would pass through float32 on its way to TensorFlow's float64.
        defaults = {k: p.default for k, p in inspect.signature(native_class).parameters.items()}
        arguments = {
            k: np.float64(v)
            for k, v in {**defaults, **arguments}.items()
            if isinstance(v, float) and k != "ema_momentum"
        } | {k: v for k, v in arguments.items() if not isinstance(v, float)}
    keras.config.set_floatx(dtype)
    try:
        same = getattr(portopt_tf, name)(**twin[1])
        return run(native_class(**arguments), dtype, shape, slots=same)
    finally:
        keras.config.set_floatx("float32")


def ours(rule: Rule) -> Arrays:
    """A run of the rule."""
    return run(portopt_tf.from_rule(rule)(), "float32", Case(rule).shape)


if __name__ == "__main__":
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)  # or the reference would be float32
    answer("keras", native, ours, json.loads(sys.argv[1])["path"])
