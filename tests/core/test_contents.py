"""What lists and dicts have: the same answers from compiled functions and from Python."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import pytest

from portopt.kernels import compiler
from portopt.kernels.contents import Contents

A, B, C = object(), object(), object()
CASES = {
    # what happens to lists and a dict that have [A, B], [C] and {1: A, 2: B}
    "nothing": (lambda lists, values: None, True),
    "other keys": (lambda lists, values: (values.clear(), values.update({3: A, 4: B})), True),
    "another item": (lambda lists, values: lists[0].__setitem__(1, C), False),
    "another in the last list": (lambda lists, values: lists[1].__setitem__(0, A), False),
    "other order": (lambda lists, values: lists[0].reverse(), False),
    "more items": (lambda lists, values: lists[0].append(C), False),
    "fewer items": (lambda lists, values: lists[0].pop(), False),
    "cut elsewhere": (lambda lists, values: lists[1].insert(0, lists[0].pop()), False),
    "another value": (lambda lists, values: values.update({2: C}), False),
    "more values": (lambda lists, values: values.update({3: C}), False),
    "fewer values": (lambda lists, values: values.popitem(), False),
}
KINDS = {
    "usual": (list, dict),
    "a kind of list": (type("Kind", (list,), {}), dict),
    "a kind of dict": (list, lambda pairs: defaultdict(dict, pairs)),
    "an ordered dict": (list, OrderedDict),
}


@pytest.fixture(params=[True, False], ids=["compiled", "python"])
def compiled(request, monkeypatch):
    if request.param:
        pytest.importorskip("llvmlite")
    else:
        monkeypatch.setattr(compiler, "available", lambda: False)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_contents(name, kind, compiled):
    make_list, make_dict = KINDS[kind]
    lists, values = [make_list([A, B]), make_list([C])], make_dict({1: A, 2: B})
    contents, (happens, same) = Contents(lists, values), CASES[name]
    assert (contents.checks is not None) == (compiled and make_list is list)
    happens(lists, values)
    assert contents.are() == same
    assert contents.of(lists, values)


def test_which_lists_and_dict():
    lists, values = [[A, B], [C]], {1: A}
    contents = Contents(lists, values)
    assert contents.of([*lists], values)
    assert not contents.of(lists, {1: A})
    assert not contents.of([[A, B], [C]], values)
    assert not contents.of(lists[:1], values)
    assert not contents.of([*lists, []], values)


@pytest.mark.usefixtures("compiled")
def test_a_dict_with_gaps():
    """What was deleted leaves a place empty there."""
    values = {n: object() for n in range(100)}
    for n in range(0, 100, 3):
        del values[n]
    contents = Contents([[]], values)
    assert contents.are()
    del values[50]
    assert not contents.are()
