"""Adagrad: steps scaled by the root of the sum of squared gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import NonNegative, Rule, Update
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Adagrad(Rule):
    """Adagrad: steps scaled by the root of the sum of all squared gradients.

    Update::

        s = s + grad**2
        rate = lr / (1 + (t - 1) * lr_decay)
        param = param - rate * grad / (sqrt(s) + eps)     # eps_form "outside"
        param = param - rate * grad / sqrt(s + eps)       # eps_form "inside"

    Args:
        lr: Learning rate, in [0, inf). 0.01 by default.
        lr_decay: How fast the learning rate falls, in [0, inf). 0.0 by default.
        initial_accumulator_value: What ``s`` begins with, in [0, inf). 0.0 by default.
        eps: Keeps the division finite, in [0, inf). 1e-10 by default.
        eps_form: Where eps stands: 'outside' the root (PyTorch) or 'inside' (Keras). 'outside' by
            default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        sum: ``s``; shape and dtype of the parameter; ``initial_accumulator_value`` at first.

    Cost: 20 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range or not among its choices.

    Differs from:
        PyTorch: the defaults are ``torch.optim.Adagrad``. Keras: ``eps_form="inside", lr=1e-3,
        eps=1e-7, initial_accumulator_value=0.1, decoupled=True`` is ``keras.optimizers.Adagrad``.

    Source:
        Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization", figure 1, with the diagonal of G.
        https://jmlr.org/papers/v12/duchi11a.html

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Adagrad(lr=0.5, eps=0.0)
        >>> slots = Slots({"sum": np.array([12.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([0.75]), {'sum': array([16.])})
    """

    natives = (
        Native("torch.optim.Adagrad", eager=True, sparse="also"),
        Native(
            "keras.optimizers.Adagrad",
            values={
                "lr": 1e-3,
                "eps": 1e-7,
                "initial_accumulator_value": 0.1,
                "eps_form": "inside",
                "decoupled": True,
            },
            slots=({"sum": "accumulator"},),
        ),
    )

    lr: NonNegative = 1e-2
    lr_decay: NonNegative = 0.0
    initial_accumulator_value: NonNegative = 0.0
    eps: NonNegative = 1e-10
    eps_form: Literal["outside", "inside"] = "outside"
    slots = ("sum",)

    def initial(self, slot: str) -> Any:
        return self.initial_accumulator_value

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        s = slot.sum + grad * grad
        denom = xp.sqrt(s) + self.eps if self.eps_form == "outside" else xp.sqrt(s + self.eps)
        rate = self.lr / (1 + (t - 1) * self.lr_decay)
        return param - rate * grad / denom, {"sum": s}
