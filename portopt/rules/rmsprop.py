"""RMSprop: steps scaled by a running average of squared gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import Interval, LooseDecay, NonNegative, Rule, Update, ema, mean_square
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class RMSprop(Rule):
    """RMSprop.

    Update::

        v = alpha * v + (1 - alpha) * grad**2                       # once infinite, it stays so
        a = alpha * a + (1 - alpha) * grad                          # centered only
        spread = max(v - a**2, 0) if centered else v
        scaled = grad / (sqrt(spread) + eps)                        # eps_form "outside"
        scaled = grad / sqrt(spread + eps)                          # eps_form "inside"
        param = param - lr * scaled                                 # without momentum
        b = momentum * b + scaled;       param = param - lr * b     # buffer "sum"
        b = momentum * b + lr * scaled;  param = param - b          # buffer "velocity"

    Args:
        lr: Learning rate, in [0, inf). 0.01 by default.
        alpha: Decay of the averages, in [0, 1]. 0.99 by default.
        eps: Keeps the division finite, in [0, inf). 1e-08 by default.
        momentum: Decay of the buffer, in [0, inf). 0.0 by default.
        centered: Scale by the variance instead of the second moment. False by default.
        eps_form: Where eps stands: 'outside' the root (PyTorch) or 'inside' (Keras, and the
            teaching form). 'outside' by default.
        buffer: What the momentum buffer holds: a 'sum' (PyTorch) or a 'velocity', which holds the
            learning rate (Keras). 'sum' by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        square_avg: ``v``; shape and dtype of the parameter; zero at first.
        grad_avg: ``a``, likewise, with ``centered``.
        momentum_buffer: ``b``, likewise, with ``momentum``.

    Cost: 20 bytes per float32 element, and 8 more for each of ``grad_avg`` and ``momentum_buffer``.

    Raises:
        HyperparameterError: a hyperparameter out of its range or not among its choices.

    Differs from:
        PyTorch: the defaults are ``torch.optim.RMSprop``. Keras: ``eps_form="inside",
        buffer="velocity", lr=1e-3, alpha=0.9, eps=1e-7, decoupled=True`` is
        ``keras.optimizers.RMSprop``. Both: where rounding leaves a spread below zero they take its
        root, which is NaN.

    Source:
        Tieleman & Hinton 2012, "Neural Networks for Machine Learning", lecture 6.5, slide 29.
        https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves
        2013, "Generating Sequences With Recurrent Neural Networks", equations 38-41.
        https://arxiv.org/abs/1308.0850

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = RMSprop(lr=0.1, alpha=0.75, eps=0.0)
        >>> slots = Slots({"square_avg": np.array([0.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([0.8]), {'square_avg': array([1.])})
    """

    natives = (
        Native("torch.optim.RMSprop"),
        Native(
            "keras.optimizers.RMSprop",
            values={
                "lr": 1e-3,
                "alpha": 0.9,
                "eps": 1e-7,
                "eps_form": "inside",
                "buffer": "velocity",
                "decoupled": True,
            },
            arguments={"rho": "alpha"},
            slots=(
                {"square_avg": "velocity"},
                {"momentum_buffer": "momentum"},
                {"grad_avg": "average_gradient"},
            ),
        ),
    )

    lr: NonNegative = 1e-2
    alpha: Annotated[float, Interval("[0, 1]")] = 0.99
    eps: NonNegative = 1e-8
    momentum: LooseDecay = 0.0
    centered: bool = False
    eps_form: Literal["outside", "inside"] = "outside"
    buffer: Literal["sum", "velocity"] = "sum"

    @property
    def slots(self) -> tuple[str, ...]:
        centered = ("grad_avg",) if self.centered else ()
        momentum = ("momentum_buffer",) if self.momentum else ()
        return ("square_avg", *centered, *momentum)

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        v = spread = mean_square(xp, slot.square_avg, grad, self.alpha)
        new = {"square_avg": v}
        if self.centered:
            a = new["grad_avg"] = ema(slot.grad_avg, grad, self.alpha)
            spread = xp.maximum(v - a * a, 0.0)  # rounding may leave less than nothing
        if self.eps_form == "outside":
            denom = xp.sqrt(spread) + self.eps
        else:
            denom = xp.sqrt(spread + self.eps)
        if not self.momentum:
            return param - self.lr * grad / denom, new
        if self.buffer == "sum":
            b = self.momentum * slot.momentum_buffer + grad / denom
            move = self.lr * b
        else:
            b = move = self.momentum * slot.momentum_buffer + self.lr * grad / denom
        return param - move, new | {"momentum_buffer": b}
