"""The rules: the arithmetic of each optimizer, once."""

from portopt.rules.adam import Adam, AdamW
from portopt.rules.base import (
    HyperparameterError,
    HyperparameterTypeError,
    Interval,
    Rule,
    Slots,
)
from portopt.rules.rmsprop import RMSprop
from portopt.rules.sgd import SGD, Momentum

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "HyperparameterError",
    "HyperparameterTypeError",
    "Interval",
    "Momentum",
    "RMSprop",
    "Rule",
    "Slots",
]
