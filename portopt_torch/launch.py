"""Batches: parameters whose step is one launch of a kernel on their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, compress
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portopt.arrays import SIZES
from portopt.kernels import cpu
from portopt.kernels.contents import Contents
from portopt.program import Program
from portopt_torch import cuda, native
from portopt_torch.layout import addresses, holdings, like
from portopt_torch.plain import Member, as_scalar, host

STORAGE = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}


def storage(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """The dtypes of the operands' elements; a complex number is two of them."""
    return tuple(STORAGE[tensor.dtype] for tensor in tensors)


class Batch:
    """Parameters of one program that are stored alike: a launch.

    Their numbers of steps stand side by side in one tensor; each state's "step" is a view of it.

    Args:
        program: What to compute.
        members: The parameters, none that has to go the plain way; a step passes over those that
            have no gradient.
        contents: What else a look is to find as it was.

    Attributes:
        here: For each parameter, whether it has a gradient.
        on_device: Whether the steps are counted where the host does not see it.
    """

    def __init__(
        self, program: Program, members: list[Member], contents: Contents | None = None
    ) -> None:
        self.program = program
        self.params = [member.param for member in members]
        self.states = [member.state for member in members]
        self.groups = np.array([member.group for member in members])
        present, self.by_group = np.unique(self.groups, return_inverse=True)
        self.present = present.tolist()
        counting = ["step"] if "step" in self.states[0] else []
        self.counts = {name: self._side_by_side(name) for name in (*counting, *program.numbers)}
        self.counts_at = self._counts_at()
        # While these live, nothing else can come to lie at those addresses.
        slots = [[state[slot] for state in self.states] for slot in program.slots]
        self.storages = [x.untyped_storage() for x in chain(self.params, *slots)]
        stored = storage([self.params[0], like(self.params), *(column[0] for column in slots)])
        sizes = [param.numel() * (1 + param.is_complex()) for param in self.params]
        self.grad_bytes = np.array(sizes, np.uint64) * SIZES[stored[1]]
        self.here = np.array([param.grad is not None for param in self.params])
        self._make_launches(stored, addresses(self.params, slots), sizes)
        self.holdings = holdings(
            *(self.params, self.states, program.slots, [*self.counts]),
            *(self.step.table, self.here),
            contents=contents,
        )
        self.on_device = "step" in self.counts and self.counts["step"].is_cuda
        self.lasting: list[Any] = []  # values, if the scalars depend on them alone
        self.columns = {} if self.on_device else {k: v.numpy() for k, v in self.counts.items()}
        self.steps = self.columns.pop("step", np.zeros(0))
        if not len(self.steps):  # nobody counts them, but the first may be another
            self.steps = np.where([member.first for member in members], 0.0, 1.0)

    def _side_by_side(self, name: str) -> Tensor:
        """Those numbers as one tensor, of which each state's own is, or becomes, a view."""
        own = [state[name].detach() for state in self.states]
        joined = _joined(own)
        if joined is None:
            joined = torch.stack([number.reshape(()) for number in own])
            joined = joined if joined.dtype.itemsize > 2 else joined.float()
            for state, number, view in zip(self.states, own, joined.unbind(), strict=True):
                state[name] = view.reshape(number.shape)
        return joined

    def _counts_at(self) -> list[int]:
        """Where the numbers are, which move where processes begin to share them."""
        return [*map(Tensor.data_ptr, self.counts.values())]

    def fits(self) -> bool:
        """Whether all is as it was but the gradients, whose places are noted."""
        fit = self.holdings.fit(self.step.helpers(torch.get_num_threads()))
        return fit and self._counts_at() == self.counts_at

    def places(self) -> Any:
        """Where the gradients are; 0 for none."""
        return self.step.table[:, 1]

    def grad_ends(self) -> Any:
        """Where the gradients end; 0 for none."""
        begins = self.places()
        return np.where(begins != 0, begins + self.grad_bytes, 0)

    def _make_launches(self, stored: tuple[str, ...], table: Any, sizes: list[int]) -> None:
        self.bumped = native.bump(self.params, self.here)
        first = cpu.NOTHING if self.bumped is None else self.bumped[0]
        self.step = cpu.Step(self.program, stored, table, sizes, first)
        self.make_square_sum = partial(cpu.SquareSum, stored[1], table[:, 1], sizes)

    def sum_squares(self) -> Tensor:
        """The sums of squares of all gradients, span by span, where they are."""
        self.square_sum.table[:, 0] = self.places()
        return self._sum_squares()

    @cached_property
    def square_sum(self) -> Any:
        """The norm's launch, which few steps need."""
        return self.make_square_sum()

    def _sum_squares(self) -> Tensor:
        return torch.from_numpy(self.square_sum.run(torch.get_num_threads()))

    def prepare(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Form the scalars of the next step; changes no tensor.

        Args:
            values: For each group, what `Program.scalars` asks for.
        """
        own = [values[group] for group in self.present]
        if self.lasting and all(map(is_, own, self.lasting)):
            return
        kinds, self.which = self._kinds()
        self.scalars = []
        for group, steps, *numbers in kinds:
            given = {name: host(values[group][name]) for name in self.program.hyperparameters}
            given.update(zip(self.columns, numbers, strict=True))
            self.scalars.append(self.program.scalars(given, steps + 1))
        asked = [one[name] for one in own for name in self.program.hyperparameters]
        lasts = not self.program.counts and not any(map(torch.is_tensor, asked))
        self.lasting = own if lasts else []

    def _kinds(self) -> tuple[list[list[Any]], Any]:
        """The different groups, steps done and numbers; and which of these each parameter has."""
        columns = [self.steps, *self.columns.values()]
        if all(map(_is_even, columns)):  # but for few models
            own = [float(column[0]) for column in columns]
            return [[group, *own] for group in self.present], self.by_group
        return _numbered([self.groups, *columns])

    def run(self, found_inf: Tensor | None = None) -> None:
        """Count the step, and update every parameter and slot.

        Args:
            found_inf: On the device, where the host has not asked: if it is not 0, nothing changes.
        """
        if self.on_device:
            self.counts["step"] += 1 if found_inf is None else 1 - found_inf
        elif "step" in self.counts:
            self.steps += self.here
        else:
            self.steps[self.here] = 1
        self._keep(found_inf)
        if self.bumped is None:
            torch.autograd.graph.increment_version([*compress(self.params, self.here)])
        self._run(found_inf)
        if self.program.writes_grad:
            here = compress(self.params, self.here)
            torch.autograd.graph.increment_version([*map(gradient, here)])

    def _keep(self, found_inf: Tensor | None) -> None:
        """Take over the rule's new numbers."""
        for name, value in self.program.number_outputs:
            new = np.array([own[value] for own in self.scalars])[self.which]
            np.copyto(self.columns[name], new, where=self.here)

    def _run(self, found_inf: Tensor | None) -> None:
        self.step.run(self.scalars, self.which, torch.get_num_threads())


class CudaBatch(Batch):
    """A batch on a CUDA device, which never waits for it where steps are counted there."""

    bumped = None

    def fits(self) -> bool:
        return super().fits() and (not self.on_device or bool(self.here.all()))

    def _make_launches(self, stored: tuple[str, ...], table: Any, sizes: list[int]) -> None:
        device = self.params[0].device
        self.step = cuda.Step(self.program, stored, table, sizes, device)
        self.make_square_sum = partial(cuda.SquareSum, stored[1], table[:, 1], sizes, device)

    def _sum_squares(self) -> Tensor:
        sums: Tensor = self.square_sum.run()
        return sums

    def prepare(self, values: Sequence[Mapping[str, Any]]) -> None:
        if not self.on_device:
            if self.counts and self.step.is_captured():
                raise RuntimeError(
                    "a CUDA graph that captures step() counts no steps: capturable must be True"
                )
            super().prepare(values)
            return self.step.set(self.scalars, self.which)
        self.new: list[tuple[slice, dict[str, Tensor]]] = []
        for group in dict.fromkeys(self.groups.tolist()):
            (places,) = np.nonzero(self.groups == group)
            part = slice(int(places[0]), int(places[-1]) + 1)  # groups come one after the other
            asked = self.program.hyperparameters
            numbers = {name: self._beside(as_scalar(values[group][name])) for name in asked}
            numbers |= {name: count[part].double() for name, count in self.counts.items()}
            scalars = self.program.scalars(numbers, numbers["step"] + 1, Tensor.double)
            self.step.set_on_device(part, scalars)
            self.new.append((part, self.program.kept(scalars)))
        return None

    def _beside(self, number: Any) -> Any:
        """A number where the parameters are, if it is a tensor: it may be on another device."""
        return number.to(self.params[0].device) if torch.is_tensor(number) else number

    def run(self, found_inf: Tensor | None = None) -> None:
        if found_inf is not None:  # true or false, of a norm that is not finite
            found_inf = self._beside(found_inf.float())
        super().run(found_inf)

    def _keep(self, found_inf: Tensor | None) -> None:
        if not self.on_device:
            return super()._keep(found_inf)
        for part, numbers in self.new:
            for name, value in numbers.items():
                own = self.counts[name][part]
                own.copy_(value if found_inf is None else torch.where(found_inf > 0, own, value))
        return None

    def _run(self, found_inf: Tensor | None) -> None:
        self.step.run(found_inf)


def _joined(numbers: Sequence[Tensor]) -> Tensor | None:
    """The tensor of which these are the elements, one after the other; None if there is none."""
    first, n = numbers[0], len(numbers)
    size, storage = first.itemsize, first.untyped_storage().data_ptr()
    places = range(first.data_ptr(), first.data_ptr() + n * size, size)
    whole = (
        size > 2  # a half type cannot count beyond 2048, or 256
        and {number.dtype for number in numbers} == {first.dtype}
        and [*map(Tensor.data_ptr, numbers)] == [*places]
        and {number.untyped_storage().data_ptr() for number in numbers} == {storage}
    )
    return first.as_strided((n,), (1,)) if whole else None


def _is_even(column: Any) -> bool:
    """Whether all numbers are the same, to the bit."""
    memory = column.tobytes()
    return bool(memory == memory[: column.itemsize] * len(column))


def _numbered(columns: Sequence[Any]) -> tuple[list[list[Any]], Any]:
    """The different rows of columns, and for each place which of them stands there."""
    code = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        if (column != column[0]).any():  # which is rare, and slower
            kinds, own = np.unique(column, return_inverse=True)
            code = code * len(kinds) + own
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    return [[column[place].item() for column in columns] for place in first], which


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    if param.grad is None:
        raise ValueError("a parameter of a batch must have a gradient")
    return param.grad
