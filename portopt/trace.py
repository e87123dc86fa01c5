"""Tracing: a rule, run once on symbols, becomes a program.

The update is handed symbols in place of arrays and scalars; each operation on a symbol records an
instruction. What depends on scalars alone goes to the program's scalar part. What the array
protocol does not have, or what would not mean the same everywhere, is refused with a `TraceError`.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import fields
from keyword import iskeyword
from types import FrameType
from typing import Any, NoReturn, TypeAlias

import numpy as np

from portopt.arrays import FUNCTIONS
from portopt.program import OPS, SCALAR_OPS, WHOLE_OPS, Instruction, Kind, Program
from portopt.rules.around import Around
from portopt.rules.base import Rule, Slots, is_zero


class TraceError(TypeError):
    """A rule does something that a program cannot say: names the rule and the operation."""


Shape: TypeAlias = "tuple[int, ...]"

_programs: dict[tuple[object, ...], Program] = {}
_ALONE = Around()


def trace(rule: Rule, around: Around = _ALONE, shape: tuple[int, ...] = (2, 2)) -> Program:
    """The program of a rule; traced once for all rules of one class and one `Rule.structure`.

    Args:
        rule: Any rule. The values of its float fields do not matter, only which of them are zero.
        around: What stands around it; nothing by default.
        shape: That of the parameter, for a rule that looks at it (`Rule.by_shape`) and is traced
            for each shape; some matrix by default.

    Raises:
        TraceError: the rule branches on a value, changes its arguments, or uses something outside
            the array protocol.
        ValueError: the rule updates no parameter of this shape.
        ProgramError: the traced program is not well formed.

    Example:
        >>> from portopt.rules import Momentum
        >>> print(trace(Momentum(nesterov=True)))
        Momentum:
            once a step, in float64:
                nothing
            for every element:
                b = momentum * momentum_buffer + grad
                direction = grad + momentum * b
                param_new = param - lr * direction
            new param = param_new, momentum_buffer = b
    """
    seen = tuple(shape) if rule.by_shape else None
    key = type(rule), rule.structure, around.structure, seen
    try:
        hash(key)
    except TypeError as error:
        name = type(rule).__name__
        raise TraceError(f"{name} has a field that is not hashable: {error}") from error
    if key not in _programs:
        _programs[key] = _Tracer(rule, around, seen).program()
    return _programs[key]


def specialized(program: Program, rule: Rule, around: Around, shape: tuple[int, ...]) -> Program:
    """The program for parameters of a shape: another than the rule's if the rule looks at it."""
    return trace(rule, around, shape) if rule.by_shape else program


class _Tracer:
    """Runs a rule on symbols and keeps what they record."""

    def __init__(self, rule: Rule, around: Around, shape: Shape | None) -> None:
        self.rule, self.around, self.shape = rule, around, shape
        self.recorded: dict[tuple[object, ...], Symbol] = {}
        self.frames: dict[int, FrameType] = {}

    def fail(self, what: str) -> TraceError:
        return TraceError(f"{type(self.rule).__name__}.update {what}")

    def program(self) -> Program:
        rule, cls = self.rule, type(self.rule)
        t: Any = Symbol(self, "scalar", name="t")
        functions: Any = _Functions(self)
        scalars = {
            name: Symbol(self, "scalar", name=name, is_zero=is_zero(getattr(rule, name)))
            for name in cls.hyperparameters()
        }
        surroundings = {
            name: Symbol(self, "scalar", name=name, is_zero=False) for name in self.around.scalars
        }
        if scalars.keys() & surroundings:
            names = ", ".join(sorted(scalars.keys() & surroundings))
            raise self.fail(f"has a hyperparameter of a name that Around has too: {names}")
        # Fields alone: what else hangs on the rule (a cached property) was made of numbers, which
        # would stand in the program of every rule of this structure.
        self.twin = cls.unchecked(**{f.name: getattr(rule, f.name) for f in fields(cls)} | scalars)
        norm: Any = surroundings.get("grad_norm")
        ours = {name: surroundings.get(name, value) for name, value in vars(self.around).items()}
        self.outer = Around.unchecked(**ours)
        shapes = self.slots((*scalars, *surroundings))
        slots, numbers = tuple(shapes), self.twin.numbers
        shapes = {"param": self.shape, "grad": self.shape, **shapes}
        param, grad, *state = (
            Symbol(self, "array", name=name, shape=shape) for name, shape in shapes.items()
        )
        state += [Symbol(self, "scalar", name=name) for name in numbers]
        slot = Slots(dict(zip((*slots, *numbers), state, strict=True)))
        self.inputs = ("t", "param", "grad", *slots, *numbers, *scalars, *surroundings)
        try:
            result = self.outer.step(self.twin, functions, t, param, grad, slot, norm)
        except TraceError:
            raise
        except Exception as error:
            raise self.fail(f"cannot be traced: {error}") from error
        outputs, counts = self.outputs(result, slots, numbers)
        for name, value in outputs.items():
            if value.known_shape != shapes[name]:
                wanted = "its parameter's shape" if self.shape is None else f"shape {shapes[name]}"
                raise self.fail(f"must return {name} of {wanted}, returned {value.known_shape}")
        lines = self.name_lines(outputs | counts)
        program = Program(
            rule=cls.__name__,
            hyperparameters=(*scalars, *surroundings),
            slots=slots,
            numbers=numbers,
            scalar_part=tuple(line.instruction() for line in lines if line.kind == "scalar"),
            array_part=tuple(line.instruction() for line in lines if line.kind != "scalar"),
            outputs=tuple((slot, value.name) for slot, value in outputs.items()),
            number_outputs=tuple((name, value.name) for name, value in counts.items()),
            like_param=all(shape == self.shape for shape in shapes.values()),
        )
        program.verify()
        return program

    def slots(self, hyperparameters: tuple[str, ...]) -> dict[str, Shape | None]:
        """The slots, with their shapes if the rule looks at them."""
        shape, cls = self.shape, type(self.rule)
        if shape is None and cls.slot_shapes is not Rule.slot_shapes:
            raise TraceError(f"{cls.__name__} has slot_shapes without `by_shape = True`")
        own = self.twin.slot_shapes(shape) if shape is not None else {}
        kept = self.twin.slots if shape is None else own
        for what, some in (("slots", kept), ("numbers", self.twin.numbers)):
            if isinstance(some, str) or not all(isinstance(name, str) for name in some):
                raise TraceError(f"{cls.__name__}.{what} must be a tuple of names, got {some!r}")
        slots = (*kept, *self.outer.slots)
        reserved = ("t", "param", "grad", "step", *hyperparameters)
        names = (*slots, *self.twin.numbers)
        for place, slot in enumerate(names):
            allowed = slot.isidentifier() and not iskeyword(slot)
            if not allowed or slot in (*reserved, *names[:place]):
                raise self.fail(
                    f"has a slot named {slot!r}: each needs a name of its own, an identifier other "
                    f"than {', '.join(reserved)}"
                )
        return {slot: own.get(slot, shape) for slot in slots}

    def outputs(
        self, result: Any, slots: tuple[str, ...], numbers: tuple[str, ...]
    ) -> tuple[dict[str, Symbol], dict[str, Symbol]]:
        """What the arrays become, and what the numbers."""
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise self.fail(f"must return (new_param, new_slots), returned {result!r}")
        written = (*slots, "grad") if self.outer.zero_grad else slots
        if set(result[1]) != {*written, *numbers}:
            kept = [*slots, *numbers]
            raise self.fail(f"must return the slots {kept}, returned {list(result[1])}")
        outputs = {"param": result[0], **{name: result[1][name] for name in written}}
        counts = {name: result[1][name] for name in numbers}
        made = "a scalar made of t, hyperparameters or numbers"
        for kind, what, values in (("array", "an array", outputs), ("scalar", made, counts)):
            for name, value in values.items():
                if not isinstance(value, Symbol) or value.kind != kind:
                    raise self.fail(f"must return {what} for {name}, returned {value!r}")
                if not value.op:  # an input as it is: it would be overwritten before it is read
                    values[name] = value * 1
        return outputs, counts

    def record(self, op: str, *operands: Any) -> Symbol:
        args = tuple(self.operand(op, value) for value in operands)
        if any(isinstance(arg, Symbol) and arg.kind != "scalar" for arg in args):
            args = tuple(self.beside_arrays(op, arg) for arg in args)
        kinds = [arg.kind if isinstance(arg, Symbol) else "scalar" for arg in args]
        self.check(op, args, kinds)
        kind = "scalar" if set(kinds) == {"scalar"} else "mask" if op == "less" else "array"
        key = (op, *(id(arg) if isinstance(arg, Symbol) else repr(arg) for arg in args))
        if key not in self.recorded:
            self.recorded[key] = Symbol(self, kind, op, args, shape=self.shape_of(op, args))
            self.note_frames()
        return self.recorded[key]

    def operand(self, op: str, value: Any) -> Any:
        if isinstance(value, Symbol) and value.tracer is self:
            return value
        if type(value) in (int, float):  # a NumPy scalar would make a float32 array float64
            if value == 0 and math.copysign(1, value) < 0:
                return self.record("neg", 0.0)  # -0.0 is equal to 0.0, and so would programs be
            return value
        raise self.fail(
            f"uses {type(value).__name__} {value!r} in {op}: only its arguments, its "
            "hyperparameters and Python's ints and floats can be used"
        )

    def beside_arrays(self, op: str, value: Any) -> Any:
        """A number as all namespaces take it: JAX reads an int as one of 32 bits."""
        if type(value) is int and abs(value) >= 2**31:
            try:
                return float(value)
            except OverflowError as error:
                raise self.fail(f"uses in {op} an int beyond every float: {error}") from error
        return value

    def check(self, op: str, args: tuple[Any, ...], kinds: list[Kind]) -> None:
        def shown() -> str:
            return ", ".join(map(repr, args))

        masks = [op == "where" and place == 0 for place in range(len(kinds))]
        if [kind == "mask" for kind in kinds] != masks:
            raise self.fail(
                f"computes {op}({shown()}): a comparison of arrays goes into the first argument of "
                "xp.where, and nothing else does"
            )
        if "array" not in kinds:
            if op == "where":
                raise self.fail(
                    f"computes where({shown()}): one of the two choices must be an array"
                )
            if op not in SCALAR_OPS:
                raise self.fail(
                    f"calls xp.{op} on the scalar {shown()}: use **, * and + for scalars"
                )
        elif op in WHOLE_OPS and op != "sum" and self.shape is None:
            raise self.fail(f"computes {op}({shown()}): only a rule with `by_shape = True` can")
        elif op == "div" and kinds[1] == "scalar":
            raise self.fail(
                f"divides the array {args[0]!r} by the scalar {args[1]!r}: multiply by the "
                "reciprocal, x * (1 / s), which rounds the same everywhere"
            )
        elif op == "pow":
            raise self.fail(f"computes {args[0]!r} ** {args[1]!r}: use x * x or xp.sqrt(x)")

    def shape_of(self, op: str, args: tuple[Any, ...]) -> Shape | None:
        """The shape of an operation's result, by the rules of the array API standard.

        None if it is the parameter's, which is not known.
        """
        arrays = [arg for arg in args if isinstance(arg, Symbol) and arg.kind != "scalar"]
        if self.shape is None:
            whole = op == "sum" or all(array.known_shape == () for array in arrays)
            return () if whole else None
        shapes = [array.shape for array in arrays]
        first = shapes[0] if shapes else ()
        try:
            if op == "sum":
                return ()
            if op == "sum_axis":
                axis = range(len(first))[args[1]]
                return (*first[:axis], 1, *first[axis + 1 :])
            if op == "matrix_transpose":
                return (*first[:-2], first[-1], first[-2])
            if op == "matmul":
                (*some, rows, inner), (*others, same, columns) = shapes
                if inner != same:
                    raise ValueError(f"{inner} columns and {same} rows")
                return (*np.broadcast_shapes(tuple(some), tuple(others)), rows, columns)
            return np.broadcast_shapes(*shapes)
        except (IndexError, ValueError) as error:
            shown = " and ".join(map(str, shapes))
            raise self.fail(f"computes {op} of arrays of shape {shown}: {error}") from error

    def note_frames(self) -> None:
        """Keep the frames of the rule's own functions: their local names become ours."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not _Tracer.program.__code__:
            owner = frame.f_locals.get("self")
            if owner is self.twin or owner is self.outer:
                self.frames[id(frame)] = frame
            frame = frame.f_back

    def name_lines(self, outputs: dict[str, Symbol]) -> list[Symbol]:
        """Name what the outputs need; the rest is left out."""
        needed: set[int] = set()
        stack = list(outputs.values())
        while stack:
            symbol = stack.pop()
            if id(symbol) not in needed:
                needed.add(id(symbol))
                stack += [arg for arg in symbol.args if isinstance(arg, Symbol)]
        lines = [symbol for symbol in self.recorded.values() if id(symbol) in needed]
        taken = {*self.inputs, *(op.symbol for op in OPS.values())}

        def give(symbol: Symbol, name: str) -> None:
            if symbol.op and not symbol.name:
                others = (f"{name}_new{count or ''}" for count in itertools.count())
                symbol.name = next(n for n in itertools.chain([name], others) if n not in taken)
                taken.add(symbol.name)

        for frame in reversed(self.frames.values()):  # the innermost is noted first
            for name, value in frame.f_locals.items():
                if isinstance(value, Symbol) and id(value) in needed:
                    plain = name.lstrip("_")
                    give(value, plain if plain.isidentifier() and not iskeyword(plain) else "x")
        self.frames.clear()
        for name, value in outputs.items():
            give(value, name)
        for letter in "sx":
            unnamed = (s for s in lines if not s.name and (s.kind == "scalar") == (letter == "s"))
            for count, symbol in enumerate(unnamed, 1):
                give(symbol, f"{letter}{count}")
        return lines


class _Functions:
    """The namespace that a traced update sees: the protocol's functions and nothing else."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer

    def sum(self, x: Any, *, axis: int | None = None, keepdims: bool = False) -> Symbol:
        if axis is None and not keepdims:
            return self._tracer.record("sum", x)
        if type(axis) is not int or not keepdims:
            raise self._tracer.fail(
                f"calls xp.sum with axis={axis} and keepdims={keepdims}: it sums all elements, or "
                "along one axis with keepdims=True"
            )
        return self._tracer.record("sum_axis", x, axis)

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise self._tracer.fail(
                f"uses xp.{name}, which is not in the array protocol: it has {', '.join(FUNCTIONS)}"
            )

        def function(*args: Any, **keywords: Any) -> Symbol:
            if keywords or len(args) != OPS[name].arity:
                raise self._tracer.fail(
                    f"calls xp.{name} with {len(args)} arguments and the keywords "
                    f"{list(keywords)}: it takes {OPS[name].arity}, by position"
                )
            return self._tracer.record(name, *args)

        return function


class Symbol:
    """A stand-in for a scalar or an array, which records what is done with it.

    Every operator is `_Tracer.record` of one operation; everything else is refused.
    """

    __slots__ = ("args", "is_zero", "kind", "known_shape", "name", "op", "tracer")
    __hash__ = object.__hash__

    def __init__(
        self,
        tracer: _Tracer,
        kind: Kind,
        op: str = "",
        args: tuple[Any, ...] = (),
        *,
        name: str = "",
        is_zero: bool | None = None,
        shape: Shape | None = None,
    ) -> None:
        self.tracer, self.kind, self.op, self.args = tracer, kind, op, args
        self.name, self.is_zero, self.known_shape = name, is_zero, shape

    @property
    def shape(self) -> Shape:
        """The shape of an array, for a rule that looks at it."""
        if self.tracer.shape is None or self.kind == "scalar":
            raise self.tracer.fail(
                f"asks for the shape of {self!r}: only of arrays, and with `by_shape = True`"
            )
        return self.known_shape or ()

    def instruction(self) -> Instruction:
        """What this symbol recorded, by the names given at the end."""
        args = tuple(arg.name if isinstance(arg, Symbol) else arg for arg in self.args)
        return Instruction(self.name, self.op, args)

    def text(self, depth: int) -> str:
        """The symbol as an expression, with what lies deeper left out: it may be very long."""
        if self.name or not depth:
            return self.name or "..."
        args = (x.text(depth - 1) if isinstance(x, Symbol) else repr(x) for x in self.args)
        return f"{self.op}({', '.join(args)})"

    def __repr__(self) -> str:
        return self.text(depth=4)

    def __add__(self, other: Any) -> Symbol:
        return self.tracer.record("add", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return self.tracer.record("add", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return self.tracer.record("sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return self.tracer.record("sub", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return self.tracer.record("mul", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return self.tracer.record("mul", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return self.tracer.record("div", self, other)

    def __rtruediv__(self, other: Any) -> Symbol:
        return self.tracer.record("div", other, self)

    def __matmul__(self, other: Any) -> Symbol:
        return self.tracer.record("matmul", self, other)

    def __pow__(self, other: Any) -> Symbol:
        return self.tracer.record("pow", self, other)

    def __rpow__(self, other: Any) -> Symbol:
        return self.tracer.record("pow", other, self)

    def __neg__(self) -> Symbol:
        return self.tracer.record("neg", self)

    def __abs__(self) -> Symbol:
        return self.tracer.record("abs", self)

    def __lt__(self, other: Any) -> Symbol:
        return self.tracer.record("less", self, other)

    def __gt__(self, other: Any) -> Symbol:
        return self.tracer.record("less", other, self)

    def __bool__(self) -> bool:
        if self.is_zero is not None:
            return not self.is_zero
        raise self.tracer.fail(
            f"branches on the value of {self!r}: for arrays use xp.where, for scalars multiply by "
            "a comparison (only a hyperparameter may be asked whether it is zero)"
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> NoReturn:
        raise self.tracer.fail(f"calls numpy.{ufunc.__name__}: use the namespace xp")

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        raise self.tracer.fail(f"calls numpy.{func.__name__}: use the namespace xp")

    def __getattr__(self, name: str) -> Any:
        raise self.tracer.fail(f"uses .{name} of {self!r}: it may use operators and xp's functions")


def _refuse(names: str, what: str) -> None:
    """Give `Symbol` special methods that say what an update may not do."""
    for name in names.split():

        def method(self: Symbol, *args: Any, name: str = name) -> NoReturn:
            raise self.tracer.fail(what.format(name=name, symbol=self))

        setattr(Symbol, f"__{name}__", method)


_refuse(
    "iadd isub imul itruediv ifloordiv imod ipow imatmul setitem",
    "changes {symbol!r} in place ({name}): make a new array, x = x + y",
)
_refuse(
    "floordiv rfloordiv mod rmod rmatmul and rand or ror xor rxor invert getitem",
    "uses {name} on {symbol!r}, which is not in the array protocol",
)
_refuse("eq ne le ge", "compares {symbol!r} by {name}: use < or >")
_refuse(
    "float int index complex round len iter contains array",
    "asks for the {name} of {symbol!r}, whose value is not known while tracing",
)
