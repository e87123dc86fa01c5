"""Bad input: the native's exception and leading words, and nothing is changed."""

import copy
import inspect

import pytest
import torch
from twins import (
    NAMES,
    assert_twins_agree,
    make_grads,
    make_params,
    native,
    ours,
    saved,
    snapshot,
    takes,
    train,
)

from portopt import Around, rules
from portopt_torch import from_rule

GRADS = make_grads(steps=4)
NAN, INF = float("nan"), float("inf")


def caught(call, *args, **kwargs):
    with pytest.raises(Exception) as error:
        call(*args, **kwargs)
    return error.value


def assert_same_kind(mine, theirs, words=None):
    assert isinstance(mine, type(theirs)), (mine, theirs)
    assert str(mine).startswith(words or str(theirs))


def refuses(cls, bad):
    try:
        cls(make_params(), **bad)
    except (TypeError, ValueError):
        return True
    return False


ARGUMENTS = [
    (name, key)
    for name in NAMES
    for key, parameter in inspect.signature(native(name)).parameters.items()
    if type(parameter.default) in (int, float) and refuses(native(name), {key: None})
]
"""The numbers that the natives check."""

RANGES = [
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.5}),
    *((name, {"lr": lr}) for name in NAMES for lr in (torch.ones(2), torch.tensor(-1.0))),
    *((name, {key: -1.0}) for name, key in ARGUMENTS),
    *((name, {key: NAN}) for name, key in ARGUMENTS if name != "SGD"),  # which lets it pass
    *(
        (name, {"betas": betas})
        for name in NAMES
        for bad in (1.0, -0.1, NAN)
        for betas in ((bad, 0.9), (0.9, bad))
        if takes(name, "betas")
    ),
]


@pytest.mark.parametrize(("name", "bad"), RANGES)
def test_hyperparameter_out_of_range(name, bad):
    theirs = caught(native(name), make_params(), **bad)
    assert isinstance(theirs, ValueError)
    words = str(theirs).replace("tensor(-1.)", "-1.0")
    assert_same_kind(caught(ours(name), make_params(), **bad), theirs, words)

    optimizer = train(ours(name)(make_params()), GRADS[:1])
    before = snapshot(optimizer)
    (late,) = make_params([(2,)])
    assert_same_kind(caught(optimizer.add_param_group, {"params": [late], **bad}), theirs, words)
    assert snapshot(optimizer) == before
    state = saved(optimizer)
    state["param_groups"][0].update(bad)
    assert_same_kind(caught(optimizer.load_state_dict, state), theirs, words)
    assert snapshot(optimizer) == before
    twin = train(ours(name)(make_params()), GRADS)
    assert_twins_agree(train(optimizer, GRADS[1:]), twin, "same")


@pytest.mark.parametrize(
    ("name", "bad", "error", "words"),
    [
        ("SGD", {"lr": NAN}, ValueError, "Invalid learning rate: nan (lr must be in [0, inf)"),
        ("SGD", {"momentum": NAN}, ValueError, "Invalid momentum value: nan"),
        ("SGD", {"weight_decay": NAN}, ValueError, "Invalid weight_decay value: nan"),
        ("SGD", {"dampening": NAN}, ValueError, "Invalid dampening value: nan"),
        ("SGD", {"dampening": "0"}, TypeError, "Invalid dampening value: 0 (dampening must"),
        ("Adam", {"lr": INF}, ValueError, "Invalid learning rate: inf"),
        ("RMSprop", {"alpha": 1.5}, ValueError, "Invalid alpha value: 1.5"),
        ("Adam", {"betas": (0.9,)}, TypeError, "betas must be a pair of numbers in [0, 1), got"),
        ("Adam", {"betas": (0.9, 0.9, 0.9)}, TypeError, "betas must be a pair of numbers"),
        ("Adam", {"betas": 0.9}, TypeError, "betas must be a pair of numbers"),
        ("Adamax", {"betas": (0.9,)}, TypeError, "betas must be a tuple of beta1, beta2, got (0"),
        ("Rprop", {"etas": (1.0, 1.2)}, ValueError, "Invalid eta values"),
        ("Rprop", {"etas": 0.5}, TypeError, "etas must be a tuple of etaminus, etaplus, got 0.5"),
        ("Rprop", {"step_sizes": (-1.0, 5)}, ValueError, "Invalid step_size_min value: -1.0"),
        ("Adagrad", {"maximize": "yes"}, TypeError, "maximize must be True or False, got 'yes'"),
        ("Adagrad", {"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot"),
        ("Adam", {"amsgrad": "yes"}, TypeError, "amsgrad must be True or False, got 'yes'"),
        ("SGD", {"nesterov": "1"}, TypeError, "nesterov must be True or False, got '1'"),
        ("SGD", {"nesterov": 1}, ValueError, "Nesterov momentum requires"),
        ("RMSprop", {"centered": None}, TypeError, "centered must be True or False, got None"),
        ("Adam", {"maximize": 0.0}, TypeError, "maximize must be True or False, got 0.0"),
        ("Adam", {"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot"),
        ("Adam", {"fused": True, "differentiable": True}, RuntimeError, "`fused` "),
        ("Adam", {"learning_rate": 0.1}, TypeError, "Adam.__init__() got an unexpected keyword"),
    ],
)
def test_what_the_native_lets_pass_or_says_otherwise(name, bad, error, words):
    assert_same_kind(caught(ours(name), make_params(), **bad), error(words))


@pytest.mark.parametrize(("name", "key"), ARGUMENTS)
def test_hyperparameter_of_a_wrong_type(name, key):
    # The native's words are Python's own on a comparison.
    words = {"lr": "learning rate", "eps": "epsilon value"}.get(key, f"{key} value")
    for value in ("0.1", None, 1j, [0.1]):
        theirs = caught(native(name), make_params(), **{key: value})
        assert isinstance(theirs, TypeError)
        mine = caught(ours(name), make_params(), **{key: value})
        assert_same_kind(mine, theirs, f"Invalid {words}: {value} ({key} must be a real number")


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_there_are_not(name):
    for arguments, options in (((), {}), ((make_params(),) * 20, {}), ((), {"learning_rate": 1})):
        mine, theirs = (caught(cls, *arguments, **options) for cls in (ours(name), native(name)))
        assert_same_kind(mine, theirs, f"{name}.__init__() ")
        assert str(theirs).startswith(f"{name}.__init__() ")


@pytest.mark.parametrize(
    "params",
    [
        lambda: [],
        lambda: torch.ones(2, requires_grad=True),
        lambda: [1.0],
        lambda: [torch.ones(2, requires_grad=True) * 2],
        lambda: [{"params": set(make_params())}],
        lambda: [{"params": (same := make_params())}, {"params": same}],
        lambda: [("a", make_params()[0]), make_params()[1]],
        lambda: [{"params": make_params()}, make_params()],
        lambda: [{"lr": 0.1}],
        lambda: 5,
    ],
)
@pytest.mark.parametrize("name", [*NAMES, "from_rule"])
def test_parameters_that_the_native_refuses(name, params):
    cls = from_rule(rules.Adam) if name == "from_rule" else ours(name)
    theirs = caught(native("Adam" if name == "from_rule" else name), params())
    assert_same_kind(caught(cls, params()), theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if ours(name).sparse == "no"])
def test_sparse_gradient(name):
    optimizer = train(ours(name)(make_params()), GRADS[:1])
    before = snapshot(optimizer)
    params = optimizer.param_groups[0]["params"]
    params[2].grad = torch.ones(4).to_sparse()
    words = f"{name} does not support sparse gradients"
    if name != "AdamW":  # whose native says "Adam"
        theirs = native(name)(make_params())
        theirs.param_groups[0]["params"][2].grad = torch.ones(4).to_sparse()
        assert str(caught(theirs.step)).startswith(words)
    assert_same_kind(caught(optimizer.step), RuntimeError(words))
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_parameter_of_a_wrong_dtype(dtype):
    good, bad = torch.nn.Parameter(torch.ones(2)), torch.ones(2).to(dtype)
    optimizer = ours("Adam")([{"params": [good]}, {"params": [bad]}])
    good.grad = torch.ones(2)
    optimizer.step()
    before = snapshot(optimizer)
    bad.grad = torch.ones(2).to(dtype)
    words = "parameters with a gradient must be of float16, bfloat16, float32, float64 or complex"
    assert_same_kind(caught(optimizer.step), TypeError(words))
    assert snapshot(optimizer) == before


def without(key):
    return lambda state: state["state"][0].pop(key)


def given(key, value):
    return lambda state: state["state"][0].update({key: value})


MISFITS = [
    ("Adam", lambda s: s["param_groups"].pop(), None, ""),
    ("Adam", lambda s: s["param_groups"].append(s["param_groups"][0]), None, ""),
    ("Adam", lambda s: s["param_groups"][0]["params"].pop(), None, ""),
    ("Adam", lambda s: s.pop("param_groups"), None, ""),
    ("Adam", lambda s: s.pop("state"), None, ""),
    (
        "Adam",
        without("exp_avg"),
        ValueError,
        "loaded state of parameter 0 has no tensor 'exp_avg': it has",
    ),
    (
        "SGD",
        lambda s: s["state"].update({0: {"exp_avg": torch.ones(3, 5)}}),
        ValueError,
        "loaded state of parameter 0 has no tensor 'momentum_buffer'",
    ),
    (
        "RMSprop",
        without("square_avg"),
        ValueError,
        "loaded state of parameter 0 has no tensor 'square_avg'",
    ),
    (
        "Adagrad",
        without("sum"),
        ValueError,
        "loaded state of parameter 0 has no tensor 'sum'",
    ),
    (
        "Rprop",
        given("step_size", torch.ones(2)),
        ValueError,
        "loaded 'step_size' of parameter 0 must have shape (3, 5), got (2,)",
    ),
    (
        "Adamax",
        lambda s: s["param_groups"][1].update(betas=0.9),
        TypeError,
        "betas must be a tuple of beta1, beta2, got 0.9",
    ),
    (
        "Adam",
        given("exp_avg", [0.0]),
        ValueError,
        "loaded state of parameter 0 has no tensor 'exp_avg'",
    ),
    (
        "Adam",
        given("exp_avg_sq", torch.ones(5, 3)),
        ValueError,
        "loaded 'exp_avg_sq' of parameter 0 must have shape (3, 5), got (5, 3)",
    ),
    (
        "Adam",
        given("exp_avg", torch.ones(3, 5, dtype=torch.int32)),
        ValueError,
        "loaded 'exp_avg' of parameter 0 must be of a kind with its torch.float32",
    ),
    (
        "Adam",
        given("exp_avg", torch.ones(3, 5, dtype=torch.complex64)),
        ValueError,
        "loaded 'exp_avg' of parameter 0 must be of a kind with",
    ),
    (
        "Adam",
        without("step"),
        ValueError,
        "loaded 'step' of parameter 0 must be a number, got None",
    ),
    (
        "Adam",
        given("step", "3"),
        ValueError,
        "loaded 'step' of parameter 0 must be a number, got '3'",
    ),
    (
        "Adam",
        given("step", torch.ones(2)),
        ValueError,
        "loaded 'step' of parameter 0 must be a number, got tensor",
    ),
    (
        "Adam",
        lambda s: s["param_groups"][1].update(amsgrad=True),
        ValueError,
        "loaded state of parameter 2 has no tensor 'max_exp_avg_sq'",
    ),
    (
        "Adam",
        lambda s: s["param_groups"][1].update(betas=(0.9, 2.0)),
        ValueError,
        "Invalid beta parameter at index 1: 2.0",
    ),
    (
        "Adam",
        lambda s: s["param_groups"][1].update(lr="high"),
        TypeError,
        "Invalid learning rate: high",
    ),
]


@pytest.mark.parametrize(("name", "spoil", "error", "words"), MISFITS)
def test_a_state_that_does_not_fit_changes_nothing(name, spoil, error, words):
    options = {"momentum": 0.9} if name == "SGD" else {}

    def make(cls):
        params = make_params()
        return train(cls([{"params": params[:2]}, {"params": params[2:]}], **options), GRADS[:2])

    optimizer = make(ours(name))
    before, spoiled = snapshot(optimizer), saved(make(native(name)))
    spoil(spoiled)
    theirs = (
        error(words)
        if error
        else caught(make(native(name)).load_state_dict, copy.deepcopy(spoiled))
    )
    assert_same_kind(caught(optimizer.load_state_dict, spoiled), theirs)
    assert snapshot(optimizer) == before
    untouched = make(ours(name))
    assert_twins_agree(train(optimizer, GRADS[2:]), train(untouched, GRADS[2:]), "same")


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("bad", [None, "0.1", 1j, [0.1], torch.tensor(1j), torch.ones(2)], ids=repr)
def test_a_hyperparameter_that_became_no_number_changes_nothing(bad, way):
    optimizer = train(ours("Adam")(make_params(), **way), GRADS[:1])
    before, good = snapshot(optimizer), optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = bad
    with pytest.raises(TypeError, match=r"^lr must be a number, or a real tensor of one, got "):
        train(optimizer, GRADS[1:2])
    optimizer.param_groups[0]["lr"] = good
    assert snapshot(optimizer) == before


def test_a_first_step_that_fails_is_still_to_come():
    """Of a dampened momentum, where the first step is another than those that follow."""
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "around": Around(grad_scale=1.0)}
    optimizer, good = ours("SGD")(make_params(), **options), Around(grad_scale=1.0)
    optimizer.around = Around.unchecked(**{**vars(good), "grad_scale": 0.0 * torch.ones(())})
    with pytest.raises(ArithmeticError, match="division by zero"):
        train(optimizer, GRADS[:1])
    assert not optimizer.state
    optimizer.around = good
    untouched = ours("SGD")(make_params(), **options)
    assert_twins_agree(train(optimizer, GRADS), train(untouched, GRADS), "same")
