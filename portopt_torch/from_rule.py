"""`from_rule`: the generic way from a rule to a ``torch.optim.Optimizer`` class."""

from __future__ import annotations

from collections.abc import Mapping
from copyreg import __newobj__  # type: ignore[attr-defined]
from dataclasses import fields
from functools import cache
from typing import Any

from portopt.rules import Around, Rule
from portopt.rules.base import presets
from portopt_torch.optimizer import Optimizer


def from_rule(rule: Rule | type[Rule]) -> type[Optimizer]:
    """A ``torch.optim.Optimizer`` subclass that updates by ``rule``.

    Args:
        rule: A rule's class, or a rule, whose values become the defaults.

    Returns:
        The class, the same one for the same rule. It takes ``params``, then the rule's fields as
        keywords, and ``around``; groups hold the fields under their own names, and ``state_dict``
        has, for each parameter, "step" and the slots.

    Raises:
        TypeError: ``rule`` is no rule.

    Example:
        >>> import torch
        >>> from portopt import rules
        >>> KerasRMSprop = from_rule(rules.RMSprop(eps_form="inside", buffer="velocity"))
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = KerasRMSprop([weight], lr=0.1, alpha=0.75, eps=0.0)
        >>> weight.grad = torch.tensor([2.0, -2.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8000, 1.2000])
    """
    if not issubclass(rule if isinstance(rule, type) else type(rule), Rule):
        raise TypeError(f"rule must be a portopt.Rule or a subclass of it, got {rule!r}")
    return _class_of(rule)


@cache
def _class_of(rule: Rule | type[Rule]) -> type[Optimizer]:
    rule_class, defaults = presets(rule)
    names = [field.name for field in fields(rule_class) if field.init]

    class FromRule(Optimizer):
        __doc__ = f"`{rule_class.__name__}` as a ``torch.optim.Optimizer``.\n\n{rule_class.__doc__}"

        def __init__(
            self, params: Any, *, around: Around | None = None, **hyperparameters: Any
        ) -> None:
            unknown = [name for name in hyperparameters if name not in names]
            if unknown:
                raise TypeError(
                    f"unknown hyperparameter {unknown[0]!r}: {rule_class.__name__} has "
                    f"{', '.join(names)}"
                )
            mode = {"train_mode": True} if rule_class.has_modes else {}
            super().__init__(params, {**defaults, **hyperparameters, **mode}, around)

        @classmethod
        def rule_of(cls, group: Mapping[str, Any]) -> tuple[type[Rule], dict[str, Any]]:
            return rule_class, {name: group[name] for name in names if name in group}

        def __reduce__(self) -> tuple[Any, ...]:
            if type(self) is not FromRule:  # a user's subclass, which is found by its name
                return __newobj__, (type(self),), self.__getstate__()
            return _unpickled, (rule,), self.__getstate__()

    FromRule.__name__ = FromRule.__qualname__ = rule_class.__name__
    return FromRule


def _unpickled(rule: Rule | type[Rule]) -> Optimizer:
    cls = from_rule(rule)
    return cls.__new__(cls)
