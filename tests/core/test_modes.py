"""Rules that are evaluated at other weights than they are trained at: the schedule-free ones."""

from __future__ import annotations

import numpy as np
import pytest
from support import assert_agree, gradients, weights

from portopt import Optimizer
from portopt.rules import SGD, HyperparameterError, ScheduleFreeAdamW, ScheduleFreeSGD

RULES = [
    ScheduleFreeSGD(lr=0.5, weight_decay=0.125, warmup_steps=3.0),
    ScheduleFreeAdamW(lr=0.05, weight_decay=0.125, r=0.5),
]


def trained(rule, switches=()):
    param = weights(23, dtype=np.float64)
    optimizer = Optimizer(rule, [param])
    for t, grad in enumerate(gradients(23, 10, dtype=np.float64)):
        if t in switches:
            optimizer.eval()
            optimizer.train()
        optimizer.step([grad])
    return optimizer, param


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_switching_is_undone(rule):
    assert_agree(trained(rule, switches=(0, 1, 5))[1], trained(rule)[1], "float64")


def test_what_is_evaluated_is_the_average_of_the_points_of_descent():
    """By the paper's equations 3 to 5, with equal weights."""
    rule = ScheduleFreeSGD(lr=0.5, beta1=0.75)
    optimizer, param = trained(rule)
    start = weights(23, dtype=np.float64)
    x = z = start
    for t, grad in enumerate(gradients(23, 10, dtype=np.float64), 1):
        z = z - 0.5 * grad
        x = x + (z - x) / t
    assert_agree(optimizer.state[0]["z"], z, "float64", start=start)
    assert_agree(param, 0.25 * z + 0.75 * x, "float32", start=start)  # numbers are float64 here
    optimizer.eval()
    assert_agree(param, x, "float32", start=start)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_in_evaluation_nothing_is_trained_or_saved(rule):
    optimizer, param = trained(rule)
    optimizer.eval()
    before = param.copy()
    optimizer.eval()  # once more changes nothing
    with pytest.raises(RuntimeError, match=r"those of eval\(\): call train\(\) first"):
        optimizer.step([np.ones(23)])
    with pytest.raises(RuntimeError, match=r"those of eval\(\): call train\(\) first"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"those of eval\(\): call train\(\) first"):
        optimizer.load_state_dict(trained(rule)[0].state_dict())
    assert_agree(param, before, "same")


@pytest.mark.parametrize("there", [True, False])
def test_a_switch_that_fails_changes_nothing(there):
    params = [weights(5), weights(5)]
    optimizer = Optimizer(RULES[0], params)
    for _ in range(3):
        optimizer.step([np.ones(5, np.float32)] * 2)
    switch, back = (optimizer.eval, optimizer.train) if there else (optimizer.train, optimizer.eval)
    back()
    before = params[0].copy()
    params[1].setflags(write=False)
    with pytest.raises(ValueError, match=r"params\[1\] must be writable"):
        switch()
    assert_agree(params[0], before, "same")
    params[1].setflags(write=True)
    switch()
    assert np.any(params[0] != before)


def test_other_rules_have_one_set_of_weights():
    optimizer, param = trained(SGD(lr=0.5))
    before = param.copy()
    optimizer.eval()
    assert_agree(param, before, "same")
    optimizer.step([np.ones(23)])
    assert_agree(param, before - 0.5, "same")


def test_a_decay_is_not_decoupled():
    with pytest.raises(HyperparameterError, match="decoupled must be False: the decay belongs"):
        ScheduleFreeSGD(decoupled=True)


def test_a_learning_rate_of_zero_changes_nothing():
    param = weights(23)
    Optimizer(ScheduleFreeSGD(lr=0.0), [param]).step([np.ones(23, np.float32)])
    assert_agree(param, weights(23), "same")
