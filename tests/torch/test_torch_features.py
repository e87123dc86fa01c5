"""What is handed a torch.optim.Optimizer gets from ours what it gets from the native."""

import copy
import gc
import inspect
import itertools
import pickle
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from support import TOLERANCE, assert_agree, gradients
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from twins import (
    IDS,
    NAMES,
    OPTIONS,
    assert_params_agree,
    assert_twins_agree,
    default_dtype,
    layout,
    make_grads,
    make_params,
    native,
    numbers,
    ours,
    takes,
    train,
    trained,
)

from portopt import Around

GRADS = make_grads(steps=6)
every_class = pytest.mark.parametrize("name", NAMES)


def twins(name, params=make_params, **options):
    return [cls(params(), **options) for cls in (ours(name), native(name))]


SCHEDULES = {
    "LambdaLR": {"lr_lambda": lambda epoch: 1 / (1 + epoch)},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 3], "gamma": 0.5},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 4},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.5},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
    "SequentialLR": {"milestones": [2]},
    "ChainedScheduler": {},
}


def scheduled(schedule, optimizer):
    """A schedule of ``lr_scheduler``, which moves the momentum too where it can."""
    options = dict(SCHEDULES[schedule])
    if schedule in ("CyclicLR", "OneCycleLR"):
        options["cycle_momentum"] = bool({"momentum", "betas"} & {*optimizer.defaults})
    if schedule in ("SequentialLR", "ChainedScheduler"):
        parts = [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.StepLR(optimizer, 2, 0.5)]
        if schedule == "ChainedScheduler":
            return lr_scheduler.ChainedScheduler(parts)
        return lr_scheduler.SequentialLR(optimizer, parts, **options)
    return getattr(lr_scheduler, schedule)(optimizer, **options)


@every_class
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(name, schedule):
    optimizers = twins(name, **trained(name))
    plans = []
    for optimizer in optimizers:
        scheduler, plan = scheduled(schedule, optimizer), []
        for step in GRADS:
            train(optimizer, [step])
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
            group = optimizer.param_groups[0]
            plan.append([group["lr"], group.get("momentum"), group.get("betas")])
        plans.append(plan)
    assert plans[0] == plans[1] and plans[0][0] != plans[0][-1]
    assert_twins_agree(*optimizers)


@every_class
def test_closure(name):
    ends = []
    for cls in (ours(name), native(name)):
        (param,) = make_params([(4,)])
        optimizer, modes = cls([param], lr=0.05), []

        def closure(param=param, optimizer=optimizer, modes=modes):
            optimizer.zero_grad()
            modes.append(torch.is_grad_enabled())
            loss = (param - 1).square().sum()
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [optimizer.step(closure), optimizer.step(closure=closure)]
        assert modes == [True, True] and optimizer.step() is None
        ends.append([param.detach(), torch.stack(losses).detach()])
    assert_params_agree([ends[0][0]], [ends[1][0]])
    assert_agree(*(numbers(losses) for _, losses in ends), "float32")


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_groups_with_their_own_hyperparameters_and_one_added_later(name, options):
    optimizers = []
    for cls in (ours(name), native(name)):
        a, b, c, d = make_params()
        optimizer = cls([{"params": [a], "lr": 0.2}, {"params": b, "weight_decay": 0.5}], **options)
        train(optimizer, [step[:2] for step in GRADS[:3]])
        optimizer.add_param_group({"params": [c, d], "maximize": True})
        optimizers.append(train(optimizer, GRADS[3:]))
    assert len(optimizers[0].param_groups) == 3
    start = iter(make_params())
    for mine, theirs in zip(*(o.param_groups for o in optimizers), strict=True):
        begin = list(itertools.islice(start, len(theirs["params"])))
        assert_params_agree(mine["params"], theirs["params"], start=begin)
    assert layout(optimizers[0]) == layout(optimizers[1])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("SGD", {"dampening": 0.5}, {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
        ("SGD", {"momentum": 0.9}, {"nesterov": True}),
        ("SGD", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}),
        ("RMSprop", {"momentum": 0.9}, {"momentum": 0.0}),
        ("RMSprop", {"centered": True}, {"centered": False}),
        ("Adam", {"amsgrad": True}, {"amsgrad": False}),
        ("Adam", {}, {"betas": (0.5, 0.9), "eps": 0.1}),
        *((name, {}, {"lr": 0.2}) for name in NAMES),
        *((name, {}, {"maximize": True, "weight_decay": 0.1}) for name in NAMES),
    ],
)
def test_hyperparameters_changed_between_steps(name, before, after):
    optimizers = twins(name, **{"lr": 0.05, **before})
    for optimizer in optimizers:
        train(optimizer, GRADS[:3])
        optimizer.param_groups[0].update(after)
        train(optimizer, GRADS[3:])
        optimizer.param_groups[0].update(before)
        train(optimizer, GRADS[:2])
    assert_twins_agree(*optimizers)


@pytest.mark.parametrize(
    ("name", "after", "slot"),
    [
        ("Adam", {"amsgrad": True}, "max_exp_avg_sq"),
        ("RMSprop", {"momentum": 0.9}, "momentum_buffer"),
        ("RMSprop", {"centered": True}, "grad_avg"),
    ],
)
def test_a_slot_switched_on_between_steps_starts_at_zero(name, after, slot):
    # The native stops with a KeyError here, so it is given the slot.
    optimizers = twins(name, lr=0.05)
    for optimizer in optimizers:
        train(optimizer, GRADS[:3])
        optimizer.param_groups[0].update(after)
    for param, state in optimizers[1].state.items():
        state[slot] = torch.zeros_like(param)
    assert_twins_agree(*(train(optimizer, GRADS[3:]) for optimizer in optimizers))


def test_to_save_changes_nothing():
    """A momentum that was turned on is saved as zero, and yet begins with its gradient."""
    around = Around(ema_decay=0.5)
    optimizers = [
        ours("SGD")(make_params(), lr=0.1, dampening=0.5, around=around) for _ in range(2)
    ]
    for optimizer in optimizers:
        train(optimizer, GRADS[:2])
        optimizer.param_groups[0]["momentum"] = 0.9
    saved = optimizers[1].state_dict()["state"]
    assert len(saved) == len(make_params())
    assert not any(state["momentum_buffer"].any() for state in saved.values())
    assert_twins_agree(*(train(optimizer, GRADS[2:]) for optimizer in optimizers))


@every_class
def test_hooks(name):
    logs = []
    for cls in (ours(name), native(name)):
        optimizer, log = cls(make_params()), []
        note = lambda name, log=log: lambda *args: log.append((name, len(args)))  # noqa: E731
        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
        optimizer.register_state_dict_pre_hook(note("save"))
        optimizer.register_state_dict_post_hook(note("saved"))
        optimizer.register_load_state_dict_pre_hook(note("load"))
        optimizer.register_load_state_dict_post_hook(note("loaded"))
        train(optimizer, GRADS[:2])
        optimizer.load_state_dict(optimizer.state_dict())
        logs.append(log)
    assert logs[0] == logs[1] and len(logs[0]) == 8


def test_hooks_around_a_step_of_a_subclass_run_once():
    class Own(ours("SGD")):
        def step(self, closure=None):
            return super().step(closure)

    (param,) = make_params([(3,)])
    optimizer, calls = Own([param]), []
    optimizer.register_step_pre_hook(lambda *args: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *args: calls.append("post"))
    train(optimizer, make_grads([(3,)], steps=1))
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("way", ["param", "state"])
def test_an_optimizer_that_leads_to_itself_is_collected(way):
    (param,) = make_params([(3,)])
    optimizer = ours("Adam")([param])
    train(optimizer, make_grads([(3,)], steps=2))
    if way == "param":
        param.optimizer = optimizer
    else:
        optimizer.state[param]["owner"] = optimizer
        train(optimizer, make_grads([(3,)], steps=2))
    gone = weakref.ref(param), weakref.ref(optimizer)
    del param, optimizer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@every_class
def test_global_and_argument_changing_hooks(name):
    calls = []
    optimizer = ours(name)(make_params())
    seen = register_optimizer_step_post_hook(lambda o, *_: calls.append(o))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 7.0}))
    try:
        assert optimizer.step() == 7.0
    finally:
        seen.remove()
    assert calls == [optimizer]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
@every_class
def test_copies_go_on_the_same(name, copied):
    options = trained(name)
    one = train(ours(name)(make_params(), **options), GRADS[:3])
    other = copied(one)
    assert type(other) is type(one) and other.defaults == one.defaults
    assert_twins_agree(
        train(other, GRADS[3:]), train(native(name)(make_params(), **options), GRADS)
    )
    kept = train(ours(name)(make_params(), **options), GRADS[:3])
    assert_twins_agree(one, kept, "same")


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_late_missing_and_frozen(name, options):
    late = [[None, b, c if i > 1 else None, d] for i, (_, b, c, d) in enumerate(GRADS)]
    optimizers = twins(name, **options)
    for optimizer in optimizers:
        optimizer.param_groups[0]["params"][0].requires_grad_(False)
        train(optimizer, late)
    assert_twins_agree(*optimizers)
    known = [[p in o.state for p in o.param_groups[0]["params"]] for o in optimizers]
    assert known[0] == known[1]  # Adagrad's state is there from the beginning
    assert torch.equal(optimizers[0].param_groups[0]["params"][0], make_params()[0])


@every_class
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(name, to_none):
    optimizer = train(ours(name)(make_params()), GRADS[:1])
    optimizer.zero_grad(set_to_none=to_none)
    for param in optimizer.param_groups[0]["params"]:
        assert param.grad is None if to_none else not param.grad.any()


def strided():
    transposed = torch.nn.Parameter(make_params([(3, 5)])[0].detach().t())
    image = make_params([(2, 3, 4, 5)])[0].detach().to(memory_format=torch.channels_last)
    sliced = torch.nn.Parameter(make_params([(6, 8)])[0].detach()[::2, 1::3])
    return [transposed, torch.nn.Parameter(image), sliced]


@pytest.mark.filterwarnings("ignore:portopt_torch steps without a kernel")
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_parameters_that_are_not_contiguous(name, options):
    optimizers = twins(name, strided, **options)
    for optimizer in optimizers:
        train(optimizer, make_grads([(5, 3), (2, 3, 4, 5), (3, 3)]))
    mine, theirs = (o.param_groups[0]["params"] for o in optimizers)
    assert_params_agree(mine, theirs, start=strided())
    if name not in ("SGD", "Rprop"):  # whose native's state has the first gradient's strides
        assert layout(optimizers[0]) == layout(optimizers[1])
    assert mine[1].is_contiguous(memory_format=torch.channels_last)


@every_class
def test_named_and_duplicate_parameters(name):
    model = torch.nn.Linear(2, 2)
    mine, theirs = (cls(model.named_parameters()) for cls in (ours(name), native(name)))
    assert layout(mine) == layout(theirs)
    assert mine.param_groups[0]["param_names"] == ["weight", "bias"]

    optimizers = []
    for cls, foreach in ((ours(name), False), (ours(name), True), (native(name), False)):
        (param,) = make_params([(4,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizers.append(cls([param, param], lr=0.05, foreach=foreach))
        train(optimizers[-1], make_grads([(4,), (4,)]))
        optimizers[-1].param_groups[0]["foreach"] = None
    for mine in optimizers[:2]:
        assert_twins_agree(mine, optimizers[2])


@pytest.mark.parametrize("foreach", [None, True, False])
def test_parameters_that_share_memory_take_turns(foreach):
    """Where one after the other is what the native does, too: without lists."""
    results = []
    for cls, way in ((ours("SGD"), foreach), (native("SGD"), False)):
        base = torch.ones(100)
        # The first overlaps the third, too, though the second begins and ends in between.
        parts = [base, base[:10], base[50:60], base[80:80]]
        if foreach is not None:  # a kernel takes none that has gaps
            parts = [base[:40:2], base[30:34], base[50:60], base[55:70]]
        optimizer = cls([*map(torch.nn.Parameter, parts)], lr=0.5, weight_decay=0.5, foreach=way)
        train(optimizer, make_grads([part.shape for part in parts], steps=2))
        results.append(base)
    assert_params_agree(results[:1], results[1:], start=[torch.ones(100)])


def test_parameters_that_come_to_share_memory_take_turns():
    results = []
    for cls, way in ((ours("SGD"), True), (native("SGD"), False)):
        params = make_params([(3,), (3,)])
        optimizer = cls(params, lr=0.5, foreach=way)
        for grads in make_grads([(3,), (3,)], steps=3):
            train(optimizer, [grads])
            params[1].data = params[0].data
        results.append(params)
    assert_params_agree(*results, start=make_params([(3,), (3,)]))


def test_fused_parameters_that_share_memory_are_refused():
    base = torch.ones(10)
    parts = [torch.nn.Parameter(part) for part in (base[:6], base[5:])]
    optimizer = ours("Adam")(parts, fused=True)
    with pytest.raises(RuntimeError, match="`fused=True` is not possible: two parameters share"):
        train(optimizer, [[torch.ones(6), torch.ones(5)]])
    assert (base == 1).all() and not optimizer.state


def tensor_options(name):
    """The hyperparameters that the native takes as tensors."""
    tensors = {
        "lr": torch.tensor(0.05),
        "weight_decay": torch.tensor(0.1),
        "betas": (torch.tensor(0.5), torch.tensor([0.9])),
    }
    takes = inspect.signature(native(name)).parameters
    return {k: v for k, v in tensors.items() if k in takes and "Tensor" in str(takes[k])}


@every_class
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_hyperparameters(name, shape):
    optimizers = [
        cls(make_params(), **{**tensor_options(name), "lr": torch.full(shape, 0.05)})
        for cls in (ours(name), native(name))
    ]
    for optimizer in optimizers:
        train(optimizer, GRADS[:3])
        optimizer.param_groups[0]["lr"].fill_(0.2)
        train(optimizer, GRADS[3:])
    mine, theirs = (o.param_groups[0]["params"] for o in optimizers)
    assert_params_agree(mine, theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if takes(name, "capturable")])
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
def test_capturable_gives_the_same(name, tensors):
    options = tensor_options(name) if tensors else {"lr": 0.05}
    one, other = (ours(name)(make_params(), capturable=c, **options) for c in (True, False))
    train(one, GRADS)
    train(other, GRADS)
    mine, theirs = (o.param_groups[0]["params"] for o in (one, other))
    assert_params_agree(mine, theirs)


FLAGS = [
    (name, flag)
    for name in NAMES
    for flag in ("foreach", "fused", "capturable", "differentiable", "maximize")
    if takes(name, flag)
]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_change_nothing_but_the_direction(name, flag, value):
    # The native takes capturable on a GPU only, and its forms agree with one another.
    params = [p.detach() for p in make_params()] if flag == "differentiable" else make_params()
    mine = train(ours(name)(params, **trained(name), **{flag: value}), GRADS)
    way = {flag: value} if flag == "maximize" else {}
    theirs = train(native(name)(make_params(), **trained(name), **way), GRADS)
    mine.param_groups[0][flag] = theirs.param_groups[0][flag]
    assert_twins_agree(mine, theirs)


def two_steps(cls, options, start, scale, lr):
    """A loss after two steps."""
    param = start.clone()
    optimizer = cls([param], lr=lr, **options)
    for power in (1.0, 2.0):
        param.grad = scale * torch.arange(1.0, 5.0, dtype=torch.float64) ** power
        optimizer.step()
    return (param**2).sum()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("RMSprop", {"centered": True, "momentum": 0.9, "eps": 0.5}),
        ("Adam", {"weight_decay": 0.1, "eps": 0.5}),
        ("Adam", {"amsgrad": True, "eps": 0.5}),
        ("AdamW", {"eps": 0.5}),
        ("Adadelta", {"eps": 0.5}),
        ("Adagrad", {"eps": 0.5, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
        ("Adamax", {"eps": 0.5}),
        ("NAdam", {"eps": 0.5}),
        ("RAdam", {"betas": (0.9, 0.5), "weight_decay": 0.1}),
    ],
)
def test_differentiable(name, options):
    # ASGD's and Rprop's state begins with the learning rate, as a mere number: so without them.
    # The native's own derivative stops at the first buffer (SGD), has no lr (RMSprop), forms its
    # scalars in float32 (Adam) or fails (amsgrad): so against the slope of its plain steps.
    start = make_params([(4,)], torch.float64)[0].detach()
    point = [start, torch.tensor(1.0).double(), torch.tensor(0.05).double()]
    leaves = [p.clone().requires_grad_() for p in point]
    loss = two_steps(ours(name), {**options, "differentiable": True}, *leaves)
    for i, derivative in enumerate(torch.autograd.grad(loss, leaves)):
        slope = torch.zeros_like(point[i])
        for j in range(slope.numel()):
            ends = []
            for h in (1e-6, -1e-6):
                moved = [p.clone() for p in point]
                moved[i].view(-1)[j] += h
                moved[2] = moved[2].item()
                ends.append(two_steps(native(name), options, *moved))
            slope.view(-1)[j] = (ends[0] - ends[1]) / 2e-6
        assert_agree(numbers(derivative), numbers(slope), "float32", what=f"derivative {i}")


def complex_tensors(tensors):
    return [torch.complex(a, b) for a, b in itertools.pairwise(tensors)]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_parameters(name, options, dtype):
    def params():
        return [torch.nn.Parameter(c) for c in complex_tensors(make_params([(3, 5)] * 3, dtype))]

    with default_dtype(dtype):
        optimizers = twins(name, params, **options)
        for optimizer in optimizers:
            train(optimizer, [complex_tensors(g) for g in make_grads([(3, 5)] * 3, dtype=dtype)])
    assert layout(optimizers[0]) == layout(optimizers[1])
    mine, theirs = (o.param_groups[0]["params"] for o in optimizers)
    kind = str(dtype).removeprefix("torch.")
    assert_params_agree(mine, theirs, kind, params())


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_distance_from_float64_is_no_larger_than_the_natives(name, options, dtype):
    if dtype == torch.float64:
        with default_dtype(dtype):
            optimizers = twins(name, partial(make_params, dtype=dtype), **options)
            for optimizer in optimizers:
                train(optimizer, make_grads(dtype=dtype))
        assert_twins_agree(*optimizers, "float64")
        return
    if "eps" in inspect.signature(native(name)).parameters:
        options = {**options, "eps": 1e-4}  # 1e-8 is 0 in float16
    shape, steps = (64, 64), 10
    streams = [g for g in gradients(shape, steps) if np.clip(g, -10, 10, out=g) is g]
    grads = [[torch.tensor(g).to(dtype)] for g in streams]

    def end(cls, wide):
        start = make_params([shape], dtype)
        params = [torch.nn.Parameter(p.detach().double()) for p in start] if wide else start
        steps = [[g.double() for g in step] for step in grads] if wide else grads
        return numbers(train(cls(params, **options), steps).param_groups[0]["params"][0])

    exact = end(native(name), True)
    mine, theirs = (
        np.sqrt(np.mean((end(cls(name), False) - exact) ** 2)) for cls in (ours, native)
    )
    assert 0 < mine <= theirs * (1 + TOLERANCE["float16"])


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_nan_and_inf_reach_the_same_places(name, options):
    bad = torch.tensor([[float("nan"), 1.0, float("inf"), -float("inf"), 0.5]])
    grads = [[bad], [torch.ones(1, 5)], [bad.flip(1)], [torch.ones(1, 5)]]
    optimizers = twins(name, partial(make_params, [(1, 5)]), **options)
    for optimizer in optimizers:
        train(optimizer, grads)
    mine, theirs = (o.param_groups[0]["params"] for o in optimizers)
    assert_params_agree(mine, theirs, start=make_params([(1, 5)]))
    finite = [
        [torch.isfinite(value).tolist() for value in optimizer.state[param].values()]
        for optimizer, (param,) in zip(optimizers, (mine, theirs), strict=True)
    ]
    assert sorted(finite[0], key=str) == sorted(finite[1], key=str)
    assert torch.isfinite(mine[0][0, 0]) == (name == "Rprop")  # PyTorch's sign of NaN is 0


@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_a_gradient_whose_square_overflows(name):
    optimizers = twins(name, partial(make_params, [(4,)]))
    for optimizer in optimizers:
        train(optimizer, [[torch.full((4,), 1e30)], [torch.ones(4)], [torch.ones(4)]])
    assert_twins_agree(*optimizers)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zeros", [True, False], ids=["betas-0", "betas"])
def test_the_gradient_is_never_written(name, options, dtype, zeros):
    if zeros:
        options = {**options, **({"betas": (0.0, 0.0)} if name.startswith("Adam") else {})}
        options = {**options, **({"alpha": 0.0} if name == "RMSprop" else {})}
    params = make_params(dtype=dtype)
    optimizer = ours(name)(params, **options)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for step in make_grads(dtype=dtype):
        train(optimizer, [step])
        for param, grad in zip(params, step, strict=True):
            assert torch.equal(param.grad.view(bits), grad.view(bits))


def test_adagrads_shared_memory():
    optimizers = twins("Adagrad", lr=0.05)
    for optimizer in optimizers:
        train(optimizer, GRADS[:2])
        optimizer.share_memory()
        states = optimizer.state.values()
        assert all(state["sum"].is_shared() for state in states)
        assert not any(state["step"].is_shared() for state in states)
        train(optimizer, GRADS[2:])
    assert_twins_agree(*optimizers)


@every_class
def test_every_public_method_is_there(name):
    public = {method for method in dir(native(name)) if not method.startswith("_")}
    assert public <= {*dir(ours(name))}


def test_two_threads_step_two_optimizers():
    grads = make_grads([(64, 64)], 30)
    expected = [train(ours(name)(make_params([(64, 64)])), grads) for name in ("Adam", "RMSprop")]
    optimizers = [ours(name)(make_params([(64, 64)])) for name in ("Adam", "RMSprop")]
    threads = [threading.Thread(target=train, args=(o, grads)) for o in optimizers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(optimizers, expected, strict=True):
        assert_twins_agree(one, other, "same")


HOOKS = {
    "before": lambda optimizer: optimizer.register_step_pre_hook,
    "after": lambda optimizer: optimizer.register_step_post_hook,
    "before all": lambda optimizer: register_optimizer_step_pre_hook,
    "after all": lambda optimizer: register_optimizer_step_post_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_every_kind_of_step_hook_is_called(kind):
    """PyTorch's wrapper of `step`, which calls them, is left out only where there are none."""
    optimizer = ours("SGD")(make_params())
    seen = []
    handle = HOOKS[kind](optimizer)(lambda *given: seen.append(given))
    train(optimizer, make_grads(steps=2))
    handle.remove()
    train(optimizer, make_grads(steps=1))
    assert seen == [(optimizer, (optimizer,), {})] * 2


@every_class
def test_the_profiler_shows_the_step_by_name(name):
    optimizer = train(ours(name)(make_params()), GRADS[:1])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{name}.step" in names
    assert f"Optimizer.zero_grad#{name}.zero_grad" in names


@every_class
def test_compiled_training_step(name):
    optimizers = twins(name, partial(make_params, [(4,)]), **trained(name))
    for optimizer, compiled in zip(optimizers, (True, False), strict=True):
        (param,) = optimizer.param_groups[0]["params"]

        def step(optimizer=optimizer, param=param):
            optimizer.zero_grad()
            (param - 1).square().sum().backward()
            optimizer.step()

        run = torch.compile(step, backend="eager") if compiled else step
        for _ in range(4):
            run()
    assert_twins_agree(*optimizers)
