"""Lion: steps by the sign of an average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import Decay, Interval, NonNegative, Rule, Update, ema
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Lion: every element moves by the learning rate, by the sign of an average gradient.

    Update::

        param = param - lr * sign(beta1 * m + (1 - beta1) * grad)
        m = beta2 * m + (1 - beta2) * grad

    Args:
        lr: Learning rate, in [0, inf). 0.0001 by default.
        beta1: Weight of the average in the direction, in (0, 1]. 0.9 by default.
        beta2: Decay of the average gradient, in [0, 1). 0.99 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`; the paper's is. True by default.
        maximize: See `Rule`. False by default.

    State:
        exp_avg: ``m``; shape and dtype of the parameter; zero at first.

    Cost: 20 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        Keras: ``lr=1e-3`` is ``keras.optimizers.Lion``.

    Source:
        Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2.
        https://arxiv.org/abs/2302.06675

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Lion(lr=0.5, beta1=0.5, beta2=0.5)
        >>> slots = Slots({"exp_avg": np.array([-1.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([0.5]), {'exp_avg': array([0.5])})
    """

    natives = (
        Native("keras.optimizers.Lion", values={"lr": 1e-3}, slots=({"exp_avg": "momentum"},)),
    )

    lr: NonNegative = 1e-4
    beta1: Annotated[float, Interval("(0, 1]")] = 0.9
    beta2: Decay = 0.99
    decoupled: bool = True
    slots = ("exp_avg",)

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        direction = xp.sign(ema(slot.exp_avg, grad, self.beta1))
        m = ema(slot.exp_avg, grad, self.beta2)
        return param - self.lr * direction, {"exp_avg": m}
