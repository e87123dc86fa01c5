"""Adamax: Adam with the infinity norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import Decay, NonNegative, Rule, Update, ema
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Adamax(Rule):
    """Adamax: steps along the average gradient, scaled by the largest recent one.

    Update::

        m = beta1 * m + (1 - beta1) * grad
        u = max(beta2 * u, abs(grad) + eps)                        # eps_form "inside"
        param = param - lr / (1 - beta1**t) * m / u
        u = max(beta2 * u, abs(grad))                              # eps_form "outside"
        param = param - lr / (1 - beta1**t) * m / (u + eps)

    Args:
        lr: Learning rate, in [0, inf). 0.002 by default.
        beta1: Decay of the average gradient, in [0, 1). 0.9 by default.
        beta2: Decay of the largest gradient, in [0, 1). 0.999 by default.
        eps: Keeps the division finite, in [0, inf). 1e-08 by default.
        eps_form: Where eps stands: 'inside' the maximum (PyTorch) or 'outside' (Keras). 'inside' by
            default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        exp_avg: ``m``; shape and dtype of the parameter; zero at first.
        exp_inf: ``u``, likewise.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range or not among its choices.

    Differs from:
        PyTorch: the defaults are ``torch.optim.Adamax``. Keras: ``eps_form="outside", lr=1e-3,
        eps=1e-7, decoupled=True`` is ``keras.optimizers.Adamax``. Paper: it has no eps.

    Source:
        Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 2.
        https://arxiv.org/abs/1412.6980

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Adamax(lr=0.5, beta1=0.5, beta2=0.5, eps=0.0)
        >>> slots = Slots({"exp_avg": np.array([0.0]), "exp_inf": np.array([8.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([0.75]), {'exp_avg': array([1.]), 'exp_inf': array([4.])})
    """

    natives = (
        Native("torch.optim.Adamax"),
        Native(
            "keras.optimizers.Adamax",
            values={"lr": 1e-3, "eps": 1e-7, "eps_form": "outside", "decoupled": True},
            slots=({"exp_avg": "momentum", "exp_inf": "norm"},),
        ),
    )

    lr: NonNegative = 2e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    eps_form: Literal["inside", "outside"] = "inside"
    slots = ("exp_avg", "exp_inf")

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        m = ema(slot.exp_avg, grad, self.beta1)
        if self.eps_form == "inside":
            u = denom = xp.maximum(self.beta2 * slot.exp_inf, abs(grad) + self.eps)
        else:
            u = xp.maximum(self.beta2 * slot.exp_inf, abs(grad))
            denom = u + self.eps
        step_size = self.lr / (1 - self.beta1**t)
        return param - step_size * m / denom, {"exp_avg": m, "exp_inf": u}
