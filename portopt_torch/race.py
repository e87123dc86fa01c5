"""The part of ``portopt race`` that runs in PyTorch: ``python -m portopt_torch.race SPEC``."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from portopt.race import Step, answer
from portopt.rules import Rule
from portopt_torch.from_rule import from_rule


def begin(rule: Rule, start: Any) -> Step:
    """Steps of `from_rule` on a float64 parameter."""
    param = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = from_rule(rule)([param])

    def step(grad: Any) -> Any:
        param.grad = torch.from_numpy(grad)
        optimizer.step()
        return param.detach().numpy()

    return step


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]), begin)
