"""The optimizers of ``keras.optimizers``, by the same names, with the same arguments and slots.

They are made from what their rules say of them, by `drop_in`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import keras

from portopt import rules
from portopt.rules import registry
from portopt.rules.base import is_zero
from portopt_tf import shaped
from portopt_tf.from_rule import SHARED, from_rule
from portopt_tf.optimizer import Optimizer


def _arguments(native: type[keras.optimizers.Optimizer]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(native.__init__).parameters


registered = keras.saving.register_keras_serializable(package="portopt")


_OF_ALL = _arguments(keras.optimizers.SGD).keys() & _arguments(keras.optimizers.Adam).keys()
"""Arguments that every Keras optimizer takes; "self" and "kwargs" among them."""

CLASSES: dict[str, type[Optimizer]] = {}
"""By its name, the class for every native that the installed Keras has."""


def drop_in(rule: type[rules.Rule], native: rules.Native) -> type[Optimizer]:
    """A class that stands in for a native, with its arguments and variables."""
    signature = inspect.signature(getattr(keras.optimizers, native.title).__init__)
    known = {field.name for field in fields(rule)}
    targets = {name: native.target(name) for name in signature.parameters}
    own = {name: field for name, field in targets.items() if field in known.difference(SHARED)}
    others = [name for name in targets if name not in {*own, *_OF_ALL}]
    settled = native.values.keys() - {*own.values(), *SHARED}
    decay = signature.parameters["weight_decay"].default
    base = CLASSES.get(rule.__base__.__name__, Optimizer)  # AdamW is an Adam
    base = getattr(shaped, native.title, base) if rule.by_shape else base

    class DropIn(base):
        __doc__ = (
            f"``{native.name}``: the rule `portopt.rules.{rule.__name__}`.\n\n"
            "Arguments and variables are the native's."
        )
        rule_class: ClassVar = rule
        fixed: ClassVar = {name: native.values[name] for name in settled}
        fields: ClassVar = own
        slot_names: ClassVar = native.slots

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            del given["self"]
            given |= given.pop("kwargs", {})
            if given["weight_decay"] is None and decay is not None:
                raise ValueError(
                    "Argument `weight_decay` must be a float. Received: weight_decay=None"
                )
            kept = {name: given.pop(name) for name in others}
            hyperparameters = {name: given.pop(name) for name in own}
            Optimizer.__init__(self, given.pop("learning_rate"), hyperparameters, **given)
            for name, value in kept.items():
                setattr(self, name, value)

        def get_config(self) -> dict[str, Any]:
            return {**{name: getattr(self, name) for name in others}, **super().get_config()}

        __init__.__signature__ = signature

    DropIn.__name__ = DropIn.__qualname__ = native.title
    DropIn.__module__ = __package__
    return DropIn


@registered
class SGD(drop_in(rules.Momentum, rules.Momentum.natives[1])):
    """``keras.optimizers.SGD``: the rule `portopt.rules.Momentum`, or `portopt.rules.SGD`.

    The momentum buffer is a velocity, which holds the learning rate. Arguments and variables are
    the native's.
    """

    slot_names: ClassVar = ({"momentum_buffer": "momentum"},)

    def rule_of(self) -> tuple[type[rules.Rule], dict[str, Any]]:
        rule, values = super().rule_of()
        if is_zero(self.momentum):
            return rules.SGD, {name: values[name] for name in ("decoupled", "weight_decay")}
        return rule, values

    @property
    def momentums(self) -> list[Any]:
        """The momentum buffers."""
        return self._slots.get("momentum_buffer", [])

    def _checked(self, learning_rate: Any) -> rules.Rule:
        if not isinstance(self.momentum, float) or not 0 <= self.momentum <= 1:
            raise ValueError(
                f"`momentum` must be a float between [0, 1]. Received: momentum={self.momentum!r}"
            )
        if not isinstance(self.nesterov, bool):  # of no use without momentum, but no mistake
            raise TypeError(
                f"`nesterov` must be True or False. Received: nesterov={self.nesterov!r}"
            )
        return super()._checked(learning_rate)


CLASSES["SGD"] = SGD


def get(name: str) -> type[Optimizer]:
    """An optimizer class by its name, in upper or lower case.

    Args:
        name: One of ``keras.optimizers``'; else that of a rule, of portopt or of an installed
            package (entry points ``portopt.rules``), of which `from_rule` makes a class.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: there is none of this name; says which there are.
        ImportError: the package that brings the rule cannot be imported.

    Example:
        >>> get("lion").__name__, get("radam").__name__
        ('Lion', 'RAdam')
    """
    rule, native = registry.find(name, "keras")
    return (native and CLASSES.get(native.title)) or from_rule(rule)


# Made now and not when asked for: a saved model finds its optimizer among what is registered.
for _rule, _native in registry.drop_ins("keras"):
    if _native.title not in CLASSES and hasattr(keras.optimizers, _native.title):
        CLASSES[_native.title] = registered(drop_in(_rule, _native))
for _rule in registry.own().values():
    from_rule(_rule)
