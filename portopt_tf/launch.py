"""Eager steps on CPUs: launches of a kernel, in place on the memory of Keras's variables."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import keras
import numpy as np

from portopt.arrays import STORAGE_DTYPES
from portopt.kernels import cpu, slow
from portopt.program import Program

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a child must not inherit a step half done
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release
    )


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
    def size(self) -> int:
        return math.prod(self.arrays["param"].shape)

    def storage(self) -> tuple[str, ...]:
        """The dtypes of the arrays, for which Keras takes its time."""
        arrays = [self.arrays[name] for name in self.program.operands]
        return tuple(keras.backend.standardize_dtype(array.dtype) for array in arrays)


def _memory() -> Any:
    """What finds the memory, on TensorFlow or PyTorch."""
    return import_module(f"portopt_tf.memory_{keras.backend.backend()}")


def can_step() -> bool:
    """Whether memory may be looked at, and written to, now; only then is a plan made and run."""
    return bool(_memory().can_step())


class Plan:
    """The launches of a step, which serve for the next steps on the same variables.

    Args:
        programs: The step's.
        grads: The gradients, in the order of the places.
        members: The parameters.
    """

    def __init__(
        self, programs: Sequence[Program], grads: Sequence[Any], members: Sequence[Member]
    ) -> None:
        self._programs, self._grad_dtypes = programs, [grad.dtype for grad in grads]
        self._memory = _memory()
        storages = [member.storage() for member in members]
        self._is_possible = _is_possible(self._memory, members, {*storages})
        alike: dict[tuple[int, tuple[str, ...]], list[Member]] = {}
        for member, storage in zip(members, storages, strict=True) if self._is_possible else ():
            if member.size:
                alike.setdefault((member.work, storage), []).append(member)
        self._batches = [
            _Batch(self._memory, storage, some) for (_, storage), some in alike.items()
        ]

    def fits(self, programs: Sequence[Program], grads: Sequence[Any]) -> bool:
        """Whether it is for these programs and dtypes of gradients."""
        same = all(map(is_, programs, self._programs))
        return same and [grad.dtype for grad in grads] == self._grad_dtypes

    def run(self, scalars: Sequence[Mapping[str, Any]], grads: Sequence[Any]) -> bool:
        """Update every parameter and slot, if a kernel can; whether it could.

        Args:
            scalars: For each program, what its ``scalars`` returned.
            grads: The gradients, in the order of the places.
        """
        # A kernel runs without Python's lock, on addresses in the plan's own table; and another
        # step on the same variables, of whatever optimizer, would take them from under it.
        with _lock:
            return self._is_possible and self._run(scalars, grads)

    def _run(self, scalars: Sequence[Mapping[str, Any]], grads: Sequence[Any]) -> bool:
        found = [batch.find(grads) for batch in self._batches]  # alive while it is worked on
        if None in found:
            slow.warn("portopt_tf", "a variable or a gradient is not in memory of its own")
            return False
        for batch, (_, values) in zip(self._batches, found, strict=True):
            batch.step.run([scalars[batch.work]], batch.which, self._memory.threads())
            batch.variables.wrote(values)
        return True


class _Batch:
    """Parameters of one program that are stored alike: one launch."""

    def __init__(self, memory: Any, storage: tuple[str, ...], members: Sequence[Member]) -> None:
        self.memory = memory
        first, self.sizes = members[0], [member.size for member in members]
        self.work, self.places = first.work, [member.place for member in members]
        rows = np.zeros((len(members), len(storage)), np.uint64)
        self.step = cpu.Step(first.program, storage, rows, self.sizes)
        self.which = np.zeros(len(members), np.int64)  # all have the same scalars
        operands = first.program.operands
        self.grad = operands.index("grad")
        self.kept = [place for place in range(len(operands)) if place != self.grad]
        self.variables = memory.Variables(
            [member.arrays[operands[place]] for place in self.kept for member in members]
        )

    def find(self, grads: Sequence[Any]) -> Any:
        """Note where everything lies.

        Returns:
            The gradients and the variables' values, which keep their memory; None if one of them
            cannot be worked on where it is.
        """
        own_grads = self.memory.find([grads[place] for place in self.places], self.sizes)
        own_values = self.variables.find()
        if own_grads is None or own_values is None:
            return None
        (kept, grads_at), (values, values_at) = own_grads, own_values
        self.step.table[:, self.grad] = grads_at
        self.step.table[:, self.kept] = values_at.reshape(len(self.kept), -1).T
        return kept, values


def _is_possible(
    memory: Any, members: Sequence[Member], storages: Iterable[tuple[str, ...]]
) -> bool:
    """Whether a kernel can update them; if it should be able to, why not is said once."""
    kept = [x for member in members for name, x in member.arrays.items() if name != "grad"]
    if len({*map(id, kept)}) < len(kept) or not all(map(memory.is_here, kept)):
        return False
    if not {*STORAGE_DTYPES}.issuperset(chain.from_iterable(storages)):
        return False
    reasons = [*map(cpu.refusal, storages)]
    if not any(reasons):
        reasons.append(memory.lack(kept))
    for why in filter(None, reasons):
        slow.warn("portopt_tf", why)
    return not any(reasons)
