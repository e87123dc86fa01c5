"""The rules: the arithmetic of each optimizer, once."""

from portopt.rules.adadelta import Adadelta
from portopt.rules.adagrad import Adagrad
from portopt.rules.adam import Adam, AdamW
from portopt.rules.adamax import Adamax
from portopt.rules.around import Around
from portopt.rules.asgd import ASGD
from portopt.rules.base import (
    Decay,
    HyperparameterError,
    HyperparameterTypeError,
    Interval,
    NonNegative,
    Rule,
    Slots,
)
from portopt.rules.ftrl import Ftrl
from portopt.rules.lamb import Lamb
from portopt.rules.lion import Lion
from portopt.rules.nadam import NAdam
from portopt.rules.native import Native
from portopt.rules.radam import RAdam
from portopt.rules.rmsprop import RMSprop
from portopt.rules.rprop import Rprop
from portopt.rules.sgd import SGD, Momentum

__all__ = [
    "ASGD",
    "SGD",
    "Adadelta",
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
    "NAdam",
    "Native",
    "NonNegative",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Rule",
    "Slots",
]
