"""What a step asks of its tensors: the same answers from the native loop and from Python."""

import gc
import sys
import weakref

import numpy as np
import pytest
import torch
from test_torch_kernels import GRADIENTS, HISTORY, MOVES, SLOW, history
from twins import assert_params_agree, make_grads, make_params, ours, train

from portopt_torch import launch, layout, native

WAYS = ["native", "python"]


@pytest.fixture
def ask(monkeypatch):
    """Call it with one of the `WAYS` to have layouts found that way."""
    loops = {name: getattr(native, name) for name in ("layouts", "gradients")}

    def choose(way):
        for name, loop in loops.items():
            if way == "native" and loop() is None:
                pytest.skip("there are no native loops here")
            monkeypatch.setattr(native, name, loop if way == "native" else lambda: None)

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


def tensors(*shapes, dtype=torch.float32):
    return layout.array([torch.ones(shape, dtype=dtype) for shape in shapes])


NOW = {
    "elsewhere": (tensors((3, 5), (4,)), True),
    "swapped": (tensors((4,), (3, 5)), False),
    "dtype": (tensors((3, 5), (4,), dtype=torch.bfloat16), False),
    "size": (tensors((3, 5), (6,)), False),
    "shape": (tensors((5, 3), (4,)), False),
    "more-dimensions": (tensors((3, 5), (1, 1, 1, 4)), False),
    "fewer-dimensions": (tensors((3, 5), ()), False),
    "order": (layout.array([torch.ones(5, 3).t(), torch.ones(4)]), False),
    "negated": (layout.array([torch._neg_view(torch.ones(3, 5)), torch.ones(4)]), False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("now", NOW)
def test_another_layout_is_noticed(now, way, ask):
    ask(way)
    found, same = NOW[now]
    before = layout.of_tensors(tensors((3, 5), (4,)), moves=True)
    assert before.fits(found) == same
    if same:
        assert before.addresses.tolist() == [tensor.data_ptr() for tensor in found]


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_address_does_not_fit(way, ask):
    ask(way)
    before = layout.of_tensors(tensors((3, 5)), moves=True)
    assert not before.fits(layout.array([torch.ones(3, 5).to_sparse()]))


@pytest.mark.parametrize("way", WAYS)
def test_what_stays_is_elsewhere(way, ask):
    ask(way)
    found = tensors((3, 5), (4,))
    before = layout.of_tensors(found, moves=False)
    assert before.fits(found)
    found[1].data = found[1].data.clone()
    assert not before.fits(found)


@pytest.mark.parametrize("way", WAYS)
def test_what_stays_is_conjugated(way, ask):
    ask(way)
    found = tensors((3,), dtype=torch.complex64)
    before = layout.of_tensors(found, moves=False)
    assert before.fits(found)
    found[0].data = found[0].data.conj()
    assert not before.fits(found)


class Odd(torch.Tensor):
    """A tensor of another class."""


HELD = {
    "gradient": (lambda params, states: None, True),
    "another-gradient": (lambda params, states: setattr(params[1], "grad", torch.ones(3)), True),
    "no-gradient": (lambda params, states: setattr(params[1], "grad", None), False),
    "odd-gradient": (
        lambda params, states: setattr(params[1], "grad", torch.ones(3).as_subclass(Odd)),
        False,
    ),
    "entry": (lambda params, states: states[1].update(a=torch.zeros(3)), False),
    "no-entry": (lambda params, states: states[0].pop("b"), False),
    "more-entries": (lambda params, states: states[0].update(c=1), True),
}


@pytest.mark.parametrize("names", [(), ("a",), ("a", "b")])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", HELD)
def test_what_is_held_by_others_is_noticed(change, way, names, ask):
    ask(way)
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(3)
    states = [{"a": torch.zeros(3), "b": torch.zeros(3)} for _ in params]
    held = layout.Holdings(params, states, names)
    make, same = HELD[change]
    make(params, states)
    same = same or ("entry" in change and not names) or (change == "no-entry" and names == ("a",))
    grads = held.gradients()
    assert (grads is not None) == same
    if same:
        assert [a is b.grad for a, b in zip(grads, params, strict=True)] == [True, True]


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_held_no_longer_than_the_array(way, ask):
    ask(way)
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    held = layout.Holdings([param], [{}], ())
    counts = []
    for times in (1, 1000):
        for _ in range(times):
            held.gradients()
        counts.append((sys.getrefcount(param.grad), sys.getrefcount(None)))
    assert counts[0][0] == counts[1][0]
    assert abs(counts[0][1] - counts[1][1]) < 100


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
    assert answers == [True, True]


def test_a_parameter_in_place_of_another_is_updated():
    old, new = make_params([(4,)]), make_params([(4,)])
    optimizer = train(ours("Adam")(old), make_grads([(4,)], 1))
    optimizer.param_groups[0]["params"][0], new[0].grad = new[0], torch.ones(4)
    before = [param.detach().clone() for param in (*old, *new)]
    optimizer.step()
    assert [torch.equal(*pair) for pair in zip(before, (*old, *new), strict=True)] == [True, False]
