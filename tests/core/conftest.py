"""Every rule with every option, for the tests that hold for all of them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from portopt import trace
from portopt.rules import HyperparameterError, Momentum, Rule, registry

SHARED = [field.name for field in fields(Rule)]


def forms_of(cls):
    """A rule by every choice among its formulas; its floats that are 0 by default as that, or not.

    With this learning rate the weights move far enough for float32 to show by how much.
    """
    choices = {}
    for name, hint in get_type_hints(cls).items():
        if name not in SHARED and hint is bool:
            choices[name] = (False, True)
        elif get_origin(hint) is Literal:
            choices[name] = get_args(hint)
    known = {*SHARED, *choices}
    zeros = [field.name for field in fields(cls) if field.default == 0 and field.name not in known]
    for chosen in product(*choices.values(), (0.0, 0.5) if zeros else (0.0,)):
        values = dict(zip(choices, chosen, strict=False)) | dict.fromkeys(zeros, chosen[-1])
        with suppress(HyperparameterError):  # options that exclude one another
            yield cls(lr=0.1, **values)


def surrounded(form):
    for options in SURROUNDINGS:
        with suppress(HyperparameterError):  # a decay that the rule does not have
            yield replace(form, **options)


CLASSES = registry.own().values()
FORMS = [form for cls in CLASSES if not cls.by_shape for form in forms_of(cls)]
FORMS.append(Momentum(lr=0.1, momentum=0.0))
SURROUNDINGS = [
    {"weight_decay": 0.0, "decoupled": False, "maximize": False},
    {"weight_decay": 0.0, "decoupled": False, "maximize": True},
    {"weight_decay": 0.1, "decoupled": False, "maximize": True},
    {"weight_decay": 0.1, "decoupled": True, "maximize": False},
]
ALL = [rule for form in FORMS for rule in surrounded(form)]
RULES = [rule for rule in ALL if trace(rule).elementwise]
"""Those that kernels take."""
BY_SHAPE = [
    rule for cls in CLASSES if cls.by_shape for form in forms_of(cls) for rule in surrounded(form)
]
"""Those that look at the shape of a parameter."""


@pytest.fixture(scope="session")
def by_shape():
    return BY_SHAPE


@pytest.fixture(params=ALL, ids=repr)
def rule(request):
    return request.param


@pytest.fixture(scope="session")
def rules():
    return ALL


@pytest.fixture(scope="session")
def forms():
    """The rules without weight decay and maximize, where they are enough."""
    return FORMS
