"""The kernel path: NumPy's bits, whatever is moved between steps, flags, threads and memory."""

import copy
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections import defaultdict
from functools import partial
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch
from support import assert_agree, begun, gradients, weights
from torch._dynamo.testing import CompileCounter
from twins import (
    IDS,
    NAMES,
    OPTIONS,
    assert_params_agree,
    assert_twins_agree,
    make_grads,
    make_params,
    native,
    numbers,
    ours,
    saved,
    snapshot,
    takes,
    train,
    trained,
)

import portopt_torch.optimizer as optimizer_module
from portopt import Around, trace
from portopt.kernels import compiler, cpu, slow
from portopt_torch import from_rule
from portopt_torch import native as torch_native

pytest.importorskip("llvmlite", reason="kernels are compiled by llvmlite")

RULES = run_path(str(Path(__file__).parents[1] / "core" / "conftest.py"))["RULES"]
# Of every class a form with the most slots.
SOME = [*{type(rule): rule for rule in sorted(RULES, key=lambda rule: len(rule.slots))}.values()]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(3, 5), (), (1, 5), (0,), (67,)]  # 67: whole cache lines and a rest, in every dtype
GRADS = make_grads(SHAPES, 5)
SLOW = "ignore:portopt_torch steps .* slowly"


@pytest.fixture
def launches(monkeypatch):
    """How many tensors each launch of a step updated."""
    sizes, run = [], cpu.Step.run

    def noted(self, *args):
        sizes.append(len(self.table))
        return run(self, *args)

    monkeypatch.setattr(cpu.Step, "run", noted)
    return sizes


@pytest.fixture
def unwarned():
    """As if no warning had been given yet."""
    slow.warn.cache_clear()
    yield
    slow.warn.cache_clear()


def child(code):
    """Run in a process of its own, which must print "done"."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# ---- the same bits as NumPy ----


def real(tensor):
    """A contiguous copy; complex numbers as pairs."""
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def in_float32(number):
    """As a number is kept in the state."""
    return float(np.float32(number))


def in_numpy(rule, param, grads, slots=()):
    """The parameter and slots that the interpreted program ends with; None is no gradient."""
    program, t = trace(rule), 0
    stored = {"param": real(param)}
    first = begun(rule, stored["param"].double().numpy())
    stored |= {k: torch.tensor(x).to(stored["param"].dtype) for k, x in first.items()} | dict(slots)
    kept = {name: in_float32(rule.initial(name)) for name in program.numbers}
    dtype = torch.float64 if stored["param"].dtype == torch.float64 else torch.float32
    for t, grad in enumerate((grad for grad in grads if grad is not None), 1):
        arrays = {k: x.to(dtype).numpy() for k, x in {**stored, "grad": real(grad)}.items()}
        scalars = program.scalars(vars(rule) | kept, t)
        kept = {name: in_float32(value) for name, value in program.kept(scalars).items()}
        new = program.run(np, scalars, arrays)
        stored = {k: torch.tensor(np.asarray(new[k])).to(x.dtype) for k, x in stored.items()}
    return stored, t, kept


def assert_same_as_numpy(optimizer, rule, start, grads, slots=()):
    params = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
    for i, (param, begin) in enumerate(zip(params, start, strict=True)):
        expected, steps, kept = in_numpy(rule, begin, [step[i] for step in grads], slots)
        state = optimizer.state.get(param, {})
        assert state.get("step", 0) == steps
        assert not steps or {name: state[name].item() for name in kept} == kept
        for name, value in expected.items():
            if name == "param" or steps:
                actual = param if name == "param" else state[name]
                assert actual.dtype == param.dtype or slots
                what = f"{name} of parameter {i}"
                assert_agree(numbers(real(actual)), numbers(value), "same", what=what)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_has_numpys_bits(rule, launches):
    params = make_params(SHAPES)
    optimizer = train(from_rule(rule)(params), GRADS)
    assert_same_as_numpy(optimizer, rule, make_params(SHAPES), GRADS)
    assert launches == [len(SHAPES)] * len(GRADS)


@pytest.mark.parametrize("rule", RULES[::6], ids=repr)
def test_all_dtypes_at_once_have_numpys_bits(rule, launches):
    def params():
        return [param for dtype in DTYPES for param in make_params([(67,), ()], dtype)]

    streams = [make_grads([(67,), ()], 5, dtype) for dtype in DTYPES]
    grads = [list(itertools.chain(*step)) for step in zip(*streams, strict=True)]
    optimizer = train(from_rule(rule)(params()), grads)
    assert_same_as_numpy(optimizer, rule, params(), grads)
    assert launches == [2] * 4 * 5


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "rule", [rule for rule in SOME if rule.slots], ids=lambda rule: type(rule).__name__
)
def test_loaded_state_of_another_dtype_keeps_it(rule, dtype, stored, launches):
    (param,), shape = make_params([(67,)], dtype), (67,)
    optimizer = train(from_rule(rule)([param]), [[torch.ones(shape, dtype=dtype)]])
    param.data = make_params([shape], dtype)[0].data
    state = saved(optimizer)
    slots = {slot: torch.tensor(weights(shape, 3)).abs().to(stored) for slot in rule.slots}
    kept = {name: torch.tensor(rule.initial(name)) for name in rule.numbers}
    state["state"][0].update(slots, **kept, step=torch.tensor(0.0))
    optimizer.load_state_dict(state)
    launches.clear()
    grads = make_grads([shape], 4, dtype)
    train(optimizer, grads)
    assert_same_as_numpy(optimizer, rule, make_params([shape], dtype), grads, slots)
    assert {optimizer.state[param][slot].dtype for slot in rule.slots} == {stored}
    assert launches == [1] * 4


def dense(shape, seed):
    """Parameters whose elements lie side by side, in some order."""
    tensor = torch.tensor(weights(shape, seed))
    yield tensor
    yield tensor.t() if tensor.ndim == 2 else tensor.permute(2, 0, 3, 1)
    if tensor.ndim == 4:
        yield tensor.to(memory_format=torch.channels_last)
    yield torch.complex(tensor, -tensor.flip(0))
    yield torch.complex(tensor, -tensor.flip(0)).transpose(0, 1)


@pytest.mark.parametrize("rule", SOME, ids=lambda rule: type(rule).__name__)
def test_every_order_of_elements_has_numpys_bits(rule, launches):
    start = [*dense((3, 5), 0), *dense((2, 3, 4, 5), 1), *dense((1, 3, 1, 5), 2)]
    streams = [gradients(tuple(torch.view_as_real(x + 0j).shape), 4, seed=7) for x in start]
    grads = [
        [
            torch.empty_like(x).copy_(
                torch.view_as_complex(torch.tensor(g))
                if x.is_complex()
                else torch.tensor(g)[..., 0]
            )
            for x, g in zip(start, step, strict=True)
        ]
        for step in zip(*streams, strict=True)
    ]
    params = [torch.nn.Parameter(x.clone(memory_format=torch.preserve_format)) for x in start]
    assert [p.stride() for p in params] == [x.stride() for x in start]
    optimizer = train(from_rule(rule)(params), grads)
    assert_same_as_numpy(optimizer, rule, start, grads)
    assert [p.stride() for p in params] == [x.stride() for x in start]
    complex_ones = sum(x.is_complex() for x in start)
    assert launches == [len(start) - complex_ones, complex_ones] * 4


@pytest.fixture
def plans(monkeypatch):
    """The plans made."""
    seen, make = [], optimizer_module.make_plan

    def noted(*args, **flags):
        seen.append(1)
        return make(*args, **flags)

    monkeypatch.setattr(optimizer_module, "make_plan", noted)
    return seen


COMING = [(67,), (5,), (3, 5), (0,)]
PRESENT = "ac", "ac", "abcd", "bd", "acd", "", "b", "abcd"


def coming_grads():
    grads = make_grads(COMING, len(PRESENT))
    for step, here in enumerate(PRESENT):
        pairs = zip("abcd", grads[step], strict=True)
        grads[step] = [grad if name in here else None for name, grad in pairs]
    return grads


@pytest.mark.parametrize("rule", SOME, ids=lambda rule: type(rule).__name__)
def test_gradients_come_and_go_on_one_plan(rule, plans):
    grads = coming_grads()
    optimizer = train(from_rule(rule)(make_params(COMING)), grads)
    assert_same_as_numpy(optimizer, rule, make_params(COMING), grads)
    if trace(rule).elementwise:
        assert len(plans) <= 2  # for the states of the first, and of those that came late


@pytest.mark.parametrize("sight", ["native", "python"])
@pytest.mark.parametrize(
    "around",
    [None, Around(clip_norm=0.5, skip_nonfinite=True, ema_decay=0.9, zero_grad=True)],
    ids=["", "around"],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {}), ("SGD", {"momentum": 0.9, "dampening": 0.5}), ("NAdam", {}), ("Adagrad", {})],
)
def test_what_has_no_gradient_is_left_alone(name, options, around, sight, plans, monkeypatch):
    """Values, state and versions; as by a plan that is made anew each step."""
    if sight == "python":
        monkeypatch.setattr(torch_native, "look", lambda: None)
        monkeypatch.setattr(torch_native, "bump", lambda *_: None)
    ends = []
    for renewed in (False, True):
        params = make_params(COMING)
        optimizer, made = ours(name)(params, lr=0.1, around=around, **options), []
        for grads in coming_grads():
            before, count = whole(optimizer), len(plans)
            versions = [param._version for param in params]
            if renewed:
                optimizer._plan = None
            train(optimizer, [grads])
            made.append(len(plans) - count)
            away = [place for place, grad in enumerate(grads) if grad is None]
            after = whole(optimizer)
            assert [before[place] for place in away] == [after[place] for place in away]
            raised = [param._version - old for param, old in zip(params, versions, strict=True)]
            assert raised == [int(grad is not None) for grad in grads]
        assert sum(made) == len(made) if renewed else sum(made) <= 2
        ends.append(optimizer)
    assert_twins_agree(*ends, "same")


def whole(optimizer):
    """For each parameter its values and state."""
    state_dict, params = snapshot(optimizer)
    return [(x, state_dict["state"].get(place)) for place, x in enumerate(params[0])]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_lists_and_states_that_are_replaced(name):
    """What they have is known by them: the new ones are looked at from then on."""
    params, more = make_params([(3,), (4,)]), make_params([(5,)])
    optimizer = ours(name)(params, lr=0.1)
    for param in (*params, *more):
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state = defaultdict(dict, optimizer.state)
    optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    counts = [float(state["step"]) for state in optimizer.state.values()]
    assert counts == ([] if name == "SGD" else [1.0, 1.0])
    optimizer.param_groups[0]["params"] = [*params]
    optimizer.step()
    before = more[0].detach().clone()
    optimizer.param_groups[0]["params"][1] = more[0]
    optimizer.step()
    assert (before - more[0] > 0.09).all()


@pytest.mark.parametrize("way", [{}, {"foreach": False}])
@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adam"])
def test_a_tensor_of_a_learning_rate_that_is_written_to(name, way):
    def run(change):
        lr = torch.tensor(0.5)
        optimizer = ours(name)(make_params(), lr=lr, **way)
        for step, grads in enumerate(make_grads(steps=4)):
            change(optimizer, 0.5 / (1 + step))
            train(optimizer, [grads])
        return optimizer

    written = run(lambda optimizer, lr: optimizer.param_groups[0]["lr"].fill_(lr))
    replaced = run(lambda optimizer, lr: optimizer.param_groups[0].update(lr=torch.tensor(lr)))
    assert_params_agree(
        *(optimizer.param_groups[0]["params"] for optimizer in (written, replaced)), "same"
    )


AWAY = {
    # what happens to a parameter while it has no gradient
    "nothing": lambda optimizer, param: None,
    "state": lambda optimizer, param: optimizer.state.pop(param),
    "entry": lambda optimizer, param: optimizer.state[param].pop("exp_avg"),
    "slot": lambda optimizer, param: optimizer.state[param].update(exp_avg=torch.ones(5)),
    "shape": lambda optimizer, param: optimizer.state[param].update(exp_avg=torch.ones(5, 1)),
    "order": lambda optimizer, param: optimizer.state[param].update(
        exp_avg=torch.ones(10)[::2].clone()
    ),
    "steps": lambda optimizer, param: optimizer.state[param]["step"].fill_(100),
    "count": lambda optimizer, param: optimizer.state[param].update(step=torch.tensor(100.0)),
    "memory": lambda optimizer, param: setattr(param, "data", param.data.clone()),
    "frozen": lambda optimizer, param: param.requires_grad_(False),
    "dtype": lambda optimizer, param: setattr(param, "data", param.data.double()),
    "shared": lambda optimizer, param: setattr(
        param, "data", optimizer.param_groups[0]["params"][0].data[:5]
    ),
    "lr": lambda optimizer, param: optimizer.param_groups[0].update(lr=0.5),
    "average": lambda optimizer, param: setattr(optimizer, "around", Around(ema_decay=0.5)),
    "amsgrad": lambda optimizer, param: optimizer.param_groups[0].update(amsgrad=True),
    "gone": lambda optimizer, param: (
        optimizer.param_groups[0]["params"].pop(1),
        optimizer.state.pop(param),
    ),
}


@pytest.mark.parametrize("away", AWAY)
def test_what_happens_to_one_without_a_gradient(away):
    """As by a plan that is made anew each step; also the errors are the same."""
    ends, said = [], []
    for renewed in (False, True):
        params = make_params(COMING)
        optimizer = ours("Adam")(params, lr=0.1)
        for step, grads in enumerate(make_grads(COMING, 6)):
            for param, grad in zip(params, grads, strict=True):
                param.grad = None
                if param is not params[1] or step not in (2, 3):
                    param.grad = grad.to(param.dtype)
            if step == 3:
                AWAY[away](optimizer, params[1])
            if renewed:
                optimizer._plan = None
            try:
                optimizer.step()
            except RuntimeError as error:
                said.append((step, str(error)))
        ends.append(optimizer)
    assert_twins_agree(*ends, "same")
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    assert [step for step, _ in said] == ([4, 5] * 2 if away == "shape" else [])


def test_groups_that_take_turns_keep_one_plan(plans):
    """As those of two networks that train one another."""
    groups = [{"params": make_params(), "weight_decay": decay} for decay in (0.0, 0.1)]
    optimizer = ours("AdamW")(groups, lr=0.1)
    for step in range(6):
        for place, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                param.grad = torch.ones_like(param) if step % 2 == place else None
        optimizer.step()
    assert len(plans) == 2
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_every_group_has_its_own_numbers(launches):
    # As many groups and steps as float32 cannot count: 101 * 200001 is odd and above 2**24.
    ends = []
    for cls in (ours("Adam"), native("Adam")):
        params = make_params([(4,)] * 101)
        optimizer = cls([{"params": [p], "lr": 0.1 / (1 + i)} for i, p in enumerate(params)])
        grads = [[torch.ones(4)] * 101]
        train(optimizer, grads)
        for param in params:
            optimizer.state[param]["step"].fill_(200_000)
        train(optimizer, grads * 2)
        ends.append(params)
    assert_params_agree(*ends)
    assert launches == [101] * 3


# ---- whatever is freed, resized or moved between steps ----


def slot_of(optimizer, param):
    """One of its slots, by name."""
    return next(name for name in optimizer.state[param] if name != "step")


def moved_data(optimizer, params):
    params[0].data = torch.linspace(-1, 1, 16).reshape(4, 4)


def transposed_data(optimizer, params):
    params[0].data = params[0].data.t()


def channels_last_data(optimizer, params):
    params[2].data = params[2].data.to(memory_format=torch.channels_last)


def resized_data(optimizer, params):
    params[0].data = torch.ones(7)
    del optimizer.state[params[0]]


def wider_data(optimizer, params):
    for param in params:
        param.data = param.data.double()
    optimizer.state.clear()


def storage_freed_and_back(optimizer, params):
    for tensor in (params[0].data, optimizer.state[params[0]][slot_of(optimizer, params[0])]):
        kept, storage = tensor.clone(), tensor.untyped_storage()
        size = storage.size()
        storage.resize_(0)
        hole = torch.full((size,), 7, dtype=torch.uint8)  # where it was, perhaps
        storage.resize_(size)
        tensor.copy_(kept)
        del hole


def shared_memory(optimizer, params):
    for param in params:
        param.data.share_memory_()


def swapped_with_another(optimizer, params):
    torch.utils.swap_tensors(params[0], torch.nn.Parameter(torch.full((4, 4), 0.5)))


def state_cleared(optimizer, params):
    optimizer.state.clear()


def state_of_one_deleted(optimizer, params):
    del optimizer.state[params[0]]


def state_of_one_emptied(optimizer, params):
    optimizer.state[params[0]].clear()


def state_of_one_replaced(optimizer, params):
    state = optimizer.state[params[1]]
    optimizer.state[params[1]] = {name: 2 * value for name, value in state.items()}


def states_swapped(optimizer, params):
    state, (a, b) = optimizer.state, (params[0], params[3])
    state[a], state[b] = state[b], state[a]


def slot_replaced(optimizer, params):
    optimizer.state[params[0]][slot_of(optimizer, params[0])] = torch.linspace(0, 1, 16).view(4, 4)


def buffer_set_to_none(optimizer, params):
    for state in optimizer.state.values():
        if "momentum_buffer" in state:  # as SGD's native may have it
            state["momentum_buffer"] = None


def slot_data_replaced(optimizer, params):
    slot = optimizer.state[params[0]][slot_of(optimizer, params[0])]
    slot.data = torch.linspace(0, 1, 16).view(4, 4)


def slot_data_transposed(optimizer, params):
    slot = optimizer.state[params[0]][slot_of(optimizer, params[0])]
    slot.data = slot.data.t()


def slot_written(optimizer, params):
    optimizer.state[params[0]][slot_of(optimizer, params[0])].zero_()


def steps_replaced(optimizer, params):
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.tensor(7.0)


def steps_of_shape_1(optimizer, params):
    state = optimizer.state_dict()
    for entries in list(state["state"].values())[:-1]:
        if "step" in entries:
            entries["step"] = entries["step"].reshape(1).clone()
    optimizer.load_state_dict(state)


def steps_in_bfloat16(optimizer, params):
    state = optimizer.state_dict()
    for entries in state["state"].values():
        if "step" in entries:
            entries["step"] = entries["step"].bfloat16()
    optimizer.load_state_dict(state)


def own_state_loaded(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())


def old_state_loaded(optimizer, params):
    state = saved(optimizer)
    train(optimizer, [[torch.ones_like(p) for p in params]])
    optimizer.load_state_dict(state)


def parameter_dropped(optimizer, params):
    optimizer.param_groups[0]["params"].pop()
    params.pop()


def parameters_swapped(optimizer, params):
    own = optimizer.param_groups[0]["params"]
    own[0], own[3] = own[3], own[0]


def group_split_and_shifted(optimizer, params):
    group = optimizer.param_groups[0]
    last = group["params"].pop()
    optimizer.param_groups.append({**group, "params": [last], "lr": 0.2})
    train(optimizer, [[torch.ones_like(p) for p in params]])
    optimizer.param_groups[1]["params"].insert(0, group["params"].pop())  # the same order of all


def group_added(optimizer, params):
    params.extend(make_params([(4, 4), (6,)]))
    optimizer.add_param_group({"params": params[-2:], "lr": 0.2})


def grads_zeroed(optimizer, params):
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


def grads_dropped(optimizer, params):
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()


def hyperparameters_changed(optimizer, params):
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.1, maximize=True)


MOVES = [
    *(moved_data, transposed_data, channels_last_data, resized_data, wider_data),
    *(storage_freed_and_back, shared_memory, swapped_with_another),
    *(state_cleared, state_of_one_deleted, state_of_one_emptied, state_of_one_replaced),
    *(
        states_swapped,
        slot_replaced,
        buffer_set_to_none,
        slot_data_replaced,
        slot_data_transposed,
        slot_written,
    ),
    *(steps_replaced, steps_of_shape_1, steps_in_bfloat16, own_state_loaded, old_state_loaded),
    *(parameter_dropped, parameters_swapped, group_split_and_shifted, group_added),
    *(grads_zeroed, grads_dropped, hyperparameters_changed),
]
WAYS = [{}, {"foreach": True}, {"foreach": False}]
WAY_IDS = ["kernel", "foreach", "plain"]
HISTORY = [("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}), ("Adam", {"lr": 0.1})]


def steps_from(params, number, first=0):
    """Gradients for parameters as they are now."""
    shapes = [tuple(p.shape) for p in params]
    grads = make_grads(shapes, first + number, params[0].dtype)[first:]
    return [[torch.empty_like(p).copy_(g) for p, g in zip(params, s, strict=True)] for s in grads]


def history(make, move):
    """Two steps, the move, three steps."""
    params = make_params([(4, 4), (5,), (2, 3, 4, 5), (4, 4)])
    optimizer = make(params)
    train(optimizer, steps_from(params, 2))
    move(optimizer, params)
    for step in steps_from(params, 3, 2):
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        optimizer.step()
    return optimizer, params


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize(("name", "options"), HISTORY, ids=["SGD", "Adam"])
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_moved_between_steps(move, name, options, way):
    mine, theirs = (
        history(lambda p, cls=cls, way=way: cls(p, **options, **way), move)
        for cls, way in ((ours(name), way), (native(name), {}))
    )
    assert_params_agree(mine[1], theirs[1], start=[torch.zeros_like(p) for p in theirs[1]])
    for a, b in zip(mine[1], theirs[1], strict=True):
        for key, value in theirs[0].state.get(b, {}).items():
            actual = mine[0].state[a][key].reshape(value.shape)
            assert_agree(numbers(actual), numbers(value), "float32", what=key)


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize(
    "shapes",
    [((3, 5), (5, 3)), ((4,), (3, 4)), ((6,), (4,)), ((1,), (4,))],
    ids=lambda shapes: f"{shapes[0]}-to-{shapes[1]}",
)
@pytest.mark.filterwarnings(SLOW)
def test_another_shape_with_the_old_state_is_an_error(shapes, name, way):
    old, new = shapes
    options = {"momentum": 0.9} if name == "SGD" else {}
    for cls, flags in ((native(name), {}), (ours(name), way)):
        (param,) = make_params([old])
        optimizer = train(cls([param], **options, **flags), make_grads([old], 2))
        param.grad = None
        # The same memory where it is enough.
        enough = param.data.numel() >= np.prod(new)
        param.data = param.data.flatten()[: np.prod(new)].view(new) if enough else torch.ones(new)
        param.grad, before = torch.ones(new), param.detach().clone()
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert torch.equal(param, before) or cls is native(name)


GRADIENTS = {
    "transposed": lambda g: g.t(),
    "transposed-and-back": lambda g: g.t().clone(memory_format=torch.contiguous_format).t(),
    "expanded": lambda g: g[:1].expand(4, 4),
    "sliced": lambda g: torch.stack([g, g], -1)[..., 0],
    "negative": lambda g: torch._neg_view(g),
    "zeros-without-memory": lambda g: torch._efficientzerotensor(g.shape),
    "requires-grad": lambda g: g.clone().requires_grad_() * 1,
    "parameter": lambda g: torch.nn.Parameter(g, requires_grad=False),
    "the-weights": None,
}


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("odd", GRADIENTS)
@pytest.mark.parametrize(("name", "options"), HISTORY, ids=["SGD", "Adam"])
def test_gradients_that_lie_otherwise(name, options, odd, way):
    optimizers = []
    for cls, flags in ((ours(name), way), (native(name), {})):
        (param,) = make_params([(4, 4)])
        optimizer = cls([param], **options, **flags)
        for i, (grad,) in enumerate(make_grads([(4, 4)], 6)):
            if i not in (2, 3):
                param.grad = grad
            elif odd == "the-weights":
                param.grad = param.detach()
            else:
                param.grad = GRADIENTS[odd](grad)
            optimizer.step()
        optimizers.append(optimizer)
    mine, theirs = (o.param_groups[0]["params"] for o in optimizers)
    assert_params_agree(mine, theirs, start=make_params([(4, 4)]))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 3, 1, 5), (0,), (0, 3)], ids=str)
def test_strides_of_no_consequence_do_not_matter(shape, launches):
    (param,) = make_params([shape])
    optimizer = ours("Adam")([param], fused=True)
    strides = [7 if n <= 1 else stride for n, stride in zip(shape, param.stride(), strict=True)]
    param.grad = torch.ones(99).as_strided(shape, strides)
    optimizer.step()
    assert launches == [1]


def test_after_an_odd_gradient_the_kernel_is_back(launches, unwarned):
    (param,) = make_params([(4, 4)])
    optimizer = ours("Adam")([param])
    param.grad = torch.ones(4, 4).t()
    with pytest.warns(UserWarning, match="lies otherwise in memory"):
        optimizer.step()
    assert launches == []
    param.grad = torch.ones(4, 4)
    optimizer.step()
    assert launches == [1]


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_a_conjugate_gradient(way):
    ends = []
    for cls, flags in ((ours("Adam"), way), (native("Adam"), {})):
        param = torch.nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))
        optimizer = cls([param], lr=0.1, **flags)
        for grad in (torch.tensor([1 + 2j, 1 - 1j]), torch.tensor([3 + 2j, -1j]).conj()):
            param.grad = grad if cls is ours("Adam") else grad.resolve_conj()  # as it must be there
            optimizer.step()
        ends.append([param])
    assert_params_agree(*ends, start=[torch.ones(2, dtype=torch.complex64)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_of_another_dtype(dtype, launches):
    ends = []
    for way in WAYS:
        (param,) = make_params([(67,)], torch.bfloat16)
        if not hasattr(param, "grad_dtype"):
            pytest.skip("this PyTorch has no gradients of another dtype than their parameter's")
        param.grad_dtype = None
        optimizer = ours("Adam")([param], lr=0.1, **way)
        start = make_grads([(67,)], 2, torch.bfloat16)
        ends.append(train(optimizer, [*start, *make_grads([(67,)], 3, dtype)]).param_groups[0])
    for other in ends[1:]:
        assert_params_agree(ends[0]["params"], other["params"], "bfloat16")
    assert launches == [1] * 5


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_module_moved_to_another_dtype_goes_on_like_the_plain_path(dtype):
    # The native refuses: its state stays in float32.
    ends = []
    for way in WAYS:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        optimizer = ours("Adam")(model.parameters(), lr=0.1, **way)
        for i, x in enumerate(torch.randn(5, 8, 4)):
            if i == 2:
                model.to(dtype)
            optimizer.zero_grad()
            model(x.to(model.weight.dtype)).square().mean().backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    kind = str(dtype).removeprefix("torch.")
    kind = "float32" if kind == "float64" else kind  # its two first steps are in float32
    for other in ends[1:]:
        assert_params_agree(ends[0], other, kind, [torch.zeros_like(p) for p in other])


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_two_optimizers_from_one_state(name):
    options = {"momentum": 0.9} if name == "SGD" else {}
    shapes = [(3, 5), (), (4,)]
    grads = make_grads(shapes, 6)
    ends = []
    for cls in (ours(name), native(name)):
        one, other = (cls(make_params(shapes), lr=0.05, **options) for _ in range(2))
        train(one, grads[:2])
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for step in grads[2:]:
            train(one, [step])
            train(other, [[2 * g for g in step]])
        ends.append((one, other))
    for mine, theirs in zip(*ends, strict=True):
        assert_twins_agree(mine, theirs)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_two_optimizers_from_one_live_state(name):
    # Whether they share memory from then on, as the natives do, is not to depend on the path.
    options = {"momentum": 0.9} if name == "SGD" else {}
    shapes = [(3, 5), (), (4,)]
    grads = make_grads(shapes, 6)
    ends = []
    for way in WAYS:
        one, other = (ours(name)(make_params(shapes), lr=0.05, **options, **way) for _ in range(2))
        train(one, grads[:2])
        other.load_state_dict(one.state_dict())
        for step in grads[2:]:
            train(one, [step])
            train(other, [[2 * g for g in step]])
        ends.append([p for o in (one, other) for p in o.param_groups[0]["params"]])
    for end in ends[1:]:
        assert_params_agree(ends[0], end, start=make_params(shapes) * 2)


@pytest.mark.parametrize("size", [5, 40_000])  # one span, and two that may go at once
def test_two_parameters_on_one_memory_are_updated_one_after_the_other(size):
    ends = []
    for cls in (ours("SGD"), native("SGD")):
        memory = torch.zeros(size)
        params = [torch.nn.Parameter(memory), torch.nn.Parameter(memory)]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        train(optimizer, [[torch.ones(size), torch.full((size,), 2.0)]] * 200)
        ends.append([memory])
    assert_params_agree(*ends, start=[torch.zeros(size)])


def storage_of(tensor):
    return weakref.ref(tensor.untyped_storage())


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_nothing_is_kept_alive(way):
    params = make_params([(67,), (5,)])
    optimizer = ours("Adam")(params, **way)
    for grads in make_grads([(67,), (5,)], 3):
        train(optimizer, [grads])
        old = [storage_of(p.grad) for p in params]
        assert all(storage() is not None for storage in old)
        optimizer.zero_grad()
        gc.collect()
        assert all(storage() is None for storage in old)

    kept = [params[0], optimizer.state[params[0]]["exp_avg"], optimizer.state[params[0]]["step"]]
    alive = [weakref.ref(optimizer), *map(weakref.ref, kept), storage_of(params[0])]
    del optimizer, params, kept
    gc.collect()
    assert [one() for one in alive] == [None] * 5


# ---- autograd, flags and warnings ----


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_backward_through_a_changed_parameter_is_an_error(name, way):
    words = []
    for cls, flags in ((ours(name), way), (native(name), {})):
        (param,) = make_params([(4,)])
        optimizer = cls([param], **flags)
        loss, param.grad = param.square().sum(), torch.ones(4)
        optimizer.step()
        with pytest.raises(RuntimeError) as error:
            loss.backward()
        words.append(str(error.value))
    assert words[0] == words[1] and "modified by an inplace operation" in words[0]


FUSED = {i: one for i, one in zip(IDS, OPTIONS, strict=True) if takes(one[0], "fused")}


@pytest.mark.parametrize(("name", "options"), FUSED.values(), ids=FUSED)
def test_fused_is_the_kernel(name, options, launches):
    grads = make_grads()
    fused, default = (
        train(ours(name)(make_params(), fused=f, **options), grads) for f in (1, None)
    )
    default.param_groups[0]["fused"] = 1
    assert_twins_agree(fused, default, "same")
    assert launches == [len(grads[0])] * 2 * len(grads)
    assert_twins_agree(fused, train(native(name)(make_params(), fused=1, **options), grads))


def sliced():
    return torch.nn.Parameter(make_params([(6, 8)])[0].detach()[::2, 1::3])


@pytest.mark.parametrize("name", [n for n in NAMES if takes(n, "fused")])
@pytest.mark.parametrize("late", [False, True], ids=["at-once", "later"])
def test_fused_that_cannot_be_is_an_error(name, late):
    (good,), (bad,) = make_params([(3, 3)]), make_params([(3, 3)]) if late else [sliced()]
    optimizer = ours(name)([{"params": [good]}, {"params": [bad]}], fused=True)
    if late:  # the kernel worked before
        train(optimizer, make_grads([(3, 3)] * 2, 2))
        bad.grad = torch.ones(3, 6)[:, ::2]
    else:
        good.grad = bad.grad = torch.ones(3, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="`fused=True` is not possible: a "):
        optimizer.step()
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("other", ["foreach", "differentiable"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_fused_along_with_another_way(name, other):
    words = []
    for cls in (ours(name), native(name)):
        with pytest.raises(RuntimeError) as error:
            cls(make_params(), **{"fused": True, other: True})
        words.append(str(error.value).split()[0])
    assert words == ["`fused`"] * 2


@pytest.mark.parametrize(
    ("flags", "launched"),
    [
        ({}, True),
        ({"foreach": None, "fused": None}, True),
        ({"fused": True}, True),
        ({"capturable": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
        ({"differentiable": True}, False),
        ({"differentiable": True, "capturable": True}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("later", [False, True], ids=["at-once", "later"])
def test_flags_choose_the_way(flags, launched, later, launches):
    grads = make_grads()
    params = make_params()
    if flags.get("differentiable"):
        params = [p.detach() for p in params]
    optimizer = ours("Adam")(params, lr=0.05, **({} if later else flags))
    train(optimizer, grads[:2])
    optimizer.param_groups[0].update(flags)
    launches.clear()
    train(optimizer, grads[2:])
    assert bool(launches) == launched
    theirs = train(native("Adam")(make_params(), lr=0.05), grads)
    assert_params_agree(
        [p.detach() for p in optimizer.param_groups[0]["params"]], theirs.param_groups[0]["params"]
    )


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": False}], ids=str)
def test_a_sparse_gradient_is_refused_before_anything_changes(way):
    optimizer = train(ours("Adam")(make_params(), **way), make_grads(steps=2))
    before = snapshot(optimizer)
    optimizer.param_groups[0]["params"][2].grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match=r"^Adam does not support sparse gradients"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_slow_parameters_are_said_once(unwarned, recwarn):
    for _ in range(2):
        optimizer = ours("Adam")([sliced(), *make_params()])
        train(optimizer, make_grads([(3, 3), *[p.shape for p in make_params()]], 3))
    (warning,) = recwarn
    assert warning.category is UserWarning and warning.filename == train.__code__.co_filename
    assert str(warning.message).endswith(" slowly: a parameter has gaps in its memory")


def test_without_llvmlite():
    child("""
        import sys, warnings
        sys.modules["llvmlite"] = None
        import torch, portopt_torch
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
            mine = portopt_torch.Adam(params[:1], lr=0.1)
            theirs = torch.optim.Adam(params[1:], lr=0.1)
            for optimizer in (mine, theirs):
                for step in range(3):
                    for p in params:
                        p.grad = torch.arange(5.0) - step
                    optimizer.step()
        assert torch.allclose(*params)
        (one,) = said
        assert str(one.message).endswith("llvmlite is not installed: pip install llvmlite"), one
        try:
            fused = portopt_torch.Adam(params, fused=True)
            fused.step()
        except RuntimeError as error:
            assert "llvmlite is not installed" in str(error)
            print("done")
    """)


# ---- torch.compile ----


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiled_steps(cls, backend, lr, options, steps=9):
    """The parameters, and the number of compilations by the end of every step."""
    params = make_params([(3, 5), (4,), (4,), (6,)])
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.1}]
    optimizer = cls(groups, lr=lr, **options)
    counts = []
    run = torch.compile(optimizer.step, backend=backend)
    for i, step in enumerate(make_grads([p.shape for p in params], steps)):
        for group in optimizer.param_groups if i > 4 else ():
            if torch.is_tensor(lr):
                group["lr"].fill_(0.1 / i)
            else:
                group["lr"] = 0.1 / i
        for param, grad in zip(params, step, strict=True):
            param.grad = grad
        run()
        counts.append(getattr(backend, "frame_count", None))
    return params, counts


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_steps_are_the_plain_rule(name, lr, launches, dynamo):
    options = {"momentum": 0.9} if name == "SGD" else {}
    lr = lr.clone() if torch.is_tensor(lr) else lr
    mine, counts = compiled_steps(ours(name), CompileCounter(), lr, options)
    assert launches == []
    assert counts[2] == counts[4]  # warm after two steps
    assert counts[6] == counts[-1]  # another learning rate may cost one more
    lr = torch.tensor(0.1) if torch.is_tensor(lr) else 0.1
    with torch._dynamo.config.patch(disable=True):
        theirs, _ = compiled_steps(native(name), "eager", lr, options)
    assert_params_agree(mine, theirs)


def test_a_compiler_that_looks_at_every_call_sees_no_launch():
    """As where it has given up a step itself, and goes on below."""
    child("""
        import torch, portopt_torch
        from torch._dynamo.eval_frame import set_eval_frame
        from torch._dynamo.types import ConvertFrameReturn
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer, seen = portopt_torch.Adam([param]), []
        optimizer.step()
        def look(frame, *_):
            seen.append(frame.f_code.co_name)
            return ConvertFrameReturn()
        before = set_eval_frame(look)
        optimizer.step()
        set_eval_frame(before)
        assert "step" in seen and not {"_launch", "fits", "prepare"} & {*seen}, seen
        print("done")
    """)


def test_after_a_compiled_step_the_kernel_is_back(launches, dynamo):
    params = make_params()
    optimizer = train(ours("Adam")(params), make_grads(steps=1))
    torch.compile(optimizer.step, backend="eager")()
    assert len(launches) == 1
    optimizer.step()
    assert len(launches) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # Inductor's
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_compiled_by_inductor(name, dynamo):
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError as error:
        pytest.skip(f"Inductor needs a C++ compiler: {error}")
    options = {"momentum": 0.9} if name == "SGD" else {}
    mine, _ = compiled_steps(ours(name), "inductor", torch.tensor(0.1), options)
    with torch._dynamo.config.patch(disable=True):
        theirs, _ = compiled_steps(native(name), "eager", torch.tensor(0.1), options)
    assert_params_agree(mine, theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {"around": Around(clip_norm=0.3)}), ("SGD", {"momentum": 0.9, "dampening": 0.5})],
)
def test_compiled_comparisons_of_scalars(name, options):
    """A norm, and another learning rate each step, are symbols to what traces ahead of time."""
    torch._dynamo.reset()
    ends = []
    for compiled in (True, False):
        (param,) = make_params([(6, 4)])
        optimizer = ours(name)([param], lr=0.05, **options)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for t, (grad,) in enumerate(make_grads([(6, 4)], steps=4)):
            param.grad = grad
            optimizer.param_groups[0]["lr"] = 0.05 / (t + 1)
            step()
        ends.append([param])
    assert_params_agree(*ends)


# ---- GradScaler ----


SCALED = [(name, {}) for name in NAMES]
SCALED += [(name, {"fused": True}) for name in NAMES if takes(name, "fused")]


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled-and-clipped"])
@pytest.mark.parametrize(("name", "flags"), SCALED, ids=lambda value: str(value or ""))
def test_grad_scaler(name, flags, unscale):
    ends, counts = [], []
    for cls in (ours(name), native(name)):
        params = make_params([(4,), (3, 5)])
        optimizer = cls(params, **trained(name), **flags)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for step, scale in enumerate((1.0, 2.0, float("inf"), 3.0, float("nan"), 1.0, 4.0)):
            optimizer.zero_grad()
            scaler.scale(sum(scale * (p - step).square().sum() for p in params)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            moved = any(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
            assert moved == np.isfinite(scale)
            counts.append((scaler.get_scale(), *(s.get("step") for s in optimizer.state.values())))
        assert not hasattr(optimizer, "found_inf")
        ends.append(optimizer)
    assert_twins_agree(*ends)
    assert counts[:7] == counts[7:]


# ---- threads and processes ----


def test_two_threads_step_two_optimizers_at_once():
    shapes, steps = [(300, 300), (64, 64), (5,)], 300  # the first is for several threads
    grads = make_grads(shapes, 3) * (steps // 3)
    makers = [partial(ours("Adam"), lr=0.01), partial(ours("RMSprop"), momentum=0.9)]
    expected = [train(make(make_params(shapes)), grads) for make in makers]
    optimizers = [make(make_params(shapes)) for make in makers]
    threads = [threading.Thread(target=train, args=(o, grads)) for o in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(optimizers, expected, strict=True):
        assert_twins_agree(one, other, "same")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_the_first_step_steps_on():
    child("""
        import os, warnings, torch, portopt_torch
        torch.set_num_threads(2)
        param = torch.nn.Parameter(torch.ones(300_000))
        param.grad = torch.ones_like(param)  # once: PyTorch's own threads hang in the child
        optimizer = portopt_torch.Adam([param], lr=0.1)
        optimizer.step()
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork with threads
        forked = os.fork()
        optimizer.step()
        values = param.detach().numpy()
        assert (values == values[0]).all() and abs(values[0] - 0.8) < 1e-6
        if forked == 0:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 7
        print("done")
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_data_loader_with_forked_workers_beside_it():
    child("""
        import warnings, torch, portopt_torch
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a fork with threads
        param = torch.nn.Parameter(torch.zeros(300_000))
        optimizer = portopt_torch.SGD([param], lr=1.0)
        for epoch in range(2):
            loader = torch.utils.data.DataLoader(
                torch.arange(6.0), num_workers=2, multiprocessing_context="fork"
            )
            for x in loader:
                optimizer.zero_grad()
                (param * x).sum().backward()
                optimizer.step()
        assert (param == -30).all()
        print("done")
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of threads in /proc")
@pytest.mark.parametrize("limit", ["OMP_NUM_THREADS", "set_num_threads"])
def test_one_thread_is_one_thread(limit):
    child(f"""
        import os
        if {limit == "OMP_NUM_THREADS"}:
            os.environ["OMP_NUM_THREADS"] = "1"
        import torch, portopt_torch
        if {limit == "set_num_threads"}:
            torch.set_num_threads(1)
        def threads():
            return len(os.listdir("/proc/self/task"))
        def step():
            before = threads()
            optimizer.step()
            return threads() - before
        param = torch.nn.Parameter(torch.ones(300_000))
        param.grad = torch.ones_like(param)
        optimizer = portopt_torch.Adam([param])
        assert torch.get_num_threads() == 1
        assert step() == 0 and torch.get_num_threads() == 1
        torch.set_num_threads(2)
        assert step() == 1 and torch.get_num_threads() == 2
        print("done")
    """)


def test_a_thread_that_outlives_the_main_one_steps_on():
    child("""
        import threading, torch, portopt_torch
        torch.set_num_threads(2)
        def train():
            param = torch.nn.Parameter(torch.ones(300_000))
            optimizer = portopt_torch.Adam([param], lr=0.1)
            threading.main_thread().join()
            for _ in range(3):
                param.grad = torch.ones_like(param)
                optimizer.step()
            assert abs(param[0] - 0.7) < 1e-6
            print("done")
        threading.Thread(target=train).start()
    """)


@pytest.mark.parametrize("name", NAMES)
def test_steps_inside_backward(name):
    ends = []
    for cls in (ours(name), native(name)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        start = [p.detach().clone() for p in model.parameters()]
        optimizers = {p: cls([p], lr=0.05) for p in model.parameters()}

        def hook(param, optimizers=optimizers):
            optimizers[param].step()
            optimizers[param].zero_grad()

        for param in model.parameters():
            param.register_post_accumulate_grad_hook(hook)
        for x in torch.randn(5, 8, 4):
            model(x).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        ends.append(list(model.parameters()))
    assert_params_agree(*ends, start=start)


def test_an_interrupt_leaves_whole_tensors():
    # All elements of a tensor are equal before and after every step.
    child("""
        import signal, torch, portopt_torch
        torch.set_num_threads(2)
        params = [torch.nn.Parameter(torch.ones(2_000_000)) for _ in range(3)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = portopt_torch.Adam(params, lr=0.1)
        optimizer.step()
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for delay in (0.01, 0.013, 0.021, 0.027, 0.034, 0.04):
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                while True:
                    optimizer.step()
            except KeyboardInterrupt:
                pass
            tensors = [*params, *(optimizer.state[p]["exp_avg_sq"] for p in params)]
            assert all(bool((t == t[0]).all()) for t in tensors)
        before = params[0][0].item()
        optimizer.step()
        assert params[0][0] < before
        print("done")
    """)


# ---- memory, and what is compiled ----


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_step_takes_no_memory():
    child("""
        import re, torch, portopt_torch
        from pathlib import Path
        from portopt import Around
        around = Around(clip_norm=1.0, ema_decay=0.9, zero_grad=True)
        params = [torch.nn.Parameter(torch.ones(1024, 1024)) for _ in range(16)]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = portopt_torch.Adam(params, around=around)
        def kilobytes(name):
            return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        optimizer.step()
        optimizer.step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before = kilobytes("VmRSS")
        for _ in range(3):
            optimizer.step()
        assert kilobytes("VmHWM") - before < 1024, kilobytes("VmHWM") - before
        print("done")
    """)


def test_only_the_first_step_compiles():
    (param,) = make_params([(67,)])
    optimizer = ours("Adam")([param], lr=0.1, weight_decay=0.3)
    train(optimizer, make_grads([(67,)], 1))
    first = compiler._compiled.cache_info().misses
    for step, lr in enumerate((0.2, 0.0, 1e-3)):
        optimizer.param_groups[0].update(lr=lr, betas=(0.5, 0.9 + lr / 10))
        train(optimizer, make_grads([(67,)], 2)[step % 2 :])
    optimizer.add_param_group({"params": make_params([(3, 5)]), "lr": 0.7})
    train(optimizer, make_grads([(67,), (3, 5)], 2))
    assert compiler._compiled.cache_info().misses == first


def test_memory_that_a_plan_knows_lives_until_the_next_step():
    """So that no other tensor comes to lie at the address that the plan asks for."""
    (param,) = make_params([(67,)])
    optimizer = train(ours("Adam")([param]), make_grads([(67,)], 1))
    memory = np.zeros(67, np.float32)
    slot = optimizer.state[param]["exp_avg"] = torch.from_numpy(memory)
    alive = weakref.ref(memory)
    del memory
    optimizer.step()
    slot.data = torch.zeros(67)
    assert alive() is not None
    optimizer.step()
    assert alive() is None
