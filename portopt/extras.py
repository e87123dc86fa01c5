"""What comes with an extra of the package, imported where it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load(module: str, extra: str) -> Any:
    """A module of a package that an extra installs.

    Raises:
        ModuleNotFoundError: it is missing; says which extra to install.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing(module.partition(".")[0], extra) from error


def missing(name: str, extra: str) -> ModuleNotFoundError:
    """The error that says which extra to install for what is missing."""
    install = f"pip install 'portable-optimizers[{extra}]'"
    return ModuleNotFoundError(f"{name} is not installed: {install}", name=name)
