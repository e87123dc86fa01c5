"""The schedule-free rules in PyTorch, beside their authors' package, and their two modes."""

from __future__ import annotations

import pytest
import torch
from support import assert_agree
from twins import assert_params_agree, make_grads, make_params, numbers, saved, train

import portopt_torch
from portopt import Optimizer, rules

CASES = [
    ("SGD", {"lr": 0.5, "weight_decay": 0.125, "warmup_steps": 3}),
    ("SGD", {"lr": 0.5, "r": 0.5, "weight_lr_power": 1.0}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.125, "warmup_steps": 3}),
    ("AdamW", {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6}),
]


def ours(name, params, betas=(), **options):
    cls = getattr(portopt_torch, f"ScheduleFree{name}")
    return cls(params, **options, **dict(zip(("beta1", "beta2"), betas, strict=False)))


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_trained_and_evaluated_as_by_the_authors_package(name, options):
    schedulefree = pytest.importorskip("schedulefree")
    theirs = getattr(schedulefree, f"{name}ScheduleFree")(
        make_params(), **options, **({"foreach": False} if name == "AdamW" else {})
    )
    theirs.train()
    mine = ours(name, make_params(), **options)
    for _ in range(2):
        for optimizer in (theirs, mine):
            train(optimizer, make_grads(steps=5))
        assert_params_agree(params_of(mine), params_of(theirs))
        for optimizer in (theirs, mine):
            optimizer.eval()
        assert_params_agree(params_of(mine), params_of(theirs))
        for optimizer in (theirs, mine):
            optimizer.train()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_state_is_of_its_mode(name):
    """As the Trainer of Transformers saves it: after an evaluation."""
    optimizer = train(ours(name, make_params(), lr=0.05), make_grads(steps=3))
    straight = train(ours(name, make_params(), lr=0.05), make_grads(steps=3))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"those of eval\(\): call train\(\) first"):
        optimizer.step()
    other = ours(name, [torch.nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], lr=1)
    other.load_state_dict(saved(optimizer))
    other.train()
    for one in (other, straight):
        train(one, make_grads(steps=2))
    assert_params_agree(params_of(other), params_of(straight))


def test_the_bits_are_numpys():
    optimizer = train(ours("AdamW", make_params(), lr=0.05), make_grads())
    arrays = [numbers(p).astype("float32") for p in make_params()]
    plain = Optimizer(rules.ScheduleFreeAdamW(lr=0.05), arrays)
    for step in make_grads():
        plain.step([numbers(g).astype("float32") for g in step])
    for mine, expected in zip(params_of(optimizer), arrays, strict=True):
        assert_agree(numbers(mine), expected, "same")


def test_other_optimizers_have_one_mode():
    optimizer = train(portopt_torch.SGD(make_params(), lr=0.05), make_grads(steps=1))
    before = [numbers(p).copy() for p in params_of(optimizer)]
    optimizer.eval()
    optimizer.train()
    for param, value in zip(params_of(optimizer), before, strict=True):
        assert_agree(numbers(param), value, "same")
    assert "train_mode" not in optimizer.param_groups[0]
