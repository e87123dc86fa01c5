"""What a walk shows, and where it does not go: hooks, frozen variables, no_grad, detach."""

from __future__ import annotations

import numpy as np
import pytest

from portopt import tape


def test_hooks_see_finished_gradients_in_turn_and_replace_them():
    x, seen = tape.Variable(2.0), []
    with tape.Autograd() as autograd:
        h = x * 3.0
        loss = h * h + h

    def hook(name, factor=None):
        def call(gradient):
            seen.append((name, float(gradient)))
            return None if factor is None else gradient * factor

        return call

    first = h.register_hook(hook("first", 10.0))
    h.register_hook(hook("second"))
    x.register_hook(hook("x", 2.0))
    loss.register_hook(hook("loss"))
    assert autograd.gradients(loss, [h, x]) == [130.0, 780.0]
    assert seen == [("loss", 1.0), ("first", 13.0), ("second", 130.0), ("x", 390.0)]
    first.remove()
    first.remove()
    autograd.backward(loss)
    autograd.backward(loss)
    assert autograd.buffer.get(x) == 2 * 78.0


@pytest.mark.parametrize(
    ("hook", "error", "message"),
    [
        (lambda g: np.ones(3), ValueError, r"hook of Variable\(shape=\(2,\).*got \(3,\)"),
        (lambda g: [1, 2], TypeError, "hook of .*must be floating"),
        (lambda g: np.negative(g, out=g), ValueError, "read-only"),
    ],
)
def test_a_hook_that_returns_a_wrong_gradient_changes_nothing(hook, error, message):
    x = tape.Variable([1.0, 2.0])
    with tape.Autograd() as autograd:
        loss = tape.sum(x * x)
    x.register_hook(hook)
    with pytest.raises(error, match=message):
        autograd.backward(loss)
    assert x not in autograd.buffer


def test_a_frozen_variable_is_a_constant():
    w, frozen = tape.Variable(2.0), tape.Variable(5.0, requires_grad=False)
    with tape.Autograd() as autograd:
        unrecorded = frozen * frozen
        loss = w * unrecorded
    (operation,) = autograd.operations
    assert operation.inputs == (w,)
    assert operation.operands == (w, unrecorded)
    assert not unrecorded.requires_grad
    assert autograd.gradients(loss, w) == 25.0
    w.requires_grad, frozen.requires_grad = False, True
    with tape.Autograd() as autograd:
        loss = w * frozen
    assert autograd.gradients(loss, frozen) == 2.0


def test_whole_numbers_never_require_a_gradient():
    assert not tape.Variable([1, 2], requires_grad=True).requires_grad


def test_under_no_grad_only_a_tape_entered_there_records():
    x = tape.Variable(3.0)
    with tape.Autograd() as outer:
        with tape.no_grad():
            constant = x * x
            with tape.Autograd() as inner:
                square = x * x
        loss = x * constant
    assert not constant.requires_grad
    assert outer.gradients(loss, x) == 9.0
    assert inner.gradients(square, x) == 6.0
    assert len(outer.operations) == len(inner.operations) == 1


def test_no_grad_ends_with_an_error_and_decorates():
    x = tape.Variable(3.0)

    @tape.no_grad()
    def fail():
        raise KeyError(x * x)

    with tape.Autograd() as autograd:
        with pytest.raises(KeyError):
            fail()
        loss = x * x
    assert autograd.gradients(loss, x) == 6.0


def test_detach_shares_the_array_and_stops_the_gradient():
    x = tape.Variable(np.array([1.0, 3.0]))
    assert np.shares_memory(x.detach().value, x.value)
    assert not x.detach().requires_grad
    with tape.Autograd() as autograd:
        loss = tape.sum(x * (x * 2.0).detach())
    np.testing.assert_array_equal(autograd.gradients(loss, x), [2.0, 6.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t, x, w: t.gradients(x * w, [x, w]), ValueError, r"wrt\[1\] must require"),
        (lambda t, x, w: t.backward(w * w), ValueError, "a floating Variable that requires"),
        (lambda t, x, w: w.register_hook(print), RuntimeError, "that requires a gradient"),
    ],
)
def test_what_a_frozen_variable_cannot_do_is_an_error(call, error, message):
    x, w = tape.Variable(1.0), tape.Variable(2.0, requires_grad=False)
    with tape.Autograd() as autograd, pytest.raises(error, match=message):
        call(autograd, x, w)
    assert autograd.buffer.variables() == ()
