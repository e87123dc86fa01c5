"""Which objects lists and a dict have, compared without touching any of them.

Python raises the count of each that it looks at, far away in memory: with a thousand that takes
a tenth of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from portopt.kernels import compiler
from portopt.kernels.layout import ids


class Checks(NamedTuple):
    """What compiled code may call: a function of where rows of checks begin, and of their number.

    It needs Python's lock, and tells in a bool whether all of them hold.

    Attributes:
        function: Where it begins.
        rows: The rows, which live as long.
    """

    function: int
    rows: npt.NDArray[np.uint64]

    @property
    def arguments(self) -> tuple[int, int]:
        """What the function takes."""
        return self.rows.ctypes.data, len(self.rows)


class Contents:
    """What lists and a dict have, as it is now.

    Args:
        lists: The lists.
        values: The dict.

    Attributes:
        checks: Whether they have it still, as compiled code asks; None if Python must.
    """

    def __init__(self, lists: Sequence[list[Any]], values: Mapping[Any, Any]) -> None:
        self._lists, self._values = [*lists], values
        self._had = [*map(list, lists), [*values.values()]]
        self.checks = self._checks()

    def of(self, lists: Sequence[list[Any]], values: Mapping[Any, Any]) -> bool:
        """Whether these are the lists and the dict."""
        same = len(lists) == len(self._lists) and values is self._values
        return same and all(map(is_, lists, self._lists))

    def are(self) -> bool:
        """Whether they have just the same objects now, in the same order."""
        if self.checks is not None:
            return _functions().all(*self.checks.arguments)
        now = [*self._lists, self._values.values()]
        return [*map(len, now)] == [*map(len, self._had)] and all(
            all(map(is_, some, had)) for some, had in zip(now, self._had, strict=True)
        )

    def _checks(self) -> Checks | None:
        kinds = {*map(type, self._lists)}
        if not (compiler.available() and kinds <= {list} and isinstance(self._values, dict)):
            return None
        functions = _functions()
        each = [*((functions.items, x) for x in self._lists), (functions.values, self._values)]
        self._ids = [*map(ids, self._had)]
        rows = [
            (function, functions.known.ctypes.data, id(x), len(had), had.ctypes.data)
            for (function, x), had in zip(each, self._ids, strict=True)
        ]
        return Checks(functions.address, np.array(rows, np.uint64))


class _Functions(NamedTuple):
    """What is compiled here; a row of checks has ``items`` or ``values``, and its four arguments.

    Attributes:
        all: The function of `Checks`.
        address: Where it begins.
        items: Where a function begins that tells whether a list has just these objects.
        values: Where one does that tells whether a dict has just these values, in this order.
        known: What both are told of Python.
    """

    all: Callable[[int, int], bool]
    address: int
    items: int
    values: int
    known: npt.NDArray[np.uint64]


_API = ("PyList_Size", "PyList_GetItem", "PyDict_Size", "PyDict_Next")


@cache
def _functions() -> _Functions:
    known = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _API]
    every, items, values = compiler.compiled(_TEXT, "all", "items", "values")
    call = ctypes.PYFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64)(every)
    return _Functions(call, every, items, values, np.array(known, np.uint64))


_LOOP = """\
define i1 @{name}(ptr %known, ptr %object, i64 %n, ptr %objects) {{
%place = alloca i64
%own.to = alloca ptr
store i64 0, ptr %place
%size.at = getelementptr ptr, ptr %known, i64 {size}
%take.at = getelementptr ptr, ptr %known, i64 {take}
%size = load ptr, ptr %size.at
%take = load ptr, ptr %take.at
%found = call i64 %size(ptr %object)
%as.many = icmp eq i64 %found, %n
br i1 %as.many, label %next, label %no
next:
%i = phi i64 [0, %0], [%i.next, %same]
%more = icmp ult i64 %i, %n
br i1 %more, label %look, label %yes
look:
%i.next = add i64 %i, 1
{own}
%wanted.at = getelementptr ptr, ptr %objects, i64 %i
%wanted = load ptr, ptr %wanted.at
%is = icmp eq ptr %own, %wanted
br i1 %is, label %same, label %no
same:
br label %next
yes:
ret i1 true
no:
ret i1 false
}}
"""
_ITEM = "%own = call ptr %take(ptr %object, i64 %i)"
_VALUE = """\
%some = call i32 %take(ptr %object, ptr %place, ptr null, ptr %own.to)
%own = load ptr, ptr %own.to"""
_TEXT = _LOOP.format(name="items", size=0, take=1, own=_ITEM) + _LOOP.format(
    name="values", size=2, take=3, own=_VALUE
)
"""For each object, the next of those that the list or dict has."""
_TEXT += """\
define i1 @all(ptr %checks, i64 %n) {
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %check]
%more = icmp ult i64 %i, %n
br i1 %more, label %check, label %done
check:
%i.next = add i64 %i, 1
%row = getelementptr [5 x i64], ptr %checks, i64 %i
%known.at = getelementptr i64, ptr %row, i64 1
%object.at = getelementptr i64, ptr %row, i64 2
%size.at = getelementptr i64, ptr %row, i64 3
%objects.at = getelementptr i64, ptr %row, i64 4
%function = load ptr, ptr %row
%known = load ptr, ptr %known.at
%object = load ptr, ptr %object.at
%size = load i64, ptr %size.at
%objects = load ptr, ptr %objects.at
%holds = call i1 %function(ptr %known, ptr %object, i64 %size, ptr %objects)
br i1 %holds, label %next, label %done
done:
%all = phi i1 [true, %next], [false, %check]
ret i1 %all
}
"""
