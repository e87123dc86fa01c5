"""What a step asks of its tensors: the same answers from the native loop and from Python."""

import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from test_torch_kernels import GRADIENTS, HISTORY, MOVES, SLOW, history
from twins import assert_params_agree, make_grads, make_params, ours, train

from portopt.kernels.contents import Contents
from portopt_torch import launch, layout, native

WAYS = ["native", "python"]


@pytest.fixture
def ask(monkeypatch):
    """Call it with one of the `WAYS` to have tensors looked at that way."""
    look = native.look

    def choose(way):
        if way == "native" and look() is None:
            pytest.skip("there is no native look here")
        monkeypatch.setattr(native, "look", look if way == "native" else lambda: None)
        if way == "python":
            monkeypatch.setattr(native, "bump", lambda *_: None)

    return choose


@pytest.fixture
def answers(monkeypatch):
    """Whether each batch fitted, step by step."""
    given, fits = [], launch.Batch.fits
    monkeypatch.setattr(launch.Batch, "fits", lambda batch: given.append(fits(batch)) or given[-1])
    return given


def odd_gradients(make):
    """Steps with a gradient of another kind among them."""

    def move(optimizer, params):
        for grad in (make(torch.ones(4, 4)), torch.ones(4, 4)):
            params[0].grad = grad
            optimizer.step()

    return move


SCENES = {move.__name__: move for move in MOVES}
SCENES |= {name: odd_gradients(make) for name, make in GRADIENTS.items() if make is not None}


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize(("name", "options"), HISTORY, ids=["SGD", "Adam"])
@pytest.mark.parametrize("scene", SCENES)
def test_both_ways_answer_alike(scene, name, options, ask, answers):
    ends, given = [], []
    for way in WAYS:
        ask(way)
        _, params = history(lambda params: ours(name)(params, **options), SCENES[scene])
        ends.append(params)
        given.append(answers.copy())
        answers.clear()
    assert given[0] == given[1]
    assert True in given[0]  # a plan is kept where nothing happens
    assert_params_agree(*ends, "same")


SHAPES = (3, 5), (4,), (2, 1, 3)
SLOTS, COUNTS = ("a", "b"), ("step",)


def made(slots=SLOTS, counts=COUNTS, dtype=torch.float32):
    """Parameters with gradients, states, and what is known of them now."""
    params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.ones_like(param)
    states = [
        {
            "a": torch.zeros_like(param),
            "b": torch.zeros_like(param, dtype=torch.float64),
            "step": torch.ones(()),
        }
        for param in params
    ]
    return params, states, held_by(params, states, slots, counts)


def held_by(params, states, slots=(), counts=(), contents=None):
    """What is known of them, with ``table`` and ``here``."""
    columns = [[state[slot] for state in states] for slot in slots]
    table = np.array([[*row, 0] for row in layout.addresses(params, columns)], np.uint64)
    here = np.array([param.grad is not None for param in params])
    held = layout.holdings(params, states, slots, counts, table, here, contents=contents)
    held.table, held.here = table, here
    return held


OTHERS = {
    # what a tensor is replaced by; whether a gradient may be so, at another address
    "elsewhere": (torch.clone, True),
    "another dtype": (lambda x: x.to(torch.bfloat16), False),
    "another size": (lambda x: torch.ones(x.shape[0] + 1, *x.shape[1:]), False),
    "fewer": (lambda x: torch.ones(x.shape[0] - 1, *x.shape[1:]), False),
    "another shape": (lambda x: torch.ones(x.shape[::-1]), False),
    "more dimensions": (lambda x: x.clone()[None], False),
    "fewer dimensions": (lambda x: torch.ones(x.shape[:-1]), False),
    "no dimensions": (lambda x: torch.ones(()), False),
    "another order": (lambda x: torch.ones(x.shape[::-1]).permute(*range(x.dim())[::-1]), False),
    "another stride of one element": (lambda x: torch.ones(9, 9, 3)[:2, :1], False),
    "that stride alone": (lambda x: torch.ones(6).as_strided((2, 1, 3), (3, 77, 1)), True),
    "with gaps": (lambda x: torch.ones(2, 1, 6)[..., ::2], False),
    "expanded": (lambda x: torch.ones(1).expand(x.shape), False),
    "negative": (torch._neg_view, False),
    "sparse": (torch.Tensor.to_sparse, False),
}


def fitting(name, x):
    """Whether that kind of tensor can be made beside this one, and lies otherwise."""
    return (x.dim() == 3) if "stride" in name or name == "with gaps" else x.shape == (3, 5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("helpers", [0, 1])
@pytest.mark.parametrize("name", OTHERS)
def test_gradients_may_be_elsewhere_and_nothing_else(name, helpers, way, ask):
    ask(way)
    params, _, held = made()
    make, same = OTHERS[name]
    (param,) = (param for param in params if fitting(name, param))
    grad = make(param.grad.clone())
    try:
        param.grad = grad
    except RuntimeError:  # PyTorch itself wants the parameter's shape and dtype
        param.grad = None
        param.data, old = grad, param.data
        param.grad = grad.clone() if name != "negative" else grad
        param.data = old
    assert held.fit(helpers) == same
    if same:
        assert held.table[:, 1].tolist() == [param.grad.data_ptr() for param in params]
        assert held.table[:, 0].tolist() == [param.data_ptr() for param in params]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["param", *SLOTS])
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "sparse"])
def test_what_stays_is_otherwise(name, which, way, ask):
    ask(way)
    params, states, held = made()
    place = next(n for n, param in enumerate(params) if fitting(name, param))
    tensor = params[place] if which == "param" else states[place][which]
    assert held.fit(0)
    tensor.data = OTHERS[name][0](tensor.detach())
    assert not held.fit(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["param", *SLOTS])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(1),
        lambda x: x.t_(),
        lambda x: x.as_strided_((3, 5), (1, 3)),
        lambda x: x.unsqueeze_(0),
        lambda x: x.set_(torch.ones(3, 5, dtype=x.dtype)),
    ],
    ids=["resized", "transposed", "other strides", "unsqueezed", "set"],
)
def test_what_stays_is_changed_in_place(change, which, way, ask):
    ask(way)
    params, states, held = made()
    assert held.fit(0)
    with torch.no_grad():
        change((params[0] if which == "param" else states[0][which]).detach())  # a view: nothing
        assert held.fit(0)
        change(params[0].data if which == "param" else states[0][which])
    assert held.fit(0) == (which == "param")  # `data` is a view, too


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["param", "a", "grad"])
def test_what_is_conjugated(which, way, ask):
    ask(way)
    params, states, held = made(slots=("a",), dtype=torch.complex64)
    assert held.fit(0)
    if which == "grad":
        params[1].grad = params[1].grad.conj()
    else:
        tensor = params[1] if which == "param" else states[1]["a"]
        tensor.data = tensor.data.conj()
    assert not held.fit(0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("which", ["param", "a", "grad"])
def test_what_is_read_as_another_dtype(which, way, ask):
    """Of the same size, and for what stays at the same address."""
    ask(way)
    params, states, held = made(slots=("a",), dtype=torch.float16)
    tensor = {"param": params[1], "a": states[1]["a"], "grad": params[1].grad}[which]
    assert held.fit(0)
    tensor.data = tensor.detach().view(torch.bfloat16)
    assert not held.fit(0)


class Odd(torch.Tensor):
    """A tensor of another class."""


HELD = {
    "nothing": (lambda params, states: None, True),
    "another-gradient": (lambda params, states: setattr(params[1], "grad", torch.ones(4)), True),
    "no-gradient": (lambda params, states: setattr(params[1], "grad", None), True),
    "odd-gradient": (
        lambda params, states: setattr(params[1], "grad", torch.ones(4).as_subclass(Odd)),
        False,
    ),
    "parameter-as-gradient": (
        lambda params, states: setattr(params[1], "grad", torch.nn.Parameter(torch.ones(4))),
        False,
    ),
    "entry": (lambda params, states: states[1].update(a=torch.zeros(4)), False),
    "last-entry": (lambda params, states: states[2].update(step=torch.ones(())), False),
    "no-entry": (lambda params, states: states[0].pop("b"), False),
    "more-entries": (lambda params, states: states[0].update(c=1), True),
}


@pytest.mark.parametrize(("slots", "counts"), [((), ()), (("a",), ()), (SLOTS, COUNTS)])
@pytest.mark.parametrize("helpers", [0, 1])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", HELD)
def test_what_is_held_by_others_is_noticed(change, way, helpers, slots, counts, ask):
    ask(way)
    params, states, held = made(slots, counts)
    make, same = HELD[change]
    make(params, states)
    named = {"entry": "a", "last-entry": "step", "no-entry": "b"}.get(change)
    assert held.fit(helpers) == (same or (named is not None and named not in (*slots, *counts)))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_without_an_object_of_python(way, ask):
    """As a backward pass leaves them, before anybody has looked."""
    ask(way)
    params, _, held = made()
    for _ in range(3):
        for param in params:
            param.grad = None
        sum(param.square().sum() for param in params).backward()
        assert held.fit(1)
        assert held.table[:, 1].tolist() == [param.grad.data_ptr() for param in params]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("slots", "counts"), [((), ()), (SLOTS, COUNTS)])
def test_contents_are_looked_at_too(way, slots, counts, ask):
    ask(way)
    params, states, _ = made()
    listed, values = [*params], dict(enumerate(states))
    held = held_by(params, states, slots, counts, Contents([listed], values))
    assert held.fit(1)
    values[1] = dict(states[1])
    assert not held.fit(1)
    values[1] = states[1]
    assert held.fit(1)
    listed.reverse()
    assert not held.fit(1)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_come_and_go(way, ask):
    ask(way)
    params, _, held = made()
    for present in ([1, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1]):
        for param, there in zip(params, present, strict=True):
            param.grad = torch.ones_like(param) if there else None
        assert held.fit(1)
        assert held.here.tolist() == present
        at = [0 if param.grad is None else param.grad.data_ptr() for param in params]
        assert held.table[:, 1].tolist() == at


@pytest.mark.parametrize("way", WAYS)
def test_looks_hold_on_to_nothing(way, ask):
    ask(way)
    params, _, held = made()
    counts = []
    for times in (1, 1000):
        for _ in range(times):
            held.fit(0)
        counts.append((sys.getrefcount(params[0].grad), sys.getrefcount(None)))
    assert counts[0][0] == counts[1][0]
    assert abs(counts[0][1] - counts[1][1]) < 100


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_one_of_many_is_noticed_wherever_it_is(n, way, ask):
    """Shares of the look end somewhere: none is left out."""
    ask(way)
    params = [torch.nn.Parameter(torch.ones(2 + n % 3)) for n in range(n)]
    for param in params:
        param.grad = torch.ones_like(param)
    held = held_by(params, [{} for _ in params])
    assert held.fit(2)
    for place in range(0, n, max(n // 50, 1)):
        param = params[place]
        param.grad = torch.ones_like(param).as_subclass(Odd)
        assert not held.fit(2)
        param.grad = torch.ones_like(param)
        assert held.fit(2)
        assert int(held.table[place, 1]) == param.grad.data_ptr()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_versions_are_raised_by_one(name, way, ask):
    ask(way)
    params = make_params([(300, 300), (3,)])
    optimizer = ours(name)(params)
    for _ in range(3):
        before = [param._version for param in params]
        train(optimizer, make_grads([(300, 300), (3,)], 1))
        assert [param._version for param in params] == [version + 1 for version in before]


def test_parameters_made_in_inference_mode_step_on():
    with torch.inference_mode():
        param = torch.ones(3)
    param.grad = torch.ones(3)
    ours("SGD")([param], lr=0.5).step()
    assert param.tolist() == [0.5] * 3


@pytest.mark.parametrize("way", WAYS)
def test_steps_hold_on_to_nothing(way, ask):
    ask(way)
    memory = [np.ones(67, np.float32) for _ in range(3)]
    alive = [weakref.ref(array) for array in memory]
    param = torch.nn.Parameter(torch.from_numpy(memory[0]))
    optimizer = ours("Adam")([param])
    for array in memory[1:]:
        param.grad = torch.from_numpy(array)
        optimizer.step()
    uses = param._use_count()
    train(optimizer, make_grads([(67,)], 100))
    assert param._use_count() == uses
    del memory, array
    assert [ref() is None for ref in alive] == [False, True, True]
    del param, optimizer
    gc.collect()
    assert alive[0]() is None


def test_parameters_of_real_and_complex_numbers_keep_their_plan(answers):
    params = [*make_params([(4,)]), *make_params([(2,)], torch.complex64)]
    optimizer = ours("Adam")(params)
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert answers == [True] * 4  # two batches, two steps


def test_a_parameter_in_place_of_another_is_updated():
    old, new = make_params([(4,)]), make_params([(4,)])
    optimizer = train(ours("Adam")(old), make_grads([(4,)], 1))
    optimizer.param_groups[0]["params"][0], new[0].grad = new[0], torch.ones(4)
    before = [param.detach().clone() for param in (*old, *new)]
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip(before, (*old, *new), strict=True)] == [True, False]
