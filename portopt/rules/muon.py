"""Muon: momentum, orthogonalized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from portopt.arrays import Array, Namespace
from portopt.rules.base import Interval, NonNegative, Real, Rule, Update, ema
from portopt.rules.native import Native


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Muon: the momentum of a matrix, with all its singular values brought near 1.

    Update::

        b = b + (1 - momentum) * (grad - b)                        # "average"
        x = grad + momentum * (b - grad) if nesterov else b
        b = momentum * b + grad                                    # "sum"
        x = grad + momentum * b if nesterov else b

        x = x / max(norm(x), eps)                                  # or norm(x) + eps, "added"
        ns_steps times, transposed if it has more rows than columns:
            x = ns_a * x + (ns_b * x @ x.T + ns_c * (x @ x.T) @ (x @ x.T)) @ x
        param = param - lr * scale * x

    where ``scale`` is, for a matrix of n rows and m columns, ``sqrt(max(1, n / m))`` ("original"),
    ``rms_rate * sqrt(max(n, m))`` ("match_rms_adamw") or 1 ("constant").

    Products of matrices are no work for a kernel: the rule runs operation by operation, and its
    bits depend on how a framework multiplies.

    Args:
        lr: Learning rate, in [0, inf). 0.001 by default.
        momentum: Decay of the buffer, in [0, inf). 0.95 by default.
        nesterov: Look ahead along the buffer. True by default.
        buffer: What the buffer holds: 'average' (PyTorch), 'sum' (Keras, and the original).
            'average' by default.
        ns_a: Coefficient of ``x``, any real number. 3.4445 by default.
        ns_b: Coefficient of the cubic term, any real number. -4.775 by default.
        ns_c: Coefficient of the quintic term, any real number. 2.0315 by default.
        ns_steps: The number of Newton-Schulz steps, a whole number in [0, 100). 5 by default.
        eps: Keeps the first division finite, in [0, inf). 1e-07 by default.
        eps_form: 'floor' (PyTorch) or 'added' (Keras). 'floor' by default.
        adjust_lr_fn: The ``scale``: 'original' (as None), 'match_rms_adamw' or 'constant'. None by
            default.
        rms_rate: The size of a step of "match_rms_adamw", in [0, inf). 0.2 by default.
        weight_decay: Weight decay, in [0, inf). 0.1 by default.
        decoupled: See `Rule`. True by default.
        maximize: See `Rule`. False by default.

    State:
        momentum_buffer: ``b``; shape and dtype of the parameter, which must be a matrix; zero at
            first.

    Cost: 20 bytes per float32 element, and what the products need.

    Raises:
        HyperparameterError: a hyperparameter out of its range.
        ValueError: a parameter is no matrix.

    Differs from:
        PyTorch: ``torch.optim.Muon``, which computes the Newton-Schulz steps in bfloat16; here they
        are in the dtype of the step. Keras: ``buffer="sum", eps_form="added", weight_decay=0.004,
        adjust_lr_fn="match_rms_adamw"`` is ``keras.optimizers.Muon`` for matrices; it moves every
        other variable by Adam.

    Source:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
        https://kellerjordan.github.io/posts/muon/; "match_rms_adamw": Liu et al. 2025, "Muon is
        Scalable for LLM Training", equation 4. https://arxiv.org/abs/2502.16982

    Example:
        >>> import numpy as np
        >>> from portopt.rules import Slots
        >>> rule = Muon(lr=1.0, weight_decay=0.0, ns_a=1.5, ns_b=-0.5, ns_c=0.0, ns_steps=20)
        >>> slots = Slots({"momentum_buffer": np.zeros((2, 2))})
        >>> param = rule.step(np, 1, np.zeros((2, 2)), np.array([[0.0, 2.0], [1.0, 0.0]]), slots)[0]
        >>> param.round(6) + 0.0
        array([[ 0., -1.],
               [-1.,  0.]])
    """

    by_shape = True
    natives = (
        Native(
            "torch.optim.Muon",
            arguments={"ns_coefficients": ("ns_a", "ns_b", "ns_c")},
            words={
                "lr": "Learning rate should be >= 0 but is",
                "momentum": "momentum should be >= 0 but is",
                "weight_decay": "weight decay should be >= 0 but is",
            },
            keeps_step=False,
        ),
        Native(
            "keras.optimizers.Muon",
            values={
                "buffer": "sum",
                "eps_form": "added",
                "weight_decay": 0.004,
                "adjust_lr_fn": "match_rms_adamw",
            },
            arguments={
                **{"muon_a": "ns_a", "muon_b": "ns_b", "muon_c": "ns_c"},
                "epsilon": "epsilon",  # which is Adam's
            },
            slots=({"momentum_buffer": "momentum"},),
        ),
    )

    lr: NonNegative = 1e-3
    momentum: NonNegative = 0.95
    nesterov: bool = True
    buffer: Literal["average", "sum"] = "average"
    ns_a: Real = 3.4445
    ns_b: Real = -4.775
    ns_c: Real = 2.0315
    ns_steps: Annotated[int, Interval("[0, 100)")] = 5
    eps: NonNegative = 1e-7
    eps_form: Literal["floor", "added"] = "floor"
    adjust_lr_fn: Literal[None, "original", "match_rms_adamw", "constant"] = None
    rms_rate: NonNegative = 0.2
    weight_decay: NonNegative = 0.1
    decoupled: bool = True
    slots = ("momentum_buffer",)

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) != 2:
            raise ValueError(f"Muon only supports 2D parameters, got one of shape {shape}")
        return super().slot_shapes(shape)

    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        b = slot.momentum_buffer
        if self.buffer == "average":
            b = ema(b, grad, self.momentum)
            x = grad + self.momentum * (b - grad) if self.nesterov else b
        else:
            b = b + (grad - (1 - self.momentum) * b)  # as exact as an `ema`
            x = grad + self.momentum * b if self.nesterov else b
        step = self.lr * self._scale(*param.shape) * self._orthogonalized(xp, x)
        return param - step, {"momentum_buffer": b}

    def _orthogonalized(self, xp: Namespace, x: Array) -> Array:
        """The nearest matrix with orthogonal rows or columns, approximately."""
        rows, columns = x.shape
        if rows > columns:  # the products are the smaller ones then
            x = xp.matrix_transpose(x)
        norm = xp.sqrt(xp.sum(x * x))
        x = x / (norm + self.eps if self.eps_form == "added" else xp.maximum(norm, self.eps))
        for _ in range(self.ns_steps):
            gram = x @ xp.matrix_transpose(x)
            x = self.ns_a * x + (self.ns_b * gram + self.ns_c * (gram @ gram)) @ x
        return xp.matrix_transpose(x) if rows > columns else x

    def _scale(self, rows: int, columns: int) -> float:
        if self.adjust_lr_fn == "constant":
            return 1.0
        if self.adjust_lr_fn == "match_rms_adamw":
            return self.rms_rate * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns)) if columns else 1.0
