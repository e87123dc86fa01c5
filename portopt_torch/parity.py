"""The part of ``portopt parity`` that runs in PyTorch: ``python -m portopt_torch.parity SPEC``."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from portopt.parity import Arrays, Case, Twin, answer, problem
from portopt.rules import Rule
from portopt_torch.from_rule import from_rule


def run(
    optimizer_class: type[torch.optim.Optimizer],
    arguments: Any,
    dtype: str,
    shape: tuple[int, ...],
) -> Arrays:
    """The parameters and slots after `portopt.parity.problem`."""
    start, grads = problem(dtype, shape)
    params = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in start.items()}
    optimizer = optimizer_class(params.values(), **arguments)
    for grad in grads:
        for name, param in params.items():
            param.grad = torch.from_numpy(grad[name])
        optimizer.step()
    slots = {
        f"{slot} of {name}": value.numpy()
        for name, param in params.items()
        for slot, value in optimizer.state[param].items()
        if value.ndim
    }
    return {name: param.detach().numpy() for name, param in params.items()} | slots


def native(twin: Twin, dtype: str, shape: tuple[int, ...]) -> Arrays:
    """A run of the native optimizer."""
    return run(getattr(torch.optim, twin[0]), twin[1], dtype, shape)


def ours(rule: Rule) -> Arrays:
    """A run of the rule."""
    return run(from_rule(rule), {}, "float32", Case(rule).shape)


if __name__ == "__main__":
    answer("torch", native, ours, json.loads(sys.argv[1])["path"])
