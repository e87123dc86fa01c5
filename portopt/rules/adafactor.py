"""Adafactor: a matrix of squared gradients, kept as its row and column means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import Interval, NonNegative, Rule, Update
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Adafactor: Adam's second moment in a row and a column, relative step sizes, no momentum.

    Update, for a parameter of two axes or more (the means are over its last and its last but one)::

        w = t ** beta2_decay
        row = row + w * (mean(grad**2, -1) - row)
        col = col + w * (mean(grad**2, -2) - col)
        v = row * col / max(mean(row, -2), eps1)
        u = grad / sqrt(max(v, eps1**2))
        alpha = max(eps2, rms(param)) * min(lr, 1 / sqrt(t))
        param = param - lr * weight_decay * param - alpha * u / max(1, rms(u) / clip_threshold)

    A parameter of fewer axes has ``v = v + w * (grad**2 - v)``. With ``eps_form="added"``, ``eps1``
    is added to ``grad**2`` and nowhere else. ``rms(x)`` is ``sqrt(mean(x**2))``.

    The means are over many elements, so that no kernel takes this rule: it runs operation by
    operation, and its bits depend on the order in which a framework sums.

    Args:
        lr: The largest relative step, in [0, inf). 0.01 by default.
        beta2_decay: Power of the fall of ``w``, in (-inf, 0]. -0.8 by default.
        eps1: Keeps the division finite, in [0, inf); float32's resolution,
            1.1920928955078125e-07 by default.
        eps2: The least root mean square that a parameter counts with, in [0, inf). 0.001 by
            default.
        clip_threshold: The largest root mean square of ``u``, in (0, inf). 1.0 by default.
        eps_form: Where ``eps1`` stands: 'floor' (PyTorch), 'added' (paper, Keras). 'floor' by
            default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: Shrink the parameter first, as `Rule` does, so that its root mean square is that
            of the smaller one. False by default.
        maximize: See `Rule`. False by default.

    State, in the dtype of the parameter, zero at first:
        row_var, col_var: ``row`` and ``col``, of the parameter's shape but for a 1 as its last, or
            last but one, length; if it has two axes or more.
        variance: ``v``, of the parameter's shape, if it has fewer.

    Cost: 0.01 bytes of state per float32 element of a 1024x1024 matrix.

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch: ``torch.optim.Adafactor``, whose ``eps1`` is the resolution of the parameter's
        dtype. Keras: ``eps_form="added", eps1=1e-30, lr=0.001, decoupled=True`` is
        ``keras.optimizers.Adafactor``. Paper: ``eps_form="added", eps1=1e-30``; PyTorch's and
        Keras's ``lr`` is its 1e-2.

    Source:
        Shazeer & Stern 2018, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
        algorithms 4 and 5. https://arxiv.org/abs/1804.04235

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Adafactor(lr=0.5)
        >>> slots = Slots({"row_var": np.zeros((2, 1)), "col_var": np.zeros((1, 2))})
        >>> rule.step(np, 1, np.full((2, 2), 4.0), np.full((2, 2), 3.0), slots)[0]
        array([[2., 2.],
               [2., 2.]])
    """

    by_shape = decay_of_its_own = True
    natives = (
        Native(
            "torch.optim.Adafactor",
            arguments={"eps": ("eps1", "eps2"), "d": "clip_threshold"},
            words={
                "lr": "Learning rate should be >= 0 but is",
                "beta2_decay": "beta2_decay should be <= 0 but is",
                "eps1": "epsilon1 should be >= 0 but is",
                "eps2": "epsilon2 should be >= 0 but is",
                "clip_threshold": "Clipping threshold d should be >= 1 but is",
                "weight_decay": "weight_decay should be >= 0 but is",
            },
        ),
        Native(
            "keras.optimizers.Adafactor",
            values={"eps_form": "added", "eps1": 1e-30, "lr": 1e-3, "decoupled": True},
            arguments={"beta_2_decay": "beta2_decay", "epsilon_1": "eps1", "epsilon_2": "eps2"},
            slots=({"row_var": "r", "col_var": "c", "variance": "velocity"},),
        ),
    )

    lr: NonNegative = 1e-2
    beta2_decay: Annotated[float, Interval("(-inf, 0]")] = -0.8
    eps1: NonNegative = 2.0**-23
    eps2: NonNegative = 1e-3
    clip_threshold: Annotated[float, Interval("(0, inf)")] = 1.0
    eps_form: Literal["floor", "added"] = "floor"
    slots = ("row_var", "col_var", "variance")

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        def mean(x: Array, axis: int) -> Array:
            return 1 / max(1, x.shape[axis]) * xp.sum(x, axis=axis, keepdims=True)

        def rms(x: Array) -> Array:
            return xp.sqrt(1 / max(1, math.prod(x.shape)) * xp.sum(x * x))

        def at_least(least: float, x: Array) -> Array:
            if self.eps_form == "floor":  # PyTorch's, to which NaN is not more
                return xp.where(x > least, x, least)
            return xp.maximum(x, least)

        w, square = t**self.beta2_decay, grad * grad
        if self.eps_form == "added":
            square = square + self.eps1
        if len(param.shape) < 2:
            v = slot.variance + w * (square - slot.variance)
            new = {"variance": v}
        else:
            row = slot.row_var + w * (mean(square, -1) - slot.row_var)
            col = slot.col_var + w * (mean(square, -2) - slot.col_var)
            new, all_rows = {"row_var": row, "col_var": col}, mean(row, -2)
            if self.eps_form == "floor":
                all_rows = xp.maximum(all_rows, self.eps1)
            v = row / all_rows * col
        if self.eps_form == "floor":
            v = xp.maximum(v, self.eps1 * self.eps1)
        u, largest = grad / xp.sqrt(v), t**-0.5
        largest = largest + (self.lr < largest) * (self.lr - largest)
        alpha = largest * at_least(self.eps2, rms(param))
        moved = param - alpha / at_least(1.0, 1 / self.clip_threshold * rms(u)) * u
        if self.weight_decay and not self.decoupled:
            moved = moved - self.lr * self.weight_decay * param
        return moved, new
