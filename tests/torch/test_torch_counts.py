"""The numbers of steps in the state: whose tensors they are, and what happens where they move."""

import multiprocessing
from operator import is_

import numpy as np
import pytest
import torch
from twins import OPTIONS, make_grads, make_params, native, ours, train

from portopt import rules
from portopt.kernels import slow
from portopt_torch import from_rule

GRADS = make_grads(steps=6)
SHARED = "portopt_torch steps without a kernel, slowly: a number of steps is in memory that"


def pair(name, **options):
    return [cls(make_params(), **options) for cls in (ours(name), native(name))]


def steps(optimizer):
    return [state["step"] for state in optimizer.state.values()]


def test_counts_that_move_into_shared_memory_go_on():
    optimizer = train(ours("Adam")(make_params()), GRADS[:2])
    held = steps(optimizer)
    for step in held:
        step.share_memory_()
    train(optimizer, GRADS[2:])
    assert [step.item() for step in held] == [6.0] * len(held)
    assert all(step.is_shared() for step in steps(optimizer))


def test_counts_sent_to_another_process_go_on():
    optimizer = train(from_rule(rules.SGD)(make_params()), GRADS[:2])
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.reductions.init_reductions()
    queue.put(optimizer.state_dict())
    sent = queue.get()["state"]
    train(optimizer, GRADS[2:])
    assert [step.item() for step in steps(optimizer)] == [6.0] * len(sent)
    assert [own["step"].item() for own in sent.values()] == [6.0] * len(sent)  # they are the same


def test_a_state_that_processes_share_stays_shared():
    """As in asynchronous training: one state, made by hand, that each process counts on."""
    slow.warn.cache_clear()
    optimizers = pair("Adam")
    for optimizer in optimizers:
        for param in optimizer.param_groups[0]["params"]:
            own = {"step": torch.zeros(1), **{k: torch.zeros_like(param) for k in SLOTS}}
            optimizer.state[param] = {name: x.share_memory_() for name, x in own.items()}
    held = steps(optimizers[0])
    with pytest.warns(UserWarning, match=f"^{SHARED}"):
        train(optimizers[0], GRADS)
    train(optimizers[1], GRADS)
    assert all(map(is_, steps(optimizers[0]), held))
    assert [step.tolist() for step in held] == [step.tolist() for step in steps(optimizers[1])]


SLOTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("missing", [(0,), (3,), (0, 1)])
def test_counts_are_the_same_tensors_while_gradients_come_and_go(missing):
    optimizer = train(ours("Adam")(make_params()), GRADS[:1])
    held = steps(optimizer)
    some = [[None if i in missing else g for i, g in enumerate(step)] for step in GRADS[1:3]]
    train(optimizer, [*some, GRADS[3]])
    assert all(map(is_, steps(optimizer), held))
    assert [step.item() for step in held] == [2.0 if i in missing else 4.0 for i in range(4)]


def test_counts_keep_their_shapes():
    optimizer = ours("Adam")(make_params())
    for param in optimizer.param_groups[0]["params"]:
        optimizer.state[param].update(step=torch.tensor([7.0]))
        optimizer.state[param].update({name: torch.zeros_like(param) for name in SLOTS})
    train(optimizer, GRADS[:2])
    assert [step.tolist() for step in steps(optimizer)] == [[9.0]] * 4


@pytest.mark.parametrize("n", [1, 2])
def test_counts_of_a_half_type_go_on(n):
    """Of which bfloat16 has no 257."""
    optimizer = ours("Adam")(make_params([(3,)] * n))
    for param in optimizer.param_groups[0]["params"]:
        own = {name: torch.zeros_like(param) for name in SLOTS}
        optimizer.state[param] = {"step": torch.tensor(256.0, dtype=torch.bfloat16), **own}
    train(optimizer, make_grads([(3,)] * n, steps=2))
    assert [step.item() for step in steps(optimizer)] == [258.0] * n


def test_counts_that_lie_side_by_side_by_chance():
    """In one piece of memory, but each a tensor of its own."""
    optimizer, memory = ours("Adam")(make_params()), np.zeros(4, np.float32)
    for place, param in enumerate(optimizer.param_groups[0]["params"]):
        own = {name: torch.zeros_like(param) for name in SLOTS}
        optimizer.state[param] = {"step": torch.from_numpy(memory[place : place + 1]), **own}
    train(optimizer, GRADS)
    assert [step.item() for step in steps(optimizer)] == [6.0] * 4


def test_two_optimizers_on_one_state():
    """Neither takes the other's counts away."""
    params = make_params()
    first, second = ours("Adam")(params), ours("Adam")(params)
    second.state = first.state
    for step in range(4):
        train((first, second)[step % 2], GRADS[step : step + 1])
    held = steps(first)
    train(second, GRADS[4:])
    assert all(map(is_, steps(first), held))
    assert [step.item() for step in held] == [6.0] * 4


@pytest.mark.parametrize(("name", "options"), [x for x in OPTIONS if x[0] in ("Adam", "NAdam")])
def test_counts_that_require_gradients(name, options):
    optimizers = [train(o, GRADS[:2]) for o in pair(name, **options)]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"] = state["step"].clone().requires_grad_()
        train(optimizer, GRADS[2:])
    mine, theirs = ([step.item() for step in steps(o)] for o in optimizers)
    assert mine == theirs == [6.0] * 4


@pytest.mark.parametrize("done", [0, 2])
def test_a_count_that_is_no_tensor_is_an_error_that_changes_nothing(done):
    (param,) = make_params([(3,)])
    optimizer = ours("Adam")([param])
    train(optimizer, make_grads([(3,)], steps=done))
    optimizer.state[param]["step"] = 0
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"state\['step'\] must be a tensor of one number, is 0"):
        train(optimizer, make_grads([(3,)], steps=1))
    assert torch.equal(param, before)
