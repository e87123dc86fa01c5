"""What the other workers do when one ends or stops in the middle of a step."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import distributed

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import workers

import portopt_torch
from portopt_torch import Sharded, WorkerError, collectives

pytestmark = pytest.mark.distributed

SIZE, VICTIM = 3, 2
TIMEOUT = 2.0
PHASES = {
    "gradients": "exchange of gradients",
    "update": "exchange of parameters",
    "parameters": "exchange of parameters",
    "commit": "agreement of all workers",
}


def fail_in(phase, optimizer, how):
    """Let this process end, or stop, where it has sent and received some of what it should."""

    def now(*_):
        os.kill(os.getpid(), how)
        time.sleep(workers.SECONDS)  # another thread may be told to stop before this one

    exchange = optimizer.collectives
    if phase == "update":
        optimizer._local.step = now
        return
    if phase == "commit":
        exchange.barrier = now
        return
    name = {"gradients": "reduce_scatter", "parameters": "all_gather"}[phase]
    method, send = getattr(exchange, name), collectives.distributed.batch_isend_irecv
    calls = []

    def send_some(operations):
        calls.append(operations)
        works = send(operations)
        if len(calls) == 2:
            time.sleep(0.2)  # until they have arrived
            now()
        return works

    def then_fail(*args):
        collectives.distributed.batch_isend_irecv = send_some
        return method(*args)

    setattr(exchange, name, then_fail)


def train(rank, phase, how):
    # Large enough for several messages of each worker.
    params = [torch.nn.Parameter(torch.ones(300, 300)) for _ in range(9)]
    optimizer = Sharded(portopt_torch.Adam(params, lr=0.1), stage=2, timeout=TIMEOUT)
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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("phase", PHASES)
def test_the_others_say_so_and_keep_their_parameters(phase, how):
    *survivors, victim = workers.run(SIZE, train, phase, how)
    assert victim is workers.Dead
    for error, seconds, kept, _ in survivors:
        assert error.startswith(PHASES[phase]) and "timeout of 2 s" in error, error
        assert "go on from a checkpoint" in error
        assert kept
        assert seconds < 3 * TIMEOUT  # the process group's own is a minute
