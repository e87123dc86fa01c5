"""What stands around a rule: each option and all together, against formulas, and at the edges."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from bits import assert_bits, awkward
from support import assert_agree, begun, gradients, rounded, weights
from test_program import read_and_run

from portopt import Around, Optimizer, Rule, TraceError, trace
from portopt.kernels import cpu
from portopt.rules import SGD, Adam, HyperparameterError, Momentum, Slots

SHAPES = {"w": (4, 5), "b": (37,), "scale": ()}
CLIPS = ({}, {"clip_value": 0.5}, {"clip_norm": 0.5}, {"clip_norm": 1e6})
OPTIONS = [
    Around(grad_scale=scale, **clip, skip_nonfinite=skip, ema_decay=decay, zero_grad=zero)
    for scale, clip, skip, decay, zero in itertools.product(
        (0.0, 3.0), CLIPS, (False, True), (0.0, 0.75), (False, True)
    )
]
ALL = Around(grad_scale=3.0, clip_norm=0.5, skip_nonfinite=True, ema_decay=0.75, zero_grad=True)


def params(dtype=np.float32):
    return {name: weights(shape, seed, dtype) for seed, (name, shape) in enumerate(SHAPES.items())}


def grads(steps, dtype=np.float32):
    """One dict of gradients a step."""
    made = {name: gradients(shape, steps, 9, dtype) for name, shape in SHAPES.items()}
    return [dict(zip(made, step, strict=True)) for step in zip(*made.values(), strict=True)]


def optimizer_of(rule, arrays, around):
    """Two groups, of two learning rates."""
    first, *rest = arrays
    return Optimizer(
        rule,
        [
            {"params": {first: arrays[first]}},
            {"params": {name: arrays[name] for name in rest}, "lr": rule.lr / 2},
        ],
        around=around,
    )


def rates(rule):
    return dict(zip(SHAPES, (rule.lr, rule.lr / 2, rule.lr / 2), strict=True))


def norm_of(given):
    return math.sqrt(math.fsum(float(x) ** 2 for g in given.values() for x in g.ravel()))


def formula(rule, around, t, param, grad, slots, norm):
    """One step in float64, as the docstring writes it."""
    if around.grad_scale:
        grad, norm = grad / around.grad_scale, norm / around.grad_scale
    if around.clip_value:
        grad = np.clip(grad, -around.clip_value, around.clip_value)
    if around.clip_norm:
        grad = grad * min(1.0, around.clip_norm / (norm + 1e-6))
    param, new = rule.step(np, t, param, grad, Slots(slots))
    if around.ema_decay:
        d = around.ema_decay
        new = {**new, "param_ema": d * slots["param_ema"] + (1 - d) * param}
    return param, new


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("around", OPTIONS, ids=lambda a: "-".join(map(str, vars(a).values())))
def test_every_combination(around, dtype):
    """Within rounding of the formula in float64."""
    rule, arrays = Momentum(lr=0.1, weight_decay=0.1), params(dtype)
    start = {name: array.astype(np.float64) for name, array in arrays.items()}
    slots = ("momentum_buffer", *around.slots)
    begin = {"momentum_buffer": 0.0, "param_ema": 1.0}
    exact = {
        k: (array, {slot: begin[slot] * array for slot in slots}) for k, array in start.items()
    }
    optimizer = optimizer_of(rule, arrays, around)
    for t, given in enumerate(grads(4, dtype), 1):
        norm = norm_of(given)
        before = copy.deepcopy(given)
        for name, lr in rates(rule).items():
            param, slots = exact[name]
            grad = given[name].astype(np.float64)
            exact[name] = formula(replace(rule, lr=lr), around, t, param, grad, slots, norm)
        optimizer.step(given)
        for name, grad in given.items():
            assert_bits(grad, 0 * np.abs(before[name]) if around.zero_grad else before[name])
    for name, (param, slots) in exact.items():
        kind = np.dtype(dtype).name
        assert_agree(arrays[name], param, kind, start=start[name], what=name)
        state = optimizer.state[name]
        assert list(state) == ["step", *slots]
        for slot, expected in slots.items():
            assert_agree(state[slot], expected, kind, what=slot)


def native_loop(around, arrays, steps, rule):
    """The same written by hand in NumPy, operation by operation, as a training loop has it."""
    buffers, averages = {}, dict(arrays) if around.ema_decay else {}
    for given in steps:
        factor = 1 / around.grad_scale if around.grad_scale else 1.0
        if around.skip_nonfinite and not all(np.isfinite(grad).all() for grad in given.values()):
            continue
        if around.clip_norm and norm_of(given) * factor + 1e-6 > around.clip_norm:
            excess = (norm_of(given) * factor + 1e-6) / around.clip_norm
            factor = factor / (1 + (excess - 1))
        for name, lr in rates(rule).items():
            grad = given[name]
            if around.grad_scale or around.clip_norm:
                grad = grad * factor
            if around.clip_value:
                grad = np.minimum(np.maximum(grad, -around.clip_value), around.clip_value)
            buffers[name] = rule.momentum * buffers.get(name, np.zeros_like(grad)) + grad
            arrays[name] = arrays[name] - lr * buffers[name]
            if around.ema_decay:
                change = (1 - around.ema_decay) * (arrays[name] - averages[name])
                averages[name] = averages[name] + change
    return arrays, averages


@pytest.mark.parametrize("around", OPTIONS, ids=lambda a: "-".join(map(str, vars(a).values())))
def test_as_written_by_hand(around):
    """Bit for bit, with a step that is not finite on the way where that is to be skipped."""
    rule, arrays, steps = Momentum(lr=0.1), params(), grads(4)
    if around.skip_nonfinite:
        steps[1]["b"][3] = np.inf
    expected, averages = native_loop(around, params(), copy.deepcopy(steps), rule)
    optimizer = optimizer_of(rule, arrays, around)
    for given in steps:
        optimizer.step(given)
    for name, array in expected.items():
        assert_bits(arrays[name], np.float32(array), name)
        if around.ema_decay:
            assert_bits(optimizer.state[name]["param_ema"], np.float32(averages[name]), name)


def test_around_every_rule(rule):
    """The kernel against `Around.step` on NumPy arrays, bit for bit, with awkward gradients."""
    around = replace(ALL, skip_nonfinite=False)
    rng, param = np.random.default_rng(0), weights(67)
    optimizer = Optimizer(rule, [param], around=around)
    expected = {"param": param.copy()}
    expected |= begun(rule, param)
    expected["param_ema"] = param.copy()
    expected |= rounded({name: rule.initial(name) for name in rule.numbers})
    for t, finite in enumerate((True, True, False), 1):
        grad = awkward(rng, 67, "float32")
        if finite:
            grad[~np.isfinite(grad)] = 2.0
            grad[np.abs(grad) > 10] = -0.0
        norm = math.sqrt((math.fsum if finite else sum)(float(x) ** 2 for x in grad))
        with np.errstate(all="ignore"):
            slots = Slots(expected)
            new, slots = around.step(rule, np, t, expected["param"], grad.copy(), slots, norm)
        expected = {"param": new, **slots}
        expected |= rounded({name: slots[name] for name in rule.numbers})
        optimizer.step([grad])
        actual = {"param": param, "grad": grad, **optimizer.state[0]}
        for name, array in expected.items():
            assert_bits(actual[name], array, name)


@pytest.mark.parametrize("around", OPTIONS, ids=lambda a: "-".join(map(str, vars(a).values())))
def test_what_is_printed_is_what_is_computed(around):
    rule = Adam(lr=0.1, weight_decay=0.1)
    program = trace(rule, around)
    values = {**vars(rule), **vars(around), "grad_norm": 7.0}
    names = program.operands
    arrays = {name: weights(23, seed) ** 2 for seed, name in enumerate(names)}
    for t in (1, 2):
        expected = program.run(np, program.scalars(values, t), arrays)
        actual = read_and_run(str(program), values, t, arrays)
        assert list(actual) == list(expected)
        for name, array in expected.items():
            assert_bits(np.broadcast_to(actual[name], 23), array, name)


def test_nothing_around_is_the_rule_itself(rule):
    assert trace(rule, Around()) is trace(rule)


# The norm


def test_the_norm_is_of_all_groups_together_and_of_no_others():
    """A gradient of 3 in one group and of 4 in another are 5; None is nothing."""
    arrays = [np.zeros(1), np.zeros(1), np.ones(1)]
    groups = [{"params": arrays[:1]}, {"params": arrays[1:], "lr": 0.5}]
    optimizer = Optimizer(SGD(lr=1.0), groups, around=Around(clip_norm=1.0))
    optimizer.step([np.array([3.0]), np.array([4.0]), None])
    assert_agree(np.concatenate(arrays), [-3 / (5 + 1e-6), -2 / (5 + 1e-6), 1.0], "float64")
    assert 2 not in optimizer.state


@pytest.mark.parametrize("clip_norm", [5.0, 5.000001, 6.0, 1e300])
def test_a_smaller_norm_is_left_alone(clip_norm):
    param = np.zeros(2)
    around = Around(clip_norm=clip_norm + 1e-6)
    Optimizer(SGD(lr=1.0), [param], around=around).step([np.array([3.0, 4.0])])
    assert_agree(param, [-3.0, -4.0], "same")


def test_no_gradients_have_a_norm_too():
    param = np.ones(2)
    Optimizer(SGD(), [param], around=Around(clip_norm=1.0)).step([None])
    Optimizer(SGD(), [param], around=Around(clip_norm=1e-9)).step([np.zeros(2)])
    assert_agree(param, np.ones(2), "same")


def test_steps_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(cpu, "SPAN", 100)
    monkeypatch.setattr(cpu, "ALONE", 0)
    found = []
    for threads in ("1", "2", "4"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        param = weights(5000)
        optimizer = Optimizer(Adam(lr=0.1), [param], around=replace(ALL, zero_grad=False))
        for grad in gradients(5000, 3):
            optimizer.step([grad])
        found.append(param)
    assert_bits(found[1], found[0])
    assert_bits(found[2], found[0])


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (np.nan, [np.nan, np.nan]),
        (np.inf, [np.nan, 1.0]),  # the norm is infinite, and the factor 0
        (-np.inf, [np.nan, 1.0]),
        (1e200, [1.0, 1.0]),  # its square is beyond float64
    ],
)
def test_norms_that_are_not_finite(bad, expected):
    """As with ``clip_grad_norm_``."""
    param = np.ones(2)
    Optimizer(SGD(), [param], around=Around(clip_norm=1.0)).step([np.array([bad, 1.0])])
    assert_agree(param, expected, "same")


# Steps that are skipped


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("where", SHAPES)
def test_a_skipped_step_changes_nothing_and_counts_nothing(bad, where, zero_grad):
    arrays, (spoiled, first, second) = params(), grads(3)
    optimizer = optimizer_of(Adam(lr=0.1), arrays, replace(ALL, zero_grad=zero_grad))
    spoiled[where][...] = bad

    def everything():
        return copy.deepcopy([arrays, optimizer.param_groups, optimizer.state])

    def check_skipped():
        before, given = everything(), copy.deepcopy(spoiled)
        optimizer.step(given)
        for name in SHAPES:
            assert_bits(given[name], np.zeros_like(given[name]) if zero_grad else spoiled[name])
            assert_bits(arrays[name], before[0][name])
        assert str(everything()) == str(before)

    check_skipped()
    assert optimizer.state == {}
    average = arrays["w"].copy()
    optimizer.step(first)
    assert optimizer.state["w"]["step"] == 1
    average += np.float32(0.25) * (arrays["w"] - average)
    assert_bits(optimizer.state["w"]["param_ema"], average)
    check_skipped()
    optimizer.step(second)
    assert [state["step"] for state in optimizer.state.values()] == [2, 2, 2]


def test_without_skipping_nan_goes_through():
    param = np.ones(2)
    around = Around(clip_value=1.0, ema_decay=0.5, zero_grad=True)
    optimizer = Optimizer(SGD(lr=0.5), [param], around=around)
    optimizer.step([np.array([np.nan, np.inf])])
    assert_agree(param, [np.nan, 0.5], "same")
    assert_agree(optimizer.state[0]["param_ema"], [np.nan, 0.75], "same")


# The average


def test_the_average_begins_with_each_parameter_before_its_own_first_step():
    arrays = {"early": weights(5), "late": weights(5, 2)}
    averages = {name: array.copy() for name, array in arrays.items()}
    optimizer = Optimizer(Adam(lr=0.1), arrays, around=Around(ema_decay=0.75))
    for grad, names in zip(gradients(5, 3), (["early"], list(arrays), list(arrays)), strict=True):
        optimizer.step({name: grad if name in names else None for name in arrays})
        for name in names:
            averages[name] += np.float32(0.25) * (arrays[name] - averages[name])
            assert_bits(optimizer.state[name]["param_ema"], averages[name])
    assert list(optimizer.state) == list(arrays)


def test_an_average_may_begin_later():
    param = weights(5)
    optimizer = Optimizer(Adam(lr=0.1), [param])
    first, second = gradients(5, 2)
    optimizer.step([first])
    average, optimizer.around = param.copy(), Around(ema_decay=0.75)
    optimizer.step([second])
    average += np.float32(0.25) * (param - average)
    assert_bits(optimizer.state[0]["param_ema"], average)


def test_the_average_is_saved_and_loaded():
    around, steps = Around(ema_decay=0.75), grads(4)
    arrays = params()
    optimizer = optimizer_of(Adam(lr=0.1), arrays, around)
    for given in steps[:2]:
        optimizer.step(given)
    again = copy.deepcopy(arrays)
    resumed = optimizer_of(Adam(lr=0.1), again, around)
    resumed.load_state_dict(optimizer.state_dict())
    for given in steps[2:]:
        optimizer.step(given)
        resumed.step(given)
    for name in SHAPES:
        assert_bits(again[name], arrays[name])
        ours, theirs = resumed.state[name], optimizer.state[name]
        assert list(ours) == list(theirs) == ["step", "exp_avg", "exp_avg_sq", "param_ema"]
        assert_bits(ours["param_ema"], theirs["param_ema"])
    with pytest.raises(ValueError, match=r"must have step and the slots \['exp_avg', 'exp_avg_sq'"):
        optimizer_of(Adam(lr=0.1), params(), Around()).load_state_dict(optimizer.state_dict())


# Gradients afterwards


@pytest.mark.parametrize("rule", [SGD(), SGD(maximize=True, weight_decay=0.5), Adam()], ids=repr)
def test_all_gradients_are_positive_zeros_afterwards(rule):
    grad = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-40, -3.0] * 5, np.float32)
    Optimizer(rule, [np.ones(40, np.float32)], around=Around(zero_grad=True)).step([grad])
    assert_bits(grad, np.zeros(40, np.float32))


def test_a_read_only_gradient_cannot_be_zeroed():
    arrays, (given,) = params(), grads(1)
    given["scale"].flags.writeable = False
    before = copy.deepcopy([arrays, given])
    optimizer = optimizer_of(Adam(), arrays, ALL)
    with pytest.raises(ValueError, match=r"^grads\['scale'\] must be writable for zero_grad"):
        optimizer.step(given)
    assert str([arrays, given]) == str(before) and optimizer.state == {}
    optimizer.around = replace(ALL, zero_grad=False)
    optimizer.step(given)


# What is refused


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"grad_scale": -1.0}, ValueError, r"grad_scale must be in \[0, inf\), got -1.0"),
        ({"grad_scale": math.inf}, ValueError, r"grad_scale must be in \[0, inf\), got inf"),
        ({"grad_scale": math.nan}, ValueError, r"grad_scale must be in \[0, inf\), got nan"),
        ({"clip_value": -0.5}, ValueError, r"clip_value must be in \[0, inf\), got -0.5"),
        ({"clip_norm": math.inf}, ValueError, r"clip_norm must be in \[0, inf\), got inf"),
        ({"clip_norm": "1"}, TypeError, r"clip_norm must be a real number in \[0, inf\), got '1'"),
        ({"clip_norm": None}, TypeError, "clip_norm must be a real number"),
        ({"clip_value": True}, TypeError, "clip_value must be a real number"),
        ({"ema_decay": 1.0}, ValueError, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, ValueError, r"ema_decay must be in \[0, 1\), got -0.1"),
        ({"skip_nonfinite": 1}, TypeError, "skip_nonfinite must be True or False, got 1"),
        ({"zero_grad": None}, TypeError, "zero_grad must be True or False, got None"),
        (
            {"clip_norm": 1.0, "clip_value": 2.0},
            ValueError,
            "clip_norm must be 0 with a clip_value, got 1.0",
        ),
        ({"clip": 1.0}, TypeError, ".*unexpected keyword argument 'clip'"),
    ],
)
def test_values_that_are_refused(values, error, words):
    with pytest.raises(error, match=f"^{words}") as caught:
        Around(**values)
    assert isinstance(caught.value, HyperparameterError) or "clip" in values


@pytest.mark.parametrize("given", [Around, "clip", {"clip_norm": 1.0}, SGD(), 1.0])
def test_around_must_be_an_around(given):
    with pytest.raises(TypeError, match=r"^around must be a portopt.Around or None, got"):
        Optimizer(SGD(), [np.ones(2)], around=given)


@dataclass(frozen=True, kw_only=True)
class Clipped(Rule):
    """A rule with names of `Around`'s."""

    lr: float = 0.5
    clip_norm: float = 2.0
    slots = ("param_ema",)

    def update(self, xp, t, param, grad, slot):
        return param - self.clip_norm * grad, {"param_ema": slot.param_ema + grad}


@pytest.mark.parametrize(
    ("around", "words"),
    [
        (Around(clip_norm=1.0), "hyperparameter of a name that Around has too: clip_norm"),
        (Around(ema_decay=0.5), "slot named 'param_ema'"),
    ],
)
def test_names_that_a_rule_has_too(around, words):
    param = np.ones(2)
    optimizer = Optimizer(Clipped(), [param], around=around)
    with pytest.raises(TraceError, match=words):
        optimizer.step([np.ones(2)])
    assert optimizer.state == {}
    optimizer.around = Around(grad_scale=2.0, skip_nonfinite=True)
    optimizer.step([np.ones(2)])
    assert_agree(param, [0.0, 0.0], "same")


@pytest.mark.parametrize("name", ["grad_norm", "grad_scale", "ema_decay"])
def test_slots_of_a_name_that_around_has(name):
    class Slotted(SGD):
        slots = (name,)

        def update(self, xp, t, param, grad, slot):
            return param - grad, {name: slot[name] + grad}

    with pytest.raises(TraceError, match=f"has a slot named '{name}'"):
        trace(Slotted(), replace(ALL))
    assert trace(Slotted()).slots == (name,)


def test_around_can_change_between_steps():
    param, state = np.zeros(2), []
    optimizer = Optimizer(SGD(lr=1.0), [param])
    for around in (Around(), Around(clip_value=0.5), Around(grad_scale=2.0, zero_grad=True)):
        optimizer.around = around
        grad = np.array([1.0, -1.0])
        optimizer.step([grad])
        state.append((param[0], grad[0]))
    assert state == [(-1.0, 1.0), (-1.5, 1.0), (-2.0, 0.0)]
