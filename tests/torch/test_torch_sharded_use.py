"""`Sharded` where a ``torch.optim.Optimizer`` is expected, and what it refuses."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import workers
from bits import assert_bits
from torch import distributed
from torch.optim.lr_scheduler import StepLR

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import portopt_torch
from portopt import Around
from portopt_torch import Sharded


def make(stage, cls="AdamW", **options):
    """A model of two groups, whose last layer is frozen, and its optimizer."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(20, 30), torch.nn.Linear(30, 9), torch.nn.Linear(9, 5)
    )
    net[2].requires_grad_(False)
    groups = [{"params": net[0].parameters(), "lr": 0.05}, {"params": net[2].parameters()}]
    optimizer = portopt_torch.get(cls)(groups, lr=0.1, **options)
    return net, Sharded(optimizer, stage=stage) if stage else optimizer


def train(net, optimizer):
    """Steps with a scheduler, a hook, a group added later, and parameters frozen until later."""
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(len(optimizer.state)))
    schedule = StepLR(optimizer, 2, gamma=0.5)
    for t in range(8):
        if t == 2:
            optimizer.add_param_group({"params": net[1].parameters(), "weight_decay": 0.1})
        if t == 4:
            net[2].requires_grad_(True)
        optimizer.zero_grad()
        x = torch.linspace(-1, 1, 80).reshape(4, 20) * (t + 1)
        loss = optimizer.step(lambda x=x: back(net(x).square().mean()))
        assert torch.is_tensor(loss)
        schedule.step()
    assert len(seen) == 8
    return [param.detach().numpy() for param in net.parameters()]


def back(loss):
    loss.backward()
    return loss


def use_at_two(rank):
    return {
        (name, stage): train(*make(stage, name))
        for name in ("AdamW", "Adagrad", "SGD")
        for stage in (1, 2)
    }


@pytest.mark.distributed
def test_it_is_used_as_the_optimizer_alone_is():
    for ends in workers.run(2, use_at_two):
        for (name, stage), params in ends.items():
            for param, expected in zip(params, train(*make(None, name)), strict=True):
                assert_bits(param, expected, f"{name} in stage {stage}")


def thaw_on_one(rank):
    weight, frozen = torch.nn.Parameter(torch.ones(40)), torch.nn.Parameter(torch.ones(40))
    frozen.requires_grad_(False)
    optimizer = Sharded(portopt_torch.SGD([weight, frozen], lr=0.5), stage=2)
    frozen.requires_grad_(rank == 0)
    for _ in range(3):
        optimizer.zero_grad()
        (weight + frozen).sum().backward()
        optimizer.step()
    return weight.unique().tolist(), frozen.unique().tolist()


@pytest.mark.distributed
def test_one_that_is_thawed_on_one_worker_has_no_gradient_on_the_other():
    assert workers.run(2, thaw_on_one) == [([1 - 3 * 0.5], [1 - 3 * 0.5 / 2])] * 2


MODES = portopt_torch.get("schedulefreeadamw")


def switch_at_two(rank):
    return switch(True)


def switch(shard):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(50, 3))
    optimizer = MODES([param], lr=0.1)
    optimizer = Sharded(optimizer) if shard else optimizer
    seen = []
    for t in range(4):
        param.grad = param.detach() + t
        optimizer.step()
        optimizer.eval()
        seen.append(param.detach().clone().numpy())
        with pytest.raises(RuntimeError, match="call train"):
            param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.train()
        seen.append(param.detach().clone().numpy())
    return seen


@pytest.mark.distributed
def test_weights_to_evaluate_are_those_of_all_workers():
    for seen in workers.run(2, switch_at_two):
        for actual, expected in zip(seen, switch(False), strict=True):
            assert_bits(actual, expected)


@pytest.fixture
def group():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def param(shape=(3, 2), **options):
    return torch.nn.Parameter(torch.ones(shape, **options))


BAD = {
    "native": (lambda: Sharded(torch.optim.Adam([param()])), TypeError, "optimizer must be one of"),
    "stage": (lambda: Sharded(portopt_torch.Adam([param()]), stage=3), ValueError, "stage must be"),
    "timeout": (
        lambda: Sharded(portopt_torch.Adam([param()]), timeout=0),
        ValueError,
        "timeout must",
    ),
    "gaps": (
        lambda: Sharded(portopt_torch.Adam([torch.nn.Parameter(torch.ones(3, 2).T)])),
        ValueError,
        r"contiguous, one of shape \(2, 3\)",
    ),
    "complex": (
        lambda: Sharded(portopt_torch.Adam([param(dtype=torch.complex64)])),
        TypeError,
        "real floats",
    ),
    "differentiable": (
        lambda: Sharded(portopt_torch.Adam([param()], differentiable=True)),
        ValueError,
        "differentiable must be False",
    ),
    "no_sync": (
        lambda: Sharded(portopt_torch.Adam([param()])).no_sync().__enter__(),
        RuntimeError,
        "no_sync is stage 2's",
    ),
}


@pytest.mark.parametrize(("make", "kind", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(make, kind, words, group):
    with pytest.raises(kind, match=words):
        make()


def test_state_that_does_not_fit(group):
    weight = param()
    optimizer = Sharded(portopt_torch.Adam([weight], lr=0.1))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    assert {*state["state"][0]} == {"step", "exp_avg", "exp_avg_sq"}
    for bad, words in (
        ({**state, "param_groups": []}, "groups of another number"),
        ({**state, "state": {0: {"step": 1.0}}}, "has no tensor 'exp_avg'"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(bad)
    assert optimizer.state[weight]["step"] == 1


def test_gradients_are_zeroed_or_dropped(group):
    for around, expected in ((Around(), None), (Around(zero_grad=True), 0.0)):
        weight = param()
        optimizer = Sharded(portopt_torch.Adam([weight], lr=0.1, around=around))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert (weight.grad is None) == (expected is None)
        assert expected is None or not weight.grad.any()


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_without_gradients_changes_nothing(stage, zero_grad, group):
    weight, frozen = param(), param()
    frozen.requires_grad_(False)
    optimizer = portopt_torch.SGD([weight, frozen], lr=0.5, around=Around(zero_grad=zero_grad))
    optimizer = Sharded(optimizer, stage=stage)
    optimizer.step()
    assert (weight == 1).all() and not optimizer.state
    (2 * weight).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert (weight == 0).all() and (frozen == 1).all()


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("group", "no_collector")
@pytest.mark.parametrize("stage", [1, 2])
def test_one_that_is_deleted_is_gone(stage):
    weight = param()
    for _ in range(2):
        optimizer = Sharded(portopt_torch.SGD([weight], lr=0.25), stage=stage)
        weight.sum().backward()
        optimizer.step()
        seen = weakref.ref(optimizer)
        del optimizer
        assert seen() is None
    weight.sum().backward()
    assert (weight.grad == 1).all() and (weight == 0.5).all()


def test_two_for_one_parameter(group):
    weight = param()
    first, second = (Sharded(portopt_torch.SGD([weight], lr=0.5), stage=2) for _ in range(2))
    with pytest.raises(RuntimeError, match="gone to another Sharded"):
        weight.sum().backward()
    del first
    second.zero_grad()
    weight.sum().backward()
    second.step()
    assert (weight == 0.5).all()


def differ(rank):
    with pytest.raises(ValueError, match="params must be the same on all workers"):
        Sharded(portopt_torch.Adam([param((3, 2 + rank))]))
    weight = param()
    optimizer = Sharded(portopt_torch.Adam([weight]))
    weight.grad = torch.ones_like(weight) if rank else None
    with pytest.raises(ValueError, match=r"has one on 1 of 2"):
        optimizer.step()
    return weight.detach().tolist()


@pytest.mark.distributed
def test_workers_that_differ():
    assert workers.run(2, differ) == [[[1.0, 1.0]] * 3] * 2


def refuse_a_group(rank):
    weight, late, same = param(), param(), param()
    optimizer = Sharded(portopt_torch.Adam([weight], lr=0.5))
    if rank == 0:
        late = torch.nn.Parameter(torch.ones(2, 3).T)
    words = "contiguous" if rank == 0 else "are not by 0: ValueError: a parameter must be contig"
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == len(optimizer._whole.param_groups) == 1
    optimizer.add_param_group({"params": [same]})
    for each in (weight, same):
        each.grad = torch.ones_like(each)
    optimizer.step()
    return weight.detach().tolist(), same.detach().tolist()


@pytest.mark.distributed
def test_a_group_that_one_worker_refuses_leaves_no_trace():
    moved = [[0.5, 0.5]] * 3
    for ends in workers.run(2, refuse_a_group):
        torch.testing.assert_close(torch.tensor(ends), torch.tensor([moved, moved]))


def pass_twice(rank):
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net = DistributedDataParallel(torch.nn.Linear(20, 3))
    start = [param.detach().clone() for param in net.parameters()]
    optimizer = Sharded(portopt_torch.SGD(net.parameters(), lr=0.5), stage=2, ddp=net)
    for _ in range(2):
        net(torch.ones(2, 20) + rank).sum().backward()
    with pytest.raises(RuntimeError, match="one backward pass may exchange between two steps"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), start))
    optimizer.zero_grad()
    with net.no_sync():
        net(torch.ones(2, 20) + rank).sum().backward()
    net(torch.ones(2, 20) + rank).sum().backward()
    optimizer.step()
    return [
        float((now - then).abs().max()) for now, then in zip(net.parameters(), start, strict=True)
    ]


@pytest.mark.distributed
def test_with_ddp_one_pass_exchanges():
    """Others would add to gradients of which a part is averaged, and the rest is not."""
    for moved in workers.run(2, pass_twice):
        assert moved == pytest.approx([0.5 * 2 * 2 * 1.5, 0.5 * 2 * 2])


def test_copies_are_refused(group):
    optimizer = Sharded(portopt_torch.Adam([param()]))
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="Sharded cannot be copied or pickled"):
            copied(optimizer)


def test_slots_turned_on_are_in_the_state_that_hooks_see(group):
    weight = param()
    optimizer, seen = Sharded(portopt_torch.SGD([weight], lr=0.5, momentum=0.9)), []
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.around = Around(ema_decay=0.9)
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["state"][0].keys()))
    for state in (optimizer.state_dict(), optimizer.consolidated_state_dict()):
        assert {*state["state"][0]} == {"momentum_buffer", "param_ema"}
    assert {*seen[0]} == {"momentum_buffer", "param_ema"}
    assert {*optimizer.state[weight]} == {"momentum_buffer"}


def test_a_compiled_step(group, monkeypatch):
    ends = []
    for backend in (None, "eager"):
        weight = param()
        optimizer = Sharded(portopt_torch.AdamW([weight], lr=0.5))
        step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            step()
        ends.append(weight.detach().numpy())
    torch._dynamo.reset()
    assert_bits(*ends)
