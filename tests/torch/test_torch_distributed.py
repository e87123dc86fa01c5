"""Training by several processes: DDP, FSDP2 and distributed checkpoints, like the native alone."""

import copy
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import distributed
from twins import NAMES, assert_params_agree, native, ours, trained

from portopt import Around
from portopt_torch import drop_in

if not distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

from torch.distributed import checkpoint, fsdp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

WORLD = 2
SECONDS = 120


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


def batches():
    return torch.randn(6, 4 * WORLD, 4, generator=torch.Generator().manual_seed(1))


def fit(model, optimizer, xs, clip_norm=None):
    for x in xs:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if clip_norm is not None:
            clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()


def maker(classes, name):
    return partial(classes(name), **trained(name))


def assert_like_one_native(params, make, clip_norm=None):
    """That they are as if one process had trained with all batches."""
    model, start = make_model(), make_model()
    optimizer = make(model.parameters())
    fit(model, optimizer, batches(), clip_norm)
    assert_params_agree(params, list(model.parameters()), start=list(start.parameters()))


@pytest.mark.parametrize("to_ours", [True, False], ids=["to-ours", "to-native"])
@pytest.mark.parametrize("name", NAMES)
def test_state_by_names_of_parameters(name, to_ours):
    first, second = (native, ours) if to_ours else (ours, native)
    model = make_model()
    optimizer = maker(first, name)(model.parameters())
    fit(model, optimizer, batches()[:3])
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert {*state["state"]} == {*dict(model.named_parameters())}
    optimizer = maker(second, name)(model.parameters())
    set_optimizer_state_dict(model, optimizer, state)
    fit(model, optimizer, batches()[3:])
    assert_like_one_native(list(model.parameters()), maker(native, name))


def replicated(model):
    return DistributedDataParallel(model)


def sharded(model):
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    for part in (model[0], model[2], model):
        fsdp.fully_shard(part, mesh=mesh)
    assert all(hasattr(param, "full_tensor") for param in model.parameters())  # a DTensor
    return model


WAYS = {"DDP": replicated, "FSDP2": sharded}
if not hasattr(fsdp, "fully_shard"):  # before PyTorch 2.6
    del WAYS["FSDP2"]


def states_of(model, optimizer):
    names = ("model_state_dict", "optim_state_dict")
    return dict(zip(names, get_state_dict(model, optimizer), strict=True))


def train_together(wrap, make, rank, folder):
    """Three steps, a checkpoint, and three steps of another optimizer that has loaded it."""
    own = batches()[:, 4 * rank : 4 * (rank + 1)]
    model = wrap(make_model())
    optimizer = make(model.parameters())
    fit(model, optimizer, own[:3])
    checkpoint.save(states_of(model, optimizer), checkpoint_id=folder)

    model = wrap(make_model())
    optimizer = make(model.parameters())
    states = states_of(model, optimizer)
    checkpoint.load(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, **states)
    fit(model, optimizer, own[3:])
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]


CLIP_NORM = 0.1
CLIPPED = partial(ours("SGD"), lr=0.5, around=Around(clip_norm=CLIP_NORM))
# Of the rules for matrices, that which takes every parameter; its native fails under FSDP2.
TRAINED = (*NAMES, *(["Adafactor"] if "Adafactor" in drop_in.names() else []))
MAKERS = {**{name: maker(ours, name) for name in TRAINED}, "clipped": CLIPPED}


def one_process(rank, folder):
    """What each of the processes does; the first saves what all runs end with."""
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS),
    )
    ends = {}
    for way, wrap in WAYS.items():
        for name, make in MAKERS.items():
            params = train_together(wrap, make, rank, folder / f"{way}-{name}")
            ends[way, name] = [param.detach().clone() for param in params]
    if rank == 0:
        torch.save(ends, folder / "ends")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The parameters that the processes ended with."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONWARNINGS", "ignore")  # what they warn of goes nowhere
        processes = torch.multiprocessing.start_processes(
            one_process, (folder,), WORLD, join=False, start_method="spawn"
        )
    deadline = time.monotonic() + SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the processes have not ended within {SECONDS} s")
    return torch.load(folder / "ends")


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TRAINED)
def test_several_processes_train_as_one(name, way, ends):
    assert_like_one_native(ends[way, name], maker(native, name))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_one_norm_for_the_gradients_of_all_processes(way, ends):
    assert_like_one_native(ends[way, "clipped"], partial(native("SGD"), lr=0.5), CLIP_NORM)
