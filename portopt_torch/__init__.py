"""portopt's rules as ``torch.optim.Optimizer`` subclasses."""

from typing import Any

from portopt.rules import registry as _registry
from portopt_torch.drop_in import SGD, Adam, AdamW, RMSprop, get, names
from portopt_torch.from_rule import from_rule
from portopt_torch.optimizer import Optimizer

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "from_rule", "get"]
__all__ += [name for name in names() if name not in __all__]


def __getattr__(name: str) -> Any:
    """The drop-in classes that are not written out, and those of rules that PyTorch lacks."""
    if name in __all__ or name in _registry.own():
        return get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
