"""The optimizers of ``keras.optimizers``, by the same names, with the same arguments and slots."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from portopt import rules
from portopt_tf.optimizer import Optimizer

registered = keras.saving.register_keras_serializable(package="portopt")


@registered
class SGD(Optimizer):
    """``keras.optimizers.SGD``: the rule `portopt.rules.Momentum`, or `portopt.rules.SGD`.

    The momentum buffer is a velocity, which holds the learning rate. Arguments, after
    ``weight_decay`` by name, are those of ``keras.optimizers.SGD``.
    """

    fields: ClassVar = {"momentum": "momentum", "nesterov": "nesterov"}
    slot_names: ClassVar = ({"momentum_buffer": "momentum"},)

    def __init__(
        self,
        learning_rate: Any = 0.01,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(momentum, float) or not 0 <= momentum <= 1:
            raise ValueError(
                f"`momentum` must be a float between [0, 1]. Received: momentum={momentum!r}"
            )
        hyperparameters = {"momentum": momentum, "nesterov": nesterov}
        super().__init__(learning_rate, hyperparameters, weight_decay=weight_decay, **kwargs)

    def rule_of(self) -> tuple[type[rules.Rule], dict[str, Any]]:
        decay = {"decoupled": True, "weight_decay": self.weight_decay or 0.0}
        if self.momentum == 0:
            return rules.SGD, decay
        momentum = {"momentum": self.momentum, "nesterov": self.nesterov, "buffer": "velocity"}
        return rules.Momentum, {**decay, **momentum}


@registered
class RMSprop(Optimizer):
    """``keras.optimizers.RMSprop``: the rule `portopt.rules.RMSprop`, epsilon inside the root.

    The momentum buffer is a velocity, which holds the learning rate. Arguments, after
    ``weight_decay`` by name, are those of ``keras.optimizers.RMSprop``.
    """

    rule_class = rules.RMSprop
    fixed: ClassVar = {"decoupled": True, "eps_form": "inside", "buffer": "velocity"}
    fields: ClassVar = {
        "rho": "alpha",
        "momentum": "momentum",
        "epsilon": "eps",
        "centered": "centered",
    }
    slot_names: ClassVar = (
        {"square_avg": "velocity"},
        {"momentum_buffer": "momentum"},
        {"grad_avg": "average_gradient"},
    )

    def __init__(
        self,
        learning_rate: Any = 0.001,
        rho: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-7,
        centered: bool = False,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        hyperparameters = {
            "rho": rho,
            "momentum": momentum,
            "epsilon": epsilon,
            "centered": centered,
        }
        super().__init__(learning_rate, hyperparameters, weight_decay=weight_decay, **kwargs)


@registered
class Adam(Optimizer):
    """``keras.optimizers.Adam``: the rule `portopt.rules.Adam` with "epsilon hat".

    Arguments, after ``weight_decay`` by name, are those of ``keras.optimizers.Adam``.
    """

    rule_class = rules.Adam
    fixed: ClassVar = {"decoupled": True, "eps_form": "hat"}
    fields: ClassVar = {
        "beta_1": "beta1",
        "beta_2": "beta2",
        "epsilon": "eps",
        "amsgrad": "amsgrad",
    }
    slot_names: ClassVar = (
        {"exp_avg": "momentum", "exp_avg_sq": "velocity"},
        {"max_exp_avg_sq": "velocity_hat"},
    )

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        hyperparameters = {
            "beta_1": beta_1,
            "beta_2": beta_2,
            "epsilon": epsilon,
            "amsgrad": amsgrad,
        }
        super().__init__(learning_rate, hyperparameters, weight_decay=weight_decay, **kwargs)


@registered
class AdamW(Adam):
    """``keras.optimizers.AdamW``: `Adam` with a weight decay.

    Arguments, after ``amsgrad`` by name, are those of ``keras.optimizers.AdamW``.
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        weight_decay: float = 0.004,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        amsgrad: bool = False,
        **kwargs: Any,
    ) -> None:
        if weight_decay is None:
            raise ValueError("Argument `weight_decay` must be a float. Received: weight_decay=None")
        super().__init__(
            learning_rate, beta_1, beta_2, epsilon, amsgrad, weight_decay=weight_decay, **kwargs
        )
