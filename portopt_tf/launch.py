"""Eager steps on CPUs: launches of a kernel, in place on the memory of TensorFlow's variables."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from portopt.kernels import cpu
from portopt.program import Program
from portopt_tf import memory


class Member(NamedTuple):
    """A parameter of a step.

    Attributes:
        place: Its place among them.
        work: Which of the step's programs updates it.
        program: That program.
        arrays: Its variables, and its gradient, by `Program.operands`.
    """

    place: int
    work: int
    program: Program
    arrays: Mapping[str, Any]

    @property
    def size(self) -> int | None:
        return self.arrays["param"].shape.num_elements()

    @property
    def storage(self) -> tuple[str, ...]:
        arrays = [self.arrays[name] for name in self.program.operands]
        return tuple(tf.as_dtype(array.dtype).name for array in arrays)


class Plan:
    """The launches of a step, which serve for the next steps on the same variables.

    Args:
        members: The parameters.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._programs = {member.work: member.program for member in members}
        dtypes = {member.place: member.arrays["grad"].dtype for member in members}
        self._grad_dtypes = [dtypes[place] for place in range(len(members))]
        self._is_possible = _is_possible(members)
        alike: dict[tuple[int, tuple[str, ...]], list[Member]] = {}
        for member in members if self._is_possible else ():
            if member.size:
                alike.setdefault((member.work, member.storage), []).append(member)
        self._batches = [*map(_Batch, alike.values())]

    def fits(self, programs: Sequence[Program], grads: Sequence[Any]) -> bool:
        """Whether it is for these programs and dtypes of gradients."""
        return (
            all(program is self._programs[work] for work, program in enumerate(programs))
            and [grad.dtype for grad in grads] == self._grad_dtypes
        )

    def run(self, scalars: Sequence[Mapping[str, Any]], grads: Sequence[Any]) -> bool:
        """Update every parameter and slot, if a kernel can; whether it could.

        Args:
            scalars: For each program, what its ``scalars`` returned.
            grads: The gradients, in the order of the places.
        """
        if not (self._is_possible and tf.config.experimental.get_synchronous_execution()):
            return False
        if not all(map(memory.is_here, grads)):
            return False
        values = [batch.find(grads) for batch in self._batches]  # alive while they are worked on
        if None in values:
            return False
        threads = tf.config.threading.get_intra_op_parallelism_threads() or cpu.threads()
        for batch in self._batches:
            batch.step.run([scalars[batch.work]], batch.which, threads)
        return True


class _Batch:
    """Parameters of one program that are stored alike: one launch."""

    def __init__(self, members: Sequence[Member]) -> None:
        first, sizes = members[0], [member.size or 0 for member in members]
        self.work, self.places = first.work, [member.place for member in members]
        rows = np.zeros((len(members), len(first.storage)), np.uint64)
        self.step = cpu.Step(first.program, first.storage, rows, sizes)
        self.which = np.zeros(len(members), np.int64)  # all have the same scalars
        self.grad_bytes = np.array([size * first.arrays["grad"].dtype.size for size in sizes])
        operands = first.program.operands
        self.grad = operands.index("grad")
        self.kept = [place for place in range(len(operands)) if place != self.grad]
        self.variables = memory.Variables(
            [member.arrays[operands[place]] for place in self.kept for member in members]
        )

    def find(self, grads: Sequence[Any]) -> list[Any] | None:
        """Note where everything lies.

        Returns:
            The variables' values, in memory that nothing else holds; None if that is not to be had.
        """
        found = memory.buffers([grads[place] for place in self.places])
        own = self.variables.alone()
        if own is None or (found[:, memory.BYTES] != self.grad_bytes).any():
            return None
        values, addresses = own
        self.step.table[:, self.kept] = addresses.reshape(len(self.kept), -1).T
        self.step.table[:, self.grad] = found[:, memory.DATA]
        return values


def _is_possible(members: Sequence[Member]) -> bool:
    """Whether a kernel can update them; if it should be able to, why not is said once."""
    kept = [x for member in members for name, x in member.arrays.items() if name != "grad"]
    if len({*map(id, kept)}) < len(kept) or any(member.size is None for member in members):
        return False
    if not all(memory.is_here(variable.handle) for variable in kept):
        return False
    reasons = [*map(cpu.refusal, {member.storage for member in members})]
    if not any(reasons) and not memory.is_found():
        reasons.append("TensorFlow's variables are not kept as expected")
    for why in filter(None, reasons):
        _warn(why)
    return not any(reasons)


@cache
def _warn(why: str) -> None:
    warnings.warn(f"portopt_tf steps without a kernel, slowly: {why}", stacklevel=8)
