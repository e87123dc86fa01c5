"""What the other workers do when one ends or stops in the middle of a step."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from bits import assert_bits
from torch import distributed

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import workers
from torch.nn.parallel import DistributedDataParallel

import portopt_torch
from portopt import Around
from portopt_torch import Sharded, WorkerError, collectives, exchange
from portopt_torch.neighbours import Neighbours

pytestmark = pytest.mark.distributed

SIZE, VICTIM = 3, 2
TIMEOUT = 2.0
PHASES = {
    "gradients": "exchange of gradients",
    "update": "exchange of parameters",
    "parameters": "exchange of parameters",
    "commit": "exchange of parameters",
}


def fail_in(phase, optimizer, how):
    """Let this process end, or stop, where it has received some of what it should."""

    def now(*_):
        os.kill(os.getpid(), how)
        time.sleep(workers.SECONDS)  # another thread may be told to stop before this one

    if phase == "update":
        optimizer._local.step = now
        return
    exchange = optimizer.collectives
    method = "reduce_scatter" if phase == "gradients" else "all_gather"
    if isinstance(exchange, Neighbours):
        place = exchange, "_say" if phase == "commit" else "_read", 2
    elif phase == "commit":
        place = exchange, "all_reduce", 1
    else:
        place = collectives.distributed, "batch_isend_irecv", 2
    run = getattr(exchange, method)

    def then_fail(*args):
        fail_at(*place, now)
        return run(*args)

    setattr(exchange, method, then_fail)


def fail_at(owner, name, number, now):
    """Fail where a function is called for the first, second, ... time from now."""
    function, calls = getattr(owner, name), []

    def counted(*args):
        calls.append(args)
        if len(calls) == number:
            now()
        return function(*args)

    setattr(owner, name, counted)


def train(rank, phase, how, by_messages):
    if by_messages:
        workers.by_messages()
    # Large enough for several messages of each worker.
    params = [torch.nn.Parameter(torch.ones(300, 300)) for _ in range(9)]
    optimizer = Sharded(portopt_torch.Adam(params, lr=0.1), stage=2, timeout=TIMEOUT)
    assert isinstance(optimizer.collectives, Neighbours) is not by_messages
    for step in range(3):
        before = [param.detach().clone() for param in params]
        if rank == VICTIM and step == 2:
            fail_in(phase, optimizer, how)
        start = time.monotonic()
        try:
            sum((param * (rank + 1)).sum() for param in params).backward()
            optimizer.step()
        except WorkerError as error:
            assert step == 2
            kept = all(map(torch.equal, before, params))
            with pytest.raises(RuntimeError, match="load a checkpoint") as refusal:
                optimizer.step()
            return str(error), time.monotonic() - start, kept, str(refusal.value)
    return "nothing", 0.0, False, ""


@pytest.mark.parametrize("by_messages", [False, True], ids=["memory", "messages"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("phase", PHASES)
def test_the_others_say_so_and_keep_their_parameters(phase, how, by_messages):
    *survivors, victim = workers.run(SIZE, train, phase, how, by_messages)
    assert victim is workers.Dead
    for error, seconds, kept, _ in survivors:
        assert error.startswith(PHASES[phase]) and "timeout of 2 s" in error, error
        assert "go on from a checkpoint" in error
        assert kept
        assert seconds < 3 * TIMEOUT  # the process group's own is a minute


def make(stage=1, timeout=300.0, **options):
    weight = torch.nn.Parameter(torch.ones(9, 4))
    optimizer = portopt_torch.SGD([weight], lr=0.5, **options)
    return weight, Sharded(optimizer, stage=stage, timeout=timeout)


def meet_a_sparse_gradient(rank, stage):
    weight, optimizer = make(stage)
    for step in range(2):
        optimizer.zero_grad()
        rows = torch.nn.functional.embedding(
            torch.tensor([1]), weight, sparse=rank == 0 and step == 0
        )
        rows.sum().backward()
        if step == 0:
            with pytest.raises(RuntimeError, match="must not be sparse"):
                optimizer.step()
            assert (weight == 1).all()
    optimizer.step()
    return weight.sum().item()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_sparse_gradient_on_one_worker_is_refused_by_all(stage):
    assert workers.run(2, meet_a_sparse_gradient, stage) == [36 - 0.5 * 4] * 2


def be_interrupted(rank):
    weight, optimizer = make(timeout=TIMEOUT)

    def interrupt():
        raise KeyboardInterrupt

    if rank == 0:
        optimizer._local.step = interrupt
    weight.grad = torch.ones_like(weight)
    with pytest.raises(WorkerError if rank else KeyboardInterrupt):
        optimizer.step()
    with pytest.raises(WorkerError, match=r"load a checkpoint .*it was") as refusal:
        optimizer.step()
    return str(refusal.value), (weight == 1).all().item()


def test_one_that_is_interrupted_goes_on_no_more_than_the_others():
    (own, kept), (others, kept_too) = workers.run(2, be_interrupted)
    assert kept and kept_too
    assert own.endswith("KeyboardInterrupt: ") and "it does not answer" in others


def clip_on_one(rank):
    weight, optimizer = make(around=Around(clip_norm=1.0) if rank else None)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(WorkerError, match="takes part in another exchange"):
        optimizer.step()
    return (weight == 1).all().item()


def test_workers_that_do_different_things():
    assert workers.run(2, clip_on_one) == [True, True]


def end_beside_ddp(rank):
    net = DistributedDataParallel(torch.nn.Linear(50, 50))
    optimizer = portopt_torch.SGD(net.parameters(), lr=0.1)
    optimizer = Sharded(optimizer, stage=2, ddp=net, timeout=TIMEOUT)
    for _ in range(2):  # after which DDP asks nothing more of the others itself
        net(torch.ones(2, 50)).sum().backward()
        optimizer.step()
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    net(torch.ones(2, 50)).sum().backward()
    with pytest.raises(WorkerError, match="exchange of gradients with rank 1"):
        optimizer.step()


def test_with_ddp_the_step_says_it():
    assert workers.run(2, end_beside_ddp) == [None, workers.Dead]


def train_but_for_one_batch(rank, by_messages):
    """What is left by steps of which one is left out, and by those where its gradient fails."""
    exchange.BUCKET = 1  # one for each parameter
    if by_messages:
        workers.by_messages()
    xs = torch.randn(4, 8, 50, generator=torch.Generator().manual_seed(rank))

    def fail(_):
        raise MemoryError

    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(50, 50) for _ in range(3)))
        optimizer = Sharded(portopt_torch.SGD(net.parameters()), stage=2)
        for batch, x in enumerate(xs):
            if batch != 1:
                net(x).square().mean().backward()
                optimizer.step()
            elif fails:
                middle = net[0](x)
                if rank == 0:
                    middle.register_hook(fail)
                try:
                    net[1:](middle).square().mean().backward()
                except MemoryError:
                    assert rank == 0
                optimizer.zero_grad()
        ends.append([param.detach().numpy() for param in net.parameters()])
    return ends


@pytest.mark.parametrize("by_messages", [False, True], ids=["memory", "messages"])
def test_a_backward_pass_that_fails_is_left_out(by_messages):
    for expected, actual in workers.run(2, train_but_for_one_batch, by_messages):
        for one, other in zip(actual, expected, strict=True):
            assert_bits(one, other)
