"""Launching on CPU memory: addresses, scalars and spans, shared out among a few threads of ours."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from portopt.arrays import compute_dtype
from portopt.kernels import compiler, llvm
from portopt.program import Program

if TYPE_CHECKING:
    from queue import SimpleQueue

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
        counter = (ctypes.c_int64 * 2)()  # taken, done
        work = partial(self._take, counter)  # which keeps alive what a late helper looks at
        helpers = min(threads, len(self.spans)) - 1 if self.size > ALONE else 0
        done, interrupt = 0, None
        while done < len(self.spans):
            try:
                _share(work, helpers)
                done = work()
                while done < len(self.spans):  # a helper is at its last span
                    time.sleep(0)
                    done = work()
            except BaseException as error:  # what the caller then sees must be whole
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _take(self, counter: ctypes.Array[ctypes.c_int64]) -> int:
        table, spans = self.table.ctypes.data, self.spans.ctypes.data
        return self.kernel(table, spans, len(self.spans), ctypes.addressof(counter))


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
        self.rows = np.empty((0, len(self.names)), compute_dtype(storage[0]))
        self.which: Any = None

    def run(self, scalars: Sequence[Mapping[str, Any]], which: Any, threads: int) -> None:
        """Update every tensor.

        Args:
            scalars: Results of `Program.scalars`, one for all tensors that share it.
            which: For each tensor, the place of its own among ``scalars``.
            threads: How many threads may work on it.
        """
        if which is not self.which or len(scalars) != len(self.rows):
            self.which = which
            self.rows = np.empty((len(scalars), len(self.names)), self.rows.dtype)
            begin, row = self.rows.ctypes.data, self.rows.strides[0]
            self.table[:, -1] = begin + row * np.asarray(which, np.uint64)
        with np.errstate(over="ignore"):  # what is beyond float32 is infinite there
            self.rows[:] = [[row[name] for name in self.names] for row in scalars]
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


_jobs: SimpleQueue[Callable[[], object]] | None = None
_threads: list[threading.Thread] = []


def _share(job: Callable[[], object], helpers: int) -> None:
    """Have up to so many threads do ``job`` too, as soon as they can."""
    global _jobs
    if helpers < 1:
        return
    if _jobs is None:
        from queue import SimpleQueue  # here, as `import portopt` is to be quick

        _jobs = SimpleQueue()
    with contextlib.suppress(RuntimeError):  # no more threads, or Python shuts down
        while len(_threads) < min(helpers, os.cpu_count() or 1):
            thread = threading.Thread(target=_work, args=(_jobs,), name="portopt", daemon=True)
            thread.start()
            _threads.append(thread)
    for _ in range(min(helpers, len(_threads))):
        _jobs.put(job)


def _work(jobs: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        jobs.get()()


def _forget_threads() -> None:
    """In the child of a fork: it has none of its parent's threads."""
    global _jobs
    _jobs = None
    _threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
