"""Compiled loops over Python's objects of many tensors, which every step looks at.

They call what CPython and PyTorch export to C, and know where an object has its type and its tensor
because Python tells both: `places` looks for them. They hold Python's lock.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from portopt.kernels import compiler
from portopt.kernels.compiler import Loop
from portopt.kernels.loops import COMPARE, fetch

KIND = ("layout", "dtype", "device_type", "device_index", "dim")
"""What a tensor is asked first: numbers."""
_REST = ("sizes", "strides", "data_ptr")
"""The rest: all are PyTorch's stable C interface, ``torch/csrc/inductor/aoti_torch/c/shim.h``."""
_LAZY = ("_ZN2at6native6is_negERKNS_6TensorE", "_ZN2at6native7is_conjERKNS_6TensorE")
"""What C lacks: whether the elements are the negatives, or the conjugates, of those in memory."""


@cache
def layouts() -> Loop | None:
    """The loop over layouts; None if there can be none here.

    It is one of ``(functions, objects, addresses, known, n, learn, place)``, and returns how many
    of ``n`` objects of tensors lie as known, none of them negated or conjugated lazily: ``known``
    has for each its `KIND`, its sizes and its strides, all int64, and ``addresses`` where it
    begins. ``learn`` and ``place`` say whether the former and the latter are to be noted instead.
    """
    library = ctypes.PyDLL(torch._C.__file__)
    names = (*(f"aoti_torch_get_{name}" for name in (*KIND, *_REST)), *_LAZY)
    functions = [getattr(library, name, None) for name in names]
    places = _places()
    if places is None or None in functions or not compiler.available():
        return None
    asks = [_ask(name, place) for place, name in enumerate((*KIND, *_REST))]
    text = COMPARE + _LAYOUTS.format(
        n_answers=len(asks),
        n_bytes=8 * len(asks),
        n_kind=len(KIND),
        at=places.tensor,
        fetch=fetch("object", 24, [places.tensor])
        + fetch("tensor", 16, [0, 64, 128, 192], through=[places.tensor])
        + fetch("storage", 8, [0], through=[places.tensor, _STORAGE]),
        ask_lazy="".join(_ask_lazy(number, len(asks) + number) for number in range(len(_LAZY))),
        ask_kind="".join(asks[: len(KIND)]),
        ask_rest="".join(asks[len(KIND) :]),
    )
    pointers, flags = [ctypes.c_void_p] * 4, [ctypes.c_bool] * 2
    return compiler.loop(text, functions, [*pointers, ctypes.c_int64, *flags])


@cache
def gradients() -> Loop | None:
    """The loop over gradients and states; None if there can be none here.

    It is one of ``(functions, type, name, objects, n, grads, before, states, names, n_names,
    entries)``, and returns for how many of ``n`` objects the attribute of that ``name`` has just
    that ``type``, and the dict of that place in ``states`` has for each of ``names`` what is in
    ``entries``. ``grads`` takes the attributes: an array of objects. ``before`` has two addresses
    for each parameter, which will likely be looked at because they were the last time.
    """
    places = _places()
    if places is None or not compiler.available():
        return None
    text = _GRADIENTS.format(
        at=places.tensor,
        type_at=places.type,
        fetch=fetch("object", 24, [places.tensor])
        + fetch("tensor", 16, [0, 64, 128, 192], through=[places.tensor])
        + fetch("meta", 8, [0, 64], through=[places.tensor, _META])
        + fetch("dict", 24, [0, 32], objects="states")
        + fetch("keys", 16, [0, 64, 128], through=[_KEYS], objects="states"),
    )
    names = ("PyObject_GetAttr", "PyDict_GetItemWithError", "Py_DecRef")
    functions = [getattr(ctypes.pythonapi, name) for name in names]
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    kinds = [*[pointer] * 4, integer, *[pointer] * 4, integer, pointer]
    return compiler.loop(text, functions, kinds)


class _Places(NamedTuple):
    """Where an object of a tensor has, in bytes from its begin, its type and its C++ tensor."""

    type: int
    tensor: int


# Only what is fetched ahead depends on these: where they are not right, it costs some speed.
_STORAGE, _META = 16, 24  # in a tensor of C++, the addresses of its storage and of its gradient
_KEYS = 32  # in a dict, the address of its table


@cache
def _places() -> _Places | None:
    sample, word = torch.empty(0), ctypes.c_size_t

    def find(value: int) -> int | None:
        offsets = range(0, Tensor.__basicsize__, ctypes.sizeof(word))
        found = (at for at in offsets if word.from_address(id(sample) + at).value == value)
        return next(found, None)

    own_type, tensor = find(id(type(sample))), find(sample._cdata)
    return None if own_type is None or tensor is None else _Places(own_type, tensor)


def _ask_lazy(number: int, place: int) -> str:
    """Lines that have the function at that place say yes or no of ``%tensor``."""
    return f"""\
%lazy.function.at.{number} = getelementptr ptr, ptr %functions, i64 {place}
%lazy.function.{number} = load ptr, ptr %lazy.function.at.{number}
%lazy.{number} = call i8 %lazy.function.{number}(ptr %tensor)
"""


def _ask(name: str, place: int) -> str:
    """Lines that have the function at that place answer for ``%tensor``."""
    return f"""\
%{name}.function.at = getelementptr ptr, ptr %functions, i64 {place}
%{name}.function = load ptr, ptr %{name}.function.at
%{name}.to = getelementptr i64, ptr %answers, i64 {place}
%{name}.error = call i32 %{name}.function(ptr %tensor, ptr %{name}.to)
"""


_LAYOUTS = """\
define i64 @kernel(
ptr %functions, ptr %objects, ptr %addresses, ptr %words, i64 %n, i1 %learn, i1 %place
) {{
%answers = alloca [{n_answers} x i64]
; Some answers fill half a word.
call void @llvm.memset.p0.i64(ptr %answers, i8 0, i64 {n_bytes}, i1 false)
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
%tensor = getelementptr i8, ptr %object, i64 {at}
{ask_lazy}
%lazy = or i8 %lazy.0, %lazy.1
%plain = icmp eq i8 %lazy, 0
br i1 %plain, label %look, label %done
look:
{ask_kind}
%kind.is = call i1 @is_as(ptr %to, ptr %answers, i64 {n_kind}, i1 %learn)
br i1 %kind.is, label %measure, label %done
measure:
{ask_rest}
%error.0 = or i32 %sizes.error, %strides.error
%error = or i32 %error.0, %data_ptr.error
%answered = icmp eq i32 %error, 0
br i1 %answered, label %check, label %done
check:
%dim = load i64, ptr %dim.to
%sizes = load ptr, ptr %sizes.to
%strides = load ptr, ptr %strides.to
%to.sizes = getelementptr i64, ptr %to, i64 {n_kind}
%to.next = getelementptr [2 x i64], ptr %to.sizes, i64 %dim
%address.at = getelementptr ptr, ptr %addresses, i64 %i
%all.is = call i1 @lies_as(
ptr %to.sizes, ptr %sizes, ptr %strides, i64 %dim, ptr %address.at, ptr %data_ptr.to,
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

_GRADIENTS = """\
define i64 @kernel(
ptr %functions, ptr %type, ptr %name, ptr %objects, i64 %n, ptr %grads, ptr %before, ptr %states,
ptr %names, i64 %n_names, ptr %entries
) {{
%item.at = getelementptr ptr, ptr %functions, i64 1
%drop.at = getelementptr ptr, ptr %functions, i64 2
%attribute = load ptr, ptr %functions
%item = load ptr, ptr %item.at
%drop = load ptr, ptr %drop.at
%last = sub i64 %n, 1
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %noted]
%more = icmp ult i64 %i, %n
br i1 %more, label %begin, label %done
begin:
{fetch}
%before.at = getelementptr [2 x ptr], ptr %before, i64 %i
%soon.at = getelementptr [2 x ptr], ptr %before, i64 %meta.i
%soon.tensor.at = getelementptr ptr, ptr %soon.at, i64 1
%soon.object = load ptr, ptr %soon.at
%soon.tensor = load ptr, ptr %soon.tensor.at
%soon.tensor.1 = getelementptr i8, ptr %soon.tensor, i64 64
%soon.tensor.2 = getelementptr i8, ptr %soon.tensor, i64 128
call void @llvm.prefetch.p0(ptr %soon.object, i32 1, i32 3, i32 1)
call void @llvm.prefetch.p0(ptr %soon.tensor, i32 1, i32 3, i32 1)
call void @llvm.prefetch.p0(ptr %soon.tensor.1, i32 1, i32 3, i32 1)
call void @llvm.prefetch.p0(ptr %soon.tensor.2, i32 1, i32 3, i32 1)
%state.at = getelementptr ptr, ptr %states, i64 %i
%state = load ptr, ptr %state.at
%row = mul i64 %i, %n_names
%row.at = getelementptr ptr, ptr %entries, i64 %row
br label %entry
entry:
%j = phi i64 [0, %begin], [%j.next, %entry.look]
%entry.more = icmp ult i64 %j, %n_names
br i1 %entry.more, label %entry.ask, label %take
entry.ask:
%key.at = getelementptr ptr, ptr %names, i64 %j
%key = load ptr, ptr %key.at
%wanted.at = getelementptr ptr, ptr %row.at, i64 %j
%wanted = load ptr, ptr %wanted.at
%found = call ptr %item(ptr %state, ptr %key)
%entry.is = icmp eq ptr %found, %wanted
br i1 %entry.is, label %entry.look, label %done
entry.look:
%j.next = add i64 %j, 1
br label %entry
take:
%own.at = getelementptr ptr, ptr %objects, i64 %i
%own = load ptr, ptr %own.at
%grad = call ptr %attribute(ptr %own, ptr %name)
%none = icmp eq ptr %grad, null
br i1 %none, label %done, label %keep
keep:
%grad.to = getelementptr ptr, ptr %grads, i64 %i
%old = load ptr, ptr %grad.to
store ptr %grad, ptr %grad.to
call void %drop(ptr %old)
%type.at = getelementptr i8, ptr %grad, i64 {type_at}
%own.type = load ptr, ptr %type.at
%is.tensor = icmp eq ptr %own.type, %type
br i1 %is.tensor, label %noted, label %done
noted:
%tensor.at = getelementptr i8, ptr %grad, i64 {at}
%tensor = load ptr, ptr %tensor.at
%before.tensor.at = getelementptr ptr, ptr %before.at, i64 1
store ptr %grad, ptr %before.at
store ptr %tensor, ptr %before.tensor.at
%i.next = add i64 %i, 1
br label %next
done:
ret i64 %i
}}
"""
