"""`Sharded` on real process groups, bit for bit against the optimizer alone."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
from bits import assert_bits
from support import gradients, weights
from torch import distributed

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import workers
from torch.nn.parallel import DistributedDataParallel

import portopt_torch
from portopt import Around
from portopt_torch import Sharded, exchange

pytestmark = pytest.mark.distributed

STEPS = 20
LATE = 3
"""The step from which on "late" has a gradient."""
# "w" has a chunk of 65536 elements that every number of workers cuts; "half" is a bfloat16.
SHAPES = {"w": (301, 400), "half": (64, 50), "b": (37,), "scale": (), "late": (50, 30)}
GRADS = {
    rank: {name: list(gradients(shape, STEPS, 9 + rank)) for name, shape in SHAPES.items()}
    for rank in range(3)
}
AROUND = Around(clip_norm=0.5, skip_nonfinite=True, ema_decay=0.75)
OPTIMIZERS = {
    "momentum": partial(portopt_torch.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "adam": partial(portopt_torch.Adam, lr=0.1),
    "clipped": partial(portopt_torch.AdamW, lr=0.1, around=AROUND),
    "lamb": partial(portopt_torch.get("lamb"), lr=0.1),
}


def start():
    params = {
        name: torch.nn.Parameter(torch.tensor(weights(shape, 1)).to(dtype_of(name)))
        for name, shape in SHAPES.items()
    }
    return params | {"frozen": torch.nn.Parameter(torch.ones(9), requires_grad=False)}


def dtype_of(name):
    return torch.bfloat16 if name == "half" else torch.float32


def groups(params):
    first, *rest = params.values()
    return [{"params": [first], "lr": 0.05}, {"params": rest}]


def draw(rank, t):
    """A worker's own gradients."""
    for name in SHAPES:
        if name != "late" or t >= LATE:
            grad = torch.tensor(GRADS[rank][name][t]).to(dtype_of(name))
            yield name, grad


def averaged(draw, t, size):
    """As `Sharded` adds up: in the order of the ranks, in float32."""
    for parts in zip(*(draw(rank, t) for rank in range(size)), strict=True):
        total = parts[0][1].float()
        for _, part in parts[1:]:
            total = total + part.float()
        yield parts[0][0], (total * (1 / size)).to(parts[0][1].dtype)


def draw_with_inf(rank, t):
    """One step is not finite, on one worker, in a parameter that another one has."""
    for name, grad in draw(rank, t):
        yield name, torch.full_like(grad, torch.inf) if (rank, name, t) == (0, "b", 5) else grad


DRAWS = dict.fromkeys(OPTIMIZERS, draw) | {"clipped": draw_with_inf}


def set_averages(params, draw, t, size):
    for name, grad in averaged(draw, t, size):
        params[name].grad = grad


def go_back(params, grads):
    """A backward pass that leaves these gradients."""
    sum((params[name].double() * grad.double()).sum() for name, grad in grads).backward()


def host(params):
    return {name: param.detach().double().numpy() for name, param in params.items()}


@cache
def alone(name, size):
    """What the optimizer alone makes of the averaged gradients, in one thread as the workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # PyTorch's own sums depend on it, which LAMB asks for
    params = start()
    optimizer = OPTIMIZERS[name](groups(params))
    for t in range(STEPS):
        set_averages(params, DRAWS[name], t, size)
        optimizer.step()
    torch.set_num_threads(threads)
    return host(params)


def train_sharded(rank, size, by_messages):
    """What each optimizer ends with, in both stages."""
    exchange.LARGE = 1  # all memory in pages of its own
    if by_messages:
        workers.by_messages()
    ends = {}
    for name, make in OPTIMIZERS.items():
        for stage in (1, 2):
            params = start()
            optimizer = Sharded(make(groups(params)), stage=stage)
            for t in range(STEPS):
                if stage == 1:
                    set_averages(params, DRAWS[name], t, size)
                else:
                    go_back(params, DRAWS[name](rank, t))
                optimizer.step()
                assert all(param.grad is None for param in params.values())
            slots = [x for own in optimizer.state.values() for x in own.values() if x.dim()]
            ends[name, stage] = host(params), sum(x.nbytes for x in slots), optimizer.plan
    return ends


@cache
def sharded(size, by_messages):
    return workers.run(size, train_sharded, size, by_messages)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by_messages", [False, True], ids=["memory", "messages"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_bits_of_the_optimizer_alone(size, by_messages, name, stage):
    expected = alone(name, size)
    for rank, ends in enumerate(sharded(size, by_messages)):
        params, held, plan = ends[name, stage]
        for key, value in expected.items():
            assert_bits(params[key], value, f"{key} on rank {rank}")
        slots = {"momentum": 1, "clipped": 3}.get(name, 2)
        frozen = sum(s.length for s in plan.spans[rank] if s.tensor == len(SHAPES))
        assert held <= slots * (plan.shares[rank] - 4 * frozen) + 64
        if name != "lamb":  # whose "w" stays whole
            assert max(plan.shares) <= sum(plan.shares) / size + 4 * 16


@pytest.mark.parametrize("large", [1, 1 << 22])
def test_rooms_are_apart(large, monkeypatch):
    monkeypatch.setattr(exchange, "LARGE", large)
    likes = [torch.ones(shape, dtype=dtype_of(name)) for name, shape in SHAPES.items()]
    likes.append(torch.ones(3, 0, dtype=torch.float64))
    rooms = exchange.rooms(likes)
    for place, room in enumerate(rooms):
        room.fill_(place)
    for place, (room, like) in enumerate(zip(rooms, likes, strict=True)):
        assert (room.shape, room.dtype) == (like.shape, like.dtype)
        assert (room == place).all() and room.data_ptr() % 64 == 0
    assert exchange.rooms([]) == []


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3))


SAME = ("DDP", "DDP and stage 1", "DDP and stage 2", "stage 2", "stage 2, no_sync throughout")
MICRO = 2


def train_models(rank):
    """A model, trained in several ways that must all come to the same."""
    xs = torch.randn(6, MICRO, 4, 40, generator=torch.Generator().manual_seed(rank))
    ends = {}
    for way in (*SAME, "passes"):
        net = model()
        optimizer = portopt_torch.AdamW(net.parameters(), around=Around(clip_norm=0.01))
        ddp = partial(DistributedDataParallel, gradient_as_bucket_view=True)
        wrapped = ddp(net) if "DDP" in way else net
        if way == "DDP and stage 1":
            optimizer = Sharded(optimizer, distributed.init_device_mesh("cpu", (2,)))
        elif way == "DDP and stage 2":
            optimizer = Sharded(optimizer, stage=2, ddp=wrapped)
        elif way != "DDP":
            optimizer = Sharded(optimizer, distributed.group.WORLD, stage=2)
        quiet = wrapped.no_sync if "DDP" in way else optimizer.no_sync
        for batch in xs:
            optimizer.zero_grad()
            if way == "passes":
                for x in batch:
                    wrapped(x).square().mean().backward()
            else:
                with quiet():
                    wrapped(batch[0]).square().mean().backward()
                with quiet() if "throughout" in way else nullcontext():  # `step` exchanges, too
                    wrapped(batch[1]).square().mean().backward()
            optimizer.step()
        ends[way] = [param.detach().numpy() for param in net.parameters()]
    return ends


@pytest.fixture(scope="module")
def models():
    return workers.run(2, train_models)


@pytest.mark.parametrize("way", SAME[1:])
def test_every_way_trains_as_ddp_does(way, models):
    for ends in models:
        for param, expected in zip(ends[way], models[0]["DDP"], strict=True):
            assert_bits(param, expected, way)


def test_passes_that_each_exchange(models):
    """Averages of halves are added up, with another rounding than halves that are averaged."""
    for first, second, other in zip(
        models[0]["passes"], models[1]["passes"], models[0]["DDP"], strict=True
    ):
        assert_bits(first, second)
        torch.testing.assert_close(torch.tensor(first), torch.tensor(other))


def train_by_two_optimizers(rank, by_messages):
    """A model of which only one weight is of a sharded optimizer, in DDP, or of none."""
    if by_messages:
        workers.by_messages()
    xs = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(rank))
    ends = []
    for shard in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(27, 1)
        )
        net.to(memory_format=torch.channels_last)
        wrapped = DistributedDataParallel(net)
        optimizer = portopt_torch.SGD([net[2].weight], lr=0.1)
        rest = portopt_torch.SGD([*net[0].parameters(), net[2].bias], lr=0.1)
        if shard:
            optimizer = Sharded(optimizer, stage=2, ddp=wrapped)
        for x in xs:
            wrapped(x).square().mean().backward()
            for each in (optimizer, rest):
                each.step()
                each.zero_grad()
        ends.append([param.detach().numpy() for param in net.parameters()])
    return ends


@pytest.mark.parametrize("by_messages", [False, True], ids=["memory", "messages"])
def test_ddp_averages_what_is_another_optimizers(by_messages):
    for expected, actual in workers.run(2, train_by_two_optimizers, by_messages):
        for one, other in zip(actual, expected, strict=True):
            assert_bits(one, other)
