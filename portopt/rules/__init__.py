"""The rules: the arithmetic of each optimizer, once.

A rule is imported where it is first used: `import portopt` is to be quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from portopt.rules.around import Around
from portopt.rules.base import (
    Decay,
    HyperparameterError,
    HyperparameterTypeError,
    Interval,
    NonNegative,
    Rule,
    Slots,
)
from portopt.rules.native import Native

if TYPE_CHECKING:
    from portopt.rules.adadelta import Adadelta
    from portopt.rules.adafactor import Adafactor
    from portopt.rules.adagrad import Adagrad
    from portopt.rules.adam import Adam, AdamW
    from portopt.rules.adamax import Adamax
    from portopt.rules.asgd import ASGD
    from portopt.rules.ftrl import Ftrl
    from portopt.rules.lamb import Lamb
    from portopt.rules.lion import Lion
    from portopt.rules.muon import Muon
    from portopt.rules.nadam import NAdam
    from portopt.rules.radam import RAdam
    from portopt.rules.rmsprop import RMSprop
    from portopt.rules.rprop import Rprop
    from portopt.rules.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
    from portopt.rules.sgd import SGD, Momentum

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Around",
    "Decay",
    "Ftrl",
    "HyperparameterError",
    "HyperparameterTypeError",
    "Interval",
    "Lamb",
    "Lion",
    "Momentum",
    "Muon",
    "NAdam",
    "Native",
    "NonNegative",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Rule",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "Slots",
]

_FILES = {
    "AdamW": "adam",
    "Momentum": "sgd",
    "ScheduleFreeAdamW": "schedule_free",
    "ScheduleFreeSGD": "schedule_free",
}
"""Where a rule is that has no file of its own name."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES.get(name, name.lower())}"), name)
