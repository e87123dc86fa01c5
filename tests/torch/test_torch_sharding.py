"""The core's sharded update on PyTorch's tensors, with simulated workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import assert_bits
from support import gradients, weights

from portopt import Around
from portopt.rules import Adam, Lamb, Momentum
from portopt.sharding import Buffers, Sharded, simulate

SHAPES = {"w": (301, 300), "b": (37,), "scale": ()}
GRADS = [
    dict(zip(SHAPES, step, strict=True))
    for step in zip(*(gradients(shape, 8, 9) for shape in SHAPES.values()), strict=True)
]
AROUND = Around(clip_norm=0.5, skip_nonfinite=True, ema_decay=0.75, zero_grad=True)


def train(rule, workers, dtype, **options):
    """Every worker's parameters, from the same gradients on all of them."""

    def work(collectives):
        params = {k: torch.tensor(weights(shape)).to(dtype) for k, shape in SHAPES.items()}
        optimizer = Sharded(rule, params, collectives, around=AROUND, buffers=Buffers(), **options)
        for grads in GRADS:
            optimizer.step({k: torch.tensor(grad).to(dtype) for k, grad in grads.items()})
        return {k: param.double().numpy() for k, param in params.items()}, optimizer

    return simulate(workers, work, Buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rule", [Momentum(lr=0.1), Adam(lr=0.1), Lamb(lr=0.1)], ids=lambda rule: type(rule).__name__
)
def test_any_number_of_workers_has_the_same_bits(rule, dtype):
    ((expected, _),) = train(rule, 1, dtype, average=False)
    assert any(np.ptp(value) for value in expected.values())
    for workers in (2, 3):
        for params, _ in train(rule, workers, dtype, average=False):
            for name, value in expected.items():
                assert_bits(params[name], value, f"{name}, {workers} workers")


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_averaged(stage):
    """The same on all, so that the mean of two is the same bits."""
    ((expected, _),) = train(Momentum(lr=0.1), 1, torch.float32, average=False)
    for params, optimizer in train(Momentum(lr=0.1), 2, torch.float32, stage=stage):
        for name, value in expected.items():
            assert_bits(params[name], value, name)
        size = sum(state["momentum_buffer"].numel() for state in optimizer.state.values())
        assert size == pytest.approx(sum(value.size for value in expected.values()) / 2, abs=16)


@pytest.mark.parametrize(
    ("param", "words"),
    [
        (torch.ones(3, 2).T, r"params\[0\] must be contiguous"),
        (torch.ones(3, requires_grad=True), r"params\[0\] must not require a gradient"),
        (torch.ones(3, dtype=torch.int32), r"params\[0\] must be of a dtype in .*torch.int32"),
    ],
    ids=["gaps", "graph", "int"],
)
def test_bad_tensors(param, words):
    with pytest.raises((TypeError, ValueError), match=words):
        simulate(1, lambda c: Sharded(Momentum(), [param], c, buffers=Buffers()), Buffers())
