"""Adam and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import Decay, NonNegative, Rule, Update, ema, mean_square
from portopt.rules.native import Native

_KERAS = {"eps": 1e-7, "eps_form": "hat", "decoupled": True}
_KERAS_SLOTS = (
    {"exp_avg": "momentum", "exp_avg_sq": "velocity"},
    {"max_exp_avg_sq": "velocity_hat"},
)


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam: steps along the average gradient, scaled by the root of the average squared one.

    Update::

        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2      # once infinite, it stays so
        v_max = max(v_max, v)                      # amsgrad only; then v_max stands for v below
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        param = param - lr * m_hat / (sqrt(v_hat) + eps)                 # eps_form "outside"
        param = param - lr * m_hat / sqrt(v_hat + eps)                   # eps_form "inside"
        param = param - lr * sqrt(1 - beta2**t) * m_hat / (sqrt(v) + eps)    # eps_form "hat"

    Args:
        lr: Learning rate, in [0, inf). 0.001 by default.
        beta1: Decay of the average gradient, in [0, 1). 0.9 by default.
        beta2: Decay of the average squared gradient, in [0, 1). 0.999 by default.
        eps: Keeps the division finite, in [0, inf). 1e-08 by default.
        amsgrad: Divide by the largest ``v`` so far. False by default.
        eps_form: Where eps stands: 'outside' the root (PyTorch, and the paper's algorithm 1), 'hat'
            (Keras, and the paper's "epsilon hat": added to the uncorrected root) or 'inside' the
            root (the teaching form). 'outside' by default.
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: See `Rule`. False by default.
        maximize: See `Rule`. False by default.

    State:
        exp_avg: ``m``; shape and dtype of the parameter; zero at first.
        exp_avg_sq: ``v``, likewise.
        max_exp_avg_sq: ``v_max``, likewise, with ``amsgrad``.

    Cost: 28 bytes per float32 element, and 8 more with ``amsgrad``.

    Raises:
        HyperparameterError: a hyperparameter out of its range or not among its choices.

    Differs from:
        PyTorch: the defaults are ``torch.optim.Adam``; ``eps_form="hat"`` on the rows of a sparse
        gradient is ``torch.optim.SparseAdam``. Keras: ``eps_form="hat", eps=1e-7,
        decoupled=True`` is ``keras.optimizers.Adam``, whose infinite ``v`` becomes NaN.
        Paper of AMSGrad: ``v`` is not corrected there, and here is.

    Source:
        Kingma & Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1, and the end of
        section 2 for "epsilon hat". https://arxiv.org/abs/1412.6980; AMSGrad: Reddi et al. 2018,
        "On the Convergence of Adam and Beyond", algorithm 2. https://arxiv.org/abs/1904.09237

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Adam(lr=0.1, beta1=0.5, beta2=0.75, eps=0.0)
        >>> slots = Slots({"exp_avg": np.array([0.0]), "exp_avg_sq": np.array([0.0])})
        >>> rule.step(np, 1, np.array([1.0]), np.array([2.0]), slots)
        (array([0.9]), {'exp_avg': array([1.]), 'exp_avg_sq': array([1.])})
    """

    natives: ClassVar[tuple[Native, ...]] = (
        Native("torch.optim.Adam"),
        Native("torch.optim.SparseAdam", values={"eps_form": "hat"}, sparse="only"),
        Native("keras.optimizers.Adam", values=_KERAS, slots=_KERAS_SLOTS),
    )

    lr: NonNegative = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    amsgrad: bool = False
    eps_form: Literal["outside", "hat", "inside"] = "outside"

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        m = ema(slot.exp_avg, grad, self.beta1)
        v = mean_square(xp, slot.exp_avg_sq, grad, self.beta2)
        new = {"exp_avg": m, "exp_avg_sq": v}
        if self.amsgrad:
            v = new["max_exp_avg_sq"] = xp.maximum(slot.max_exp_avg_sq, v)
        step_size = self.lr / (1 - self.beta1**t)
        bias2 = 1 - self.beta2**t
        if self.eps_form == "outside":
            denom = bias2**-0.5 * xp.sqrt(v) + self.eps
        elif self.eps_form == "inside":
            denom = xp.sqrt(1 / bias2 * v + self.eps)
        else:
            step_size = step_size * bias2**0.5
            denom = xp.sqrt(v) + self.eps
        return param - step_size * m / denom, new


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adam with decoupled weight decay.

    Update::

        param = param - lr * weight_decay * param, and then as Adam

    Args, State, Cost, Raises: as `Adam`, but ``weight_decay`` is 0.01 and ``decoupled`` True by
    default.

    Differs from:
        PyTorch: the defaults are ``torch.optim.AdamW``. Keras: ``eps_form="hat", eps=1e-7,
        weight_decay=0.004`` is ``keras.optimizers.AdamW``. Paper: no schedule multiplier.

    Source:
        Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2.
        https://arxiv.org/abs/1711.05101

    Example:
        >>> AdamW().weight_decay, AdamW().decoupled
        (0.01, True)
    """

    natives = (
        Native("torch.optim.AdamW"),
        Native(
            "keras.optimizers.AdamW", values={**_KERAS, "weight_decay": 4e-3}, slots=_KERAS_SLOTS
        ),
    )

    weight_decay: NonNegative = 1e-2
    decoupled: bool = True
