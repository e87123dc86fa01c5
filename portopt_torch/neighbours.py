"""Workers of one machine, which read one another's memory instead of sending messages."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import select
import time
import weakref
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from portopt.kernels.cpu import spans
from portopt.sharding.collectives import Pieces
from portopt_torch.collectives import GroupCollectives, average

SLAB = 1 << 18
"""How many elements are read before they are added: few enough for a processor's cache."""
WORDS = 1 << 10
"""The most words that a worker says at once."""
GLANCES, PAUSE = 200, 5e-5
"""How often a worker looks for what another one says before it sleeps, and for how many seconds."""
ENTRIES, LONGEST = 1 << 10, 1 << 20
"""The most pieces of one call of the system, and the most bytes of one of them."""

_inboxes: list[Any] = []  # as long as the process lives: another worker may still write there

Vectors = npt.NDArray[np.int64]
"""Rows of an address and a number of bytes, as the system wants them."""


def connect(group: Any, device: torch.device, timeout: float) -> GroupCollectives:
    """The fastest collectives that all workers of a group can use; all of them ask together.

    Args:
        group: The process group.
        device: Where the tensors are.
        timeout: How long one exchange may take, in seconds.
    """
    messages = GroupCollectives(group, device, timeout)
    if messages.size == 1 or device.type != "cpu":
        return messages
    inbox = np.zeros((messages.size, 2, 2 + WORDS), np.int64)
    _inboxes.append(inbox)
    inbox[messages.rank, 0] = np.frombuffer(secrets.token_bytes(inbox[0, 0].nbytes), np.int64)
    own = os.getpid(), inbox.ctypes.data, inbox[messages.rank, 0].copy()
    said: list[Any] = [None] * messages.size
    with messages.named("first exchange"):
        # By the group's own timeout, as workers may start long after one another.
        distributed.all_gather_object(said, own, group)
    strangers = sum(not _can_reach(rank, *said[rank], messages.rank) for rank in messages.others)
    if messages.all_reduce(np.array([strangers], np.float64)).any():
        return messages
    processes, inboxes, _ = zip(*said, strict=True)
    return Neighbours(group, device, timeout, inbox, processes, inboxes)


class Neighbours(GroupCollectives):
    """`portopt.sharding.Collectives` of processes of one user on one Linux machine.

    Each has an inbox, into which the others write where their pieces are, and when they have read
    this one's. What is added on arrival is read `SLAB` by `SLAB`, all else at once to where it
    belongs.

    Args:
        group: The process group.
        device: Where the tensors are.
        timeout: How long all may take to be ready for an exchange, or done with it, in seconds.
        inbox: For each rank two messages of it, each a number, then what it is about, and words. A
            worker is at most one message ahead of another, so that it writes over none that is
            still to be read.
        processes: For each rank, the number of its process.
        inboxes: For each rank, where its inbox is in its memory.
    """

    def __init__(
        self,
        group: Any,
        device: torch.device,
        timeout: float,
        inbox: npt.NDArray[np.int64],
        processes: Sequence[int],
        inboxes: Sequence[int],
    ) -> None:
        super().__init__(group, device, timeout)
        inbox[self.rank] = 0
        self._inbox, self._said = inbox, 0
        self._processes, self._inboxes = processes, inboxes
        self._ends = {rank: select.poll() for rank in self.others}
        for rank, end in self._ends.items():
            watched = os.pidfd_open(processes[rank])
            end.register(watched, select.POLLIN)
            weakref.finalize(self, os.close, watched)

    def reduce_scatter(self, pieces: Pieces) -> list[Tensor]:
        """See `portopt.sharding.Collectives`; the means are written into this rank's pieces."""
        what = "exchange of gradients"
        there = self._meet(pieces, what)
        mine = list(pieces[self.rank])
        for dtype in dict.fromkeys(piece.dtype for piece in mine):
            some = [place for place, piece in enumerate(mine) if piece.dtype == dtype]
            lines = [mine[place].view(-1) for place in some]
            at = {rank: there[rank][self.rank][some] for rank in self.others}
            self._add(what, lines, at)
        self.sent += sum(piece.nbytes for rank in self.others for piece in pieces[rank])
        self._say(what)
        return mine

    def all_gather(self, pieces: Pieces, what: str = "exchange of pieces") -> list[list[Tensor]]:
        """See `GroupCollectives.all_gather`."""
        there = self._meet(pieces, what)
        for rank in self.others:
            self._take(what, rank, there[rank][rank], pieces[rank])
        self.sent += sum(piece.nbytes for piece in pieces[self.rank]) * len(self.others)
        self._say(what)
        return [list(theirs) for theirs in pieces]

    def gather(self, pieces: Pieces, to: int, what: str) -> None:
        """See `GroupCollectives.gather`."""
        own = _addresses(pieces[self.rank])
        most = self._say(what, [len(own)]).max()
        there = self._say(what, np.resize(own, most))  # as many words each
        if self.rank == to:
            for rank in self.others:
                self._take(what, rank, there[rank], pieces[rank])
        else:
            self.sent += sum(piece.nbytes for piece in pieces[self.rank])
        self._say(what)

    def all_reduce(
        self, values: npt.NDArray[np.float64], what: str = "agreement of all workers"
    ) -> npt.NDArray[np.float64]:
        """See `GroupCollectives.all_reduce`."""
        said = self._say(what, values.view(np.int64)).view(np.float64)
        return said.sum(axis=0)  # the same order on all workers

    def _meet(self, pieces: Pieces, what: str) -> list[list[Any]]:
        """For each worker the addresses of its pieces, rank by rank, when all are ready."""
        ends = np.cumsum([len(some) for some in pieces])[:-1]
        said = self._say(what, _addresses([piece for some in pieces for piece in some]))
        return [np.split(row, ends) for row in said]

    def _say(self, what: str, words: Any = ()) -> npt.NDArray[np.int64]:
        """What all workers say, a row for each, when all have: as many words each."""
        result = np.empty((self.size, len(words)), np.int64)
        result[self.rank] = words
        about = zlib.crc32(f"{what} {len(words)}".encode())
        for start in range(0, max(len(words), 1), WORDS):
            part = slice(start, start + WORDS)
            message = np.append([self._said + 1, about], result[self.rank, part])
            self._said += 1
            for rank in self.others:
                self._post(what, rank, message)
            deadline = time.monotonic() + self.timeout
            for rank in self.others:
                theirs = self._await(what, rank, deadline)[: len(message)]
                if theirs[1] != about:
                    with self.named(f"{what} with rank {self._names[rank]}"):
                        raise RuntimeError("it takes part in another exchange")
                result[rank, part] = theirs[2:]
        return result

    def _post(self, what: str, rank: int, message: npt.NDArray[np.int64]) -> None:
        """Write a message where another worker looks for it, its number last."""
        there = self._inboxes[rank] + self._inbox[: self.rank].nbytes
        there += self._inbox[0, : self._said % 2].nbytes
        with self.named(f"{what} with rank {self._names[rank]}"):
            self._check_lives(rank)  # before its number may be another process's
            for part in (message[1:], message[:1]):
                if part.size:
                    offset = part.ctypes.data - message.ctypes.data
                    _write(self._processes[rank], part, there + offset)

    def _await(self, what: str, rank: int, deadline: float) -> npt.NDArray[np.int64]:
        message = self._inbox[rank, self._said % 2]
        glances = 0
        while message[0] != self._said:
            glances += 1
            if glances > GLANCES:
                with self.named(f"{what} with rank {self._names[rank]}"):
                    self._check_lives(rank)
                    if time.monotonic() > deadline:
                        raise TimeoutError("it does not answer")
                time.sleep(PAUSE)
        return message

    def _check_lives(self, rank: int) -> None:
        if self._ends[rank].poll(0):
            raise ProcessLookupError("it has ended")

    def _add(self, what: str, lines: Sequence[Tensor], there: dict[int, Any]) -> None:
        """Average pieces of one dtype with those that other ranks have at addresses."""
        width = lines[0].element_size()
        rows = spans([line.numel() for line in lines], SLAB)
        tensors, starts, lengths = rows.T
        before = np.cumsum(lengths) - lengths
        firsts = np.flatnonzero(np.diff(before // SLAB, prepend=-1))  # slabs of less than two SLABs
        inside = before - np.repeat(before[firsts], np.diff(firsts, append=len(rows)))
        rooms = {rank: lines[0].new_empty(2 * SLAB) for rank in self.others}
        vectors = {
            rank: (
                _vectors(room.data_ptr() + inside * width, lengths * width),
                _vectors(there[rank][tensors] + starts * width, lengths * width),
            )
            for rank, room in rooms.items()
        }
        own = [lines[tensor][start : start + length] for tensor, start, length in rows.tolist()]
        for first, last in pairwise([*firsts.tolist(), len(rows)]):
            sizes = lengths[first:last].tolist()
            parts = {self.rank: own[first:last]}
            for rank, room in rooms.items():
                here, far = (each[first:last] for each in vectors[rank])
                self._read(what, rank, here, far)
                parts[rank] = list(room[: sum(sizes)].split(sizes))
            average(parts[self.rank], [parts[rank] for rank in range(self.size)])

    def _take(self, what: str, rank: int, there: Any, pieces: Sequence[Tensor]) -> None:
        """Fill pieces with what another rank has at addresses."""
        tensors, starts, lengths = spans([piece.nbytes for piece in pieces], LONGEST).T
        here, far = (
            _vectors(first[tensors] + starts, lengths) for first in (_addresses(pieces), there)
        )
        self._read(what, rank, here, far)

    def _read(self, what: str, rank: int, here: Vectors, there: Vectors) -> None:
        with self.named(f"{what} with rank {self._names[rank]}"):
            _read(self._processes[rank], here, there)


def _addresses(pieces: Sequence[Tensor]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(Tensor.data_ptr, pieces), np.int64, len(pieces))


def _vectors(starts: Any, sizes: Any) -> Vectors:
    return np.stack([starts, sizes], axis=1)


def _can_reach(rank: int, process: int, inbox: int, token: Any, me: int) -> bool:
    """Whether a process has a token in its inbox, and lets this one read and write there."""
    there = inbox + 2 * rank * token.nbytes
    found = np.zeros_like(token)
    try:
        _read(
            process,
            np.array([[found.ctypes.data, found.nbytes]]),
            np.array([[there, found.nbytes]]),
        )
        if (found != token).any():
            return False
        _write(process, np.zeros(1, np.int64), inbox + 2 * me * token.nbytes)
        os.close(os.pidfd_open(process))
    except (OSError, AttributeError, TypeError):  # refused; a system without such a call
        return False
    return True


def _write(process: int, words: npt.NDArray[np.int64], there: int) -> None:
    """Write words into the memory of another process, by process_vm_writev(2)."""
    here = np.array([[words.ctypes.data, words.nbytes]])
    _copy("process_vm_writev", process, here, np.array([[there, words.nbytes]]))


def _read(process: int, here: Vectors, there: Vectors) -> None:
    """Read the memory of another process, by process_vm_readv(2)."""
    for first in range(0, len(here), ENTRIES):
        rows = slice(first, first + ENTRIES)
        _copy("process_vm_readv", process, here[rows], there[rows])


def _copy(call: str, process: int, here: Vectors, there: Vectors) -> None:
    """Copy between the memory of this process and of another one.

    Raises:
        OSError: there is no such process, memory, or permission.
    """
    own, other = (here.ctypes.data, len(here)), (there.ctypes.data, len(there))
    count = _system(call)(process, *own, *other, 0)
    if count != here[:, 1].sum():  # short where there is no such memory
        number = ctypes.get_errno() if count < 0 else errno.EFAULT
        raise OSError(number, os.strerror(number))


@cache
def _system(name: str) -> Any:
    call = getattr(ctypes.CDLL(None, use_errno=True), name)
    vectors = (ctypes.c_void_p, ctypes.c_ulong)
    call.argtypes = (ctypes.c_int, *vectors, *vectors, ctypes.c_ulong)
    call.restype = ctypes.c_ssize_t
    return call
