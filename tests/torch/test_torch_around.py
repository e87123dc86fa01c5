"""`around` in PyTorch: clipping, scaling, averages and zeroing, against the native sequence."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from support import assert_agree
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import (
    assert_params_agree,
    assert_twins_agree,
    make_grads,
    make_params,
    native,
    numbers,
    ours,
    saved,
    snapshot,
    train,
)

from portopt import Around, rules
from portopt_torch import from_rule

NAN, INF = float("nan"), float("inf")
# Clipped or scaled gradients are small: with these the weights still move by far more than they
# are rounded by.
OPTIMIZERS = [
    ("SGD", {"lr": 2.0}),
    ("SGD", {"lr": 2.0, "momentum": 0.9, "dampening": 0.5}),
    ("RMSprop", {"lr": 0.05, "centered": True}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.1}),
    ("NAdam", {"lr": 0.05}),
]
IDS = ["SGD", "momentum", "RMSprop", "AdamW", "Adagrad", "NAdam"]
WAYS = [{}, {"foreach": True}, {"foreach": False}]
WAY_IDS = ["kernel", "foreach", "plain"]
SHAPES = [(3, 5), (), (4,), (67,)]
GRADS = make_grads(SHAPES, 6)

every_optimizer = pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=IDS)
every_way = pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)


class Native:
    """The native's training step, with what users put around it."""

    def __init__(self, cls, params, around, **options):
        self.params, self.around = params, around
        self.optimizer = cls(params, **options)
        self.averages = None
        if around.ema_decay:
            self.average(around)

    def average(self, around):
        self.model = torch.nn.ParameterList(self.params)
        average = get_ema_multi_avg_fn(around.ema_decay)
        self.averages = AveragedModel(self.model, multi_avg_fn=average)
        self.averages.n_averaged += 1  # these weights are the first to be averaged

    def step(self, grads):
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.clone()
            if self.around.grad_scale:
                param.grad.mul_(1 / self.around.grad_scale)
        finite = all(p.grad.isfinite().all() for p in self.params)
        if self.around.clip_norm:
            clip_grad_norm_(self.params, self.around.clip_norm)
        if self.around.clip_value:
            clip_grad_value_(self.params, self.around.clip_value)
        if finite or not self.around.skip_nonfinite:
            self.optimizer.step()
            if self.averages:
                self.averages.update_parameters(self.model)


def assert_like_the_native_sequence(mine, theirs, kind="float32", start=None):
    params = mine.param_groups[0]["params"]
    assert_params_agree(params, theirs.params, kind, start)
    if theirs.averages:
        averages = [mine.state[param]["param_ema"] for param in params]
        assert_params_agree(averages, list(theirs.averages.module), kind, start)
    for a, b in zip(params, theirs.params, strict=True):
        for key, value in theirs.optimizer.state[b].items():
            if value is not None:
                assert_agree(numbers(mine.state[a][key]), numbers(value), kind, what=key)


AROUND = {
    "clip-norm": Around(clip_norm=2.0),
    "clip-norm-above": Around(clip_norm=1e4),
    "clip-value": Around(clip_value=0.1),
    "scale": Around(grad_scale=8.0),
    "scale-and-clip": Around(grad_scale=16.0, clip_norm=2.0),
    "average": Around(ema_decay=0.9),
    "zero": Around(zero_grad=True),
    "skip": Around(skip_nonfinite=True),
    "all": Around(
        grad_scale=4.0, clip_norm=1.0, skip_nonfinite=True, ema_decay=0.99, zero_grad=True
    ),
}


@every_way
@every_optimizer
@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_the_native_sequence(around, name, options, way):
    mine = ours(name)(make_params(SHAPES), around=around, **options, **way)
    theirs = Native(native(name), make_params(SHAPES), around, **options)
    for grads in GRADS:
        train(mine, [grads])
        theirs.step(grads)
        for param, grad in zip(mine.param_groups[0]["params"], grads, strict=True):
            expected = torch.zeros_like(grad) if around.zero_grad else grad
            assert_agree(numbers(param.grad), numbers(expected), "same")
    assert_like_the_native_sequence(mine, theirs, start=make_params(SHAPES))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_native_sequence_in_other_dtypes(dtype):
    around, kind = AROUND["all"], str(dtype).removeprefix("torch.")
    options = {"lr": 0.5, "momentum": 0.9}
    mine = ours("SGD")(make_params(SHAPES, dtype), around=around, **options)
    theirs = Native(native("SGD"), make_params(SHAPES, dtype), around, **options)
    for grads in make_grads(SHAPES, 4, dtype):
        train(mine, [grads])
        theirs.step(grads)
    start = make_params(SHAPES, dtype)
    assert_params_agree(mine.param_groups[0]["params"], theirs.params, kind, start)


def spoiled(grads, bad):
    return [*grads[:-1], grads[-1].index_fill(0, torch.tensor([3]), bad)]


@every_way
@every_optimizer
@pytest.mark.parametrize("at", [0, 2], ids=["first", "third"])
def test_steps_that_are_skipped(name, options, way, at):
    around = Around(skip_nonfinite=True, ema_decay=0.9)
    mine = ours(name)(make_params(SHAPES), around=around, **options, **way)
    theirs = Native(native(name), make_params(SHAPES), around, **options)
    for i, grads in enumerate(GRADS):
        grads = spoiled(grads, [NAN, INF, -INF][i % 3]) if i in (at, at + 1) else grads
        train(mine, [grads])
        theirs.step(grads)
    assert_like_the_native_sequence(mine, theirs, start=make_params(SHAPES))


@every_way
@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradients_of_a_skipped_step_are_zeroed(bad, way):
    """Else they stay, whatever is added to them, and no step is taken any more."""
    params = make_params(SHAPES)
    around = Around(skip_nonfinite=True, zero_grad=True)
    train(ours("Adam")(params, around=around, **way), [spoiled(GRADS[0], bad)])
    for param, start in zip(params, make_params(SHAPES), strict=True):
        assert_agree(numbers(param), numbers(start), "same")
        assert_agree(numbers(param.grad), np.zeros(param.shape), "same")


@every_way
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_norm_that_is_not_finite(bad, way):
    ends = []
    for i in range(2):
        (param,) = make_params([(4,)])
        param.grad = torch.tensor([1.0, bad, 2.0, 0.0])
        if i:
            clip_grad_norm_([param], 1.0)
            native("SGD")([param], lr=0.1).step()
        else:
            ours("SGD")([param], lr=0.1, around=Around(clip_norm=1.0), **way).step()
        ends.append([param])
    assert_params_agree(*ends)


@pytest.mark.filterwarnings("ignore:portopt_torch steps .* slowly")
def test_one_norm_for_all_kinds_of_parameters():
    def params():
        tensors = make_params([(67,)], torch.float64) + make_params([(3, 5), (70_000,)])
        sliced = make_params([(6, 8)])[0].detach()[::2, 1::3]
        pairs = torch.view_as_complex(make_params([(5, 2)])[0].detach())
        return [*tensors, torch.nn.Parameter(sliced), torch.nn.Parameter(pairs)]

    mine, theirs = params(), params()
    clipped = ours("SGD")(mine, lr=100.0, around=Around(clip_norm=0.3))
    plain = native("SGD")(theirs, lr=100.0)
    for param, twin in zip(mine, theirs, strict=True):
        param.grad = param.detach().clone() + 1
        twin.grad = param.grad.clone()
    clipped.step()
    clip_grad_norm_(theirs, 0.3, foreach=False)
    plain.step()
    assert_params_agree(mine, theirs, start=params())


@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.5}, {"clip_value": 0.1}], ids=str)
def test_with_grad_scaler(clip, fused):
    around, ends = Around(**clip, zero_grad=fused is True), []
    for i, cls in enumerate((ours("Adam"), native("Adam"))):
        params = make_params([(4,), (3, 5)])
        optimizer = cls(params, lr=0.05, fused=fused, **({} if i else {"around": around}))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        for step, scale in enumerate((1.0, INF, 2.0, NAN, 3.0, 1.0)):
            if i or not around.zero_grad:
                optimizer.zero_grad()
            scaler.scale(sum(scale * (p - step).square().sum() for p in params)).backward()
            if i and clip:
                scaler.unscale_(optimizer)
                if "clip_norm" in clip:
                    clip_grad_norm_(params, clip["clip_norm"])
                else:
                    clip_grad_value_(params, clip["clip_value"])
            elif clip and not fused:  # the scaler's unscaling comes first, as it does inside
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append((optimizer, scaler.get_scale()))
    assert_twins_agree(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_gradients_that_a_graph_has_saved_cannot_be_zeroed_unseen():
    (param,) = make_params([(4,)])
    optimizer = ours("SGD")([param], around=Around(zero_grad=True))
    param.grad, factor = torch.ones(4), torch.ones(4, requires_grad=True)
    loss = (factor * param.grad).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_way
@every_optimizer
def test_an_average_that_begins_later(name, options, way):
    """It begins with the weights as they are then."""
    mine = train(ours(name)(make_params(SHAPES), **options, **way), GRADS[:3])
    mine.around = Around(ema_decay=0.9)
    theirs = Native(native(name), make_params(SHAPES), Around(), **options)
    for grads in GRADS[:3]:
        theirs.step(grads)
    theirs.average(mine.around)
    for grads in GRADS[3:]:
        train(mine, [grads])
        theirs.step(grads)
    assert_like_the_native_sequence(mine, theirs, start=make_params(SHAPES))


def test_momentum_that_begins_beside_an_average():
    options = {"lr": 0.1, "dampening": 0.5}
    mine = ours("SGD")(make_params(), around=Around(ema_decay=0.9), **options)
    theirs = native("SGD")(make_params(), **options)
    for optimizer in (mine, theirs):
        grads = make_grads(steps=5)
        train(optimizer, grads[:2])
        optimizer.param_groups[0]["momentum"] = 0.9
        train(optimizer, grads[2:])
    assert_params_agree(mine.param_groups[0]["params"], theirs.param_groups[0]["params"])


@every_way
def test_around_changed_between_steps(way):
    mine = ours("Adam")(make_params(SHAPES), lr=0.05, **way)
    theirs = Native(native("Adam"), make_params(SHAPES), Around(), lr=0.05)
    plans = [Around(), Around(clip_norm=0.5), Around(clip_norm=0.1), Around(clip_value=0.1)]
    for around, grads in zip([*plans, Around(grad_scale=2.0), Around()], GRADS, strict=True):
        mine.around = theirs.around = around
        train(mine, [grads])
        theirs.step(grads)
    assert_like_the_native_sequence(mine, theirs, start=make_params(SHAPES))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("made", [ours("AdamW"), from_rule(rules.Adam)], ids=["drop-in", "rule"])
def test_copies_go_on_the_same(made, copied):
    one = train(made(make_params(SHAPES), lr=0.05, around=AROUND["all"]), GRADS[:3])
    other = copied(one)
    assert other.around == AROUND["all"]
    assert_twins_agree(train(other, GRADS[3:]), train(one, GRADS[3:]), "same")
    never = train(made(make_params(SHAPES), lr=0.05, around=AROUND["all"]), GRADS)
    assert_twins_agree(other, never, "same")


@every_optimizer
def test_the_average_is_saved_and_loaded(name, options):
    around = Around(ema_decay=0.9)
    one = train(ours(name)(make_params(SHAPES), around=around, **options), GRADS[:3])
    state = saved(one)
    assert set(state["state"]) == {0, 1, 2, 3}
    other = ours(name)([p.detach().clone() for p in one.param_groups[0]["params"]], around=around)
    other.load_state_dict(state)
    assert_twins_agree(train(other, GRADS[3:]), train(one, GRADS[3:]), "same")


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_state_without_the_average_is_refused(name):
    options = {"momentum": 0.9} if name == "SGD" else {}
    state = saved(train(native(name)(make_params(), **options), make_grads(steps=2)))
    optimizer = ours(name)(make_params(), around=Around(ema_decay=0.9), **options)
    train(optimizer, make_grads(steps=1))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"^loaded state of parameter 0 has no tensor 'param_ema'"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


def test_a_state_with_an_average_goes_into_the_native():
    one = train(ours("Adam")(make_params(SHAPES), around=Around(ema_decay=0.9)), GRADS[:3])
    twin = native("Adam")([p.detach().clone() for p in one.param_groups[0]["params"]])
    twin.load_state_dict(saved(one))
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    assert "param_ema" in twin.state_dict()["state"][0]
    train(twin, GRADS[3:])
    train(one, GRADS[3:])
    params = [o.param_groups[0]["params"] for o in (one, twin)]
    assert_params_agree(*params, start=make_params(SHAPES))


@pytest.mark.parametrize("bad", [1.0, {"clip_norm": 1.0}, Around, "clip", rules.SGD()], ids=repr)
@pytest.mark.parametrize("made", [ours("SGD"), from_rule(rules.SGD)], ids=["drop-in", "rule"])
def test_around_must_be_an_around(made, bad):
    with pytest.raises(TypeError, match=r"^around must be a portopt\.Around or None, got "):
        made(make_params(), around=bad)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"clip_norm": -1.0}, r"clip_norm must be in \[0, inf\), got -1.0"),
        ({"clip_value": NAN}, r"clip_value must be in \[0, inf\), got nan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"zero_grad": 1}, "zero_grad must be True or False, got 1"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "clip_norm must be 0 with a clip_value, got 1.0"),
    ],
    ids=str,
)
def test_values_out_of_range(bad, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        Around(**bad)


@pytest.mark.parametrize("name", ["Adam", "Adagrad"])
def test_the_average_begins_at_the_first_step(name):
    (param,) = make_params([(3,)])
    optimizer = ours(name)([param], lr=1e-3, around=Around(ema_decay=0.999))
    with torch.no_grad():
        param.fill_(100.0)  # as a model that is loaded after its optimizer was made
    train(optimizer, [[torch.ones(3)]])
    assert (optimizer.state[param]["param_ema"] > 99).all()


@every_way
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("done", [0, 1])
def test_a_gradient_of_two_parameters_is_not_zeroed_too_early(done, part, way):
    shapes = [(4,), (4,), (0,), (0,)]  # whose last two may well be at one place
    params = make_params(shapes)
    optimizer = ours("SGD")(params, around=Around(zero_grad=True), **way)
    train(optimizer, make_grads(shapes, done))
    params[0].grad = params[1].grad = torch.ones(4)
    if part:
        both = torch.ones(6)
        params[0].grad, params[1].grad = both[:4], both[2:]
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"^with zero_grad no gradient may be that of two"):
        optimizer.step()
    assert all(map(torch.equal, params, before)) and (params[0].grad == 1).all()


@every_way
def test_a_skipped_step_is_on_no_graph(way):
    (param,) = make_params([(3,)])
    around = Around(zero_grad=True, skip_nonfinite=True)
    optimizer = ours("SGD")([param], around=around, **way)
    for grad in (torch.full((3,), NAN, requires_grad=True), NAN * param.square()):
        param.grad = grad
        optimizer.step()
        assert not grad.any() and (grad.grad_fn is None or "Zero" not in grad.grad_fn.name())


def test_around_may_be_changed_and_is_checked_again():
    optimizer = ours("SGD")(make_params(), around=Around(clip_norm=1.0))
    assert copy.deepcopy(optimizer).around == Around(clip_norm=1.0)
    with pytest.raises(TypeError, match=r"^around must be a portopt\.Around or None, got 1"):
        optimizer.around = 1
    assert optimizer.around == Around(clip_norm=1.0)
    optimizer.around = None
    assert optimizer.around == Around()


@every_way
def test_the_readmes_line(way):
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    around = Around(clip_norm=1.0, ema_decay=0.999, zero_grad=True)
    optimizer = ours("Adam")(model.parameters(), lr=0.02, around=around, **way)
    x = torch.tensor(np.random.default_rng(0).standard_normal((64, 5)), dtype=torch.float32)
    losses = []
    for _ in range(60):
        loss = (model(x) - x[:, :1] * x[:, 1:2]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not any(p.grad.any() for p in model.parameters())
