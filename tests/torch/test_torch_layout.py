"""Signatures, groups and state: those of torch.optim."""

import inspect

import pytest
import torch
from twins import (
    IDS,
    NAMES,
    OPTIONS,
    default_dtype,
    layout,
    make_grads,
    make_params,
    native,
    ours,
    train,
)


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_the_natives(name):
    def signature(cls):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    (*same, around) = signature(ours(name))
    assert same == signature(native(name))
    assert around == ("around", inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_groups_and_state_dict_have_the_natives_layout(name, options):
    mine, theirs = (cls(make_params(), **options) for cls in (ours(name), native(name)))
    assert layout(mine) == layout(theirs)
    assert mine.defaults == theirs.defaults
    assert repr(mine) == repr(theirs)
    for optimizer in (mine, theirs):
        train(optimizer, make_grads(steps=2))
    assert layout(mine) == layout(theirs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_step_count_follows_the_default_dtype(name, default):
    with default_dtype(default):
        mine, theirs = (
            train(cls(make_params()), make_grads()) for cls in (ours(name), native(name))
        )
    assert layout(mine) == layout(theirs)


def test_betas_are_kept_as_a_pair():
    groups = [
        cls(make_params(), betas=[0.5, 0.9]).param_groups for cls in (ours("Adam"), native("Adam"))
    ]
    assert groups[0][0]["betas"] == groups[1][0]["betas"] == (0.5, 0.9)
