"""What the tests of the PyTorch adapter share: twins, their options, and training on gradients."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
from contextlib import contextmanager

import numpy as np
import torch
from support import assert_agree, gradients, weights

import portopt_torch
from portopt import parity
from portopt.rules import registry
from portopt_torch import drop_in


def native(name):
    return getattr(torch.optim, name)


def ours(name):
    return getattr(portopt_torch, name)


def takes_anything(name):
    """Parameters of every shape, and dense gradients; those for matrices have a file of tests."""
    return ours(name).sparse != "only" and not registry.find(name, "torch")[0].by_shape


NAMES = [name for name in drop_in.names() if takes_anything(name)]
CASES = [case.torch for case in parity.CASES if case.torch and case.torch[0] in NAMES]
# Weights of size 1 are rounded by 6e-8 a step: let them move by more than 1e5 of that.
OPTIONS = [(name, {**arguments, "lr": 0.05}) for name, arguments in CASES]
IDS = [f"{name}-{'-'.join(sorted({*options} - {'lr'}))}" for name, options in OPTIONS]
SHAPES = [(3, 5), (), (4,), (0,)]


@contextmanager
def default_dtype(dtype):
    """Also the dtype of counts and other numbers in the state."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def takes(name, argument):
    """Whether the native has an argument of this name."""
    return argument in inspect.signature(native(name)).parameters


def trained(name):
    """Arguments with which the weights move and something is kept from step to step."""
    return {"lr": 0.05, **({"momentum": 0.9} if takes(name, "momentum") else {})}


def make_params(shapes=SHAPES, dtype=torch.float32):
    arrays = (torch.tensor(weights(shape, seed)) for seed, shape in enumerate(shapes))
    return [torch.nn.Parameter(array.to(dtype)) for array in arrays]


def make_grads(shapes=SHAPES, steps=5, dtype=torch.float32):
    """For each step, a gradient for each shape."""
    # A stream of one number would be zeros: for a 0-d gradient, the third of three.
    streams = [gradients(shape or 3, steps, seed) for seed, shape in enumerate(shapes)]
    return [
        [
            torch.tensor(g if shape else g[2]).to(dtype)
            for g, shape in zip(step, shapes, strict=True)
        ]
        for step in zip(*streams, strict=True)
    ]


def train(optimizer, grads):
    """Step by step, with these gradients; None is no gradient."""
    params = list(itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups))
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()
    return optimizer


def numbers(tensor):
    """As NumPy float64; complex numbers as pairs."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.double().numpy()


def assert_params_agree(actual, expected, kind="float32", start=None):
    start = make_params([p.shape for p in expected], expected[0].dtype) if start is None else start
    for index, (a, e, s) in enumerate(zip(actual, expected, start, strict=True)):
        assert_agree(numbers(a), numbers(e), kind, start=numbers(s), what=f"parameter {index}")


def assert_twins_agree(one, other, kind="float32"):
    """The parameters and the whole state."""
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        if a["params"]:
            assert_params_agree(a["params"], b["params"], kind)
    assert layout(one) == layout(other)
    for key, entries in other.state_dict()["state"].items():
        for name, value in entries.items():
            mine = one.state_dict()["state"][key][name]
            assert_agree(numbers(mine), numbers(value), kind, what=f"{name} of {key}")


def layout(optimizer):
    """All of a state_dict but the values in its tensors."""
    state_dict = optimizer.state_dict()
    shapes = {
        key: {k: (v.shape, v.dtype, v.device, v.numel() and v.stride()) for k, v in entries.items()}
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": shapes}


def saved(optimizer):
    """The state_dict, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(optimizer):
    """All that a failed call must leave alone, as plain values."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    for entries in state_dict["state"].values():
        for key, value in entries.items():
            entries[key] = (value.dtype, numbers(value).tolist())
    params = [[p.tolist() for p in group["params"]] for group in optimizer.param_groups]
    return state_dict, params


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def rosenbrock_gradient(point):
    x, y = point
    return np.array([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)])
