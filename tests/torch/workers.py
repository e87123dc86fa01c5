"""Workers of a process group: child processes that talk over loopback."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed

from portopt_torch import neighbours

SECONDS = 60
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "portopt_torch.sharded"])


def by_messages():
    """Let this process's optimizers not use the memory that all workers here can see."""
    neighbours._can_reach = lambda *_: False


class Dead:
    """What a worker returned that ended before it did."""


def run(size, work, *args, timeout=SECONDS):
    """What each worker's ``work(rank, *args)`` returns; `Dead` for one that was killed.

    A worker that has returned stays until all have, as one that ends is an error to the others.
    One that stops itself is killed when all others have returned.

    Args:
        size: The number of workers.
        work: What they do.
        args: What it is given, beside the rank.
        timeout: That of the process group, in seconds.

    Raises:
        AssertionError: one raised, with its traceback; or they have not ended in time.
    """
    pipes = [FORKS.Pipe() for _ in range(size)]
    with TemporaryDirectory() as folder:
        processes = [
            FORKS.Process(
                target=_child, args=(rank, size, folder, pipes[rank][1], timeout, work, args)
            )
            for rank in range(size)
        ]
        try:
            for process in processes:
                process.start()
            for _, end in pipes:
                end.close()
            results = _results(processes, [pipe for pipe, _ in pipes])
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [result for result in results if isinstance(result, str)]
    assert not failures, "\n".join(failures)
    return [result if result is Dead else result[0] for result in results]


def _results(processes, pipes):
    results = [None] * len(pipes)
    deadline = time.monotonic() + SECONDS
    while any(result is None for result in results):
        for rank, pipe in enumerate(pipes):
            if results[rank] is None and pipe.poll(0.02):
                try:
                    results[rank] = pipe.recv()
                except EOFError:
                    results[rank] = Dead
            elif results[rank] is None and _is_stopped(processes[rank].pid):
                results[rank] = Dead
        if any(isinstance(result, str) for result in results):
            deadline = min(deadline, time.monotonic() + 2)
        if time.monotonic() > deadline:
            return [r or f"rank {n} has not ended in {SECONDS} s" for n, r in enumerate(results)]
    return results


def _is_stopped(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _child(rank, size, folder, pipe, timeout, work, args):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        pipe.send((work(rank, *args),))
    except BaseException:
        pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
    pipe.close()
    time.sleep(SECONDS)  # until all are done
