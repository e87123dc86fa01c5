"""Batches: parameters whose step is one launch of a kernel on their memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portopt.kernels import cpu
from portopt.program import Program
from portopt_torch.plain import Member

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

    Their numbers of steps stand side by side; each state's "step" is a view of its own.

    Args:
        program: What to compute.
        members: The parameters, none that has to go the plain way.
    """

    def __init__(self, program: Program, members: list[Member]) -> None:
        self.program = program
        self.places = [member.place for member in members]
        self.params = [member.param for member in members]
        self.states = [member.state for member in members]
        self.groups = np.array([member.group for member in members])
        self.kept = self._kept()
        self.addresses = _addresses(self.kept)
        grads = [gradient(param) for param in self.params]
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


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], list[bool] | list[tuple[int, ...]]]:
    """How many elements tensors have, and in which order they lie."""
    contiguous = [*map(Tensor.is_contiguous, tensors)]
    strides = [*map(Tensor.stride, tensors)] if not all(contiguous) else contiguous
    return [*map(Tensor.numel, tensors)], strides


def _addresses(tensors: Sequence[Any]) -> list[int]:
    return [*map(Tensor.data_ptr, tensors)]


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    if param.grad is None:
        raise ValueError("a parameter of a batch must have a gradient")
    return param.grad
