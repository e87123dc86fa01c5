"""Tracing: what it records, what it keeps for the next rule, and what it refuses."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import operator
import threading
import weakref
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pytest
from support import assert_agree, gradients, weights

from portopt import Optimizer, Rule, TraceError, trace
from portopt.arrays import FUNCTIONS
from portopt.program import OPS, ProgramError
from portopt.rules import SGD, Adam, Momentum, RMSprop, Slots

CONSTANT = np.ones(3, np.float32)


def rule_of(update, slots=("b",), name="Custom", **namespace):
    """A rule with the slot ``b`` and the hyperparameters ``lr`` and ``mu``."""

    @dataclass(frozen=True, kw_only=True)
    class Custom(Rule):
        lr: float = 0.5
        mu: float = 0.25

    Custom.update = update
    Custom.slots = slots
    for key, value in namespace.items():
        setattr(Custom, key, value)
    Custom.__name__ = name
    Custom.__abstractmethods__ = frozenset()
    return Custom


def shapes(program):
    """A program's lines without their names."""
    return [(line.op, len(line.args)) for line in program.array_part]


# What is recorded


def test_the_same_expression_is_computed_once():
    def update(self, xp, t, param, grad, slot):
        first = grad * grad + slot.b * (1 - self.mu)
        second = grad * grad + slot.b * (1 - self.mu)
        return param - first * second, {"b": xp.sqrt(first) + xp.sqrt(second)}

    program = trace(rule_of(update)())
    assert [op for op, _ in shapes(program)] == ["mul", "mul", "add", "mul", "sub", "sqrt", "add"]
    assert [line.op for line in program.scalar_part] == ["sub"]


def test_zeros_of_two_signs_have_two_kernels():
    def update(self, xp, t, param, grad, slot):
        return xp.where(param < grad, -0.0 if self.negative else 0.0, param), {"b": grad}

    for negative in (False, True):
        param = np.zeros(3)
        Optimizer(rule_of(update, negative=negative)(), [param]).step([np.ones(3)])
        assert (np.signbit(param) == negative).all()


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (lambda xp, p, g: (xp.sum(g), g), r"return param of its parameter's shape, returned \(\)"),
        (lambda xp, p, g: (p, xp.sqrt(xp.sum(g)) * 2), r"return b of its parameter's shape"),
        (lambda xp, p, g: (xp.minimum(p, 10**400), g), "uses in minimum an int beyond every float"),
    ],
)
def test_what_libraries_would_not_agree_on_is_refused(new, words):
    def update(self, xp, t, param, grad, slot):
        param, b = new(xp, param, grad)
        return param, {"b": b}

    with pytest.raises(TraceError, match=words):
        trace(rule_of(update)())


def test_an_int_of_more_than_32_bits_is_a_float():
    def update(self, xp, t, param, grad, slot):
        return xp.minimum(param, 10**10) * 2, {"b": grad}

    lines = trace(rule_of(update)()).array_part
    assert [repr(line.args[1]) for line in lines[:2]] == ["10000000000.0", "2"]


def test_numbers_that_differ_are_kept_apart():
    def update(self, xp, t, param, grad, slot):
        return param + grad * 1 + grad * 1.0 + grad * -0.0 + grad * 0.0, {"b": grad}

    program = trace(rule_of(update)())
    constants = [line.args[1] for line in program.array_part if line.op == "mul"]
    assert [repr(number) for number in constants] == ["1", "1.0", "'s1'", "0.0"]
    assert program.scalar_part == (("s1", "neg", (0.0,)),)  # -0.0 and 0.0 are equal


def test_what_no_output_needs_is_left_out():
    def update(self, xp, t, param, grad, slot):
        xp.exp(grad) + (1 - self.mu) ** t
        return param - self.lr * grad, {"b": slot.b}

    program = trace(rule_of(update)())
    # The last one makes the handed-on slot anew: it may be overwritten before it is read.
    assert [op for op, _ in shapes(program)] == ["mul", "sub", "mul"]
    assert program.scalar_part == ()
    assert program.scalar_names == ("lr",)


def test_names_are_the_rules_own():
    def helper(x):
        inner = x * x
        return inner + 1.0

    def update(self, xp, t, param, grad, slot):
        _hidden, _1, _lambda = grad * 2, grad * 3, grad * 5
        lr = self.lr * t
        x1 = helper(grad)
        return param - lr * (_hidden + _1 + _lambda + x1), {"b": x1}

    program = trace(rule_of(update)())
    names = [line.name for line in (*program.scalar_part, *program.array_part)]
    assert names[:4] == ["lr_new", "hidden", "x", "x_new"]
    assert {"x1", "param_new"} <= set(names)
    assert all(name.isidentifier() for name in names)
    assert len(set(names)) == len(names)


def test_the_callers_locals_are_not_looked_at():
    """Before Python 3.13, looking at a frame's locals overwrites what its locals() gave."""

    def caller():
        value = "old"
        mine = locals()
        mine["value"] = "new"
        trace(rule_of(lambda self, xp, t, param, grad, slot: (param + grad, {"b": grad}))())
        return mine["value"], value

    assert caller() == ("new", "old")


OPERATIONS = {
    "less": lambda xp, x, y: xp.where(x < y, x, y),
    "greater": lambda xp, x, y: xp.where(x > 0.5, x, 1),
    "reflected": lambda xp, x, y: xp.where(operator.gt(0.5, x), 0.0, y),
    "add": lambda xp, x, y: 1 + (x + y) + 2.0,
    "sub": lambda xp, x, y: 1 - (x - y) - 2.0,
    "mul": lambda xp, x, y: 3 * (x * y) * 2.0,
    "div": lambda xp, x, y: 3 / (x / y),
    "neg": lambda xp, x, y: -x,
    "abs": lambda xp, x, y: abs(x) + xp.abs(y),
    "exp": lambda xp, x, y: xp.exp(-abs(x)),
    "log": lambda xp, x, y: xp.log(abs(x) + 1),
    "sign": lambda xp, x, y: xp.sign(x),
    "sqrt": lambda xp, x, y: xp.sqrt(abs(x)),
    "sum": lambda xp, x, y: x + xp.sum(y),
    "maximum": lambda xp, x, y: xp.maximum(xp.maximum(x, y), xp.maximum(0.5, x)),
    "minimum": lambda xp, x, y: xp.minimum(xp.minimum(x, y), xp.minimum(x, 1)),
    "where": lambda xp, x, y: xp.where(x < y, x, 0.0),
}


def test_the_protocol_is_covered():
    of_shapes = {"matmul", "matrix_transpose", "sum_axis"}  # which are in test_shaped.py
    assert set(FUNCTIONS) - of_shapes <= set(OPERATIONS)
    assert set(OPS) - {"pow"} - of_shapes <= set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("library", ["numpy", "array_api_strict", "torch", "jax.numpy"])
def test_what_the_protocol_has_means_the_same_everywhere(name, library):
    """Traced and run, in every library, with arrays and numbers in every place."""
    library = pytest.importorskip(library)
    xp = pytest.importorskip("array_api_compat.torch") if library.__name__ == "torch" else library

    def update(self, xp, t, param, grad, slot):
        return OPERATIONS[name](xp, param, grad), {"b": grad}

    rule = rule_of(update)()
    program = trace(rule)
    param, grad = weights(23), next(gradients(23, 1))
    with np.errstate(all="ignore"):
        expected = OPERATIONS[name](np, param, grad)
    arrays = {key: xp.asarray(x) for key, x in (("param", param), ("grad", grad), ("b", grad))}
    with np.errstate(all="ignore"):
        value = program.run(xp, program.scalars(vars(rule), 1), arrays)["param"]
    assert "float32" in str(value.dtype)
    exact = library.__name__ in ("numpy", "array_api_strict")
    assert_agree(np.asarray(value), expected, "same" if exact else "float32")


# What is kept


def test_a_program_is_traced_once_for_all_values():
    assert trace(Adam(lr=1.0)) is trace(Adam(lr=0.5, beta1=0.3, eps=1.0))
    assert trace(Adam(amsgrad=True)) is not trace(Adam())
    calls = []

    def update(self, xp, t, param, grad, slot):
        calls.append(t)
        return param - self.lr * grad, {"b": grad}

    cls = rule_of(update)
    for lr in (0.1, 0.2, 0.3):
        trace(cls(lr=lr))
    assert len(calls) == 1
    trace(cls(lr=0.0))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("zero", "other"),
    [
        (Momentum(dampening=0.0), Momentum(dampening=0.5)),
        (RMSprop(momentum=0.0), RMSprop(momentum=0.5)),
        (SGD(weight_decay=0.0), SGD(weight_decay=0.1)),
        (Adam(beta1=0.0), Adam(beta1=0.1)),
    ],
)
def test_zero_picks_another_program(zero, other):
    assert trace(zero) != trace(other)
    fewer, more = (len(p.scalar_part + p.array_part) for p in map(trace, (zero, other)))
    assert fewer < more


def test_retraced_programs_are_equal_and_hash_alike():
    def update(self, xp, t, param, grad, slot):
        b = self.mu * slot.b + grad
        return param - self.lr * b, {"b": b}

    one, two = (trace(rule_of(update)()) for _ in range(2))
    assert one is not two
    assert one == two and hash(one) == hash(two)
    assert one != trace(rule_of(update, name="Other")())


@pytest.mark.parametrize("first", [0.5, 0.25])
def test_no_value_of_one_rule_stays_in_the_program_of_the_next(first):
    """A cached property is made of this rule's numbers: on symbols it is made anew."""

    def update(self, xp, t, param, grad, slot):
        return param - self.half * grad, {"b": grad}

    half = cached_property(lambda self: self.lr / 2)
    half.__set_name__(None, "half")
    cls = rule_of(update, half=half)
    for lr in (first, 1.0):
        rule = cls(lr=lr)
        assert rule.half == lr / 2
        program = trace(rule)
        arrays = {"param": np.zeros(1), "grad": np.ones(1), "b": np.zeros(1)}
        assert program.run(np, program.scalars(vars(rule), 1), arrays)["param"] == -lr / 2


def test_an_attribute_that_is_no_field_is_refused():
    def init(self):
        object.__setattr__(self, "half", self.lr / 2)

    def update(self, xp, t, param, grad, slot):
        return param - self.half * grad, {"b": grad}

    with pytest.raises(TraceError, match="has no attribute 'half'"):
        trace(rule_of(update, __post_init__=init)())


def test_nothing_of_the_tracer_stays_alive():
    def tracers():
        gc.collect()
        kinds = ("_Tracer", "Symbol", "_Functions")  # of ours: SymPy has a Symbol, too
        found = (type(x) for x in gc.get_objects())
        return [t for t in found if t.__name__ in kinds and t.__module__ == "portopt.trace"]

    def bad(self, xp, t, param, grad, slot):
        return param[0], {}

    before = len(tracers())
    trace(rule_of(lambda self, xp, t, param, grad, slot: (param, {"b": slot.b + grad}))())
    assert len(tracers()) == before
    with pytest.raises(TraceError) as caught:
        trace(rule_of(bad)())
    assert len(tracers()) > before
    del caught
    assert len(tracers()) == before


def test_locals_of_an_update_die_with_it():
    class Thing:
        pass

    things = []

    def update(self, xp, t, param, grad, slot):
        thing = Thing()
        things.append(weakref.ref(thing))
        return param + grad, {"b": grad}

    gc.disable()
    try:
        trace(rule_of(update)())
        assert things[0]() is None
    finally:
        gc.enable()


def test_threads_trace_at_once():
    def update(self, xp, t, param, grad, slot):
        b = slot.b
        for count in range(50):
            b = self.mu * b + grad * count
        return param - self.lr * b, {"b": b}

    expected = trace(rule_of(update)())
    shared = rule_of(update)()
    barrier, programs = threading.Barrier(8), []

    def work():
        barrier.wait()
        programs.extend([trace(rule_of(update)()), trace(shared)])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(programs) == 16
    assert set(programs) == {expected}


# What is refused


def fails(words, slots=("b",)):
    """Marks an update with what its refusal says."""

    def mark(update):
        update.words, update.slots = words, slots
        return update

    return mark


class Refused:
    """Updates that cannot be traced, each with what is said of it."""

    @fails("branches on the value of .*less.*xp.where")
    def branch_on_array(self, xp, t, param, grad, slot):
        return (param if grad > 0 else grad), {"b": grad}

    @fails("branches on the value of grad")
    def truth_of_array(self, xp, t, param, grad, slot):
        return (param if grad else grad), {"b": grad}

    @fails("branches on the value of .*less.*only a hyperparameter may be asked whether it is zero")
    def branch_on_scalar(self, xp, t, param, grad, slot):
        return (param if self.lr > 0.1 else grad), {"b": grad}

    @fails("branches on the value of t")
    def branch_on_t(self, xp, t, param, grad, slot):
        return (param if t else grad), {"b": grad}

    @fails("branches on the value of")
    def python_max(self, xp, t, param, grad, slot):
        return param * max(self.lr, self.mu), {"b": grad}

    @fails("compares t by eq: use < or >")
    def equal_scalar(self, xp, t, param, grad, slot):
        return (param if t == 1 else grad), {"b": grad}

    @fails("compares grad by ne")
    def unequal_array(self, xp, t, param, grad, slot):
        return xp.where(grad != 0, param, grad), {"b": grad}

    @fails("compares grad by le")
    def less_equal(self, xp, t, param, grad, slot):
        return xp.where(grad <= 0, param, grad), {"b": grad}

    @fails("changes param in place .iadd.: make a new array")
    def add_to_param(self, xp, t, param, grad, slot):
        param += grad
        return param, {"b": grad}

    @fails("changes grad in place .imul.")
    def scale_grad(self, xp, t, param, grad, slot):
        grad *= 2
        return param, {"b": grad}

    @fails("changes b in place .isub.")
    def subtract_from_slot(self, xp, t, param, grad, slot):
        b = slot.b
        b -= grad
        return param, {"b": b}

    @fails("changes param in place .setitem.")
    def assign_elements(self, xp, t, param, grad, slot):
        param[...] = grad
        return param, {"b": grad}

    @fails("slot.b cannot be assigned: return the new slots")
    def assign_slot(self, xp, t, param, grad, slot):
        slot.b = grad
        return param, {"b": grad}

    @fails("does not support item assignment")
    def assign_slot_by_name(self, xp, t, param, grad, slot):
        slot["b"] = grad
        return param, {"b": grad}

    @fails("cannot assign to field 'lr'")
    def assign_to_self(self, xp, t, param, grad, slot):
        self.lr = 1.0
        return param, {"b": grad}

    @fails("divides the array grad by the scalar lr: multiply by the reciprocal")
    def divide_by_scalar(self, xp, t, param, grad, slot):
        return param - grad / self.lr, {"b": grad}

    @fails("divides the array grad by the scalar 2.0")
    def divide_by_number(self, xp, t, param, grad, slot):
        return param - grad / 2.0, {"b": grad}

    @fails(r"computes grad \*\* 2: use x \* x or xp.sqrt")
    def square(self, xp, t, param, grad, slot):
        return param, {"b": grad**2}

    @fails(r"computes lr \*\* grad")
    def power_to_an_array(self, xp, t, param, grad, slot):
        return param, {"b": self.lr**grad}

    @fails(r"calls xp.sqrt on the scalar lr: use \*\*")
    def root_of_scalar(self, xp, t, param, grad, slot):
        return param * xp.sqrt(self.lr), {"b": grad}

    @fails("calls xp.maximum on the scalar lr, mu")
    def maximum_of_scalars(self, xp, t, param, grad, slot):
        return param * xp.maximum(self.lr, self.mu), {"b": grad}

    @fails("calls xp.exp on the scalar 2.0")
    def exp_of_a_number(self, xp, t, param, grad, slot):
        return param * xp.exp(2.0), {"b": grad}

    @fails("uses xp.cumsum, which is not in the array protocol: it has abs, exp")
    def unknown_function(self, xp, t, param, grad, slot):
        return xp.cumsum(param), {"b": grad}

    @fails("calls xp.sqrt with 1 arguments and the keywords .*out")
    def keyword_of_a_function(self, xp, t, param, grad, slot):
        return xp.sqrt(param, out=param), {"b": grad}

    @fails("calls numpy.sqrt: use the namespace xp")
    def numpy_function(self, xp, t, param, grad, slot):
        return np.sqrt(param), {"b": grad}

    @fails("calls numpy.where: use the namespace xp")
    def numpy_where(self, xp, t, param, grad, slot):
        return np.where(param < grad, param, grad), {"b": grad}

    @fails("(uses .__array_struct__|asks for the array) of param")
    def numpy_array(self, xp, t, param, grad, slot):
        return np.asarray(param), {"b": grad}

    @fails("asks for the float of lr")
    def math_function(self, xp, t, param, grad, slot):
        return param * math.sqrt(self.lr), {"b": grad}

    @fails("cannot be traced: .*Symbol")
    def torch_function(self, xp, t, param, grad, slot):
        return pytest.importorskip("torch").sqrt(param), {"b": grad}

    @fails("uses Tensor")
    def torch_constant(self, xp, t, param, grad, slot):
        return pytest.importorskip("torch").ones(3) * param, {"b": grad}

    @fails("uses .sum of param")
    def method(self, xp, t, param, grad, slot):
        return param.sum(), {"b": grad}

    @fails("asks for the shape of param: only of arrays, and with")
    def shape(self, xp, t, param, grad, slot):
        return param * param.shape[0], {"b": grad}

    @fails("asks for the float of param")
    def to_float(self, xp, t, param, grad, slot):
        return float(param) * param, {"b": grad}

    @fails("asks for the index of t")
    def use_as_index(self, xp, t, param, grad, slot):
        return param * (1.0, 2.0)[operator.index(t)], {"b": grad}

    @fails("asks for the len of param")
    def length(self, xp, t, param, grad, slot):
        return param * len(param), {"b": grad}

    @fails("asks for the iter of param")
    def iterate(self, xp, t, param, grad, slot):
        return sum(param), {"b": grad}

    @fails("uses getitem on param")
    def index(self, xp, t, param, grad, slot):
        return param[0], {"b": grad}

    @fails("computes matmul\\(param, grad\\): only a rule with `by_shape = True` can")
    def matmul(self, xp, t, param, grad, slot):
        return param @ grad, {"b": grad}

    @fails("uses mod on t")
    def every_other_step(self, xp, t, param, grad, slot):
        return param * (t % 2), {"b": grad}

    @fails("uses ndarray array.* in mul: only its arguments")
    def array_constant(self, xp, t, param, grad, slot):
        return param * CONSTANT, {"b": grad}

    @fails("calls numpy.multiply")
    def array_constant_first(self, xp, t, param, grad, slot):
        return CONSTANT * param, {"b": grad}

    @fails("uses float64 .* in mul: .*Python's ints and floats")
    def numpy_scalar(self, xp, t, param, grad, slot):
        return param * np.sqrt(0.5), {"b": grad}

    @fails("uses bool True in mul")
    def bool_constant(self, xp, t, param, grad, slot):
        return param * True, {"b": grad}

    @fails("uses str 'x' in add")
    def text_constant(self, xp, t, param, grad, slot):
        return param + "x", {"b": grad}

    @fails("uses NoneType None in maximum")
    def none_constant(self, xp, t, param, grad, slot):
        return xp.maximum(param, None), {"b": grad}

    @fails("computes mul.*a comparison of arrays goes into the first argument of xp.where")
    def mask_in_arithmetic(self, xp, t, param, grad, slot):
        return (grad > 0) * param, {"b": grad}

    @fails("computes where.*a comparison of arrays goes into the first argument")
    def scalar_mask(self, xp, t, param, grad, slot):
        return xp.where(t > 1, param, grad), {"b": grad}

    @fails("must return an array for b, returned less")
    def return_mask(self, xp, t, param, grad, slot):
        return param, {"b": grad > 0}

    @fails(r"must return \(new_param, new_slots\), returned None")
    def return_nothing(self, xp, t, param, grad, slot):
        pass

    @fails(r"must return \(new_param, new_slots\)")
    def return_param_alone(self, xp, t, param, grad, slot):
        return param

    @fails(r"must return \(new_param, new_slots\)")
    def return_a_tuple_of_slots(self, xp, t, param, grad, slot):
        return param, (grad,)

    @fails(r"must return the slots \['b'\], returned \[\]")
    def return_no_slot(self, xp, t, param, grad, slot):
        return param, {}

    @fails(r"must return the slots \['b'\], returned \['b', 'c'\]")
    def return_another_slot(self, xp, t, param, grad, slot):
        return param, {"b": grad, "c": grad}

    @fails("must return an array for param, returned lr")
    def return_scalar(self, xp, t, param, grad, slot):
        return self.lr, {"b": grad}

    @fails("must return an array for b, returned 0.0")
    def return_number(self, xp, t, param, grad, slot):
        return param, {"b": 0.0}

    @fails("no slot 'exp_avg': the rule's slots are b")
    def unknown_slot(self, xp, t, param, grad, slot):
        return param, {"b": slot.exp_avg}

    @fails("cannot be traced: 'exp_avg'")
    def unknown_slot_by_name(self, xp, t, param, grad, slot):
        return param, {"b": slot["exp_avg"]}

    @fails("has no attribute 'nu'")
    def unknown_hyperparameter(self, xp, t, param, grad, slot):
        return param * self.nu, {"b": grad}

    @fails("cannot be traced: my own words")
    def raise_type_error(self, xp, t, param, grad, slot):
        raise TypeError("my own words")

    @fails("cannot be traced: my own words")
    def raise_runtime_error(self, xp, t, param, grad, slot):
        raise RuntimeError("my own words")

    @fails("cannot be traced: .*zero")
    def divide_by_zero(self, xp, t, param, grad, slot):
        return param * (1 / 0), {"b": grad}

    @fails("has a slot named 'lr': each needs a name of its own", ("lr",))
    def slot_named_lr(self, xp, t, param, grad, slot):
        return param, {"lr": grad}

    @fails("has a slot named 'step'", ("step",))
    def slot_named_step(self, xp, t, param, grad, slot):
        return param, {"step": grad}

    @fails("has a slot named 'param'", ("param",))
    def slot_named_param(self, xp, t, param, grad, slot):
        return param, {"param": grad}

    @fails("has a slot named 'b'", ("b", "b"))
    def slot_twice(self, xp, t, param, grad, slot):
        return param, {"b": grad}

    @fails("has a slot named 'the mean'", ("the mean",))
    def slot_with_a_space(self, xp, t, param, grad, slot):
        return param, {"the mean": grad}

    @fails("has a slot named 'lambda'", ("lambda",))
    def slot_named_by_a_keyword(self, xp, t, param, grad, slot):
        return param, {"lambda": grad}


REFUSED = dict(inspect.getmembers(Refused, inspect.isfunction))


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    update = REFUSED[name]
    rule = rule_of(update, update.slots)()
    for _ in range(2):  # a refusal is not remembered as a program
        with pytest.raises(TraceError, match=update.words) as caught:
            trace(rule)
        assert str(caught.value).startswith("Custom.update ")


@pytest.mark.parametrize("slots", ["exp_avg", (None,), ["b", 1]])
@pytest.mark.parametrize("what", ["slots", "numbers"])
def test_slots_and_numbers_are_names(what, slots):
    rule = rule_of(lambda self, xp, t, param, grad, slot: (param, {}), **{what: slots})()
    with pytest.raises(TraceError, match=f"^Custom.{what} must be a tuple of names, got "):
        trace(rule)


def test_a_number_is_made_of_scalars():
    for wrong, shown in ((lambda grad: grad, "grad"), (lambda grad: 1.0, "1.0")):
        update = lambda self, xp, t, param, grad, slot: (param, {"n": wrong(grad)})  # noqa: B023, E731
        words = f"a scalar made of t, hyperparameters or numbers for n, returned {shown}"
        with pytest.raises(TraceError, match=words):
            trace(rule_of(update, slots=(), numbers=("n",))())


@pytest.mark.parametrize("name", ["t", "param", "grad"])
def test_a_hyperparameter_has_a_name_of_its_own(name):
    cls = dataclass(frozen=True, kw_only=True)(
        type("Custom", (SGD,), {"__annotations__": {name: float}, name: 0.5})
    )
    with pytest.raises(ProgramError, match=r"Custom: .* must be different names"):
        trace(cls())


def test_a_field_that_is_not_hashable():
    cls = dataclass(frozen=True, kw_only=True)(
        type("Custom", (SGD,), {"__annotations__": {"ks": list}, "ks": None})
    )
    with pytest.raises(TraceError, match="Custom has a field that is not hashable"):
        trace(cls(ks=[1]))


def test_where_of_two_numbers():
    def update(self, xp, t, param, grad, slot):
        return param * xp.where(grad > 0, 1.0, -1.0), {"b": grad}

    with pytest.raises(TraceError, match="one of the two choices must be an array"):
        trace(rule_of(update)())


def test_too_many_operands():
    def update(self, xp, t, param, grad, slot):
        return xp.sqrt(param, grad), {"b": grad}

    with pytest.raises(TraceError, match=r"Custom.update calls xp.sqrt with 2 arguments"):
        trace(rule_of(update)())


def test_a_symbol_of_another_tracing_is_refused():
    kept = []

    def update(self, xp, t, param, grad, slot):
        kept.append(param)
        return param + kept[0], {"b": grad}

    trace(rule_of(update)())
    with pytest.raises(TraceError, match="uses Symbol param in add"):
        trace(rule_of(update)())
    kept.clear()


def test_a_copied_rule_and_a_bound_update_trace_alike():
    rule = Adam(amsgrad=True)
    assert trace(copy.deepcopy(rule)) is trace(rule) is trace(replace(rule, lr=0.5))


def test_the_rule_itself_refuses_slots_that_are_assigned():
    def update(self, xp, t, param, grad, slot):
        slot.b = grad
        return param, {"b": grad}

    with pytest.raises(AttributeError, match=r"slot\.b cannot be assigned"):
        rule_of(update)().step(np, 1, CONSTANT, CONSTANT, Slots({"b": CONSTANT}))
