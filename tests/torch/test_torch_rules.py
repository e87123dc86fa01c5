"""`from_rule`: any rule, a user's own too, as a torch.optim.Optimizer."""

import copy
import doctest
import importlib
import pickle
import pkgutil
from dataclasses import dataclass

import numpy as np
import plugin
import pytest
import torch
from support import Halved, Rowwise, assert_agree
from twins import (
    assert_params_agree,
    assert_twins_agree,
    make_grads,
    make_params,
    native,
    numbers,
    saved,
    train,
)

import portopt_torch
from portopt import rules
from portopt.rules import Rule
from portopt.rules.base import Decay, NonNegative
from portopt_torch import Optimizer, from_rule

GRADS = make_grads(steps=6)


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Lion (Chen et al. 2023, algorithm 2)."""

    lr: NonNegative = 1e-2
    beta1: Decay = 0.9
    beta2: Decay = 0.99

    @property
    def slots(self):
        return ("exp_avg",)

    def update(self, xp, t, param, grad, slot):
        direction = xp.sign(self.beta1 * slot.exp_avg + (1 - self.beta1) * grad)
        new = self.beta2 * slot.exp_avg + (1 - self.beta2) * grad
        return param - self.lr * direction, {"exp_avg": new}


@dataclass(frozen=True, kw_only=True)
class Shifted(Rule):
    """Hands its inputs on as they are: each slot is what the next one was before."""

    lr: NonNegative

    @property
    def slots(self):
        return ("last_param", "last_grad", "grad_before")

    def update(self, xp, t, param, grad, slot):
        new = {"last_param": param, "last_grad": grad, "grad_before": slot.last_grad}
        return param - self.lr * grad, new


class MyLion(from_rule(Lion)):
    """A user's subclass of a made class."""


def test_a_users_rule_trains():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    x = torch.randn(64, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    optimizer = from_rule(Lion)(model.parameters(), lr=0.02)
    first = None
    for _ in range(300):
        loss = torch.nn.functional.mse_loss(model(x), y)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2 * first


def test_a_users_rule_computes_its_formula():
    params, start = make_params(), make_params()
    train(from_rule(Lion)(params), GRADS)
    for index, (param, begin) in enumerate(zip(params, start, strict=True)):
        w, m = numbers(begin), 0.0
        for step in GRADS:
            g = numbers(step[index])
            w, m = w - 1e-2 * np.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g
        assert_agree(numbers(param), w, "float32", start=numbers(begin))


def test_a_slot_of_another_shape_goes_through_no_kernel():
    param = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = train(from_rule(Rowwise)([param], lr=0.5), [[torch.ones(4, 6)]] * 3)
    assert torch.equal(param, torch.full((4, 6), -0.5 * (1 + 2 + 3)))
    assert torch.equal(optimizer.state[param]["row"], torch.full((1, 6), 3.0))


@pytest.mark.parametrize("rule", [Halved, Halved(lr=3.0)], ids=["class", "rule"])
def test_a_field_that_cannot_be_given(rule):
    param = torch.nn.Parameter(torch.zeros(3))
    train(from_rule(rule)([param], lr=2.0), [[torch.ones(3)]])
    assert (param == -1).all()
    with pytest.raises(TypeError, match="unknown hyperparameter 'half': Halved has "):
        from_rule(rule)([param], half=0.25)


def test_a_rule_may_hand_its_inputs_on():
    params = make_params()
    optimizer = train(from_rule(Shifted)(params, lr=0.1), GRADS[:-1])
    before = copy.deepcopy(params)
    train(optimizer, GRADS[-1:])
    for param, old, last, grad in zip(params, before, GRADS[-2], GRADS[-1], strict=True):
        state = optimizer.state[param]
        for value, expected in (
            (state["last_param"], old),
            (state["last_grad"], grad),
            (state["grad_before"], last),
            (param, old.detach() - 0.1 * grad),
        ):
            assert_agree(numbers(value), numbers(expected), "same")


def test_classes():
    preset = from_rule(rules.Adam(beta1=0.5))
    assert from_rule(rules.Adam(beta1=0.5)) is preset is not from_rule(rules.Adam)
    assert issubclass(preset, Optimizer) and issubclass(preset, torch.optim.Optimizer)
    assert preset.__name__ == "Adam" and "exp_avg_sq" in preset.__doc__
    (group,) = preset(make_params(), lr=0.1).param_groups
    values = {key: value for key, value in group.items() if key != "params"}
    assert values == vars(rules.Adam(beta1=0.5, lr=0.1))


@pytest.mark.parametrize("cls", [from_rule(Lion), from_rule(Lion(beta1=0.5)), MyLion])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on_the_same(cls, copied):
    one = train(cls(make_params(), lr=0.02), GRADS[:3])
    other = copied(one)
    assert (
        type(other) is cls
        and other.param_groups[0]["params"][0] is not one.param_groups[0]["params"][0]
    )
    assert_twins_agree(train(other, GRADS[3:]), train(one, GRADS[3:]), "same")


def test_state_of_a_made_class_goes_into_the_native():
    made = train(from_rule(rules.Adam)(make_params(), lr=0.05), GRADS[:3])
    twin = native("Adam")(made.param_groups[0]["params"], lr=0.05)
    state = {"state": saved(made)["state"], "param_groups": twin.state_dict()["param_groups"]}
    twin.load_state_dict(state)
    never = train(native("Adam")(make_params(), lr=0.05), GRADS)
    assert_twins_agree(train(twin, GRADS[3:]), never)


def test_groups_with_their_own_hyperparameters():
    params = make_params()
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "beta1": 0.5}]
    train(from_rule(Lion)(groups), GRADS)
    for cut, options in ((slice(0, 2), {"lr": 0.1}), (slice(2, 4), {"beta1": 0.5})):
        alone = make_params()
        train(from_rule(Lion)(alone[cut], **options), [step[cut] for step in GRADS])
        assert_params_agree(params[cut], alone[cut], "same", make_params()[cut])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda p: from_rule(Lion)(p, learning_rate=0.1),
            TypeError,
            "unknown hyperparameter 'learning_rate': Lion has lr, weight_decay",
        ),
        (
            lambda p: from_rule(Shifted)(p),
            TypeError,
            r"Shifted.__init__\(\) missing 1 required keyword-only argument: 'lr'",
        ),
        (lambda p: from_rule(Lion)(p, lr="fast"), TypeError, "Invalid learning rate: fast"),
        (
            lambda p: from_rule(Lion)(p, beta1=1.0),
            ValueError,
            "Invalid beta parameter at index 0: 1.0",
        ),
        (
            lambda p: from_rule(rules.Adam)(p, eps_form="under"),
            ValueError,
            "eps_form must be one of 'outside', 'hat', 'inside', got 'under'",
        ),
        (
            lambda p: from_rule(rules.Adam)(p, amsgrad=1),
            TypeError,
            "amsgrad must be True or False, got 1",
        ),
        (lambda p: from_rule(torch.optim.Adam), TypeError, "rule must be a portopt.Rule"),
        (lambda p: from_rule({"lr": 0.1}), TypeError, "rule must be a portopt.Rule"),
        (
            lambda p: from_rule("adam"),
            TypeError,
            "rule must be a portopt.Rule or a subclass of it, got 'adam'",
        ),
        (lambda p: from_rule(Rule)(p, lr=0.1), TypeError, "Can't instantiate abstract class Rule"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=f"^{words}"):
        call(make_params())


def test_classes_by_name(tmp_path, monkeypatch):
    assert portopt_torch.get("adam") is portopt_torch.Adam
    assert portopt_torch.get("nadam") is portopt_torch.NAdam is portopt_torch.get("NADAM")
    assert portopt_torch.get("lion") is portopt_torch.Lion is from_rule(rules.Lion)
    assert {*portopt_torch.names(), "get", "Lion", "Sharded"} <= {*dir(portopt_torch)}
    assert all(hasattr(portopt_torch, name) for name in dir(portopt_torch))
    plugin.install(tmp_path)  # a package that brings a rule
    monkeypatch.syspath_prepend(tmp_path)
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([2.0, -3.0])
    portopt_torch.get("signs")([param], lr=0.5).step()
    assert param.tolist() == [0.5, 1.5]
    with pytest.raises(AttributeError, match="has no attribute 'Adm'"):
        _ = portopt_torch.Adm


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(portopt_torch.__path__)])
def test_doctests(name):
    if name in ("bench", "demo", "parity", "race"):
        pytest.skip("it runs as a child process")
    assert doctest.testmod(importlib.import_module(f"portopt_torch.{name}")).failed == 0
