"""Keras on PyTorch: where variables lie in memory, to be overwritten in place.

It has the functions of `portopt_tf.memory_tensorflow`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from keras.backend import standardize_dtype
from keras.src.backend.common.stateless_scope import in_stateless_scope  # nothing public tells
from torch import Tensor

from portopt.kernels import pool

pool.join(ctypes.PyDLL(torch._C.__file__))

Found: TypeAlias = tuple[Sequence[Tensor], npt.NDArray[np.uint64]]


def is_here(variable: Any) -> bool:
    """Whether a variable is in this processor's memory."""
    return _are_here([variable.value]) and not variable.value.is_inference()


def _are_here(tensors: Sequence[Any]) -> bool:
    return (
        {*map(type, tensors)} <= {Tensor, torch.nn.Parameter}
        and {tensor.layout for tensor in tensors} <= {torch.strided}
        and all([tensor.is_cpu for tensor in tensors])
    )


def lack(variables: Sequence[Any]) -> str | None:
    """Why they cannot be worked on where they are; None if they can."""
    values = [variable._value for variable in variables]
    if not all(map(Tensor.is_contiguous, values)):
        return "a variable's elements are not one after the other in memory"
    known = [(standardize_dtype(v.dtype), tuple(v.shape)) for v in variables]
    if known != [(standardize_dtype(v.dtype), tuple(v.shape)) for v in values]:  # model.half()
        return "a variable's value is of another dtype or shape than the variable"
    return None


def can_step() -> bool:
    """Whether memory may be written now: not where a step is to change nothing."""
    return not in_stateless_scope()


def threads() -> int:
    """How many threads a launch may use."""
    return torch.get_num_threads()


def find(grads: Sequence[Any], sizes: Sequence[int]) -> Found | None:
    """Gradients of so many elements; None if one is not in this memory."""
    if not _are_here(grads):
        return None
    values = grads
    if any(map(Tensor.is_neg, grads)) or not all(map(Tensor.is_contiguous, grads)):
        values = [grad.resolve_neg().contiguous() for grad in grads]
    return _found(values) if [*map(Tensor.numel, values)] == [*sizes] else None


class Variables:
    """Variables whose values are to be overwritten in place.

    Args:
        variables: Variables of Keras that are `is_here`.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._variables = variables
        self._kinds = [*map(_kind, self._values())]

    def _values(self) -> list[Tensor]:
        return [variable._value for variable in self._variables]  # ``value`` asks far more

    def find(self) -> Found | None:
        """Their values; None if one has gaps or shares its memory, or is not as it was."""
        values = self._values()
        if [*map(_kind, values)] != self._kinds or any(map(Tensor.is_neg, values)):
            return None
        found = _found(values)
        return found if len({*found[1].tolist()}) == len(values) else None

    def wrote(self, values: Sequence[Tensor]) -> None:
        """Let a backward pass through an older graph fail, as after PyTorch's own operations."""
        torch.autograd.graph.increment_version(values)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.is_cpu, tensor.is_contiguous()


def _found(tensors: Sequence[Tensor]) -> Found:
    return tensors, np.array([*map(Tensor.data_ptr, tensors)], np.uint64)
