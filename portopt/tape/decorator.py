"""The decorator that makes a primitive, built-in or a user's own, of one function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from portopt.tape.engine import Operation, active_tapes, grad_enabled
from portopt.tape.variable import Array, Operand, Variable, check_real, frozen

Result: TypeAlias = tuple[Any, ...]
"""What the function under `@primitive` returns: the value, then one VJP a positional argument."""


def primitive(function: Callable[..., Result]) -> Callable[..., Variable]:
    """Turn a function on arrays, that returns its value and VJPs, into a recorded operation.

    The function receives its positional arguments as plain arrays (Python scalars stay as they
    are, so that they promote nothing) and its keyword arguments as given. It returns a tuple: the
    value, then one vector-Jacobian product (VJP) for each positional argument: a function from the
    gradient of the value to the gradient of that argument, which has that argument's shape. A VJP
    is called only for Variables that require a gradient, and must not write to what it is given.

    >>> from portopt.tape import Autograd
    >>> @primitive
    ... def cube(x):
    ...     return x**3, lambda g: g * 3 * x**2
    >>> x = Variable([1.0, 2.0])
    >>> with Autograd() as autograd:
    ...     y = cube(x)
    >>> autograd.backward(y, gradient=np.array([1.0, 1.0]))
    >>> autograd.buffer.get(x)
    array([ 3., 12.])

    The result is called with Variables, arrays or scalars and returns a Variable. It raises:
        TypeError: an operand is not made of real numbers; `function` returned anything but a
            value and one VJP a positional argument.
        ValueError: what `function` raised, with the operation's name and the operands' shapes.
    """
    name = function.__name__.lstrip("_")  # _f, behind a public f that checks, is shown as f

    @functools.wraps(function)
    def call(*operands: Operand, **options: Any) -> Variable:
        tapes = active_tapes()
        arrays = [_read(operand, name, recording=bool(tapes)) for operand in operands]
        try:
            result = function(*arrays, **options)
        except ValueError as error:
            shapes = ", ".join(str(np.shape(array)) for array in arrays)
            raise ValueError(f"{name} of operands of shape {shapes}: {error}") from error
        _check_result(result, name, len(operands))
        pairs = [
            (operand, vjp)
            for operand, vjp in zip(operands, result[1:], strict=True)
            if isinstance(operand, Variable) and operand.requires_grad
        ]
        output = Variable(result[0], requires_grad=bool(pairs) and grad_enabled())
        if tapes:
            output.value = frozen(output.value)
        if tapes and pairs:
            inputs, vjps = zip(*pairs, strict=True)
            seen = tuple(
                operand if isinstance(operand, Variable) else array
                for operand, array in zip(operands, arrays, strict=True)
            )
            operation = Operation(name, seen, inputs, output, vjps)
            for active in tapes:
                active.record(operation)
        return output

    return call


def _read(operand: Operand, name: str, *, recording: bool) -> Array | float:
    """Return what a primitive computes on: a Python scalar, or an array nobody will write."""
    if isinstance(operand, (int, float)):
        return operand
    array = operand.value if isinstance(operand, Variable) else np.asarray(operand)
    check_real(array, f"operand of {name}")
    return array.copy(order="K") if recording and array.flags.writeable else array


def _check_result(result: object, name: str, operands: int) -> None:
    parts = result if isinstance(result, tuple) else (result,)
    if len(parts) != 1 + operands or not all(map(callable, parts[1:])):
        got = ", ".join(type(part).__name__ for part in parts)
        raise TypeError(
            f"primitive {name} must return a tuple of its value and one VJP for each of its "
            f"{operands} positional arguments, got ({got})"
        )
