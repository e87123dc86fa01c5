"""`from_rule`: the generic way from a rule to a ``keras.optimizers.Optimizer`` class."""

from __future__ import annotations

import copyreg
from dataclasses import fields
from functools import cache
from typing import Any, ClassVar

import keras

from portopt.rules import Rule
from portopt.rules.base import presets
from portopt_tf.optimizer import Optimizer

SHARED = ("lr", "weight_decay")  # arguments of every Keras optimizer, under names of its own


def from_rule(rule: Rule | type[Rule]) -> type[Optimizer]:
    """A ``keras.optimizers.Optimizer`` subclass that updates by ``rule``.

    Args:
        rule: A rule's class, or a rule, whose values become the defaults.

    Returns:
        The class, the same one for the same rule, registered from now on with Keras (call
        `from_rule` before you load a model that was saved with it) under the rule's name
        (``portopt.rules>Adam``, or ``your.module>YourRule``). It takes ``learning_rate`` and
        ``weight_decay``, the other fields of the rule by keyword, and what every Keras optimizer
        takes.

    Raises:
        TypeError: ``rule`` is no rule.

    Example:
        >>> import keras
        >>> from portopt import rules
        >>> TorchRMSprop = from_rule(rules.RMSprop(lr=0.01, eps_form="outside"))
        >>> variable = keras.Variable([1.0, 1.0])
        >>> TorchRMSprop(alpha=0.75, eps=0.0).apply([keras.ops.array([2.0, -2.0])], [variable])
        >>> print(variable.numpy())
        [0.98 1.02]
    """
    if not issubclass(rule if isinstance(rule, type) else type(rule), Rule):
        raise TypeError(f"rule must be a portopt.Rule or a subclass of it, got {rule!r}")
    return _class_of(rule)


class _Made(type(Optimizer)):
    """What the classes are instances of: a class is pickled as the rule that it is made from."""

    made_from: Rule | type[Rule]


copyreg.pickle(_Made, lambda made: (from_rule, (made.made_from,)))


@cache
def _class_of(rule: Rule | type[Rule]) -> type[Optimizer]:
    rule_class, defaults = presets(rule)
    names = [field.name for field in fields(rule_class) if field.init]
    own = [name for name in names if name not in SHARED]
    lr, decay = defaults.get("lr"), defaults["weight_decay"] or None

    class FromRule(Optimizer, metaclass=_Made):
        made_from = rule
        __doc__ = f"`{rule_class.__name__}` as a Keras optimizer.\n\n{rule_class.__doc__}"
        fields: ClassVar = {name: name for name in own}
        fixed: ClassVar = {}

        def __init__(
            self,
            learning_rate: Any = lr,
            weight_decay: float | None = decay,
            **kwargs: Any,
        ) -> None:
            values = {**defaults, **kwargs}
            missing = [name for name in own if name not in values]
            if missing:
                raise TypeError(f"missing argument {missing[0]!r}")
            super().__init__(
                learning_rate,
                {name: values[name] for name in own},
                weight_decay=weight_decay,
                **{name: value for name, value in kwargs.items() if name not in own},
            )

        @property
        def slot_names(self):  # the rule's own names
            rule_class, values = self.rule_of()
            return ({slot: slot for slot in rule_class.unchecked(**values).slots},)

    FromRule.rule_class = rule_class
    FromRule.__name__ = FromRule.__qualname__ = rule_class.__name__
    module = rule_class.__module__
    package = "portopt.rules" if module.startswith("portopt.rules.") else module
    return keras.saving.register_keras_serializable(package, rule_class.__name__)(FromRule)
