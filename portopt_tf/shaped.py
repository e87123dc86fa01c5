"""What Keras's optimizers that look at shapes do with their variables: Adafactor and Muon."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

from keras import ops

from portopt import rules
from portopt_tf.gradients import path_of
from portopt_tf.optimizer import Optimizer

_ADAM = next(native for native in rules.Adam.natives if native.framework == "keras")


class Adafactor(Optimizer):
    """Keeps Keras's variables, also those without a use.

    A mean is without the axis that is gone, and a number where there are no rows and columns; the
    velocity of a variable with rows and columns is formed anew in each step.
    """

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, learning_rate)
        if len(variable.shape) > 1:
            index = self._get_variable_index(variable)
            row, column, velocity = (own[index] for own in self._slots.values())
            row = row / ops.mean(row, axis=-1, keepdims=True)
            self.assign(velocity, ops.expand_dims(row, -1) * ops.expand_dims(column, -2))

    def _add_slots(
        self, rule: rules.Rule, names: Mapping[str, str], variables: list[Any]
    ) -> dict[str, list[Any]]:
        slots: dict[str, list[Any]] = {"row_var": [], "col_var": [], "variance": []}
        for variable in variables:
            *others, rows, columns = (None, None, *variable.shape)
            is_overwritten = self._overwrite_variable_with_gradient(variable)
            for slot, size in (("row_var", rows), ("col_var", columns)):
                shape, dtype = (*others[2:], size), variable.dtype
                if rows is None:
                    shape, dtype = (), "int32"
                lacks = is_overwritten and rows is not None
                own = None if lacks else self.add_variable(shape, dtype=dtype, name=variable.name)
                slots[slot].append(own)
            own = None
            if not is_overwritten:
                own = self.add_variable_from_reference(variable, name="velocity")
            slots["variance"].append(own)
        return slots

    def _slot_shapes(self, rule: rules.Rule, variable: Any) -> Mapping[str, tuple[int, ...]]:
        return {}  # which are Keras's own


class Muon(Optimizer):
    """Moves matrices by Muon, and every other variable by Adam, as Keras says which."""

    def rule_of(self) -> tuple[type[rules.Rule], dict[str, Any]]:
        rule, values = super().rule_of()
        if not hasattr(self, "rms_rate"):  # Keras before 3.13
            values |= {"adjust_lr_fn": "original"}
        elif self.rms_rate is None:
            values |= {"adjust_lr_fn": "constant", "rms_rate": 0.0}
        return rule, values

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "exclude_layers": self.exclude_layers or []}

    def _slot_shapes(self, rule: rules.Rule, variable: Any) -> Mapping[str, tuple[int, ...]]:
        return {}  # others go to Adam

    def variant(self, variable: Any) -> Hashable:
        velocity = self._slots["exp_avg_sq"][self._get_variable_index(variable)]
        return super().variant(variable), velocity is not None

    def rule_for(self, variant: Any, learning_rate: Any) -> rules.Rule:
        decays, is_for_adam = variant
        if not is_for_adam:
            return super().rule_for(decays, learning_rate)
        # Keras multiplies the decay by the learning rate as it was given.
        decay = getattr(self, "adam_weight_decay", self.weight_decay)  # it has its own from 3.13 on
        decay = 0.0 if decay is None or not decays else decay / self.adam_lr_ratio
        values = {
            "beta1": self.adam_beta_1,
            "beta2": self.adam_beta_2,
            "eps": self.epsilon,
            "weight_decay": decay,
            "lr": learning_rate * self.adam_lr_ratio,
        }
        return rules.Adam.unchecked(**{**_ADAM.values, **values})

    def _is_for_adam(self, variable: Any) -> bool:
        if len(variable.shape) != 2:
            return True
        path = path_of(variable)
        if self.exclude_embeddings and "embedding" in path.lower():
            return True
        return any(re.search(layer, path) for layer in self.exclude_layers or ())

    def _add_slots(
        self, rule: rules.Rule, names: Mapping[str, str], variables: list[Any]
    ) -> dict[str, list[Any]]:
        momenta, velocities = [], []
        for variable in variables:
            momentum = velocity = None
            if not self._overwrite_variable_with_gradient(variable):
                momentum = self.add_variable_from_reference(variable, name="momentum")
                if self._is_for_adam(variable):
                    velocity = self.add_variable_from_reference(variable, name="velocity")
            momenta.append(momentum)
            velocities.append(velocity)
        return {"momentum_buffer": momenta, "exp_avg": momenta, "exp_avg_sq": velocities}
