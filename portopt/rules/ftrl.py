"""FTRL-Proximal: follow the regularized leader."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import FIXED, Interval, NonNegative, Rule, Update
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Ftrl(Rule):
    """FTRL-Proximal: the parameter that is best for all gradients so far, sparse by its L1 term.

    Update::

        p = -lr_power
        n_new = n + grad**2
        z = z + grad + 2 * l2_shrinkage * param - (n_new**p - n**p) / lr * param
        param = (min(max(z, -l1), l1) - z) / ((n_new**p + beta) / lr + 2 * l2)
        n = n_new

    Args:
        lr: Learning rate, in (0, inf). 0.001 by default.
        lr_power: Power of ``n`` in the learning rate, in (-inf, 0]; if no multiple of 1/2, as far
            off as ``exp`` and ``log`` are. -0.5 by default.
        initial_accumulator_value: What ``n`` begins with, in [0, inf). 0.1 by default.
        l1: Strength of the L1 regularization, in [0, inf). 0.0 by default.
        l2: Strength of the L2 regularization, in [0, inf). 0.0 by default.
        l2_shrinkage: Strength of an L2 penalty in the gradient alone, in [0, inf). 0.0 by default.
        beta: Added to the root of ``n``, in [0, inf). 0.0 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        accumulator: ``n``; shape and dtype of the parameter; ``initial_accumulator_value`` at
            first.
        linear: ``z``, likewise; zero at first.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        Keras: ``decoupled=True`` is ``keras.optimizers.Ftrl``. Paper: its ``alpha`` is ``lr``, its
        ``lambda_2`` is ``2 * l2``, and it has no shrinkage.

    Source:
        McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches", algorithm 1.
        https://doi.org/10.1145/2487575.2488200

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Ftrl(lr=0.5)
        >>> slots = Slots({"accumulator": np.array([0.0]), "linear": np.array([0.0])})
        >>> rule.step(np, 1, np.array([0.0]), np.array([2.0]), slots)
        (array([-0.5]), {'accumulator': array([4.]), 'linear': array([2.])})
    """

    natives = (
        Native(
            "keras.optimizers.Ftrl",
            values={"decoupled": True},
            arguments={
                "learning_rate_power": "lr_power",
                "l1_regularization_strength": "l1",
                "l2_regularization_strength": "l2",
                "l2_shrinkage_regularization_strength": "l2_shrinkage",
            },
            slots=({"accumulator": "accumulator", "linear": "linear"},),
        ),
    )

    lr: Annotated[float, Interval("(0, inf)")] = 1e-3
    lr_power: Annotated[float, Interval("(-inf, 0]"), FIXED] = -0.5
    initial_accumulator_value: NonNegative = 0.1
    l1: NonNegative = 0.0
    l2: NonNegative = 0.0
    l2_shrinkage: NonNegative = 0.0
    beta: NonNegative = 0.0
    slots = ("accumulator", "linear")

    def initial(self, slot: str) -> Any:
        return self.initial_accumulator_value if slot == "accumulator" else 0.0

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        n = slot.accumulator + grad * grad
        new, old = self._power(xp, n), self._power(xp, slot.accumulator)
        if self.l2_shrinkage:
            grad = grad + 2 * self.l2_shrinkage * param
        z = slot.linear + (grad - 1 / self.lr * (new - old) * param)
        clipped = xp.minimum(xp.maximum(z, -self.l1), self.l1) if self.l1 else 0.0
        quadratic = 1 / self.lr * new + (self.beta / self.lr + 2 * self.l2)
        return (clipped - z) / quadratic, {"accumulator": n, "linear": z}

    def _power(self, xp: Namespace, n: Array) -> Any:
        """``n ** -lr_power``: by products and a root, the rest of the power by a logarithm."""
        halves = round(-2 * self.lr_power)
        rest = -self.lr_power - halves / 2
        factors: list[Any] = [n] * (halves // 2) + [xp.sqrt(n)] * (halves % 2)
        if rest or not factors:
            log = xp.log(n) if rest > 0 else xp.maximum(xp.log(n), -340.0)  # finite, also of 0
            factors.append(xp.exp(rest * log))
        return math.prod(factors[1:], start=factors[0])
