"""The tape itself: recording, the walk, the buffer, a user's primitive, and its errors."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import threading

import numpy as np
import pytest

from portopt import tape

TOLERANCES = {"exact": 0.0}


def assert_same(got, wanted):
    """Raise AssertionError unless both are arrays of one shape and dtype with equal elements."""
    wanted = np.asarray(wanted, np.float64)
    assert isinstance(got, np.ndarray)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_allclose(got, wanted, rtol=TOLERANCES["exact"], atol=TOLERANCES["exact"])


@tape.primitive
def double(x):
    return 2 * x, lambda g: 2 * g


def square_sum(x):
    with tape.Autograd() as autograd:
        loss = tape.sum(x * x)
    return autograd, loss


@pytest.mark.parametrize("module", sorted(m.name for m in pkgutil.iter_modules(tape.__path__)))
def test_doctests_of_the_modules(module):
    assert doctest.testmod(importlib.import_module(f"portopt.tape.{module}")).failed == 0


def test_doctest_of_the_package():
    outcome = doctest.testmod(tape)
    assert outcome.failed == 0 < outcome.attempted


def test_a_forward_call_records_one_operation():
    a, b = tape.Variable([1.0, 2.0]), tape.Variable(3.0)
    with tape.Autograd() as autograd:
        product = a * b
        tape.exp(np.ones(2))  # constants alone: nothing to walk back to
    (operation,) = autograd.operations
    assert operation.name == "mul"
    assert operation.inputs == (a, b)
    assert operation.output is product
    assert_same(operation.vjps[0](np.array([1.0, 10.0])), [3.0, 30.0])
    assert_same(np.asarray(operation.vjps[1](np.array([1.0, 10.0]))), 21.0)


def test_outside_a_tape_nothing_is_recorded():
    x = tape.Variable([1.0, 2.0])
    autograd, loss = square_sum(x)
    count = len(autograd.operations)
    assert_same((x * 2).value, [2.0, 4.0])
    assert len(autograd.operations) == count
    autograd.backward(loss)
    assert len(autograd.operations) == count


def test_a_variable_used_several_times_in_a_diamond():
    x = tape.Variable([2.0, 3.0])
    with tape.Autograd() as autograd:
        trunk = x * x
        left, right = trunk + x, trunk * 5
        loss = tape.sum(left * right)  # 5 x^4 + 5 x^3
    assert_same(autograd.gradients(loss, x), [220.0, 675.0])
    assert_same(autograd.gradients(loss, trunk), [50.0, 105.0])


def test_gradients_have_the_structure_of_wrt_and_zeros_where_unreached():
    x, unreached = tape.Variable([1.0, 2.0]), tape.Variable(np.ones((2, 1)))
    autograd, loss = square_sum(x)
    assert_same(autograd.gradients(loss, x), [2.0, 4.0])
    first, second = autograd.gradients(loss, [x, unreached])
    assert_same(first, [2.0, 4.0])
    assert_same(second, [[0.0], [0.0]])
    named = autograd.gradients(loss, {"tied": x, "w": unreached, "also tied": x})
    assert list(named) == ["tied", "w", "also tied"]
    named["tied"] *= 10.0  # an optimizer may scale what it gets
    assert_same(named["also tied"], [2.0, 4.0])


def test_backward_adds_to_the_buffer_and_gradients_does_not():
    x = tape.Variable([1.0, 2.0])
    autograd, loss = square_sum(x)
    for passes in (1, 2, 3):
        autograd.backward(loss)
        assert_same(autograd.gradients(loss, x), [2.0, 4.0])
        assert_same(autograd.buffer.get(x), [2.0 * passes, 4.0 * passes])
    autograd.backward(loss, gradient=-3.0)
    assert_same(autograd.buffer.get(x), [0.0, 0.0])
    assert x in autograd.buffer
    autograd.buffer.clear()
    assert x not in autograd.buffer


def test_every_active_tape_records():
    x = tape.Variable(3.0)
    with tape.Autograd() as outer:
        with tape.Autograd() as inner:
            squared = x * x
        loss = squared * x
    assert [operation.name for operation in inner.operations] == ["mul"]
    assert_same(inner.gradients(squared, x), 6.0)
    assert_same(outer.gradients(loss, x), 27.0)


def test_a_tape_goes_on_when_entered_again_and_stops_after_an_error():
    x = tape.Variable(3.0)
    autograd = tape.Autograd()
    with pytest.raises(RuntimeError, match="cannot be nested in itself"), autograd:
        squared = x * x
        with autograd:
            pass
    tape.exp(x)
    with autograd:
        loss = squared * x
    assert [operation.name for operation in autograd.operations] == ["mul", "mul"]
    assert_same(autograd.gradients(loss, x), 27.0)


def test_threads_have_their_own_tapes():
    both_active = threading.Barrier(2, timeout=10)
    found = {}

    def work(factor):
        x = tape.Variable(float(factor))
        with tape.Autograd() as autograd:
            both_active.wait()
            loss = x * x
            both_active.wait()
        found[factor] = len(autograd.operations), autograd.gradients(loss, x)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in (1, 2)]
    with tape.Autograd() as bystander:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert bystander.operations == []
    for factor in (1, 2):
        count, gradient = found[factor]
        assert count == 1
        assert_same(gradient, 2.0 * factor)


def test_gradients_are_those_of_the_values_the_forward_call_saw():
    x, y = tape.Variable([1.0, 2.0]), np.array([10.0, 20.0])
    with tape.Autograd() as autograd:
        loss = tape.sum(tape.reshape(x, shape=(2,)) * x * y)
    x.value += 100.0
    y[:] = 0.0
    assert_same(autograd.gradients(loss, x), [20.0, 80.0])


def test_what_a_tape_computed_is_read_only_and_parameters_stay_writable():
    x = tape.Variable([1.0, 2.0])
    with tape.Autograd():
        y = x.T
    with pytest.raises(ValueError, match="read-only"):
        y.value += 1.0
    x.value += 1.0
    assert_same(y.value, [1.0, 2.0])


def test_a_variable_holds_the_array_it_is_given():
    array = np.zeros(2)
    assert tape.Variable(array).value is array
    assert repr(tape.Variable(array)) == "Variable(shape=(2,), dtype=float64)"


def test_mixed_precision_gradients_have_the_dtype_of_their_variable():
    x = tape.Variable(np.ones(2, np.float32))
    with tape.Autograd() as autograd:
        loss = tape.sum(x * np.ones(2))
    assert loss.dtype == np.float64
    assert autograd.gradients(loss, x).dtype == np.float32


def test_integers_are_constants():
    x, count = tape.Variable([1.0, 2.0]), tape.Variable([3, 4])
    with tape.Autograd() as autograd:
        loss = tape.sum(x * count)
    assert autograd.operations[0].inputs == (x,)
    assert_same(autograd.gradients(loss, x), [3.0, 4.0])


def test_a_users_primitive_has_options_and_is_called_for_variables_only():
    @tape.primitive
    def scaled_product(a, b, *, scale=1.0):
        """Scale a product."""

        def for_nobody(g):
            raise AssertionError("b is a constant")

        return scale * a * b, lambda g: g * scale * b, for_nobody

    assert (scaled_product.__name__, scaled_product.__doc__) == (
        "scaled_product",
        "Scale a product.",
    )
    a = tape.Variable([1.0, 2.0])
    with tape.Autograd() as autograd:
        loss = tape.sum(scaled_product(a, np.array([3.0, 4.0]), scale=2.0))
    assert_same(autograd.gradients(loss, a), [6.0, 8.0])


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (np.ones(2), "(ndarray)"),
        ((np.ones(2),), "(ndarray)"),
        ((np.ones(2), abs, abs), "(ndarray, builtin_function_or_method, "),
        ((np.ones(2), np.ones(2)), "(ndarray, ndarray)"),
    ],
)
def test_a_primitive_with_the_wrong_number_of_vjps_is_named(result, got):
    @tape.primitive
    def faulty(x):
        return result

    with pytest.raises(TypeError) as error:
        faulty(np.ones(2))
    assert "primitive faulty must return a tuple of its value and one VJP" in str(error.value)
    assert "1 positional arguments, got " + got in str(error.value)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (np.ones(3), ValueError, r"gradient must have shape \(2,\), got \(3,\)"),
        (2.0, ValueError, r"gradient must have shape \(2,\), got \(\)"),
        ((np.ones(2), np.ones(2)), ValueError, r"gradient must have shape \(2,\), got \(2, 2\)"),
        (np.ones(2, int), TypeError, "gradient must be floating, got dtype int64"),
        (None, TypeError, "gradient must be floating, got dtype object"),
    ],
)
def test_a_vjp_that_returns_a_wrong_gradient_is_named(returned, error, message):
    @tape.primitive
    def faulty(x):
        return x, lambda g: returned

    x = tape.Variable([1.0, 2.0])
    with tape.Autograd() as autograd:
        loss = tape.sum(double(faulty(x)))
    prefix = r"vjp of faulty for an input of shape \(2,\): "
    with pytest.raises(error, match=prefix + message):
        autograd.backward(loss)
    assert loss not in autograd.buffer  # nothing was added


def test_a_vjp_cannot_write_to_the_gradient_it_is_given():
    @tape.primitive
    def greedy(x):
        def vjp(g):
            g *= 2
            return g

        return x, vjp

    x = tape.Variable(1.0)
    with tape.Autograd() as autograd:
        loss = greedy(x)
    with pytest.raises(ValueError, match="read-only"):
        autograd.backward(loss)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, x, y: t.backward(y), ValueError, r"loss must have shape \(\) .* got \(2,\)"),
        (lambda t, x, y: t.gradients(y, x), ValueError, r"loss must have shape \(\) .* got \(2,\)"),
        (lambda t, x, y: t.backward(x, np.ones(2)), ValueError, "loss must be computed on this"),
        (lambda t, x, y: t.backward(3.0), TypeError, "loss must be a Variable, got float"),
        (
            lambda t, x, y: t.backward(tape.Variable(1)),
            TypeError,
            "loss must be floating, got dtype int64",
        ),
        (
            lambda t, x, y: t.backward(y, gradient=np.ones(3)),
            ValueError,
            r"gradient must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda t, x, y: t.backward(y, gradient=[1, 2]),
            TypeError,
            "gradient must be floating, got dtype int64",
        ),
        (
            lambda t, x, y: t.gradients(double(y), {"n": tape.Variable([1])}),
            TypeError,
            r"wrt\['n'\] must be floating, got dtype int64",
        ),
        (
            lambda t, x, y: t.gradients(y, [x, 1.0]),
            TypeError,
            r"wrt\[1\] must be a Variable, got float",
        ),
        (
            lambda t, x, y: t.gradients(y, np.ones(2)),
            TypeError,
            "wrt must be a Variable, or a list or dict of Variables, got ndarray",
        ),
        (
            lambda t, x, y: t.buffer.accumulate(tape.Variable([1, 2]), np.ones(2)),
            TypeError,
            "variable must be floating, got dtype int64",
        ),
        (
            lambda t, x, y: tape.Variable([x, y]),
            TypeError,
            "value must be real numbers, got dtype object",
        ),
        (
            lambda t, x, y: y * 1j,
            TypeError,
            "operand of mul must be real numbers, got dtype complex128",
        ),
    ],
)
def test_errors_name_the_argument_and_change_nothing(call, error, message):
    x = tape.Variable([1.0, 2.0])
    with tape.Autograd() as autograd:
        y = double(x)
    with pytest.raises(error, match=message):
        call(autograd, x, y)
    assert len(autograd.operations) == 1
    assert x not in autograd.buffer
    assert y not in autograd.buffer
