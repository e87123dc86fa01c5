"""Keras on TensorFlow: where variables lie in memory, to be overwritten in place.

That is allowed only while nothing else holds the memory: a tensor that was read before is to keep
its elements. TensorFlow's own kernels ask the buffer, in C++, how many hold it, and so does a
compiled loop here. It finds the buffer by looking, and is believed after it has told right of a
variable of our own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.python import _pywrap_tensorflow_internal
from tensorflow.python.eager import context, execute
from tensorflow.python.framework.ops import EagerTensor

from portopt.kernels import compiler, cpu
from portopt.kernels.compiler import Loop

Table: TypeAlias = npt.NDArray[np.uint64]
Found: TypeAlias = "tuple[Held, Table]"
"""What keeps memory while it lives, and where that begins."""

DATA, KIND, HOLDERS, BYTES, TENSOR = range(5)
"""What `Held` tells of a tensor: where its elements begin, the class of its buffer in C++, how many
hold that, the size of the elements, and the tensor of C that holds it as well."""

_AT_ONCE = 128
"""How many variables an op reads. For each number TensorFlow prepares one, in quadratic time."""


def is_here(variable: Any) -> bool:
    """Whether a variable is in this processor's memory, and of a known shape."""
    return _is_here(variable.handle) and variable.shape.is_fully_defined()


def _is_here(tensor: Any) -> bool:
    return isinstance(tensor, EagerTensor) and tensor.device.endswith("CPU:0")


def lack(variables: Sequence[Any]) -> str | None:
    """Why they cannot be worked on where they are; None if they can."""
    return None if _place() is not None else _NOT_FOUND


_NOT_FOUND = "TensorFlow's variables are not kept as expected"


def can_step() -> bool:
    """Whether memory may be looked at now: every operation before has been done."""
    return bool(tf.config.experimental.get_synchronous_execution())


def threads() -> int:
    """How many threads a launch may use."""
    return tf.config.threading.get_intra_op_parallelism_threads() or cpu.threads()


def find(grads: Sequence[Any], sizes: Sequence[int]) -> Found | None:
    """Gradients of one dtype and so many elements, none empty; None if not all in this memory."""
    if not all(map(_is_here, grads)):
        return None
    held = hold([grads], len(grads))
    sizes_in_bytes = grads[0].dtype.size * np.asarray(sizes, np.uint64)
    fit = np.array_equal(held.rows[:, BYTES], sizes_in_bytes)
    return (held, held.rows[:, DATA]) if fit else None


class Variables:
    """Variables whose values are to be overwritten in place.

    Args:
        variables: Variables of TensorFlow or Keras that are `is_here`, none of them empty.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._handles = [variable.handle for variable in variables]
        self._dtypes = [tf.as_dtype(variable.dtype) for variable in variables]
        sizes = [variable.shape.num_elements() for variable in variables]
        self._wanted = np.array(
            [
                (*_alone(dtype), dtype.size * size)
                for dtype, size in zip(self._dtypes, sizes, strict=True)
            ],
            np.uint64,
        )

    def find(self) -> Found | None:
        """Their values, in memory that nothing else holds.

        A value that something else holds, or that lies in memory of another kind, is copied first.
        None if one is still not alone, or not of its variable's size.
        """
        held = self._hold()
        others = self._others(held)
        if others:
            del held
            with tf.init_scope():  # on no tape
                for place in others:
                    ((value,),) = read([self._handles[place]], [self._dtypes[place]])
                    copy = tf.raw_ops.DeepCopy(x=value)
                    del value  # so that its memory may be given up before the next is copied
                    tf.raw_ops.AssignVariableOp(resource=self._handles[place], value=copy)
            del copy
            held = self._hold()
        return None if self._others(held) else (held, held.rows[:, DATA])

    def wrote(self, held: Held) -> None:
        """Nothing: TensorFlow does not count what is written."""

    def _hold(self) -> Held:
        return hold(read(self._handles, self._dtypes), len(self._handles))

    def _others(self, held: Held) -> list[int]:
        return np.flatnonzero((held.rows[:, KIND:TENSOR] != self._wanted).any(axis=1)).tolist()


def read(handles: Sequence[Any], dtypes: Sequence[tf.DType]) -> Iterator[list[Any]]:
    """The values of variables, some at a time, which are not copied."""
    for begin in range(0, len(handles), _AT_ONCE):
        some = list(handles[begin : begin + _AT_ONCE])
        kinds = tuple(dtype.as_datatype_enum for dtype in dtypes[begin : begin + _AT_ONCE])
        attrs = ("N", len(some), "dtypes", kinds)
        yield execute.execute(
            b"_ReadVariablesOp", len(some), inputs=some, attrs=attrs, ctx=context.context()
        )


def hold(tensors: Iterable[Sequence[Any]], count: int) -> Held:
    """Hold the buffers of tensors in this memory, none of them empty.

    Args:
        tensors: They, some at a time.
        count: How many there are in all.

    Raises:
        RuntimeError: it is not known how to find the buffers.
    """
    place = _place()
    if place is None:
        raise RuntimeError(_NOT_FOUND)
    return Held(place, tensors, count)


class Held:
    """Buffers, which live as long as this does.

    Tensors of Python would keep them too, but take seven times as much memory themselves.

    Args:
        place: How to come to them.
        tensors: Whose they are, some tensors at a time.
        count: How many tensors there are in all.

    Attributes:
        rows: For each tensor `DATA`, `KIND`, `HOLDERS`, `BYTES` and `TENSOR`.
    """

    def __init__(self, place: _Place, tensors: Iterable[Sequence[Any]], count: int) -> None:
        self._place, begin = place, 0
        self.rows = np.zeros((count, 5), np.uint64)
        for some in tensors:
            place.hold(some, self.rows[begin : begin + len(some)])
            begin += len(some)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._place.let_go(self.rows)


class _Place(NamedTuple):
    """How to come to tensors' buffers.

    Attributes:
        look: Over tensors: ``(functions, objects, n, at, status, rows)`` returns how many of ``n``
            could be asked; ``rows`` takes those of `Held`.
        give_back: Over ``rows``: ``(functions, rows, n)`` deletes the tensors of C.
        at: Where a tensor has its buffer: in bytes from its begin in C++.
        status: Where the C functions put their errors.
    """

    look: Loop
    give_back: Loop
    at: int
    status: int

    def hold(self, tensors: Sequence[Any], rows: Table) -> None:
        objects = np.fromiter(tensors, object, len(tensors))
        ends = objects.ctypes.data, len(tensors), self.at, self.status, rows.ctypes.data
        if self.look.call(self.look.functions.ctypes.data, *ends) != len(tensors):
            raise RuntimeError("TensorFlow does not tell where one of its tensors lies")

    def let_go(self, rows: Table) -> None:
        self.give_back.call(self.give_back.functions.ctypes.data, rows.ctypes.data, len(rows))

    def is_right(self) -> bool:
        """Whether holders are counted as they come and go."""
        variable = _variable(tf.float32)
        (value,) = read([variable.handle], [tf.float32])

        def count() -> int:
            return int(Held(self, [value], 1).rows[0, HOLDERS])

        of_value = count()
        other = variable.read_value()
        with_other = count()
        del other
        again = count()
        del variable
        return 0 < count() < of_value == again < with_other < 16


def _variable(dtype: tf.DType) -> tf.Variable:
    with tf.init_scope(), tf.device("CPU:0"):
        return tf.Variable(tf.raw_ops.DeepCopy(x=tf.zeros(5, dtype)), trainable=False)


@cache
def _alone(dtype: tf.DType) -> tuple[int, int]:
    """The kind, and the number of holders, of a value just read that nothing else holds."""
    variable = _variable(dtype)
    (row,) = hold(read([variable.handle], [dtype]), 1).rows.tolist()
    return row[KIND], row[HOLDERS]


_FUNCTIONS = (
    "_Z18EagerTensor_HandlePK7_object",
    "TFE_TensorHandleResolve",
    "TF_TensorData",
    "TF_TensorByteSize",
    "TF_DeleteTensor",
)
"""TensorFlow's C interface, but for the first."""


@cache
def _place() -> _Place | None:
    """How to come to buffers; None if something there is not as expected."""
    library, pointer = ctypes.PyDLL(_pywrap_tensorflow_internal.__file__), ctypes.c_void_p
    functions = [getattr(library, name, None) for name in (*_FUNCTIONS, "TF_NewStatus")]
    if None in functions:
        return None
    for function in functions:
        function.restype = pointer
    *functions, new_status = functions
    status = new_status()
    at = _find_buffer(functions, status)
    if at is None:
        return None
    kinds = [pointer, pointer, ctypes.c_int64, ctypes.c_int64, pointer, pointer]
    look = compiler.loop(_LOOK, functions[:-1], kinds)
    give_back = compiler.loop(_GIVE_BACK, functions[-1:], [pointer, pointer, ctypes.c_int64])
    place = _Place(look, give_back, at, status)
    try:
        return place if place.is_right() else None
    except tf.errors.OpError:  # variables are read by another op
        return None


def _find_buffer(functions: Sequence[Any], status: int) -> int | None:
    """Where a tensor has the address of its buffer, whose third word is the address of the data."""
    handle_of, resolve, data_of, _, delete = functions
    pointer = ctypes.c_void_p
    value = _variable(tf.float32).read_value()
    tensor = pointer(resolve(pointer(handle_of(ctypes.py_object(value))), pointer(status)))
    data, begin = data_of(tensor), _word(tensor.value)
    found = (at for at in range(8, 64, 8) if _word((_word(begin + at) or 0) + 16) == data)
    at = next(found, None)
    delete(tensor)
    return at


def _word(address: int) -> int | None:
    """What stands at an address; None if there is no memory."""
    reading, writing = os.pipe()
    try:
        os.write(writing, (ctypes.c_char * 8).from_address(address))  # which asks the system
        return int.from_bytes(os.read(reading, 8), sys.byteorder)
    except OSError:
        return None
    finally:
        os.close(reading)
        os.close(writing)


_LOOK = """\
define i64 @kernel(
ptr %functions, ptr %objects, i64 %n, i64 %at, ptr %status, ptr %rows
) {
%resolve.at = getelementptr ptr, ptr %functions, i64 1
%data.at = getelementptr ptr, ptr %functions, i64 2
%size.at = getelementptr ptr, ptr %functions, i64 3
%handle = load ptr, ptr %functions
%resolve = load ptr, ptr %resolve.at
%data = load ptr, ptr %data.at
%size = load ptr, ptr %size.at
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %look]
%more = icmp ult i64 %i, %n
br i1 %more, label %ask, label %done
ask:
%object.at = getelementptr ptr, ptr %objects, i64 %i
%object = load ptr, ptr %object.at
%own = call ptr %handle(ptr %object)
%tensor = call ptr %resolve(ptr %own, ptr %status)
%none = icmp eq ptr %tensor, null
br i1 %none, label %done, label %look
look:
%address = call i64 %data(ptr %tensor)
%bytes = call i64 %size(ptr %tensor)
%begin = load ptr, ptr %tensor
%buffer.at = getelementptr i8, ptr %begin, i64 %at
%buffer = load ptr, ptr %buffer.at
%kind = load i64, ptr %buffer
%holders.at = getelementptr i64, ptr %buffer, i64 1
%holders = load atomic i64, ptr %holders.at monotonic, align 8
%row.0 = getelementptr [5 x i64], ptr %rows, i64 %i
%row.1 = getelementptr i64, ptr %row.0, i64 1
%row.2 = getelementptr i64, ptr %row.0, i64 2
%row.3 = getelementptr i64, ptr %row.0, i64 3
%row.4 = getelementptr i64, ptr %row.0, i64 4
store i64 %address, ptr %row.0
store i64 %kind, ptr %row.1
store i64 %holders, ptr %row.2
store i64 %bytes, ptr %row.3
store ptr %tensor, ptr %row.4
%i.next = add i64 %i, 1
br label %next
done:
ret i64 %i
}
"""

_GIVE_BACK = """\
define i64 @kernel(ptr %functions, ptr %rows, i64 %n) {
%delete = load ptr, ptr %functions
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %is.back]
%more = icmp ult i64 %i, %n
br i1 %more, label %look, label %done
look:
%i.next = add i64 %i, 1
%row = getelementptr [5 x i64], ptr %rows, i64 %i
%tensor.at = getelementptr i64, ptr %row, i64 4
%tensor = load ptr, ptr %tensor.at
%none = icmp eq ptr %tensor, null
br i1 %none, label %is.back, label %give
give:
call void %delete(ptr %tensor)
br label %is.back
is.back:
br label %next
done:
ret i64 %n
}
"""
