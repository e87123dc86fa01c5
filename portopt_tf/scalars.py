"""Numbers of a step in Keras: floats where they have a value, else tensors of float64."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from portopt.program import Program
from portopt.rules import Rule


def scalars_of(program: Program, rule: Rule, numbers: Mapping[str, Any], t: Any) -> dict[str, Any]:
    """The program's scalars: floats where ``t`` has a value, else 0-d tensors of float64."""
    names = *program.hyperparameters, *program.numbers
    given = {**vars(rule), **numbers}
    if not (is_symbolic(t) or is_symbolic(rule.lr)):
        return program.scalars({name: _number(given[name]) for name in names}, int(t))

    def double(x: Any) -> Any:  # Keras would cast a float by way of float32
        return x if isinstance(x, float) else ops.cast(x, "float64")

    with float64():
        values = {name: double(given[name]) for name in names}
        return program.scalars(values, double(t), double)


def next_step(iterations: Any) -> Any:
    """The number of the step after so many: an int where it has a value."""
    return iterations + 1 if is_symbolic(iterations) else int(_number(iterations)) + 1


def _number(x: Any) -> float:
    try:
        return float(x)
    except TypeError:  # a mirrored variable is no number, but its sums are
        return float(x + 0)
    except RuntimeError:  # nor is one on PyTorch that is trained
        return float(ops.convert_to_numpy(x))


def is_symbolic(x: Any) -> bool:
    """Whether ``x`` has no value: inside a ``tf.function``, or transformed by JAX."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(ops.convert_to_tensor(x), jax.core.Tracer)
    return False


def float64() -> Any:
    """Lets JAX compute in float64, whatever its configuration."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    from portopt.jax import double_precision

    return double_precision()
