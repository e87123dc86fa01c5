"""The norm of gradients that are divided among workers: the same bits for every division."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from portopt.kernels import cpu
from portopt.sharding.buffers import Buffers
from portopt.sharding.collectives import Collectives
from portopt.sharding.plan import Plan, Span


def grad_norm(
    pieces: Mapping[Span, Any],
    params: Sequence[Any],
    plan: Plan,
    collectives: Collectives,
    buffers: Buffers,
    *,
    scattered: Collection[int] = (),
) -> float:
    """The 2-norm of all averaged gradients together, the same bits for every number of workers.

    It is made of a float64 sum for each chunk, which the worker where the chunk begins forms
    whole. Each sum has one worker that knows it, and the others add zero; `math.fsum` does not
    depend on an order. So it is also that of an unsharded optimizer.

    Args:
        pieces: The averaged gradients that this worker has, flat, by their spans.
        params: The tensors of the plan, of the dtypes of their gradients.
        plan: Who has what.
        collectives: The connection to the other workers; all of them form the norm together.
        buffers: The library of the arrays.
        scattered: If ``pieces`` are this worker's own spans alone: the tensors that have a
            gradient. Chunks that are cut are completed from others' spans then: for each cut, less
            than a chunk is sent to all.
    """
    rank = collectives.rank
    seen = dict(pieces)
    if scattered:
        seen |= _heads(pieces, scattered, params, plan, collectives, buffers)
    by_tensor: dict[int, list[tuple[Span, Any]]] = {}
    for span in sorted(seen):
        by_tensor.setdefault(span.tensor, []).append((span, buffers.host(seen[span])))
    chunks = [plan.chunks(rank) for rank in range(plan.ranks)]
    before = sum(map(len, chunks[:rank]))
    mine = {
        place: _joined(chunk, by_tensor[chunk.tensor])
        for place, chunk in enumerate(chunks[rank], before)
        if chunk.tensor in by_tensor
    }
    sums = np.zeros(sum(map(len, chunks)))
    sums[list(mine)] = buffers.square_sums(list(mine.values()))
    return cpu.norm(collectives.all_reduce(sums))


def _heads(
    pieces: Mapping[Span, Any],
    tensors: Collection[int],
    params: Sequence[Any],
    plan: Plan,
    collectives: Collectives,
    buffers: Buffers,
) -> dict[Span, Any]:
    """The other workers' ends of chunks, less than a chunk for each of them."""
    rank = collectives.rank
    own = {span.tensor: piece for span, piece in pieces.items()}
    heads = [
        [head for head in plan.heads(rank) if head.tensor in tensors] for rank in range(plan.ranks)
    ]
    places = [[buffers.full(params[tensor], (n,), 0.0) for tensor, _, n in some] for some in heads]
    places[rank] = [own[head.tensor][: head.length] for head in heads[rank]]
    exchanged = collectives.all_gather(places)
    del heads[rank], exchanged[rank]
    return dict(zip(itertools.chain(*heads), itertools.chain(*exchanged), strict=True))


def _joined(chunk: Span, pieces: Sequence[tuple[Span, Any]]) -> Any:
    """A chunk as one flat array, from pieces of its tensor; a view where it lies in one of them."""
    parts = [
        piece[max(chunk.start - span.start, 0) : chunk.stop - span.start]
        for span, piece in pieces
        if span.start < chunk.stop and chunk.start < span.stop
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
