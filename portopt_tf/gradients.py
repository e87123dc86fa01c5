"""Gradients as Keras hands them over: the shapes that they must have, and tensors of these."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import keras
from keras import ops


def shape_of(variable: Any) -> Any:
    """The shape that a gradient must have, as it tells it; None if only the run will tell."""
    if keras.backend.backend() != "tensorflow":
        return tuple(variable.shape)
    import tensorflow as tf

    shape = tf.TensorShape(variable.shape)
    return shape if shape.is_fully_defined() else None


def fit(grads: Sequence[Any], shapes: Sequence[Any]) -> bool:
    """Whether gradients are dense tensors of these shapes; classes are asked once each."""
    one_of_each = {type(grad): grad for grad in grads}.values()
    return (
        all(map(_is_tensor, one_of_each))
        and [grad.shape for grad in grads] == shapes
        and not (keras.backend.backend() == "torch" and any(map(_is_sparse, grads)))
    )


_is_sparse = attrgetter("is_sparse")
"""Whether a tensor of PyTorch is; it has the class of others."""


def _is_tensor(gradient: Any) -> bool:
    if keras.backend.backend() != "tensorflow":
        return bool(ops.is_tensor(gradient))
    import tensorflow as tf

    return isinstance(gradient, tf.Tensor)


def dense(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """The gradients as tensors of their variables' shapes.

    The rows that TensorFlow gives for an embedding are summed. A shape that is not known yet,
    inside a ``tf.function``, is checked when it runs.
    """
    if keras.backend.backend() == "tensorflow":
        return [_dense(*pair) for pair in zip(grads, variables, strict=True)]
    tensors = [x if _is_tensor(x) else ops.convert_to_tensor(x) for x in grads]
    if keras.backend.backend() == "torch":
        tensors = [x.to_dense() if _is_sparse(x) else x for x in tensors]
    for tensor, variable in zip(tensors, variables, strict=True):
        if tensor.shape != variable.shape:
            raise _misshapen(tensor, variable)
    return tensors


def _dense(gradient: Any, variable: Any) -> Any:
    import tensorflow as tf

    if isinstance(gradient, tf.IndexedSlices):
        places, rows = tf.convert_to_tensor(gradient.indices), variable.shape[0]
        # TensorFlow leaves out what is before the first row, and refuses what is after the last.
        places = tf.where(places < 0, tf.cast(rows, places.dtype), places)
        gradient = tf.math.unsorted_segment_sum(gradient.values, places, rows)
    if not _is_tensor(gradient):
        gradient = tf.convert_to_tensor(gradient)
    if not gradient.shape.is_compatible_with(variable.shape):
        raise _misshapen(gradient, variable)
    if gradient.shape.is_fully_defined():
        return gradient
    return tf.ensure_shape(gradient, variable.shape)


def _misshapen(gradient: Any, variable: Any) -> ValueError:
    return ValueError(
        f"the gradient of {path_of(variable)!r} must have the variable's shape "
        f"{tuple(variable.shape)}, has {tuple(gradient.shape)}"
    )


def path_of(variable: Any) -> str:
    """Where a variable is in its model."""
    return getattr(variable, "path", variable.name)  # a tf.Variable has no path
