"""`portopt.Optimizer`: groups, gradients, state, and what it refuses with nothing changed."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
from support import assert_agree, begun, gradients, weights

import portopt.optimizer
from portopt import Around, Optimizer, Rule, TraceError, trace
from portopt.kernels import slow
from portopt.rules import SGD, Adam, HyperparameterError, Momentum, RMSprop, Slots

SHAPES = {"w": (4, 5), "b": (5,), "scale": ()}


def params(dtype=np.float32):
    return {name: weights(shape, seed, dtype) for seed, (name, shape) in enumerate(SHAPES.items())}


def grads(steps, dtype=np.float32):
    """One dict of gradients a step."""
    made = {name: gradients(shape, steps, 9, dtype) for name, shape in SHAPES.items()}
    return [dict(zip(made, step, strict=True)) for step in zip(*made.values(), strict=True)]


def assert_same(actual, expected):
    """Equal dicts, lists and values; arrays bit for bit, and of one dtype."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, np.ndarray):
        assert actual.dtype == expected.dtype
        assert actual.tobytes() == expected.tobytes() or np.isnan(expected).any()
        assert_agree(actual, expected, "same")
    else:
        assert actual == expected


def snapshot(optimizer):
    return copy.deepcopy([optimizer.param_groups, optimizer.state])


def assert_unchanged(optimizer, before):
    assert_same([optimizer.param_groups, optimizer.state], before)


def trained(rule, steps=3, dtype=np.float32):
    arrays = params(dtype)
    optimizer = Optimizer(rule, arrays)
    for grad in grads(steps, dtype):
        optimizer.step(grad)
    return optimizer, arrays


# Ways to say the parameters


def test_list_dict_generator_and_groups_are_one():
    rule, steps = Adam(lr=0.1, amsgrad=True), grads(3)
    _, expected = trained(rule)
    ways = [
        lambda p: Optimizer(rule, p),
        lambda p: Optimizer(rule, list(p.values())),
        lambda p: Optimizer(rule, tuple(p.values())),
        lambda p: Optimizer(rule, (array for array in p.values())),
        lambda p: Optimizer(rule, [{"params": p}]),
        lambda p: Optimizer(replace(rule, lr=9.0), [{"params": list(p.values()), "lr": 0.1}]),
        lambda p: Optimizer(
            rule, [{"params": {"w": p["w"]}}, {"params": {"b": p["b"], "scale": p["scale"]}}]
        ),
    ]
    for way in ways:
        arrays = params()
        optimizer = way(arrays)
        for grad in steps:
            optimizer.step(grad if "w" in optimizer._arrays() else list(grad.values()))
        assert_same(arrays, expected)


def test_groups_are_numbered_on_and_have_their_own_hyperparameters():
    one, two, three = (np.ones(2) for _ in range(3))
    optimizer = Optimizer(
        SGD(lr=1.0), [{"params": [one], "lr": 0.5}, {"params": [two], "maximize": True}]
    )
    optimizer.add_param_group({"params": [three], "weight_decay": 0.5, "lr": 0.25})
    assert [list(group["params"]) for group in optimizer.param_groups] == [[0], [1], [2]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0, 0.25]
    optimizer.step([np.ones(2)] * 3)
    assert_agree(np.stack([one, two, three]), [[0.5] * 2, [2.0] * 2, [0.625] * 2], "same")


def test_a_dict_may_have_a_parameter_called_params():
    arrays = {"params": np.ones(1), "lr": np.ones(1)}
    Optimizer(SGD(lr=0.5), arrays).step({"params": np.ones(1), "lr": np.zeros(1)})
    assert (arrays["params"], arrays["lr"]) == (0.5, 1.0)


# Steps


def test_lr_changed_on_the_way_does_not_retrace(monkeypatch):
    arrays, seen = params(), []
    monkeypatch.setattr(
        portopt.optimizer, "trace", lambda *rule: seen.append(trace(*rule)) or seen[-1]
    )
    optimizer = Optimizer(Momentum(), arrays)
    expected, slots = weights((4, 5), 0), Slots({"momentum_buffer": np.zeros((4, 5), np.float32)})
    for t, (grad, lr) in enumerate(zip(grads(4), (0.1, 0.2, np.float32(0.5), 1), strict=True), 1):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(grad)
        rule = Momentum(lr=float(lr))
        expected, new = rule.step(np, t, expected, grad["w"], slots)
        slots = Slots(new)
    assert_agree(arrays["w"], expected, "same")
    assert len(seen) == 4 and len({id(program) for program in seen}) == 1


def test_a_late_first_gradient_counts_its_own_steps():
    late, alone = params(), params()
    optimizer = Optimizer(Adam(lr=0.1), late)
    first, second, third = grads(3)
    optimizer.step({**first, "w": None})
    assert "w" not in optimizer.state
    assert_agree(late["w"], alone["w"], "same")
    optimizer.step(second)
    optimizer.step({**third, "b": None})
    single = Optimizer(Adam(lr=0.1), {"w": alone["w"]})
    single.step({"w": second["w"]})
    single.step({"w": third["w"]})
    assert_agree(late["w"], alone["w"], "same")
    assert [optimizer.state[name]["step"] for name in ("w", "b", "scale")] == [2, 2, 3]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", [SGD(lr=0.1), Momentum(lr=0.1), Adam(lr=0.1)], ids=repr)
def test_half_types_compute_in_float32_and_round_once(name, rule):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    param = weights(23).astype(dtype)
    optimizer = Optimizer(rule, [param])
    expected = {
        "param": param.copy(),
        **begun(rule, param),
    }
    for t, grad in enumerate(gradients(23, 4), 1):
        grad = grad.astype(dtype)
        optimizer.step([grad])
        wide = {key: x.astype(np.float32) for key, x in {**expected, "grad": grad}.items()}
        new, slots = rule.step(np, t, wide["param"], wide["grad"], Slots(wide))
        expected = {key: x.astype(dtype) for key, x in {"param": new, **slots}.items()}
        assert param.dtype == dtype
        assert_agree(param, expected["param"], "same")
        for slot in rule.slots:
            assert optimizer.state[0][slot].dtype == dtype
            assert_agree(optimizer.state[0][slot], expected[slot], "same")


def layouts():
    base = weights((6, 8))
    yield "0-d", np.array(base[0, 0]), np.array(base[0, 0])
    yield "empty", np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)
    yield "transposed", base.copy().T, base.T.copy()
    yield "every other", base.copy()[::2, ::-3], base[::2, ::-3].copy()
    yield "Fortran", np.asfortranarray(base), base.copy()
    yield "other byte order", base.astype(base.dtype.newbyteorder()), base.copy()
    yield "matrix", base[:, :6].copy().view(np.matrix), base[:, :6].copy()


@pytest.mark.filterwarnings("ignore:portopt.Optimizer steps without a kernel")
@pytest.mark.parametrize(
    ("name", "view", "plain"), list(layouts()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_any_layout_in_place(name, view, plain):
    owner = view.base if isinstance(view.base, np.ndarray) else view
    optimizer, reference = (Optimizer(Adam(lr=0.1), [p]) for p in (view, plain))
    for grad in gradients(plain.shape, 3):
        optimizer.step([grad.astype(view.dtype).view(type(view))])
        reference.step([grad])
    assert view.dtype.name == "float32"
    assert_agree(view, plain, "same")
    assert np.shares_memory(owner, view) or not view.size


def test_gradients_are_left_alone_and_may_be_the_parameters():
    arrays = params()
    (given,) = grads(1)
    before = copy.deepcopy(given)
    Optimizer(Momentum(maximize=True, weight_decay=0.5), arrays).step(given)
    assert_same(given, before)
    x = np.array([1.0, 2.0])
    Optimizer(SGD(lr=0.5), [x]).step([x])
    assert_agree(x, [0.5, 1.0], "same")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("rule", [SGD(), Momentum(), RMSprop(centered=True), Adam()], ids=repr)
def test_nan_and_inf_go_through_silently(rule, value):
    param = np.ones(2, np.float32)
    optimizer = Optimizer(rule, [param])
    for bad in (value, 1.0):
        optimizer.step([np.array([bad, 1.0], np.float32)])
    assert np.isfinite(param[1])
    assert not np.isfinite(param[0]) or value == 3e38


@dataclass(frozen=True, kw_only=True)
class Previous(Rule):
    """Keeps the last two parameters and the last gradient: inputs that go on as outputs."""

    slots = ("last", "before", "last_grad")

    def update(self, xp, t, param, grad, slot):
        new = {"last": param, "before": slot.last, "last_grad": grad}
        return param - self.lr * (grad + slot.last_grad) + slot.before, new


def test_inputs_that_go_on_as_outputs_are_read_before_they_are_overwritten():
    rule, param = Previous(lr=0.5), weights(5)
    optimizer = Optimizer(rule, [param])
    expected, slots = param.copy(), dict.fromkeys(rule.slots, np.zeros(5, np.float32))
    for t, grad in enumerate(gradients(5, 4), 1):
        optimizer.step([grad])
        expected, slots = rule.step(np, t, expected, grad, Slots(slots))
        assert_agree(param, expected, "same")
        for name, slot in slots.items():
            assert_agree(optimizer.state[0][name], slot, "same", what=name)
            assert not np.shares_memory(optimizer.state[0][name], grad)


def test_a_slot_turned_on_and_off_on_the_way():
    optimizer, arrays = trained(RMSprop(lr=0.1))
    group = optimizer.param_groups[0]
    group["momentum"], (grad, *_) = 0.5, grads(1)
    before = arrays["w"].copy()
    expected, _ = RMSprop(lr=0.1, momentum=0.5).step(
        np, 4, before, grad["w"], Slots({**optimizer.state["w"], "momentum_buffer": 0 * before})
    )
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(grad)
    assert_agree(arrays["w"], expected, "same")
    assert list(optimizer.state["w"]) == ["step", "square_avg", "momentum_buffer"]
    group["momentum"] = 0.0
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(grad)
    assert list(optimizer.state["w"]) == ["step", "square_avg"]


def test_two_threads_with_an_optimizer_each():
    rules, results = (Adam(lr=0.1), Momentum(lr=0.1)), {}
    expected = {rule: trained(rule, 30)[1] for rule in rules}
    barrier = threading.Barrier(2)

    def work(rule):
        barrier.wait()
        results[rule] = trained(rule, 30)[1]

    threads = [threading.Thread(target=work, args=(rule,)) for rule in rules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rule in rules:
        assert_same(results[rule], expected[rule])


# State


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    "through",
    [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["itself", "deepcopy", "pickle"],
)
def test_save_load_go_on_is_never_having_stopped(dtype, through):
    steps = grads(6, dtype)
    optimizer, arrays = trained(Adam(lr=0.1, amsgrad=True), 3, dtype)
    optimizer.param_groups[0]["lr"] = 0.05
    saved = through(optimizer.state_dict())
    assert_same(saved, optimizer.state_dict())
    resumed = {name: array.copy() for name, array in arrays.items()}
    fresh = Optimizer(Adam(), resumed)
    fresh.param_groups[0]["amsgrad"] = True
    fresh.load_state_dict(saved)
    for grad in steps[3:]:
        optimizer.step(grad)
        fresh.step(grad)
    assert_same(resumed, arrays)
    assert_same(fresh.state_dict(), optimizer.state_dict())


def test_a_numpy_step_count_keeps_the_precision():
    """0.9 ** np.int64(4) is a NumPy float64, which would make float32 arrays float64."""
    optimizer, arrays = trained(Adam(lr=0.1))
    other = {name: array.copy() for name, array in arrays.items()}
    saved = optimizer.state_dict()
    for entries in saved["state"].values():
        entries["step"] = np.int64(entries["step"])
    resumed = Optimizer(Adam(), other)
    resumed.load_state_dict(saved)
    (grad,) = grads(1)
    optimizer.step(grad)
    resumed.step(grad)
    assert_same(other, arrays)
    assert type(resumed.state["w"]["step"]) is int


def test_state_dict_is_a_copy_both_ways():
    optimizer, _ = trained(Momentum())
    before = snapshot(optimizer)
    saved = optimizer.state_dict()

    def spoil():
        saved["state"]["w"]["momentum_buffer"][...] = 7.0
        saved["state"]["w"]["step"] = 99
        saved["param_groups"][0]["lr"] = 7.0
        saved["param_groups"][0]["params"].append("more")

    spoil()
    assert_unchanged(optimizer, before)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    spoil()
    assert_unchanged(optimizer, before)


def test_slots_keep_the_dtype_that_they_were_saved_with():
    optimizer, _ = trained(Momentum(), dtype=np.float16)
    saved = optimizer.state_dict()
    for entries in saved["state"].values():
        entries["momentum_buffer"] = entries["momentum_buffer"].astype(np.float32)
    optimizer.load_state_dict(saved)
    optimizer.step(grads(1, np.float16)[0])
    assert optimizer.state["w"]["momentum_buffer"].dtype == np.float32


def test_slots_to_load_may_be_read_only():
    optimizer, _ = trained(Momentum())
    saved = optimizer.state_dict()
    for entries in saved["state"].values():
        entries["momentum_buffer"].setflags(write=False)
    optimizer.load_state_dict(saved)
    optimizer.step(grads(1)[0])


def test_the_optimizer_itself_can_be_pickled_and_copied():
    optimizer, _ = trained(Adam())
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert_unchanged(again, snapshot(optimizer))


# What is refused


READ_ONLY = np.ones(2)
READ_ONLY.flags.writeable = False
ONE = np.ones(2)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], ValueError, "params must hold at least one array, got none"),
        ({}, ValueError, "params must hold at least one array, got none"),
        (iter(()), ValueError, "params must hold at least one array, got none"),
        (None, TypeError, "params must be a sequence or a dict of arrays, got NoneType"),
        (5, TypeError, "params must be a sequence or a dict of arrays, got int"),
        (ONE, TypeError, "params must be a sequence or a dict of arrays, got ndarray"),
        (np.ones((2, 2)), TypeError, "params must be a sequence or a dict of arrays"),
        ("ab", TypeError, "params.0. must be a NumPy array, got str"),
        ([1.0], TypeError, "params.0. must be a NumPy array, got float"),
        ([ONE, None], TypeError, "params.1. must be a NumPy array, got NoneType"),
        ({"w": [1.0]}, TypeError, "params.'w'. must be a NumPy array, got list"),
        ([np.ones(2, int)], TypeError, "params.0. must have a dtype among float16.*got int64"),
        ([np.ones(2, complex)], TypeError, "params.0. must have a dtype among .*complex128"),
        ([np.ones(2, bool)], TypeError, "params.0. must have a dtype among .*bool"),
        ([np.ones(2, object)], TypeError, "params.0. must have a dtype among .*object"),
        ([READ_ONLY], ValueError, "params.0. must be writable"),
        ([ONE, ONE], ValueError, "params.1. is there already, as params.0."),
        ([{"params": [ONE]}, {"params": [ONE]}], ValueError, "params.1. is there already"),
        ([{"params": {"w": ONE}}, {"params": {"w": np.ones(2)}}], ValueError, "params.'w'. is"),
        ([{"params": [ONE]}, np.ones(2)], TypeError, "a group must be a dict with .params"),
        ([{"w": ONE}], TypeError, "a group must be a dict with .params"),
        ([{"params": [ONE], "beta": 1}], TypeError, "unknown hyperparameter 'beta': Momentum has"),
        ([{"params": [ONE], "lr": -1}], HyperparameterError, r"lr must be in \[0, inf\), got -1"),
        ([{"params": [ONE], "lr": "x"}], TypeError, "lr must be a real number"),
        ([{"params": [ONE], "nesterov": True, "dampening": 0.5}], ValueError, "nesterov must be"),
        ([{"params": []}], ValueError, "params must hold at least one array"),
        ([{"params": ONE}], TypeError, "params must be a sequence or a dict of arrays"),
    ],
)
def test_parameters_that_are_refused(given, error, words):
    with pytest.raises(error, match=f"^{words}"):
        Optimizer(Momentum(), given)


@pytest.mark.parametrize(
    "group",
    [
        None,
        [ONE],
        {"lr": 0.5},
        {"params": []},
        {"params": [ONE, ONE]},
        {"params": {"w": ONE}},
        {"params": {"more": ONE, "again": np.ones(2, int)}},
        {"params": [ONE], "lr": -1.0},
        {"params": [ONE], "beta": 0.5},
    ],
)
def test_a_group_that_is_refused_is_not_added(group):
    optimizer, _ = trained(Momentum())
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(group)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("given", [SGD, "sgd", None, 0.1])
def test_a_rule_must_be_a_rule(given):
    with pytest.raises(TypeError, match=r"rule must be a portopt.Rule, such as rules.Adam"):
        Optimizer(given, [np.ones(2)])


def test_parameters_may_lie_between_one_another():
    buffer = np.zeros(8)
    params = [buffer[::2], buffer[1::2], buffer[3:3]]
    with pytest.warns(UserWarning, match="has gaps in its memory"):
        slow.warn.cache_clear()
        Optimizer(SGD(lr=1.0), params).step([np.ones(4), np.full(4, 2.0), np.ones(0)])
    assert_agree(buffer, [-1.0, -2.0] * 4, "same")


@pytest.mark.parametrize(
    "places", [([0, 1], [0, 1]), ([0, 2], [1, 3]), ([0, 8, 2], [1, 8, 2], [4, 5])], ids=str
)
def test_parameters_share_no_memory(places):
    buffer = np.zeros(8)
    params = [buffer[slice(*place)] for place in places]
    optimizer = Optimizer(SGD(lr=1.0), [{"params": [param]} for param in params])
    with pytest.raises(ValueError, match=r"^params.0. shares memory with params.\d."):
        optimizer.step([np.ones(param.shape) for param in params])
    optimizer.step([np.ones(params[0].shape), *[None for _ in params[1:]]])
    assert_agree(params[0], -np.ones(params[0].shape), "same")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (lambda a, b: {"a": b, "b": np.ones(4)}, "grads.'a'. shares memory with params.'b'.: copy"),
        (lambda a, b: {"a": np.ones(4), "b": a[::-1]}, "grads.'b'. shares memory with params.'a'."),
        (lambda a, b: {"a": a.base[1:5], "b": None}, "grads.'a'. shares memory with params.'a'."),
    ],
)
def test_gradients_share_no_memory_with_parameters(place, words):
    buffer = np.arange(10.0)
    a, b = buffer[:4], buffer[6:]
    optimizer, before = Optimizer(SGD(lr=0.5), {"a": a, "b": b}), buffer.copy()
    with pytest.raises(ValueError, match=f"^{words}"):
        optimizer.step(place(a, b))
    assert_agree(buffer, before, "same")


@pytest.mark.parametrize("first", [True, False], ids=["first", "repeated"])
@pytest.mark.parametrize("share", [lambda x: x, lambda x: x[:]])
def test_gradients_to_be_zeroed_share_no_memory(share, first):
    params, grad = [np.zeros(3), np.zeros(3)], np.ones(3)
    optimizer = Optimizer(SGD(lr=1.0), params, around=Around(zero_grad=True))
    if not first:
        optimizer.step([np.zeros(3), np.zeros(3)])
    with pytest.raises(ValueError, match="with zero_grad no gradient may be that of two param"):
        optimizer.step([grad, share(grad)])
    with pytest.raises(ValueError, match=r"grads.0. shares memory with params.0.: copy it"):
        Optimizer(SGD(), params, around=Around(zero_grad=True)).step([params[0], grad])
    assert_agree(np.stack([*params, grad - 1]), np.zeros((3, 3)), "same")


def spoiled_grads(**changes):
    return {**grads(1)[0], **changes}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (None, TypeError, "grads must be a sequence or a dict, got NoneType"),
        (np.ones(3), TypeError, "grads must be a sequence or a dict, got ndarray"),
        (iter([ONE]), TypeError, "grads must be a sequence or a dict, got list_iterator"),
        ([ONE, ONE, ONE], ValueError, "grads must be for .'w', 'b', 'scale'., got .0, 1, 2."),
        ({}, ValueError, "grads must be for"),
        ({"w": None, "b": None}, ValueError, "grads must be for"),
        (spoiled_grads(more=ONE), ValueError, "grads must be for"),
        (spoiled_grads(scale=1.0), TypeError, "grads.'scale'. must be a NumPy array, got 1.0"),
        (spoiled_grads(scale=np.float32(1)), TypeError, "grads.'scale'. must be a NumPy array"),
        (spoiled_grads(b=[1.0] * 5), TypeError, "grads.'b'. must be a NumPy array"),
        (
            spoiled_grads(b=np.ones((5, 1), np.float32)),
            ValueError,
            r"grads.'b'. must have shape \(5,\) and dtype float32 like its parameter, got \(5, 1\)",
        ),
        (spoiled_grads(scale=np.ones(1, np.float32)), ValueError, "grads.'scale'. must have shape"),
        (spoiled_grads(b=np.ones(5)), ValueError, "grads.'b'. must have .* and float64"),
        (spoiled_grads(b=np.ones(5, int)), ValueError, "grads.'b'. must have .* and int64"),
    ],
)
def test_gradients_that_are_refused(given, error, words):
    optimizer, _ = trained(Adam())
    before = snapshot(optimizer)
    with pytest.raises(error, match=f"^{words}"):
        optimizer.step(given)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("key", "value", "error", "words"),
    [
        ("lr", np.nan, ValueError, r"lr must be in \[0, inf\), got nan"),
        ("lr", None, TypeError, "lr must be a real number"),
        ("beta1", 1.0, ValueError, r"beta1 must be in \[0, 1\)"),
        ("eps_form", "between", ValueError, "eps_form must be one of 'outside', 'hat', 'inside'"),
        ("betas", (0.9, 0.9), TypeError, "unknown hyperparameter 'betas': Adam has lr"),
    ],
)
def test_hyperparameters_spoiled_on_the_way(key, value, error, words):
    arrays = params()
    optimizer = Optimizer(
        Adam(),
        [{"params": {"w": arrays["w"]}}, {"params": {"b": arrays["b"], "scale": arrays["scale"]}}],
    )
    optimizer.step(grads(1)[0])
    optimizer.param_groups[1][key] = value
    before = copy.deepcopy([arrays, optimizer.state])
    with pytest.raises(error, match=f"^{words}"):
        optimizer.step(grads(1)[0])
    assert_same([arrays, optimizer.state], before)


def test_a_rule_that_cannot_be_traced_changes_nothing():
    class Partly(SGD):
        def update(self, xp, t, param, grad, slot):
            return (param.sum() if self.weight_decay else param - self.lr * grad), {}

    one, two = np.ones(2), np.ones(2)
    optimizer = Optimizer(Partly(), [{"params": [one]}, {"params": [two], "weight_decay": 0.5}])
    with pytest.raises(TraceError, match=r"^Partly.update uses .sum"):
        optimizer.step([np.ones(2)] * 2)
    assert_agree(one, np.ones(2), "same")
    assert optimizer.state == {}


def state_with(**changes):
    def change(saved):
        saved["state"]["w"].update(changes)

    return change


def group_with(**changes):
    def change(saved):
        saved["param_groups"][0].update(changes)

    return change


def wrong(**changes):
    return lambda saved: saved.update(changes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s.pop("state"), TypeError, 'state_dict must be a dict with "state" and'),
        (lambda s: s.pop("param_groups"), TypeError, 'state_dict must be a dict with "state"'),
        (lambda s: s["param_groups"].clear(), ValueError, "state_dict must be for the parameters"),
        (
            lambda s: s["param_groups"].append(s["param_groups"][0]),
            ValueError,
            "state_dict must be for the parameters",
        ),
        (wrong(param_groups=[None]), ValueError, r"param_groups\[0\] must have"),
        (group_with(params=["w"]), ValueError, "state_dict must be for the parameters"),
        (group_with(params=["b", "w", "scale"]), ValueError, "state_dict must be for the"),
        (group_with(lr=-1.0), ValueError, r"lr must be in \[0, inf\), got -1.0"),
        (group_with(lr="x"), TypeError, "lr must be a real number"),
        (group_with(rho=0.5), ValueError, r"param_groups\[0\] must have .*'rho'"),
        (lambda s: s["param_groups"][0].pop("lr"), ValueError, r"param_groups\[0\] must have"),
        (lambda s: s["param_groups"][0].pop("params"), ValueError, r"param_groups\[0\] must have"),
        (group_with(amsgrad=True), ValueError, "state.'w'. must have step and the slots"),
        (wrong(state={"x": {}}), ValueError, "state.'x'. is of no parameter: there are"),
        (wrong(state={"w": None}), ValueError, "state.'w'. must have step and the slots"),
        (wrong(state={"w": {"step": 1}}), ValueError, "state.'w'. must have step and the slots"),
        (state_with(more=ONE), ValueError, "state.'w'. must have step and the slots"),
        (state_with(step=-1), TypeError, "state.'w'..'step'. must be an int of at least 0, got -1"),
        (state_with(step=1.0), TypeError, "state.'w'..'step'. must be an int of at least 0"),
        (state_with(step=True), TypeError, "state.'w'..'step'. must be an int of at least 0"),
        (state_with(step=None), TypeError, "state.'w'..'step'. must be an int of at least 0"),
        (state_with(exp_avg=1.0), TypeError, "state.'w'..'exp_avg'. must be an array of floats"),
        (
            state_with(exp_avg=np.zeros((4, 5), int)),
            TypeError,
            "state.'w'..'exp_avg'. must be an array of floats",
        ),
        (
            state_with(exp_avg_sq=np.zeros((5, 4), np.float32)),
            ValueError,
            r"state.'w'..'exp_avg_sq'. must have shape \(4, 5\), got \(5, 4\)",
        ),
    ],
)
def test_states_that_are_refused(change, error, words):
    saved = trained(Adam(lr=0.5), 2)[0].state_dict()
    change(saved)
    optimizer, _ = trained(Adam(lr=0.1))
    before = snapshot(optimizer)
    with pytest.raises(error, match=f"^{words}"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("given", [None, [], "state", 5])
def test_a_state_dict_must_be_a_dict(given):
    optimizer, _ = trained(Adam())
    with pytest.raises(TypeError, match=r"^state_dict must be a dict"):
        optimizer.load_state_dict(given)


def test_the_state_of_another_rule_does_not_fit():
    optimizer, _ = trained(Momentum())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^param_groups\[0\] must have"):
        optimizer.load_state_dict(trained(Adam())[0].state_dict())
    assert_unchanged(optimizer, before)


def test_names_that_json_made_text_are_named():
    optimizer = Optimizer(SGD(), [np.ones(2)])
    optimizer.step([np.ones(2)])
    saved = json.loads(json.dumps(optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"^state\['0'\] is of no parameter: there are \[0\]"):
        optimizer.load_state_dict(saved)
