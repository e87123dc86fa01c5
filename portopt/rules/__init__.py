"""The rules: the arithmetic of each optimizer, once."""

from portopt.rules.adam import Adam, AdamW
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
from portopt.rules.rmsprop import RMSprop
from portopt.rules.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Around",
    "Decay",
    "HyperparameterError",
    "HyperparameterTypeError",
    "Interval",
    "Momentum",
    "NonNegative",
    "RMSprop",
    "Rule",
    "Slots",
]
