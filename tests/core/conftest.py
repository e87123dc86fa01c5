"""Every rule with every option, for the tests that hold for all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from portopt.rules import SGD, Adam, AdamW, Momentum, RMSprop

MOMENTUM = [
    Momentum(),
    Momentum(momentum=0.0),
    Momentum(dampening=0.5),
    Momentum(nesterov=True),
    Momentum(buffer="velocity"),
    Momentum(buffer="velocity", nesterov=True),
    Momentum(buffer="average"),
]
RMSPROP = [
    RMSprop(eps_form=eps_form, centered=centered, buffer=buffer, momentum=momentum)
    for eps_form, centered in product(("outside", "inside"), (False, True))
    for buffer, momentum in (("sum", 0.0), ("sum", 0.9), ("velocity", 0.9))
]
ADAM = [
    cls(eps_form=eps_form, amsgrad=amsgrad)
    for cls, eps_form, amsgrad in product(
        (Adam, AdamW), ("outside", "hat", "inside"), (False, True)
    )
]
FORMS = [SGD(), *MOMENTUM, *RMSPROP, *ADAM]
SURROUNDINGS = [
    {"weight_decay": weight_decay, "decoupled": decoupled, "maximize": maximize}
    for weight_decay, decoupled in ((0.0, False), (0.1, False), (0.1, True))
    for maximize in (False, True)
]
# With this learning rate the weights move far enough for float32 to show by how much.
RULES = [replace(form, lr=0.1, **options) for form, options in product(FORMS, SURROUNDINGS)]


@pytest.fixture(params=RULES, ids=repr)
def rule(request):
    return request.param


@pytest.fixture(scope="session")
def rules():
    return RULES


@pytest.fixture(scope="session")
def forms():
    """The rules without weight decay and maximize, where 32 are enough."""
    return [replace(form, lr=0.1) for form in FORMS]
