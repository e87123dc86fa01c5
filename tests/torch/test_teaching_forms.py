"""The forms that courses teach, against the same formulas in PyTorch's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from portopt import race
from portopt.rules import Adam, Momentum, RMSprop
from portopt_torch.race import begin

STEPS = 100


def momentum(lr, mu):
    a = torch.zeros(2, dtype=torch.float64)
    for _ in range(STEPS):
        grad = yield
        a = mu * a + (1 - mu) * grad
        yield lr * a


def rmsprop(lr, decay, eps):
    v = torch.zeros(2, dtype=torch.float64)
    for _ in range(STEPS):
        grad = yield
        v = decay * v + (1 - decay) * grad**2
        yield lr * grad / torch.sqrt(v + eps)


def adam(lr, beta1, beta2, eps):
    m = v = torch.zeros(2, dtype=torch.float64)
    for t in range(1, STEPS + 1):
        grad = yield
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        yield lr * (m / (1 - beta1**t)) / torch.sqrt(v / (1 - beta2**t) + eps)


FORMS = [
    (Momentum(lr=2e-3, momentum=0.9, buffer="average"), momentum(2e-3, 0.9)),
    (RMSprop(lr=0.02, alpha=0.9, eps=1e-2, eps_form="inside"), rmsprop(0.02, 0.9, 1e-2)),
    (Adam(lr=0.2, eps=1e-2, eps_form="inside"), adam(0.2, 0.9, 0.999, 1e-2)),
]


@pytest.mark.parametrize(("rule", "formula"), FORMS, ids=lambda form: type(form).__name__)
def test_the_teaching_forms_agree_with_torchs_arithmetic(rule, formula):
    """On Rosenbrock's function, with torch's own gradient: within 1e-6 at each of 100 steps."""
    x = torch.tensor(race.rosenbrock.start, dtype=torch.float64, requires_grad=True)
    expected = [x.tolist()]
    for _ in range(STEPS):
        loss = (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2 + 1
        (grad,) = torch.autograd.grad(loss, x)
        next(formula)
        with torch.no_grad():
            x -= formula.send(grad)
        expected.append(x.tolist())
    for backend in (race.on_numpy, begin):
        way = race.race({"": rule}, race.rosenbrock, STEPS, backend)[""]
        np.testing.assert_allclose(way.points, expected, rtol=0, atol=1e-6)
    assert np.ptp(way.points, axis=0).max() > 0.2  # it has moved
