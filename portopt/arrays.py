"""The array protocol: what a rule may ask of an array and of its namespace.

It is the part of the `Python array API standard <https://data-apis.org/array-api/2024.12/>`_ that
elementwise arithmetic needs, with sums and the product of matrices, so that NumPy, PyTorch, JAX,
CuPy and ``array_api_strict`` arrays keep it as they are, and ``keras.ops``, but for the transpose,
is a namespace for whatever Keras runs on.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, cast

FUNCTIONS = (
    *("abs", "exp", "log", "matrix_transpose", "maximum", "minimum", "sign", "sqrt", "sum"),
    "where",
)
"""The functions of a namespace that a rule may call, besides the operators of an array."""

SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""The bytes of an element of each of `STORAGE_DTYPES`."""

STORAGE_DTYPES = (*SIZES,)
"""The dtypes that parameters, gradients and slots may have."""

Operand: TypeAlias = "Array | float"


class Array(Protocol):
    """An array: anything with these operators, a dtype and a shape."""

    @property
    def dtype(self) -> Any: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def __add__(self, other: Operand, /) -> Array: ...
    def __radd__(self, other: Operand, /) -> Array: ...
    def __sub__(self, other: Operand, /) -> Array: ...
    def __rsub__(self, other: Operand, /) -> Array: ...
    def __mul__(self, other: Operand, /) -> Array: ...
    def __rmul__(self, other: Operand, /) -> Array: ...
    def __truediv__(self, other: Array, /) -> Array: ...
    def __rtruediv__(self, other: Operand, /) -> Array: ...
    def __matmul__(self, other: Array, /) -> Array: ...
    def __neg__(self) -> Array: ...
    def __abs__(self) -> Array: ...
    def __lt__(self, other: Operand, /) -> Array: ...
    def __gt__(self, other: Operand, /) -> Array: ...


class Namespace(Protocol):
    """The module of functions that belongs to an array, ``xp`` by custom."""

    def abs(self, x: Array, /) -> Array: ...
    def exp(self, x: Array, /) -> Array: ...
    def log(self, x: Array, /) -> Array: ...
    def matrix_transpose(self, x: Array, /) -> Array: ...
    def maximum(self, x1: Operand, x2: Operand, /) -> Array: ...
    def minimum(self, x1: Operand, x2: Operand, /) -> Array: ...
    def sign(self, x: Array, /) -> Array: ...
    def sqrt(self, x: Array, /) -> Array: ...
    def sum(self, x: Array, /, *, axis: int | None = None, keepdims: bool = False) -> Array: ...
    def where(self, condition: Array, x1: Operand, x2: Operand, /) -> Array: ...


def namespace(array: Any) -> Namespace:
    """The array API namespace that ``array`` belongs to.

    Args:
        array: An array of NumPy, PyTorch, JAX, CuPy, or any library with
            ``__array_namespace__``. For TensorFlow, use ``keras.ops``.

    Raises:
        TypeError: ``array`` is of none of these.
    """
    import array_api_compat

    return cast(Namespace, array_api_compat.array_namespace(array))


def compute_dtype(storage: str) -> str:
    """The dtype in which a step computes on arrays stored as ``storage``.

    The half types are computed in float32 and rounded once, when they are stored.

    Raises:
        TypeError: ``storage`` is none of `STORAGE_DTYPES`.
    """
    if storage not in STORAGE_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(STORAGE_DTYPES)}, got {storage}")
    return "float32" if storage in ("float16", "bfloat16") else storage
