"""What workers say to one another over ``torch.distributed``: pairwise, message by message."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from portopt.arrays import compute_dtype
from portopt.sharding.collectives import Pieces
from portopt_torch.launch import STORAGE

SMALL = 1 << 18
"""Bytes of a piece below which it travels along with others: a message of its own costs more."""
LARGE = 1 << 22
"""Bytes of a message that needs memory of its own to be received into."""
ROOM = 2 * LARGE
"""Bytes of such memory from which on an exchange waits before it sends and receives more."""


class WorkerError(RuntimeError):
    """Another worker has ended, or has not answered in time."""


class Message(NamedTuple):
    """What is sent at once: one piece as it is, or several, which are copied side by side."""

    pieces: list[Tensor]

    def packed(self) -> Tensor:
        """Its elements, side by side."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    def room(self) -> Tensor:
        """Memory for as many elements."""
        return self.pieces[0].new_empty(sum(map(Tensor.numel, self.pieces)))

    def unpack(self, packed: Tensor) -> None:
        """Write elements that lie side by side into the pieces."""
        if packed is not self.pieces[0]:
            parts = packed.split([piece.numel() for piece in self.pieces])
            torch._foreach_copy_(self.pieces, parts)


def messages(pieces: Sequence[Tensor], *, longest: int | None = None) -> list[Message]:
    """Pieces in their order as messages; the same on all workers, if the sizes and dtypes are.

    Args:
        pieces: Contiguous tensors.
        longest: The most bytes of a message; by default as many as a piece has.
    """
    result: list[Message] = []
    room = 0
    for piece in [piece.view(-1) for piece in pieces]:
        size = piece.nbytes
        if size >= SMALL:
            most = longest or size
            result += [Message([part]) for part in piece.split(most // piece.element_size())]
            room = 0
        elif 0 < size <= room and piece.dtype == result[-1].pieces[0].dtype:
            result[-1].pieces.append(piece)
            room -= size
        elif size:
            result.append(Message([piece]))
            room = LARGE - size
    return result


class GroupCollectives:
    """`portopt.sharding.Collectives` over a process group.

    Pieces may have any shape. They go straight from the sender's memory into the receiver's, large
    ones as they are, small ones packed. What is added on arrival comes `LARGE` bytes at a time.

    Args:
        group: The process group.
        device: Where the tensors are.
        timeout: How long one exchange may take, in seconds. NCCL has its own.

    Attributes:
        rank: The number of this worker in the group.
        size: The number of workers.
        others: The numbers of all others.
        sent: The bytes that this worker has sent in pieces.
    """

    def __init__(self, group: Any, device: torch.device, timeout: float) -> None:
        self.group, self.device, self.timeout = group, device, timeout
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self.sent = 0
        self._names = [distributed.get_global_rank(group, rank) for rank in range(self.size)]
        self.others = [rank for rank in range(self.size) if rank != self.rank]

    def reduce_scatter(self, pieces: Pieces) -> list[Tensor]:
        """See `portopt.sharding.Collectives`; the means are written into this rank's pieces."""
        cut = [messages(theirs, longest=LARGE) for theirs in pieces]
        mine = cut[self.rank]

        def add(place: int, parts: dict[int, Tensor]) -> None:
            own = mine[place].packed()
            parts[self.rank] = own
            average([own], [[parts[rank]] for rank in range(self.size)])
            mine[place].unpack(own)

        self._exchange(
            "exchange of gradients",
            {rank: cut[rank] for rank in self.others},
            dict.fromkeys(self.others, mine),
            lambda message: message.room(),
            add,
        )
        return list(pieces[self.rank])

    def all_gather(self, pieces: Pieces, what: str = "exchange of pieces") -> list[list[Tensor]]:
        """See `portopt.sharding.Collectives`; the pieces are written where they say.

        When it returns, all workers have all pieces.

        Args:
            pieces: Those of this rank are sent, the others received.
            what: What it is called in an error.
        """
        self._copy(pieces, self.others, self.others, what)
        self.all_reduce(np.zeros(1), what)
        return [list(theirs) for theirs in pieces]

    def gather(self, pieces: Pieces, to: int, what: str) -> None:
        """Send this rank's pieces to one rank, which receives them where they say."""
        if self.rank == to:
            self._copy(pieces, [], self.others, what)
        else:
            self._copy(pieces, [to], [], what)

    def all_gather_object(self, word: Any, what: str) -> list[Any]:
        """What each worker says, anything that can be pickled, within the timeout of these."""
        own = torch.frombuffer(bytearray(pickle.dumps(word)), dtype=torch.uint8).to(self.device)
        lengths = np.zeros(self.size)
        lengths[self.rank] = len(own)
        pieces = [[own.new_empty(int(n))] for n in self.all_reduce(lengths, what)]
        pieces[self.rank] = [own]
        self.all_gather(pieces, what)
        return [pickle.loads(piece.cpu().numpy().tobytes()) for (piece,) in pieces]

    def all_reduce(
        self, values: np.ndarray[Any, Any], what: str = "agreement of all workers"
    ) -> np.ndarray[Any, Any]:
        """See `portopt.sharding.Collectives`; ``what`` is what it is called in an error."""
        total = torch.from_numpy(values).to(self.device, copy=True)
        options = distributed.AllreduceOptions()
        options.timeout = timedelta(seconds=self.timeout)
        with self.named(what):
            self.group.allreduce([total], options).wait()
            return total.cpu().numpy()

    def _copy(self, pieces: Pieces, to: Sequence[int], of: Sequence[int], what: str) -> None:
        """Send this rank's pieces to some ranks, and receive those of some where they say."""
        cut = [messages(theirs) for theirs in pieces]

        def write(place: int, parts: dict[int, Tensor]) -> None:
            for rank, packed in parts.items():
                cut[rank][place].unpack(packed)

        self._exchange(
            what,
            dict.fromkeys(to, cut[self.rank]),
            {rank: cut[rank] for rank in of},
            _place,
            write,
        )

    def _exchange(
        self,
        what: str,
        sends: dict[int, list[Message]],
        receives: dict[int, list[Message]],
        memory: Callable[[Message], Tensor],
        arrived: Callable[[int, dict[int, Tensor]], None],
    ) -> None:
        """Send and receive, ahead of what has arrived as far as memory allows.

        Args:
            what: What it is called in an error.
            sends: For each rank the messages that it gets.
            receives: For each rank the messages that it sends here.
            memory: Where to receive a message.
            arrived: Called with a place, and what has arrived there of each rank.
        """
        deadline = time.monotonic() + self.timeout
        under_way: list[tuple[int, int, dict[int, Tensor], list[tuple[int, Any]]]] = []

        def finish() -> None:
            place, _, parts, works = under_way.pop(0)
            for rank, work in works:
                self._wait(what, rank, work, deadline)
            if parts:
                arrived(place, parts)

        longest = max(map(len, (*sends.values(), *receives.values())), default=0)
        for place in range(longest):
            while sum(own for _, own, _, _ in under_way) >= ROOM:
                finish()
            packed: dict[int, Tensor] = {}  # one message may go to all
            operations, ranks, parts = [], [], {}
            own = 0  # bytes, beside the pieces themselves
            for rank in self.others:
                for row, to in ((sends, distributed.isend), (receives, distributed.irecv)):
                    if place >= len(row.get(rank, ())):
                        continue
                    message = row[rank][place]
                    if to is distributed.irecv:
                        tensor = parts[rank] = memory(message)
                    else:
                        tensor = packed.setdefault(id(message), message.packed())
                        self.sent += tensor.nbytes
                    peer = self._names[rank]
                    own += 0 if tensor is message.pieces[0] else tensor.nbytes
                    operations.append(distributed.P2POp(to, tensor, peer, self.group))
                    ranks.append(rank)
            with self.named(what):
                works = distributed.batch_isend_irecv(operations)
            # Some backends answer for all of them at once.
            who = ranks if len(works) == len(ranks) else ranks[:1] * len(works)
            under_way.append((place, own, parts, list(zip(who, works, strict=True))))
        while under_way:
            finish()

    def _wait(self, what: str, rank: int, work: Any, deadline: float) -> None:
        with self.named(f"{what} with rank {self._names[rank]}"):
            if self.device.type == "cpu":
                left = max(deadline - time.monotonic(), 0.001)
                work.wait(timedelta(seconds=left))
            else:  # which would make the host wait for the device; NCCL watches for itself
                work.wait()

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Turn what a backend raises into a `WorkerError` that says what failed."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise WorkerError(
                f"{what} failed, with a timeout of {self.timeout:g} s: {error}"
            ) from error


def average(own: Sequence[Tensor], parts: Sequence[Sequence[Tensor]]) -> None:
    """Write means into tensors of one dtype; half types are added in float32.

    Args:
        own: Where they are to go.
        parts: For each rank what is averaged, in the order in which it is added; free to change.
    """
    dtype = getattr(torch, compute_dtype(STORAGE[own[0].dtype]))
    if own[0].dtype != dtype:
        parts = [[part.to(dtype) for part in some] for some in parts]
    total = parts[0]
    for other in parts[1:]:
        torch._foreach_add_(total, other)
    torch._foreach_mul_(total, 1 / len(parts))
    torch._foreach_copy_(own, total)


def _place(message: Message) -> Tensor:
    return message.pieces[0] if len(message.pieces) == 1 else message.room()
