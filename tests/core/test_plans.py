"""Steps on the arrays of the step before: as if each were the first, and made ready only once."""

import gc
import sys
import weakref

import numpy as np
import pytest
from bits import assert_bits

import portopt.optimizer
from portopt import Optimizer
from portopt.kernels import layout
from portopt.rules import SGD, Adam, Around, Momentum, NAdam

pytest.importorskip("llvmlite")


@pytest.fixture
def plans(monkeypatch):
    """The plans made."""
    seen, plan = [], portopt.optimizer.Plan
    monkeypatch.setattr(portopt.optimizer, "Plan", lambda *args: seen.append(1) or plan(*args))
    return seen


def optimizer_of(rule, around=None):
    """In two groups, of one array and of two."""
    rng = np.random.default_rng(0)
    a, b, c = (np.array(rng.standard_normal(shape), np.float32) for shape in ((3, 4), (5,), ()))
    return Optimizer(rule, [{"params": {"a": a}}, {"params": {"b": b, "c": c}}], around=around)


def param(optimizer, name):
    return optimizer._arrays()[name]


def grads_of(optimizer, rng):
    return {
        name: np.array(rng.standard_normal(array.shape), array.dtype)
        for name, array in optimizer._arrays().items()
    }


def replace_param(optimizer):
    optimizer.param_groups[0]["params"]["a"] = param(optimizer, "a").copy()


def rename(optimizer):
    group = optimizer.param_groups[1]["params"]
    group["b"], group["c"] = group.pop("b"), group.pop("c")
    optimizer.param_groups[1]["params"] = {"c": group["c"], "b": group["b"]}


def regroup(optimizer):
    one, two = optimizer.param_groups
    one["params"]["b"] = two["params"].pop("b")
    two["lr"] = 0.25


def move(optimizer):
    array = param(optimizer, "b")
    array.resize(10**6, refcheck=False)  # in pages of its own
    array.resize(5, refcheck=False)


def load(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def change(name, value):
    return lambda optimizer: optimizer.param_groups[1].update({name: value})


CHANGES = {
    # what happens between two steps, and whether the second needs another plan
    "nothing": (lambda optimizer: None, False),
    "lr": (change("lr", 0.5), False),
    "decay": (change("weight_decay", 0.1), True),
    "maximize": (change("maximize", True), True),
    "around": (lambda optimizer: setattr(optimizer, "around", Around(ema_decay=0.5)), True),
    "parameter": (replace_param, True),
    "order": (rename, True),
    "groups": (regroup, True),
    "memory": (move, True),
    "state": (lambda optimizer: optimizer.state.clear(), True),
    "a state": (lambda optimizer: optimizer.state.pop("c"), True),
    "a slot": (lambda optimizer: optimizer.state["b"].update(exp_avg=np.ones(5)), True),
    "no slot": (lambda optimizer: optimizer.state["b"].pop("exp_avg"), True),
    "no step": (lambda optimizer: optimizer.state["b"].pop("step"), True),
    "steps": (lambda optimizer: optimizer.state["b"].update(step=100), False),
    "loaded": (load, True),
    "added": (lambda optimizer: optimizer.add_param_group({"params": {"d": np.ones(2)}}), True),
}


@pytest.mark.parametrize(
    "around", [None, Around(clip_norm=0.5, skip_nonfinite=True)], ids=["", "norm"]
)
@pytest.mark.parametrize("rule", [Adam(), NAdam(lr=0.1)], ids=["adam", "nadam"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_happens_between_two_steps(what, rule, around, plans):
    happens, another = CHANGES[what]
    ours, twin = optimizer_of(rule, around), optimizer_of(rule, around)
    rng, made = np.random.default_rng(1), []
    for step in range(6):
        if step == 3:
            happens(ours)
            happens(twin)
        grads = grads_of(ours, rng)
        before = len(plans)
        ours.step(grads)
        made.append(len(plans) - before)
        twin._plan = None
        twin.step(grads)
    assert made == [1, 0, 0, another, 0, 0]
    assert_same(ours, twin)


def assert_same(one, other):
    for name, array in one._arrays().items():
        assert_bits(array, param(other, name), name)
        for entry, value in one.state[name].items():
            assert_bits(np.array(value), np.array(other.state[name][entry]), entry)


def none(grads):
    grads["b"] = None


def transposed(grads):
    grads["a"] = np.asfortranarray(grads["a"])


def of_a_subclass(grads):
    grads["a"] = grads["a"].view(np.memmap)


GRADS = {
    # what other gradients come, and how many plans that takes: for them, and when they have gone
    "same": (lambda grads: None, 0, 0),
    "none": (none, 0, 0),
    "transposed": (transposed, 1, 1),
    "subclass": (of_a_subclass, 1, 1),
}


@pytest.mark.parametrize("what", GRADS)
@pytest.mark.filterwarnings("ignore:portopt.Optimizer steps without a kernel")
def test_gradients_of_another_kind(what, plans):
    other, *counts = GRADS[what]
    ours, twin = optimizer_of(Adam()), optimizer_of(Adam())
    rng, made = np.random.default_rng(1), []
    for step in range(6):
        grads = grads_of(ours, rng)
        if step in (2, 3):
            other(grads)
        before = len(plans)
        ours.step(grads)
        made.append(len(plans) - before)
        twin._plan = None
        twin.step(grads)
    again = what == "transposed"  # no kernel takes it, and only kernels last
    assert made == [1, 0, counts[0], again, counts[1], 0]
    assert_same(ours, twin)


def replace_absent(optimizer):
    group = optimizer.param_groups[1]["params"]
    group["b"] = group["b"].copy()


ABSENT = {
    # what happens to a parameter while it has no gradient, and whether that takes another plan
    "nothing": (lambda optimizer: None, False),
    "its state": (lambda optimizer: optimizer.state.pop("b"), True),
    "its slot": (lambda optimizer: optimizer.state["b"].update(exp_avg=np.ones(5)), True),
    "its steps": (lambda optimizer: optimizer.state["b"].update(step=100), False),
    "itself": (replace_absent, True),
    "a setting": (change("maximize", True), True),
    "another slot": (change("amsgrad", True), True),
    "an average": (lambda optimizer: setattr(optimizer, "around", Around(ema_decay=0.5)), True),
}


@pytest.mark.parametrize(
    "around",
    [None, Around(clip_norm=0.5, skip_nonfinite=True, ema_decay=0.9, zero_grad=True)],
    ids=["", "around"],
)
@pytest.mark.parametrize("rule", [Adam(), NAdam(lr=0.1), SGD(lr=0.1), Momentum()], ids=repr)
@pytest.mark.parametrize("what", ABSENT)
def test_gradients_come_and_go(what, rule, around, plans):
    happens, another = ABSENT[what]
    if "slot" in what and "amsgrad" not in rule.values():
        pytest.skip("that slot is Adam's")
    ours, twin = optimizer_of(rule, around), optimizer_of(rule, around)
    rng, made = np.random.default_rng(1), []
    for present in ("ac", "abc", "bc", "ac", "c", "", "ab", "abc"):
        if present == "c":
            happens(ours)
            happens(twin)
        grads = {k: x if k in present else None for k, x in grads_of(ours, rng).items()}
        before = len(plans)
        ours.step({k: None if x is None else x.copy() for k, x in grads.items()})
        made.append(len(plans) - before)
        twin._plan = None
        twin.step(grads)
    assert made[:4] == [1, 1, 0, 0]  # a state is made when the first gradient comes
    assert made[4] == another
    if not another:
        assert not any(made[5:])
    assert_same(ours, twin)


@pytest.mark.parametrize(
    "rule", [Adam(), NAdam(lr=0.1), SGD(lr=0.1), Momentum()], ids=lambda rule: type(rule).__name__
)
def test_each_goes_on_as_if_there_were_no_other(rule):
    ours, rng = optimizer_of(rule), np.random.default_rng(1)
    alone = {name: Optimizer(rule, {name: x.copy()}) for name, x in ours._arrays().items()}
    for present in ("ac", "abc", "b", "ac", "", "bc"):
        grads = {k: x if k in present else None for k, x in grads_of(ours, rng).items()}
        ours.step(grads)
        for name in present:
            alone[name].step({name: grads[name]})
    for name, one in alone.items():
        assert_bits(param(ours, name), param(one, name), name)
        for entry, value in one.state[name].items():
            assert_bits(np.array(ours.state[name][entry]), np.array(value), entry)


@pytest.mark.parametrize("around", [None, Around(clip_norm=1.0)], ids=["", "norm"])
def test_no_gradient_is_kept(around):
    array, grad = np.ones(3), np.ones(3)
    optimizer = Optimizer(SGD(), [array], around=around)
    for _ in range(2):
        optimizer.step([grad])
    gone = weakref.ref(grad)
    del grad
    assert gone() is None and optimizer._plan is not None


def test_what_is_known_by_its_address_lives_on():
    """Another class could come to lie there."""

    class Own(np.ndarray):
        pass

    optimizer = Optimizer(SGD(), [np.ones(3)])
    optimizer.step([np.ones(3).view(Own)])
    own = weakref.ref(Own)
    del Own
    gc.collect()
    assert own() is not None
    optimizer.step([np.ones(3)])  # and makes another plan
    gc.collect()
    assert own() is None


def test_each_of_equal_dtypes_lives_on():
    dtype = np.dtype(np.float32).newbyteorder().newbyteorder()
    assert dtype == np.float32 and dtype is not np.dtype(np.float32)
    optimizer, before = Optimizer(SGD(), [array(3), array(3)]), sys.getrefcount(dtype)
    optimizer.step([array(3), array(3).view(dtype)])
    assert optimizer._plan is not None and sys.getrefcount(dtype) > before


def test_a_step_that_has_become_negative_is_refused():
    ours, rng = optimizer_of(Adam()), np.random.default_rng(1)
    ours.step(grads_of(ours, rng))
    ours.state["b"]["step"] = -5
    with pytest.raises(TypeError, match="'step' must be an int of at least 0, got -5"):
        ours.step(grads_of(ours, rng))
    assert ours.state["a"]["step"] == 1


def test_a_norm_beyond_float64_is_infinite():
    """Of two batches, each of which has one that is not."""
    params, grads = [np.ones(1), np.ones(1)], [np.full(1, 1.2e154), np.full(1, 1.2e154)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}]
    Optimizer(SGD(lr=1.0), groups, around=Around(clip_norm=1.0)).step(grads)
    assert_bits(np.stack(params), np.array([[1.0], [0.5]]))


@pytest.mark.parametrize(
    ("happens", "error", "words"),
    [
        (
            lambda optimizer: param(optimizer, "b").setflags(write=False),
            ValueError,
            r"params\['b'\] must be writable, got a read-only array",
        ),
        (
            lambda optimizer: optimizer.state["b"].update(exp_avg=np.ones(4)),
            ValueError,
            r"state\['b'\]\['exp_avg'\] must have shape \(5,\), got \(4,\)",
        ),
        (
            lambda optimizer: optimizer.state["b"].update(exp_avg=np.frombuffer(bytes(20), "f4")),
            ValueError,
            r"state\['b'\]\['exp_avg'\] must be writable, got a read-only array",
        ),
        (
            lambda optimizer: optimizer.state["b"]["exp_avg"].setflags(write=False),
            ValueError,
            r"state\['b'\]\['exp_avg'\] must be writable, got a read-only array",
        ),
        (
            lambda optimizer: optimizer.state["b"].update(exp_avg=[0.0] * 5),
            TypeError,
            r"state\['b'\]\['exp_avg'\] must be an array of floats, got \[0.0",
        ),
    ],
)
@pytest.mark.parametrize("away", [0, 1], ids=["", "away"])
def test_what_no_longer_fits_is_refused(happens, error, words, away):
    """As soon as it has a gradient."""
    ours, rng = optimizer_of(Adam()), np.random.default_rng(1)
    for _ in range(2):
        ours.step(grads_of(ours, rng))
    happens(ours)
    for _ in range(away):
        ours.step({**grads_of(ours, rng), "b": None})
    before = {name: array.copy() for name, array in ours._arrays().items()}
    with pytest.raises(error, match=words):
        ours.step(grads_of(ours, rng))
    for name, array in before.items():
        assert_bits(param(ours, name), array)
    assert [ours.state[name]["step"] for name in ("a", "c")] == [2 + away] * 2


def test_what_shares_memory_is_refused_as_soon_as_it_has_a_gradient():
    """One parameter was replaced by a part of another while it had none."""
    ours, rng = optimizer_of(SGD(lr=0.1)), np.random.default_rng(1)
    ours.step(grads_of(ours, rng))
    ours.param_groups[1]["params"]["b"] = param(ours, "a").reshape(-1)[:5]
    ours.step({**grads_of(ours, rng), "b": None})
    before = param(ours, "a").copy()
    with pytest.raises(ValueError, match=r"params\['a'\] shares memory with params\['b'\]"):
        ours.step(grads_of(ours, rng))
    assert_bits(param(ours, "a"), before)


# How arrays lie


def of(*given):
    return layout.array([*given])


def array(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def read_only():
    found = array(3, 5)
    found.flags.writeable = False
    return found


LIES = {
    "elsewhere": (of(array(3, 5), array(4)), True),
    "swapped": (of(array(4), array(3, 5)), False),
    "dtype": (of(array(3, 5, dtype=np.int32), array(4)), False),
    "byte-order": (of(array(3, 5, dtype=">f4"), array(4)), False),
    "shape": (of(array(5, 3), array(4)), False),
    "more-dimensions": (of(array(3, 5), array(1, 4)), False),
    "fewer-dimensions": (of(array(3, 5), array()), False),
    "order": (of(np.asfortranarray(array(3, 5)), array(4)), False),
    "gaps": (of(array(3, 6)[:, 1:], array(4)), False),
    "read-only": (of(read_only(), array(4)), False),
    "unaligned": (of(array(61, dtype=np.int8)[1:].view(np.float32).reshape(3, 5), array(4)), False),
    "class": (of(array(3, 5).view(np.memmap), array(4)), False),
    "none": (of(None, array(4)), False),
    "list": (of([[1.0] * 5] * 3, array(4)), False),
}


@pytest.mark.parametrize("now", LIES)
def test_another_layout_is_noticed(now):
    found, same = LIES[now]
    before = layout.of_arrays(of(array(3, 5), array(4)), moves=True)
    assert before.fits(found) == same
    if same:
        assert before.addresses.tolist() == [one.ctypes.data for one in found]


def test_what_stays_is_elsewhere():
    found = of(array(3, 5), array(4))
    before = layout.of_arrays(found, moves=False)
    assert before.fits(found)
    assert not before.fits(of(found[0].copy(), found[1]))


def test_unknown_arrays_go_through_no_kernel(monkeypatch):
    """As those of a NumPy whose arrays are other objects than now."""
    monkeypatch.setattr(layout, "arrays", lambda: None)
    param = np.ones(3)
    with pytest.warns(UserWarning, match="do not lie as its C interface says"):
        Optimizer(SGD(lr=1.0), [param]).step([np.ones(3)])
    assert_bits(param, np.zeros(3))
    with pytest.raises(RuntimeError, match="C interface"):
        layout.of_arrays(of(param), moves=True)
