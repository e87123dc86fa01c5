"""Which rules are installed: found by name, listed, and brought by other packages."""

from __future__ import annotations

import json
import sys
from dataclasses import fields

import plugin
import pytest

import portopt
from portopt import cli, rules
from portopt.rules import registry


@pytest.fixture
def installed(tmp_path, monkeypatch):
    plugin.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("signs_for_portopt", None)


def test_own_rules_are_those_of_the_package():
    assert registry.own()["Lion"] is rules.Lion
    assert not {"Rule", "Around", "Native"} & {*registry.own()}


@pytest.mark.parametrize(
    ("name", "framework", "rule", "native"),
    [
        ("Adam", "torch", rules.Adam, "torch.optim.Adam"),
        ("ADAMW", "keras", rules.AdamW, "keras.optimizers.AdamW"),
        ("nadam", "keras", rules.NAdam, "keras.optimizers.Nadam"),
        ("lion", "torch", rules.Lion, None),
        ("rprop", "keras", rules.Rprop, None),
    ],
)
def test_find(name, framework, rule, native):
    found, twin = registry.find(name, framework)
    assert found is rule
    assert (twin and twin.name) == native


@pytest.mark.parametrize("rule", registry.own().values(), ids=lambda rule: rule.__name__)
def test_natives_speak_of_fields_that_there_are(rule):
    known = {field.name for field in fields(rule)}
    for native in rule.natives:
        rule(**{"lr": 0.1, **native.values})  # which are allowed
        targets = [to for name, to in native.arguments.items() if to != name]
        assert known.issuperset(n for t in targets for n in ([t] if isinstance(t, str) else t))
        slots = {slot for names in native.slots for slot in names}
        entry = registry.entry(rule.__name__, rule)
        assert slots <= {*entry.slots, *entry.further_slots, *rule(lr=0.1).slots}


def test_a_pair_of_fields_needs_a_pair():
    native = rules.Native("torch.optim.Adam")
    with pytest.raises(TypeError, match=r"betas must be a tuple of beta1, beta2, got 0\.9"):
        native.fields({"betas": 0.9})


@pytest.mark.usefixtures("installed")
def test_a_package_brings_a_rule():
    rule, native = registry.find("Signs", "torch")
    assert (rule.__module__, native) == ("signs_for_portopt", None)
    assert issubclass(rule, portopt.Rule)
    assert registry.find("adam", "torch")[0] is rules.Adam  # no package takes a name of ours


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number", "'number' .* of package 'signs-for-portopt' must be a subclass of portopt.Rule"),
        ("absent", "'absent' .* of package 'signs-for-portopt' cannot be loaded: No module named"),
    ],
)
def test_a_package_that_does_not_keep_its_promise(name, words):
    with pytest.raises(registry.PluginError, match=words):
        registry.find(name, "keras")


@pytest.mark.parametrize(("name", "error"), [("adm", ValueError), ("", ValueError), (1, TypeError)])
def test_unknown_names(name, error):
    with pytest.raises(error, match=r"name must be .*, got"):
        registry.find(name, "torch")


@pytest.mark.usefixtures("installed")
def test_the_command_lists_every_rule(capsys, tmp_path):
    path = tmp_path / "rules.json"
    assert cli.main(["rules", "--json", str(path)]) == 2  # two are broken, and the others listed
    listed = {entry["name"]: entry for entry in json.loads(path.read_text())}
    assert {*listed} == {*registry.own(), "signs"}
    assert listed["signs"]["package"] == "signs-for-portopt"
    assert listed["signs"]["options"]["lr"] is None
    adam = listed["Adam"]
    assert adam["bytes_per_parameter"] == [8, 12]
    assert (adam["slots"], adam["further_slots"]) == (["exp_avg", "exp_avg_sq"], ["max_exp_avg_sq"])
    assert {"torch.optim.Adam", "torch.optim.SparseAdam"} < {*adam["natives"]}
    assert adam["options"]["beta2"] == 0.999
    out, err = capsys.readouterr()
    assert "signs: 0 bytes of state for a float32 parameter, from signs-for-portopt" in out
    assert "numbers mu_product" in out
    assert err.count("of package 'signs-for-portopt'") == 2
