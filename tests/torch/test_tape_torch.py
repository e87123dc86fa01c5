"""The tape's traces, hooks and frozen variables against PyTorch's own graph of the computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import assert_agree

from portopt import tape

COMPUTATIONS = {  # on Variables and on tensors alike
    "square": (lambda m, x, y: (m * x - y) ** 2, {"m": 7.0, "x": 3.0, "y": 5.0}),
    "literature": (
        lambda x1, x2: log(x1) + x1 * x2 - sin(x2),
        {"x1": 2.0, "x2": 5.0},
    ),
}


def log(x):
    return tape.log(x) if isinstance(x, tape.Variable) else torch.log(x)


def sin(x):
    return tape.sin(x) if isinstance(x, tape.Variable) else torch.sin(x)


def tensors(values):
    return {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in values.items()
    }


def walked(loss, named):
    """Every node of torch's graph with its inputs, as names that the trace gives them."""
    nodes, todo = [], [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node not in nodes and not hasattr(node, "variable"):
            nodes.append(node)
            todo += [following for following, _ in node.next_functions if following is not None]
    nodes.sort(key=lambda node: node._sequence_nr())
    names = {node: f"v{number}" for number, node in enumerate(nodes, 1)}
    leaves = {id(tensor): name for name, tensor in named.items()}

    def name(node):
        return leaves[id(node.variable)] if hasattr(node, "variable") else names[node]

    return {
        names[node]: (node, [name(following) for following, _ in node.next_functions if following])
        for node in nodes
    }


@pytest.mark.parametrize("case", COMPUTATIONS)
def test_a_trace_is_torchs_graph(case):
    compute, values = COMPUTATIONS[case]
    variables = {name: tape.Variable(value) for name, value in values.items()}
    with tape.Autograd() as autograd:
        loss = compute(**variables)
    lines = {line.node: line for line in tape.trace(autograd, loss, variables).lines}

    named = tensors(values)
    expected = compute(**named)
    graph = walked(expected, named)
    assert_agree(lines[f"v{len(graph)}"].value, expected.item(), "float64")
    assert set(lines) == {*values, *graph}
    arrived = {}
    for node, (function, inputs) in graph.items():
        line = lines[node]
        assert function.name().startswith(line.name.capitalize() + "Backward")
        assert list(line.operands)[: len(inputs)] == inputs
        local = function(torch.tensor(1.0, dtype=torch.float64))
        local = local if isinstance(local, tuple) else (local,)
        for ours, theirs in zip(line.local, local, strict=True):
            assert_agree(ours, theirs.detach(), "float64", what=f"local derivative of {node}")
        # torch shows the adjoint of an operation to a hook before its grad_fn
        function.register_prehook(lambda grads, node=node: arrived.update({node: grads[0].clone()}))
    for name, tensor in named.items():
        tensor.register_hook(lambda grad, name=name: arrived.update({name: grad.clone()}))
    expected.backward()
    assert set(arrived) == set(lines)
    for node, adjoint in arrived.items():
        assert_agree(lines[node].adjoint, adjoint, "float64", what=f"adjoint of {node}")


def test_adjoints_so_far_are_the_gradients_of_the_last_operations_alone():
    compute, values = COMPUTATIONS["literature"]
    variables = {name: tape.Variable(value) for name, value in values.items()}
    with tape.Autograd() as autograd:
        loss = compute(**variables)
    lines = {line.node: line for line in tape.trace(autograd, loss, variables).lines}
    # All but the logarithm has added its share when the walk has passed the product.
    named = tensors(values)
    x1, x2 = named.values()
    (x1.detach().log() + x1 * x2 - x2.sin()).backward()
    for name, tensor in named.items():
        assert_agree(lines["v2"].so_far[name], tensor.grad, "float64", what=name)


class Both:
    """One computation on the tape and in torch, whose gradients are to agree."""

    def __init__(self, module):
        self.torch = module is torch

    def leaf(self, value, requires_grad=True):
        if self.torch:
            return torch.tensor(value, dtype=torch.float64, requires_grad=requires_grad)
        return tape.Variable(value, requires_grad=requires_grad)

    def run(self, scene):
        """Return what the hooks of a scene saw, and the accumulated gradients of its leaves."""
        seen = []
        if self.torch:
            loss, leaves, passes = scene(self, torch.no_grad, seen)
            for _ in range(passes):
                loss.backward(retain_graph=True)
            gradients = [np.zeros(()) if x.grad is None else x.grad.numpy() for x in leaves]
        else:
            with tape.Autograd() as autograd:
                loss, leaves, passes = scene(self, tape.no_grad, seen)
            for _ in range(passes):
                autograd.backward(loss)
            gradients = [autograd.buffer.get(x) for x in leaves]
        return [float(gradient) for gradient in seen], gradients


def replacing(both, no_grad, seen):
    x, y = both.leaf(2.0), both.leaf(5.0)
    h = x * y
    h.register_hook(lambda g: seen.append(g) or g * 10.0)
    h.register_hook(lambda g: seen.append(g))
    x.register_hook(lambda g: seen.append(g) or g + 1.0)
    loss = h * h + h + x
    loss.register_hook(lambda g: seen.append(g) or g * 2.0)
    return loss, [x, y], 1


def removed(both, no_grad, seen):
    x = both.leaf(2.0)
    h = x * x
    h.register_hook(lambda g: seen.append(g) or g * 3.0).remove()
    return h * x, [x], 1


def several_passes(both, no_grad, seen):
    x = both.leaf(3.0)
    h = x * x
    h.register_hook(lambda g: seen.append(g))
    x.register_hook(lambda g: seen.append(g) or g * 2.0)
    return h * x, [x], 3


def without_gradient(both, no_grad, seen):
    x, w = both.leaf(3.0), both.leaf(4.0)
    with no_grad():
        constant = x * w
    assert not constant.requires_grad
    return constant * x + (x * w).detach() * w, [x, w], 2


def frozen(both, no_grad, seen):
    w, fixed = both.leaf(3.0), both.leaf(4.0, requires_grad=False)
    h = fixed * fixed
    assert not h.requires_grad
    with pytest.raises(RuntimeError, match="gradient"):
        h.register_hook(seen.append)
    thawed = both.leaf(2.0)
    thawed.requires_grad = False
    return h * w * thawed, [w, fixed, thawed], 1


@pytest.mark.parametrize("scene", [replacing, removed, several_passes, without_gradient, frozen])
def test_gradients_go_where_torchs_go(scene):
    seen, gradients = Both(tape).run(scene)
    torch_seen, torch_gradients = Both(torch).run(scene)
    assert seen == torch_seen
    for ours, theirs in zip(gradients, torch_gradients, strict=True):
        assert_agree(ours, theirs, "same")


def test_checkpoint_is_torchs_checkpoint():
    from torch.utils.checkpoint import checkpoint_sequential

    found = []
    for both in (Both(tape), Both(torch)):
        x, w = both.leaf([0.5, -2.0]), both.leaf([1.5, 0.7])
        functions = [lambda h, w=w: sin(h) * w] * 30
        if both.torch:
            y = checkpoint_sequential(functions, 6, x, use_reentrant=False)
            y.sum().backward()
            found.append((y.detach(), x.grad, w.grad))
        else:
            with tape.Autograd() as autograd:
                y = tape.checkpoint(functions, x)
                loss = tape.sum(y)
            found.append((y.value, *autograd.gradients(loss, [x, w])))
    for ours, theirs in zip(*found, strict=True):
        assert_agree(ours, theirs, "float64")
