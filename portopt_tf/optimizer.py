"""`Optimizer`: any rule as a ``keras.optimizers.Optimizer``, on whatever backend Keras runs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, ClassVar

import keras
from keras import ops

from portopt.arrays import compute_dtype
from portopt.program import Program
from portopt.rules import HyperparameterError, Rule
from portopt.trace import trace


class Optimizer(keras.optimizers.Optimizer):
    """Base of the adapters: Keras's variables, and a rule's arithmetic.

    Clipping, averaging, gradient accumulation and loss scaling are Keras's own; weight decay is the
    rule's. A subclass is a table of translations.

    Args:
        learning_rate: A float, a ``LearningRateSchedule``, or a callable.
        hyperparameters: The other arguments that the rule knows; they become attributes.
        **kwargs: The arguments that every ``keras.optimizers.Optimizer`` takes.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """

    rule_class: ClassVar[type[Rule]]
    fields: ClassVar[Mapping[str, str]]
    """For each hyperparameter, under its name in Keras, the field of the rule."""
    fixed: ClassVar[Mapping[str, Any]] = {"decoupled": True}
    """Fields of the rule that make it Keras's."""
    slot_names: ClassVar[tuple[Mapping[str, str], ...]]
    """Names of the slots in Keras; one mapping for those that it creates variable by variable."""

    def __init__(
        self, learning_rate: Any, hyperparameters: Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        for name, value in hyperparameters.items():
            setattr(self, name, value)
        self._check(learning_rate)

    def rule_of(self) -> tuple[type[Rule], dict[str, Any]]:
        """The rule that the attributes mean: its class, and the fields that they set but ``lr``."""
        values = {field: getattr(self, name) for name, field in self.fields.items()}
        return self.rule_class, {**self.fixed, **values, "weight_decay": self.weight_decay or 0.0}

    def build(self, variables: list[Any]) -> None:
        """Create the slots of ``variables``, all zero and named ``{variable}_{slot}``."""
        if self.built:
            return
        super().build(variables)
        rule_class, values = self.rule_of()
        wanted = rule_class.unchecked(**values).slots
        self._slots: dict[str, list[Any]] = {}
        for names in self.slot_names:
            used = {slot: name for slot, name in names.items() if slot in wanted}
            made = self.add_optimizer_variables(variables, list(used.values()))
            self._slots |= dict(zip(used, made, strict=True))

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """One step of the rule for one variable and its slots."""
        rule_class, values = self.rule_of()
        if not self._use_weight_decay(variable):
            values["weight_decay"] = 0.0
        rule = rule_class.unchecked(**values)
        program = trace(rule)
        index = self._get_variable_index(variable)
        # A gradient of slices becomes dense here, which sums the rows of a repeated index.
        stored = {"param": variable, "grad": ops.convert_to_tensor(gradient)}
        stored |= {slot: self._slots[slot][index] for slot in program.slots}
        dtype = compute_dtype(keras.backend.standardize_dtype(variable.dtype))
        scalars = _scalars(program, rule, self.iterations + 1, learning_rate, dtype)
        arrays = {key: ops.cast(array, dtype) for key, array in stored.items()}
        for key, value in program.run(ops, scalars, arrays).items():
            self.assign(stored[key], value)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make this optimizer again, without its state."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.fields}}

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: decay is a part of the rule."""

    def _check(self, learning_rate: Any) -> None:
        rule_class, values = self.rule_of()
        if isinstance(learning_rate, float):  # a schedule's values are not known yet
            values["lr"] = learning_rate
        try:
            rule_class(**values)
        except HyperparameterError as error:
            names = {field: name for name, field in self.fields.items()} | {"lr": "learning_rate"}
            name = names.get(error.name, error.name)
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"`{name}` must be {error.allowed}. Received: {name}={error.value!r}"
            ) from error


def _scalars(
    program: Program, rule: Rule, t: Any, learning_rate: Any, dtype: str
) -> dict[str, Any]:
    """The program's scalars: floats where ``t`` has a value, else 0-d tensors, from float64."""
    values = vars(rule)
    if not _is_symbolic(t):
        return program.scalars({**values, "lr": float(learning_rate)}, int(t))
    with _float64():

        def double(x: Any) -> Any:
            return ops.cast(x, "float64")

        scalars = program.scalars({**values, "lr": double(learning_rate)}, double(t), double)
        return {k: s if isinstance(s, float) else ops.cast(s, dtype) for k, s in scalars.items()}


def _is_symbolic(t: Any) -> bool:
    """Whether we are inside a ``tf.function`` or under ``jax.jit``: ``t`` has no value."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return not tf.executing_eagerly()
    if keras.backend.backend() == "jax":
        import jax

        return isinstance(t, jax.core.Tracer)
    return False


def _float64() -> Any:
    """Lets JAX compute in float64, whatever its configuration."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    # It was jax.experimental.enable_x64() before jax.enable_x64(True).
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
