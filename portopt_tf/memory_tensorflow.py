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
from collections.abc import Sequence
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
Found: TypeAlias = tuple[Sequence[Any], Table]
"""Tensors, which keep their memory while they live, and where it begins."""

DATA, KIND, HOLDERS, BYTES = range(4)
"""What `buffers` tells of a tensor: where its elements begin, the class of its buffer in C++, how
many hold that, and the size of the elements."""

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
    found = buffers(grads)
    fit = np.array_equal(found[:, BYTES], grads[0].dtype.size * np.asarray(sizes, np.uint64))
    return (grads, found[:, DATA]) if fit else None


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
        values, found = self._read()
        others = self._others(found)
        if others:
            with tf.init_scope():  # on no tape
                for place in others:
                    copy = tf.raw_ops.DeepCopy(x=values[place])
                    values[place] = None  # which may give up the memory before the next is copied
                    tf.raw_ops.AssignVariableOp(resource=self._handles[place], value=copy)
            del copy, values
            values, found = self._read()
        return None if self._others(found) else (values, found[:, DATA])

    def wrote(self, values: Sequence[Any]) -> None:
        """Nothing: TensorFlow does not count what is written."""

    def _read(self) -> Found:
        values = read(self._handles, self._dtypes)
        return values, buffers(values)

    def _others(self, found: Table) -> list[int]:
        return np.flatnonzero((found[:, KIND:] != self._wanted).any(axis=1)).tolist()


def read(handles: Sequence[Any], dtypes: Sequence[tf.DType]) -> list[Any]:
    """The values of variables, which are not copied."""
    values: list[Any] = []
    for begin in range(0, len(handles), _AT_ONCE):
        some = list(handles[begin : begin + _AT_ONCE])
        kinds = tuple(dtype.as_datatype_enum for dtype in dtypes[begin : begin + _AT_ONCE])
        attrs = ("N", len(some), "dtypes", kinds)
        values += execute.execute(
            b"_ReadVariablesOp", len(some), inputs=some, attrs=attrs, ctx=context.context()
        )
    return values


def buffers(tensors: Sequence[Any]) -> Table:
    """What there is to know of the buffers of tensors in this memory, none of them empty.

    Returns:
        A row for each tensor, of `DATA`, `KIND`, `HOLDERS` and `BYTES`.

    Raises:
        RuntimeError: it is not known how to find them.
    """
    place = _place()
    if place is None:
        raise RuntimeError(_NOT_FOUND)
    return place.look(tensors)


class _Place(NamedTuple):
    """How to come to tensors' buffers.

    Attributes:
        loop: Over tensors: ``(functions, objects, n, at, status, rows)`` returns how many of ``n``
            could be asked; ``rows`` takes those of `buffers`.
        at: Where a tensor has its buffer: in bytes from its begin in C++.
        status: Where the C functions put their errors.
    """

    loop: Loop
    at: int
    status: int

    def look(self, tensors: Sequence[Any]) -> Table:
        objects = np.fromiter(tensors, object, len(tensors))
        rows = np.empty((len(tensors), 4), np.uint64)
        ends = objects.ctypes.data, len(tensors), self.at, self.status, rows.ctypes.data
        if self.loop.call(self.loop.functions.ctypes.data, *ends) != len(tensors):
            raise RuntimeError("TensorFlow does not tell where one of its tensors lies")
        return rows

    def is_right(self) -> bool:
        """Whether holders are counted as they come and go."""
        variable = _variable(tf.float32)
        value = read([variable.handle], [tf.float32])

        def count() -> int:
            return int(self.look(value)[0, HOLDERS])

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
    (row,) = buffers(read([variable.handle], [dtype])).tolist()
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
    place = _Place(compiler.loop(_LOOP, functions, kinds), at, status)
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


_LOOP = """\
define i64 @kernel(
ptr %functions, ptr %objects, i64 %n, i64 %at, ptr %status, ptr %rows
) {
%resolve.at = getelementptr ptr, ptr %functions, i64 1
%data.at = getelementptr ptr, ptr %functions, i64 2
%size.at = getelementptr ptr, ptr %functions, i64 3
%delete.at = getelementptr ptr, ptr %functions, i64 4
%handle = load ptr, ptr %functions
%resolve = load ptr, ptr %resolve.at
%data = load ptr, ptr %data.at
%size = load ptr, ptr %size.at
%delete = load ptr, ptr %delete.at
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
call void %delete(ptr %tensor)
%row.0 = getelementptr [4 x i64], ptr %rows, i64 %i
%row.1 = getelementptr i64, ptr %row.0, i64 1
%row.2 = getelementptr i64, ptr %row.0, i64 2
%row.3 = getelementptr i64, ptr %row.0, i64 3
store i64 %address, ptr %row.0
store i64 %kind, ptr %row.1
store i64 %holders, ptr %row.2
store i64 %bytes, ptr %row.3
%i.next = add i64 %i, 1
br label %next
done:
ret i64 %i
}
"""
