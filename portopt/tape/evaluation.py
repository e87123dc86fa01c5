"""The evaluation trace: a computation and its walk backwards as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from portopt.tape.engine import VJP, Autograd, GradientBuffer, Operation
from portopt.tape.variable import Array, Variable


@dataclass(frozen=True, eq=False)
class Line:
    """One node of a trace: an input of the computation, or an operation."""

    node: str
    name: str  # of the operation; else "input", or "constant" of a frozen one
    operands: tuple[str, ...]  # nodes, and numbers as they are printed
    inputs: tuple[str, ...]  # those among them that require a gradient
    value: Array
    adjoint: Array | None  # d loss / d node, complete; None of a constant
    so_far: Mapping[str, Array]  # adjoints of the inputs, when this operation has added its share
    operation: Operation | None = None

    @property
    def local(self) -> tuple[Array, ...]:
        """Local derivatives d node / d input, one an input, of shape node.shape + input.shape."""
        return tuple(
            np.reshape([vjp(unit) for unit in self._units()], self.value.shape + variable.shape)
            for variable, vjp in self._backward()
        )

    def shown_local(self) -> list[str]:
        """Return the local derivatives as a trace prints them; those of arrays are not computed."""
        shapes = [self.value.shape + variable.shape for variable, _ in self._backward()]
        return list(map(str, shapes)) if any(shapes) else list(map(shown, self.local))

    def _backward(self) -> list[tuple[Variable, VJP]]:
        operation = self.operation  # a checkpoint has no vjps
        return list(zip(operation.inputs, operation.vjps, strict=False)) if operation else []

    def _units(self) -> list[Array]:
        size, shape = self.value.size, self.value.shape
        return [unit.reshape(shape) for unit in np.eye(size, dtype=self.value.dtype)]


@dataclass(frozen=True, eq=False)
class Trace:
    """The lines of a computation in the order of evaluation; prints as a table.

    Values are read downwards. Adjoints are read upwards: each operation adds its own, times its
    local derivatives, to those of its inputs. Arrays are shown by their shapes.
    """

    lines: tuple[Line, ...]

    def __str__(self) -> str:
        """Return the table."""
        rows: list[tuple[str, ...]] = [
            ("node", "operation", "value", "local derivatives", "adjoint", "adjoints so far"),
        ]
        for line in self.lines:
            call = f"{line.name}({', '.join(line.operands)})" if line.operands else line.name
            local = ", ".join(line.shown_local())
            adjoint = "" if line.adjoint is None else shown(line.adjoint)
            so_far = ", ".join(f"{node}: {shown(sum_)}" for node, sum_ in line.so_far.items())
            rows.append((line.node, call, shown(line.value), local, adjoint, so_far))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def trace(autograd: Autograd, loss: Variable, names: Mapping[str, Variable] | None = None) -> Trace:
    """Walk back from `loss`, and return what happened, line by line.

    An operation is called v1, v2, ... in the order of evaluation, an input without a name u1, u2,
    ..., by names that are not given to another. Only what `loss` depends on is shown. No buffer is
    changed; hooks are called.

    Args:
        autograd: the tape that recorded `loss`.
        loss: of shape ().
        names: variables by name.

    Raises:
        TypeError, ValueError: as `Autograd.backward`.

    Source: Baydin et al., "Automatic differentiation in machine learning: a survey", JMLR 18(153),
    2018, table 3: this computation.

    >>> from portopt import tape
    >>> x1, x2 = Variable(2.0), Variable(5.0)
    >>> with Autograd() as autograd:
    ...     y = tape.log(x1) + x1 * x2 - tape.sin(x2)
    >>> print(trace(autograd, y, {"x1": x1, "x2": x2}))
    node  operation    value      local derivatives  adjoint  adjoints so far
    ----  -----------  ---------  -----------------  -------  ------------------
    x1    input        2                             5.5
    x2    input        5                             1.71634
    v1    log(x1)      0.693147   0.5                1        x1: 5.5
    v2    mul(x1, x2)  10         5, 2               1        x1: 5, x2: 1.71634
    v3    add(v1, v2)  10.6931    1, 1               1        v1: 1, v2: 1
    v4    sin(x2)      -0.958924  0.283662           -1       x2: -0.283662
    v5    sub(v3, v4)  11.6521    1, -1              1        v3: 1, v4: -1
    """
    slots = GradientBuffer()
    visited = [
        (operation, {variable: slots.get(variable).copy() for variable in operation.inputs})
        for operation in autograd.walk(loss, slots)
    ]
    visited.reverse()
    computed = dict.fromkeys(operation.output for operation, _ in visited)
    operands = (operand for operation, _ in visited for operand in operation.operands)
    variables = dict.fromkeys(v for v in operands if isinstance(v, Variable))
    leaves = [variable for variable in variables if variable not in computed]
    given = {variable: name for name, variable in (names or {}).items()}

    def numbered(letter: str, variables: Iterable[Variable]) -> dict[Variable, str]:
        free = (f"{letter}{n}" for n in count(1) if f"{letter}{n}" not in given.values())
        return dict(zip(variables, free, strict=False))

    labels = numbered("v", computed) | numbered("u", leaves) | given

    def label(operand: Any) -> str:
        return labels[operand] if isinstance(operand, Variable) else shown(operand)

    inputs = [
        Line(label(leaf), "input", (), (), leaf.value, slots.get(leaf), {})
        if leaf in slots
        else Line(label(leaf), "constant", (), (), leaf.value, None, {})
        for leaf in leaves
    ]
    operations = [
        Line(
            label(operation.output),
            operation.name,
            tuple(map(label, operation.operands)),
            tuple(map(label, operation.inputs)),
            operation.output.value,
            slots.get(operation.output),
            {label(variable): adjoint for variable, adjoint in so_far.items()},
            operation,
        )
        for operation, so_far in visited
    ]
    return Trace((*inputs, *operations))


def shown(value: Any) -> str:
    """Return a number with six digits, or the shape of an array."""
    return f"{float(value):.6g}" if np.ndim(value) == 0 else str(np.shape(value))
