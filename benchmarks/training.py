"""Times optimizer steps where they are taken: behind the backward passes of three small networks.

    python benchmarks/training.py [folder]

Writes ``training.json`` to the folder and prints a table. Each optimizer trains a network of its
own, all in turn; a time is the median of the second steps of the turns. The native is the fastest
of `torch.optim`'s modes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import portopt_torch

TURNS = 40
OPTIMIZERS: dict[str, dict[str, Any]] = {"SGD": {}, "AdamW": {}, "RMSprop": {}}
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def wide() -> tuple[nn.Module, Tensor]:
    """Four dense layers, 12.6M weights."""
    layers = [layer for _ in range(3) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10)), torch.randn(32, 2048)


def deep() -> tuple[nn.Module, Tensor]:
    """300 dense layers of 32 units, 602 tensors."""
    layers = [layer for _ in range(300) for layer in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 10)), torch.randn(64, 32)


def convolutional() -> tuple[nn.Module, Tensor]:
    """Nine convolutions, 0.3M weights."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    for _ in range(8):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers), torch.randn(8, 3, 32, 32)


class Run(NamedTuple):
    """A network in training, and the times of its steps."""

    network: nn.Module
    inputs: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer
    times: list[float]

    def step(self) -> float:
        """Train on the batch; how long the optimizer's step took."""
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.network(self.inputs), self.labels).backward()
        began = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - began


def compare(make: Callable[[], tuple[nn.Module, Tensor]], name: str) -> dict[str, Any]:
    """Ours and every mode that the native has, on one kind of network."""

    def run(optimizer: Any, **flags: Any) -> Run:
        torch.manual_seed(0)
        network, inputs = make()
        labels = torch.randint(10, (len(inputs),))
        own = optimizer(network.parameters(), lr=1e-4, **OPTIMIZERS[name], **flags)
        return Run(network, inputs, labels, own, [])

    runs = {"portopt": run(getattr(portopt_torch, name))}
    native = getattr(torch.optim, name)
    for mode, flags in MODES.items():
        try:
            runs[mode] = run(native, **flags)
        except TypeError:  # it has no such mode
            continue
    for turn in range(TURNS):
        for each in runs.values():
            each.step()  # which follows another network
            if turn >= 3:
                each.times.append(each.step())
    milliseconds = {mode: 1e3 * statistics.median(own.times) for mode, own in runs.items()}
    ours = milliseconds["portopt"]
    best = min(own for mode, own in milliseconds.items() if mode != "portopt")
    return {
        "network": make.__name__,
        "optimizer": name,
        "milliseconds": milliseconds,
        "ratio": ours / best,
    }


def main() -> None:
    """Measure, print and write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    rows = []
    for make in (wide, deep, convolutional):
        for name in OPTIMIZERS:
            rows.append(compare(make, name))
            times = ", ".join(f"{mode} {ms:.2f}" for mode, ms in rows[-1]["milliseconds"].items())
            print(f"{make.__name__:13} {name:8} ratio {rows[-1]['ratio']:.2f}   ms: {times}")
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "steps": rows}
    (folder / "training.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
