"""A compiled look at all that a step works on: which objects, and where and how they lie in memory.

It calls what CPython and PyTorch export to C, and for what these lack what PyTorch exports to C++.
Where an object of Python has its type and its tensor, and a tensor its object, is found by looking.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from portopt.kernels import compiler, cpu, pool
from portopt.kernels.layout import ids
from portopt.kernels.loops import fetch

pool.join(ctypes.PyDLL(torch._C.__file__))

KIND = ("dtype", "layout", "device_type", "device_index")
_SHAPE = ("dim", "sizes", "strides", "data_ptr")
_ASKED = (*KIND, *_SHAPE)
_LAZY = ("is_neg", "is_conj")
_SYMBOLS = {
    # PyTorch's stable interface, ``torch/csrc/inductor/aoti_torch/c/shim.h``.
    **{name: f"aoti_torch_get_{name}" for name in _ASKED},
    # What that lacks: whether the elements are the negatives, or the conjugates, of those in
    # memory; and the gradient.
    **{name: f"_ZN2at6native{len(name)}{name}ERKNS_6TensorE" for name in _LAZY},
    "grad": "_ZNK3c1010TensorImpl4gradEv",
}
_KNOWN = (*_SYMBOLS, "item", "type", "none")
"""What a look is told of the process: functions, the class `Tensor`, the C++ tensor for none."""

TOLD = (
    *("known", "starts", "shapes", "kinds", "kept", "columns", "last", "table", "width", "grads"),
    *("n", "here", "states", "names", "n_names", "entries", "check", "checks", "n_checks"),
)
"""What the job of a `Look` is told: ``columns``, ``last``, ``n`` and ``n_names`` are numbers, the
others are addresses of arrays of 64-bit words. It says 1 if something is not as it was.

For each of ``n`` parameters, ``kept`` has the objects of ``columns`` tensors, it and its slots;
``last`` is the place of the last of them all. A row of ``table``, of ``width`` words, has where the
parameter begins, takes where the gradient does, 0 for none, and has where the slots do; ``here``
takes a byte, whether there is a gradient. ``kinds`` has what `kind_of` tells of each column and
then of gradients; of what stays at its address, the dtype alone is asked.
``shapes`` has for each parameter its number of dimensions, its sizes and its strides, which its
gradient and slots must have too; dimensions of one element, or none, may have any stride.
``starts`` has for each share its first parameter and the place of its shape; at the end ``n``.

``states`` has for each parameter a dict, which must have under each of ``n_names`` ``names`` just
what ``entries`` has. ``check``, if it is not 0, must say yes to ``checks`` (`contents.Checks`).
``grads`` has the addresses of the last gradients' C++ tensors, as those of the next will often be
the same.
"""
_NUMBERS = ("columns", "last", "width", "n", "n_names", "n_checks")


class Look(NamedTuple):
    """The functions of a job.

    Attributes:
        tensors: Where the kernel begins that looks at tensors.
        entries: Where the function begins that looks at dicts, which needs Python's lock.
        known: What both are told of the process.
    """

    tensors: int
    entries: int
    known: npt.NDArray[np.uint64]


@cache
def look() -> Look | None:
    """The look at tensors and dicts; None if there can be none here."""
    functions = _functions()
    if functions is None or not compiler.available():
        return None
    places = _places()
    if places is None:
        return None
    asks = [_ask(name, place) for place, name in enumerate(_ASKED)]
    lazy = "\n".join(_call(f"%{name} = call i8", name, "ptr %tensor") for name in _LAZY)
    text = _LIES.format(
        n_answers=len(_ASKED),
        n_bytes=8 * len(_ASKED),
        n_kind=len(KIND),
        lazy=lazy,
        ask_dtype=asks[0],
        ask_kind="\n".join(asks[1 : len(KIND)]),
        ask_shape="\n".join(asks[len(KIND) :]),
    )
    text += pool.kernel(
        [_told(name) for name in TOLD[: TOLD.index("states")]],
        _LOOK.format(
            ask_grad=_call("%grad = call ptr", "grad", "ptr %impl"),
            at=places.tensor,
            type_at=places.type,
            object_at=places.object,
            the_type=_KNOWN.index("type"),
            none=_KNOWN.index("none"),
            n_kind=len(KIND),
            fetch="".join(_fetches(places)),
            soon="".join(
                f"%soon.{line} = getelementptr i8, ptr %soon, i64 {line}\n"
                f"call void @llvm.prefetch.p0(ptr %soon.{line}, i32 0, i32 3, i32 1)\n"
                for line in (0, 64, 128)
            ),
        ),
    )
    text += pool.function(
        "entries",
        {TOLD.index(name): _told(name) for name in _OF_ENTRIES},
        _ENTRIES.format(
            ask=_call("%found = call ptr", "item", "ptr %state, ptr %key"),
            fetch=fetch("dict", 24, [0, 32], objects="states")
            + fetch("keys", 16, [0, 64, 128], through=[_KEYS], objects="states"),
        ),
    )
    functions["item"] = ctypes.pythonapi.PyDict_GetItemWithError
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions.values()]
    known = np.array([*addresses, id(Tensor), places.none], np.uint64)
    return Look(*compiler.compiled(text, "kernel", "entries"), known)


def kind_of(tensor: Tensor) -> list[int]:
    """What is to stay the same of a tensor, beside its shape: `KIND`, as PyTorch numbers it.

    Raises:
        RuntimeError: there is no look.
    """
    functions, places = _functions(), _places()
    if functions is None or places is None:
        raise RuntimeError("PyTorch's tensors do not lie as expected")
    handle, answer, found = ctypes.c_void_p(id(tensor) + places.tensor), ctypes.c_uint32(), []
    for name in KIND:
        functions[name](handle, ctypes.byref(answer))
        found.append(answer.value)
    return found


def _functions() -> dict[str, Any] | None:
    """PyTorch's functions; None if it lacks one."""
    library = ctypes.PyDLL(torch._C.__file__)
    functions = {name: getattr(library, symbol, None) for name, symbol in _SYMBOLS.items()}
    return None if None in functions.values() else functions


def bump(
    tensors: Sequence[Tensor], which: npt.NDArray[np.bool_]
) -> tuple[cpu.First, Sequence[Any]] | None:
    """What raises the version counters of tensors, as every write in place does.

    Args:
        tensors: The tensors.
        which: For each of them, whether it is written to.

    Returns:
        None if there is no such thing here. The arguments, and what comes along with the answer,
        must live as long as it.
    """
    one, places = getattr(ctypes.PyDLL(torch._C.__file__), _BUMP_ONE, None), _places()
    if one is None or places is None or any(map(Tensor.is_inference, tensors)):
        return None
    body = _BUMP.format(
        at=places.tensor,
        fetch=fetch("tensor", 16, [0], through=[places.tensor])
        + fetch("version", 8, [0], through=[places.tensor, _VERSION]),
    )
    text = pool.function("bump", {cpu.FIRST: "ptr %known"}, body)
    address = ctypes.cast(one, ctypes.c_void_p).value
    objects = ids(tensors)
    known = np.array([address, len(tensors), objects.ctypes.data, which.ctypes.data], np.uint64)
    return cpu.First(*compiler.compiled(text, "bump"), known.ctypes.data), (known, objects)


_BUMP_ONE = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"


class _Places(NamedTuple):
    """Where things are, in bytes from the begin of what has them.

    Attributes:
        type: In an object of Python: its type.
        tensor: In the object of a tensor: the address of the tensor in C++.
        object: In that: the address of its object, whose last bit may mean something else; 0 if it
            has none.
        none: The address of the tensor in C++ that stands for none.
    """

    type: int
    tensor: int
    object: int
    none: int


# Only what is fetched ahead depends on these: where they are not right, it costs some speed.
# In a tensor of C++, the addresses of its storage, of its gradient, and of its version.
_STORAGE, _META, _VERSION = 16, 24, 40
_KEYS = 32  # in a dict, the address of its table


@cache
def _places() -> _Places | None:
    functions = _functions()
    sample, size = torch.empty(0), ctypes.sizeof(ctypes.c_size_t)

    def find(value: int, begin: int, end: int) -> int | None:
        words = (ctypes.c_size_t * (end // size)).from_address(begin)
        return next(
            (size * place for place, word in enumerate(words) if word | 1 == value | 1), None
        )

    own_type = find(id(type(sample)), id(sample), Tensor.__basicsize__)
    tensor = find(sample._cdata, id(sample), Tensor.__basicsize__)
    own_object = find(id(sample), sample._cdata, _LEAST)
    if functions is None or own_type is None or tensor is None or own_object is None:
        return None
    functions["grad"].restype = ctypes.c_void_p
    none = functions["grad"](ctypes.c_void_p(sample._cdata))
    return _Places(own_type, tensor, own_object, ctypes.c_size_t.from_address(none).value)


_LEAST = 128
"""So many bytes a tensor has in C++ at least."""
_OF_ENTRIES = (
    *("known", "n", "states", "names", "n_names", "entries", "check", "checks", "n_checks"),
)


def _told(name: str) -> str:
    return f"{'i64' if name in _NUMBERS else 'ptr'} %{name}"


def _call(result: str, name: str, arguments: str) -> str:
    """Lines that call one of the known functions."""
    return (
        f"%{name}.at = getelementptr ptr, ptr %known, i64 {_KNOWN.index(name)}\n"
        f"%{name}.function = load ptr, ptr %{name}.at\n"
        f"{result} %{name}.function({arguments})"
    )


def _ask(name: str, place: int) -> str:
    """Lines that have a known function answer for ``%tensor``."""
    return f"%{name}.to = getelementptr i64, ptr %answers, i64 {place}\n" + _call(
        f"%{name}.error = call i32", name, f"ptr %tensor, ptr %{name}.to"
    )


def _fetches(places: _Places) -> Iterator[str]:
    def ahead(name: str, rounds: int, lines: Sequence[int], through: Sequence[int]) -> str:
        return fetch(name, rounds, lines, through=through, objects="kept", index="j")

    yield ahead("object", 24, [places.tensor], [])
    yield ahead("tensor", 16, [0, 64, 128, 192], [places.tensor])
    yield ahead("storage", 8, [0], [places.tensor, _STORAGE])
    yield ahead("meta", 8, [0, 64], [places.tensor, _META])


_LIES = """\
define private i1 @lies(ptr %known, ptr %tensor, ptr %kind, ptr %shape, ptr %address, i1 %stays) {{
%answers = alloca [{n_answers} x i64]
; Some answers fill half a word.
call void @llvm.memset.p0.i64(ptr %answers, i8 0, i64 {n_bytes}, i1 false)
{lazy}
%lazy = or i8 %is_neg, %is_conj
%plain = icmp eq i8 %lazy, 0
br i1 %plain, label %ask, label %no
ask:
{ask_dtype}
%n.kind = select i1 %stays, i64 1, i64 {n_kind}
br i1 %stays, label %kinds, label %ask.kind
ask.kind:
{ask_kind}
br label %kinds
kinds:
%k = phi i64 [0, %ask], [0, %ask.kind], [%k.next, %kind.is]
%k.more = icmp ult i64 %k, %n.kind
br i1 %k.more, label %look.kind, label %ask.shape
look.kind:
%k.next = add i64 %k, 1
%kind.at = getelementptr i64, ptr %kind, i64 %k
%answer.at = getelementptr i64, ptr %answers, i64 %k
%wanted = load i64, ptr %kind.at
%answer = load i64, ptr %answer.at
%alike = icmp eq i64 %answer, %wanted
br i1 %alike, label %kind.is, label %no
kind.is:
br label %kinds
ask.shape: ; not of another layout: PyTorch before 2.13 tells stderr of what it cannot answer
{ask_shape}
%error.0 = or i32 %sizes.error, %strides.error
%error = or i32 %error.0, %data_ptr.error
%answered = icmp eq i32 %error, 0
br i1 %answered, label %measure, label %no
measure:
%dim = load i64, ptr %dim.to
%dim.known = load i64, ptr %shape
%dim.is = icmp eq i64 %dim, %dim.known
%sizes = load ptr, ptr %sizes.to
%strides = load ptr, ptr %strides.to
%sizes.known = getelementptr i64, ptr %shape, i64 1
%strides.known = getelementptr i64, ptr %sizes.known, i64 %dim
br i1 %dim.is, label %dims, label %no
dims:
%d = phi i64 [0, %measure], [%d.next, %dim.same]
%d.more = icmp ult i64 %d, %dim
br i1 %d.more, label %compare, label %yes
compare:
%d.next = add i64 %d, 1
%size.at = getelementptr i64, ptr %sizes, i64 %d
%size.known.at = getelementptr i64, ptr %sizes.known, i64 %d
%size = load i64, ptr %size.at
%size.known = load i64, ptr %size.known.at
%size.is = icmp eq i64 %size, %size.known
br i1 %size.is, label %compare.stride, label %no
compare.stride:
%stride.at = getelementptr i64, ptr %strides, i64 %d
%stride.known.at = getelementptr i64, ptr %strides.known, i64 %d
%stride = load i64, ptr %stride.at
%stride.known = load i64, ptr %stride.known.at
%stride.is = icmp eq i64 %stride, %stride.known
%short = icmp ule i64 %size, 1
%stride.fits = or i1 %stride.is, %short
br i1 %stride.fits, label %dim.same, label %no
dim.same:
br label %dims
yes:
%found = load i64, ptr %data_ptr.to
store i64 %found, ptr %address
ret i1 true
no:
ret i1 false
}}
"""

_LOOK = """\
open:
%start = getelementptr [2 x i64], ptr %starts, i64 %share
%start.shape = getelementptr i64, ptr %start, i64 1
%stop = getelementptr i64, ptr %start, i64 2
%first = load i64, ptr %start
%shape.in = load i64, ptr %start.shape
%end = load i64, ptr %stop
%shape.first = getelementptr i64, ptr %shapes, i64 %shape.in
br label %next
next:
%i = phi i64 [%first, %open], [%i.next, %noted]
%shape = phi ptr [%shape.first, %open], [%shape.next, %noted]
%more = icmp ult i64 %i, %end
br i1 %more, label %begin, label %given
begin:
%i.next = add i64 %i, 1
%dim = load i64, ptr %shape
%shape.words = getelementptr i64, ptr %shape, i64 1
%shape.next = getelementptr [2 x i64], ptr %shape.words, i64 %dim
%row = mul i64 %i, %columns
%table.in = mul i64 %i, %width
%table.row = getelementptr i64, ptr %table, i64 %table.in
%grad.address = getelementptr i64, ptr %table.row, i64 1
%soon.later = add i64 %i, 8
%soon.final = sub i64 %n, 1
%soon.i = call i64 @llvm.umin.i64(i64 %soon.later, i64 %soon.final)
%soon.at = getelementptr ptr, ptr %grads, i64 %soon.i
%soon = load ptr, ptr %soon.at
{soon}
br label %column
column:
%c = phi i64 [0, %begin], [%c.next, %stays]
%c.more = icmp ult i64 %c, %columns
br i1 %c.more, label %tensor, label %gradient
tensor:
%c.next = add i64 %c, 1
%j = add i64 %row, %c
{fetch}
%kept.at = getelementptr ptr, ptr %kept, i64 %j
%kept.object = load ptr, ptr %kept.at
%kept.tensor = getelementptr i8, ptr %kept.object, i64 {at}
%kept.kind = getelementptr [{n_kind} x i64], ptr %kinds, i64 %c
%is.slot = icmp ne i64 %c, 0 ; behind the gradient's column
%past.grad = zext i1 %is.slot to i64
%kept.column = add i64 %c, %past.grad
%kept.address = getelementptr i64, ptr %table.row, i64 %kept.column
%before = load i64, ptr %kept.address
%kept.lies = call i1 @lies(
ptr %known, ptr %kept.tensor, ptr %kept.kind, ptr %shape, ptr %kept.address,
i1 true
)
%now = load i64, ptr %kept.address
%same = icmp eq i64 %now, %before
%stays.too = and i1 %kept.lies, %same
br i1 %stays.too, label %stays, label %fail
stays:
br label %column
gradient:
%param.at = getelementptr ptr, ptr %kept, i64 %row
%param = load ptr, ptr %param.at
%impl.at = getelementptr i8, ptr %param, i64 {at}
%impl = load ptr, ptr %impl.at
{ask_grad}
%grad.impl = load ptr, ptr %grad
%none.at = getelementptr ptr, ptr %known, i64 {none}
%none = load ptr, ptr %none.at
%is.none = icmp eq ptr %grad.impl, %none
br i1 %is.none, label %absent, label %classify
absent:
store i64 0, ptr %grad.address
br label %noted
classify:
%object.at = getelementptr i8, ptr %grad.impl, i64 {object_at}
%object.word = load i64, ptr %object.at
%object.bare = and i64 %object.word, -2
%no.object = icmp eq i64 %object.bare, 0
br i1 %no.object, label %measure, label %classified
classified:
%object = inttoptr i64 %object.bare to ptr
%type.at = getelementptr i8, ptr %object, i64 {type_at}
%type = load ptr, ptr %type.at
%the.type.at = getelementptr ptr, ptr %known, i64 {the_type}
%the.type = load ptr, ptr %the.type.at
%is.tensor = icmp eq ptr %type, %the.type
br i1 %is.tensor, label %measure, label %fail
measure:
%grad.kind = getelementptr [{n_kind} x i64], ptr %kinds, i64 %columns
%grad.lies = call i1 @lies(
ptr %known, ptr %grad, ptr %grad.kind, ptr %shape, ptr %grad.address, i1 false
)
br i1 %grad.lies, label %place, label %fail
place: ; one that stands for zeros has elements, but no memory
%param.address = load i64, ptr %table.row
%grad.begin = load i64, ptr %grad.address
%param.nowhere = icmp eq i64 %param.address, 0
%grad.nowhere = icmp eq i64 %grad.begin, 0
%both = icmp eq i1 %param.nowhere, %grad.nowhere
br i1 %both, label %noted, label %fail
noted:
%is.here = phi i8 [0, %absent], [1, %place]
%here.at = getelementptr i8, ptr %here, i64 %i
store i8 %is.here, ptr %here.at
%grads.at = getelementptr ptr, ptr %grads, i64 %i
store ptr %grad.impl, ptr %grads.at
br label %next
fail:
store atomic i64 1, ptr %job.said monotonic, align 8
br label %given
"""

_ENTRIES = """\
%last = sub i64 %n, 1
%no.check = icmp eq ptr %check, null
br i1 %no.check, label %each, label %check.all
check.all:
%holds = call i1 %check(ptr %checks, i64 %n_checks)
br i1 %holds, label %each, label %fail
each:
%some.names = icmp ne i64 %n_names, 0
br i1 %some.names, label %next, label %done
next:
%i = phi i64 [0, %each], [%i.next, %entry]
%more = icmp ult i64 %i, %n
br i1 %more, label %begin, label %done
begin:
{fetch}
%i.next = add i64 %i, 1
%state.at = getelementptr ptr, ptr %states, i64 %i
%state = load ptr, ptr %state.at
%row = mul i64 %i, %n_names
%row.at = getelementptr ptr, ptr %entries, i64 %row
br label %entry
entry:
%k = phi i64 [0, %begin], [%k.next, %is]
%k.more = icmp ult i64 %k, %n_names
br i1 %k.more, label %ask, label %next
ask:
%k.next = add i64 %k, 1
%key.at = getelementptr ptr, ptr %names, i64 %k
%key = load ptr, ptr %key.at
%wanted.at = getelementptr ptr, ptr %row.at, i64 %k
%wanted = load ptr, ptr %wanted.at
{ask}
%same = icmp eq ptr %found, %wanted
br i1 %same, label %is, label %fail
is:
br label %entry
fail:
store atomic i64 1, ptr %job.said monotonic, align 8
br label %done
done:
ret void"""

_BUMP = """\
%n.at = getelementptr i64, ptr %known, i64 1
%objects.at = getelementptr ptr, ptr %known, i64 2
%which.at = getelementptr ptr, ptr %known, i64 3
%function = load ptr, ptr %known
%n = load i64, ptr %n.at
%objects = load ptr, ptr %objects.at
%which = load ptr, ptr %which.at
%last = sub i64 %n, 1
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %ask], [%i.next, %raise]
%more = icmp ult i64 %i, %n
br i1 %more, label %ask, label %done
ask:
{fetch}
%i.next = add i64 %i, 1
%own.at = getelementptr i8, ptr %which, i64 %i
%own = load i8, ptr %own.at
%written = icmp ne i8 %own, 0
br i1 %written, label %raise, label %next
raise:
%object.at = getelementptr ptr, ptr %objects, i64 %i
%object = load ptr, ptr %object.at
%tensor = getelementptr i8, ptr %object, i64 {at}
call void %function(ptr %tensor)
br label %next
done:
ret void"""
