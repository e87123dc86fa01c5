"""Training by ours and by the native from the same start: losses, and Rosenbrock's function."""

import numpy as np
import pytest
import torch
from support import assert_agree
from twins import (
    NAMES,
    assert_params_agree,
    native,
    numbers,
    ours,
    rosenbrock,
    rosenbrock_gradient,
)

from portopt import rules
from portopt_torch import from_rule

START = (-1.0, 2.0)


def losses(cls):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(5, 5, bias=False) for _ in range(2)))
    x, y = torch.randn(16, 5), torch.randn(16, 5)
    optimizer = cls(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(100):
        loss = torch.nn.functional.mse_loss(model(x), y)
        yield loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("rule", ["drop-in", "from_rule"])
def test_two_linear_layers_with_momentum(rule):
    cls = ours("SGD") if rule == "drop-in" else from_rule(rules.Momentum)
    mine, theirs = list(losses(cls)), list(losses(native("SGD")))
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= 1e-6
    assert len(theirs) == 100 and theirs[-1] < 0.8 * theirs[0]


def minimize(make, steps=300, dtype=torch.float64):
    point = torch.tensor(START, dtype=dtype, requires_grad=True)
    optimizer = make(point)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        rosenbrock(*point).backward()
        optimizer.step()
        path.append(numbers(point).copy())
    return np.array(path)


def assert_paths_agree(mine, theirs):
    assert_agree(mine, theirs, "float64", start=np.broadcast_to(START, np.shape(theirs)))
    assert rosenbrock(*mine[-1]) < 0.5 * rosenbrock(*START)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 1e-3}),
        ("SGD", {"lr": 1e-4, "momentum": 0.9}),
        ("RMSprop", {"lr": 1e-2}),
        ("Adam", {"lr": 1e-2}),
    ],
)
def test_rosenbrock_as_the_native(name, options):
    mine, theirs = (
        minimize(lambda p, cls=cls: cls([p], **options)) for cls in (ours(name), native(name))
    )
    assert_paths_agree(mine, theirs)


def teaching_momentum(grad, state, lr=1e-3, mu=0.9):
    state["a"] = mu * state.get("a", 0) + (1 - mu) * grad
    return -lr * state["a"]


def teaching_rmsprop(grad, state, lr=1e-2, alpha=0.99, eps=1e-8):
    state["v"] = alpha * state.get("v", 0) + (1 - alpha) * grad**2
    return -lr * grad / np.sqrt(state["v"] + eps)


def teaching_adam(grad, state, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8):
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * grad
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * grad**2
    m_hat, v_hat = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
    return -lr * m_hat / np.sqrt(v_hat + eps)


@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        (rules.Momentum(lr=1e-3, buffer="average"), teaching_momentum),
        (rules.RMSprop(eps_form="inside"), teaching_rmsprop),
        (rules.Adam(lr=1e-2, eps_form="inside"), teaching_adam),
    ],
    ids=["momentum", "rmsprop", "adam"],
)
def test_rosenbrock_by_the_teaching_forms(rule, formula):
    mine = minimize(lambda p: from_rule(rule)([p]))
    point, state, path = np.array(START), {}, []
    for _ in mine:
        point = point + formula(rosenbrock_gradient(point), state)
        path.append(point)
    assert_paths_agree(mine, path)


def test_a_bare_tensor_is_refused_as_by_torch():
    words = []
    for cls in (native("SGD"), ours("SGD"), from_rule(rules.SGD)):
        with pytest.raises(TypeError) as error:
            cls(torch.tensor(START, requires_grad=True), lr=0.1)
        words.append(str(error.value))
    assert words[0] == words[1] == words[2]


def train_step(model, x, optimizer, autocast=False, scaler=None):
    optimizer.zero_grad()
    with torch.autocast("cpu", enabled=autocast):
        loss = model(x).square().mean()
        if autocast:  # a step in there computes in the parameters' dtype all the same
            loss.backward()
            optimizer.step()
            return
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "scaler"])
def test_mixed_precision(name, autocast):
    start, ends = [], []
    for cls in (ours(name), native(name)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        start = [p.detach().clone() for p in model.parameters()]
        optimizer = cls(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=4.0)
        for x in torch.randn(5, 8, 4):
            train_step(model, x, optimizer, autocast, scaler)
        if not autocast:  # an overflow skips the step
            before = [p.detach().clone() for p in model.parameters()]
            train_step(model, torch.full((8, 4), float("inf")), optimizer, scaler=scaler)
            assert scaler.get_scale() == 2.0
            assert_params_agree(model.parameters(), before, "same", start=start)
        ends.append(list(model.parameters()))
    assert_params_agree(*ends, start=start)


@pytest.mark.parametrize("name", NAMES)
def test_averaged_model(name):
    averages = []
    for cls in (ours(name), native(name)):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        start = [p.detach().clone() for p in model.parameters()]
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = cls(model.parameters(), lr=0.05)
        schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
        for x in torch.randn(5, 8, 4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
            schedule.step()
        averages.append(list(average.module.parameters()))
    assert_params_agree(*averages, start=start)
