"""Launching on CPU memory: addresses, scalars and spans, shared out among a few threads of ours."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from portopt.arrays import compute_dtype
from portopt.kernels import compiler, llvm
from portopt.program import Program

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

SPAN = 2**16
"""The most elements of a span: enough to stream, few enough to balance threads."""
ALONE = 2**16
"""Up to so many elements, one thread is done before another has woken up."""


class Launch:
    """A kernel and the memory that it works on.

    Attributes:
        table: For each tensor a row of addresses, free to change between launches. The caller keeps
            alive what they point to.
    """

    def __init__(self, text: str, addresses: Any, sizes: Sequence[int]) -> None:
        self.kernel = compiler.compiled(text)
        self.table = np.array(addresses, np.uint64, order="C")
        self.spans = spans(sizes, SPAN)
        self.size = sum(sizes)

    def launch(self, threads: int) -> None:
        """Do all spans; when it returns or raises, no thread is at work on them any more."""
        from concurrent.futures import Future, wait  # here, as `import portopt` is to be quick

        counter = np.zeros(1, np.int64)
        wanted = min(threads, len(self.spans)) - 1 if self.size > ALONE else 0
        helpers: list[Future[None]] = [Future() for _ in range(wanted)]
        idle, interrupt = iter(helpers), None
        while True:  # also when interrupted: what the caller then sees must be whole
            try:
                with contextlib.suppress(RuntimeError):  # no more threads, or Python shuts down
                    for helper in idle:
                        _threads().submit(self._help, helper, counter)
                self._take(counter)
                wait([helper for helper in helpers if not helper.cancel()])
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _help(self, helper: Future[None], counter: npt.NDArray[np.int64]) -> None:
        if helper.set_running_or_notify_cancel():  # else all is done already
            self._take(counter)
            helper.set_result(None)

    def _take(self, counter: npt.NDArray[np.int64]) -> None:
        self.kernel(
            self.table.ctypes.data, self.spans.ctypes.data, len(self.spans), counter.ctypes.data
        )


class Step(Launch):
    """A program on tensors that are stored alike.

    Args:
        program: What to compute.
        storage: The dtypes of `Program.operands`.
        addresses: For each tensor, where its operands begin. Elements are contiguous from there,
            in the same order in every operand.
        sizes: For each tensor, its number of elements.
    """

    def __init__(
        self,
        program: Program,
        storage: tuple[str, ...],
        addresses: Sequence[Sequence[int]],
        sizes: Sequence[int],
    ) -> None:
        rows = [(*row, 0) for row in addresses]  # the scalars' address comes with them
        super().__init__(llvm.kernel(program, storage), rows, sizes)
        self.names = program.scalar_names
        self.dtype = np.dtype(compute_dtype(storage[0]))

    def run(self, scalars: Sequence[Mapping[str, Any]], which: Any, threads: int) -> None:
        """Update every tensor.

        Args:
            scalars: Results of `Program.scalars`, one for all tensors that share it.
            which: For each tensor, the place of its own among ``scalars``.
            threads: How many threads may work on it.
        """
        with np.errstate(over="ignore"):  # what is beyond float32 is infinite there
            rows = np.array([[row[name] for name in self.names] for row in scalars], self.dtype)
        self.table[:, -1] = rows.ctypes.data + rows.strides[0] * np.asarray(which, np.uint64)
        self.launch(threads)


class SquareSum(Launch):
    """The sum of squares of gradients that are stored alike, in float64.

    It is the same for every number of threads.

    Args:
        dtype: The gradients' dtype.
        addresses: Where they begin.
        sizes: Their numbers of elements.
    """

    def __init__(self, dtype: str, addresses: Sequence[int], sizes: Sequence[int]) -> None:
        super().__init__(llvm.square_sum(dtype), [(at, 0) for at in addresses], sizes)
        self.sums = np.zeros(len(self.spans))
        self.table[:, 1] = self.sums.ctypes.data

    def run(self, threads: int) -> float:
        """The sum."""
        self.launch(threads)
        try:
            return math.fsum(self.sums)
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


def threads() -> int:
    """How many threads a launch may use: ``OMP_NUM_THREADS``, else this process's processors."""
    chosen = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the outermost level
    if chosen.isdecimal() and int(chosen):
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_pool: ThreadPoolExecutor | None = None


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        from concurrent.futures import ThreadPoolExecutor

        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="portopt")
    return _pool


def _forget_threads() -> None:
    """In the child of a fork: it has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
