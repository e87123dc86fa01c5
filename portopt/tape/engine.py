"""The engine: a linear list of operations, written by forward calls and read backwards.

A call of a primitive inside `with Autograd() as autograd:` appends one `Operation` to the list. Its
gradient slots are the entries of a `GradientBuffer` under its inputs and its output. `backward`
seeds the slot of the loss, then visits the list from its end: each operation reads the finished
slot of its output and adds to the slots of its inputs. Hooks are called on finished slots.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike

from portopt.tape.variable import Array, Variable, check_floating, frozen

VJP: TypeAlias = Callable[[Array], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One line of the tape: what a forward call leaves for the walk backwards."""

    name: str
    operands: tuple[Any, ...]  # Variables; of the others the scalars or arrays that were read
    inputs: tuple[Variable, ...]  # the operands that require a gradient
    output: Variable
    vjps: tuple[VJP, ...]  # the backward function: output gradient -> gradient, one an input

    def add_gradients(self, slots: GradientBuffer) -> None:
        """Read the finished slot of the output, and add to those of the inputs."""
        finished = frozen(slots.get(self.output))
        for variable, vjp in zip(self.inputs, self.vjps, strict=True):
            returned = vjp(finished)
            try:
                slots.accumulate(variable, returned)
            except (TypeError, ValueError) as error:
                problem = f"vjp of {self.name} for an input of shape {variable.shape}: {error}"
                raise type(error)(problem) from error


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

    def pop(self, variable: Variable) -> Array:
        """Drop the slot of `variable`, and return what `get` would have returned."""
        slot = self.get(variable)
        self._slots.pop(variable, None)
        return slot

    def variables(self) -> tuple[Variable, ...]:
        """Return the variables that a gradient has reached, in the order in which it did."""
        return tuple(self._slots)

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

    def record(self, operation: Operation) -> None:
        """Append one operation to the list."""
        self.operations.append(operation)

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
        # In the shared buffer a second walk would send the gradients of the first one down again.
        slots = GradientBuffer()
        for _ in self.walk(loss, slots, gradient):
            pass
        self.buffer.add(slots)

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
            ValueError: a Variable of `wrt` is frozen; or as `backward`.
        """
        _check_wrt(wrt)
        slots = GradientBuffer()
        for _ in self.walk(loss, slots):
            pass
        if isinstance(wrt, Variable):
            return slots.get(wrt)
        # Copies: one variable may stand under two names, and a caller may scale each in place.
        if isinstance(wrt, Mapping):
            return {name: slots.get(variable).copy() for name, variable in wrt.items()}
        return [slots.get(variable).copy() for variable in wrt]

    def walk(
        self, loss: Variable, slots: GradientBuffer, gradient: ArrayLike | None = None
    ) -> Iterator[Operation]:
        """Walk the list backwards once, as `backward` does, and stop after every operation.

        Args:
            loss: as in `backward`.
            slots: an empty buffer, which is filled on the way.
            gradient: as in `backward`.

        Yields:
            Each operation that `loss` depends on, the last first, when it has added to the slots
            of its inputs.
        """
        self._check_loss(loss, scalar=gradient is None)
        slots.accumulate(loss, np.ones_like(loss.value) if gradient is None else gradient)
        yield from visit(self.operations, slots)
        computed = {operation.output for operation in self.operations}
        for variable in slots.variables():
            if variable not in computed:
                _call_hooks(variable, slots)

    def _check_loss(self, loss: Variable, *, scalar: bool) -> None:
        if not isinstance(loss, Variable):
            raise TypeError(f"loss must be a Variable, got {type(loss).__name__}")
        check_floating(loss.dtype, "loss")
        if not any(operation.output is loss for operation in reversed(self.operations)):
            raise ValueError(
                "loss must be computed on this tape from a floating Variable that requires a "
                f"gradient, got {loss}"
            )
        if scalar and loss.shape != ():
            raise ValueError(
                f"loss must have shape () unless backward is given gradient=, got {loss.shape}"
            )


def visit(operations: Sequence[Operation], slots: GradientBuffer) -> Iterator[Operation]:
    """Walk a list backwards from the slots there are; yields what `Autograd.walk` does."""
    for operation in reversed(operations):
        if operation.output in slots:
            _call_hooks(operation.output, slots)
            operation.add_gradients(slots)
            yield operation


def _call_hooks(variable: Variable, slots: GradientBuffer) -> None:
    """Show the finished slot of `variable` to its hooks in turn; each may replace it."""
    for hook in variable.hooks:
        replacement = hook(frozen(slots.get(variable)))
        if replacement is not None:
            slots.pop(variable)
            try:
                slots.accumulate(variable, replacement)
            except (TypeError, ValueError) as error:
                raise type(error)(f"hook of {variable}: {error}") from error


class _Active(threading.local):
    """The tapes that record in this thread, outermost first."""

    def __init__(self) -> None:
        self.tapes: list[Autograd] = []
        self.no_grad = False


_active = _Active()


def active_tapes() -> list[Autograd]:
    """Return the tapes that record in this thread, outermost first."""
    return _active.tapes


def grad_enabled() -> bool:
    """Whether what is computed now may require a gradient: not directly under `no_grad`."""
    return bool(_active.tapes) or not _active.no_grad


@contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing: what is computed here is a constant. Also a decorator, `@no_grad()`.

    A tape entered inside records again, alone: those outside stay out of it.

    >>> w = Variable(3.0)
    >>> with Autograd() as autograd:
    ...     with no_grad():
    ...         scale = w * w
    ...     loss = scale * w
    >>> scale.requires_grad, autograd.gradients(loss, w)
    (False, array(9.))
    """
    outside = _active.tapes, _active.no_grad
    _active.tapes, _active.no_grad = [], True
    try:
        yield
    finally:
        _active.tapes, _active.no_grad = outside


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
        if not variable.requires_grad:
            raise ValueError(f"{argument} must require a gradient, but its requires_grad is False")
