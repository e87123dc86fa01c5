"""Schedule-free learning: averages of the weights in the place of a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import (
    PARAM,
    Decay,
    HyperparameterError,
    Interval,
    NonNegative,
    Rule,
    Update,
    mean_square,
)

Inner = Annotated[float, Interval("(0, 1)")]


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Rule):
    """Base of the schedule-free rules: what they do with a direction."""

    has_modes = decay_of_its_own = True

    lr: NonNegative
    beta1: Inner = 0.9
    warmup_steps: NonNegative = 0.0
    r: NonNegative = 0.0
    weight_lr_power: NonNegative = 2.0
    numbers = ("weight_sum", "lr_max")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoupled:
            raise HyperparameterError("decoupled", True, "False: the decay belongs to the step")

    def initial(self, slot: str) -> Any:
        return PARAM if slot == "z" else 0.0

    def descend(self, t: int, param: Array, direction: Array, slot: Any) -> Update:
        """Move ``z`` along a direction, and the average along with it."""
        if self.weight_decay:
            direction = direction + self.weight_decay * param
        lr = self.lr
        if self.warmup_steps:
            early = t < self.warmup_steps
            lr = self.lr * (1 + early * (t / self.warmup_steps - 1))
        lr_max = lr + (lr < slot.lr_max) * (slot.lr_max - lr)
        weight = t**self.r * lr_max**self.weight_lr_power
        weight_sum = slot.weight_sum + weight
        c = weight / (weight_sum + (weight_sum < 1e-300))  # 0 as long as lr is
        moved = param + c * (slot.z - param) - lr * (1 - self.beta1 * (1 - c)) * direction
        new = {"z": slot.z - lr * direction, "weight_sum": weight_sum, "lr_max": lr_max}
        return moved, new

    def evaluated(self, xp: Namespace, param: Array, slot: Any) -> Array:
        z: Array = slot.z
        return param + (1 - 1 / self.beta1) * (z - param)

    def trained(self, xp: Namespace, param: Array, slot: Any) -> Array:
        z: Array = slot.z
        return param + (1 - self.beta1) * (z - param)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSGD(ScheduleFree):
    """Schedule-free gradient descent: no schedule, and no end that must be known beforehand.

    Update, where the parameter is ``y`` while it is trained, and ``x`` is what to evaluate::

        lr_t = lr * min(1, t / warmup_steps)
        lr_max = max(lr_max, lr_t)
        weight = t**r * lr_max**weight_lr_power
        c = weight / (sum of all weights so far)
        d = grad + weight_decay * y
        y = y + c * (z - y) - lr_t * (1 - beta1 * (1 - c)) * d
        z = z - lr_t * d
        x = y + (1 - 1 / beta1) * (z - y)

    Args:
        lr: Learning rate, in [0, inf). 1.0 by default.
        beta1: How far ``y`` is from ``z`` to ``x``, in (0, 1). 0.9 by default.
        warmup_steps: Steps in which the learning rate grows, in [0, inf). 0.0 by default.
        r: Power of the step in the weights of the average, in [0, inf). 0.0 by default.
        weight_lr_power: Power of the learning rate in them, in [0, inf). 2.0 by default.
        weight_decay: Weight decay at ``y``, in [0, inf). 0.0 by default.
        decoupled: Has to be False, as the decay belongs to the step. False by default.
        maximize: See `Rule`. False by default.

    State:
        z: Where plain descent would be; shape and dtype of the parameter, and at first the
            parameter itself.
        weight_sum: The sum of the weights: a number; 0 at first.
        lr_max: The largest ``lr_t`` so far: a number; 0 at first.

    Cost: 20 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range, or ``decoupled``.

    Differs from:
        schedulefree, the authors' package: it is ``SGDScheduleFree(momentum=beta1)``, whose weights
        have float64 sums.

    Source:
        Defazio et al. 2024, "The Road Less Scheduled", equations 3-5.
        https://arxiv.org/abs/2405.15682

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = ScheduleFreeSGD(lr=0.5, beta1=0.5)
        >>> slots = Slots({"z": np.array([1.0]), "weight_sum": 0.0, "lr_max": 0.0})
        >>> rule.step(np, 1, np.array([1.0]), np.array([1.0]), slots)
        (array([0.5]), {'z': array([0.5]), 'weight_sum': 0.25, 'lr_max': 0.5})
    """

    lr: NonNegative = 1.0
    slots = ("z",)

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        return self.descend(t, param, grad, slot)


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamW(ScheduleFree):
    """Schedule-free AdamW: `ScheduleFreeSGD` along Adam's direction, without its momentum.

    Update, with the names of `ScheduleFreeSGD`::

        v = beta2 * v + (1 - beta2) * grad**2                      # once infinite, it stays so
        d = grad / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * y
        y, z, x = as in ScheduleFreeSGD

    Args:
        lr: Learning rate, in [0, inf). 0.0025 by default.
        beta1: How far ``y`` is from ``z`` to ``x``, in (0, 1). 0.9 by default.
        beta2: Decay of the average squared gradient, in [0, 1). 0.999 by default.
        eps: Keeps the division finite, in [0, inf). 1e-08 by default.
        warmup_steps: Steps in which the learning rate grows, in [0, inf). 0.0 by default.
        r: Power of the step in the weights of the average, in [0, inf). 0.0 by default.
        weight_lr_power: Power of the learning rate in them, in [0, inf). 2.0 by default.
        weight_decay: Weight decay at ``y``, in [0, inf). 0.0 by default.
        decoupled: Has to be False, as the decay belongs to the step. False by default.
        maximize: See `Rule`. False by default.

    State:
        z: Where plain descent would be; shape and dtype of the parameter, and at first the
            parameter itself.
        exp_avg_sq: ``v``, likewise; zero at first.
        weight_sum: The sum of the weights: a number; 0 at first.
        lr_max: The largest ``lr_t`` so far: a number; 0 at first.

    Cost: 28 bytes per float32 element.

    Raises:
        HyperparameterError: a hyperparameter out of its range, or ``decoupled``.

    Differs from:
        schedulefree, the authors' package: it is ``AdamWScheduleFree``, whose weights have float64
        sums.

    Source:
        Defazio et al. 2024, "The Road Less Scheduled", algorithm 1.
        https://arxiv.org/abs/2405.15682

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = ScheduleFreeAdamW(lr=0.5, beta1=0.5, eps=0.0)
        >>> arrays = {"z": np.array([1.0]), "exp_avg_sq": np.array([0.0])}
        >>> slots = Slots({**arrays, "weight_sum": 0.0, "lr_max": 0.0})
        >>> rule.step(np, 1, np.array([1.0]), np.array([4.0]), slots)[0].round(6)
        array([0.5])
    """

    lr: NonNegative = 2.5e-3
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    slots = ("z", "exp_avg_sq")

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        v = mean_square(xp, slot.exp_avg_sq, grad, self.beta2)
        denom = (1 - self.beta2**t) ** -0.5 * xp.sqrt(v) + self.eps
        moved, new = self.descend(t, param, grad / denom, slot)
        return moved, {**new, "exp_avg_sq": v}
