"""What stands around a rule in a training loop, composed with it into one program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portopt.arrays import Array, Namespace
from portopt.rules.base import (
    PARAM,
    Decay,
    HyperparameterError,
    Hyperparameters,
    NonNegative,
    Rule,
    Update,
    ema,
    is_zero,
)

AVERAGE = "param_ema"
"""The slot of `Around`'s own."""


def initial(rule: Rule, slot: str) -> Any:
    """What a slot, the rule's own or `AVERAGE`, holds before the first step: `Rule.initial`."""
    return PARAM if slot == AVERAGE else rule.initial(slot)


@dataclass(frozen=True, kw_only=True)
class Around(Hyperparameters):
    """The rest of a training step: what is done to gradients before a rule, and afterwards.

    It composes with any rule; all of it becomes one pass over memory, and one more over the
    gradients before it where their norm is asked for.

    Update::

        grad = grad / grad_scale
        grad = min(max(grad, -clip_value), clip_value)
        grad = grad * min(1, clip_norm / (norm + 1e-6))     # norm of all gradients / grad_scale
        param, slots = rule.step(param, grad, slots)        # nothing, if skip_nonfinite has to
        average = ema_decay * average + (1 - ema_decay) * param
        grad = 0                                            # zero_grad

    Args:
        grad_scale: What the loss was multiplied by, in [0, inf); 0.0, the default: by nothing.
        clip_value: The largest magnitude of an element of a gradient, in [0, inf); 0.0, the
            default: any.
        clip_norm: The largest 2-norm of all gradients together, in [0, inf); 0.0, the default: any.
        skip_nonfinite: Change nothing but, with ``zero_grad``, the gradients, and count no step,
            where a gradient has a NaN or an Inf. So it is where the sum of all squares overflows in
            float64, as with float64 gradients beyond 1e154. False by default.
        ema_decay: Decay of the weights' average, in [0, 1); 0.0, the default: keep none.
        zero_grad: Leave zeros in the gradients. False by default.

    State:
        param_ema: ``average``, with ``ema_decay``; shape and dtype of the parameter, and at first
            the parameter itself.

    Cost: 8 bytes per float32 element for ``ema_decay``, 4 for ``zero_grad``, and 4 for one or both
    of ``clip_norm`` and ``skip_nonfinite``; the others nothing.

    Raises:
        HyperparameterError: a value out of its range, or ``clip_value`` along with ``clip_norm``.

    Differs from:
        PyTorch: ``GradScaler``, ``clip_grad_value_``, ``clip_grad_norm_`` and
        ``swa_utils.get_ema_multi_avg_fn``, in this order; but ``AveragedModel`` begins with the
        weights after the first step, and goes on averaging a parameter that has no gradient.
        Keras: clips by ``min(1, clip_norm / norm)``; its averages begin as PyTorch's do.

    Source:
        Clipping by norm: Pascanu et al. 2013, "On the difficulty of training recurrent neural
        networks", algorithm 1. https://proceedings.mlr.press/v28/pascanu13.html; averages: Polyak &
        Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
        https://doi.org/10.1137/0330046

    Example:
        >>> import numpy as np
        >>> from portopt import Optimizer
        >>> from portopt.rules import SGD
        >>> param = np.array([1.0, 1.0])
        >>> optimizer = Optimizer(SGD(lr=0.5), [param], around=Around(clip_value=1.0))
        >>> optimizer.step([np.array([0.5, 100.0])])
        >>> param
        array([0.75, 0.5 ])
    """

    grad_scale: NonNegative = 0.0
    clip_value: NonNegative = 0.0
    clip_norm: NonNegative = 0.0
    skip_nonfinite: bool = False
    ema_decay: Decay = 0.0
    zero_grad: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_value and self.clip_norm:
            raise HyperparameterError("clip_norm", self.clip_norm, "0 with a clip_value")

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays kept beside the rule's own slots."""
        return (AVERAGE,) if self.ema_decay else ()

    @classmethod
    def of(cls, around: Around | None) -> Around:
        """What was given, or nothing; a TypeError if it is something else."""
        if not isinstance(around, Around | None):
            raise TypeError(f"around must be a portopt.Around or None, got {around!r}")
        return around or cls()

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of what `step` uses of its own fields, and ``grad_norm`` if it needs that."""
        used = tuple(name for name in self.hyperparameters() if not is_zero(getattr(self, name)))
        return (*used, "grad_norm") if self.clip_norm else used

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of the gradients must be known before the step."""
        return bool(self.clip_norm) or self.skip_nonfinite

    def step(
        self,
        rule: Rule,
        xp: Namespace,
        t: int,
        param: Array,
        grad: Array,
        slot: Any,
        grad_norm: float,
    ) -> Update:
        """One whole step of ``rule``, with all that stands around it.

        Arguments are those of `Rule.update`, and ``grad_norm``, a scalar: the 2-norm of all
        gradients together, as they are.

        Returns:
            The new parameter and slots, and the new gradient under "grad" with `zero_grad`.
        """
        # One factor, formed as a scalar: one rounding of the gradient instead of two.
        scale = 1 / self.grad_scale if self.grad_scale else 1.0
        if self.clip_norm:
            excess = (grad_norm * scale + 1e-6) / self.clip_norm
            scale = scale / (1 + (excess > 1) * (excess - 1))
        if self.grad_scale or self.clip_norm:
            grad = grad * scale
        if self.clip_value:
            grad = xp.minimum(xp.maximum(grad, -self.clip_value), self.clip_value)
        result = rule.step(xp, t, param, grad, slot)
        if not (self.ema_decay or self.zero_grad):
            return result
        param, new = result
        if self.ema_decay:
            new = {**new, AVERAGE: ema(slot.param_ema, param, self.ema_decay)}
        if self.zero_grad:
            new = {**new, "grad": xp.where(grad < grad, grad, 0.0)}  # 0 for NaN as well
        return param, new
