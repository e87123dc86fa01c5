"""CPU kernels: bit for bit what NumPy computes operation by operation, and nothing else touched."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
from bits import assert_bits, awkward, dtype_of, specials
from children import child
from hypothesis import given, settings
from hypothesis import strategies as st
from support import numbered

from portopt import Rule, trace
from portopt.arrays import STORAGE_DTYPES, compute_dtype
from portopt.kernels import compiler, cpu, llvm, pool
from portopt.program import ARRAY_OPS, OPS, Instruction, Program
from portopt.rules import SGD, Adam, Slots

pytest.importorskip("llvmlite")
COMPUTED = ("float32", "float64")  # what a kernel computes in
MIXED = [s for s in itertools.product(STORAGE_DTYPES, repeat=4) if llvm.refusal(s) is None]


class Tensor:
    """The operands of one parameter, each in the middle of a buffer of its own, at odd starts."""

    def __init__(self, rng, names, storage, size):
        self.around = rng.integers(1, 9, len(names))
        self.buffers = [
            awkward(rng, size + 2 * edge, dtype)
            for edge, dtype in zip(self.around, storage, strict=True)
        ]
        self.before = [buffer.copy() for buffer in self.buffers]
        self.names, self.size = names, size

    def operands(self, buffers):
        cut = [buffer[n : n + self.size] for n, buffer in zip(self.around, buffers, strict=True)]
        return dict(zip(self.names, cut, strict=True))

    def addresses(self):
        return [array.ctypes.data for array in self.operands(self.buffers).values()]

    def check(self, step):
        """Compare with ``step``, a function of operands to new ones, in the dtype computed in."""
        old = self.operands(self.before)
        dtype = compute_dtype(old["param"].dtype.name)
        with np.errstate(all="ignore"):
            new = step({name: array.astype(dtype) for name, array in old.items()})
            for name, array in new.items():
                old[name][...] = array.astype(old[name].dtype)
        for buffer, expected, name in zip(self.buffers, self.before, self.names, strict=True):
            assert_bits(buffer, expected, name)


def launch(program, storage, tensors, scalars, which, threads=1, spans=None):
    addresses, sizes = [t.addresses() for t in tensors], [t.size for t in tensors]
    cut = cpu.spans if spans is None else lambda sizes, longest: spans
    with mock.patch.object(cpu, "spans", cut):
        step = cpu.Step(program, storage, addresses, sizes)
    step.run(scalars, which, threads)


def by_numpy(rule, t):
    """`Rule.step` on NumPy arrays."""

    def step(arrays):
        slots = Slots(numbered(rule) | arrays)
        param, slots = rule.step(np, t, arrays["param"], arrays["grad"], slots)
        return {"param": param, **{name: slots[name] for name in rule.slots}}

    return step


@pytest.fixture
def small_spans(monkeypatch):
    """Even few elements are cut into spans and shared out among threads."""
    monkeypatch.setattr(cpu, "SPAN", 40)
    monkeypatch.setattr(cpu, "SHARE", 40)
    monkeypatch.setattr(cpu, "ALONE", 0)


def check_rule(rule, storage, seed):
    """A launch of tensors of one rule, with two learning rates and three numbers of steps."""
    rng, program = np.random.default_rng(seed), trace(rule)
    storage = storage[: len(program.operands)]
    if llvm.refusal(storage) is not None:  # the one half type was for the slot that is not there
        storage = ("float64",) * len(storage)
    kinds = [(replace(rule, lr=lr), t) for lr, t in ((0.1, 1), (0.01, 2), (0.1, 9))]
    which = [0, 2, 1, 0, 1]
    sizes = (1, 15, 16, 113, 40)
    tensors = [Tensor(rng, program.operands, storage, size) for size in sizes]
    scalars = [program.scalars(numbered(rule), t) for rule, t in kinds]
    launch(program, storage, tensors, scalars, which, threads=3)
    for tensor, kind in zip(tensors, which, strict=True):
        tensor.check(by_numpy(*kinds[kind]))


@pytest.mark.usefixtures("small_spans")
def test_every_rule(rule):
    """In float32, and with some mixture of dtypes."""
    if not trace(rule).elementwise:
        pytest.skip("no kernel takes it")
    place = sum(map(ord, repr(rule)))
    longest = len(trace(rule).operands)
    mixture = MIXED[place % len(MIXED)]
    for storage in (("float32",) * longest, (*mixture, *mixture)):
        check_rule(rule, storage, place)


@pytest.mark.usefixtures("small_spans")
@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_every_form_in_every_dtype(forms, name):
    for seed, rule in enumerate(rule for rule in forms if trace(rule).elementwise):
        check_rule(rule, (name,) * 8, seed)


@pytest.mark.usefixtures("small_spans")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_cut_into_spans_by_any_threads(rules, data):
    """Spans of any length in any order, taken by any number of threads: each element once."""
    draw = data.draw
    rule = draw(st.sampled_from([rule for rule in rules if trace(rule).elementwise]), "rule")
    program = trace(rule)
    n = len(program.operands)
    storage = draw(
        st.tuples(*[st.sampled_from(STORAGE_DTYPES)] * n).filter(lambda s: llvm.refusal(s) is None),
        "storage",
    )
    sizes = draw(st.lists(st.integers(0, 200), min_size=1, max_size=5), "sizes")
    cuts = []
    for place, size in enumerate(sizes):
        inner = draw(st.lists(st.integers(0, size), max_size=6), "cuts")
        ends = [0, *sorted(inner), size]
        cuts += [(place, start, stop - start) for start, stop in itertools.pairwise(ends)]
    spans = np.array(draw(st.permutations(cuts), "order"), np.int64)
    t = draw(st.integers(1, 10**6), "t")
    rng = np.random.default_rng(draw(st.integers(0, 2**32), "seed"))
    tensors = [Tensor(rng, program.operands, storage, size) for size in sizes]
    scalars = [program.scalars(numbered(rule), t)]
    launch(program, storage, tensors, scalars, [0] * len(sizes), draw(st.integers(1, 4)), spans)
    for tensor in tensors:
        tensor.check(lambda arrays: program.run(np, scalars[0], arrays))


@pytest.mark.parametrize("sizes", [[], [0], [1], [39, 0, 40, 41], [400, 1, 79, 80, 81], [0, 0, 7]])
@pytest.mark.usefixtures("small_spans")
def test_spans_are_every_element_once(sizes):
    rows = cpu.spans(sizes, cpu.SPAN).tolist()
    seen = [(tensor, i) for tensor, start, length in rows for i in range(start, start + length)]
    assert seen == [(tensor, i) for tensor, size in enumerate(sizes) for i in range(size)]
    assert all(0 < length <= 40 for _, _, length in rows)


# Operations


def program_of(*lines, slots=("b", "c")):
    """A program whose last line is the new parameter; slots stay as they are."""
    kept = [Instruction(f"{slot}_new", "mul", (slot, 1.0)) for slot in slots]
    lines = [Instruction(*line) for line in lines]
    outputs = [("param", lines[-1].name), *((slot, f"{slot}_new") for slot in slots)]
    program = Program("Rule", ("lr",), slots, (), (*lines, *kept), tuple(outputs))
    program.verify()
    return program


def run(program, arrays):
    """The new parameter, by a kernel; ``arrays`` are its operands but the parameter."""
    arrays = {name: np.array(array) for name, array in arrays.items()}
    param = np.zeros_like(arrays["grad"])
    operands = [param, *(arrays[name] for name in program.operands[1:])]
    storage = tuple(array.dtype.name for array in operands)
    step = cpu.Step(program, storage, [[x.ctypes.data for x in operands]], [param.size])
    step.run([program.scalars({"lr": 0.5}, 1)], [0], 1)
    return param


def operands(name):
    """Every pair of special values, and values of random bits, with a third beside them."""
    one, other = (x.ravel() for x in np.meshgrid(specials(name), specials(name)))
    rng = np.random.default_rng(0)
    more = rng.integers(0, 256, (2, 4000 * one.itemsize), np.uint8).view(one.dtype)
    more[:, :2000] = rng.standard_normal((2, 2000))
    a, b = (np.concatenate(pair) for pair in zip((one, other), more, strict=True))
    return {"grad": a, "b": b, "c": awkward(rng, a.size, name)}


def test_the_table_has_every_operation():
    assert set(llvm.MEANING) == set(ARRAY_OPS)


LINES = {
    "less": [("mask", "less", ("grad", "b")), ("new", "where", ("mask", "b", "c"))],
    "where": [("mask", "less", ("b", "c")), ("new", "where", ("mask", "grad", "c"))],
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("op", [op for op in ARRAY_OPS if op not in ("exp", "log")])
def test_each_operation(op, name):
    args = ("grad", "b")[: OPS[op].arity]
    program, arrays = program_of(*LINES.get(op, [("new", op, args)])), operands(name)
    actual = run(program, arrays)
    with np.errstate(all="ignore"):
        expected = program.run(np, {}, {"param": actual, **arrays})["param"]
    if op in ("maximum", "minimum"):  # of zeros NumPy's depends on the processor: ours the second
        zeros = (arrays["grad"] == 0) & (arrays["b"] == 0)
        expected = np.where(zeros, arrays["b"], expected)
    assert_bits(actual, expected, op)


@pytest.mark.parametrize("op", ["exp", "log"])
def test_exp_and_log_are_those_of_the_c_library(op):
    """In float64 Python's own, bit for bit; in float32 at most one unit from the nearest.

    NumPy has its own, which differ from these by an ulp here and there.
    """
    program, function = program_of(("new", op, ("grad",))), getattr(math, op)

    def exact(x):
        try:
            return function(x)
        except OverflowError:
            return math.inf
        except ValueError:  # of a negative number or zero
            return -math.inf if x == 0 else math.nan

    arrays = operands("float64")
    assert_bits(run(program, arrays), [exact(x) for x in arrays["grad"].tolist()], op)
    arrays = operands("float32")
    actual = run(program, arrays)
    with np.errstate(all="ignore"):
        nearest = np.array([exact(x) for x in arrays["grad"].tolist()]).astype(np.float32)
        below, above = (np.nextafter(nearest, np.float32(end)) for end in (-np.inf, np.inf))
        numpys = getattr(np, op)(arrays["grad"])
    inside = (actual >= below) & (actual <= above) | np.isnan(actual) & np.isnan(nearest)
    assert inside.all(), arrays["grad"][~inside]
    finite = np.isfinite(nearest)
    assert_bits(np.where(finite, 0, actual), np.where(finite, 0, numpys), op)


CONSTANTS = [0.1, 3, -0.0, math.inf, -math.inf, math.nan, 1e-40, 5e-324, 1e300, 2**24 + 1, 3.4e38]


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("constant", CONSTANTS)
def test_constants(constant, name):
    arrays = operands(name)
    lines = [
        ("sum", "add", ("grad", constant)),
        ("mask", "less", (constant, "grad")),
        ("product", "mul", (constant, "grad")),
        ("chosen", "where", ("mask", constant, "product")),
        ("quotient", "div", (constant, "sum")),
        ("new", "add", ("chosen", "quotient")),
    ]
    program = program_of(*lines)
    with np.errstate(all="ignore"):
        expected = program.run(np, {}, {"param": arrays["grad"], **arrays})["param"]
    assert_bits(run(program, arrays), expected)


def rule_with(slots, **hyperparameters):
    """A rule with slots of these names, and hyperparameters."""

    def update(self, xp, t, param, grad, slot):
        at = start = base = grad
        for name in slots:
            at = at * 0.5 + getattr(slot, name)
            start = start + at * grad
            base = base * sum(getattr(self, name) for name in hyperparameters)
        return param - at - start - base, {name: slot[name] + grad for name in slots}

    fields = {"__annotations__": dict.fromkeys(hyperparameters, float), **hyperparameters}
    body = {**fields, "slots": tuple(slots), "update": update, "lr": 0.5}
    body["__annotations__"]["lr"] = float
    return dataclass(frozen=True, kw_only=True)(type("Names", (Rule,), body))()


@pytest.mark.parametrize(
    "slots",
    [
        ("span", "start", "length", "table", "tensor", "row", "counter", "scalars"),
        ("w", "l", "at", "base", "wide", "last", "take", "rest", "begin", "end", "done"),
        ("größe", "скорость", "動量", "動力", "_", "x1", "s1", "nan", "half"),
    ],
    ids=lambda slots: slots[0],
)
def test_any_names(slots):
    rule = rule_with(slots, **{"λ": 0.25, "kernel": 2.0, "whole": 3.0})
    check_rule(rule, ("float32",) * 20, 0)


# Rounding


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_half_goes_through_unchanged(name):
    patterns = np.arange(2**16, dtype=np.uint16).view(dtype_of(name))
    program = program_of(("new", "mul", ("grad", 1.0)), slots=())
    assert_bits(run(program, {"grad": patterns}), patterns)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rounding_to_a_half(name):
    """All between neighbours that matters: the middle, a hair to both sides, overflow, NaN."""
    halves = np.arange(2**16, dtype=np.uint16).view(dtype_of(name)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        ends = halves[:-1], halves[1:]
        middle = ends[0].astype(np.float64) / 2 + ends[1].astype(np.float64) / 2
        middle = middle.astype(np.float32)
        hairs = [np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2**16, np.uint32).view(np.float32)
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    edges = np.float32([65519.996, 65520, 65536, 3.39e38, 3.4e38, 2.0**-25, 2.0**-24, 2.0**-134])
    grad = np.concatenate([middle, *hairs, bits, nans, edges, -edges])
    param = np.zeros(grad.size, dtype_of(name))
    program = program_of(("new", "mul", ("grad", 1.0)), slots=())
    addresses = [[param.ctypes.data, grad.ctypes.data]]
    cpu.Step(program, (name, "float32"), addresses, [grad.size]).run([{}], [0], 1)
    with np.errstate(all="ignore"):
        assert_bits(param, grad.astype(param.dtype))


@pytest.mark.parametrize("value", [65520.0, 0.1, 1e-46, -1e-46, 3.5e38, -3.5e38, 1 + 2.0**-24])
def test_rounding_from_float64_and_of_scalars(value):
    """Slots of float64 lose bits once where they are read, scalars where they are handed over."""
    program = program_of(("new", "mul", ("b", "lr")), slots=("b",))
    grad, b = np.zeros(3, np.float32), np.array([value, 1.0, 1 + 2.0**-24 + 2.0**-50])
    addresses = [[grad.ctypes.data, grad.ctypes.data, b.ctypes.data]]
    step = cpu.Step(program, ("float32", "float32", "float64"), addresses, [3])
    step.run([{"lr": value}], [0], 1)
    with np.errstate(all="ignore"):
        expected = np.array([value, 1.0, 1 + 2.0**-24 + 2.0**-50]).astype(np.float32)
        assert_bits(grad, expected * np.float32(value))
        assert_bits(b, expected.astype(np.float64))


def test_what_is_refused():
    assert cpu.refusal(("float32", "bfloat16", "float16", "float64")) is None
    assert "float64 parameter" in cpu.refusal(("float64", "float64", "float16"))
    assert "float64 parameter" in cpu.refusal(("float64", "bfloat16"))


@pytest.mark.parametrize("processor", ["x86_64-linux x86-64 +sse2,-f16c", "x86_64 x -f16c,+avx"])
def test_a_processor_without_float16(monkeypatch, processor):
    monkeypatch.setattr(compiler, "_host", lambda: (None, None, processor))
    try:
        cpu.refusal.cache_clear()
        assert "does not convert float16" in cpu.refusal(("float32", "float16"))
        assert cpu.refusal(("float32", "bfloat16")) is None
    finally:
        cpu.refusal.cache_clear()


# Memory


def test_guard_pages():
    """Pages without access right before and behind every operand, whatever length and start."""
    names = [name for name in STORAGE_DTYPES if name != "bfloat16" or find_spec("ml_dtypes")]
    assert child("guard", *names) == "untouched\n" * len(names)


def test_dense():
    dense = [((), ()), ((3, 4), (4, 1)), ((3, 4), (1, 3)), ((0, 3), (7, 7)), ((1, 3), (99, 1))]
    gaps = [((3, 4), (8, 1)), ((3,), (2,)), ((3,), (-1,)), ((3, 4), (0, 1)), ((2, 2), (1, 1))]
    assert [cpu.is_dense(*case) for case in dense] == [True] * len(dense)
    assert [cpu.is_dense(*case) for case in gaps] == [False] * len(gaps)


def test_a_new_lr_step_or_shape_compiles_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(compiler, "compiled", lambda *text: asked.append(text) or [0])
    monkeypatch.setattr(pool.Job, "do", lambda job, helpers: None)
    for rule, sizes in ((Adam(), [3]), (Adam(lr=0.5, beta1=0.5, eps=1.0), [1000, 0, 5])):
        program = trace(rule)
        step = cpu.Step(program, ("float32",) * 4, [[0] * 4] * len(sizes), sizes)
        for t in (1, 2, 100):
            step.run([program.scalars(numbered(rule), t)], [0] * len(sizes), 2)
    assert len(asked) == 2 and len(set(asked)) == 1


def test_the_same_scalars_of_others():
    params, grad = [np.zeros(1), np.zeros(1)], np.ones(1)
    addresses = [[param.ctypes.data, grad.ctypes.data] for param in params]
    program = trace(SGD(lr=1.0))
    step, scalars = cpu.Step(program, ("float64",) * 2, addresses, [1, 1]), []
    for lr in (1.0, 10.0):
        scalars.append(program.scalars(numbered(SGD(lr=lr)), 1))
    for which in ([0, 1], [1, 0], [1, 1]):
        step.run(scalars, which, 1)
    assert [float(param[0]) for param in params] == [-21.0, -21.0]


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("name", STORAGE_DTYPES)
@pytest.mark.usefixtures("small_spans")
def test_square_sum(name, threads):
    """The sum of squares to the last bits of float64; the same for every number of threads."""
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(size).astype(dtype_of(name)) for size in (1, 31, 32, 33, 0, 1000)]
    addresses, sizes = [g.ctypes.data for g in grads], [g.size for g in grads]
    actual = cpu.SquareSum(name, addresses, sizes).run(threads)
    assert_bits(actual, cpu.SquareSum(name, addresses, sizes).run(1))
    actual = math.fsum(actual)
    exact = math.fsum(float(x) * float(x) for grad in grads for x in grad)
    assert abs(actual - exact) <= 1e-15 * exact


@pytest.mark.parametrize("name", STORAGE_DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 31, 32, 69, 99])
def test_square_sum_of_what_is_not_finite(name, value, place):
    grad = np.ones(100, dtype_of(name))
    grad[place] = value
    (actual,) = cpu.SquareSum(name, [grad.ctypes.data], [grad.size]).run(1)
    assert_bits(actual, np.float64(value * value))


def test_square_sum_of_the_largest():
    """Those of float32 do not overflow; those of float64 do, be it in the sum of finite sums."""
    grad = np.full(1000, np.finfo(np.float32).max)
    (actual,) = cpu.SquareSum("float32", [grad.ctypes.data], [1000]).run(1)
    assert abs(actual - 1000 * float(grad[0]) ** 2) <= 1e-15 * actual
    for large in (1e300, 1e154):
        grad = np.array([large, large])
        addresses = [grad.ctypes.data, grad.ctypes.data + 8]
        assert cpu.norm(cpu.SquareSum("float64", addresses, [1, 1]).run(1)) == math.inf
