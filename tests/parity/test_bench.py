"""The benchmarks: what is compared is the same work, and the command reports all of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from support import assert_agree

from portopt import Optimizer, bench, cli, plots, trace, worker
from portopt.bench import OURS, RULES, TAILS, Case, Contender, Timing, child

FRAMEWORKS = [f for f, needed in bench.FRAMEWORKS.items() if not any(map(worker.missing, needed))]


def timing(path, seconds, ours, mode="step", rule="adam", framework="torch"):
    return Timing(framework, mode, rule, "16m", path, seconds, 0.5, 1.0, 2_000_000, 3, ours)


@pytest.mark.parametrize(
    ("mix", "tensors", "elements"),
    [
        ("16m", 1, 2**24),
        ("resnet50", 161, 25_557_032),
        ("vit-b", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
        ("1000x32x32", 1000, 1_024_000),
    ],
)
def test_mixes_are_the_models_that_they_are_called(mix, tensors, elements):
    assert len(bench.MIXES[mix]) == tensors
    assert sum(map(math.prod, bench.MIXES[mix])) == Case("adam", mix, False).elements == elements


def test_bytes_are_those_that_a_step_must_move():
    sizes = {"sgd": 12, "momentum": 20, "adam": 28, "amsgrad": 36, "lion": 20, "tail": 40}
    sizes["tail-zeroed"] = 44
    assert {rule: bench.bytes_per_element(rule) for rule in sizes} == sizes


def test_ours_is_compared_with_the_fastest_native_of_its_mode():
    timings = [
        *(timing(OURS, 1.0, 1.0), timing("foreach", 4.0, 0.3), timing("fused", 2.0, 0.6)),
        *(timing(OURS, 3.0, 1.0, mode="graph"), timing("keras", 1.5, 2.0, mode="graph")),
        *(timing(OURS, 1.0, 1.0, rule="lion"), timing("native alone", 1.0, None, rule="sgd")),
    ]
    groups = bench.groups(timings)
    assert [(group.ours.mode, group.ours.rule) for group in groups] == [
        *(("step", "adam"), ("graph", "adam"), ("step", "lion"))
    ]
    assert [group.ratio for group in groups] == [0.6, 2.0, None]
    head, lines = bench.step_table(groups)
    times = ["500.00", "1000.00", "4000.00", "2000.00", "-"]
    assert lines[0] == ["adam", "step", *times, "0.60", "50%", "2.0", "2.0"]
    assert all(len(line) == len(head) for line in lines)
    assert len(plots.step_times(groups).axes) == 1


def test_every_rule_and_mix_is_timed_by_default():
    plans = {f: bench.plan(f, [], [], False) for f in bench.FRAMEWORKS}
    everything = [case for plan in plans.values() for case in plan]
    assert {case.rule for case in everything} == set(RULES)
    assert {case.mix for case in everything} == set(bench.MIXES)
    tails = {f: {case.rule for case in plan} & {*TAILS} for f, plan in plans.items()}
    assert {f: found for f, found in tails.items() if found} == {"torch": {*TAILS}}
    asked = bench.plan("keras", ["sgd", *TAILS], ["gpt2"], False)
    assert asked == [Case("sgd", "gpt2", False)]


def test_paths_take_turns_and_preparations_are_done_first(capsys):
    calls = []

    def contender(path):
        return Contender(
            "step",
            path,
            make=lambda: lambda: calls.append(path),
            before=lambda: calls.append(f"before {path}"),
        )

    spec = {"cases": [("adam", "16m", False)], "seconds": 0.0}
    bench.answer("numpy", lambda case: [contender("a"), contender("b")], spec)
    lines = capsys.readouterr().out.splitlines()
    events = [json.loads(line.removeprefix(worker.MARK)) for line in lines]
    assert events[0] == {"begin": ["adam", "16m", False]}
    assert [event["timing"]["path"] for event in events[1:]] == ["a", "b"]
    assert {event["timing"]["rounds"] for event in events[1:]} == {3}
    assert calls[::2] == [f"before {path}" for path in calls[1::2]]
    paths = calls[1::2]
    rounds = [*zip(paths[::2], paths[1::2], strict=True)]
    assert rounds[:2] == [("a", "b")] * 2  # the first steps, and those whose memory is measured
    assert {*rounds[2:]} == {("a", "b"), ("b", "a")} and len(rounds) == 5


def test_ours_is_compared_within_each_round(monkeypatch, capsys):
    monkeypatch.setattr(child, "_timed", lambda step: step())  # a step says how long it takes

    def contender(path, mode, *seconds):
        times = iter((0.0, 0.0, *seconds))  # the first step, and that whose memory is measured
        return Contender(mode, path, make=lambda: lambda: next(times))

    paths = [
        *(contender(OURS, "eager", 1.0, 10.0, 3.0), contender("a", "eager", 2.0, 40.0, 4.0)),
        contender("b", "graph", 1.0, 1.0, 1.0),
    ]
    bench.answer("numpy", lambda case: paths, {"cases": [("adam", "16m", False)], "seconds": 0.0})
    lines = capsys.readouterr().out.splitlines()[1:]
    found = [json.loads(line.removeprefix(worker.MARK))["timing"]["ours"] for line in lines]
    assert found == [1.0, 0.5, None]  # of the medians it is 3 / 4


def test_peak_memory_is_that_of_the_step_alone():
    size = 32 << 20
    kept = np.ones(size, np.uint8)

    def step():
        return (kept + 1).sum()  # one array more, given back in the end

    extra = bench.peak_extra(step)
    if extra is None:
        pytest.skip("only Linux tells")
    assert size * 0.99 < extra < 2 * size  # Linux counts pages by the dozen
    assert bench.peak_extra(lambda: kept.fill(0)) < size / 16


START = np.linspace(-1e-3, 1e-3, 1000, dtype=np.float32)  # a step moves it far
TWINS = [rule for rule, contest in RULES.items() if contest.torch and rule not in TAILS]
GRADIENT = np.linspace(-2, 3, 1000, dtype=np.float32)


@pytest.mark.parametrize("rule", TWINS)
def test_paths_of_pytorch_do_the_same(rule):
    torch = pytest.importorskip("torch")
    from portopt_torch.bench import paths

    case = Case(rule, "16m", False)
    results = run_paths(torch, lambda *tensors: paths(case, *tensors), GRADIENT)
    expected = {"w": START.copy()}
    optimizer = Optimizer(RULES[rule].rule, expected)
    for _ in range(3):
        optimizer.step({"w": GRADIENT})
    assert {OURS, "default", "foreach"} <= set(results)
    for path, param in results.items():
        assert_agree(param.detach(), expected["w"], "float32", start=START, what=path)


@pytest.mark.parametrize("rule", TWINS)
def test_twins_have_the_slots_of_the_rule(rule):
    torch = pytest.importorskip("torch")
    name, arguments = RULES[rule].torch
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    native = getattr(torch.optim, name)([param], **arguments)
    native.step()
    program = trace(RULES[rule].rule)
    assert {*native.state[param]} - {"step"} == {*program.slots, *program.numbers}


# Adam sees how large a gradient is beside eps alone; the norm is below 1, or far above it.
@pytest.mark.parametrize("gradient", [1e-8 * GRADIENT, np.where(GRADIENT > 2.9, 1e6, 1e-2)])
@pytest.mark.parametrize("zeroed", TAILS.values())
def test_tails_of_pytorch_do_the_same(gradient, zeroed):
    torch = pytest.importorskip("torch")
    from portopt_torch.bench import tails

    results = run_paths(torch, partial(tails, zeroed=zeroed), gradient.astype(np.float32))
    assert {OURS, "fused", "foreach"} == set(results)
    expected = results["fused"].detach()
    for path, param in results.items():
        assert_agree(param.detach(), expected, "float32", start=START, what=path)
        assert (param.grad.tolist() == [0.0] * len(START)) if zeroed else param.grad is None


def run_paths(torch, make, gradient):
    """The parameter after three steps of each path, from the same start."""
    results = {}
    for place in range(len(make([torch.nn.Parameter(torch.zeros(1))], [torch.zeros(1)]))):
        param = torch.nn.Parameter(torch.from_numpy(START.copy()))
        contender = make([param], [torch.from_numpy(gradient.copy())])[place]
        contender.before()
        step = contender.make()
        for _ in range(3):
            contender.before()
            step()
        results[contender.path] = param
    return results


@pytest.mark.slow
def test_the_quick_run_times_everything_that_is_installed(tmp_path):
    files = ["--json", "bench.json", "--plot", "bench.png"]
    command = [sys.executable, "-m", "portopt", "bench", "--quick", *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    timings = [Timing(**timing) for timing in results["steps"]]
    assert [*dict.fromkeys(t.framework for t in timings)] == FRAMEWORKS
    groups = bench.groups(timings)
    assert sum(1 + len(group.natives) for group in groups) == len(timings)
    assert all(group.natives for group in groups if group.ours.framework != "numpy")
    assert all(t.seconds > 0 and t.limit > 0 and t.first > 0 for t in timings)
    installed = {bench.TITLES[f] for f in FRAMEWORKS}
    assert all(f"\n{title}, one tensor of 16M\n" in done.stdout for title in installed)
    assert {row["cache"] for row in results["first_steps"]} == {"none", "all"}
    assert set(results["imports"]) == {
        package for package, base in bench.IMPORTS.items() if worker.missing(base) is None
    }
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_framework_that_fails_does_not_lose_the_others(monkeypatch, capsys, tmp_path):
    def ask(framework, *rest):
        if framework == "torch":
            raise worker.WorkerError("torch ended with status 1")
        return [timing(OURS, 1.0, 1.0, framework=framework)]

    monkeypatch.setattr(worker, "missing", lambda needed: needed if needed == "optax" else None)
    monkeypatch.setattr(bench, "ask", ask)
    monkeypatch.setattr(bench, "first_steps", lambda *arguments: [])
    monkeypatch.setattr(bench, "import_time", lambda *arguments: 0.05)
    assert cli.main(["bench", "--json", str(tmp_path / "bench.json")]) == 2
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [row["framework"] for row in results["steps"]] == ["numpy", "keras", "keras-torch"]
    output = capsys.readouterr()
    assert "jax is left out: optax is not installed" in output.out
    assert "portopt: torch ended with status 1" in output.err


def test_where_nothing_was_measured_there_is_no_picture(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(worker, "missing", lambda needed: needed)
    file = tmp_path / "bench.png"
    assert cli.main(["bench", "--plot", str(file)]) == 0
    assert "No picture: nothing was measured" in capsys.readouterr().out
    assert not file.exists()


@pytest.mark.parametrize("option", [["--rules", "lbfgs"], ["--mixes", "gpt3"]])
def test_bad_choices(option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *option])
    assert stop.value.code == 2
    assert f"invalid choice: '{option[1]}'" in capsys.readouterr().err
