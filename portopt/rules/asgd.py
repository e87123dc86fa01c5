"""ASGD: gradient descent, and the average of where it has been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import NonNegative, Rule, Update
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class ASGD(Rule):
    """Averaged gradient descent: the parameter descends, its average stands beside it.

    Update::

        param = param - lambd * eta * param - eta * grad
        ax = ax + mu * (param - ax)
        eta = lr / (1 + lambd * lr * t) ** alpha           # both for the next step
        mu = 1 / max(1, t - t0)

    Args:
        lr: Learning rate, in [0, inf). 0.01 by default.
        lambd: Decay of the parameter, in [0, inf). 0.0001 by default.
        alpha: Power of the fall of ``eta``, in [0, inf). 0.75 by default.
        t0: The step after which averaging begins, in [0, inf). 1000000.0 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        ax: The average; shape and dtype of the parameter; zero at first.
        eta: The next step's learning rate: a number; ``lr`` at first.
        mu: The weight of the next parameter in the average: a number; 1 at first.

    Cost: 20 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch: the defaults are ``torch.optim.ASGD``; a learning rate that changes is felt one
        step later, as there.

    Source:
        Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging"; with these
        schedules: Bottou 2012, "Stochastic Gradient Descent Tricks", section 5.
        https://doi.org/10.1007/978-3-642-35289-8_25

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = ASGD(lr=0.5, lambd=0.0)
        >>> slots = Slots({"ax": np.array([0.0]), "eta": 0.5, "mu": 1.0})
        >>> rule.step(np, 1, np.array([1.0]), np.array([1.0]), slots)
        (array([0.5]), {'ax': array([0.5]), 'eta': 0.5, 'mu': 1.0})
    """

    natives = (Native("torch.optim.ASGD"),)

    lr: NonNegative = 1e-2
    lambd: NonNegative = 1e-4
    alpha: NonNegative = 0.75
    t0: NonNegative = 1e6
    slots = ("ax",)
    numbers = ("eta", "mu")

    def initial(self, slot: str) -> Any:
        return {"ax": 0.0, "eta": self.lr, "mu": 1.0}[slot]

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        param = (1 - self.lambd * slot.eta) * param - slot.eta * grad
        ax = slot.ax + slot.mu * (param - slot.ax)
        eta = self.lr / (1 + self.lambd * self.lr * t) ** self.alpha
        late = t - self.t0 > 1
        mu = 1 / (1 + late * (t - self.t0 - 1))
        return param, {"ax": ax, "eta": eta, "mu": mu}
