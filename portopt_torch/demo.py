"""The part of ``portopt demo`` that runs in PyTorch: ``python -m portopt_torch.demo SPEC``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

import portopt_torch
from portopt.demo import Progress, Run, Task, answer
from portopt.parity import Case


def train(case: Case, task: Task, progress: Progress) -> Iterator[Run]:
    """Train with the rule, the drop-in class, and the native optimizer."""
    torch.set_num_threads(1)  # more only wait for each other on matrices this small
    name, arguments = case.torch
    rule_name = type(case.rule).__name__
    for label, role, make in (
        (f"from_rule({rule_name})", "rule", lambda p: portopt_torch.from_rule(case.rule)(p)),
        (
            f"portopt_torch.{name}",
            "drop-in",
            lambda p: getattr(portopt_torch, name)(p, **arguments),
        ),
        (f"torch.optim.{name}", "native", lambda p: getattr(torch.optim, name)(p, **arguments)),
    ):
        run = Run("PyTorch", label, role)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
        with torch.no_grad():
            for param, value in zip(model.parameters(), task.weights.values(), strict=True):
                param.copy_(torch.from_numpy(value))
        optimizer = make(model.parameters())
        began = time.perf_counter()
        for epoch in range(1, task.epochs + 1):
            for x, y in task.batches(epoch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y))
                loss.backward()
                optimizer.step()
                run.losses.append(loss.item())
            progress(f"{run.framework}, {run.optimizer}", epoch, run.losses[-1])
        run.seconds = time.perf_counter() - began
        right = model(torch.from_numpy(task.x_test)).argmax(dim=1).numpy() == task.y_test
        run.accuracy = float(right.mean())
        yield run


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]), train)
