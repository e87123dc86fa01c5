"""The race: its functions, its trajectories, its command and its pictures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import plugin
import pytest
from support import assert_agree

from portopt import cli, race, tape
from portopt.rules import SGD, Adam, registry

ROOT = Path(__file__).parents[2]
FORMULAS = {  # as published, and as the tape need not have them
    "rosenbrock": lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2 + 1,
    "beale": lambda x, y: sum(
        (c - x + x * y**n) ** 2 for n, c in enumerate((1.5, 2.25, 2.625), start=1)
    ),
    "himmelblau": lambda x, y: (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2,
    "ravine": lambda x, y: 0.5 * x**2 + 50 * y**2,
    "saddle": lambda x, y: 0.5 * x**2 + 0.25 * y**4 - 0.5 * y**2,
    "rastrigin": lambda x, y: (
        20 + x**2 + y**2 - 10 * (np.cos(2 * math.pi * x) + np.cos(2 * math.pi * y))
    ),
}
FUNCTION = """
from __future__ import annotations

from dataclasses import dataclass
from portopt import race

@dataclass
class Settings:  # a dataclass looks for its module
    steepness: float = 2.0

@race.function(start=(3.0, 2.0), x=(-4, 4), y=(-4, 4), minima=((1.0, 0.0),))
def bowl(x, y):
    return (x - 1) ** 2 + y**2

def plain(x, y):
    return x + y
"""


@pytest.fixture
def user_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION)
    return path


@pytest.mark.parametrize("function", race.FUNCTIONS.values(), ids=lambda f: f.name)
def test_functions_are_what_was_published(function):
    x, y = np.random.default_rng(0).uniform(-2, 2, (2, 50))
    assert_agree(function(x, y), FORMULAS[function.name](x, y), "float64")
    h = 1e-6
    differences = [
        (function(x + h, y) - function(x - h, y)) / (2 * h),
        (function(x, y + h) - function(x, y - h)) / (2 * h),
    ]
    gradients = [function.gradient(point) for point in np.transpose([x, y])]
    assert_agree(np.transpose(gradients), differences, "float32")
    grid = function(*np.meshgrid(np.linspace(*function.x, 99), np.linspace(*function.y, 99)))
    for minimum in function.minima:
        assert np.abs(function.gradient(np.array(minimum, float))).max() < 1e-12
        assert function(*minimum) <= grid.min() + 1e-12
    for (low, high), at in zip((function.x, function.y), function.start, strict=True):
        assert low < at < high


def test_a_race_returns_points_losses_and_distances():
    way = race.race({"a": SGD(lr=1e-3)}, race.rosenbrock, steps=30)["a"]
    x, y = -1.0, 2.0
    expected = [(x, y)]
    for _ in range(30):
        slope = y - x**2
        x, y = x - 1e-3 * (-2 * (1 - x) - 400 * x * slope), y - 1e-3 * 200 * slope
        expected.append((x, y))
    assert_agree(way.points, expected, "float64")
    assert_agree(way.losses, FORMULAS["rosenbrock"](*np.transpose(expected)), "float64")
    assert_agree(way.distances, np.hypot(*(np.array(expected) - 1).T), "float64")
    assert way.points.dtype == np.float64


def test_the_distance_is_that_from_the_nearest_minimum():
    near, far = race.himmelblau.minima[2], (0.0, 0.0)
    distances = race.himmelblau.distance(np.array([near, far]))
    assert distances[0] == 0.0
    assert distances[1] == min(math.hypot(*minimum) for minimum in race.himmelblau.minima)


def test_it_is_said_when_a_rule_arrives_or_diverges():
    ways = race.race({"good": SGD(lr=0.01), "bad": SGD(lr=1.0)}, race.ravine, steps=600)
    good, bad = ways["good"], ways["bad"]
    # x is 0.99**t times -4 (and y is 0 after one step): the first power below 0.01 / 4.
    assert (good.arrived, good.diverged) == (math.ceil(math.log(0.0025) / math.log(0.99)), None)
    assert bad.arrived is None
    assert not np.isfinite(bad.losses[bad.diverged])
    assert np.isfinite(bad.losses[: bad.diverged]).all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: race.race({}, race.beale, 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: race.race({"a": Adam}, race.beale, 1), TypeError, r"rules\['a'\] must be a porto"),
        (lambda: race.function((0, 0), (1, 0), (0, 1)), ValueError, r"x must be \(lower, upper\),"),
        (lambda: race.function((0,), (0, 1), (0, 1)), ValueError, r"start must be two finite numb"),
        (lambda: race.function((0, 0), (0, 1), (0, 1), ((0, math.inf),)), ValueError, "minima.0. "),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("admm", "name must be one of Adadelta, .*got 'admm'"),
        ("adam:lr=-1", r"adam:lr=-1: lr must be in \[0, inf\), got -1"),
        ("adam:lr=fast", r"lr must be a real number in \[0, inf\), got 'fast'"),
        ("adam:amsgrad=yes", "amsgrad must be True or False, got 'yes'"),
        ("momentum:buffer=mean", "buffer must be one of 'sum', 'velocity', 'average', got 'mean'"),
        ("adam:rho=0.9", "an option must be NAME=VALUE of lr, .*eps_form, got 'rho=0.9'"),
        ("adam:lr", "an option must be NAME=VALUE of lr, .*got 'lr'"),
    ],
)
def test_a_rule_on_the_command_line_is_checked(text, words):
    with pytest.raises(ValueError, match=words):
        registry.parse(text)


def test_a_rule_on_the_command_line():
    rule = registry.parse("ADAM:lr=0.1,beta1=8e-1,amsgrad=True,eps_form=inside")
    assert rule == Adam(lr=0.1, beta1=0.8, amsgrad=True, eps_form="inside")


def test_a_plugin_races_too(monkeypatch, tmp_path):
    plugin.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    way = race.race({"": registry.parse("signs:lr=0.25")}, race.rosenbrock, steps=1)[""]
    assert way.points[1].tolist() == [-1.25, 1.75]
    with pytest.raises(ValueError, match="signs: Signs must be given lr"):
        registry.parse("signs")


def test_the_command_writes_a_table_numbers_and_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures are matplotlib's")
    files = {end: tmp_path / f"race.{end}" for end in ("png", "svg", "gif", "json")}
    rules = ["adam:lr=0.5", "sgd:lr=0.1"]  # the latter diverges
    for plot, *more in (["svg"], ["png", "--gif", files["gif"], "--json", files["json"]]):
        words = ["race", *rules, "--steps", "6", "--plot", files[plot], *more]
        assert cli.main([*map(str, words)]) == 0
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "gif": b"GIF89a"}
    assert all(files[end].read_bytes().startswith(start) for end, start in starts.items())
    table = capsys.readouterr().out
    assert "distance to the minimum" in table and "not finite from step" in table
    results = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    way = race.race({"": registry.parse(rules[0])}, race.rosenbrock, 6)[""]
    assert results["rules"][rules[0]]["points"] == way.points.tolist()
    diverged = results["rules"][rules[1]]["diverged"]
    assert results["rules"][rules[1]]["losses"][diverged] is None


def test_the_picture_of_the_defaults_is_readable():
    pytest.importorskip("matplotlib", reason="the pictures are matplotlib's")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from portopt import plots

    rules = {text: registry.parse(text) for text in race.DEFAULT_RULES}
    ways = race.race(rules, race.rosenbrock, steps=20)
    figure = plots.trajectories(race.rosenbrock, ways)
    FigureCanvasAgg(figure).draw()
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == [*race.DEFAULT_RULES, "start", "minimum"]
    left, right = figure.axes
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in (left, right)]
    assert labels == [("x", "y"), ("step", "loss above the minimum")]
    drawn = {line.get_label(): line.get_xydata() for line in left.lines}
    assert drawn["minimum"].tolist() == [[1.0, 1.0]]
    assert drawn["start"].tolist() == [[-1.0, 2.0]]
    assert_agree(drawn[race.DEFAULT_RULES[3]], ways[race.DEFAULT_RULES[3]].points, "same")
    drawn_on, paper = figure.get_tightbbox(), figure.bbox_inches
    assert (drawn_on.min >= paper.min).all() and (drawn_on.max <= paper.max).all()


def test_a_function_of_ones_own(user_file, tmp_path, capsys):
    arguments = ["race", "sgd:lr=0.5", "--steps", "1", "--plot", str(tmp_path / "a.png")]
    assert cli.main([*arguments, "--function", f"{user_file}:bowl"]) == 0
    assert "sgd:lr=0.5  0           0                        step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("banana", "function must be one of rosenbrock, .*, or FILE.py:NAME, got 'banana'"),
        ("{file}:plain", "plain in .* must be made with @portopt.race.function, is <function"),
        ("{file}:other", "other in .* must be made with @portopt.race.function, is nothing"),
        ("{file}x:f", "function must be in a Python file, FILE.py:NAME, got "),
        ("no{file}:f", "cannot be run: FileNotFoundError"),
        ("{leaving}:f", "leaving.py cannot be run: SystemExit: 0"),
    ],
)
def test_a_function_that_is_none(user_file, tmp_path, name, words):
    leaving = tmp_path / "leaving.py"
    leaving.write_text("raise SystemExit(0)")
    with pytest.raises(ValueError, match=words):
        race.find(name.format(file=user_file, leaving=leaving))


AROUND_THE_START = {"start": (1.0, 1.0), "x": (-4, 4), "y": (-4, 4)}


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda x, y: 3.0, "of the shape of x and y, .2,., got 3.0"),
        (lambda x, y: tape.sum(x + y), "of the shape of x and y, .2,., got Variable"),
        (lambda x, y: {}[0], "<lambda> cannot be evaluated: KeyError: 0"),
        (lambda x, y: 2 * x if x.value > 0 else y, "cannot be evaluated: ValueError: The truth"),
    ],
)
def test_a_function_that_cannot_be_evaluated(formula, words, monkeypatch, capsys):
    function = race.function(**AROUND_THE_START)(formula)
    with pytest.raises(ValueError, match=words):
        function([1.0, 2.0], [1.0, 2.0])
    monkeypatch.setitem(race.FUNCTIONS, "odd", function)
    assert cli.main(["race", "sgd", "--steps", "1", "--function", "odd"]) == 2
    assert "portopt: <lambda> " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("formula", "minima"),
    [
        (lambda x, y: tape.log(x) + y**2, ()),
        (lambda x, y: tape.log(x) + y**2, ((0.0, 0.0),)),  # -inf
        (lambda x, y: tape.exp(100 * x**2), ()),
        (lambda x, y: tape.log(0 * x - 1), ()),
        (lambda x, y: 0 * x + 3, ()),
        (lambda x, y: -(x**2), ((1.0, 1.0),)),  # no minimum at all
    ],
    ids=["nan", "no floor", "overflow", "never finite", "constant", "upside down"],
)
def test_the_picture_of_a_function_that_is_not_finite_or_flat(formula, minima):
    pytest.importorskip("matplotlib", reason="the pictures are matplotlib's")
    from portopt import plots

    function = race.function(**AROUND_THE_START, minima=minima)(formula)
    ways = race.race({"a": SGD(lr=1e-3)}, function, steps=3)
    plots.trajectories(function, ways).draw_without_rendering()


def test_without_a_picture_it_is_said_why(monkeypatch, tmp_path, capsys):
    def formula(x, y):
        if x.value.ndim == 2:
            raise RuntimeError("no grids")
        return x**2 + y**2

    monkeypatch.setitem(race.FUNCTIONS, "odd", race.function(**AROUND_THE_START)(formula))
    words = ["race", "sgd", "--function", "odd", "--plot", str(tmp_path / "race.png")]
    assert cli.main(words) == 0
    said = "No picture: formula cannot be evaluated: RuntimeError: no grids"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("hidden", "code", "extra"),
    [
        ("matplotlib", "cli.main(['race', '--steps', '1'])", "plot"),
        ("matplotlib", "cli.main(['demo', '--epochs', '1'])", "plot"),
        ("matplotlib", "plots.step_times([])", "plot"),
        ("sklearn", "cli.main(['demo', '--epochs', '1'])", "plot"),
        ("sklearn", "cli.main(['tune', 'sgd', '--objective', 'digits'])", "plot"),
        ("optuna", "cli.main(['tune', 'sgd'])", "tune"),
        ("torch", "cli.main(['race', '--backend', 'torch'])", "torch"),
        ("keras", "cli.main(['race', '--backend', 'keras'])", "tf"),
        ("jax", "cli.main(['race', '--backend', 'jax'])", "jax"),
    ],
)
def test_what_is_missing_is_said_with_its_extra(hidden, code, extra, tmp_path):
    script = f"""
import sys
from importlib import util
sys.modules[{hidden!r}] = None
found = util.find_spec
util.find_spec = lambda name: None if name in ("torch", "keras", "jax") else found(name)
from portopt import cli, plots
{code}
"""
    needed = {"demo": "sklearn", "digits": "optuna"}
    for word, module in needed.items():
        if word in code and module != hidden:
            pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    words = f"{hidden} is not installed: pip install 'portable-optimizers[{extra}]'"
    assert words in done.stdout + done.stderr
