"""What workers say to one another: a protocol, and workers that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from portopt.sharding.buffers import NUMPY, Buffers

T = TypeVar("T")
Pieces: TypeAlias = "Sequence[Sequence[Any]]"
"""For each rank, flat arrays: the same number, sizes and dtypes on every worker."""


class Collectives(Protocol):
    """One worker's connection to all of them; each calls the same methods in the same order.

    Arrays go in as pieces that need not lie side by side, those of every rank, so that they can be
    sent as they are, each to its owner and in parts as small as an implementation likes. It may
    write its results into the arrays that it was given, and return these.
    """

    @property
    def rank(self) -> int:
        """The number of this worker, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of workers."""
        ...

    def reduce_scatter(self, pieces: Pieces) -> list[Any]:
        """The means over all workers of the pieces that are this rank's.

        They are added in the order of the ranks and multiplied by ``1/size``, half types in
        float32; so a number of workers has defined bits.

        Args:
            pieces: What this worker has of every rank's pieces. Afterwards they may be anything.
        """
        ...

    def all_gather(self, pieces: Pieces) -> list[list[Any]]:
        """For each rank, its pieces as that rank itself holds them.

        Args:
            pieces: Those of this rank are sent; the others say where to receive, and how much.
        """
        ...

    def all_reduce(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sum over all workers, in any order; the same bits on each of them."""
        ...


class _Meeting:
    """What the threads share: what they say, and a barrier that none waits at in vain."""

    def __init__(self, size: int) -> None:
        self.said: list[Any] = [None] * size
        self._changed = threading.Condition()
        self._here, self._round = 0, 0
        self._ended: list[int] = []

    def wait(self, rank: int) -> None:
        """Wait until all workers are here."""
        with self._changed:
            self._here += 1
            if self._here == len(self.said):
                self._here = 0
                self._round += 1
                self._changed.notify_all()
                return
            here = self._round
            self._changed.wait_for(lambda: self._round > here or self._ended)
            if self._round == here:
                raise RuntimeError(f"worker {rank} waits for worker {self._ended[0]}, which ended")

    def leave(self, rank: int) -> None:
        """End; it is an error in those that wait, or come to wait, for this one."""
        with self._changed:
            self._ended.append(rank)
            self._changed.notify_all()


class Simulated:
    """`Collectives` among threads of one process, which look at one another's arrays.

    Attributes:
        rank: The number of this worker.
        size: The number of workers.
    """

    def __init__(self, rank: int, meeting: _Meeting, buffers: Buffers) -> None:
        self.rank, self.size = rank, len(meeting.said)
        self._meeting, self._buffers = meeting, buffers

    def reduce_scatter(self, pieces: Pieces) -> list[Any]:
        """See `Collectives`."""

        def means(said: list[Pieces]) -> list[Any]:
            mine = zip(*(worker[self.rank] for worker in said), strict=True)
            return [self._buffers.mean(parts) for parts in mine]

        return self._meet(pieces, means)

    def all_gather(self, pieces: Pieces) -> list[list[Any]]:
        """See `Collectives`."""

        def copies(said: list[Pieces]) -> list[list[Any]]:
            own = [worker[rank] for rank, worker in enumerate(said)]
            # Before their owners go on to change them.
            return [[self._buffers.copy(piece) for piece in theirs] for theirs in own]

        return self._meet(pieces, copies)

    def all_reduce(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """See `Collectives`."""
        return self._meet(values, lambda said: np.sum(said, axis=0))

    def _meet(self, word: Any, understand: Callable[[list[Any]], T]) -> T:
        """Say a word to all, and make something of all words before anybody goes on."""
        self._meeting.said[self.rank] = word
        self._meeting.wait(self.rank)
        result = understand(self._meeting.said)
        self._meeting.wait(self.rank)
        return result


def simulate(size: int, work: Callable[[Simulated], T], buffers: Buffers = NUMPY) -> list[T]:
    """Run workers as threads that share nothing but what they say.

    Args:
        size: The number of workers.
        work: What each does with its `Collectives`.
        buffers: The library of the arrays that they exchange.

    Returns:
        For each rank what its ``work`` returned.

    Raises:
        BaseException: what the first worker to fail raised; the others end where they wait for it.
        RuntimeError: a worker returned while others waited for it.

    Example:
        >>> simulate(3, lambda worker: worker.all_reduce(np.array([worker.rank + 1.0])).item())
        [6.0, 6.0, 6.0]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    meeting = _Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Simulated(rank, meeting, buffers))
        except BaseException as error:
            errors.append(error)
        finally:
            meeting.leave(rank)

    # Daemons, so that none holds up the end of a program that is interrupted here.
    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
