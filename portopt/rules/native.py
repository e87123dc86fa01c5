"""`Native`: a framework's own optimizer, said in the words of a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY: dict[str, dict[str, str | tuple[str, ...]]] = {
    "torch": {"betas": ("beta1", "beta2"), "decoupled_weight_decay": "decoupled"},
    "keras": {"learning_rate": "lr", "beta_1": "beta1", "beta_2": "beta2", "epsilon": "eps"},
}
"""What the natives of a framework call a rule's fields."""


@dataclass(frozen=True, eq=False)
class Native:
    """An optimizer of a framework that is a rule with some of its fields set.

    An adapter makes the drop-in class of it, with the signature of the installed native.

    Args:
        name: Where it is: ``torch.optim.Adagrad``, ``keras.optimizers.Adagrad``.
        values: The fields of the rule that are not at the rule's defaults in it.
        arguments: For each argument that has neither its field's name nor one in `VOCABULARY`, the
            field; or the fields, if it is a tuple of numbers.
        slots: For each slot its name in Keras, in the order in which Keras creates them; a mapping
            for each time that it goes over the variables.
        words: How its errors begin for a field, where not as its framework's others do.
        keeps_step: Whether its state counts the steps.
        eager: Whether the state is there from construction on, and not from the first step.
        sparse: Whether it takes sparse gradients, and updates nothing but their rows: "no", "also"
            or "only".

    Example:
        >>> native = Native("torch.optim.Rprop", arguments={"etas": ("etaminus", "etaplus")})
        >>> native.fields({"lr": 0.1, "etas": (0.5, 1.2)})
        {'lr': 0.1, 'etaminus': 0.5, 'etaplus': 1.2}
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    slots: tuple[Mapping[str, str], ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)
    keeps_step: bool = True
    eager: bool = False
    sparse: str = "no"

    @property
    def framework(self) -> str:
        """The package that it belongs to: "torch" or "keras"."""
        return self.name.split(".")[0]

    @property
    def title(self) -> str:
        """The name of its class."""
        return self.name.split(".")[-1]

    def target(self, argument: str) -> str | tuple[str, ...]:
        """The field, or the fields, that an argument sets."""
        known = {**VOCABULARY[self.framework], **self.arguments}
        return known.get(argument, argument)

    def fields(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that arguments of the native set.

        Raises:
            TypeError: an argument that stands for several fields is no tuple of so many.
        """
        found: dict[str, Any] = {}
        for name, value in given.items():
            target = self.target(name)
            if isinstance(target, str):
                found[target] = value
                continue
            if not isinstance(value, tuple | list) or len(value) != len(target):
                raise TypeError(f"{name} must be a tuple of {', '.join(target)}, got {value!r}")
            found.update(zip(target, value, strict=True))
        return found
