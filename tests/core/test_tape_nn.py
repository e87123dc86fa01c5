"""Layers and losses: parameters, the intended training loop, torch's gradients, errors."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from portopt import tape

TOLERANCES = {np.float32: (1e-4, 1e-6), np.float64: (1e-10, 1e-12)}  # rtol, atol against torch
ACTIVATIONS = [tape.Identity, tape.Sigmoid, tape.Tanh, tape.ReLU]


def data(dtype, features=6, classes=3, batch=16):
    rng = np.random.default_rng(1)
    return rng.normal(size=(batch, features)).astype(dtype), rng.integers(0, classes, batch)


def test_parameters_are_named_writable_owned_and_initialised_in_range():
    model = tape.MLP([64, 128, 10], rng=np.random.default_rng(0))
    params = model.parameters()
    assert {name: p.shape for name, p in params.items()} == {
        "0.weight": (128, 64),
        "0.bias": (128,),
        "1.weight": (10, 128),
        "1.bias": (10,),
    }
    for name, p in params.items():
        bound = (64 if name.startswith("0") else 128) ** -0.5
        assert p.dtype == np.float32
        assert p.value.flags.owndata and p.value.flags.writeable
        assert 0.8 * bound < np.abs(p.value).max() <= bound
    again = tape.MLP([64, 128, 10], rng=np.random.default_rng(0)).parameters()
    assert all((again[name].value == p.value).all() for name, p in params.items())
    assert list(tape.Linear(2, 3, bias=False).parameters()) == ["weight"]
    assert tape.ReLU().parameters() == {}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_intended_loop_reduces_the_loss_in_float32(activation):
    x, y = data(np.float32)
    model = tape.MLP([6, 16, 3], activation, rng=np.random.default_rng(0))
    params = model.parameters()
    arrays = {name: p.value for name, p in params.items()}
    losses = []
    for _ in range(30):
        with tape.Autograd() as autograd:
            loss = tape.softmax_cross_entropy(model(x), y)
        grads = autograd.gradients(loss, params)
        assert list(grads) == list(arrays)
        for name in arrays:
            assert grads[name].dtype == np.float32
            arrays[name] -= 0.1 * grads[name]
        losses.append(loss.value)
    assert all(operation.output.dtype == np.float32 for operation in autograd.operations)
    assert all(params[name].value is arrays[name] for name in arrays)
    assert all(after < before for before, after in pairwise(losses))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_gradients_are_those_of_torch(activation, dtype):
    torch = pytest.importorskip("torch")
    x, y = data(dtype)
    model = tape.MLP([6, 8, 5, 3], activation, rng=np.random.default_rng(2), dtype=dtype)
    params = model.parameters()

    linears = [torch.nn.Linear(i, o) for i, o in ((6, 8), (8, 5), (5, 3))]
    between = getattr(torch.nn, activation.__name__)()
    twin = torch.nn.Sequential(linears[0], between, linears[1], between, linears[2])
    twin.to(getattr(torch, np.dtype(dtype).name))
    twins = [p for linear in linears for p in (linear.weight, linear.bias)]
    for mine, other in zip(params.values(), twins, strict=True):
        other.data.copy_(torch.tensor(mine.value))

    with tape.Autograd() as autograd:
        loss = tape.softmax_cross_entropy(model(x), y)
    wanted = torch.nn.functional.cross_entropy(twin(torch.tensor(x)), torch.tensor(y))
    wanted.backward()
    rtol, atol = TOLERANCES[dtype]
    np.testing.assert_allclose(loss.value, wanted.item(), rtol, atol)
    for mine, other in zip(autograd.gradients(loss, params).values(), twins, strict=True):
        np.testing.assert_allclose(mine, other.grad.numpy(), rtol, atol)


def test_labels_changed_after_the_forward_call_do_not_matter():
    x, y = data(np.float64)
    logits = tape.Variable(x[:, :3])
    with tape.Autograd() as autograd:
        loss = tape.softmax_cross_entropy(logits, y)
    before = autograd.gradients(loss, logits)
    y[:] = 0
    assert (autograd.gradients(loss, logits) == before).all()


LOGITS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tape.Linear(0, 3), ValueError, "in_features must be at least 1, got 0"),
        (lambda: tape.Linear(3, 2.0), TypeError, "out_features must be an integer, got 2.0"),
        (lambda: tape.Linear(3, True), TypeError, "out_features must be an integer, got True"),
        (
            lambda: tape.Linear(3, 2, dtype=int),
            TypeError,
            "dtype must be floating, got dtype int64",
        ),
        (lambda: tape.MLP([4]), ValueError, r"sizes must hold at least two sizes, got \[4\]"),
        (lambda: tape.MLP([4, -1, 2]), ValueError, r"sizes\[1\] must be at least 1, got -1"),
        (lambda: tape.MLP([4, 2], tape.relu), TypeError, "must be a Layer class such as ReLU, got"),
        (lambda: tape.MLP([4, 2], tape.ReLU()), TypeError, "must be a Layer class such as ReLU"),
        (
            lambda: tape.MLP([4, 2])(np.ones((5, 3))),
            ValueError,
            r"x must have shape \(\.\.\., 4\), got \(5, 3\)",
        ),
        (
            lambda: tape.softmax_cross_entropy(LOGITS[0], [0, 1]),
            ValueError,
            r"logits must have shape \(batch, classes\), not empty, got \(3,\)",
        ),
        (
            lambda: tape.softmax_cross_entropy(LOGITS, [0.0, 1.0]),
            TypeError,
            "labels must be integers, got dtype float64",
        ),
        (
            lambda: tape.softmax_cross_entropy(LOGITS, [[0, 1]]),
            ValueError,
            r"labels must have shape \(2,\), got \(1, 2\)",
        ),
        (
            lambda: tape.softmax_cross_entropy(LOGITS, [0, 3]),
            ValueError,
            r"labels must be in \[0, 3\), got 3",
        ),
        (
            lambda: tape.softmax_cross_entropy(LOGITS, [-1, 0]),
            ValueError,
            r"labels must be in \[0, 3\), got -1",
        ),
        (
            lambda: tape.mean_squared_error(LOGITS, np.zeros(3)),
            ValueError,
            r"target must have the shape of prediction \(2, 3\), got \(3,\)",
        ),
        (
            lambda: tape.mean_squared_error(LOGITS[:0], LOGITS[:0]),
            ValueError,
            r"prediction must not be empty, got shape \(0, 3\)",
        ),
    ],
)
def test_errors_name_the_argument_the_value_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
