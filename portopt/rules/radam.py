"""RAdam: Adam that waits for its second moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import Decay, NonNegative, Rule, Update, ema, mean_square
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class RAdam(Rule):
    """RAdam: Adam, scaled by the second moment only as far as that can be trusted.

    Update::

        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2                      # once infinite, it stays so
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        r = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        m_hat = m / (1 - beta1**t)
        param = param - lr * m_hat * r * sqrt(1 - beta2**t) / (sqrt(v) + eps)     # where rho > 5
        param = param - lr * m_hat                                                # elsewhere

    Args:
        lr: Learning rate, in [0, inf). 0.001 by default.
        beta1: Decay of the average gradient, in [0, 1). 0.9 by default.
        beta2: Decay of the average squared gradient, in [0, 1). 0.999 by default.
        eps: Keeps the division finite, in [0, inf). 1e-08 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        exp_avg: ``m``; shape and dtype of the parameter; zero at first.
        exp_avg_sq: ``v``, likewise.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch: the defaults are ``torch.optim.RAdam``. Paper: its threshold is 4, and it has no
        eps.

    Source:
        Liu et al. 2020, "On the Variance of the Adaptive Learning Rate and Beyond", algorithm 2.
        https://arxiv.org/abs/1908.03265

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = RAdam(lr=0.25, beta1=0.5, beta2=0.75)
        >>> slots = Slots({"exp_avg": np.array([0.0]), "exp_avg_sq": np.array([0.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([0.5]), {'exp_avg': array([1.]), 'exp_avg_sq': array([1.])})
    """

    natives = (Native("torch.optim.RAdam"),)

    lr: NonNegative = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    slots = ("exp_avg", "exp_avg_sq")

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        m = ema(slot.exp_avg, grad, self.beta1)
        v = mean_square(xp, slot.exp_avg_sq, grad, self.beta2)
        bias2 = 1 - self.beta2**t
        rho_inf = 2 / (1 - self.beta2) - 1
        rho = rho_inf - 2 * t * self.beta2**t / bias2
        on = rho > 5
        off = 1 - on
        # Both formulas in one: what is off is 0, and has neither a negative root nor 0 below.
        above = on * (rho - 4) * (rho - 2) * rho_inf
        r = (above / (on * (rho_inf - 4) * (rho_inf - 2) * rho + off)) ** 0.5
        factor = r * bias2**0.5 / (xp.sqrt(v) + (self.eps + off)) + off
        step_size = self.lr / (1 - self.beta1**t)
        return param - step_size * m * factor, {"exp_avg": m, "exp_avg_sq": v}
