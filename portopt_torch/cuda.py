"""Launching on CUDA memory: what `portopt.kernels.cpu` is for the CPU's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portopt.arrays import compute_dtype
from portopt.kernels import cpu, llvm, triton
from portopt.program import Program


def refusal(storage: tuple[str, ...]) -> str | None:
    """Why arrays stored so, the parameter first, cannot go through a kernel; None if they can."""
    return _lack() or llvm.refusal(storage)


@cache
def _lack() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    from triton import __version__ as version

    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"Triton {version} makes zeros of subnormal numbers; 3.6 does not"
    return None


_captured: list[Launch] = []
"""What graphs have captured, and read at every replay: nobody says which is the last."""


class Launch:
    """What a kernel works on: addresses and spans.

    Attributes:
        table: For each tensor a row of addresses, in the host's memory, free to change between
            launches. The caller keeps alive what they point to.
    """

    def __init__(self, addresses: Any, sizes: Sequence[int], device: torch.device) -> None:
        self.table = np.array(addresses, np.uint64, order="C")
        self._spans = _to(device, cpu.spans(sizes, triton.SPAN))
        self._table = torch.empty(self.table.shape, dtype=torch.int64, device=device)
        self._sent = np.zeros_like(self.table)  # no tensor is at address 0
        self._kept: list[Tensor] = []
        self._is_in_graph = False

    def helpers(self, threads: int) -> int:
        """None: the host has nothing to do but look at tensors."""
        return 0

    def _current(self) -> Tensor:
        """The table, on the device."""
        if self.is_captured() and not self._is_in_graph:
            self._is_in_graph = True
            _captured.append(self)
        # What a graph sends is not there before it is replayed, and then at any time.
        if self._is_in_graph or not np.array_equal(self._sent, self.table):
            self._sent = self.table.copy()
            self._send(self._table, self._sent.view(np.int64))
        return self._table

    def _send(self, target: Tensor, array: np.ndarray[Any, Any]) -> None:
        """Copy to the device without waiting for it."""
        source = torch.from_numpy(array)
        if target.is_cuda:
            source = source.pin_memory()
        if self.is_captured():
            self._kept.append(source)  # every replay reads it
        target.copy_(source, non_blocking=True)

    def is_captured(self) -> bool:
        """Whether a CUDA graph is taking in what is launched."""
        return self._table.is_cuda and torch.cuda.is_current_stream_capturing()


class Step(Launch):
    """A program on tensors that are stored alike.

    Args:
        program: What to compute.
        storage: The dtypes of `Program.operands`.
        addresses: For each tensor, where its operands begin. Elements are contiguous from there,
            in the same order in every operand.
        sizes: For each tensor, its number of elements.
        device: Where all of them are.
    """

    def __init__(
        self,
        program: Program,
        storage: tuple[str, ...],
        addresses: Sequence[Sequence[int]],
        sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        self.program, self.storage = program, storage
        dtype = getattr(torch, compute_dtype(storage[0]))
        shape = len(sizes), len(program.scalar_names)
        self.rows = torch.zeros(shape, dtype=dtype, device=device)
        row = self.rows.element_size() * shape[1]
        at = [self.rows.data_ptr() + row * number for number in range(len(sizes))]
        table = [(*own, scalars) for own, scalars in zip(addresses, at, strict=True)]
        super().__init__(table, sizes, device)

    def set(self, scalars: Sequence[Mapping[str, Any]], which: Any) -> None:
        """Give every tensor its scalars, from the host.

        Args:
            scalars: Results of `Program.scalars`, one for all tensors that share it.
            which: For each tensor, the place of its own among ``scalars``.
        """
        names = self.program.scalar_names
        rows = torch.tensor([[own[name] for name in names] for own in scalars], dtype=torch.float64)
        self._send(self.rows, rows.to(self.rows.dtype).numpy()[which])

    def set_on_device(self, part: slice, scalars: Mapping[str, Any]) -> None:
        """Give the tensors of ``part`` their scalars, without waiting for the device.

        Args:
            part: Places of tensors.
            scalars: A result of `Program.scalars`: floats, and float64 tensors on the device, with
                one element or one for each tensor of ``part``.
        """
        for column, name in enumerate(self.program.scalar_names):
            self.rows[part, column] = scalars[name]

    def run(self, found_inf: Tensor | None = None) -> None:
        """Update every tensor.

        Args:
            found_inf: GradScaler's, float32 on the device: if it is not 0, nothing changes.
        """
        with torch.cuda.device_of(self.rows):
            triton.launch(self.program, self.storage, self._current(), self._spans, found_inf)


class SquareSum(Launch):
    """The sums of squares of gradients that are stored alike, span by span.

    Args:
        dtype: The gradients' dtype.
        addresses: Where they begin.
        sizes: Their numbers of elements.
        device: Where they are.
    """

    def __init__(
        self, dtype: str, addresses: Sequence[int], sizes: Sequence[int], device: torch.device
    ) -> None:
        super().__init__([(at,) for at in addresses], sizes, device)
        self.dtype = dtype
        self.sums = torch.zeros(len(self._spans), dtype=torch.float64, device=device)

    def run(self) -> Tensor:
        """The sum of each span: float64, on the device."""
        with torch.cuda.device_of(self.sums):
            triton.launch_square_sums(self.dtype, self._current()[:, 0], self._spans, self.sums)
        return self.sums


def _to(device: torch.device, array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(array).to(device)
