"""The variable: an array in the graph, and the checks of what an array may hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from portopt import tape  # looked into at call time only: ops.py is built on this module

Array: TypeAlias = NDArray[Any]
Hook: TypeAlias = Callable[[Array], ArrayLike | None]


class Variable:
    """A NumPy array in the graph.

    An array given is held, not copied, so that an optimizer can update `value` in place. The
    gradient is not stored here; it is in the `GradientBuffer`. Operators `+ - * / ** @` and
    unary `-` are the primitives `add, sub, mul, div, pow, matmul, neg`; `T` is `transpose`.

    Args:
        value: real numbers of any shape; gradients exist for floating dtypes only.
        requires_grad: False freezes it: no gradient is computed for it, nor through it. May be set
            later; it counts when an operation is recorded. Always False for other dtypes.

    Raises:
        TypeError: `value` is not made of real numbers (object, string and complex arrays).
    """

    __slots__ = ("__weakref__", "hooks", "requires_grad", "value")
    __array_ufunc__ = None  # makes `ndarray * variable` call our __rmul__

    value: Array
    requires_grad: bool
    hooks: tuple[Hook, ...]

    def __init__(self, value: ArrayLike, *, requires_grad: bool = True) -> None:
        """Hold `value` as an array."""
        self.value = np.asarray(value)
        check_real(self.value, "value")
        self.requires_grad = requires_grad and self.value.dtype.kind == "f"
        self.hooks = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the value."""
        return self.value.dtype

    @property
    def T(self) -> Variable:  # noqa: N802 (NumPy's name)
        """The variable with its axes reversed."""
        return tape.transpose(self)

    def detach(self) -> Variable:
        """Return a frozen Variable of the same array: a constant wherever it is used.

        >>> x = Variable(3.0)
        >>> with tape.Autograd() as autograd:
        ...     loss = x * x.detach()
        >>> autograd.gradients(loss, x)
        array(3.)
        """
        return Variable(self.value, requires_grad=False)

    def register_hook(self, hook: Hook) -> RemovableHook:
        """Call `hook` with the gradient of this variable in every backward pass.

        It is called once a pass, when all operations that use the variable have added their share
        (those of parameters and other leaves at the end), and must not write to what it is given.
        What it returns replaces the gradient, here and in all that depends on it; None keeps it.
        Several hooks are called in the order of registration, each with what the last one left.

        Returns:
            What removes the hook: `.remove()`.

        Raises:
            RuntimeError: the variable does not require a gradient.

        Source: `torch.Tensor.register_hook`.

        >>> x = Variable(3.0)
        >>> with tape.Autograd() as autograd:
        ...     square = x * x
        ...     loss = square * 2.0
        >>> handle = square.register_hook(lambda gradient: gradient * 10.0)
        >>> autograd.gradients(loss, x)
        array(120.)
        """
        if not self.requires_grad:
            raise RuntimeError(f"a hook needs a variable that requires a gradient, got {self}")
        return RemovableHook(self, hook)

    def __repr__(self) -> str:
        """Shape and dtype; the numbers are in `value`."""
        return f"Variable(shape={self.shape}, dtype={self.dtype})"

    def __neg__(self) -> Variable:
        """`-self`."""
        return tape.neg(self)

    def __add__(self, other: Operand) -> Variable:
        """`self + other`."""
        return tape.add(self, other)

    def __radd__(self, other: Operand) -> Variable:
        """`other + self`."""
        return tape.add(other, self)

    def __sub__(self, other: Operand) -> Variable:
        """`self - other`."""
        return tape.sub(self, other)

    def __rsub__(self, other: Operand) -> Variable:
        """`other - self`."""
        return tape.sub(other, self)

    def __mul__(self, other: Operand) -> Variable:
        """`self * other`."""
        return tape.mul(self, other)

    def __rmul__(self, other: Operand) -> Variable:
        """`other * self`."""
        return tape.mul(other, self)

    def __truediv__(self, other: Operand) -> Variable:
        """`self / other`."""
        return tape.div(self, other)

    def __rtruediv__(self, other: Operand) -> Variable:
        """`other / self`."""
        return tape.div(other, self)

    def __pow__(self, other: Operand) -> Variable:
        """`self ** other`."""
        return tape.pow(self, other)

    def __rpow__(self, other: Operand) -> Variable:
        """`other ** self`."""
        return tape.pow(other, self)

    def __matmul__(self, other: Operand) -> Variable:
        """`self @ other`."""
        return tape.matmul(self, other)

    def __rmatmul__(self, other: Operand) -> Variable:
        """`other @ self`."""
        return tape.matmul(other, self)


Operand: TypeAlias = Variable | ArrayLike


class RemovableHook:
    """A hook on a variable, until `remove` is called."""

    def __init__(self, variable: Variable, hook: Hook) -> None:
        """Register the hook."""
        self._variable = variable
        self._call = lambda gradient: hook(gradient)  # one of its own: a hook may be there twice
        variable.hooks += (self._call,)

    def remove(self) -> None:
        """Take the hook away; a second time does nothing."""
        hooks = self._variable.hooks
        self._variable.hooks = tuple(call for call in hooks if call is not self._call)


def frozen(array: Array) -> Array:
    """Return a view of `array` that cannot be written through."""
    view: Array = array.view()
    view.flags.writeable = False
    return view


def check_real(array: Array, argument: str) -> None:
    """Raise TypeError unless `array` is of real numbers."""
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{argument} must be real numbers, got dtype {array.dtype}")


def check_floating(dtype: DTypeLike, argument: str) -> None:
    """Raise TypeError unless `dtype` is floating."""
    if np.dtype(dtype).kind != "f":
        raise TypeError(f"{argument} must be floating, got dtype {dtype}")
