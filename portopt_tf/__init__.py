"""portopt's rules as Keras optimizers, on any backend of Keras."""

from typing import Any

from portopt.rules import registry as _registry
from portopt_tf.drop_in import CLASSES as _CLASSES
from portopt_tf.drop_in import SGD, get
from portopt_tf.from_rule import from_rule
from portopt_tf.layout import shard_slots
from portopt_tf.optimizer import Optimizer

__all__ = ["SGD", "Optimizer", "from_rule", "get", "shard_slots"]
__all__ += [name for name in _CLASSES if name not in __all__]


def __getattr__(name: str) -> Any:
    """The drop-in classes that are made of rules, and those of rules that Keras lacks."""
    if name == "Sharded":  # which needs TensorFlow
        from portopt_tf.sharded import Sharded

        return Sharded
    if name in _CLASSES or name in _registry.own():
        return get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_registry.own(), "Sharded"})
