"""Which objects lists and a dict have, compared without touching any of them.

Python raises the count of each that it looks at, far away in memory: with a thousand that takes
a tenth of a step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from portopt.kernels import compiler
from portopt.kernels.layout import array


class Contents:
    """What lists, one after the other, and a dict have, as it is now.

    Args:
        lists: The lists.
        values: The dict.
    """

    def __init__(self, lists: Sequence[list[Any]], values: Mapping[Any, Any]) -> None:
        self._lists, self._values = [*map(array, lists)], array([*values.values()])
        found = [*self._lists, self._values]
        self._at = [(len(objects), objects.ctypes.data) for objects in found]

    def are(self, lists: Sequence[list[Any]], values: Mapping[Any, Any]) -> bool:
        """Whether they have just the same objects now, in the same order."""
        functions = _functions() if compiler.available() else None
        if functions is None or {*map(type, lists)} != {list} or not isinstance(values, dict):
            return (
                [*map(len, lists)] == [*map(len, self._lists)]
                and len(values) == len(self._values)
                and all(map(is_, chain.from_iterable(lists), chain.from_iterable(self._lists)))
                and all(map(is_, values.values(), self._values))
            )
        *of_lists, of_values = self._at
        return (
            len(lists) == len(of_lists)
            and all(functions.items(id(x), *at) for x, at in zip(lists, of_lists, strict=True))
            and functions.values(id(values), *of_values)
        )


class _Functions(NamedTuple):
    """Of an object's address, a number and the address of an array of so many objects.

    Attributes:
        items: Whether it is a list of just these objects.
        values: Whether it is a dict whose values are just these, in this order.
    """

    items: Callable[[int, int, int], bool]
    values: Callable[[int, int, int], bool]


_API = ("PyList_Size", "PyList_GetItem", "PyDict_Size", "PyDict_Next")


@cache
def _functions() -> _Functions:
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p) for name in _API]
    _kept.append(np.array([function.value for function in functions], np.uint64))
    kinds = ctypes.c_bool, *[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p
    return _Functions(
        *(
            partial(ctypes.PYFUNCTYPE(*kinds)(address), _kept[-1].ctypes.data)
            for address in compiler.compiled(_TEXT, "items", "values")
        )
    )


_kept: list[Any] = []  # as the functions read it

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
