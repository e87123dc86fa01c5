"""Times training of two processes: `portopt_torch.Sharded` against ``ZeroRedundancyOptimizer``.

    python benchmarks/sharding.py [folder]

Writes ``sharding.json`` to the folder and prints a table. Both processes talk over gloo on
loopback, one thread each. A time is a median over rounds in which all contestants take turns, of
rank 0, from a barrier to the end of the step; of a step, "communication" is the exchange of
parameters and "update" is the rest.
"sent" is what `Sharded` has sent, beside the least that a ring needs for the same.

Memory is that of fresh processes for each contestant: the peak over three iterations, less what
there was before the model; the larger one of both.

ZeroRedundancyOptimizer has its fastest setting here: ``fused=True`` inside, and
``parameters_as_bucket_view=True``. PyTorch's memory comes in large pages, which makes every
contestant faster (``THP_MEM_ALLOC_ENABLE=1``; set it to 0 to see them without). All models are in
``DistributedDataParallel`` with ``gradient_as_bucket_view=True``, except for stage 2 without it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import portopt_torch

# ruff: noqa: D102, D103

WORLD = 2
ROUNDS = 25
LR = 1e-6
VOCABULARY, WIDTH = 50257, 256


class GPT(nn.Module):
    """17.9 million parameters, of which the embedding has 72 %."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layers(self.embed(tokens))
        logits = hidden @ self.embed.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Embedding(nn.Module):
    """16 million parameters, of which one embedding has 80 %."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(49)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embed(tokens)).square().mean()


class Small(nn.Module):
    """300 matrices of 64x64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(300)))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = nn.functional.one_hot(tokens.flatten() % 64, 64).float()
        return self.layers(rows).square().mean()


MODELS = {"gpt": GPT, "embedding": Embedding, "small": Small}


def in_ddp(model: nn.Module) -> DistributedDataParallel:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def peer(model: nn.Module) -> tuple[nn.Module, Any]:
    wrapped = in_ddp(model)
    return wrapped, ZeroRedundancyOptimizer(
        wrapped.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=LR, fused=True
    )


def unsharded(model: nn.Module) -> tuple[nn.Module, Any]:
    wrapped = in_ddp(model)
    return wrapped, portopt_torch.AdamW(wrapped.parameters(), lr=LR)


def stage_1(model: nn.Module) -> tuple[nn.Module, Any]:
    wrapped = in_ddp(model)
    return wrapped, portopt_torch.Sharded(portopt_torch.AdamW(wrapped.parameters(), lr=LR))


def stage_2(model: nn.Module) -> tuple[nn.Module, Any]:
    return model, portopt_torch.Sharded(portopt_torch.AdamW(model.parameters(), lr=LR), stage=2)


def stage_2_in_ddp(model: nn.Module) -> tuple[nn.Module, Any]:
    wrapped = in_ddp(model)
    inner = portopt_torch.AdamW(wrapped.parameters(), lr=LR)
    return wrapped, portopt_torch.Sharded(inner, stage=2, ddp=wrapped)


PEER = "ZeroRedundancyOptimizer"
CONTESTANTS = {
    PEER: peer,
    "unsharded": unsharded,
    "stage 1": stage_1,
    "stage 2": stage_2,
    "stage 2 in DDP": stage_2_in_ddp,
}


class Training:
    """A model and its optimizer, and what an iteration takes."""

    def __init__(self, model: nn.Module, make: Callable[..., Any], rank: int) -> None:
        self.model, self.optimizer = make(model)
        self.times: dict[str, list[float]] = defaultdict(list)
        generator = torch.Generator().manual_seed(rank)
        self.tokens = torch.randint(VOCABULARY, (1, 32), generator=generator)
        self.exchanged = 0.0
        for owner, name in (
            (self.optimizer, "_sync_params"),
            (getattr(self.optimizer, "collectives", None), "all_gather"),
        ):
            if hasattr(owner, name):
                setattr(owner, name, self.timed(getattr(owner, name)))

    def timed(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            result = exchange(*args)
            self.exchanged += time.perf_counter() - start
            return result

        return run

    def run(self) -> None:
        distributed.barrier()
        self.exchanged = 0.0
        start = time.perf_counter()
        self.model(self.tokens).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        self.times["forward and backward"].append(middle - start)
        self.times["update"].append(end - middle - self.exchanged)
        self.times["communication"].append(self.exchanged)
        self.times["iteration"].append(end - start)


def begin(rank: int, rendezvous: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )


def end() -> None:
    # Gloo's threads take a moment to let go of the last tensors. One that is not done with it when
    # Python ends aborts the process (PyTorch 2.13).
    time.sleep(0.3)
    distributed.destroy_process_group()


def measure_times(rank: int, rendezvous: str, name: str, out: str) -> None:
    begin(rank, rendezvous)
    trainings = {key: Training(MODELS[name](), make, rank) for key, make in CONTESTANTS.items()}
    for _ in range(3):  # kernels are compiled, DDP's buckets made
        for training in trainings.values():
            training.run()
    for training in trainings.values():
        training.times.clear()
    sent = {key: getattr(t.optimizer, "collectives", None) for key, t in trainings.items()}
    before = {key: each.sent for key, each in sent.items() if each}
    for _ in range(ROUNDS):
        for training in trainings.values():
            training.run()
    result: dict[str, Any] = {
        key: {part: statistics.median(times) for part, times in training.times.items()}
        for key, training in trainings.items()
    }
    size = sum(p.nbytes for p in trainings["stage 1"].model.parameters())
    for key, start in before.items():
        passes = 1 if key == "stage 1" else 2  # DDP's own pass is not counted
        result[key] |= {
            "sent": (sent[key].sent - start) // ROUNDS,
            "ring minimum": passes * size * (WORLD - 1) // WORLD,
        }
    if rank == 0:
        Path(out).write_text(json.dumps(result))
    end()


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_memory(rank: int, rendezvous: str, name: str, out: str, contestant: str) -> None:
    begin(rank, rendezvous)
    # What libraries load at first use is not to count.
    tiny = Training(nn.Sequential(nn.Flatten(0), _Tiny()), CONTESTANTS[contestant], rank)
    tiny.run()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    training = Training(MODELS[name](), CONTESTANTS[contestant], rank)
    for _ in range(3):
        training.run()
    peak = [None] * WORLD
    distributed.all_gather_object(peak, status("VmHWM") - before)
    if rank == 0:
        Path(out).write_text(json.dumps(max(peak)))
    end()


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens.float()).square().mean()


def together(work: Callable[..., None], *args: Any) -> Any:
    """What two processes have written."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        torch.multiprocessing.spawn(
            work, (f"{folder}/rendezvous", args[0], out, *args[1:]), nprocs=WORLD
        )
        return json.loads(Path(out).read_text())


def main(folder: str = ".") -> None:
    results: dict[str, Any] = {}
    print(f"{'':34}{'iteration':>10} {'of peer':>8} {'update':>8} {'comm.':>8} {'peak':>8}")
    for name in MODELS:
        results[name] = together(measure_times, name)
        slowest = results[name][PEER]["iteration"]
        for contestant, own in results[name].items():
            own["peak memory"] = together(measure_memory, name, contestant)
            print(
                f"{name:10}{contestant:24}{own['iteration'] * 1e3:7.1f} ms "
                f"{own['iteration'] / slowest:8.2f} {own['update'] * 1e3:5.1f} ms "
                f"{own['communication'] * 1e3:5.1f} ms {own['peak memory'] / 1e6:5.0f} MB",
                flush=True,
            )
    Path(folder, "sharding.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
