"""Gradient descent, plain and with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import HyperparameterError, LooseDecay, NonNegative, Real, Rule, Update, ema
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Gradient descent.

    Update::

        param = param - lr * grad

    Args:
        lr: Learning rate, in [0, inf). 0.01 by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State: none.

    Cost: 12 bytes per float32 element (reads param and grad, writes param).

    Raises:
        HyperparameterError: a hyperparameter out of its range.

    Differs from:
        PyTorch, Keras: in nothing; what they call SGD with a momentum is `Momentum` here.

    Source:
        Robbins & Monro 1951, "A Stochastic Approximation Method", equation 6.
        https://doi.org/10.1214/aoms/1177729586

    Example:
        >>> import numpy as np
        >>> rule = SGD(lr=0.5)
        >>> rule.step(np, 1, np.array([1.0]), np.array([0.5]), {})[0]
        array([0.75])
    """

    natives = (
        Native("torch.optim.SGD"),
        Native("keras.optimizers.SGD", values={"decoupled": True}),
    )

    lr: NonNegative = 1e-2

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        return param - self.lr * grad, {}


@dataclass(frozen=True, kw_only=True)
class Momentum(Rule):
    """Gradient descent with momentum.

    Update, by what the buffer holds::

        "sum":       b = momentum * b + (1 - dampening) * grad     # grad alone at the first step
                     param = param - lr * (grad + momentum * b if nesterov else b)
        "velocity":  b = momentum * b - lr * grad
                     param = param + (momentum * b - lr * grad if nesterov else b)
        "average":   b = momentum * b + (1 - momentum) * grad
                     param = param - lr * b

    Args:
        lr: Learning rate, in [0, inf). 0.01 by default.
        momentum: Decay of the buffer, in [0, inf). 0.9 by default.
        dampening: Damps the gradient from the second step on; any real number, "sum" only.
            0.0 by default.
        nesterov: Look ahead along the buffer; "sum" without dampening, or "velocity".
            False by default.
        buffer: What the buffer holds: 'sum' (PyTorch), 'velocity' (Keras; a learning rate that
            changes reaches only later gradients), 'average' (the teaching form). 'sum' by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        momentum_buffer: ``b``; shape and dtype of the parameter; zero at first.

    Cost: 20 bytes per float32 element (reads param, grad and slot, writes param and slot).

    Raises:
        HyperparameterError: a hyperparameter out of its range, ``dampening`` with a ``buffer``
            other than "sum", or ``nesterov`` with momentum 0, a dampening or "average".

    Differs from:
        PyTorch: ``buffer="sum"`` is ``torch.optim.SGD``. Keras: ``buffer="velocity"`` is
        ``keras.optimizers.SGD``. Paper: Sutskever's equations 1-2 are "velocity".

    Source:
        Polyak 1964, "Some methods of speeding up the convergence of iteration methods", equation 9.
        https://doi.org/10.1016/0041-5553(64)90137-5; Sutskever et al. 2013, "On the importance of
        initialization and momentum in deep learning", equations 1-4.
        https://proceedings.mlr.press/v28/sutskever13.html

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Momentum(lr=0.5, momentum=0.9)
        >>> param, slots = np.array([1.0]), Slots({"momentum_buffer": np.array([1.0])})
        >>> rule.step(np, 2, param, np.array([0.1]), slots)
        (array([0.5]), {'momentum_buffer': array([1.])})
    """

    natives = (
        Native("torch.optim.SGD"),
        Native("keras.optimizers.SGD", values={"buffer": "velocity", "decoupled": True}),
    )

    lr: NonNegative = 1e-2
    momentum: LooseDecay = 0.9
    dampening: Real = 0.0
    nesterov: bool = False
    buffer: Literal["sum", "velocity", "average"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dampening and self.buffer != "sum":
            raise HyperparameterError("dampening", self.dampening, "0 unless buffer is 'sum'")
        if self.nesterov and (not self.momentum or self.dampening or self.buffer == "average"):
            allowed = "False with momentum 0, a dampening, or buffer 'average'"
            raise HyperparameterError("nesterov", self.nesterov, allowed)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        b = slot.momentum_buffer
        if self.buffer == "velocity":
            b = self.momentum * b - self.lr * grad
            move = self.momentum * b - self.lr * grad if self.nesterov else b
            return param + move, {"momentum_buffer": b}
        if self.buffer == "average":
            b = ema(b, grad, self.momentum)
        elif self.dampening:
            b = self.momentum * b + (1 - self.dampening * (t > 1)) * grad
        else:
            b = self.momentum * b + grad
        direction = grad + self.momentum * b if self.nesterov else b
        return param - self.lr * direction, {"momentum_buffer": b}
