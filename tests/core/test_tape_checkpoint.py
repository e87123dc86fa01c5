"""Checkpointing: the plain tape's bits, in less memory, for one more forward pass."""

from __future__ import annotations

import math
import weakref

import numpy as np
import pytest

from portopt import tape


class Chain:
    """Steps to repeat, which count their calls and the arrays of their values that are alive."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = tape.Variable(rng.standard_normal(3).astype(np.float32))
        self.w = tape.Variable(rng.uniform(0.9, 1.1, 3).astype(np.float32))
        self.calls = self.held = self.peak = 0

    def steps(self, n):
        both = lambda h: self.count(tape.sin(h)), lambda h: self.count(h * self.w)
        return [both[place % 2] for place in range(n)]

    def count(self, h):
        self.calls += 1
        array = h.value if h.value.base is None else h.value.base
        weakref.finalize(array, self.release)
        self.held += 1
        self.peak = max(self.peak, self.held)
        return h

    def release(self):
        self.held -= 1

    def gradients(self, n, apply):
        with tape.Autograd() as autograd:
            scale = self.x * self.w  # used before and after, as in a larger network
            loss = tape.sum(apply(self.steps(n), scale) * scale)
        return loss.value, *autograd.gradients(loss, [self.x, self.w])


def plainly(functions, h):
    for function in functions:
        h = function(h)
    return h


@pytest.mark.parametrize("n", [1, 2, 9, 10, 10_000])
def test_it_holds_few_values_and_gives_the_bits_of_the_plain_tape(n):
    plain, less = Chain(), Chain()
    wanted, got = plain.gradients(n, plainly), less.gradients(n, tape.checkpoint)
    for a, b in zip(wanted, got, strict=True):
        assert a.tobytes() == b.tobytes()
    assert plain.peak == plain.calls == n
    assert less.calls == 2 * n
    assert less.peak <= 3 * math.sqrt(n)
    assert plain.held == less.held == 0


def test_a_chain_of_chains():
    def inner(h):
        return tape.checkpoint(chain.steps(8), h)

    chain, plain = Chain(), Chain()
    got = chain.gradients(8, lambda functions, h: tape.checkpoint([inner] * 8, h))
    wanted = plain.gradients(64, plainly)
    for a, b in zip(wanted, got, strict=True):
        assert a.tobytes() == b.tobytes()


def test_hooks_are_called_once_and_passes_accumulate():
    chain, seen = Chain(), []

    def shown(h):
        out = h * chain.w
        out.register_hook(seen.append)
        return out

    with tape.Autograd() as autograd:
        y = tape.checkpoint([shown] * 10, chain.x)
        loss = tape.sum(y)
    handle = chain.w.register_hook(seen.append)
    autograd.backward(loss)
    assert len(seen) == 11
    handle.remove()
    autograd.backward(loss)
    once = autograd.gradients(loss, chain.w)
    np.testing.assert_array_equal(autograd.buffer.get(chain.w), once + once)
    assert set(autograd.buffer.variables()) == {chain.x, chain.w, y, loss}


@pytest.mark.parametrize("place", range(5))
def test_a_function_may_return_what_it_was_given_a_parameter_or_a_constant(place):
    x, w = tape.Variable(3.0), tape.Variable(2.0)
    for odd in (lambda h: h, lambda h: w, lambda h: h.detach()):
        functions = [lambda h: h * w] * 5
        functions[place] = odd
        results = []
        for apply in (plainly, tape.checkpoint):
            with tape.Autograd() as autograd:
                loss = apply(functions, x) * w
            results.append(autograd.gradients(loss, [x, w]))
        assert results[0] == results[1]


def test_a_chain_that_returns_a_parameter_and_computes_nothing():
    frozen, w = tape.Variable(3.0, requires_grad=False), tape.Variable(2.0)
    with tape.Autograd() as autograd:
        loss = tape.checkpoint([lambda h: w], frozen) * 4.0
    assert loss.requires_grad and autograd.gradients(loss, w) == 4.0


def test_segments_that_no_gradient_reaches_are_not_computed_again():
    chain = Chain()
    functions = chain.steps(100)
    functions[50] = lambda h: h.detach()
    with tape.Autograd() as autograd:
        loss = tape.sum(tape.checkpoint(functions, chain.x))
    chain.calls = 0
    autograd.gradients(loss, chain.w)
    assert chain.calls == 49


def test_without_a_tape_or_a_gradient_nothing_is_recorded():
    x = tape.Variable(2.0)
    assert tape.checkpoint([tape.exp] * 2, x).value == np.exp(np.exp(2.0))
    with tape.Autograd() as autograd:
        y = tape.checkpoint([tape.exp], 2.0)
    assert not autograd.operations
    assert not y.requires_grad


def test_a_function_that_returns_another_value_is_an_error():
    w = tape.Variable(np.array(2.0))
    with tape.Autograd() as autograd:
        loss = tape.checkpoint([lambda h: h * w] * 4, tape.Variable(1.0))
    w.value += 1.0
    with pytest.raises(RuntimeError, match="what it reads has changed"):
        autograd.backward(loss)
    assert autograd.buffer.variables() == ()


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ([], ValueError, "functions must hold at least one"),
        ([tape.exp, 3], TypeError, r"functions\[1\] must be callable, got 3"),
        ([tape.exp, lambda h: 3.0], TypeError, "must return a Variable, got float"),
    ],
)
def test_what_is_no_chain_is_an_error(functions, error, message):
    with tape.Autograd() as autograd, pytest.raises(error, match=message):
        tape.checkpoint(functions, tape.Variable(1.0))
    assert not autograd.operations
