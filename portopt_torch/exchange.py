"""Gradients exchanged while the backward pass runs: stage 2 of `portopt_torch.Sharded`."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Variable

from portopt.sharding import Span

if TYPE_CHECKING:
    from portopt_torch.sharded import Sharded

BUCKET = 1 << 23
"""Bytes of gradients that are exchanged together during a backward pass."""


LARGE = 1 << 22
"""Bytes from which on memory is worth its own pages."""


def room(like: Tensor) -> Tensor:
    """Memory for as much as a contiguous tensor holds, of its shape and dtype.

    Most of the cost of much memory is that the system clears it page by page; large pages make it
    several times cheaper.
    """
    if like.device.type != "cpu" or like.nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(like)
    memory = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def part_of(tensor: Tensor, span: Span) -> Tensor:
    """A span of a contiguous tensor, flat where it is not all of it."""
    if span.length == tensor.numel():
        return tensor
    return tensor.view(-1)[span.start : span.stop]


class Exchange:
    """The gradients of stage 2, which are exchanged bucket by bucket as they become ready.

    Attributes:
        waits: Whether nothing is to be exchanged now.
        shares: The averages of this worker's spans so far.
    """

    def __init__(self, optimizer: Sharded) -> None:
        self.optimizer, self.waits = optimizer, False
        self.shares: dict[Span, Tensor] = {}
        self._had: set[int] = set()  # the tensors that have had a gradient here since the last step
        self._buckets: list[list[int]] = []
        self._bucket: dict[int, int] = {}
        self._pool = ThreadPoolExecutor(1, "portopt")
        self._begin()

    def _begin(self) -> None:
        self._missing = [{*bucket} for bucket in self._buckets]
        self._under_way: list[tuple[list[int], Future[dict[Span, Tensor]]]] = []
        self._next, self._is_running = 0, False

    def extend(self, params: Iterable[Tensor]) -> None:
        """Watch parameters; the last ones are expected to be ready first."""
        room = 0
        for param in reversed(list(params)):
            number = self.optimizer._number[param]
            if param.nbytes > room:
                self._buckets.append([])
                room = BUCKET
            room -= param.nbytes
            self._buckets[-1].append(number)
            self._bucket[number] = len(self._buckets) - 1
            param.register_post_accumulate_grad_hook(self._on_grad)
        self._begin()

    def drop(self) -> None:
        """Forget the gradients."""
        self.shares.clear()
        self._had.clear()

    def complete(self, here: np.ndarray[Any, Any]) -> set[int]:
        """Exchange what has not been; returns the tensors that have a gradient on any worker.

        Args:
            here: For each tensor whether it has a gradient that has not been exchanged.
        """
        flags = np.append(here, here.any())
        flags[list(self._had)] = 1.0
        total = self.optimizer.collectives.all_reduce(flags)
        if total[-1]:
            self._finish()
        return {*np.flatnonzero(total[:-1]).tolist()}

    def _on_grad(self, param: Tensor) -> None:
        if self.waits:
            return
        self.optimizer._check_usable()
        if not self._is_running:
            self._is_running = True
            Variable._execution_engine.queue_callback(self._finish)
        number = self.optimizer._number[param]
        self._missing[self._bucket[number]].discard(number)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            self._launch()

    def _finish(self) -> None:
        """Exchange the other buckets, with zeros for what has no gradient."""
        while self._next < len(self._buckets):
            self._launch()
        while self._under_way:
            self._collect()
        self._begin()

    def _launch(self) -> None:
        numbers = self._buckets[self._next]
        self._next += 1
        grads: dict[int, Tensor] = {}
        for number in numbers:
            param = self.optimizer._params[number]
            if param.grad is None:
                grads[number] = torch.zeros_like(param)
            else:
                self._had.add(number)
                grads[number] = param.grad.detach().contiguous()
        if len(self._under_way) == 2:
            self._collect()
        future = self._pool.submit(self.optimizer.reduce, grads)
        self._under_way.append((numbers, future))

    @torch.no_grad()
    def _collect(self) -> None:
        numbers, future = self._under_way.pop(0)
        for span, mean in future.result().items():
            if span in self.shares:
                self.shares[span] += mean
            elif span.length < self.optimizer.plan.sizes[span.tensor]:
                self.shares[span] = room(mean).copy_(mean)  # lets go of the rest
            else:
                self.shares[span] = mean
        for number in numbers:
            self.optimizer._params[number].grad = None
