"""State goes from torch.optim's optimizers into ours and back, and training goes on the same."""

import copy

import pytest
import torch
from support import assert_agree
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
    takes,
    train,
    trained,
)

import portopt_torch
from portopt import rules

GRADS = make_grads(steps=8)


def switched(first, second, options, native_options=()):
    """Four steps by one class, then four by the other from its saved state."""
    before = train(first(make_params(), **{**options, **dict(native_options)}), GRADS[:4])
    params = copy.deepcopy(before.param_groups[0]["params"])
    after = second(params, **options)
    after.load_state_dict(saved(before))
    return train(after, GRADS[4:])


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
@pytest.mark.parametrize("to_ours", [True, False], ids=["to-ours", "to-native"])
def test_training_goes_on_as_if_never_switched(name, options, to_ours):
    first, second = (native(name), ours(name)) if to_ours else (ours(name), native(name))
    never = train(native(name)(make_params(), **options), GRADS)
    assert_twins_agree(switched(first, second, options), never)


FORMS = {
    f"{i}-{form}": (name, options, form)
    for i, (name, options) in zip(IDS, OPTIONS, strict=True)
    for form in ("foreach", "fused")
    if takes(name, form)
}


@pytest.mark.parametrize(("name", "options", "form"), FORMS.values(), ids=FORMS)
def test_state_of_the_natives_other_forms(name, options, form):
    mine = switched(native(name), ours(name), options, {form: True})
    never = train(native(name)(make_params(), **options, **{form: True}), GRADS)
    assert_twins_agree(mine, never)
    back = native(name)(make_params(), **options)
    back.load_state_dict(saved(mine))
    assert back.param_groups[0][form] is True


def test_adam_takes_adamws_state_and_adamw_stays_decoupled():
    for name, other in [("Adam", "AdamW"), ("AdamW", "Adam")]:
        results = []
        for cls in (ours(name), native(name)):
            optimizer = cls(make_params(), lr=0.05, weight_decay=0.1)
            source = native(other)(make_params(), lr=0.05, weight_decay=0.1)
            optimizer.load_state_dict(saved(train(source, GRADS[:2])))
            results.append(train(optimizer, GRADS[2:]))
        assert_twins_agree(*results)


@pytest.mark.parametrize("name", NAMES)
def test_old_states_with_plain_numbers_and_fewer_keys(name):
    source = train(native(name)(make_params(), **trained(name)), GRADS[:3])
    old = saved(source)
    for entries in old["state"].values():
        entries |= {k: v.item() for k, v in entries.items() if k in ("step", "eta", "mu")}
    for group in old["param_groups"]:
        for key in ("foreach", "maximize", "capturable", "differentiable", "fused"):
            group.pop(key, None)
    optimizers = []
    for cls in (ours(name), native(name)):
        params = copy.deepcopy(source.param_groups[0]["params"])
        optimizers.append(cls(params, **trained(name)))
        optimizers[-1].load_state_dict(copy.deepcopy(old))
        train(optimizers[-1], GRADS[3:])
        optimizers[-1].param_groups[0].pop("fused", None)  # SGD's native fills in False, ours None
    assert_twins_agree(*optimizers)


def test_old_states_with_nones():
    options = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}
    nones = {i: {"momentum_buffer": None} for i in range(4)}
    optimizers = [cls(make_params(), **options) for cls in (ours("SGD"), native("SGD"))]
    for optimizer in optimizers:
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": copy.deepcopy(nones), "param_groups": groups})
        train(optimizer, GRADS)
    assert_twins_agree(*optimizers)


@pytest.mark.parametrize("hook", [None, "changes", "replaces", "loads again"])
def test_state_keeps_its_dtype(hook):
    param = make_params([(3, 5)], torch.bfloat16)
    grads = make_grads([(3, 5)], 4, torch.bfloat16)
    full = saved(train(ours("Adam")(param), grads[:2]))
    full["state"][0]["exp_avg"] = torch.full((3, 5), 1 + 2**-20)
    optimizer = ours("Adam")(param)
    calls = []

    def pre_hook(optimizer, state_dict):
        calls.append(hook)
        if hook == "changes":
            state_dict["state"] = {0: {**full["state"][0]}}
        elif hook == "replaces":
            return copy.deepcopy(full)
        elif hook == "loads again" and len(calls) == 1:
            optimizer.load_state_dict(full)
        return None

    if hook:
        optimizer.register_load_state_dict_pre_hook(pre_hook)
    given = copy.deepcopy(full)
    if hook in ("changes", "replaces"):
        given["state"] = {}
    seen = []
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[param[0]]["exp_avg"])
    )
    optimizer.load_state_dict(given)
    state = optimizer.state[param[0]]
    assert state["exp_avg"].dtype == torch.float32 and state["exp_avg_sq"].dtype == torch.bfloat16
    assert_agree(numbers(state["exp_avg"]), numbers(full["state"][0]["exp_avg"]), "same")
    assert seen[-1] is state["exp_avg"]
    train(optimizer, grads[2:])
    assert state["exp_avg"].dtype == torch.float32
    again = ours("Adam")(param)
    for _ in range(2):
        again.load_state_dict(saved(optimizer))
    assert again.state[param[0]]["exp_avg"].dtype == torch.float32
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == bool(hook)
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


def test_a_hook_that_raises_leaves_the_optimizer_usable():
    optimizer = train(ours("Adam")(make_params()), GRADS[:2])
    full = saved(optimizer)

    def raises(*_):
        raise KeyError("mine")

    handle = optimizer.register_load_state_dict_pre_hook(raises)
    with pytest.raises(KeyError, match="mine"):
        optimizer.load_state_dict(full)
    handle.remove()
    optimizer.load_state_dict(full)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks
    assert_twins_agree(train(optimizer, GRADS[2:]), train(native("Adam")(make_params()), GRADS))


def test_loading_after_the_parameters_changed_dtype():
    params = make_params()
    source = saved(train(ours("Adam")(params), GRADS[:2]))
    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    mine = ours("Adam")(wide)
    mine.load_state_dict(source)
    train(mine, make_grads(steps=8, dtype=torch.float64)[2:])
    never = train(native("Adam")(make_params()), GRADS)
    assert_params_agree(wide, never.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("name", "switched_on"),
    [
        ("RMSprop", {"momentum": 0.9}),
        ("RMSprop", {"centered": True}),
        ("Adam", {"amsgrad": True}),
        ("SGD", {"momentum": 0.9}),
    ],
)
def test_a_slot_turned_on_since_the_last_step_is_saved(name, switched_on):
    optimizer = train(ours(name)(make_params()), make_grads(steps=2))
    optimizer.param_groups[0].update(switched_on)
    fresh = ours(name)(copy.deepcopy(optimizer.param_groups[0]["params"]), **switched_on)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    more = make_grads(steps=3)
    first, second = (train(o, more).param_groups[0]["params"] for o in (fresh, optimizer))
    assert_params_agree(first, second, "same")


def test_a_state_of_other_hyperparameters_is_refused():
    native_adamw = train(torch.optim.AdamW(make_params(), betas=(0.5, 0.9)), make_grads(steps=1))
    generic = portopt_torch.from_rule(rules.Adam)(make_params())
    with pytest.raises(ValueError, match="loaded parameter group must have 'decoupled'"):
        generic.load_state_dict(native_adamw.state_dict())
    drop_in = portopt_torch.Adam(make_params())
    with pytest.raises(ValueError, match="loaded parameter group must have 'betas'"):
        drop_in.load_state_dict(generic.state_dict())


def test_an_entry_of_the_users_in_the_state_is_no_momentum():
    options = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5}
    tagged, plain = (portopt_torch.SGD(make_params(), **options) for _ in range(2))
    for param in tagged.param_groups[0]["params"]:
        tagged.state[param]["tag"] = 1
    grads = make_grads(steps=3)
    first, second = (train(o, grads).param_groups[0]["params"] for o in (tagged, plain))
    assert_params_agree(first, second, "same")
