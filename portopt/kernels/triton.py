"""The CUDA printer: a program as a Triton kernel, one launch for all tensors.

A program instance takes one span, block by block. Where every operand's address allows, a block is
read and written in vectors; what is left of a span, and spans at odd addresses, go under a mask.
Every operation is IEEE's, in the order of the program: division and square root are the correctly
rounded ones, and multiply-adds are not contracted.

Tensors come from the caller: anything that Triton takes for one, on the current device. A launch
runs on the current stream, waits for nothing and allocates nothing, so that a CUDA graph can
capture it, once the kernel has run outside: Triton compiles it then.
"""

from __future__ import annotations

import hashlib
import linecache
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from portopt.arrays import SIZES, compute_dtype
from portopt.program import Operand, Program

# {a} {b} {c} operands, {dtype} their dtype, {divide} {root} its correctly rounded functions.
MEANING: dict[str, str] = {
    "less": "{a} < {b}",
    "add": "{a} + {b}",
    "sub": "{a} - {b}",
    "mul": "{a} * {b}",
    "div": "{divide}({a}, {b})",
    "neg": "-1 * {a}",  # -a is 0 - a to Triton, which differs where a is zero
    "abs": "tl.abs({a})",
    # In float64, as Triton's exp and log of float32 are approximations.
    "exp": "tl.exp({a}.to(tl.float64)).to({dtype})",
    "log": "tl.log({a}.to(tl.float64)).to({dtype})",
    "sqrt": "{root}({a})",
    # As in NumPy: the sign of NaN is NaN, and that of a zero, of whatever sign, is 0.
    "sign": "tl.where({a} > 0, 1, tl.where({a} < 0, -1, tl.where({a} == 0, 0, {a})))",
    # NaN wins, and of two zeros the second, as in `llvm`.
    "maximum": "tl.where({a} > {b}, {a}, tl.where({a} == {a}, {b}, {a}))",
    "minimum": "tl.where({a} < {b}, {a}, tl.where({a} == {a}, {b}, {a}))",
    "where": "tl.where({a}, {b}, {c})",
}

SPAN = 8192
"""How many elements a span had best have, so that the instances share the work evenly."""

_WIDEST = 16  # bytes that a thread reads or writes at once
_WARPS = 4
_THREADS = 32 * _WARPS
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}
_ROUNDED = {  # the functions that round correctly
    "float32": {"divide": "tl.math.div_rn", "root": "tl.math.sqrt_rn", "dtype": "tl.float32"},
    "float64": {"divide": "tl.math.fdiv", "root": "tl.math.sqrt", "dtype": "tl.float64"},
}

_COMMON = """\
import triton
import triton.language as tl


@triton.jit
def at(address, dtype: tl.constexpr, vector: tl.constexpr):
    size: tl.constexpr = dtype.primitive_bitwidth // 8
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), vector * size)
"""

_UPDATE = """\


@triton.jit
def number(value: tl.constexpr):
    return tl.full((), value, {dtype})


@triton.jit
def update({arguments}, lanes, mask, vector: tl.constexpr):
    {body}


@triton.jit(do_not_specialize=["table", "spans", "found_inf"])
def kernel(table, spans, found_inf):
    span = spans + 3 * tl.program_id(0)
    row = table + {columns} * tl.load(span)
    start = tl.load(span + 1)
    length = tl.load(span + 2)
    length = tl.where(tl.load(row + {grad}) != 0, length, 0)
    if found_inf is not None:
        length = tl.where(tl.load(found_inf) == 0, length, 0)
    {head}
    lanes = tl.arange(0, {block})
    aligned = ({misaligned}) == 0
    whole = tl.where(aligned, length // {block} * {block}, 0)
    for i in range(0, whole, {block}):
        update({arguments}, i + lanes, None, {vector})
    lanes = tl.arange(0, {rest})
    for i in range(whole, length, {rest}):
        update({arguments}, i + lanes, i + lanes < length, 1)
"""

_SQUARE_SUMS = """\


@triton.jit(do_not_specialize=["addresses", "stride", "spans", "sums"])
def kernel(addresses, stride, spans, sums):
    span = spans + 3 * tl.program_id(0)
    begin = tl.load(addresses + stride * tl.load(span))
    grad = begin + {size} * tl.load(span + 1)
    length = tl.where(begin != 0, tl.load(span + 2), 0)
    lanes = tl.arange(0, {block})
    total = tl.zeros(({block},), tl.float64)
    aligned = grad % {widest} == 0
    whole = tl.where(aligned, length // {block} * {block}, 0)
    for i in range(0, whole, {block}):
        value = tl.load(at(grad, {dtype}, {vector}) + i + lanes).to(tl.float64)
        total += value * value
    for i in range(whole, length, {block}):
        mask = i + lanes < length
        value = tl.load(at(grad, {dtype}, 1) + i + lanes, mask, 0).to(tl.float64)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total))
"""

_WORDS = frozenset(re.findall(r"\w+", _COMMON + _UPDATE)) | {"float", "scalars"}  # of `source`


def source(program: Program, storage: Sequence[str]) -> str:
    """The text of a program's kernel: ``kernel(table, spans, found_inf)``.

    Args:
        program: What to compute.
        storage: The dtypes of `Program.operands`; with float64 for the parameter, no half types.
    """
    dtypes = dict(zip(program.operands, storage, strict=True))
    compute = _ROUNDED[compute_dtype(storage[0])]
    vector = _WIDEST // max(SIZES[dtype] for dtype in storage)
    name = _names(program.operands)

    def value(operand: Operand) -> str:
        if isinstance(operand, str):
            return name(operand)
        number = float(operand)
        return f"number({number!r})" if number - number == 0 else f'number(float("{number}"))'

    body, head, misaligned = [], [], []
    for operand, dtype in dtypes.items():
        address, size = f"{operand}_at", SIZES[dtype]
        column = program.operands.index(operand)
        head.append(f"{address} = tl.load(row + {column}) + {size} * start")
        misaligned.append(f"{address} % {vector * size}")
        body.append(f"{address} = at({address}, tl.{dtype}, vector) + lanes")
        body.append(f"{name(operand)} = tl.load({address}, mask).to({compute['dtype']})")
    scalars = [name(scalar) for scalar in program.scalar_names]
    head.append(f"scalars = at(tl.load(row + {len(dtypes)}), {compute['dtype']}, 1)")
    head += [f"{scalar} = tl.load(scalars + {i})" for i, scalar in enumerate(scalars)]
    for line in program.array_part:
        operands = dict(zip("abc", map(value, line.args), strict=False))
        body.append(f"{name(line.name)} = {MEANING[line.op].format(**operands, **compute)}")
    for operand, result in program.outputs:
        body.append(f"tl.store({operand}_at, {name(result)}, mask)")
    return _COMMON + _UPDATE.format(
        arguments=", ".join([*(f"{operand}_at" for operand in dtypes), *scalars]),
        body="\n    ".join(body),
        head="\n    ".join(head),
        misaligned=" + ".join(misaligned),
        columns=len(dtypes) + 1,
        grad=program.operands.index("grad"),
        dtype=compute["dtype"],
        vector=vector,
        block=_THREADS * vector,
        rest=_THREADS * vector // 2,
    )


def square_sums_source(dtype: str) -> str:
    """The text of a norm's kernel: ``kernel(addresses, stride, spans, sums)``.

    Args:
        dtype: That of the gradients.
    """
    size = SIZES[dtype]
    vector = _WIDEST // size
    return _COMMON + _SQUARE_SUMS.format(
        dtype=f"tl.{dtype}", size=size, widest=_WIDEST, vector=vector, block=2 * _THREADS * vector
    )


@cache
def compiled(text: str) -> Any:
    """The Triton function ``kernel`` that ``text`` defines; made once in a process.

    Triton keeps the machine code in memory, and in its own cache folder.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = f"<portopt kernel {digest[:16]}>"
    # Triton reads the text of a function by the name of its file.
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(text, file, "exec"), namespace)
    return namespace["kernel"]


@cache
def kernel(program: Program, storage: tuple[str, ...]) -> Any:
    """The kernel of a program, for operands stored so; made once in a process."""
    return compiled(source(program, storage))


def launch(
    program: Program, storage: tuple[str, ...], table: Any, spans: Any, found_inf: Any = None
) -> None:
    """Run a program on all spans, in one launch.

    Args:
        program: What to compute.
        storage: See `source`.
        table: int64, shape (tensors, operands + 1), contiguous: the addresses of each tensor's
            operands, in the order of `Program.operands`, and of its row of scalars: those of
            `Program.scalar_names`, in the dtype that is computed in. A tensor whose gradient has
            address 0 is passed over.
        spans: int64, shape (spans, 3), contiguous: tensor, first element, number of elements.
        found_inf: float32, one element: if it is not 0, nothing is written.
    """
    if len(spans):
        kernel(program, storage)[(len(spans),)](table, spans, found_inf, **_OPTIONS)


def launch_square_sums(dtype: str, addresses: Any, spans: Any, sums: Any) -> None:
    """Sum the squares of the gradients, each span for itself, in float64, in one launch.

    The order of the additions depends on the length of the span alone.

    Args:
        dtype: That of the gradients.
        addresses: int64, shape (tensors,), of any stride: a column of a `launch`'s table.
        spans: See `launch`.
        sums: float64, shape (spans,), contiguous: takes the sums.
    """
    if len(spans):
        function = compiled(square_sums_source(dtype))
        function[(len(spans),)](addresses, addresses.stride(0), spans, sums, **_OPTIONS)


def _names(operands: Sequence[str]) -> Callable[[str], str]:
    """How a program's values are named in the text: as there, unless that would hide its own."""
    taken = {*_WORDS, *(f"{operand}_at" for operand in operands)}
    return lambda name: f"{name}_" if name.rstrip("_") in taken else name
