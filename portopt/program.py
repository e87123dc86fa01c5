"""Programs: a rule as straight-line code, with its meaning and its printed form.

A program has two parts. The *scalar part* depends on hyperparameters, the step count and the rule's
numbers alone; it is evaluated once a step, on the host in float64. The *array part* is what every
element goes through. Both are lists of instructions over one table of operations, `OPS`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

from portopt.arrays import Namespace


class Op(NamedTuple):
    """What an operation means, and how it is written.

    Attributes:
        meaning: A function of the namespace and the operands.
        arity: The number of operands.
        symbol: The infix or prefix operator; the operation's own name if it is a function.
        binding: How tightly the operator binds; 9 for a function.
    """

    meaning: Callable[..., Any]
    arity: int
    symbol: str
    binding: int


OPS: dict[str, Op] = {
    "less": Op(lambda xp, a, b: a < b, 2, "<", 1),
    "add": Op(lambda xp, a, b: a + b, 2, "+", 2),
    "sub": Op(lambda xp, a, b: a - b, 2, "-", 2),
    "mul": Op(lambda xp, a, b: a * b, 2, "*", 3),
    "div": Op(lambda xp, a, b: a / b, 2, "/", 3),
    "neg": Op(lambda xp, a: -a, 1, "-", 4),
    "matmul": Op(lambda xp, a, b: a @ b, 2, "@", 3),
    "pow": Op(lambda xp, a, b: a**b, 2, "**", 5),
    "abs": Op(lambda xp, a: abs(a), 1, "abs", 9),
    "exp": Op(lambda xp, a: xp.exp(a), 1, "exp", 9),
    "log": Op(lambda xp, a: xp.log(a), 1, "log", 9),
    "sign": Op(lambda xp, a: xp.sign(a), 1, "sign", 9),
    "sqrt": Op(lambda xp, a: xp.sqrt(a), 1, "sqrt", 9),
    "sum": Op(lambda xp, a: xp.sum(a), 1, "sum", 9),
    "sum_axis": Op(lambda xp, a, axis: xp.sum(a, axis=axis, keepdims=True), 2, "sum_axis", 9),
    "matrix_transpose": Op(lambda xp, a: xp.matrix_transpose(a), 1, "matrix_transpose", 9),
    "maximum": Op(lambda xp, a, b: xp.maximum(a, b), 2, "maximum", 9),
    "minimum": Op(lambda xp, a, b: xp.minimum(a, b), 2, "minimum", 9),
    "where": Op(lambda xp, mask, a, b: xp.where(mask, a, b), 3, "where", 9),
}
SCALAR_OPS = ("add", "sub", "mul", "div", "neg", "pow", "abs", "less")
"""The operations that the scalar part may use: operators of Python floats and of 0-d arrays."""
WHOLE_OPS = ("sum", "sum_axis", "matmul", "matrix_transpose")
"""The operations that look at more than one element; an axis of ``sum_axis`` stays, of length 1."""
ARRAY_OPS = tuple(op for op in OPS if op not in ("pow", *WHOLE_OPS))
"""The operations on each element by itself: those that a printer of kernels has to know."""

Operand: TypeAlias = "str | float"
Kind: TypeAlias = str  # "scalar", "array" or "mask" (an array of truth values)


class Instruction(NamedTuple):
    """``name = op(*args)``; an argument is the name of a value or a number.

    Names are those of the rule's own local variables, else made up: ``s1`` for a scalar, ``x1``
    for an array.
    """

    name: str
    op: str
    args: tuple[Operand, ...]


MADE_UP = re.compile(r"[sx]\d+")


class ProgramError(ValueError):
    """A program is not well formed: says the rule, the instruction and what is wrong."""


@dataclass(frozen=True)
class Program:
    """A rule, traced.

    Attributes:
        rule: The rule's name.
        hyperparameters: Names of its scalars, and of what stands around it; the step count ``t``
            is one more.
        slots: Names of its slots; with ``param`` and ``grad``, the array inputs.
        numbers: Names of the scalars that it keeps beside them.
        scalar_part: Instructions on scalars.
        array_part: Instructions on arrays, which may use the scalars.
        outputs: For ``param``, each slot, and ``grad`` if it is written, the name of its new value.
        number_outputs: The same for each of ``numbers``.
        like_param: Whether all slots have the parameter's shape.
    """

    rule: str
    hyperparameters: tuple[str, ...]
    slots: tuple[str, ...]
    scalar_part: tuple[Instruction, ...]
    array_part: tuple[Instruction, ...]
    outputs: tuple[tuple[str, str], ...]
    numbers: tuple[str, ...] = ()
    number_outputs: tuple[tuple[str, str], ...] = ()
    like_param: bool = True

    @property
    def operands(self) -> tuple[str, ...]:
        """The arrays that the program reads, and writes as far as they are outputs."""
        return ("param", "grad", *self.slots)

    @cached_property
    def elementwise(self) -> bool:
        """Whether each element is updated by itself, as kernels do."""
        return self.like_param and not any(line.op in WHOLE_OPS for line in self.array_part)

    @cached_property
    def scalar_names(self) -> tuple[str, ...]:
        """The scalars that the array part uses, in the order of their first use."""
        arrays = {*self.operands, *(line.name for line in self.array_part)}
        used = [arg for line in self.array_part for arg in line.args if isinstance(arg, str)]
        return tuple(dict.fromkeys(arg for arg in used if arg not in arrays))

    @cached_property
    def counts(self) -> bool:
        """Whether another step means other scalars: by its number, or by the rule's numbers."""
        lines = (*self.scalar_part, *self.array_part)
        used = {arg for line in lines for arg in line.args if isinstance(arg, str)}
        return bool(self.number_outputs or used & {"t", *self.numbers})

    @cached_property
    def writes_grad(self) -> bool:
        """Whether gradients are outputs, as where they become zeros."""
        return "grad" in dict(self.outputs)

    def scalars(
        self, values: Mapping[str, Any], t: Any, number: Callable[[Any], Any] = float
    ) -> dict[str, Any]:
        """The scalar part's results: `scalar_names` with their values, and the new `numbers`.

        A new number has the name that it has in `number_outputs`: `kept` gives it back its own.

        Args:
            values: The hyperparameters and the numbers by name: floats, or 0-d arrays of one
                dtype.
            t: The number of this step, from 1: an int, or a 0-d array of that dtype.
            number: Makes a scalar, 0 or 1, of a comparison; for 0-d arrays, a cast to that dtype.

        Raises:
            KeyError: a hyperparameter or number is not in ``values``.
            ArithmeticError: a scalar is no real number, or an integer beyond every float: names the
                rule and the instruction.
        """
        given = [t, *map(values.__getitem__, (*self.hyperparameters, *self.numbers))]
        if number is float:
            try:
                found, powers = self._formulas(*given)
                if complex not in map(type, powers):
                    return dict(zip(self._results, map(float, found), strict=True))
            except (ArithmeticError, TypeError):
                pass  # below it is said where
        env = dict(zip(("t", *self.hyperparameters, *self.numbers), given, strict=True))
        for name, op, args in self.scalar_part:
            try:
                value = OPS[op].meaning(None, *_read(env, args))
                if isinstance(value, complex):
                    raise ArithmeticError(f"it is {value}")
                if isinstance(value, bool):  # of which PyTorch's compilers take no float
                    value = 1.0 if value else 0.0
                kept = op == "less" or (number is float and name in self._results)
                env[name] = number(value) if kept else value
            except ArithmeticError as error:
                line = f"{name} = {op}{tuple(_read(env, args))}"
                raise ArithmeticError(f"{self.rule}, step {t}: {line}: {error}") from error
        return {name: env[name] for name in self._results}

    @cached_property
    def _results(self) -> tuple[str, ...]:
        """The names of what `scalars` returns."""
        return (*self.scalar_names, *dict(self.number_outputs).values())

    @cached_property
    def _formulas(self) -> Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]:
        """The scalar part on Python's numbers as one function, which is three times as fast.

        It returns the results, and all powers, which alone may be no real numbers.
        """
        given = ("t", *self.hyperparameters, *self.numbers)
        names = {name: f"v{place}" for place, name in enumerate(given)}
        space: dict[str, Any] = {}

        def text(arg: Operand) -> str:
            if isinstance(arg, str):
                return names[arg]
            space[f"c{len(space)}"] = arg
            return next(reversed(space))

        def row(wanted: Iterable[str]) -> str:
            return f"({''.join(f'{names[name]}, ' for name in wanted)})"

        header, lines = f"def formulas{row(given)}:", []
        for name, op, args in self.scalar_part:
            left, *right = map(text, args)
            formula = (
                f"{left} {OPS[op].symbol} {right[0]}" if right else f"{OPS[op].symbol}({left})"
            )
            names[name] = f"v{len(names)}"
            lines.append(
                f"{names[name]} = float({formula})"
                if op == "less"
                else f"{names[name]} = {formula}"
            )
        powers = (name for name, op, _ in self.scalar_part if op == "pow")
        lines.append(f"return {row(self._results)}, {row(powers)}")
        exec("\n    ".join([header, *lines]), space)
        formulas: Callable[..., Any] = space["formulas"]
        return formulas

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle keeps: functions that were made cannot be there."""
        return {name: value for name, value in vars(self).items() if name != "_formulas"}

    def kept(self, scalars: Mapping[str, Any]) -> dict[str, Any]:
        """The new value of each of `numbers`, from what `scalars` returned."""
        return {name: scalars[value] for name, value in self.number_outputs}

    def run(
        self, xp: Namespace, scalars: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The array part, operation by operation; changes nothing.

        Args:
            xp: The arrays' namespace.
            scalars: What `scalars` returned: floats, or 0-d arrays of the arrays' dtype.
            arrays: ``param``, ``grad`` and each slot by name, of one dtype, and of one shape if
                `like_param`.

        Returns:
            The new arrays, none of them one of ``arrays``, by the names in `outputs`.
        """
        env = {**scalars, **arrays}
        for (name, op, args), dead in zip(self.array_part, self._dead, strict=True):
            env[name] = OPS[op].meaning(xp, *_read(env, args))
            for temporary in dead:  # let its memory be used again
                del env[temporary]
        return {slot: env[name] for slot, name in self.outputs}

    @cached_property
    def _dead(self) -> tuple[tuple[str, ...], ...]:
        """For each line of the array part, the temporaries that no later line reads."""
        alive = {name for _, name in self.outputs}
        made = {line.name for line in self.array_part}
        dead: list[tuple[str, ...]] = []
        for line in reversed(self.array_part):
            last = {arg for arg in line.args if isinstance(arg, str)} & made - alive
            dead.append(tuple(sorted(last)))
            alive |= last
        return tuple(reversed(dead))

    def verify(self) -> None:
        """Check that every value is defined once, before its use, and used as what it is.

        Raises:
            ProgramError: it is not so; says where.
        """
        names = (*self.hyperparameters, *self.numbers, *self.slots)
        scalars = ("t", *self.hyperparameters, *self.numbers)
        kinds: dict[str, Kind] = dict.fromkeys(scalars, "scalar")
        kinds |= dict.fromkeys(self.operands, "array")
        if len(kinds) != len(names) + 3:
            raise ProgramError(f"{self.rule}: t, param, grad and {names} must be different names")
        for part, is_scalar in ((self.scalar_part, True), (self.array_part, False)):
            for line in part:
                kinds[line.name] = self._kind(line, kinds, is_scalar)
        written = ["param", *self.slots]
        if [name for name, _ in self.outputs] not in (written, [*written, "grad"]):
            raise ProgramError(
                f"{self.rule}: outputs must be param and {self.slots}, and may be grad, got "
                f"{self.outputs}"
            )
        for slot, name in self.outputs:
            if kinds.get(name) != "array":
                raise ProgramError(f"{self.rule}: the new {slot}, {name}, must be an array")
        kept = [kinds.get(value) for _, value in self.number_outputs]
        if kept != ["scalar"] * len(self.numbers) or dict(self.number_outputs).keys() != {
            *self.numbers
        }:
            raise ProgramError(
                f"{self.rule}: number_outputs must be a scalar for each of {self.numbers}, got "
                f"{self.number_outputs}"
            )

    def _kind(self, line: Instruction, kinds: dict[str, Kind], is_scalar: bool) -> Kind:
        def fail(why: str) -> ProgramError:
            return ProgramError(f"{self.rule}: {line.name} = {line.op}{line.args}: {why}")

        if line.op not in OPS or len(line.args) != OPS[line.op].arity:
            raise fail("no such operation with that many operands")
        if line.name in kinds:
            raise fail(f"{line.name} is defined twice")
        undefined = [a for a in line.args if isinstance(a, str) and a not in kinds]
        if undefined:
            raise fail(f"{undefined[0]} is not defined before its use")
        args = [kinds[a] if isinstance(a, str) else "scalar" for a in line.args]
        if is_scalar:
            if line.op not in SCALAR_OPS or set(args) != {"scalar"}:
                raise fail("the scalar part has only scalars and their operators")
            return "scalar"
        if "array" not in args:
            raise fail("an operation of the array part needs an array")
        if [a == "mask" for a in args] != [line.op == "where" and i == 0 for i in range(len(args))]:
            raise fail("where, and only where, takes a mask, as its first operand")
        if line.op == "pow" or (line.op == "div" and args[1] == "scalar"):
            raise fail("arrays are not raised to a power nor divided by a scalar")
        return "mask" if line.op == "less" else "array"

    def __str__(self) -> str:
        """The program as a reader would write it: the documentation of the rule."""
        printer = _Printer(self)
        lines = [f"{self.rule}:", "    once a step, in float64:"]
        lines += [f"        {line}" for line in printer.part(self.scalar_part)]
        lines += ["    for every element:" if self.elementwise else "    of whole arrays:"]
        lines += [f"        {line}" for line in printer.part(self.array_part)]
        new = (*self.outputs, *self.number_outputs)
        outputs = (f"{slot} = {printer.text(name)[0]}" for slot, name in new)
        return "\n".join([*lines, f"    new {', '.join(outputs)}"])


_LONGEST = 20
"""Of so many operations an expression may be; what is longer keeps its line."""


class _Printer:
    """Writes instructions as expressions: a made-up name used once gives way to what it stands for.

    A scalar that the array part uses keeps its line, so that the page shows what is hoisted.
    """

    def __init__(self, program: Program) -> None:
        lines = (*program.scalar_part, *program.array_part)
        self.lines = {line.name: line for line in lines}
        new = (*program.outputs, *program.number_outputs)
        args = [a for line in lines for a in line.args] + [name for _, name in new]
        hoisted = {line.name for line in program.scalar_part} & set(program.scalar_names)
        uses, self.inline, size = Counter(args), set[str](), dict[Operand, int]()
        for line in lines:
            size[line.name] = 1 + sum(size[arg] for arg in line.args if arg in self.inline)
            is_plain = MADE_UP.fullmatch(line.name) and line.name not in hoisted
            if is_plain and uses[line.name] == 1 and size[line.name] <= _LONGEST:
                self.inline.add(line.name)

    def part(self, lines: tuple[Instruction, ...]) -> list[str]:
        shown = [line for line in lines if line.name not in self.inline]
        return [f"{line.name} = {self.expression(line)[0]}" for line in shown] or ["nothing"]

    def text(self, arg: Operand) -> tuple[str, int]:
        """An operand as text, and how tightly its outermost operator binds."""
        if not isinstance(arg, str):
            return repr(arg), 9 if math.copysign(1, arg) > 0 else OPS["neg"].binding
        return self.expression(self.lines[arg]) if arg in self.inline else (arg, 9)

    def expression(self, line: Instruction) -> tuple[str, int]:
        op, args = OPS[line.op], [self.text(arg) for arg in line.args]
        if op.binding == 9:
            return f"{op.symbol}({', '.join(text for text, _ in args)})", 9
        # Operators group from the left, but for comparisons, which Python would chain; the power
        # groups from the right, where a minus needs no brackets.
        left, right = op.binding + (line.op == "less"), op.binding + 1
        if line.op == "pow":
            left, right = right, OPS["neg"].binding
        parts = [
            text if binding >= least else f"({text})"
            for (text, binding), least in zip(args, (left, right), strict=False)
        ]
        if op.arity == 1:
            return op.symbol + parts[0], op.binding
        space = "" if line.op == "pow" else " "
        return f"{parts[0]}{space}{op.symbol}{space}{parts[1]}", op.binding


def _read(env: Mapping[str, Any], args: tuple[Operand, ...]) -> list[Any]:
    return [env[arg] if isinstance(arg, str) else arg for arg in args]
