"""Layouts: where many tensors lie in memory and how, which every step asks anew."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from portopt.kernels import compiler

Tensors = npt.NDArray[np.object_]
"""Tensors in an array: their Python objects stand side by side, as a native loop wants them."""


def array(tensors: Sequence[Tensor]) -> Tensors:
    """Tensors as a one-dimensional array of objects."""
    return np.fromiter(tensors, object, len(tensors))


class Layout:
    """The devices, dtypes, shapes and strides of tensors.

    PyTorch describes two tensors by DLPack's C functions while Python asks one for its address.
    Where there are none, or no loop can be compiled, Python asks for as little as it may.

    Args:
        tensors: Those whose layout it is.
        moves: Whether they may lie elsewhere later on, and be others. What stays at its address
            can be trusted to have its dtype and size.
    """

    def __init__(self, tensors: Tensors, *, moves: bool) -> None:
        asked = _ask if moves else _ask_order
        self.look = _describe if compiler.available() and _describer() else asked
        self.room = sum(2 + 2 * tensor.dim() for tensor in tensors)
        _, self.found = self.look(tensors, self.room)

    def addresses(self, tensors: Tensors) -> Any:
        """Where these tensors begin, in an array; None if their layout is another.

        Raises:
            RuntimeError, BufferError: one has no address, as a sparse one.
        """
        addresses, found = self.look(tensors, self.room)
        return addresses if found == self.found else None


def _describe(tensors: Tensors, room: int) -> tuple[Any, Any]:
    """The addresses of tensors, and what is to be equal: no more than ``room`` words."""
    addresses, words = np.empty(len(tensors), np.uint64), np.zeros(room, np.int64)
    at = [array.ctypes.data for array in (tensors, addresses, words)]
    _loop()(_describer(), *at, len(tensors), room)
    return addresses, words.tobytes()


def _ask(tensors: Tensors, room: int) -> tuple[Any, Any]:
    addresses, order = _ask_order(tensors, room)
    return addresses, (order, [x.dtype for x in tensors], [x.shape for x in tensors])


def _ask_order(tensors: Tensors, _: int) -> tuple[Any, Any]:
    each = tensors.tolist()
    addresses = np.array([*map(Tensor.data_ptr, each)], np.uint64)
    return addresses, all(map(Tensor.is_contiguous, each)) or [*map(Tensor.stride, each)]


@cache
def _describer() -> int | None:
    """Where DLPack's function is that describes a PyTorch tensor in place; None if there is none.

    It owns nothing: what it says holds until the tensor is touched.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # not in older PyTorch
    if capsule is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    pointer = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))
    api = _ExchangeAPI.from_address(pointer(capsule, b"dlpack_exchange_api"))
    return api.describe if api.major == 1 else None


class _ExchangeAPI(ctypes.Structure):
    """The begin of ``DLPackExchangeAPI`` in ``dlpack.h``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("allocate", ctypes.c_void_p),
        ("export", ctypes.c_void_p),
        ("take", ctypes.c_void_p),
        ("describe", ctypes.c_void_p),  # int (*)(PyObject *, DLTensor *)
    )


@cache
def _loop() -> Callable[..., None]:
    """The loop, compiled. It keeps Python's lock, and raises what the function has raised."""
    address, integer = ctypes.c_void_p, ctypes.c_int64
    prototype = ctypes.PYFUNCTYPE(None, *[address] * 4, *[integer] * 2)
    return prototype(ctypes.cast(compiler.compiled(_LOOP), address).value)


_LOOP = """\
define void @kernel(ptr %describe, ptr %objects, ptr %addresses, ptr %words, i64 %n, i64 %room) {
%tensor = alloca [6 x i64] ; a DLTensor: data, device, ndim and dtype, shape, strides, byte_offset
%data.at = getelementptr i64, ptr %tensor, i64 0
%kind.at = getelementptr i64, ptr %tensor, i64 1
%ndim.at = getelementptr i64, ptr %tensor, i64 2
%shape.at = getelementptr i64, ptr %tensor, i64 3
%strides.at = getelementptr i64, ptr %tensor, i64 4
%end = getelementptr i64, ptr %words, i64 %room
%last = sub i64 %n, 1
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %write]
%to = phi ptr [%words, %0], [%to.next, %write]
%more = icmp ult i64 %i, %n
br i1 %more, label %ask, label %done
ask:
; A hint: behind its header an object has the address of what is asked for. Any other costs nothing.
%ahead = add i64 %i, 4
%soon = call i64 @llvm.umin.i64(i64 %ahead, i64 %last)
%soon.at = getelementptr ptr, ptr %objects, i64 %soon
%soon.object = load ptr, ptr %soon.at
%hint.at = getelementptr ptr, ptr %soon.object, i64 2
%hint = load ptr, ptr %hint.at
%hint.1 = getelementptr i8, ptr %hint, i64 64
%hint.2 = getelementptr i8, ptr %hint, i64 128
%hint.3 = getelementptr i8, ptr %hint, i64 192
call void @llvm.prefetch.p0(ptr %hint, i32 1, i32 3, i32 1)
call void @llvm.prefetch.p0(ptr %hint.1, i32 1, i32 3, i32 1)
call void @llvm.prefetch.p0(ptr %hint.2, i32 1, i32 3, i32 1)
call void @llvm.prefetch.p0(ptr %hint.3, i32 1, i32 3, i32 1)
%object.at = getelementptr ptr, ptr %objects, i64 %i
%object = load ptr, ptr %object.at
%error = call i32 %describe(ptr %object, ptr %tensor)
%known = icmp eq i32 %error, 0
br i1 %known, label %measure, label %done
measure:
%ndim.32 = load i32, ptr %ndim.at
%ndim = sext i32 %ndim.32 to i64
%shape.to = getelementptr i64, ptr %to, i64 2
%strides.to = getelementptr i64, ptr %shape.to, i64 %ndim
%to.next = getelementptr i64, ptr %strides.to, i64 %ndim
%enough = icmp ule ptr %to.next, %end
br i1 %enough, label %write, label %done
write:
%data = load ptr, ptr %data.at
%address.to = getelementptr ptr, ptr %addresses, i64 %i
store ptr %data, ptr %address.to
%shape = load ptr, ptr %shape.at
%strides = load ptr, ptr %strides.at
%bytes = shl i64 %ndim, 3
call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %kind.at, i64 16, i1 false)
call void @llvm.memcpy.p0.p0.i64(ptr %shape.to, ptr %shape, i64 %bytes, i1 false)
call void @llvm.memcpy.p0.p0.i64(ptr %strides.to, ptr %strides, i64 %bytes, i1 false)
%i.next = add i64 %i, 1
br label %next
done:
ret void
}
"""
