"""Launching on CPU memory: addresses, scalars and spans."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from portopt.kernels import compiler, llvm, pool
from portopt.program import Program

SPAN = 2**16
"""The most elements of a span: enough to stream, few enough to balance threads."""
SHARE = 2**15
"""About how many elements a thread takes at once: a long span, or some short ones."""
ALONE = 2**16
"""Up to so many elements, one thread is done before another has woken up."""


class First(NamedTuple):
    """What the caller of a launch does while others begin.

    Attributes:
        function: Where a `pool.function` begins; 0 for nothing.
        argument: What the job is told for it, at the place `FIRST`.
    """

    function: int
    argument: int


FIRST = 3
"""The place of `First.argument` among what a launch's job is told."""
NOTHING = First(0, 0)


class Launch:
    """A kernel and the memory that it works on.

    Args:
        text: The kernel, as `llvm` prints it.
        addresses: The table.
        sizes: For each tensor, its number of elements.
        first: What the caller does while others begin.
        linger: As a `pool.Job` has it.

    Attributes:
        table: For each tensor a row of addresses, free to change between launches. The caller keeps
            alive what they point to.
    """

    def __init__(
        self,
        text: str,
        addresses: Any,
        sizes: Sequence[int],
        first: First = NOTHING,
        linger: int = 0,
    ) -> None:
        self.table = np.array(addresses, np.uint64, order="C")
        self.spans = spans(sizes, SPAN)
        parts = _parts(self.spans)
        self._alive = self.table, self.spans, parts
        told = [array.ctypes.data for array in self._alive]
        (kernel,) = compiler.compiled(text, "kernel")
        self._job = pool.Job(
            kernel,
            len(parts) - 1,
            [*told, first.argument],
            first=first.function,
            linger=linger,
        )
        self._most = len(parts) - 2 if sum(sizes) > ALONE else 0

    def helpers(self, threads: int) -> int:
        """How many threads beside the caller's can be of use, of so many."""
        return min(threads - 1, self._most)

    def launch(self, threads: int) -> None:
        """Do all spans; when it returns or raises, no thread is at work on them any more."""
        self._job.do(self.helpers(threads))


class Step(Launch):
    """A program on tensors that are stored alike.

    Args:
        program: What to compute.
        storage: The dtypes of `Program.operands`.
        addresses: For each tensor, where its operands begin. Elements are contiguous from there,
            in the same order in every operand.
        sizes: For each tensor, its number of elements.
        first: What the caller does while others begin.
    """

    def __init__(
        self,
        program: Program,
        storage: tuple[str, ...],
        addresses: Sequence[Sequence[int]],
        sizes: Sequence[int],
        first: First = NOTHING,
    ) -> None:
        rows = [(*row, 0) for row in addresses]  # the scalars' address comes with them
        super().__init__(llvm.kernel(program, storage), rows, sizes, first)
        self.names = program.scalar_names
        self.rows = np.empty((0, len(self.names)))
        self.which: Any = None
        self.scalars: Any = None

    def run(self, scalars: Sequence[Mapping[str, Any]], which: Any, threads: int) -> None:
        """Update every tensor.

        Args:
            scalars: Results of `Program.scalars`, one for all tensors that share it; what was given
                before must be the same.
            which: For each tensor, the place of its own among ``scalars``.
            threads: How many threads may work on it.
        """
        if which is not self.which or len(scalars) != len(self.rows):
            self.which, self.scalars = which, None
            self.rows = np.empty((len(scalars), len(self.names)))
            begin, row = self.rows.ctypes.data, self.rows.strides[0]
            self.table[:, -1] = begin + row * np.asarray(which, np.uint64)
        if scalars is not self.scalars:
            self.scalars = scalars
            self.rows[:] = [[row[name] for name in self.names] for row in scalars]
        self.launch(threads)


class SquareSum(Launch):
    """The sums of squares of gradients that are stored alike, in float64, span by span.

    They are the same for every number of threads.

    Args:
        dtype: The gradients' dtype.
        addresses: Where they begin.
        sizes: Their numbers of elements.
    """

    def __init__(self, dtype: str, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        rows = [(at, 0) for at in addresses]
        super().__init__(llvm.square_sum(dtype), rows, sizes, linger=pool.LINGER)
        self.sums = np.zeros(len(self.spans))
        self.table[:, 1] = self.sums.ctypes.data

    def run(self, threads: int) -> npt.NDArray[np.float64]:
        """The sum of each span."""
        self.launch(threads)
        return self.sums


def square_sums(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The sum of squares, in float64, of each span of contiguous arrays of one dtype."""
    (dtype,) = {array.dtype.name for array in arrays}
    if refusal((dtype,)) is None:
        addresses = [array.ctypes.data for array in arrays]
        return SquareSum(dtype, addresses, [array.size for array in arrays]).run(threads())
    flat = (array.reshape(-1) for array in arrays)
    pieces = (one[begin : begin + SPAN] for one in flat for begin in range(0, one.size, SPAN))
    with np.errstate(all="ignore"):
        return np.array([np.square(piece, dtype=np.float64).sum() for piece in pieces])


def norm(square_sums: Iterable[float]) -> float:
    """The 2-norm of what has these sums of squares; it does not depend on their order."""
    try:
        return math.sqrt(math.fsum(square_sums))
    except OverflowError:  # each sum is finite, but not that of all
        return math.inf


@cache
def refusal(storage: tuple[str, ...]) -> str | None:
    """Why arrays stored so, the parameter first, cannot go through a kernel; None if they can."""
    if not compiler.available():
        return "llvmlite is not installed: pip install llvmlite"
    if "float16" in storage and not compiler.computes_half():
        return "this processor does not convert float16"
    return llvm.refusal(storage)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie side by side, in some order of the dimensions; strides in elements."""
    if 0 in shape:
        return True
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def spans(sizes: Sequence[int], longest: int) -> npt.NDArray[np.int64]:
    """All elements of all tensors, in rows of (tensor, start, length), at most ``longest`` long."""
    total = np.asarray(sizes, np.int64)
    pieces = -(-total // longest)
    tensor = np.repeat(np.arange(len(total)), pieces)
    start = (np.arange(len(tensor)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * longest
    return np.stack([tensor, start, np.minimum(total[tensor] - start, longest)], axis=1)


def _parts(spans: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The first spans of shares of about `SHARE` elements, and how many spans there are."""
    begins = np.cumsum(spans[:, 2]) - spans[:, 2]
    (firsts,) = np.nonzero(np.diff(begins // SHARE, prepend=-1))
    return np.append(firsts, len(spans))


def threads() -> int:
    """How many threads a launch may use: ``OMP_NUM_THREADS``, else this process's processors."""
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the outermost level
    if chosen.isdecimal() and int(chosen):
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
