"""portopt's rules as ``torch.optim.Optimizer`` subclasses."""

from importlib import import_module
from typing import Any

from portopt_torch.drop_in import SGD, Adam, AdamW, RMSprop, get, names
from portopt_torch.from_rule import from_rule
from portopt_torch.optimizer import Optimizer

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "from_rule", "get", "names"]


def __getattr__(name: str) -> Any:
    """The drop-in classes that are made of rules, those of rules that PyTorch lacks, `Sharded`."""
    if name in ("Sharded", "WorkerError"):  # they need torch.distributed
        return getattr(import_module("portopt_torch.sharded"), name)
    if not name.startswith("_"):
        from portopt.rules import registry  # here, as `import portopt_torch` is to be quick

        if name in names() or name in registry.own():
            return get(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from portopt.rules import registry

    return sorted({*__all__, *names(), *registry.own(), "Sharded", "WorkerError"})
