"""What workers say to one another: through memory the same as by messages."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch
from torch import distributed

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import workers

from portopt_torch import WorkerError, neighbours
from portopt_torch.collectives import GroupCollectives
from portopt_torch.neighbours import connect

pytestmark = pytest.mark.distributed

SIZE, TIMEOUT = 3, 20.0
SLAB = 1000  # so that less memory is more than one of them
PIECES = {
    "long": [(2 * SLAB + 7,), (SLAB,), (SLAB - 1,)],
    "many": [(1,)] * 1500,  # more than one call of the system takes, or one message says
    "shaped": [(30, 40), (), (7,), (0,), (3, 0), (65,)],
    "none": [],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def pieces_of(name, rank):
    """Pieces of every rank as a worker has them, of several dtypes in turn."""
    generator = torch.Generator().manual_seed(rank)
    return [
        [
            torch.randn(shape, generator=generator).to(DTYPES[place % 3])
            for place, shape in enumerate(PIECES[name])
        ]
        for _ in range(SIZE)
    ]


def exchange(rank):
    neighbours.SLAB = SLAB
    device = torch.device("cpu")
    ways = {
        "messages": GroupCollectives(distributed.group.WORLD, device, TIMEOUT),
        "memory": connect(distributed.group.WORLD, device, TIMEOUT),
    }
    assert type(ways["memory"]) is not GroupCollectives
    results = {}
    for way, collectives in ways.items():
        for name in PIECES:
            means = collectives.reduce_scatter(pieces_of(name, rank))
            everything = collectives.all_gather(pieces_of(name, rank))
            here = pieces_of(name, rank)
            collectives.gather(here, 1, "gathering")
            sums = collectives.all_reduce(np.arange(3000.0) + rank)
            results[way, name] = [means, everything, here, sums, collectives.sent]
    with pytest.raises(WorkerError, match=r"with rank . .*Bad address"):
        ways["memory"]._read("exchange", (rank + 1) % SIZE, *[np.array([[8, 8]])] * 2)
    return pickle.dumps(results)  # which many tensors in shared memory would not allow


@pytest.fixture(scope="module")
def results():
    return [pickle.loads(each) for each in workers.run(SIZE, exchange)]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", PIECES)
def test_memory_is_as_messages_are(name, results):
    for rank in results:
        for some, others in zip(rank["memory", name], rank["messages", name], strict=True):
            assert_same(some, others)


@pytest.mark.parametrize("name", PIECES)
def test_what_collectives_promise(name, results):
    given = [pieces_of(name, rank) for rank in range(SIZE)]
    own = [given[rank][rank] for rank in range(SIZE)]
    for rank, result in enumerate(results):
        means, everything, here, sums, _ = result["memory", name]
        for mean, *parts in zip(means, *(theirs[rank] for theirs in given), strict=True):
            compute = torch.promote_types(mean.dtype, torch.float32)
            total = sum(part.to(compute) for part in parts)
            assert_same(mean, (total * (1 / SIZE)).to(mean.dtype))
        assert_same(everything, own)
        assert_same(here, own if rank == 1 else given[rank])
        np.testing.assert_allclose(sums, 3 * np.arange(3000) + 3, rtol=0)


def change_at_once(rank):
    """What a worker that reads slowly gets of one that goes on to change its pieces."""
    collectives = connect(distributed.group.WORLD, torch.device("cpu"), TIMEOUT)
    read = collectives._read

    def read_slowly(*args):
        time.sleep(0.3)
        read(*args)

    if rank == 0:
        collectives._read = read_slowly
    found = []
    for exchange in (collectives.reduce_scatter, collectives.all_gather):
        pieces = [[torch.full((50,), rank + 1.0)] for _ in range(2)]
        exchange(pieces)
        found.append([theirs.clone() for (theirs,) in pieces])
        for (theirs,) in pieces:
            theirs.fill_(torch.nan)
    return pickle.dumps(found)


def test_nobody_goes_on_while_another_one_reads():
    (means, all_pieces), _ = map(pickle.loads, workers.run(2, change_at_once))
    assert_same(means[0], torch.full((50,), 1.5))
    assert_same(all_pieces, [torch.full((50,), 1.0), torch.full((50,), 2.0)])


def test_where_one_cannot_reach_the_others_all_send_messages():
    assert workers.run(2, reach_none) == [True, True]


def reach_none(rank):
    if rank == 0:  # one that cannot is enough for all
        workers.by_messages()
    return type(connect(distributed.group.WORLD, torch.device("cpu"), TIMEOUT)) is GroupCollectives
