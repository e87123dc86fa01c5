"""Rules that look at the shape of a parameter, Adafactor and Muon, and how they are traced."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import Rowwise, assert_agree, begun, gradients, numbered, weights

from portopt import Optimizer, Rule, trace
from portopt.rules import SGD, Adafactor, Muon, Slots
from portopt.trace import TraceError

SHAPES = {Adafactor: [(4, 6), (6, 4), (7,), (), (2, 3, 4), (0, 3)], Muon: [(4, 6), (6, 4), (1, 3)]}
STEPS = 5


def op_by_op(rule, shape):
    param = weights(shape)
    slots = begun(rule, param)
    for t, grad in enumerate(gradients(shape, STEPS), 1):
        param, slots = rule.step(np, t, param, grad, Slots(slots))
    return {"param": param, **slots}


def test_op_by_op_interpreted_and_optimizer_give_the_same_bits(by_shape):
    for rule in by_shape:
        for shape in SHAPES[type(rule)]:
            expected = op_by_op(rule, shape)
            program, arrays = trace(rule, shape=shape), {"param": weights(shape)}
            arrays |= begun(rule, arrays["param"])
            param = weights(shape)
            optimizer = Optimizer(rule, [param])
            for t, grad in enumerate(gradients(shape, STEPS), 1):
                scalars = program.scalars(numbered(rule), t)
                with np.errstate(all="ignore"):
                    arrays = program.run(np, scalars, {**arrays, "grad": grad})
                optimizer.step([grad])
            stepped = {**optimizer.state[0], "param": param}
            for name, array in expected.items():
                assert_agree(arrays[name], array, "same", what=f"{rule} {shape} {name}")
                assert_agree(stepped[name], array, "same", what=f"{rule} {shape} {name}")


def test_every_rule_keeps_to_the_standard(by_shape):
    xp = pytest.importorskip("array_api_strict")
    for rule in by_shape:
        for shape in SHAPES[type(rule)]:
            param = xp.asarray(weights(shape))
            slots = {k: xp.asarray(x) for k, x in begun(rule, weights(shape)).items()}
            for t, grad in enumerate(gradients(shape, STEPS), 1):
                param, slots = rule.step(xp, t, param, xp.asarray(grad), Slots(slots))
            assert_agree(np.asarray(param), op_by_op(rule, shape)["param"], "float32")


def test_a_slot_of_another_shape_goes_through_no_kernel():
    assert not trace(Rowwise(), shape=(4, 6)).elementwise
    assert trace(Rowwise(), shape=(1, 6)).elementwise
    param = weights((4, 6))
    optimizer = Optimizer(Rowwise(), [param])
    for grad in gradients((4, 6), STEPS):
        optimizer.step([grad])
    expected = op_by_op(Rowwise(), (4, 6))
    assert_agree(param, expected["param"], "same")
    assert_agree(optimizer.state[0]["row"], expected["row"], "same")


def test_adafactor_keeps_a_row_and_a_column():
    assert Adafactor().slot_shapes((2, 3, 4)) == {"row_var": (2, 3, 1), "col_var": (2, 1, 4)}
    assert Adafactor().slot_shapes((5,)) == {"variance": (5,)}


def test_adafactor_steps_by_the_size_of_the_parameter():
    """Twice the parameter moves twice as far, whatever the gradient's size."""
    moved = []
    for scale in (1.0, 2.0):
        param = scale * weights((8, 8), dtype=np.float64)
        start = param.copy()
        Optimizer(Adafactor(lr=0.5), [param]).step([scale**3 * np.ones((8, 8))])
        moved.append(param - start)
    assert_agree(2 * moved[0], moved[1], "float64")


@pytest.mark.parametrize("shape", [(5, 5), (8, 3), (3, 8)])
def test_muon_moves_by_a_matrix_with_equal_singular_values(shape):
    # With the coefficients of Newton's own iteration it converges; with the defaults, to near 1.
    rule = Muon(lr=1.0, weight_decay=0.0, adjust_lr_fn="constant")
    for exact, low, high in ((True, 1 - 1e-6, 1 + 1e-6), (False, 0.5, 1.5)):
        newton = {"ns_a": 1.5, "ns_b": -0.5, "ns_c": 0.0, "ns_steps": 60} if exact else {}
        param = np.zeros(shape)
        grad = np.random.default_rng(0).standard_normal(shape)
        Optimizer(replace(rule, **newton), [param]).step([grad])
        values = np.linalg.svd(param, compute_uv=False)
        assert np.all((low < values) & (values < high)), values
        assert np.sum(param * grad) < 0  # downhill


def test_muon_takes_matrices_alone():
    params = [np.ones((2, 2)), np.ones(3)]
    with pytest.raises(ValueError, match=r"only supports 2D parameters, got one of shape \(3,\)"):
        Optimizer(Muon(), params)
    optimizer = Optimizer(Muon(), params[:1])
    with pytest.raises(ValueError, match=r"only supports 2D parameters, got one of shape \(3,\)"):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (-1, r"ns_steps must be a whole number in \[0, 100\), got -1"),
        (100, r"ns_steps must be a whole number in \[0, 100\), got 100"),
        (2.0, r"ns_steps must be a whole number in \[0, 100\), got 2.0"),
        (True, r"ns_steps must be a whole number in \[0, 100\), got True"),
    ],
)
def test_whole_numbers_are_checked(steps, words):
    with pytest.raises(ValueError, match=words):
        Muon(ns_steps=steps)
    assert Muon(ns_steps=np.int64(3)).ns_steps == 3


def test_state_of_a_shape_goes_through_save_and_load():
    runs = []
    for stop in (None, 2):
        params = {"w": weights((4, 6)), "b": weights((5,))}
        optimizer = Optimizer(Adafactor(), params)
        for t, grads in enumerate(zip(gradients((4, 6), 4), gradients((5,), 4), strict=True)):
            if t == stop:
                saved = optimizer.state_dict()
                optimizer = Optimizer(Adafactor(lr=1.0), params)
                optimizer.load_state_dict(saved)
            optimizer.step(dict(zip("wb", grads, strict=True)))
        runs.append(params)
    for name in "wb":
        assert_agree(runs[1][name], runs[0][name], "same")
    saved["state"]["w"]["row_var"] = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match=r"\['row_var'\] must have shape \(4, 1\), got \(4, 6\)"):
        optimizer.load_state_dict(saved)


@dataclass(frozen=True, kw_only=True)
class Shaped(Rule):
    """What a test makes `rule.do` of goes into the parameter."""

    by_shape = True
    lr: float = 0.5
    slots = ("b",)

    def update(self, xp, t, param, grad, slot):
        new = type(self).do(xp, param, slot.b)
        return new, {"b": slot.b + 1}


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda xp, p, b: p @ b, r"matmul of arrays of shape \(3, 2\) and \(3, 2\): 2 columns and"),
        (lambda xp, p, b: xp.matrix_transpose(p), r"return param of shape \(3, 2\), returned \(2,"),
        (lambda xp, p, b: xp.sum(p), r"must return param of shape \(3, 2\), returned \(\)"),
        (lambda xp, p, b: p + xp.matrix_transpose(b), "add of arrays of shape"),
        (lambda xp, p, b: xp.sum(p, axis=2, keepdims=True), "range object index out of range"),
        (lambda xp, p, b: xp.sum(p, axis=0), "axis=0 and keepdims=False: it sums all elements, or"),
        (lambda xp, p, b: p * (xp.sum(p).shape[0]), "tuple index out of range"),
    ],
)
def test_shapes_are_checked_while_tracing(do, words):
    rule = type("Custom", (Shaped,), {"do": staticmethod(do)})()
    with pytest.raises(TraceError, match=words):
        trace(rule, shape=(3, 2))


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda xp, p: p * len(p.shape), r"asks for the shape of param: only of arrays, and with"),
        (
            lambda xp, p: p @ p,
            r"computes matmul\(param, param\): only a rule with `by_shape = True",
        ),
        (lambda xp, p: p - xp.sum(p, axis=0, keepdims=True), "computes sum_axis"),
    ],
)
def test_only_a_rule_that_says_so_looks_at_shapes(do, words):
    update = lambda self, xp, t, param, grad, slot: (do(xp, param), {})  # noqa: E731
    with pytest.raises(TraceError, match=words):
        trace(type("Custom", (SGD,), {"update": update})())


def test_only_a_rule_that_says_so_has_slots_of_other_shapes():
    rule = type("Custom", (Rowwise,), {"by_shape": False})()
    with pytest.raises(TraceError, match="Custom has slot_shapes without `by_shape = True`"):
        trace(rule)


def test_a_program_is_traced_once_for_a_shape():
    assert trace(Adafactor(), shape=(4, 3)) is trace(Adafactor(lr=0.5), shape=[4, 3])
    assert trace(Adafactor(), shape=(4, 3)) is not trace(Adafactor(), shape=(3, 4))
    assert trace(SGD(), shape=(4, 3)) is trace(SGD(), shape=(3, 4))
    text = str(trace(Muon(ns_steps=1), shape=(2, 3)))
    assert "of whole arrays:" in text
    assert re.search(r"gram = (x\d+) @ matrix_transpose\(\1\)\n", text)
