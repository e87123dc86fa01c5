"""The built-in primitives: each one function that holds its value and its gradients.

Operands are Variables, arrays or Python scalars and follow NumPy's broadcasting and promotion (a
Python scalar promotes nothing); options are keywords. In the docstrings `g` is the gradient of the
value and has its shape; the gradient of an operand has the operand's shape and dtype. "Elementwise"
operands of any shapes broadcast, and their gradients are summed back: `unbroadcast`. Every
primitive raises ValueError, with its name and the shapes, where NumPy cannot combine the operands.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from portopt.tape.decorator import Result, primitive
from portopt.tape.variable import Array

Axis: TypeAlias = int | tuple[int, ...] | None


def unbroadcast(gradient: Array, operand: Array) -> Array:
    """Sum `gradient` over the axes along which `operand` was broadcast.

    >>> unbroadcast(np.ones((4, 3)), np.zeros((1, 3)))
    array([[4., 4., 4.]])
    """
    if gradient.shape == operand.shape:
        return gradient
    extra = gradient.ndim - operand.ndim
    repeated = tuple(extra + axis for axis, size in enumerate(operand.shape) if size == 1)
    summed: Array = gradient.sum(axis=(*range(extra), *repeated))
    return summed.reshape(operand.shape)


@primitive
def add(a: Array, b: Array, /) -> Result:
    """Add elementwise.

    value = a + b
    grad_a = g
    grad_b = g
    """
    return a + b, lambda g: unbroadcast(g, a), lambda g: unbroadcast(g, b)


@primitive
def sub(a: Array, b: Array, /) -> Result:
    """Subtract elementwise.

    value = a - b
    grad_a = g
    grad_b = -g
    """
    return a - b, lambda g: unbroadcast(g, a), lambda g: unbroadcast(-g, b)


@primitive
def mul(a: Array, b: Array, /) -> Result:
    """Multiply elementwise.

    value = a * b
    grad_a = g * b
    grad_b = g * a
    """
    return a * b, lambda g: unbroadcast(g * b, a), lambda g: unbroadcast(g * a, b)


@primitive
def div(a: Array, b: Array, /) -> Result:
    """Divide elementwise.

    value = a / b
    grad_a = g / b
    grad_b = -g * value / b
    """
    value = a / b
    return value, lambda g: unbroadcast(g / b, a), lambda g: unbroadcast(-g * value / b, b)


@primitive
def pow(a: Array, b: Array, /) -> Result:
    """Raise `a` to the power `b` elementwise.

    value = a ** b
    grad_a = g * b * a ** (b - 1)      (0 where b == 0)
    grad_b = g * value * log(a)        (0 where a == 0 and b >= 0; nan where a < 0)
    """
    value = a**b

    def grad_a(g: Array) -> Array:
        base = np.where(np.equal(b, 0), 1, a)
        return unbroadcast(g * b * base ** np.subtract(b, 1).astype(g.dtype), a)

    def grad_b(g: Array) -> Array:
        base = np.where(np.equal(a, 0) & np.greater_equal(b, 0), 1, a)
        return unbroadcast(g * value * np.log(base.astype(g.dtype)), b)

    return value, grad_a, grad_b


@primitive
def neg(x: Array, /) -> Result:
    """Negate.

    value = -x
    grad_x = -g
    """
    return -x, lambda g: -g


@primitive
def exp(x: Array, /) -> Result:
    """Exponential, elementwise.

    value = exp(x)
    grad_x = g * value
    """
    value = np.exp(x)
    return value, lambda g: g * value


@primitive
def log(x: Array, /) -> Result:
    """Natural logarithm, elementwise.

    value = log(x)
    grad_x = g / x
    """
    return np.log(x), lambda g: g / x


@primitive
def sin(x: Array, /) -> Result:
    """Sine, elementwise.

    value = sin(x)
    grad_x = g * cos(x)
    """
    return np.sin(x), lambda g: g * np.cos(x)


@primitive
def tanh(x: Array, /) -> Result:
    """Hyperbolic tangent, elementwise.

    value = tanh(x)
    grad_x = g * (1 - value**2)
    """
    value = np.tanh(x)
    return value, lambda g: g * (1 - value * value)


@primitive
def sigmoid(x: Array, /) -> Result:
    """Logistic function, elementwise.

    value = 1 / (1 + exp(-x))
    grad_x = g * value * (1 - value)
    """
    small = np.exp(-np.abs(x))  # at most 1, so that neither sign of x overflows
    value = np.where(np.greater_equal(x, 0), 1, small) / (1 + small)
    return value, lambda g: g * value * (1 - value)


@primitive
def relu(x: Array, /) -> Result:
    """Rectified linear unit, elementwise.

    value = maximum(x, 0)
    grad_x = g * (x > 0)
    """
    return np.maximum(x, 0), lambda g: g * (x > 0)


@primitive
def matmul(a: Array, b: Array, /) -> Result:
    """Matrix product with NumPy's rules for 1-D, 2-D and stacked operands.

    value = a @ b
    grad_a = g @ b.T
    grad_b = a.T @ g

    Shapes: (..., m, k) @ (..., k, n) -> (..., m, n), leading axes broadcast and their gradients
    summed back. A 1-D `a` is a row, a 1-D `b` a column, and the axis added is dropped again.
    """
    value = np.matmul(a, b)
    rows = a[np.newaxis, :] if a.ndim == 1 else a
    columns = b[:, np.newaxis] if b.ndim == 1 else b

    dropped = (-2,) * (a.ndim == 1) + (-1,) * (b.ndim == 1)

    def grad_a(g: Array) -> Array:
        full = np.expand_dims(g, dropped) @ columns.swapaxes(-1, -2)
        return unbroadcast(full, rows).reshape(a.shape)

    def grad_b(g: Array) -> Array:
        full = rows.swapaxes(-1, -2) @ np.expand_dims(g, dropped)
        return unbroadcast(full, columns).reshape(b.shape)

    return value, grad_a, grad_b


@primitive
def outer(a: Array, b: Array, /) -> Result:
    """Outer product of two vectors, (m,) and (n,) -> (m, n).

    value[i, j] = a[i] * b[j]
    grad_a = g @ b
    grad_b = a @ g
    """
    if np.ndim(a) != 1 or np.ndim(b) != 1:
        raise ValueError("both operands must have one axis")
    return np.outer(a, b), lambda g: g @ b, lambda g: a @ g


@primitive
def sum(x: Array, /, *, axis: Axis = None, keepdims: bool = False) -> Result:
    """Sum over `axis` (default all); with `keepdims` the axes stay, with size 1.

    value = sum(x)
    grad_x = g, repeated along the axes summed over
    """
    value = np.sum(x, axis=axis, keepdims=keepdims)
    return value, lambda g: np.broadcast_to(_with_axes(g, axis, keepdims), x.shape)


@primitive
def mean(x: Array, /, *, axis: Axis = None, keepdims: bool = False) -> Result:
    """Mean over `axis` (default all); with `keepdims` the axes stay, with size 1.

    value = sum(x) / count
    grad_x = g / count, repeated along the axes averaged over
    """
    value = np.mean(x, axis=axis, keepdims=keepdims)
    count = np.size(x) // (np.size(value) or 1)
    return value, lambda g: np.broadcast_to(_with_axes(shared(g, count), axis, keepdims), x.shape)


@primitive
def max(x: Array, /, *, axis: Axis = None, keepdims: bool = False) -> Result:
    """Maximum over `axis` (default all); with `keepdims` the axes stay, with size 1.

    value = max(x)
    grad_x = g * tie / sum(tie)        where tie = (x == value)

    Elements that tie for the maximum share the gradient equally, as in `torch.amax`.
    """
    value = np.max(x, axis=axis, keepdims=keepdims)

    def grad_x(g: Array) -> Array:
        tie: Array = x == _with_axes(value, axis, keepdims)
        count = tie.sum(axis=axis, keepdims=True)
        gradient: Array = tie * shared(_with_axes(g, axis, keepdims), count)
        return gradient

    return value, grad_x


@primitive
def reshape(x: Array, /, *, shape: int | tuple[int, ...]) -> Result:
    """Give `x` another shape with as many elements; one size may be -1.

    value = x.reshape(shape)
    grad_x = g.reshape(x.shape)
    """
    return np.reshape(x, shape), lambda g: g.reshape(x.shape)


@primitive
def transpose(x: Array, /, *, axes: tuple[int, ...] | None = None) -> Result:
    """Permute the axes; default: reverse them.

    value = x.transpose(axes)
    grad_x = g.transpose(inverse of axes)
    """
    value = np.transpose(x, axes)
    inverse = None if axes is None else tuple(np.argsort(np.mod(axes, np.ndim(x))))
    return value, lambda g: g.transpose(inverse)


@primitive
def softmax(x: Array, /, *, axis: int = -1) -> Result:
    """Softmax along `axis`, stable for large `x`.

    value = exp(x - max(x)) / sum(exp(x - max(x)))
    grad_x = value * (g - sum(g * value))

    `x` has at least one axis.
    """
    e = np.exp(x - np.max(x, axis=axis, keepdims=True))
    value = e / e.sum(axis=axis, keepdims=True)
    return value, lambda g: value * (g - (g * value).sum(axis=axis, keepdims=True))


def shared(g: Array, count: Array | int) -> Array:
    """`g / count`, in float32 at least: in float16 a count may be infinite."""
    wide = np.promote_types(g.dtype, np.float32)
    quotient: Array = (g.astype(wide) / np.asarray(count, wide)).astype(g.dtype)
    return quotient


def _with_axes(reduced: Array, axis: Axis, keepdims: bool) -> Array:
    """Put the axes a reduction dropped back, with size 1."""
    return reduced if axis is None or keepdims else np.expand_dims(reduced, axis)
