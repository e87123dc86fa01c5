"""LAMB: Adam's direction, by the size of each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import Decay, NonNegative, Rule, Update, ema, mean_square
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Lamb(Rule):
    """LAMB: Adam's direction, scaled to the norm of the parameter that it moves.

    Update::

        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2                      # once infinite, it stays so
        r = m / (1 - beta1**t) / (sqrt(v / (1 - beta2**t)) + eps)
        r = r + weight_decay * param                               # unless decoupled
        trust = norm(param) / norm(r)                              # 1 where one of them is 0
        param = param - lr * trust * r

    The norms are over all elements of one parameter, so that no kernel takes this rule: it runs
    operation by operation, and its bits depend on the order in which a framework sums.

    Args:
        lr: Learning rate, in [0, inf). 0.001 by default.
        beta1: Decay of the average gradient, in [0, 1). 0.9 by default.
        beta2: Decay of the average squared gradient, in [0, 1). 0.999 by default.
        eps: Keeps the division finite, in [0, inf). 1e-06 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: Shrink the parameter first, as `Rule` does, instead of adding the decay to ``r``.
            False by default.
        maximize: See `Rule`. False by default.

    State:
        exp_avg: ``m``; shape and dtype of the parameter; zero at first.
        exp_avg_sq: ``v``, likewise.

    Cost: 28 bytes per float32 element, and what the norms and the single operations need.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        Keras: ``eps=1e-7, decoupled=True`` is ``keras.optimizers.Lamb``. Paper: it is this with
        its function phi being the identity.

    Source:
        You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
        algorithm 2. https://arxiv.org/abs/1904.00962

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Lamb(lr=0.5, beta1=0.5, beta2=0.75, eps=0.0)
        >>> slots = Slots({"exp_avg": np.array([0.0]), "exp_avg_sq": np.array([0.0])})
        >>> rule.step(np, 1, np.array([4.0]), np.array([2.0]), slots)
        (array([2.]), {'exp_avg': array([1.]), 'exp_avg_sq': array([1.])})
    """

    natives = (
        Native(
            "keras.optimizers.Lamb",
            values={"eps": 1e-7, "decoupled": True},
            slots=({"exp_avg": "momentum", "exp_avg_sq": "velocity"},),
        ),
    )

    lr: NonNegative = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-6
    slots = ("exp_avg", "exp_avg_sq")
    decay_of_its_own = True

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        m = ema(slot.exp_avg, grad, self.beta1)
        v = mean_square(xp, slot.exp_avg_sq, grad, self.beta2)
        denom = (1 - self.beta2**t) ** -0.5 * xp.sqrt(v) + self.eps
        r = 1 / (1 - self.beta1**t) * m / denom
        if self.weight_decay and not self.decoupled:
            r = r + self.weight_decay * param
        size, length = xp.sqrt(xp.sum(param * param)), xp.sqrt(xp.sum(r * r))
        trust = xp.where(size > 0, xp.where(length > 0, size / length, 1.0), 1.0)
        return param - self.lr * trust * r, {"exp_avg": m, "exp_avg_sq": v}
