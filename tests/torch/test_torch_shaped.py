"""Adafactor and Muon beside their natives: what `twins` does for the others, on matrices."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from support import assert_agree
from twins import (
    assert_params_agree,
    assert_twins_agree,
    layout,
    make_grads,
    make_params,
    native,
    numbers,
    ours,
    saved,
    snapshot,
    train,
)

import portopt_torch
from portopt import Around, Optimizer, parity, rules

if not hasattr(torch.optim, "Muon"):
    pytest.skip("this PyTorch has no Muon", allow_module_level=True)

SHAPES = {"Adafactor": [(3, 5), (5, 3), (4,), (), (2, 3, 4)], "Muon": [(3, 5), (5, 3)]}
CASES = [c.torch for c in parity.CASES if c.torch and c.rule.by_shape]
IDS = [f"{name}-{'-'.join(sorted({*options} - {'lr'}))}" for name, options in CASES]
EACH = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
NAMED = pytest.mark.parametrize("name", SHAPES)


def pair(name, options, dtype=torch.float64):
    """The native and ours; Muon's native computes in bfloat16, and ours is exact."""
    return [cls(make_params(SHAPES[name], dtype), **options) for cls in (native(name), ours(name))]


def grads_of(name, steps=5, dtype=torch.float64):
    return make_grads(SHAPES[name], steps, dtype)


def kind_of(name):
    return "bfloat16" if name == "Muon" else "float64"


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


@EACH
def test_training_is_the_natives(name, options):
    twins = [train(o, grads_of(name)) for o in pair(name, {**options, "lr": 0.05})]
    if name == "Muon":
        assert_params_agree(params_of(twins[1]), params_of(twins[0]), "bfloat16")
        assert layout(twins[1]) == layout(twins[0])
    else:
        assert_twins_agree(twins[1], twins[0], "float64")


@EACH
def test_the_bits_are_numpys_but_for_the_order_of_sums(name, options):
    rule_class, one = rules.registry.find(name, "torch")
    values = {**one.values, **one.fields({**options, "lr": 0.05})}
    values = {key: value for key, value in values.items() if value is not None}
    optimizer = train(
        ours(name)(make_params(SHAPES[name]), **{**options, "lr": 0.05}),
        grads_of(name, 5, torch.float32),
    )
    arrays = [numbers(p).astype("float32") for p in make_params(SHAPES[name])]
    plain = Optimizer(rule_class(**values), arrays)
    for step in grads_of(name, 5, torch.float32):
        plain.step([numbers(g).astype("float32") for g in step])
    for mine, expected in zip(params_of(optimizer), arrays, strict=True):
        assert_agree(numbers(mine), expected, "float32")


@EACH
@pytest.mark.parametrize("way", ["to-ours", "to-native"])
def test_training_goes_on_as_if_never_switched(name, options, way):
    if name == "Muon":  # the exact and the rounded one are to go the same way from here
        options = {**options, "momentum": 0.0, "nesterov": False}
    one, other = pair(name, {**options, "lr": 0.05})
    first, second = (one, other) if way == "to-ours" else (other, one)
    train(first, grads_of(name, 3))
    with torch.no_grad():
        for theirs, mine in zip(params_of(first), params_of(second), strict=True):
            mine.copy_(theirs)
    second.load_state_dict(saved(first))
    assert layout(second) == layout(first)
    for optimizer in (first, second):
        train(optimizer, grads_of(name, 2))
    assert_params_agree(params_of(second), params_of(first), kind_of(name))


@NAMED
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_the_same(name, how):
    grads = grads_of(name, dtype=torch.float32)
    optimizer = train(ours(name)(make_params(SHAPES[name]), lr=0.05), grads)
    twin = how(optimizer)
    for one in (optimizer, twin):
        train(one, grads)
    assert_twins_agree(twin, optimizer, "same")


@NAMED
def test_schedules_late_gradients_and_groups(name):
    results = []
    for cls in (native(name), ours(name)):
        params = make_params(SHAPES[name], torch.float64)
        optimizer = cls([{"params": params[:1], "lr": 0.2}, {"params": params[1:]}], lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for t, step in enumerate(grads_of(name)):
            train(optimizer, [[None if t < 2 and i == 1 else g for i, g in enumerate(step)]])
            schedule.step()
        results.append((optimizer, params))
    (first, expected), (second, actual) = results
    start = make_params(SHAPES[name], torch.float64)
    assert_params_agree(actual, expected, kind_of(name), start)
    assert [g["lr"] for g in second.param_groups] == [g["lr"] for g in first.param_groups]
    if name == "Adafactor":
        assert second.state[actual[1]]["step"] == 3


@NAMED
def test_what_the_native_refuses_is_refused(name):
    for cls in (native(name), ours(name)):
        param = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
        optimizer = cls([param])
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match=f"{name} does not support complex parameters"):
            optimizer.step()
        param = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = cls([param])
        param.grad = torch.ones(2, 2).to_sparse()
        with pytest.raises(RuntimeError, match=f"{name} does not support sparse gradients"):
            optimizer.step()


def test_autocast_does_not_multiply_matrices_in_a_half_type():
    results = []
    for enabled in (False, True):
        optimizer = ours("Muon")(make_params([(32, 32)] * 2))
        with torch.autocast("cpu", enabled=enabled):
            train(optimizer, make_grads([(32, 32)] * 2, steps=2))
        results.append(optimizer)
    assert_twins_agree(*results, "same")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("Adafactor", {"lr": -1.0}),
        ("Adafactor", {"beta2_decay": 0.5}),
        ("Adafactor", {"eps": (-1.0, 0.1)}),
        ("Adafactor", {"eps": (None, -1.0)}),
        ("Adafactor", {"d": -1.0}),
        ("Adafactor", {"weight_decay": -1.0}),
        ("Muon", {"lr": -1.0}),
        ("Muon", {"momentum": -1.0}),
        ("Muon", {"weight_decay": -1.0}),
    ],
)
def test_errors_begin_as_the_natives(name, bad):
    words = []
    for cls in (native(name), ours(name)):
        with pytest.raises(ValueError) as caught:
            cls(make_params([(2, 2)]), **bad)
        words.append(str(caught.value))
    assert words[1].startswith(words[0])


def test_muon_takes_matrices_alone():
    for cls in (torch.optim.Muon, portopt_torch.Muon):
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            cls(make_params([(2, 2), (3,)]))
    optimizer = portopt_torch.Muon(make_params([(2, 2)]))
    with pytest.raises(ValueError, match=r"only supports 2D parameters, got one of shape \(3,\)"):
        optimizer.add_param_group({"params": make_params([(3,)])})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="adjust_lr_fn must be one of None, 'original'"):
        portopt_torch.Muon(make_params([(2, 2)]), adjust_lr_fn="other")


@NAMED
def test_a_state_of_another_shape_is_refused_and_nothing_changes(name):
    optimizer = train(ours(name)(make_params(SHAPES[name])), grads_of(name, 1, torch.float32))
    state = saved(optimizer)
    slot = next(key for key in state["state"][0] if key != "step")
    state["state"][0][slot] = torch.zeros(7, 7)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"loaded '{slot}' of parameter 0 must have shape"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def test_the_resolution_is_that_of_the_first_parameter():
    """As natively, for whoever gives no first epsilon."""
    tiny = [[torch.full((2, 2), 1e-6, dtype=torch.float64)]]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        moved = []
        for cls in (torch.optim.Adafactor, portopt_torch.Adafactor):
            param = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))
            train(cls([param], lr=0.5), [[g.to(dtype) for g in step] for step in tiny])
            moved.append(numbers(param))
        kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
        assert_agree(moved[1], moved[0], kind, start=1.0 + 0 * moved[0])


@NAMED
@pytest.mark.parametrize("foreach", [None, False, True])
def test_every_way_is_the_same_and_without_a_warning(name, foreach):
    """No kernel takes these rules, and nobody is told so as if it were a defect."""
    rule = rules.registry.find(name, "torch")[0]
    results = []
    for options in ({}, {"around": Around(clip_norm=0.5, ema_decay=0.5)}):
        optimizer = ours(name)(make_params(SHAPES[name]), lr=0.05, **options)
        for group in optimizer.param_groups:
            group["foreach"] = foreach
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(optimizer, grads_of(name, 5, torch.float32))
        arrays = [numbers(p).astype("float32") for p in make_params(SHAPES[name])]
        plain = Optimizer(rule(lr=0.05), arrays, **options)
        for step in grads_of(name, 5, torch.float32):
            plain.step([numbers(g).astype("float32") for g in step])
        results.append((params_of(optimizer), arrays))
    for actual, expected in results:
        for one, other in zip(actual, expected, strict=True):
            assert_agree(numbers(one), other, "float32")


@NAMED
def test_fused_is_refused(name):
    optimizer = ours(name)(make_params(SHAPES[name]))
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=r"`fused=True` is not possible: .* does not update"):
        train(optimizer, grads_of(name, 1, torch.float32))


@NAMED
def test_compiled_step(name):
    results = []
    for compiled in (False, True):
        params = make_params(SHAPES[name][:2])
        optimizer = ours(name)(params, lr=0.05)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for grads in make_grads(SHAPES[name][:2], 3):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            step()
        results.append(params)
    assert_params_agree(results[1], results[0], "float32", make_params(SHAPES[name][:2]))


def test_what_is_not_a_number_stays_in_its_element():
    """As natively, where Python compares the root mean square with 1."""
    made = []
    for cls in (ours("Adafactor"), native("Adafactor")):
        (param,) = make_params([(4,)])
        optimizer = cls([param], lr=0.01)
        for value in (1.0, float("nan"), 1.0):
            grad = torch.ones(4)
            grad[1] = value
            train(optimizer, [[grad]])
        made.append(param.detach())
    assert_agree(*made, "float32")
    assert made[0].isnan().tolist() == [False, True, False, False]


def test_parameters_whose_shape_is_not_known_yet():
    module = torch.nn.LazyLinear(3)
    optimizer = ours("Adafactor")(module.parameters(), lr=0.01)
    module(torch.ones(2, 5)).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert (module.weight != before).all()
