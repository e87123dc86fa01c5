"""What a worker holds, on real process groups: its share of the state, and no more memory."""

from __future__ import annotations

import ctypes
import gc
import math
from pathlib import Path

import pytest
import torch
from torch import distributed

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import workers

import portopt_torch
from portopt_torch import Sharded

pytestmark = pytest.mark.distributed

WIDTH = 256
BLOCK = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
MODELS = {
    "GPT-2-shaped": [(50257, WIDTH), (1024, WIDTH), *(BLOCK + [(WIDTH,)] * 9) * 6],
    "300 of 64x64": [(64, 64)] * 300,
    "an embedding of 80 %": [(50257, WIDTH), *[(WIDTH, WIDTH), (WIDTH,)] * 49],
}
SLOTS = 2 * 4
"""Bytes of Adam's state for each element."""


def resident():
    """The bytes of memory that this process has, but for what is freed and kept for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def steps(shapes, *, shard):
    """The bytes of the state after two steps, and how much more memory there is then."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = portopt_torch.Adam(params)
    optimizer = Sharded(optimizer) if shard else optimizer
    before = resident()
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
    slots = [x for own in optimizer.state.values() for x in own.values() if x.dim()]
    return sum(slot.nbytes for slot in slots), resident() - before


def hold(rank):
    steps([(999,)], shard=True)  # what is compiled and loaded at first use does not count
    return {name: steps(shapes, shard=True) for name, shapes in MODELS.items()}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_share_of_the_state_and_no_more_memory(size):
    ranks = workers.run(size, hold)
    for name, shapes in MODELS.items():
        share = SLOTS * sum(map(math.prod, shapes)) / size
        for rank in ranks:
            held, grown = rank[name]
            assert held <= 1.001 * share + 16 * SLOTS, name
            if share > 20e6:  # else what a process is off by is more
                assert grown == pytest.approx(share, rel=0.15), name
