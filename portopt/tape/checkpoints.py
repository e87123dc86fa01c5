"""Checkpointing: a chain of n operations with memory for about 2 sqrt(n) of their values.

Forward, only the values between segments of about sqrt(n) functions are kept. The walk backwards
computes a segment again when it comes to it, walks along its operations in the same slots, and
drops them: so the gradients are those of the plain tape, bit for bit, for one more forward pass.

Source: T. Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174, 2016;
with more passes A. Griewank and A. Walther ("Algorithm 799: revolve", ACM TOMS 26(1), 2000) need
memory for O(log n) values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from portopt.tape.engine import Autograd, GradientBuffer, Operation, active_tapes, no_grad, visit
from portopt.tape.variable import Array, Operand, Variable

Step: TypeAlias = Callable[[Variable], Variable]


def checkpoint(functions: Sequence[Step], x: Operand) -> Variable:
    """Return `functions[-1](...functions[1](functions[0](x)))`, recorded as one operation.

    Every function is called once now and once more in each backward pass: it must return the same
    value again, so what it reads must not change before. Gradients reach `x` and the variables that
    the functions read, not what lies in between.

    Args:
        functions: at least one, each from a Variable to a Variable.
        x: the operand of the first.

    Raises:
        TypeError: a function cannot be called, or returns no Variable.
        ValueError: there are no functions.
        RuntimeError: in the backward pass, if the functions compute another value than before.

    >>> w, x = Variable(3.0), Variable(2.0)
    >>> with Autograd() as autograd:
    ...     loss = checkpoint([lambda h: h * w] * 4, x)
    >>> [operation.name for operation in autograd.operations]
    ['checkpoint']
    >>> autograd.gradients(loss, [w, x])
    [array(216.), array(81.)]
    """
    functions = tuple(functions)
    if not functions:
        raise ValueError("functions must hold at least one function, got none")
    for index, function in enumerate(functions):
        if not callable(function):
            raise TypeError(f"functions[{index}] must be callable, got {function!r}")
    if not isinstance(x, Variable):
        x = Variable(x, requires_grad=False)
    if not active_tapes():
        return _apply(functions, x)
    length = math.isqrt(len(functions) - 1) + 1  # the square root, rounded up
    segments = [functions[i : i + length] for i in range(0, len(functions), length)]
    boundaries, read = [x], {x: None} if x.requires_grad else {}
    for segment in segments:
        end, leaves = _forward(segment, boundaries[-1])
        boundaries.append(end)
        read |= leaves
    output = Variable(boundaries[-1].value, requires_grad=bool(read))
    if read:
        operation = _Checkpoint(
            "checkpoint", tuple(read), tuple(read), output, (), segments, boundaries
        )
        for active in active_tapes():
            active.record(operation)
    return output


@dataclass(frozen=True, slots=True, eq=False)
class _Checkpoint(Operation):
    """What is kept of a chain: the value before each segment, and that of the whole."""

    segments: Sequence[Sequence[Step]]
    boundaries: Sequence[Variable]

    def add_gradients(self, slots: GradientBuffer) -> None:
        """Walk back through the segments, each recorded anew."""
        adjoint = slots.get(self.output)
        kept = zip(self.segments, pairwise(self.boundaries), strict=True)
        for segment, (start, end) in reversed(list(kept)):
            _backward(segment, start, end, adjoint, slots)
            if start is self.boundaries[0] or start not in slots:
                break  # nothing further back is reached
            adjoint = slots.pop(start)


# These two are functions of their own so that what they record is dropped before the next segment.


def _forward(segment: Sequence[Step], start: Variable) -> tuple[Variable, dict[Variable, None]]:
    """Return the value of a segment, and the variables from outside that it reads."""
    inner, end = _record(segment, start)
    computed = {start, *(operation.output for operation in inner.operations)}
    read = [variable for operation in inner.operations for variable in operation.inputs]
    if end.requires_grad:  # which a function may have returned as it found it
        read.append(end)
    return end, dict.fromkeys(variable for variable in read if variable not in computed)


def _backward(
    segment: Sequence[Step], start: Variable, end: Variable, adjoint: Array, slots: GradientBuffer
) -> None:
    """Add to the slots of `start` and of what the segment reads; those in between are dropped."""
    inner, again = _record(segment, start)
    if not np.array_equal(again.value, end.value, equal_nan=True):
        raise RuntimeError(
            "a function of checkpoint returned another value in the backward pass: it is random, "
            "or what it reads has changed since"
        )
    slots.accumulate(again, adjoint)
    for operation in visit(inner.operations, slots):
        slots.pop(operation.output)


def _record(segment: Sequence[Step], start: Variable) -> tuple[Autograd, Variable]:
    """Apply the functions under a tape of their own, that no outer tape hears of."""
    with no_grad(), Autograd() as inner:
        return inner, _apply(segment, start)


def _apply(functions: Sequence[Step], x: Variable) -> Variable:
    for function in functions:
        x = function(x)
        if not isinstance(x, Variable):
            raise TypeError(
                f"a function of checkpoint must return a Variable, got {type(x).__name__}"
            )
    return x
