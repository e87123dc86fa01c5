"""Gradients exchanged while the backward pass runs: stage 2 of `portopt_torch.Sharded`."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
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


def rooms(likes: Sequence[Tensor]) -> list[Tensor]:
    """Memory for as much as contiguous tensors of one device hold, of their shapes and dtypes.

    Most of the cost of much memory is that the system clears it page by page; large pages make it
    several times cheaper.
    """
    ends = np.cumsum([-(-like.nbytes // 64) * 64 for like in likes])  # each begins a cache line
    if not likes or likes[0].is_cuda or ends[-1] < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return [torch.empty_like(like) for like in likes]
    memory = mmap.mmap(-1, int(ends[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    parts = torch.frombuffer(memory, dtype=torch.uint8).tensor_split(torch.from_numpy(ends[:-1]))
    return [
        part[: like.nbytes].view(like.dtype).view(like.shape)
        for part, like in zip(parts, likes, strict=True)
    ]


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
        rooms: What gradients that came last leave for others' spans to be received in: the step
            needs as much, and the system would have to clear it first.
    """

    def __init__(self, optimizer: Sharded) -> None:
        self.optimizer: Sharded = weakref.proxy(optimizer)
        self.waits = False
        self.shares: dict[Span, Tensor] = {}
        self.rooms: dict[Span, Tensor] = {}
        self._had: set[int] = set()  # the tensors that have had a gradient here since the last step
        self._buckets: list[list[int]] = []
        self._bucket: dict[int, int] = {}
        self._pool = ThreadPoolExecutor(1, "portopt")
        self._begin()

    def _begin(self) -> None:
        self._missing = [{*bucket} for bucket in self._buckets]
        self._under_way: list[tuple[dict[int, Tensor], Future[dict[Span, Tensor]]]] = []
        self._next, self._is_running = 0, False

    def extend(self, params: Iterable[Tensor]) -> None:
        """Watch parameters; the last ones are expected to be ready first."""
        own = weakref.proxy(self)  # a hook that knew it would keep it, and itself
        room = 0
        for param in reversed(list(params)):
            number = self.optimizer.division.number[param]
            if param.nbytes > room:
                self._buckets.append([])
                room = BUCKET
            room -= param.nbytes
            self._buckets[-1].append(number)
            self._bucket[number] = len(self._buckets) - 1
            if param.requires_grad:
                handle = param.register_post_accumulate_grad_hook(lambda param: own._on_grad(param))
                weakref.finalize(self, handle.remove)
        self._begin()

    def settle(self) -> None:
        """Exchange the rest of a backward pass that an exception has ended: the others wait."""
        if self._is_running and self.optimizer._failure is None:
            self._finish()

    def drop(self) -> None:
        """Forget the gradients."""
        self.settle()
        self.shares.clear()
        self.rooms.clear()
        self._had.clear()

    def complete(self, here: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Exchange what has not been; returns what is not zero for what any worker has.

        Those that were frozen and have one now are watched from here on.

        Args:
            here: For each tensor whether it has a gradient that has not been exchanged.
        """
        flags = np.append(here, here.any())
        flags[list(self._had)] += 1.0
        total = self.optimizer.collectives.all_reduce(flags)
        if total[-1]:
            lacking = {*np.flatnonzero(total[:-1]).tolist()} - self._bucket.keys()
            self.extend(self.optimizer.division.params[number] for number in sorted(lacking))
            self._finish()
        return total[:-1]

    def _on_grad(self, param: Tensor) -> None:
        if self.waits or self.optimizer._failure is not None:
            return
        if param.grad is None:
            raise RuntimeError("a gradient has gone to another Sharded of stage 2: delete that one")
        if not self._is_running:
            self._is_running = True
            self.rooms.clear()
            Variable._execution_engine.queue_callback(self._finish)
        number = self.optimizer.division.number[param]
        self._missing[self._bucket[number]].discard(number)
        while self._next < len(self._buckets) and not self._missing[self._next]:
            with self.optimizer._guard():
                self._launch()

    def _finish(self) -> None:
        """Exchange the other buckets, with zeros for what has no gradient."""
        with self.optimizer._guard():
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
            param = self.optimizer.division.params[number]
            if param.grad is None or param.grad.is_sparse:  # which `step` refuses
                grads[number] = torch.zeros_like(param)
            else:
                self._had.add(number)
                grads[number] = param.grad.detach().contiguous()
                param.grad = None  # another pass would add to what is under way
        if len(self._under_way) == 2:
            self._collect()
        future = self._pool.submit(self.optimizer.reduce, grads)
        self._under_way.append((grads, future))

    @torch.no_grad()
    def _collect(self) -> None:
        grads, future = self._under_way.pop(0)
        means, plan = future.result(), self.optimizer.plan
        is_last = not self._under_way and self._next == len(self._buckets)
        for span, mean in means.items():
            if span in self.shares:
                self.shares[span] += mean
            elif span.length == plan.sizes[span.tensor] or is_last:
                self.shares[span] = mean
            else:
                self.shares[span] = rooms([mean])[0].copy_(mean)  # lets go of the rest
        if is_last:
            spans = chain.from_iterable(self.optimizer.division.spans_of(grads))
            self.rooms = {s: part_of(grads[s.tensor], s) for s in spans if s not in means}
