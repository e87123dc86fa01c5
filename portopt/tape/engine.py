"""The engine: a linear list of operations, written by forward calls and read backwards.

A call of a primitive inside `with Autograd() as autograd:` appends one `Operation` to the list. Its
gradient slots are the entries of a `GradientBuffer` under its inputs and its output. `backward`
seeds the slot of the loss, then visits the list from its end: each operation reads the finished
slot of its output and adds to the slots of its inputs.

While a tape is active, a primitive computes on private copies: an operand array that somebody
could still write is copied once, and the value of every operation is read-only. So gradients are
those of the values the forward call saw, whatever an optimizer or a data loader later writes into
its arrays. An array that is read-only already is taken as it is: `x.setflags(write=False)` spares
a large input the copy. Memory: one copy of each parameter used, as long as the tape lives.
Outside a tape nothing is recorded, copied or made read-only.

Source: the list is that of R. E. Wengert, "A simple automatic derivative evaluation program", CACM
7(8), 1964; for the walk backwards see Baydin et al., "Automatic differentiation in machine
learning: a survey", JMLR 18(153), 2018, section 3.2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike

from portopt.tape.variable import Array, Variable, check_floating, frozen

VJP: TypeAlias = Callable[[Array], Any]


class Operation(NamedTuple):
    """One line of the tape: what a forward call leaves for the walk backwards."""

    name: str
    inputs: tuple[Variable, ...]  # the floating Variables among the operands
    output: Variable
    vjps: tuple[VJP, ...]  # the backward function: output gradient -> gradient, one an input


class GradientBuffer:
    """Gradient slots by variable; a slot has its variable's shape and dtype.

    >>> buffer, w = GradientBuffer(), Variable(np.zeros(2))
    >>> buffer.accumulate(w, np.array([1.0, 2.0]))
    >>> buffer.accumulate(w, np.array([1.0, 2.0]))
    >>> buffer.get(w)
    array([2., 4.])
    """

    def __init__(self) -> None:
        """Start without slots."""
        self._slots: dict[Variable, Array] = {}

    def __contains__(self, variable: Variable) -> bool:
        """Whether a gradient has reached `variable`."""
        return variable in self._slots

    def get(self, variable: Variable) -> Array:
        """Return the slot of `variable`, or zeros if no gradient has reached it."""
        slot = self._slots.get(variable)
        return np.zeros_like(variable.value) if slot is None else slot

    def accumulate(self, variable: Variable, gradient: ArrayLike) -> None:
        """Add to the slot: `slot = slot + gradient`, computed in the variable's dtype.

        Raises:
            TypeError: `variable` or `gradient` is not floating.
            ValueError: `gradient` has not the variable's shape.
        """
        gradient = np.asarray(gradient)
        check_floating(variable.dtype, "variable")
        check_floating(gradient.dtype, "gradient")
        if gradient.shape != variable.shape:
            raise ValueError(f"gradient must have shape {variable.shape}, got {gradient.shape}")
        slot = self._slots.get(variable)
        if slot is None:
            # A copy: the same array may be the gradient of several variables.
            slot = self._slots[variable] = np.empty_like(variable.value)
            np.copyto(slot, gradient, casting="same_kind")
        else:
            slot += gradient

    def add(self, other: GradientBuffer) -> None:
        """Accumulate every slot of `other`."""
        for variable, gradient in other._slots.items():
            self.accumulate(variable, gradient)

    def clear(self) -> None:
        """Drop all slots."""
        self._slots.clear()


class Autograd:
    """A tape: the linear list of operations recorded while it is active in this thread.

    Tapes nest: every active tape of the thread records, so an outer tape knows what was computed
    under an inner one. Entering a tape again goes on with its list. Other threads do not record.

    >>> w = Variable(3.0)
    >>> with Autograd() as autograd:
    ...     loss = w * w + w
    >>> [operation.name for operation in autograd.operations]
    ['mul', 'add']
    >>> autograd.gradients(loss, w)
    array(7.)
    """

    def __init__(self) -> None:
        """Start with an empty list and an empty buffer."""
        self.operations: list[Operation] = []
        self.buffer = GradientBuffer()

    def __enter__(self) -> Autograd:
        """Start to record."""
        if self in _active.tapes:
            raise RuntimeError("this tape is already active: a tape cannot be nested in itself")
        _active.tapes.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop recording."""
        _active.tapes.remove(self)

    def record(
        self, name: str, inputs: Sequence[Variable], output: Variable, vjps: Sequence[VJP]
    ) -> None:
        """Append one operation to the list."""
        self.operations.append(Operation(name, tuple(inputs), output, tuple(vjps)))

    def backward(self, loss: Variable, gradient: ArrayLike | None = None) -> None:
        """Add the gradients of `loss` for every variable it depends on to `self.buffer`.

            buffer[v] += sum(gradient * d loss / d v)

        Nothing is added if an error is raised.

        Args:
            loss: a floating variable computed on this tape.
            gradient: floating, of the shape of `loss`; default 1 if `loss` has shape ().

        Raises:
            TypeError: `loss` is no Variable; `loss`, `gradient` or what a VJP returns is not
                floating.
            ValueError: `loss` was not recorded here, or has axes and no `gradient` is given;
                `gradient` or what a VJP returns has the wrong shape.
        """
        self.buffer.add(self._walk(loss, gradient))

    @overload
    def gradients(self, loss: Variable, wrt: Variable) -> Array: ...
    @overload
    def gradients(self, loss: Variable, wrt: Sequence[Variable]) -> list[Array]: ...
    @overload
    def gradients(self, loss: Variable, wrt: Mapping[str, Variable]) -> dict[str, Array]: ...

    def gradients(
        self, loss: Variable, wrt: Variable | Sequence[Variable] | Mapping[str, Variable]
    ) -> Array | list[Array] | dict[str, Array]:
        """Return `d loss / d wrt` as fresh arrays; `self.buffer` is neither read nor changed.

        Args:
            loss: a floating variable of shape () computed on this tape.
            wrt: a Variable, or a list or dict of them. The result has the same structure, each
                array the shape and dtype of its variable: zeros where `loss` does not depend on it.

        Raises:
            TypeError: `wrt` holds anything but floating Variables; or as `backward`.
            ValueError: as `backward`.
        """
        _check_wrt(wrt)
        walk = self._walk(loss, None)
        if isinstance(wrt, Variable):
            return walk.get(wrt)
        # Copies: one variable may stand under two names, and a caller may scale each in place.
        if isinstance(wrt, Mapping):
            return {name: walk.get(variable).copy() for name, variable in wrt.items()}
        return [walk.get(variable).copy() for variable in wrt]

    def _walk(self, loss: Variable, gradient: ArrayLike | None) -> GradientBuffer:
        """Walk the list backwards once, into a buffer of its own.

        In a shared buffer a second walk would send the gradients of the first one down again.
        """
        self._check_loss(loss, scalar=gradient is None)
        walk = GradientBuffer()
        walk.accumulate(loss, np.ones_like(loss.value) if gradient is None else gradient)
        for name, inputs, output, vjps in reversed(self.operations):
            if output not in walk:
                continue
            finished = frozen(walk.get(output))
            for variable, vjp in zip(inputs, vjps, strict=True):
                returned = vjp(finished)
                try:
                    walk.accumulate(variable, returned)
                except (TypeError, ValueError) as error:
                    problem = f"vjp of {name} for an input of shape {variable.shape}: {error}"
                    raise type(error)(problem) from error
        return walk

    def _check_loss(self, loss: Variable, *, scalar: bool) -> None:
        if not isinstance(loss, Variable):
            raise TypeError(f"loss must be a Variable, got {type(loss).__name__}")
        check_floating(loss.dtype, "loss")
        if not any(operation.output is loss for operation in reversed(self.operations)):
            raise ValueError(
                f"loss must be computed on this tape from a floating Variable, got {loss}"
            )
        if scalar and loss.shape != ():
            raise ValueError(
                f"loss must have shape () unless backward is given gradient=, got {loss.shape}"
            )


class _Active(threading.local):
    """The tapes that record in this thread, outermost first."""

    def __init__(self) -> None:
        self.tapes: list[Autograd] = []


_active = _Active()


def active_tapes() -> list[Autograd]:
    """Return the tapes that record in this thread, outermost first."""
    return _active.tapes


def _check_wrt(wrt: object) -> None:
    if isinstance(wrt, Variable):
        named = {"wrt": wrt}
    elif isinstance(wrt, Mapping):
        named = {f"wrt[{key!r}]": variable for key, variable in wrt.items()}
    elif isinstance(wrt, Sequence):
        named = {f"wrt[{index}]": variable for index, variable in enumerate(wrt)}
    else:
        raise TypeError(
            f"wrt must be a Variable, or a list or dict of Variables, got {type(wrt).__name__}"
        )
    for argument, variable in named.items():
        if not isinstance(variable, Variable):
            raise TypeError(f"{argument} must be a Variable, got {type(variable).__name__}")
        check_floating(variable.dtype, argument)
