"""NAdam: Adam that looks ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import Decay, NonNegative, Rule, Update, ema, mean_square
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class NAdam(Rule):
    """NAdam: Adam with Nesterov's momentum, which grows from half of beta1 to beta1.

    Update::

        mu = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
        mu_product = mu_product * mu
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2                      # once infinite, it stays so
        m_hat = mu_next * m / (1 - mu_product * mu_next) + (1 - mu) * grad / (1 - mu_product)
        param = param - lr * m_hat / (sqrt(v / (1 - beta2**t)) + eps)

    Args:
        lr: Learning rate, in [0, inf). 0.002 by default.
        beta1: Decay of the average gradient, in [0, 1). 0.9 by default.
        beta2: Decay of the average squared gradient, in [0, 1). 0.999 by default.
        eps: Keeps the division finite, in [0, inf). 1e-08 by default.
        momentum_decay: How fast the momentum grows, in [0, inf). 0.004 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        exp_avg: ``m``; shape and dtype of the parameter; zero at first.
        exp_avg_sq: ``v``, likewise.
        mu_product: The product of all ``mu`` so far: a number; 1 at first.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch: the defaults are ``torch.optim.NAdam``. Keras: ``momentum_decay=1, lr=1e-3,
        eps=1e-7, decoupled=True`` is ``keras.optimizers.Nadam``.

    Source:
        Dozat 2016, "Incorporating Nesterov Momentum into Adam", algorithm 2.
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = NAdam(lr=1.0, beta1=0.5, beta2=0.0, eps=0.0, momentum_decay=0.0)
        >>> zeros = {"exp_avg": np.array([0.0]), "exp_avg_sq": np.array([0.0])}
        >>> slots = Slots({**zeros, "mu_product": 1.0})
        >>> param, slots = rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        >>> param, slots["mu_product"]
        (array([-0.13333333]), 0.25)
    """

    natives = (
        Native("torch.optim.NAdam"),
        Native(
            "keras.optimizers.Nadam",
            values={"lr": 1e-3, "eps": 1e-7, "momentum_decay": 1.0, "decoupled": True},
            slots=({"exp_avg": "momentum", "exp_avg_sq": "velocity"},),
        ),
    )

    lr: NonNegative = 2e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    momentum_decay: NonNegative = 4e-3
    slots = ("exp_avg", "exp_avg_sq")
    numbers = ("mu_product",)

    def initial(self, slot: str) -> Any:
        return 1.0 if slot == "mu_product" else 0.0

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        mu = self.beta1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))
        mu_next = self.beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * self.momentum_decay))
        mu_product = slot.mu_product * mu
        m = ema(slot.exp_avg, grad, self.beta1)
        v = mean_square(xp, slot.exp_avg_sq, grad, self.beta2)
        of_m = self.lr * mu_next / (1 - mu_product * mu_next)
        of_grad = self.lr * (1 - mu) / (1 - mu_product)
        denom = (1 - self.beta2**t) ** -0.5 * xp.sqrt(v) + self.eps
        new = {"exp_avg": m, "exp_avg_sq": v, "mu_product": mu_product}
        return param - (of_m * m + of_grad * grad) / denom, new
