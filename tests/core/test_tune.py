"""The search: where it looks, what it finds, that it goes on and repeats itself."""

from __future__ import annotations

import re
import shlex

import pytest

from portopt import cli, race, tune
from portopt.rules import Adam, Interval, Momentum, ScheduleFreeSGD, registry

BOWL = tune.Objective("distance", False, lambda rule: abs(rule.lr - 0.02), str, str)


@pytest.fixture
def optuna():
    module = pytest.importorskip("optuna", reason="the search is Optuna's")
    verbosity = module.logging.get_verbosity()
    module.logging.set_verbosity(module.logging.WARNING)
    yield module
    module.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("cls", registry.own().values(), ids=lambda cls: cls.__name__)
def test_every_rule_may_have_all_that_is_searched(cls):
    spans = tune.spans(cls, {})
    assert "lr" in spans
    for distances in ([s.least for s in spans.values()], [s.most for s in spans.values()]):
        cls(**{k: s.value(d) for (k, s), d in zip(spans.items(), distances, strict=True)})
    for name, span in spans.items():
        default = cls.defaults()[name]
        assert span.value(span.distance(default)) == pytest.approx(default, rel=0.01)
        assert span.least < span.distance(default) < span.most


@pytest.mark.parametrize(
    ("interval", "default", "ends"),
    [
        ("[0, inf)", 1e-3, (1e-6, 1.0)),
        ("[0, 1)", 0.9, (0.9999, 0.001)),
        ("(1, inf)", 1.2, (1.0002, 201.0)),
        ("[0, inf)", None, (1e-3, 1e3)),
    ],
)
def test_the_scale_is_the_distance_from_an_end(interval, default, ends):
    span = tune.span(Interval(interval), default)
    assert (span.value(span.least), span.value(span.most)) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("interval", "default"), [("[0, inf)", 0.0), ("[0, 1]", 1.0), ("(-inf, inf)", 2.0)]
)
def test_what_is_off_or_without_a_scale_is_not_searched(interval, default):
    assert tune.span(Interval(interval), default) is None


def test_what_is_given_is_held():
    assert list(tune.spans(Adam, {"lr": 0.1, "eps": 1e-8})) == ["beta1", "beta2"]
    momentum = tune.spans(Momentum, {})["momentum"]  # 1 and more is allowed, but not sensible
    assert momentum.value(momentum.least) < 1 and momentum.label("momentum") == "1 - momentum"
    held = dict.fromkeys(("lr", "momentum"), 0.5)
    with pytest.raises(ValueError, match="Momentum has no float option to search that is not held"):
        tune.spans(Momentum, held)


def test_a_search_repeats_itself_and_another_seed_is_another(optuna):
    def search(seed):
        return list(tune.tune(Adam, {}, BOWL, trials=tune.EXPLORED + 5, seed=seed))

    first = search(3)
    assert first == search(3)
    assert first != search(4)
    assert len({tuple(trial.values.values()) for trial in first}) == len(first)
    assert all(trial.score == abs(trial.values["lr"] - 0.02) for trial in first)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(optuna, tmp_path):
    trials = tune.EXPLORED + 5
    whole = list(tune.tune(Adam, {}, BOWL, trials))
    calls = 0

    def score(rule):
        nonlocal calls
        calls += 1
        if calls == trials - 2:
            raise KeyboardInterrupt
        return BOWL.score(rule)

    stopping = tune.Objective("distance", False, score, str, str)
    file = tmp_path / "search.log"
    with pytest.raises(KeyboardInterrupt):
        list(tune.tune(Adam, {}, stopping, trials, storage=file))
    assert list(tune.tune(Adam, {}, stopping, trials, storage=file)) == whole
    assert calls == trials + 1  # only the one that was cut off was done twice
    next(tune.tune(Adam, {"eps": 0.1}, stopping, 1, storage=file))
    assert calls == trials + 2  # another search, in the same file


def test_the_command_finds_rosenbrocks_minimum_and_says_how_to_again(optuna, tmp_path, capsys):
    """Within 1e-2 in at most 40 steps; the command that it prints gets there too."""
    plot = []
    if pytest.importorskip("matplotlib", reason="the pictures are matplotlib's"):
        plot = ["--plot", str(tmp_path / "search.png")]
    assert cli.main(["tune", "momentum:nesterov=True", "--trials", "80", "--seed", "1", *plot]) == 0
    output = capsys.readouterr().out
    steps = int(re.search(r"-\n(\d+) ", output)[1])
    assert steps <= 40
    _, _, rule = shlex.split(re.search("Its race: (.*)", output)[1])
    way = race.race({"": registry.parse(rule)}, race.rosenbrock, 40)[""]
    assert way.arrived == steps
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_no_journal_is_left_alone(optuna, tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("remember the milk\n")
    assert cli.main(["tune", "sgd", "--trials", "1", "--storage", str(file)]) == 2
    assert "storage must be a new file or an Optuna journal, got" in capsys.readouterr().err
    assert file.read_text() == "remember the milk\n"


def test_the_digits_objective_learns_and_judges_on_images_of_its_own(optuna):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    objective = tune.digits()
    assert objective.maximize
    good, bad = objective.score(Adam(lr=3e-3)), objective.score(Adam(lr=0.0))
    assert good > 0.85 > 0.3 > bad
    assert re.fullmatch(r".*no trial has seen: 0\.\d{4}\.", objective.remark(Adam(lr=3e-3)))


def test_a_trial_that_overflows_has_diverged(optuna, capsys):
    rule = ScheduleFreeSGD(lr=600.0, weight_lr_power=1500.0)
    with pytest.raises(ArithmeticError, match="pow"):
        race.race({"": rule}, race.rosenbrock, 1)
    objective = tune.rosenbrock()
    assert objective.score(rule) == tune.STEPS + 5**0.5  # it has stayed at the start
    assert cli.main(["tune", "schedulefreesgd:lr=600,weight_lr_power=1500", "--trials", "1"]) == 0
    assert "It is not finite from step 1 on." in capsys.readouterr().out
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    assert tune.digits().score(rule) == 0


def test_a_race_that_overflows_is_reported(capsys):
    assert cli.main(["race", "schedulefreesgd:r=2000", "--steps", "3"]) == 2
    assert "ScheduleFreeSGD, step 2: s4 = pow(2, 2000.0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tune", "adam:rho=1"], "an option must be NAME=VALUE of lr"),
        (["tune", "adam", "--trials", "0"], "must be a whole number of at least 1, got 0"),
        (["tune", "adam", "--seed", "-1"], "must be a whole number of at least 0, got -1"),
        (["race", "adam:lr=-1"], "lr must be in [0, inf), got -1"),
        (["tune", "adam:lr=-1"], "lr must be in [0, inf), got -1"),
        (["race", "--gif", "race.png"], "must end with .gif, got race.png"),
    ],
)
def test_bad_usage_of_the_commands(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert said in capsys.readouterr().err
