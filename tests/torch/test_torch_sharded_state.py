"""The state of `Sharded`: saved by some workers, loaded by others; and what is refused."""

from __future__ import annotations

import copy
import math
import os
import pickle
import signal
import time
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from bits import assert_bits
from support import gradients, weights
from torch import distributed

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import workers
from torch.distributed import checkpoint
from torch.optim.lr_scheduler import StepLR

import portopt_torch
from portopt import Around
from portopt_torch import Sharded, WorkerError
from portopt_torch.shard import Shard, Writer, boxes

# What it says where there is no process group, also with no_dist=True.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

SHAPES = {
    "w": (30, 7, 11),
    "half": (64, 50),
    "b": (37,),
    "scale": (),
    "none": (0, 3),
    "late": (50, 30),
}
SAVED, STEPS = 6, 12
LATE = 8
GRADS = {name: list(gradients(shape, STEPS, 9)) for name, shape in SHAPES.items()}
OPTIMIZERS = {
    "adam": partial(portopt_torch.AdamW, lr=0.1, around=Around(clip_norm=0.5, ema_decay=0.75)),
    "momentum": partial(portopt_torch.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "adagrad": partial(portopt_torch.get("adagrad"), lr=0.1),
    "adafactor": partial(portopt_torch.get("adafactor"), lr=0.1),
}


def make(name, shard):
    params = {
        key: torch.nn.Parameter(
            torch.tensor(weights(shape, 1)).to(torch.bfloat16 if key == "half" else torch.float32)
        )
        for key, shape in SHAPES.items()
    }
    first, *rest = params.values()
    optimizer = OPTIMIZERS[name]([{"params": [first], "lr": 0.05}, {"params": rest}])
    return params, Sharded(optimizer) if shard else optimizer


def train(params, optimizer, steps):
    for t in steps:
        for name, param in params.items():
            if name != "late" or t >= LATE:
                param.grad = torch.tensor(GRADS[name][t]).to(param.dtype)
        optimizer.step()


def ends(params):
    return {name: param.detach().double().numpy() for name, param in params.items()}


def save_at_two(rank, folder):
    saved = {}
    for name in OPTIMIZERS:
        params, optimizer = make(name, shard=True)
        train(params, optimizer, range(SAVED))
        state = {"model": params, "optimizer": optimizer.state_dict()}
        checkpoint.save(state, storage_writer=Writer(folder / name))
        saved[name] = optimizer.consolidated_state_dict(to=1)
        optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        train(params, optimizer, range(SAVED, STEPS))
        saved[name] = pickle.dumps(saved[name]), ends(params)
    return saved


def resume(rank, folder, states=None):
    """What each optimizer ends with that goes on from a checkpoint, or the state given instead."""
    result = {}
    for name in OPTIMIZERS:
        params, optimizer = make(name, shard=True)
        checkpoint.load({"model": params}, checkpoint_id=folder / name)
        if states:
            optimizer.load_state_dict(pickle.loads(states[name])[1])
        else:
            optimizer.load_checkpoint(folder / name)
        train(params, optimizer, range(SAVED, STEPS))
        result[name] = ends(params)
    return result


@pytest.fixture(scope="module")
def unsharded():
    """What the optimizer alone ends with, and its state on the way."""
    result = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in OPTIMIZERS:
        params, optimizer = make(name, shard=False)
        train(params, optimizer, range(SAVED))
        middle = pickle.dumps((params, optimizer.state_dict()))
        train(params, optimizer, range(SAVED, STEPS))
        result[name] = middle, ends(params)
    torch.set_num_threads(threads)
    return result


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return folder, workers.run(2, save_at_two, folder)


@pytest.fixture(scope="module")
def resumed(saved, unsharded, tmp_path_factory):
    """What 1, 2, 3 and 4 workers end with that go on from a checkpoint of 2, or of none."""
    alone = tmp_path_factory.mktemp("alone")
    for name, (middle, _) in unsharded.items():
        params, state = pickle.loads(middle)
        checkpoint.save(
            {"model": params, "optimizer": state}, checkpoint_id=alone / name, no_dist=True
        )
    states = {name: middle for name, (middle, _) in unsharded.items()}
    given = {"given": workers.run(2, resume, alone, states)}
    return given | {
        (source, size): workers.run(size, resume, folder)
        for source, folder, size in (
            ("two", saved[0], 1),
            ("two", saved[0], 3),
            ("two", saved[0], 4),
            ("alone", alone, 2),
        )
    }


def assert_ends(actual, expected):
    for key, value in expected.items():
        assert_bits(actual[key], value, key)


@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_at_two_resumed_anywhere(name, saved, resumed, unsharded):
    expected = unsharded[name][1]
    for rank in saved[1]:
        assert_ends(rank[name][1], expected)
    for ranks in resumed.values():
        for rank in ranks:
            assert_ends(rank[name], expected)


def consolidate(rank, by_messages):
    """Where there is little to gather, or nobody to do it."""
    if by_messages:
        workers.by_messages()
    weight = torch.nn.Parameter(torch.ones(8))  # which the first worker has
    optimizer = Sharded(portopt_torch.Adam([weight]), timeout=5)
    found = []
    for to in (0, 1):
        found.append(optimizer.consolidated_state_dict(to))
        weight.grad = torch.ones(8)
        optimizer.step()
    for bad in (-1, 2, None):
        with pytest.raises(ValueError, match="to must be a rank below 2, got"):
            optimizer.consolidated_state_dict(bad)
    found.append(optimizer.consolidated_state_dict(1))
    states = [one and {k: v["exp_avg"].tolist() for k, v in one["state"].items()} for one in found]
    start = time.monotonic()
    if rank == 0:
        with pytest.raises(WorkerError, match="gathering of the state"):
            optimizer.consolidated_state_dict()
        assert time.monotonic() - start < 30  # the process group's own is a minute
    return states


@pytest.mark.distributed
@pytest.mark.parametrize("by_messages", [False, True], ids=["memory", "messages"])
def test_a_state_of_little_or_none_is_gathered(by_messages):
    first, second = workers.run(2, consolidate, by_messages)
    assert first == [{}, None, None]
    assert second == [None, {0: [pytest.approx(0.1)] * 8}, {0: [pytest.approx(0.19)] * 8}]


@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_at_two_resumed_by_the_optimizer_alone(name, saved, unsharded):
    expected = unsharded[name][1]
    folder, ranks = saved
    nothing, state = (pickle.loads(rank[name][0]) for rank in ranks)
    assert nothing is None
    # Like the optimizer's own: the same keys, dtypes and numbers.
    own = pickle.loads(unsharded[name][0])[1]
    assert state["param_groups"] == own["param_groups"]
    assert state["state"].keys() == own["state"].keys()
    for key, entries in own["state"].items():
        assert entries.keys() == state["state"][key].keys()
        for slot, value in entries.items():
            torch.testing.assert_close(state["state"][key][slot], value, rtol=0, atol=0)
    # And through torch.distributed.checkpoint, which fills in what is there.
    params, optimizer = make(name, shard=False)
    read = {"model": params, "optimizer": own}
    for entries in own["state"].values():
        for value in entries.values():
            value.fill_(math.nan)
    checkpoint.load(read, checkpoint_id=folder / name, no_dist=True)
    optimizer.load_state_dict(read["optimizer"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(params, optimizer, range(SAVED, STEPS))
    torch.set_num_threads(threads)
    assert_ends(ends(params), expected)


class Dying(Writer):
    """Ends or stops its process where a worker has written, or where the list is to be."""

    def __init__(self, folder, where, how):
        super().__init__(folder)
        self.where, self.how = where, how

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        if self.where == "data" and distributed.get_rank() == 1:
            os.kill(os.getpid(), self.how)
        return written

    def finish(self, metadata, results):
        if self.where == "list":
            os.kill(os.getpid(), self.how)
        super().finish(metadata, results)


def save_and_die(rank, folder, where, how):
    params, optimizer = make("adam", shard=True)
    train(params, optimizer, range(SAVED))
    for writer in (Writer(folder), Dying(folder, where, how)):
        checkpoint.save(
            {"model": params, "optimizer": optimizer.state_dict()}, storage_writer=writer
        )
        train(params, optimizer, range(SAVED, SAVED + 2))


def resume_adam(rank, folder):
    params, optimizer = make("adam", shard=True)
    checkpoint.load({"model": params}, checkpoint_id=folder)
    optimizer.load_checkpoint(folder)
    train(params, optimizer, range(SAVED, STEPS))
    return ends(params)


@pytest.mark.distributed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("where", ["data", "list"])
def test_a_save_that_dies_leaves_the_checkpoint_before(where, how, tmp_path, unsharded):
    words = r"Connection (closed|reset) by peer" if how == signal.SIGKILL else "Timed out"
    with pytest.raises(AssertionError, match=words):
        workers.run(2, save_and_die, tmp_path, where, how, timeout=4)
    assert len(list(tmp_path.glob("*.distcp"))) > 2  # what was written is there, and not looked at
    (params,) = workers.run(1, resume_adam, tmp_path)
    assert_ends(params, unsharded["adam"][1])


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)])
def test_boxes_are_the_elements_in_their_order(shape):
    places = np.arange(math.prod(shape)).reshape(shape)
    for start, stop in product(range(places.size + 1), repeat=2):
        if start < stop:
            found = [
                places[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].ravel()
                for offsets, sizes in boxes(start, stop, shape)
            ]
            assert np.concatenate(found).tolist() == [*range(start, stop)]
            assert len(found) <= max(2 * len(shape) - 1, 1)


def test_a_shard_says_what_it_is():
    shard = Shard(torch.arange(3.0), 2, (2, 3))
    assert shard.shape == (2, 3) and repr(shard).startswith("Shard([2:5] of (2, 3), tensor([0.")
    with pytest.raises(RuntimeError, match="but a part of a tensor"):
        shard + 1


def small(shape=(9, 4), cls="Adam", **options):
    """Two parameters, of which each of two workers has one."""
    params = [torch.nn.Parameter(torch.ones(shape)) for _ in range(2)]
    return params, Sharded(portopt_torch.get(cls)(params, **options))


def load_what_does_not_fit(rank, folder):
    params, optimizer = small()
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    checkpoint.save({"optimizer": optimizer.state_dict()}, storage_writer=Writer(folder))
    whole = [optimizer.consolidated_state_dict(to) for to in (0, 1)][rank]

    for kind, words in (
        ({"shape": (4, 9), "lr": torch.tensor(0.5)}, r"must have shape \(4, 9\), got \(9, 4\)"),
        ({"cls": "SGD", "momentum": 0.9}, "must have 'dampening'"),
    ):
        _, other = small(**kind)
        before = copy.deepcopy(other.param_groups)
        with pytest.raises(ValueError, match=words):
            other.load_checkpoint(folder)
        assert str(other.param_groups) == str(before) and not other.state
    with pytest.raises(ValueError, match="no optimizer's state 'opt' in the checkpoint"):
        optimizer.load_checkpoint(folder, "opt")

    whole["state"][0]["exp_avg"] = torch.ones(3)  # which one of them has
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 must have shape \(9, 4\)"):
        optimizer.load_state_dict(whole)

    StepLR(optimizer, 1)  # its "initial_lr" is not in the checkpoint
    optimizer.load_checkpoint(folder)
    own = optimizer.state[params[rank]]
    assert own["step"] == 1 and own["exp_avg"].view(-1)[0] == pytest.approx(0.1)


@pytest.mark.distributed
def test_what_does_not_fit_changes_nothing_on_any_worker(tmp_path):
    workers.run(2, load_what_does_not_fit, tmp_path)
