"""Rprop: steps by the gradient's sign alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import Interval, NonNegative, Rule, Update
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Rprop(Rule):
    """Resilient backpropagation: each element's step grows while its gradient keeps its sign.

    Update::

        same = grad * g                      # g: the last gradient
        s = min(s * etaplus, step_size_max)       where same > 0
        s = max(s * etaminus, step_size_min)      where same < 0
        g = 0 where same < 0 else grad
        param = param - sign(g) * s          # a NaN moves nothing

    Args:
        lr: The size of the first step, in [0, inf). 0.01 by default.
        etaminus: What a step shrinks by, in (0, 1). 0.5 by default.
        etaplus: What a step grows by, in (1, inf). 1.2 by default.
        step_size_min: The smallest step, in [0, inf). 1e-06 by default.
        step_size_max: The largest step, in [0, inf). 50.0 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        prev: ``g``; shape and dtype of the parameter; zero at first.
        step_size: ``s``, likewise; ``lr`` at first.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch: the defaults are ``torch.optim.Rprop``, and as there both bounds hold at every
        step.

    Source:
        Riedmiller & Braun 1993, "A direct adaptive method for faster backpropagation learning: the
        RPROP algorithm", section C. https://doi.org/10.1109/ICNN.1993.298623; without its undoing
        of a step too far: Igel & Huesken 2000, "Improving the Rprop Learning Algorithm", Rprop-.

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Rprop()
        >>> slots = Slots({"prev": np.array([1.0]), "step_size": np.array([0.5])})
        >>> rule.step(np, 2, np.array([1.0]), np.array([2.0]), slots)
        (array([0.4]), {'prev': array([2.]), 'step_size': array([0.6])})
    """

    natives = (
        Native(
            "torch.optim.Rprop",
            arguments={
                "etas": ("etaminus", "etaplus"),
                "step_sizes": ("step_size_min", "step_size_max"),
            },
        ),
    )

    lr: NonNegative = 1e-2
    etaminus: Annotated[float, Interval("(0, 1)")] = 0.5
    etaplus: Annotated[float, Interval("(1, inf)")] = 1.2
    step_size_min: NonNegative = 1e-6
    step_size_max: NonNegative = 50.0
    slots = ("prev", "step_size")

    def initial(self, slot: str) -> Any:
        return self.lr if slot == "step_size" else 0.0

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        same, s = grad * slot.prev, slot.step_size
        s = xp.where(same > 0, s * self.etaplus, xp.where(same < 0, s * self.etaminus, s))
        s = xp.minimum(xp.maximum(s, self.step_size_min), self.step_size_max)
        g = xp.where(same < 0, 0.0, grad)
        move = xp.where(g > 0, -s, xp.where(g < 0, s, 0.0))  # not the sign, which of NaN is NaN
        return param + move, {"prev": g, "step_size": s}
