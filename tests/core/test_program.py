"""Programs: what they compute, how they print, and which are not well formed."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import assert_agree, begun, gradients, numbered, weights

from portopt import Rule, trace
from portopt.program import OPS, SCALAR_OPS, Instruction, Program, ProgramError
from portopt.rules import SGD, Adam, Momentum, RMSprop

GOOD = Program(
    rule="Good",
    hyperparameters=("lr",),
    slots=("b",),
    scalar_part=(Instruction("s", "sub", (1, "lr")),),
    array_part=(
        Instruction("mask", "less", ("grad", 0.0)),
        Instruction("x", "where", ("mask", "grad", "b")),
        Instruction("new", "mul", ("s", "x")),
    ),
    outputs=(("param", "new"), ("b", "x")),
)


def array_part(*lines):
    return {"array_part": (*GOOD.array_part, *(Instruction(*line) for line in lines))}


def scalar_part(*lines):
    return {"scalar_part": (*GOOD.scalar_part, *(Instruction(*line) for line in lines))}


MALFORMED = {
    "slot named like a hyperparameter": ({"hyperparameters": ("lr", "b")}, "different names"),
    "slot named grad": ({"slots": ("b", "grad")}, "different names"),
    "hyperparameter named t": ({"hyperparameters": ("lr", "t")}, "different names"),
    "slot twice": ({"slots": ("b", "b")}, "different names"),
    "unknown operation": (array_part(("y", "sin", ("grad",))), "no such operation"),
    "too many operands": (array_part(("y", "sqrt", ("grad", "b"))), "no such operation with that"),
    "too few operands": (array_part(("y", "add", ("grad",))), "no such operation with that"),
    "defined twice": (array_part(("x", "neg", ("grad",))), "x is defined twice"),
    "input redefined": (array_part(("param", "neg", ("grad",))), "param is defined twice"),
    "hyperparameter redefined": (scalar_part(("lr", "neg", ("t",))), "lr is defined twice"),
    "scalar redefined": (array_part(("s", "neg", ("grad",))), "s is defined twice"),
    "undefined": (array_part(("y", "neg", ("z",))), "z is not defined before"),
    "defined later": (
        array_part(("y", "neg", ("z",)), ("z", "neg", ("grad",))),
        "z is not defined before",
    ),
    "array among scalars": (scalar_part(("y", "neg", ("grad",))), "the scalar part has only"),
    "array function of a scalar": (scalar_part(("y", "sqrt", ("lr",))), "the scalar part has only"),
    "scalars alone": (array_part(("y", "mul", ("lr", 2.0))), "needs an array"),
    "mask in arithmetic": (array_part(("y", "mul", ("mask", "grad"))), "takes a mask"),
    "mask as a value": (array_part(("y", "where", ("mask", "mask", "grad"))), "takes a mask"),
    "no mask": (array_part(("y", "where", ("grad", "grad", "b"))), "takes a mask"),
    "scalar for a mask": (array_part(("y", "where", ("lr", "grad", "b"))), "takes a mask"),
    "power of an array": (array_part(("y", "pow", ("grad", 2))), "not raised to a power"),
    "power to an array": (array_part(("y", "pow", (2, "grad"))), "not raised to a power"),
    "division by a scalar": (array_part(("y", "div", ("grad", "lr"))), "nor divided by a scalar"),
    "slot left out": ({"outputs": (("param", "new"),)}, "outputs must be param and"),
    "output of no slot": (
        {"outputs": (*GOOD.outputs, ("c", "x"))},
        "outputs must be param and",
    ),
    "outputs in another order": ({"outputs": GOOD.outputs[::-1]}, "outputs must be param and"),
    "scalar output": ({"outputs": (("param", "s"), ("b", "x"))}, "the new param, s, must be"),
    "mask output": ({"outputs": (("param", "new"), ("b", "mask"))}, "the new b, mask, must be"),
    "undefined output": ({"outputs": (("param", "y"), ("b", "x"))}, "the new param, y, must be"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_programs_are_refused(fault):
    GOOD.verify()
    change, words = MALFORMED[fault]
    with pytest.raises(ProgramError, match=words) as caught:
        replace(GOOD, **change).verify()
    assert str(caught.value).startswith("Good: ")


def test_a_program_computes_what_it_says():
    scalars = GOOD.scalars({"lr": 0.75, "other": None}, t=1)
    assert scalars == {"s": 0.25}
    arrays = {name: np.array(values) for name, values in (("grad", [-2.0, 3.0]), ("b", [5.0, 7.0]))}
    arrays["param"] = np.zeros(2)
    before = {name: array.copy() for name, array in arrays.items()}
    new = GOOD.run(np, scalars, arrays)
    assert list(new) == ["param", "b"]
    assert_agree(new["b"], [-2.0, 7.0], "same")
    assert_agree(new["param"], [-0.5, 1.75], "same")
    for name, array in before.items():
        assert_agree(arrays[name], array, "same")
    with pytest.raises(KeyError, match="lr"):
        GOOD.scalars({}, t=1)


def test_a_comparison_of_scalars_becomes_a_number():
    program = trace(Momentum(dampening=0.5))
    for t, kept in ((1, 1.0), (2, 0.5), (7, 0.5)):
        scalars = program.scalars(vars(Momentum(dampening=0.5)), t)
        assert kept in scalars.values()
        assert {type(value) for value in scalars.values()} == {float}
    seen = []
    program.scalars(vars(Momentum(dampening=0.5)), 2, number=lambda x: seen.append(x) or 1.0)
    assert seen == [True]


def test_scalars_are_formed_in_float64():
    rule = Adam(beta2=0.999)
    scalars = trace(rule).scalars(vars(rule), 3)
    assert scalars["step_size"] == 1e-3 / (1 - 0.9**3)
    assert (1 - 0.999**3) ** -0.5 in scalars.values()


OPERANDS = {
    name: [np.array([0.5, -0.5, 2.0]), np.array([1.0, -2.0, 2.0]), np.array([3.0, 4.0, 5.0])]
    for name in OPS
} | {
    "where": [np.array([True, False, True]), np.array([1.0, 2.0, 3.0]), np.zeros(3)],
    "sum_axis": [np.array([[1.0, 2.0], [3.0, 4.0]]), 0],
    "matmul": [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])],
    "matrix_transpose": [np.array([[1.0, 2.0]])],
}
MEANINGS = {
    "less": [1.0, 0.0, 0.0],
    "add": [1.5, -2.5, 4.0],
    "sub": [-0.5, 1.5, 0.0],
    "mul": [0.5, 1.0, 4.0],
    "div": [0.5, 0.25, 1.0],
    "neg": [-0.5, 0.5, -2.0],
    "pow": [0.5, 4.0, 4.0],
    "abs": [0.5, 0.5, 2.0],
    "exp": np.exp([0.5, -0.5, 2.0]),
    "log": [np.log(0.5), np.nan, np.log(2.0)],
    "sign": [1.0, -1.0, 1.0],
    "sum": 2.0,
    "sum_axis": [[4.0, 6.0]],
    "matmul": [[2.0, 1.0], [4.0, 3.0]],
    "matrix_transpose": [[1.0], [2.0]],
    "sqrt": [0.5**0.5, np.nan, 2.0**0.5],
    "maximum": [1.0, -0.5, 2.0],
    "minimum": [0.5, -2.0, 2.0],
    "where": [1.0, 0.0, 3.0],
}


@pytest.mark.parametrize("name", OPS)
def test_each_operation(name):
    with np.errstate(invalid="ignore"):
        value = OPS[name].meaning(np, *OPERANDS[name][: OPS[name].arity])
    assert_agree(value, MEANINGS[name], "same")
    assert name not in SCALAR_OPS or OPS[name].binding < 9 or name == "abs"


def test_programs_are_values():
    again = replace(GOOD)
    assert again == GOOD and hash(again) == hash(GOOD)
    assert again != replace(GOOD, outputs=(("param", "new"), ("b", "b")))
    _ = GOOD.scalar_names, GOOD._formulas, str(GOOD)
    assert pickle.loads(pickle.dumps(GOOD)) == GOOD


def test_nothing_of_scalars_alone_is_left_in_the_array_part(rule):
    program = trace(rule)
    program.verify()
    arrays = {"param", "grad", *program.slots, *(line.name for line in program.array_part)}
    for line in program.array_part:
        assert arrays & set(line.args)
    for part in (program.scalar_part, program.array_part):
        assert len({(line.op, line.args) for line in part}) == len(part)
    lines = (*program.scalar_part, *program.array_part)
    used = {arg for line in lines for arg in line.args} | {
        name for _, name in (*program.outputs, *program.number_outputs)
    }
    assert {line.name for line in lines} <= used


SNAPSHOTS = {
    SGD(): """\
SGD:
    once a step, in float64:
        nothing
    for every element:
        param_new = param - lr * grad
    new param = param_new""",
    SGD(weight_decay=0.1, decoupled=True, maximize=True): """\
SGD:
    once a step, in float64:
        s1 = lr * weight_decay
    for every element:
        grad_new = -grad
        param_new = param - s1 * param
        param_new1 = param_new - lr * grad_new
    new param = param_new1""",
    Momentum(dampening=0.1): """\
Momentum:
    once a step, in float64:
        s3 = 1 - dampening * (1 < t)
    for every element:
        b = momentum * momentum_buffer + s3 * grad
        param_new = param - lr * b
    new param = param_new, momentum_buffer = b""",
    RMSprop(centered=True, momentum=0.9, eps_form="inside", buffer="velocity"): """\
RMSprop:
    once a step, in float64:
        s1 = 1 - alpha
    for every element:
        v = square_avg + where(square_avg < inf, s1 * (grad * grad - square_avg), 0.0)
        a = grad_avg + s1 * (grad - grad_avg)
        spread = maximum(v - a * a, 0.0)
        denom = sqrt(spread + eps)
        b = momentum * momentum_buffer + lr * grad / denom
        param_new = param - b
    new param = param_new, square_avg = v, grad_avg = a, momentum_buffer = b""",
    Adam(): """\
Adam:
    once a step, in float64:
        s1 = 1 - beta1
        s2 = 1 - beta2
        step_size = lr / (1 - beta1**t)
        bias2 = 1 - beta2**t
        s6 = bias2**-0.5
    for every element:
        m = exp_avg + s1 * (grad - exp_avg)
        v = exp_avg_sq + where(exp_avg_sq < inf, s2 * (grad * grad - exp_avg_sq), 0.0)
        denom = s6 * sqrt(v) + eps
        param_new = param - step_size * m / denom
    new param = param_new, exp_avg = m, exp_avg_sq = v""",
}


@pytest.mark.parametrize("rule", SNAPSHOTS, ids=lambda rule: type(rule).__name__)
def test_printed_programs(rule):
    assert str(trace(rule)) == SNAPSHOTS[rule]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([("x1", "sub", "ab"), ("y", "sub", ("a", "x1"))], "a - (a - b)"),
        ([("x1", "sub", "ab"), ("y", "sub", ("x1", "a"))], "a - b - a"),
        ([("x1", "mul", "ab"), ("y", "div", ("a", "x1"))], "a / (a * b)"),
        ([("x1", "div", "ab"), ("y", "mul", ("x1", "a"))], "a / b * a"),
        ([("x1", "add", "ab"), ("y", "neg", ("x1",))], "-(a + b)"),
        ([("x1", "neg", "a"), ("y", "neg", ("x1",))], "--a"),
        ([("x1", "neg", "a"), ("y", "pow", ("x1", "b"))], "(-a)**b"),
        ([("x1", "neg", "b"), ("y", "pow", ("a", "x1"))], "a**-b"),
        ([("x1", "pow", "ab"), ("y", "neg", ("x1",))], "-a**b"),
        ([("x1", "pow", "ab"), ("y", "pow", ("x1", "b"))], "(a**b)**b"),
        ([("x1", "pow", "ab"), ("y", "pow", ("a", "x1"))], "a**a**b"),
        ([("y", "pow", ("a", -0.5))], "a**-0.5"),
        ([("y", "pow", (-2, "a"))], "(-2)**a"),
        ([("x1", "less", "ab"), ("y", "add", ("x1", "a"))], "(a < b) + a"),
        ([("x1", "less", "ab"), ("y", "less", ("x1", "b"))], "(a < b) < b"),
        ([("x1", "less", "ab"), ("y", "less", ("a", "x1"))], "a < (a < b)"),
        ([("x1", "add", "ab"), ("y", "abs", ("x1",))], "abs(a + b)"),
    ],
)
def test_brackets(lines, text):
    """As Python reads the text, so was the expression."""
    program = Program("Rule", ("a", "b"), (), tuple(Instruction(*line) for line in lines), (), ())
    assert f"\n        y = {text}\n" in str(program)
    names = {"a": 3.0, "b": 2.0}
    env = dict(names)
    for name, op, args in lines:
        env[name] = OPS[op].meaning(np, *(env[a] if isinstance(a, str) else a for a in args))
    assert env["y"] == eval(text, {}, names)


def sum_axis(x, axis):
    return np.sum(x, axis=axis, keepdims=True)


FUNCTIONS = {name: getattr(np, name, sum_axis) for name, op in OPS.items() if op.binding == 9}


def read_and_run(text, values, t, arrays):
    """Runs a printed program as the Python that it looks like."""
    env = {**FUNCTIONS, "inf": np.inf, **values, "t": t, **arrays}
    *lines, last = text.splitlines()[1:]
    for line in lines:
        if " = " in line:
            exec(line.strip(), env)
    outputs = last.strip().removeprefix("new ").split(", ")
    return {slot: env[name] for slot, name in (output.split(" = ") for output in outputs)}


def test_what_is_printed_is_what_is_computed(rule):
    program = trace(rule)
    arrays = {
        "param": weights(23),
        **begun(rule, weights(23)),
    }
    values = numbered(rule)
    for t, grad in enumerate(gradients(23, 3), 1):
        arrays["grad"] = grad
        scalars = program.scalars(values, t)
        expected = program.run(np, scalars, arrays)
        actual = read_and_run(str(program), values, t, arrays)
        numbers = {name: actual.pop(name) for name in program.numbers}
        assert numbers == program.kept(scalars)
        assert list(actual) == list(expected)
        for name, array in expected.items():
            assert_agree(actual[name], array, "same", what=name)
        arrays, values = expected, values | numbers


def test_long_expressions_are_printed_line_by_line():
    @dataclass(frozen=True, kw_only=True)
    class Long(Rule):
        lr: float = 1.0

        def update(self, xp, t, param, grad, slot):
            for _ in range(1000):
                grad = xp.sqrt(abs(grad)) - param
            exp = param * grad  # a function's name
            return xp.exp(exp), {}

    program, values = trace(Long()), numbered(Long())
    arrays = {"param": weights(23), "grad": next(gradients(23, 1))}
    actual = read_and_run(str(program), values, 1, arrays)
    expected = program.run(np, program.scalars(values, 1), arrays)
    assert_agree(actual["param"], expected["param"], "same")
    assert max(map(len, str(program).splitlines())) < 200


@pytest.mark.parametrize("t", [1, 2.0, 5, 1000.0, 10**6])
def test_scalars_by_one_function_and_one_by_one(rule, t):
    """The same bits, whichever way they are computed."""

    def one_by_one(value):  # a function that is not `float` itself
        return float(value)

    program, values = trace(rule), numbered(rule)
    found, expected = program.scalars(values, t), program.scalars(values, t, one_by_one)
    assert found == expected and [*found] == [*expected]
    assert {*map(type, found.values())} <= {float}


def test_scalars_of_every_operation():
    """Those of the table, with numbers of any kind among the operands."""
    for op in SCALAR_OPS:
        for number in (0.3, -2.0, math.inf, 3, -1):
            args = ("t", number)[: OPS[op].arity]
            lines = (Instruction("s", op, args),)
            arrays = (Instruction("new", "mul", ("s", "grad")), Instruction("x", "neg", ("grad",)))
            program = replace(GOOD, scalar_part=lines, array_part=arrays)
            (found,) = program.scalars({"lr": 0.5}, 2.0).values()
            expected = (
                OPS[op].meaning(None, 2.0, number)
                if len(args) == 2
                else {"neg": -2.0, "abs": 2.0}[op]
            )
            assert found == float(expected)
