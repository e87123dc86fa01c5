"""What lists and dicts have: the same answers from compiled functions and from Python."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import pytest

from portopt.kernels import compiler
from portopt.kernels.contents import Contents

A, B, C = object(), object(), object()
CASES = {
    # lists and a dict now, after [[A, B], [C]] and {1: A, 2: B}
    "as before": ([[A, B], [C]], {1: A, 2: B}, True),
    "other keys": ([[A, B], [C]], {3: A, 4: B}, True),
    "a kind of dict": ([[A, B], [C]], defaultdict(dict, {1: A, 2: B}), True),
    "an ordered dict": ([[A, B], [C]], OrderedDict({1: A, 2: B}), True),
    "a kind of list": ([(A, B), [C]], {1: A, 2: B}, True),
    "another item": ([[A, C], [C]], {1: A, 2: B}, False),
    "another in the last list": ([[A, B], [A]], {1: A, 2: B}, False),
    "other order": ([[B, A], [C]], {1: A, 2: B}, False),
    "more items": ([[A, B, C], [C]], {1: A, 2: B}, False),
    "fewer items": ([[A], [C]], {1: A, 2: B}, False),
    "cut elsewhere": ([[A], [B, C]], {1: A, 2: B}, False),
    "more lists": ([[A, B], [C], []], {1: A, 2: B}, False),
    "fewer lists": ([[A, B]], {1: A, 2: B}, False),
    "another value": ([[A, B], [C]], {1: A, 2: C}, False),
    "more values": ([[A, B], [C]], {1: A, 2: B, 3: C}, False),
    "fewer values": ([[A, B], [C]], {1: A}, False),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_contents(name, compiled, monkeypatch):
    if compiled:
        pytest.importorskip("llvmlite")
    else:
        monkeypatch.setattr(compiler, "available", lambda: False)
    lists, values, same = CASES[name]
    assert Contents([[A, B], [C]], {1: A, 2: B}).are(lists, values) == same


@pytest.mark.parametrize("compiled", [True, False])
def test_a_dict_with_gaps(compiled, monkeypatch):
    """What was deleted leaves a place empty there."""
    if not compiled:
        monkeypatch.setattr(compiler, "available", lambda: False)
    values = {n: object() for n in range(100)}
    for n in range(0, 100, 3):
        del values[n]
    contents = Contents([[]], values)
    assert contents.are([[]], values)
    del values[50]
    assert not contents.are([[]], values)
