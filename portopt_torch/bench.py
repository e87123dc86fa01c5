"""The part of ``portopt bench`` that runs in PyTorch: ``python -m portopt_torch.bench SPEC``."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import portopt
import portopt_torch
from portopt.bench import OURS, RULES, TAILS, Case, Contender, Step, answer

SMALL = "1000x32x32"
MODES = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SCALE, NORM, DECAY = 1024.0, 1.0, 0.999


def contenders(case: Case) -> list[Contender]:
    """The paths of a case."""
    # PyTorch loads a large part of itself with the first optimizer of any kind.
    torch.optim.SGD([torch.zeros(1)])
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in case.shapes]
    grads = [torch.randn(shape) for shape in case.shapes]
    if case.rule in TAILS:
        return tails(params, grads, zeroed=TAILS[case.rule])
    return paths(case, params, grads)


def paths(case: Case, params: list[Tensor], grads: list[Tensor]) -> list[Contender]:
    """Ours and every mode of the native on the same parameters, gradients and state."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    state: dict[Tensor, Any] = defaultdict(dict)  # one for all: there is no room for more of GPT-2

    def path(optimizer_class: Any, compiled: bool = False, **arguments: Any) -> Callable[[], Step]:
        def make() -> Step:
            optimizer = optimizer_class(params, **arguments)
            optimizer.state = state
            return torch.compile(optimizer.step) if compiled else optimizer.step

        return make

    contest = RULES[case.rule]
    if contest.torch is None:
        made = {OURS: path(portopt_torch.from_rule(contest.rule))}
    else:
        name, arguments = contest.torch
        native = getattr(torch.optim, name)
        made = {OURS: path(getattr(portopt_torch, name), **arguments)}
        made |= {
            mode: path(native, **arguments, **flags)
            for mode, flags in MODES.items()
            if flags.keys() <= inspect.signature(native).parameters.keys()
        }
        if case.compiled and shutil.which(os.environ.get("CXX", "g++")):
            made["compiled"] = path(native, compiled=True, **arguments)
    found = [Contender("step", title, make, wake) for title, make in made.items()]
    if case.mix == SMALL:  # a model of such tensors alone may never wake them
        found += [Contender("asleep", title, make) for title, make in made.items()]
    return found


def wake() -> None:
    """Have PyTorch's threads do something, as a backward pass does.

    For some milliseconds after that they look for more, and share the processors with whoever else
    is at work.
    """
    _numbers.add_(1.0)


_numbers = torch.zeros(1 << 20)


def tails(params: list[Tensor], scaled: list[Tensor], *, zeroed: bool) -> list[Contender]:
    """The whole tail of a training step: ours in one pass, the native's as users write it.

    At its end the gradients are zeros, or given up, as `torch.optim.Optimizer.zero_grad` does.
    """
    name, arguments = RULES["tail"].torch
    grads = [torch.empty_like(grad) for grad in scaled]
    average = [param.detach().clone() for param in params]
    state: dict[Tensor, Any] = defaultdict(dict)
    torch._foreach_mul_(scaled, SCALE)

    def backward() -> None:
        torch._foreach_copy_(grads, scaled)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        wake()

    def ours() -> Step:
        around = portopt.Around(grad_scale=SCALE, clip_norm=NORM, ema_decay=DECAY, zero_grad=zeroed)
        optimizer = getattr(portopt_torch, name)(params, **arguments, around=around)
        optimizer.state = state

        def step() -> None:
            optimizer.step()
            optimizer.zero_grad()

        return optimizer.step if zeroed else step

    def native(**flags: bool) -> Callable[[], Step]:
        def make() -> Step:
            optimizer = getattr(torch.optim, name)(params, **arguments, **flags)
            optimizer.state = state
            weights = [param.detach() for param in params]

            def step() -> None:
                torch._foreach_mul_([param.grad for param in params], 1 / SCALE)
                torch.nn.utils.clip_grad_norm_(params, NORM, foreach=True)
                optimizer.step()
                torch._foreach_lerp_(average, weights, 1 - DECAY)
                optimizer.zero_grad(set_to_none=not zeroed)

            return step

        return make

    return [
        Contender("step", OURS, ours, backward),
        Contender("step", "fused", native(fused=True), backward),
        Contender("step", "foreach", native(foreach=True), backward),
    ]


if __name__ == "__main__":
    answer("torch", contenders, json.loads(sys.argv[1]))
