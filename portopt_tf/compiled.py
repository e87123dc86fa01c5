"""A rule's program as compiled calls that update many TensorFlow variables."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import ops

from portopt.arrays import compute_dtype
from portopt.program import Instruction, Program

SMALL = 1 << 16
"""Tensors of at most so many elements are joined: copying them costs less than a call for each."""

_ONE = "1"  # no identifier, so no name of the program's own


class _Kind(NamedTuple):
    """What is compiled: a program for operands of some dtypes; ``fused``, as one loop by XLA."""

    program: Program
    dtypes: tuple[tf.DType, ...]
    fused: bool

    def read(self, operands: Iterable[Any]) -> list[Any]:
        """The values of operands: gradients as they are, variables by their handles."""
        return [
            tf.raw_ops.ReadVariableOp(resource=x, dtype=dtype) if x.dtype == tf.resource else x
            for x, dtype in zip(operands, self.dtypes, strict=True)
        ]

    def assign(self, operands: Sequence[Any], results: Iterable[Any]) -> None:
        for (name, _), result in zip(self.program.outputs, results, strict=True):
            handle = operands[self.program.operands.index(name)]
            tf.raw_ops.AssignVariableOp(resource=handle, value=result)


def are_mirrored(variables: Iterable[Any]) -> bool:
    """Whether one has a copy on each of several devices, which `update` cannot work on."""
    values = (v.value if isinstance(v, keras.Variable) else v for v in variables)
    return any(isinstance(value, tf.distribute.DistributedValues) for value in values)


def update(
    program: Program, scalars: Mapping[str, Any], t: Any, stored: Iterable[Mapping[str, Any]]
) -> None:
    """Run a program for many parameters, none of them mirrored, and assign the results.

    Two compiled calls do it, one for large tensors and one for small ones, stacked by shape.
    Neither is traced anew for other scalars, nor for other tensors of the same shapes. Where XLA
    compiles all around, it is shown each tensor by itself.

    Args:
        program: The program.
        scalars: What ``program.scalars`` returned: floats, or 0-d tensors of float64.
        t: The number of this step, from 1.
        stored: For each parameter its variables and its gradient, by `Program.operands`.
    """
    vector = _vector(program, scalars, t)
    small: dict[_Kind, dict[tuple[int, ...], list[Any]]] = defaultdict(lambda: defaultdict(list))
    large: dict[_Kind, list[Any]] = defaultdict(list)
    inside_xla = _is_inside_xla()
    for arrays in stored:
        operands = [getattr(arrays[name], "handle", arrays[name]) for name in program.operands]
        dtypes = tuple(tf.as_dtype(arrays[name].dtype) for name in program.operands)
        kind = _Kind(program, dtypes, "CPU" in operands[0].device)
        shape = arrays["param"].shape
        size = shape.num_elements()
        if inside_xla:
            kind.assign(operands, _step(kind)(vector, *kind.read(operands)))
        elif size is None or size > SMALL:  # or may be more
            large[kind] += operands
        else:
            small[kind][tuple(shape)].append(operands)
    for kind, operands in large.items():
        _on_variables(kind, len(operands) // len(kind.dtypes))(vector, *operands)
    for kind, by_shape in small.items():
        stacks = [
            [tf.stack(values) for values in zip(*map(kind.read, group), strict=True)]
            for group in by_shape.values()
        ]
        shapes = tuple((len(group), *shape) for shape, group in by_shape.items())
        results = _stacked(kind, shapes)(vector, *zip(*stacks, strict=True))
        for group, new in zip(by_shape.values(), zip(*results, strict=True), strict=True):
            for operands, *values in zip(group, *map(tf.unstack, new), strict=True):
                kind.assign(operands, values)


def outputs(
    program: Program, scalars: Mapping[str, Any], t: Any, arrays: Mapping[str, Any], *, fused: bool
) -> dict[str, Any]:
    """A program's outputs for arrays of any one shape, by the same compiled step as `update`'s.

    Args:
        program: The program.
        scalars: What ``program.scalars`` returned: floats, or 0-d tensors of float64.
        t: The number of this step, from 1.
        arrays: Tensors by `Program.operands`.
        fused: Whether XLA makes one loop of it, as it does on CPUs.
    """
    operands = [arrays[name] for name in program.operands]
    kind = _Kind(program, tuple(x.dtype for x in operands), fused)
    results = _step(kind)(_vector(program, scalars, t), *operands)
    return {name: result for (name, _), result in zip(program.outputs, results, strict=True)}


def _vector(program: Program, scalars: Mapping[str, Any], t: Any) -> Any:
    one = tf.minimum(tf.cast(t, tf.float64), 1.0)  # whose value no compiler knows
    values = [scalars[name] for name in program.scalar_names]
    return tf.convert_to_tensor([*values, one], tf.float64)


@cache
def _step(kind: _Kind) -> Any:
    """A function of the scalars and the operands, of any one shape, that returns the outputs."""
    program, dtypes, fused = kind
    names = (*program.scalar_names, _ONE)
    dtype = compute_dtype(dtypes[0].name)
    lines = _as_written(program, ("mul", "sqrt") if fused else ("sqrt",))
    xp = _Functions() if fused else ops

    def run(vector: Any, *operands: Any) -> list[Any]:
        scalars = dict(zip(names, tf.unstack(tf.cast(vector, dtype), len(names)), strict=True))
        arrays = dict(zip(program.operands, (tf.cast(x, dtype) for x in operands), strict=True))
        new = lines.run(xp, scalars, arrays)
        places = (program.operands.index(name) for name in new)
        return [tf.cast(x, dtypes[place]) for x, place in zip(new.values(), places, strict=True)]

    return _traced(kind, run, *(tf.TensorSpec(None, dtype) for dtype in dtypes), fused=fused)


@cache
def _stacked(kind: _Kind, shapes: tuple[tuple[int, ...], ...]) -> Any:
    """The same function of stacks of tensors: for each operand a list of them, of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]

    def run(vector: Any, *operands: Any) -> list[Any]:
        flat = [[tf.reshape(stack, [-1]) for stack in stacks] for stacks in operands]
        results = _step(kind)(vector, *(tf.concat(stacks, 0) for stacks in flat))
        return [
            [tf.reshape(x, shape) for x, shape in zip(tf.split(r, sizes), shapes, strict=True)]
            for r in results
        ]

    lists = [[tf.TensorSpec(shape, dtype) for shape in shapes] for dtype in kind.dtypes]
    return _traced(kind, run, *map(tuple, lists))


@cache
def _on_variables(kind: _Kind, count: int) -> Any:
    """A function of the scalars and the operands of ``count`` parameters, one after the other.

    It takes variables by their handles, and assigns them; no parameter waits for another.
    """
    specs = [tf.TensorSpec([], tf.resource) for _ in kind.dtypes]
    place = kind.program.operands.index("grad")
    specs[place] = tf.TensorSpec(None, kind.dtypes[place])

    def run(vector: Any, *operands: Any) -> None:
        for start in range(0, len(operands), len(specs)):
            own = operands[start : start + len(specs)]
            values = kind.read(own)
            # As vectors: XLA compiles anew for each shape that it has not seen.
            results = _step(kind)(vector, *(tf.reshape(value, [-1]) for value in values))
            shape = tf.shape(values[0])
            kind.assign(own, [tf.reshape(result, shape) for result in results])

    return _traced(kind, run, *specs * count)


def _traced(kind: _Kind, run: Any, *operands: Any, fused: bool = False) -> Any:
    vector = tf.TensorSpec([len(kind.program.scalar_names) + 1], tf.float64)
    function = tf.function(run, jit_compile=fused or None, autograph=False)
    with tf.init_scope():  # for later calls too, whatever is being traced now
        return function.get_concrete_function(vector, *operands)


def _is_inside_xla() -> bool:
    """Whether XLA compiles what is being traced."""
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    graph = tf.compat.v1.get_default_graph()
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(graph)


def _as_written(program: Program, rewritten: tuple[str, ...]) -> Program:
    """The same program, where compilers cannot exchange operations for others that round otherwise.

    XLA's machine code rounds ``a * b + c`` once, NumPy twice; XLA and TensorFlow's graph optimizer
    make ``a * rsqrt(b)`` of ``a / sqrt(b)``. Here each result of such an operation is multiplied by
    a 1 that no compiler knows: contracting *that* product with a sum changes nothing.
    """
    lines: list[Instruction] = []
    for line in program.array_part:
        if line.op in rewritten:
            lines.append(line._replace(name=f"{line.name} as written"))
            line = Instruction(line.name, "mul", (lines[-1].name, _ONE))
        lines.append(line)
    return replace(program, array_part=tuple(lines))


class _Functions:
    """``keras.ops``, where NaN passes through: XLA's maximum and minimum may lose one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def maximum(self, a: Any, b: Any) -> Any:
        return ops.where(ops.logical_or(a > b, ops.isnan(a)), a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        return ops.where(ops.logical_or(a < b, ops.isnan(a)), a, b)
