"""Batches: parameters whose step is one launch of a kernel on their memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from portopt.kernels import cpu
from portopt.program import Program

_STORAGE = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.complex64: "float32",
    torch.complex128: "float64",
}


def refusal(tensors: Sequence[Tensor], step: Tensor | None) -> str | None:
    """Why the operands of one parameter cannot go through a kernel; None if they can.

    Args:
        tensors: The parameter, its gradient and its slots.
        step: Its number of steps, if there is one.
    """
    param = tensors[0]
    if step is not None and (step.device.type != "cpu" or not step.is_floating_point()):
        return f"a number of steps is a {step.dtype} on device {step.device}"
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return f"a tensor is a {type(tensor).__name__} of layout {tensor.layout}"
        if tensor.device.type != "cpu":
            return f"a tensor is on device {tensor.device}"
        if tensor.dtype not in _STORAGE:
            return f"a tensor has dtype {tensor.dtype}"
        if tensor.is_conj() or tensor.is_neg():
            return "a tensor is a lazy conjugate or negative"
        if tensor.shape != param.shape or tensor.stride() != param.stride():
            return "a gradient or slot lies otherwise in memory than its parameter"
    if not cpu.is_dense(param.shape, param.stride()):
        return "a parameter has gaps in its memory"
    return cpu.refusal(storage(tensors))


def storage(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """The dtypes of the operands' elements; a complex number is two of them."""
    return tuple(_STORAGE[tensor.dtype] for tensor in tensors)


class Member(NamedTuple):
    """One parameter of a plan.

    Attributes:
        place: Its place among all parameters of the optimizer.
        group: The place of its group.
        param: The parameter, which has a gradient.
        state: Its state, with every slot, and with "step" if steps are counted.
        first: Whether this is its first step.
    """

    place: int
    group: int
    param: Tensor
    state: dict[str, Any]
    first: bool


class Batch:
    """Parameters of one program that are stored alike: a launch.

    Their numbers of steps stand side by side; each state's "step" is a view of its own.

    Args:
        program: What to compute.
        members: The parameters, none with anything that `refusal` refuses.
    """

    def __init__(self, program: Program, members: list[Member]) -> None:
        self.program = program
        self.places = [member.place for member in members]
        self.params = [member.param for member in members]
        self.states = [member.state for member in members]
        self.groups = np.array([member.group for member in members])
        self.kept = self._kept()
        self.addresses = _addresses(self.kept)
        grads = [_grad(param) for param in self.params]
        self.dtype, self.layout = grads[0].dtype, _layout(grads)
        sizes = [grad.numel() * (1 + grad.is_complex()) for grad in grads]
        columns = np.reshape(self.addresses, (-1, len(members)))
        table = np.insert(columns, 1, _addresses(grads), axis=0).T
        slots = [self.states[0][slot] for slot in program.slots]
        stored = storage([self.params[0], grads[0], *slots])
        self.step = cpu.Step(program, stored, table, sizes)
        self.square_sum = cpu.SquareSum(stored[1], table[:, 1], sizes)
        self.steps, self.views = None, []
        if "step" in self.states[0]:
            self.steps = torch.stack([state["step"] for state in self.states])
            self.views = [*self.steps.unbind()]
            for state, view in zip(self.states, self.views, strict=True):
                state["step"] = view
        self.t = np.where([member.first for member in members], 1.0, 2.0)

    def _kept(self) -> list[Tensor]:
        """All that the launch works on and that stays from step to step."""
        slots = [state.get(slot) for slot in self.program.slots for state in self.states]
        return [*self.params, *slots]

    def fits(self, all_grads: Sequence[Tensor | None]) -> bool:
        """Whether all is as it was but the gradients' places, which are noted."""
        grads: list[Any] = [all_grads[place] for place in self.places]
        kept = self._kept()
        steps = [state.get("step") for state in self.states] if self.views else []
        if not all(map(is_, kept, self.kept)) or not all(map(is_, steps, self.views)):
            return False
        if {*map(type, grads)} != {Tensor} or {grad.dtype for grad in grads} != {self.dtype}:
            return False
        try:
            if _addresses(kept) != self.addresses or _layout(grads) != self.layout:
                return False
            if self.dtype.is_complex and any(map(Tensor.is_conj, grads)):
                return False
            addresses = _addresses(grads)
        except RuntimeError:  # a sparse gradient has neither strides nor an address
            return False
        self.step.table[:, 1] = self.square_sum.table[:, 0] = addresses
        return True

    def prepare(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Form the scalars of the next step; changes no tensor.

        Args:
            values: For each group, what `Program.scalars` asks for.
        """
        t = self.t if self.steps is None else self.steps.numpy() + 1.0
        kinds = (t * len(values) + self.groups).astype(np.int64).tolist()
        places = {kind: place for place, kind in enumerate(dict.fromkeys(kinds))}
        self.which = [places[kind] for kind in kinds]
        pairs = [divmod(kind, len(values)) for kind in places]
        self.scalars = [self.program.scalars(values[group], step) for step, group in pairs]

    def run(self, threads: int) -> None:
        """Count the step, and update every parameter and slot."""
        if self.steps is not None:
            self.steps += 1
        self.t[:] = 2.0
        self.step.run(self.scalars, self.which, threads)
        torch.autograd.graph.increment_version(self.params)


class Plan(NamedTuple):
    """What a step launches, as long as nothing but the gradients moves.

    Attributes:
        programs: For each group, its program.
        params: All parameters.
        present: For each parameter, whether it has a gradient.
        states: All states, by their identities: the batches keep them alive.
        batches: The launches.
        rest: Those that do not go through a kernel.
    """

    programs: list[Program]
    params: list[Tensor]
    present: list[bool]
    states: list[int]
    batches: list[Batch]
    rest: list[Member]

    def fits(
        self, programs: list[Program], groups: list[dict[str, Any]], state: Mapping[Any, Any]
    ) -> bool:
        """Whether it holds for these as well; notes where the gradients are now."""
        params = [param for group in groups for param in group["params"]]
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        grads = [param.grad for param in params]
        return (
            all(map(is_, programs, self.programs))
            and [grad is not None for grad in grads] == self.present
            and [*map(id, state.values())] == self.states
            and all(batch.fits(grads) for batch in self.batches)
        )

    def grad_norm(self, threads: int) -> float:
        """The 2-norm of all gradients together."""
        total = sum(batch.square_sum.run(threads) for batch in self.batches)
        for member in self.rest:
            grad = _grad(member.param)
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            total += torch.linalg.vector_norm(real, dtype=torch.float64).item() ** 2
        return math.sqrt(total)


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], list[bool] | list[tuple[int, ...]]]:
    """How many elements tensors have, and in which order they lie."""
    contiguous = [*map(Tensor.is_contiguous, tensors)]
    strides = [*map(Tensor.stride, tensors)] if not all(contiguous) else contiguous
    return [*map(Tensor.numel, tensors)], strides


def _addresses(tensors: Sequence[Any]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def _grad(param: Tensor) -> Tensor:
    if param.grad is None:
        raise ValueError("a parameter of a batch must have a gradient")
    return param.grad
