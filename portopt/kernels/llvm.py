"""The CPU printer: a program as LLVM assembly, one loop over spans of raw memory.

A kernel is a job's (`pool`), whose shares are some spans each. In a span it goes by vectors of one
cache line, and by single elements at the end: the same text, printed twice. Every operation is
IEEE's, in the order of the program: LLVM contracts and reorders only what is marked so, and nothing
is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import numpy as np

from portopt.arrays import SIZES, compute_dtype
from portopt.kernels import pool
from portopt.program import Operand, Program

# {r} result, {a} {b} {c} operands, {v} their type, {m} the type of masks, {s} suffix of intrinsics.
MEANING: dict[str, str] = {
    "less": "{r} = fcmp olt {v} {a}, {b}",
    "add": "{r} = fadd {v} {a}, {b}",
    "sub": "{r} = fsub {v} {a}, {b}",
    "mul": "{r} = fmul {v} {a}, {b}",
    "div": "{r} = fdiv {v} {a}, {b}",
    "neg": "{r} = fneg {v} {a}",
    "abs": "{r} = call {v} @llvm.fabs.{s}({v} {a})",
    "exp": "{r} = call {v} @llvm.exp.{s}({v} {a})",
    "log": "{r} = call {v} @llvm.log.{s}({v} {a})",
    "sqrt": "{r} = call {v} @llvm.sqrt.{s}({v} {a})",
    # As in NumPy: the sign of NaN is NaN, and that of a zero, of whatever sign, is 0.
    "sign": """\
{r}.above = fcmp ogt {v} {a}, zeroinitializer
{r}.below = fcmp olt {v} {a}, zeroinitializer
{r}.nan = fcmp uno {v} {a}, {a}
{r}.0 = select {m} {r}.nan, {v} {a}, {v} zeroinitializer
{r}.1 = select {m} {r}.below, {v} {minus_one}, {v} {r}.0
{r} = select {m} {r}.above, {v} {one}, {v} {r}.1""",
    # As in NumPy: NaN wins, and of two zeros the second (whose sign NumPy leaves to the processor).
    "maximum": """\
{r}.first = fcmp ogt {v} {a}, {b}
{r}.nan = fcmp uno {v} {a}, {a}
{r}.0 = or {m} {r}.first, {r}.nan
{r} = select {m} {r}.0, {v} {a}, {v} {b}""",
    "minimum": """\
{r}.first = fcmp olt {v} {a}, {b}
{r}.nan = fcmp uno {v} {a}, {a}
{r}.0 = or {m} {r}.first, {r}.nan
{r} = select {m} {r}.0, {v} {a}, {v} {b}""",
    "where": "{r} = select {m} {a}, {v} {b}, {v} {c}",
}

# {ahead}: how many elements ahead memory is fetched; behind a span's end, at the next one's begin.
_SHARE = """\
open:
%first.at = getelementptr i64, ptr %parts, i64 %share
%stop.at = getelementptr i64, ptr %first.at, i64 1
%first = load i64, ptr %first.at
%stop = load i64, ptr %stop.at
%final = sub i64 %stop, 1
br label %begin
begin:
%span = phi i64 [%first, %open], [%next, %end]
%next = add i64 %span, 1
%soon = call i64 @llvm.umin.i64(i64 %next, i64 %final)
{spans}
{clear}
%grad.at = getelementptr ptr, ptr %span.row, i64 {grad}
%grad = load ptr, ptr %grad.at
%no.grad = icmp eq ptr %grad, null
br i1 %no.grad, label %end, label %enter
enter:
%soon.from = call i64 @llvm.umax.i64(i64 %span.length, i64 {ahead})
{begin}
%whole = and i64 %span.length, -{width}
%any.whole = icmp ne i64 %whole, 0
br i1 %any.whole, label %wide, label %rest
wide:
%wide.i = phi i64 [0, %enter], [%wide.next, %wide]
%ahead = add i64 %wide.i, {ahead}
%inside = icmp ult i64 %ahead, %span.length
%beyond = sub i64 %ahead, %soon.from
%fetched = select i1 %inside, i64 %ahead, i64 %beyond
{wide}
%wide.next = add i64 %wide.i, {width}
%wide.more = icmp ult i64 %wide.next, %whole
br i1 %wide.more, label %wide, label %rest
rest:
%any.rest = icmp ult i64 %whole, %span.length
br i1 %any.rest, label %last, label %end
last:
%last.i = phi i64 [%whole, %rest], [%last.next, %last]
{last}
%last.next = add i64 %last.i, 1
%last.more = icmp ult i64 %last.next, %span.length
br i1 %last.more, label %last, label %end
end:
{end}
%more = icmp ult i64 %next, %stop
br i1 %more, label %begin, label %given"""

_TYPES = {"float16": "half", "bfloat16": "i16", "float32": "float", "float64": "double"}
_LINE = 64  # bytes of a cache line
_AHEAD = 64  # elements from the one at work to the one being fetched


def refusal(storage: Sequence[str]) -> str | None:
    """Why arrays stored so, the parameter first, cannot go through a kernel; None if they can."""
    if compute_dtype(storage[0]) == "float64" and {"float16", "bfloat16"} & set(storage):
        return "a gradient or slot of a float64 parameter is stored in half precision"
    return None


@cache
def kernel(program: Program, storage: tuple[str, ...]) -> str:
    """The kernel of a program, in LLVM assembly.

    Its job is told the addresses of a table, of spans and of parts. A row of the table has the
    addresses of a tensor's operands and of its scalars, those of `Program.scalar_names` in float64;
    a tensor whose gradient has address 0 is passed over. A row of the spans has three int64: the
    tensor's row, the first element, their number. The parts, int64 too, are the spans where each
    share begins, and how many spans there are.

    Args:
        program: What to compute.
        storage: The dtypes of `Program.operands`, not such as `refusal` refuses.
    """
    dtypes = dict(zip(program.operands, storage, strict=True))
    compute = compute_dtype(storage[0])
    width = _LINE // SIZES[compute]
    written = dict(program.outputs)
    wide, last = _Vector("wide", width, compute), _Vector("last", 1, compute)

    def body(vector: _Vector) -> Iterator[str]:
        for name, dtype in dtypes.items():
            yield from vector.point(name, dtype, write=name in written)
        for name, dtype in dtypes.items():
            yield from vector.load(name, dtype)
        for name, op, args in program.array_part:
            yield vector.apply(name, op, args)
        for name, value in program.outputs:
            yield from vector.store(name, dtypes[name], value)

    return _text(
        begin=[
            *_bases(dtypes),
            *_scalars(program.scalar_names, len(dtypes), (wide, last)),
        ],
        wide=body(wide),
        last=body(last),
        columns=len(dtypes) + 1,
        grad=program.operands.index("grad"),
        width=width,
    )


def square_sum(dtype: str) -> str:
    """The kernel of a norm, told what `kernel` is: the sum of squares of each span.

    A row of ``table`` has the address of a gradient of ``dtype``, and of a float64 array that takes
    the sums, each at the number of its span. The order of the additions, all in float64, depends on
    the span alone.
    """
    width = 32  # independent sums, so that they need not wait for one another
    wide, last = _Vector("wide", width, "float64"), _Vector("last", 1, "float64")

    def body(vector: _Vector) -> Iterator[str]:
        yield from vector.point("grad", dtype, write=False)
        yield from vector.load("grad", dtype)
        yield vector.apply("square", "mul", ("grad", "grad"))
        yield f"{vector.value('sum')} = load {vector.type}, ptr {vector.value('sums')}"
        yield vector.apply("new", "add", ("sum", "square"))
        yield f"store {vector.type} {vector.value('new')}, ptr {vector.value('sums')}"

    def end() -> Iterator[str]:
        total = "0.0"
        for vector in (wide, last):
            parts, new = vector.value("parts"), vector.value("total")
            yield f"{parts} = load {vector.type}, ptr {vector.value('sums')}"
            # Without a mark that allows another order, LLVM adds the parts from the first on.
            fold = f"@llvm.vector.reduce.fadd.{vector.suffix}"
            yield f"{new} = call double {fold}(double {total}, {vector.type} {parts})"
            total = new
        yield "%sums.at = getelementptr ptr, ptr %span.row, i64 1"
        yield "%sums = load ptr, ptr %sums.at"
        yield "%out = getelementptr double, ptr %sums, i64 %span"
        yield f"store double {total}, ptr %out"

    return _text(
        locals=[f"{vector.value('sums')} = alloca {vector.type}" for vector in (wide, last)],
        clear=[f"store {v.type} zeroinitializer, ptr {v.value('sums')}" for v in (wide, last)],
        begin=_bases({"grad": dtype}),
        wide=body(wide),
        last=body(last),
        end=end(),
        columns=2,
        grad=0,
        width=width,
    )


def _text(
    *,
    begin: Iterable[str],
    wide: Iterable[str],
    last: Iterable[str],
    columns: int,
    grad: int,
    width: int,
    locals: Iterable[str] = (),
    clear: Iterable[str] = (),
    end: Iterable[str] = (),
) -> str:
    parts = {"clear": clear, "begin": begin, "wide": wide, "last": last, "end": end}
    lines = {name: "\n".join(part) for name, part in parts.items()}
    spans = "\n".join(_span(name, columns) for name in ("span", "soon"))
    body = _SHARE.format(spans=spans, grad=grad, width=width, ahead=_AHEAD, **lines)
    return pool.kernel(["ptr %table", "ptr %spans", "ptr %parts"], body, locals)


def _span(name: str, columns: int) -> str:
    """What is known of the span of that number."""
    return f"""\
%{name}.at = getelementptr [3 x i64], ptr %spans, i64 %{name}
%{name}.start.at = getelementptr i64, ptr %{name}.at, i64 1
%{name}.length.at = getelementptr i64, ptr %{name}.at, i64 2
%{name}.tensor = load i64, ptr %{name}.at
%{name}.start = load i64, ptr %{name}.start.at
%{name}.length = load i64, ptr %{name}.length.at
%{name}.row = getelementptr [{columns} x ptr], ptr %table, i64 %{name}.tensor"""


def _bases(dtypes: Mapping[str, str]) -> Iterator[str]:
    """Where the span begins, in each operand, and the next span."""
    for column, (name, dtype) in enumerate(dtypes.items()):
        for span in ("span", "soon"):
            begin = _begin(name, span)
            yield f"{begin}.at = getelementptr ptr, ptr %{span}.row, i64 {column}"
            yield f"{begin}.base = load ptr, ptr {begin}.at"
            yield f"{begin} = getelementptr {_TYPES[dtype]}, ptr {begin}.base, i64 %{span}.start"


def _scalars(names: Sequence[str], column: int, vectors: Sequence[_Vector]) -> Iterator[str]:
    """The tensor's scalars, each rounded, as a vector of equal elements."""
    yield f"%scalars.at = getelementptr ptr, ptr %span.row, i64 {column}"
    yield "%scalars = load ptr, ptr %scalars.at"
    for vector, (place, name) in itertools.product(vectors, enumerate(names)):
        element, value = _TYPES[vector.compute], vector.value(name)
        one = f"{value}.one" if element == "double" else f"{value}.double"
        yield f"{value}.at = getelementptr double, ptr %scalars, i64 {place}"
        yield f"{one} = load double, ptr {value}.at"
        if element != "double":
            yield f"{value}.one = fptrunc double {one} to {element}"
        yield f"{value}.0 = insertelement {vector.type} poison, {element} {value}.one, i64 0"
        places = f"<{vector.width} x i32> zeroinitializer"
        yield f"{value} = shufflevector {vector.type} {value}.0, {vector.type} poison, {places}"


class _Vector:
    """Writes what is done to ``width`` elements at once, in one of the two loops.

    Values have the program's names behind the first letter of the loop's; no name of a program has
    a dot, so that what is made up here meets none.
    """

    def __init__(self, loop: str, width: int, compute: str) -> None:
        self.loop, self.width, self.compute = loop, width, compute
        self.type = self.of(_TYPES[compute])
        self.mask = self.of("i1")
        self.suffix = f"v{width}f{8 * SIZES[compute]}"

    def of(self, element: str) -> str:
        return f"<{self.width} x {element}>"

    def value(self, operand: Operand) -> str:
        """An operand: a value of this loop by its name, or a number."""
        if isinstance(operand, str):
            return f"%{self.loop[0]}.{_plain(operand)}"
        with np.errstate(over="ignore"):  # what is beyond float32 is infinite there
            rounded = np.float64(np.dtype(self.compute).type(operand))
        return self.splat(f"{_TYPES[self.compute]} 0x{int(rounded.view(np.uint64)):016X}")

    def splat(self, element: str) -> str:
        return f"<{', '.join([element] * self.width)}>"

    def apply(self, name: str, op: str, args: Sequence[Operand]) -> str:
        """One instruction of a program."""
        operands = dict(zip("abc", map(self.value, args), strict=False))
        return MEANING[op].format(
            r=self.value(name),
            v=self.type,
            m=self.mask,
            s=self.suffix,
            one=self.value(1.0),
            minus_one=self.value(-1.0),
            **operands,
        )

    def point(self, name: str, dtype: str, *, write: bool) -> Iterator[str]:
        """Where operand ``name`` stands; what will be needed there soon is fetched."""
        at, ahead = self.value(f"{name}.at"), self.value(f"{name}.ahead")
        yield f"{at} = getelementptr {_TYPES[dtype]}, ptr {_begin(name)}, i64 %{self.loop}.i"
        if self.width > 1:
            here, soon = _begin(name), _begin(name, "soon")
            yield f"{ahead}.from = select i1 %inside, ptr {here}, ptr {soon}"
            yield f"{ahead} = getelementptr {_TYPES[dtype]}, ptr {ahead}.from, i64 %fetched"
            yield f"call void @llvm.prefetch.p0(ptr {ahead}, i32 {write:d}, i32 3, i32 1)"

    def load(self, name: str, dtype: str) -> Iterator[str]:
        """Operand ``name``, in the dtype that is computed in."""
        value, at, element = self.value(name), self.value(f"{name}.at"), self.of(_TYPES[dtype])
        stored = value if dtype == self.compute else f"{value}.stored"
        yield f"{stored} = load {element}, ptr {at}, align {SIZES[dtype]}"
        if dtype == "bfloat16":  # the upper half of a float32
            bits = self.of("i32")
            yield f"{value}.low = zext {element} {stored} to {bits}"
            yield f"{value}.bits = shl {bits} {value}.low, {self.splat('i32 16')}"
            stored, element, dtype = f"{value}.single", self.of("float"), "float32"
            stored = value if self.compute == dtype else stored
            yield f"{stored} = bitcast {bits} {value}.bits to {element}"
        if dtype != self.compute:
            cast = "fpext" if SIZES[dtype] < SIZES[self.compute] else "fptrunc"
            yield f"{value} = {cast} {element} {stored} to {self.type}"

    def store(self, name: str, dtype: str, new: str) -> Iterator[str]:
        """The value ``new``, rounded to the nearest of ``dtype``, to operand ``name``."""
        value, at, element = self.value(new), self.value(f"{name}.at"), self.of(_TYPES[dtype])
        stored = value if dtype == self.compute else self.value(f"{name}.new")
        if dtype == "bfloat16":
            bits = self.of("i32")

            def step(result: str, op: str, a: str, b: str) -> str:
                return f"{stored}.{result} = {op} {bits} {a}, {b}"

            def number(n: int) -> str:
                return self.splat(f"i32 {n}")

            # To the nearest, ties to even: half a unit less a bit, plus the bit that stays last.
            yield f"{stored}.bits = bitcast {self.type} {value} to {bits}"
            yield step("upper", "lshr", f"{stored}.bits", number(16))
            yield step("odd", "and", f"{stored}.upper", number(1))
            yield step("half", "add", f"{stored}.odd", number(0x7FFF))
            yield step("sum", "add", f"{stored}.bits", f"{stored}.half")
            yield step("rounded", "lshr", f"{stored}.sum", number(16))
            yield step("quiet", "or", f"{stored}.upper", number(0x40))
            yield f"{stored}.nan = fcmp uno {self.type} {value}, {value}"
            yield (
                f"{stored}.word = select {self.mask} {stored}.nan, {bits} {stored}.quiet, "
                f"{bits} {stored}.rounded"
            )
            yield f"{stored} = trunc {bits} {stored}.word to {element}"
        elif dtype != self.compute:
            cast = "fpext" if SIZES[dtype] > SIZES[self.compute] else "fptrunc"
            yield f"{stored} = {cast} {self.type} {value} to {element}"
        yield f"store {element} {stored}, ptr {at}, align {SIZES[dtype]}"


def _begin(name: str, span: str = "span") -> str:
    """Where the span begins in operand ``name``."""
    return f"%{span}.{_plain(name)}.begin"


def _plain(name: str) -> str:
    """A name of Python as one of LLVM, whose letters are ASCII."""
    return "".join(c if c.isascii() else f"${ord(c)}$" for c in name)
