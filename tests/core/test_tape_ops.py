"""Every primitive and loss against central differences, and against torch where it is present."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from portopt import tape

TOLERANCES = {  # rtol, atol
    "central difference": (1e-6, 1e-8),
    "torch": (1e-12, 1e-13),
}
STEP = 1e-5  # of central differences: error about STEP**2 + 1e-16 / STEP


def assert_close(got: Any, wanted: Any, kind: str, what: str = "") -> None:
    rtol, atol = TOLERANCES[kind]
    np.testing.assert_allclose(got, wanted, rtol, atol, equal_nan=False, err_msg=what)


def tape_gradients(function: Callable, values: list[np.ndarray]) -> tuple[np.ndarray, list]:
    """The value, and the gradients of its sum weighted with 1, 2, 3, ..."""
    variables = [tape.Variable(value) for value in values]
    with tape.Autograd() as autograd:
        output = function(*variables)
    autograd.backward(output, gradient=weights_of(output.shape))
    return output.value, [autograd.buffer.get(variable) for variable in variables]


def weights_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(1.0, 1 + np.prod(shape)).reshape(shape)


def check_gradients(function: Callable, *values: np.ndarray) -> None:
    """Raise AssertionError unless the tape's gradients are those of central differences."""
    output, gradients = tape_gradients(function, list(values))
    weights = weights_of(output.shape)
    for index, (value, gradient) in enumerate(zip(values, gradients, strict=True)):
        wanted = np.empty_like(value)
        for place in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = [v.copy() for v in values]
                moved[index][place] += sign * STEP
                ends.append(np.sum(weights * function(*map(tape.Variable, moved)).value))
            wanted[place] = (ends[0] - ends[1]) / (2 * STEP)
        assert_close(gradient, wanted, "central difference", f"operand {index}")


@dataclass
class Case:
    function: Callable  # on the tape
    torch: Callable  # the same of (torch, *tensors)
    shapes: list[tuple[tuple[int, ...], ...]]  # each: a shape for every operand
    positive: bool = False

    def values(self, shapes: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
        """Distinct magnitudes of 0.4 to 1.6, random order and sign: no ties, no kinks near."""
        rng = np.random.default_rng(7)
        values = []
        for shape in shapes:
            size = int(np.prod(shape))
            magnitude = rng.permutation(np.linspace(0.4, 1.6, size)).reshape(shape)
            sign = 1 if self.positive else rng.choice([-1, 1], shape)
            values.append(np.asarray(magnitude * sign))
        return values


UNARY = [((),), ((3,),), ((2, 3),)]
BINARY = [((), ()), ((3,), (3,)), ((2, 3), ()), ((3,), (2, 3)), ((2, 1, 3), (4, 1)), ((1,), (2, 1))]
MATRICES = [
    ((3,), (3,)),
    ((3,), (3, 2)),
    ((2, 3), (3,)),
    ((2, 3), (3, 4)),
    ((5, 2, 3), (5, 3, 4)),
    ((5, 2, 3), (3, 4)),
    ((2, 3), (5, 3, 1)),
    ((3,), (5, 3, 2)),
    ((5, 2, 3), (3,)),
    ((5, 1, 2, 3), (4, 3, 2)),
]
LABELS = np.array([2, 0, 2, 1])

CASES = {
    "add": [Case(tape.add, lambda t, a, b: a + b, BINARY)],
    "sub": [Case(tape.sub, lambda t, a, b: a - b, BINARY)],
    "mul": [Case(tape.mul, lambda t, a, b: a * b, BINARY)],
    "div": [Case(tape.div, lambda t, a, b: a / b, BINARY)],
    "pow": [
        Case(tape.pow, lambda t, a, b: a**b, BINARY, positive=True),
        Case(lambda a: a**3, lambda t, a: a**3, UNARY),
        Case(lambda a: 2.0**a, lambda t, a: 2.0**a, UNARY),
    ],
    "neg": [Case(tape.neg, lambda t, a: -a, UNARY)],
    "exp": [Case(tape.exp, lambda t, a: t.exp(a), UNARY)],
    "log": [Case(tape.log, lambda t, a: t.log(a), UNARY, positive=True)],
    "sin": [Case(tape.sin, lambda t, a: t.sin(a), UNARY)],
    "tanh": [Case(tape.tanh, lambda t, a: t.tanh(a), UNARY)],
    "sigmoid": [Case(tape.sigmoid, lambda t, a: t.sigmoid(a), UNARY)],
    "relu": [Case(tape.relu, lambda t, a: t.relu(a), UNARY)],
    "matmul": [Case(tape.matmul, lambda t, a, b: a @ b, MATRICES)],
    "outer": [Case(tape.outer, lambda t, a, b: t.outer(a, b), [((3,), (3,)), ((2,), (5,))])],
    "sum": [
        Case(tape.sum, lambda t, a: t.sum(a), UNARY),
        Case(lambda a: tape.sum(a, axis=-1), lambda t, a: a.sum(-1), [((3,),), ((2, 3),)]),
        Case(
            lambda a: tape.sum(a, axis=(0, -1), keepdims=True),
            lambda t, a: a.sum((0, -1), keepdim=True),
            [((2, 3, 4),)],
        ),
    ],
    "mean": [
        Case(tape.mean, lambda t, a: t.mean(a), UNARY),
        Case(lambda a: tape.mean(a, axis=(2, 0)), lambda t, a: a.mean((2, 0)), [((2, 3, 4),)]),
        Case(
            lambda a: tape.mean(a, axis=1, keepdims=True),
            lambda t, a: a.mean(1, keepdim=True),
            [((2, 3),)],
        ),
    ],
    "max": [
        Case(tape.max, lambda t, a: t.amax(a), UNARY),
        Case(lambda a: tape.max(a, axis=(0, -1)), lambda t, a: a.amax((0, -1)), [((2, 3, 4),)]),
        Case(
            lambda a: tape.max(a, axis=1, keepdims=True),
            lambda t, a: a.amax(1, keepdim=True),
            [((2, 3),)],
        ),
    ],
    "reshape": [
        Case(lambda a: tape.reshape(a, shape=(3, -1)), lambda t, a: a.reshape(3, -1), [((2, 6),)]),
    ],
    "transpose": [
        Case(lambda a: a.T, lambda t, a: a.T, [((2, 3),)]),
        Case(
            lambda a: tape.transpose(a, axes=(2, 0, -2)),
            lambda t, a: a.permute(2, 0, 1),
            [((2, 3, 4),)],
        ),
    ],
    "softmax": [
        Case(tape.softmax, lambda t, a: t.softmax(a, -1), [((3,),), ((2, 3),)]),
        Case(lambda a: tape.softmax(a, axis=0), lambda t, a: t.softmax(a, 0), [((2, 3),)]),
    ],
    "mean_squared_error": [
        Case(
            tape.mean_squared_error,
            lambda t, a, b: t.nn.functional.mse_loss(a, b),
            [((), ()), ((2, 3), (2, 3))],
        ),
    ],
    "softmax_cross_entropy": [
        Case(
            lambda a: tape.softmax_cross_entropy(a, LABELS),
            lambda t, a: t.nn.functional.cross_entropy(a, t.tensor(LABELS)),
            [((4, 3),)],
        ),
    ],
}
RUNS = [
    pytest.param(case, shapes, id=f"{name}{index}-{shapes}".replace(" ", ""))
    for name, cases in CASES.items()
    for index, case in enumerate(cases)
    for shapes in case.shapes
]


def test_every_public_function_has_a_case():
    functions = {
        name
        for name in tape.__all__
        if callable(getattr(tape, name)) and not isinstance(getattr(tape, name), type)
    }
    others = {"checkpoint", "no_grad", "primitive", "trace", "unbroadcast"}
    assert functions - others == set(CASES)


@pytest.mark.parametrize(("case", "shapes"), RUNS)
def test_gradients_are_central_differences(case, shapes):
    check_gradients(case.function, *case.values(shapes))


def test_the_check_goes_red_on_a_wrong_gradient():
    @tape.primitive
    def wrong_square(x):
        return x * x, lambda g: g * x * 2.00001

    with pytest.raises(AssertionError, match="operand 0"):
        check_gradients(wrong_square, np.array([1.0, 2.0]))


def agree_with_torch(case: Case, values: list[np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    output, gradients = tape_gradients(case.function, values)
    tensors = [torch.tensor(value, requires_grad=True) for value in values]
    wanted = case.torch(torch, *tensors)
    wanted.backward(torch.tensor(weights_of(output.shape)))
    assert_close(output, wanted.detach().numpy(), "torch")
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert_close(gradient, tensor.grad.numpy(), "torch")


@pytest.mark.parametrize(("case", "shapes"), RUNS)
def test_agrees_with_torch(case, shapes):
    agree_with_torch(case, case.values(shapes))


@pytest.mark.parametrize(
    ("name", "index", "values"),
    [
        ("max", 0, [[[1.0, 3.0], [3.0, 3.0]]]),
        ("max", 2, [[[1.0, 1.0], [0.0, 2.0]]]),
        ("relu", 0, [[-1.0, 0.0, 1.0]]),
        ("pow", 0, [[0.0, 0.0, 0.0, 2.0], [0.0, 1.0, 3.0, 0.0]]),
        ("sigmoid", 0, [[-800.0, -40.0, 0.0, 40.0, 800.0]]),
        ("softmax", 0, [[-1e4, 0.0, 1e4]]),
        ("softmax_cross_entropy", 0, [[[1e4, 0.0, 1.0]] * 4]),
    ],
)
def test_agrees_with_torch_at_ties_kinks_and_extremes(name, index, values):
    agree_with_torch(CASES[name][index], [np.array(value) for value in values])


def test_the_power_0_has_no_gradient_anywhere():
    x = tape.Variable([np.inf, -np.inf, np.nan, 0.0, 2.0])
    with tape.Autograd() as autograd:
        loss = tape.sum(x**0)
    np.testing.assert_array_equal(autograd.gradients(loss, x), np.zeros(5))


@pytest.mark.parametrize(("case", "shapes"), RUNS)
def test_float32_stays_float32(case, shapes):
    values = [value.astype(np.float32) for value in case.values(shapes)]
    variables = [tape.Variable(value) for value in values]
    with tape.Autograd() as autograd:
        output = case.function(*variables)
    assert output.dtype == np.float32
    for operation in reversed(autograd.operations):  # before the slot's own cast
        returned = [vjp(np.ones(operation.output.shape, np.float32)) for vjp in operation.vjps]
        assert [gradient.dtype for gradient in returned] == [np.float32] * len(returned)


@pytest.mark.parametrize("function", [tape.add, tape.sub, tape.mul, tape.div, tape.pow])
@pytest.mark.parametrize("constant", [2, 0.5, [0.5, 2]], ids=str)
def test_scalars_and_lists_are_constants(function, constant):
    values = np.array([0.5, 1.5])
    check_gradients(lambda x: function(x, constant), values)
    check_gradients(lambda x: function(constant, x), values)


def test_operators_are_the_primitives():
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[2.0, 1.0], [0.5, 3.0]])
    x = tape.Variable(a)
    pairs = [
        (x + b, a + b),
        (b + x, b + a),
        (x - b, a - b),
        (b - x, b - a),
        (x * b, a * b),
        (b * x, b * a),
        (x / b, a / b),
        (b / x, b / a),
        (x**b, a**b),
        (b**x, b**a),
        (x @ b, a @ b),
        (b @ x, b @ a),
        (-x, -a),
        (x.T, a.T),
    ]
    for got, wanted in pairs:
        assert isinstance(got, tape.Variable)
        np.testing.assert_array_equal(got.value, wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tape.matmul(np.ones((2, 3)), np.ones((4, 5))), r"matmul.*\(2, 3\), \(4, 5\)"),
        (
            lambda: tape.Variable([1.0, 2.0]) + np.ones(3),
            r"add of operands of shape \(2,\), \(3,\)",
        ),
        (lambda: tape.outer(np.ones(2), 3.0), r"outer.*\(2,\), \(\): both operands must have one"),
        (lambda: tape.sum(np.ones(2), axis=1), r"sum.*\(2,\): axis 1 is out of bounds"),
        (lambda: tape.reshape(np.ones(4), shape=(3,)), r"reshape.*\(4,\): cannot reshape"),
        (lambda: tape.transpose(np.ones(4), axes=(1, 0)), r"transpose.*\(4,\): axes don't match"),
    ],
)
def test_operands_that_do_not_fit_are_named_with_their_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
