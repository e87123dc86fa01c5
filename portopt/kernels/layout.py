"""Where and how arrays lie in memory, asked of many at once, which takes Python longer than a step.

A compiled loop looks. The one for NumPy's arrays is here; it knows them by NumPy's C interface.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from portopt.kernels import compiler
from portopt.kernels.compiler import Loop
from portopt.kernels.loops import COMPARE, fetch

Objects: TypeAlias = npt.NDArray[np.object_]
"""An array of Python objects, which stand side by side in it, as a compiled loop wants them."""


def array(objects: Sequence[Any]) -> Objects:
    """Objects as a one-dimensional array."""
    return np.fromiter(objects, object, len(objects))


def ids(objects: Sequence[Any]) -> npt.NDArray[np.uint64]:
    """Where objects begin, which the caller keeps alive.

    Of an `array` that is kept they would be a part for ever if they led to it: Python's search for
    such cycles does not look into arrays.
    """
    return np.fromiter(map(id, objects), np.uint64, len(objects))


class Layout:
    """How arrays lie in memory.

    Args:
        loop: Over arrays: ``(functions, objects, addresses, known, n, learn, place)`` returns how
            many of ``n`` objects lie as known. ``known`` has int64 words for each, and
            ``addresses`` where it begins. ``learn`` and ``place`` say whether the former and the
            latter are to be noted instead.
        objects: Those whose layout it is.
        words: How many are known of all of them.
        moves: Whether they may lie elsewhere later on, and be others.

    Attributes:
        addresses: Where they begin; of those that move, where the last ones did that fitted.
    """

    def __init__(self, loop: Loop, objects: Objects, words: int, *, moves: bool) -> None:
        self.addresses = np.empty(len(objects), np.uint64)
        self._loop, self._moves = loop, moves
        self._known = np.empty(words, np.int64)
        self._at = self.addresses.ctypes.data, self._known.ctypes.data, len(objects)
        self._look(objects, learn=True)

    def fits(self, objects: Objects) -> bool:
        """Whether as many objects lie as those did, and in the same place unless they move."""
        return self._look(objects, learn=False)

    def _look(self, objects: Objects, *, learn: bool) -> bool:
        at = self._loop.functions.ctypes.data, objects.ctypes.data, *self._at
        return self._loop.call(*at, learn, learn or self._moves) == len(objects)


def of_arrays(objects: Objects, *, moves: bool) -> Layout:
    """The classes, dtypes, flags, shapes and strides of NumPy's arrays, as a `Layout`.

    A class and a dtype are known by their addresses: both must live as long as it.

    Raises:
        RuntimeError: they cannot be looked at (`arrays`).
    """
    loop = arrays()
    if loop is None:
        raise RuntimeError(UNKNOWN)
    return Layout(loop, objects, sum(_N_KIND + 2 * x.ndim for x in objects), moves=moves)


UNKNOWN = "NumPy's arrays do not lie as its C interface says"


@cache
def arrays() -> Loop | None:
    """The loop of `of_arrays`; None if NumPy's arrays are not as its C interface says."""
    if not compiler.available() or not _is_as_published():
        return None
    text = COMPARE + _ARRAYS.format(
        n_kind=_N_KIND, fetch=fetch("object", 16, [0, 64]), mask=_FLAGS, **_AT
    )
    pointers, flags = [ctypes.c_void_p] * 4, [ctypes.c_bool] * 2
    return compiler.loop(text, [], [*pointers, ctypes.c_int64, *flags])


_FIELDS = ("data", "dim", "sizes", "strides", "base", "dtype", "flags")
"""What follows the head of an object in ``PyArrayObject_fields``, ``numpy/ndarraytypes.h``."""
_HEAD = object.__basicsize__
_AT = {"type": _HEAD - 8} | {name: _HEAD + 8 * place for place, name in enumerate(_FIELDS)}
_N_KIND = 4  # the class, the dtype, the flags and the number of dimensions
_FLAGS = (
    0x0001 | 0x0002 | 0x0100 | 0x0400
)  # contiguous in C's and Fortran's order, aligned, writable


def _is_as_published() -> bool:
    sample = np.zeros((3, 5, 7), np.float16)[:, 1:].transpose(2, 0, 1)

    def word(name: str) -> int:
        return ctypes.c_int64.from_address(id(sample) + _AT[name]).value

    def words(name: str) -> tuple[int, ...]:
        return tuple((ctypes.c_int64 * sample.ndim).from_address(word(name)))

    return (
        ctypes.sizeof(ctypes.c_void_p) == 8
        and word("type") == id(np.ndarray)
        and word("data") == sample.__array_interface__["data"][0]
        and word("dim") & 0xFFFFFFFF == sample.ndim
        and word("dtype") == id(sample.dtype)
        and word("flags") & 0xFFFFFFFF == sample.flags.num
        and words("sizes") == sample.shape
        and words("strides") == sample.strides
    )


_ARRAYS = """\
define i64 @kernel(
ptr %functions, ptr %objects, ptr %addresses, ptr %words, i64 %n, i1 %learn, i1 %place
) {{
%kind = alloca [{n_kind} x i64]
%kind.dtype = getelementptr i64, ptr %kind, i64 1
%kind.flags = getelementptr i64, ptr %kind, i64 2
%kind.dim = getelementptr i64, ptr %kind, i64 3
%last = sub i64 %n, 1
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %noted]
%to = phi ptr [%words, %0], [%to.next, %noted]
%more = icmp ult i64 %i, %n
br i1 %more, label %begin, label %done
begin:
{fetch}
%object.at = getelementptr ptr, ptr %objects, i64 %i
%object = load ptr, ptr %object.at
%type.at = getelementptr i8, ptr %object, i64 {type}
%type.is = call i1 @is_as(ptr %to, ptr %type.at, i64 1, i1 %learn)
br i1 %type.is, label %look, label %done
look:
; Only now is it known to be an array.
%type = load i64, ptr %type.at
%dtype.at = getelementptr i8, ptr %object, i64 {dtype}
%dtype = load i64, ptr %dtype.at
%flags.at = getelementptr i8, ptr %object, i64 {flags}
%flags.all = load i32, ptr %flags.at
%flags.own = and i32 %flags.all, {mask}
%flags = zext i32 %flags.own to i64
%dim.at = getelementptr i8, ptr %object, i64 {dim}
%dim.own = load i32, ptr %dim.at
%dim = zext i32 %dim.own to i64
store i64 %type, ptr %kind
store i64 %dtype, ptr %kind.dtype
store i64 %flags, ptr %kind.flags
store i64 %dim, ptr %kind.dim
%kind.is = call i1 @is_as(ptr %to, ptr %kind, i64 {n_kind}, i1 %learn)
br i1 %kind.is, label %measure, label %done
measure:
%sizes.at = getelementptr i8, ptr %object, i64 {sizes}
%sizes = load ptr, ptr %sizes.at
%strides.at = getelementptr i8, ptr %object, i64 {strides}
%strides = load ptr, ptr %strides.at
%data.at = getelementptr i8, ptr %object, i64 {data}
%to.sizes = getelementptr i64, ptr %to, i64 {n_kind}
%to.next = getelementptr [2 x i64], ptr %to.sizes, i64 %dim
%address.at = getelementptr ptr, ptr %addresses, i64 %i
%all.is = call i1 @lies_as(
ptr %to.sizes, ptr %sizes, ptr %strides, i64 %dim, ptr %address.at, ptr %data.at,
i1 %learn, i1 %place
)
br i1 %all.is, label %noted, label %done
noted:
%i.next = add i64 %i, 1
br label %next
done:
ret i64 %i
}}
"""
