"""Adadelta: steps in the unit of the parameter, by two running averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import Interval, NonNegative, Rule, Update, mean_square
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Adadelta(Rule):
    """Adadelta: the gradient, by the root mean square of past updates over that of gradients.

    Update::

        v = rho * v + (1 - rho) * grad**2                          # once infinite, it stays so
        delta = sqrt(d + eps) / sqrt(v + eps) * grad
        d = rho * d + (1 - rho) * delta**2
        param = param - lr * delta

    Args:
        lr: Learning rate, which the paper has not, in [0, inf). 1.0 by default.
        rho: Decay of both averages, in [0, 1]. 0.9 by default.
        eps: Keeps the division finite and the first updates above zero, in [0, inf). 1e-06 by
            default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        square_avg: ``v``; shape and dtype of the parameter; zero at first.
        acc_delta: ``d``, likewise.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch: the defaults are ``torch.optim.Adadelta``. Keras: ``lr=1e-3, rho=0.95, eps=1e-7,
        decoupled=True`` is ``keras.optimizers.Adadelta``.

    Source:
        Zeiler 2012, "ADADELTA: An Adaptive Learning Rate Method", algorithm 1.
        https://arxiv.org/abs/1212.5701

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Adadelta(rho=0.75, eps=3.0)
        >>> slots = Slots({"square_avg": np.array([0.0]), "acc_delta": np.array([1.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([-1.]), {'square_avg': array([1.]), 'acc_delta': array([1.75])})
    """

    natives = (
        Native("torch.optim.Adadelta"),
        Native(
            "keras.optimizers.Adadelta",
            values={"lr": 1e-3, "rho": 0.95, "eps": 1e-7, "decoupled": True},
            slots=({"square_avg": "accumulated_grad", "acc_delta": "accumulated_delta_var"},),
        ),
    )

    lr: NonNegative = 1.0
    rho: Annotated[float, Interval("[0, 1]")] = 0.9
    eps: NonNegative = 1e-6
    slots = ("square_avg", "acc_delta")

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        v = mean_square(xp, slot.square_avg, grad, self.rho)
        delta = xp.sqrt(slot.acc_delta + self.eps) / xp.sqrt(v + self.eps) * grad
        d = mean_square(xp, slot.acc_delta, delta, self.rho)
        return param - self.lr * delta, {"square_avg": v, "acc_delta": d}
