"""The commands, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from portopt import cli, demo, worker
from portopt.cli import console

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
FRAMEWORKS = [f for f in worker.FRAMEWORKS if worker.missing(f) is None]


def portopt(*arguments, cwd):
    command = [sys.executable, "-m", "portopt", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("rule", demo.CASES)
def test_demo_learns_the_digits_in_every_framework(rule, tmp_path):
    done = portopt("demo", "--rule", rule, "--json", "results.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    expected = ["NumPy"] + [console.NAMES[f] for f in FRAMEWORKS for _ in range(3)]
    assert [run["framework"] for run in results["runs"]] == expected
    assert all(run["accuracy"] >= 0.95 for run in results["runs"])
    count = len(FRAMEWORKS)  # with a native each; and NumPy makes one more to compare in pairs
    assert len(results["differences"]) == count + count * (count + 1) // 2
    assert all(d["passed"] and d["largest"] <= d["limit"] for d in results["differences"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif("torch" not in FRAMEWORKS, reason="PyTorch is not installed")
def test_demo_fails_when_parity_is_lost(monkeypatch, capsys, tmp_path):
    # Only this process has the other rule: the child trains with the real one.
    real = demo.CASES["adam"]
    monkeypatch.setitem(demo.CASES, "adam", replace(real, rule=replace(real.rule, lr=2e-3)))
    monkeypatch.setattr(console, "NAMES", {"torch": "PyTorch"})
    status = cli.main(["demo", "--epochs", "1", "--plot", str(tmp_path / "demo.png")])
    assert status == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_names_what_is_not_installed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(worker, "missing", lambda framework: framework)
    plot = tmp_path / "demo.png"
    assert cli.main(["demo", "--epochs", "1", "--plot", str(plot)]) == 0
    output = capsys.readouterr().out
    assert "PyTorch is left out: torch is not installed" in output
    assert "Keras is left out: keras is not installed" in output
    assert "There is nothing to compare with." in output
    assert plot.exists()


def test_parity_without_natives_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(worker, "missing", lambda framework: framework)
    assert cli.main(["parity"]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_a_framework_that_fails_does_not_lose_the_others(monkeypatch, capsys, tmp_path):
    def broken(framework, *rest):
        raise worker.WorkerError(f"{framework} ended with status 1")

    monkeypatch.setattr(worker, "missing", lambda framework: None)
    monkeypatch.setattr(demo, "train_child", broken)
    files = ["--plot", str(tmp_path / "demo.png"), "--json", str(tmp_path / "demo.json")]
    assert cli.main(["demo", "--epochs", "1", *files]) == 2
    results = json.loads((tmp_path / "demo.json").read_text())
    assert [run["framework"] for run in results["runs"]] == ["NumPy"]
    assert "portopt: keras ended with status 1" in capsys.readouterr().err


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupt(epochs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "digits", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "\nportopt: interrupted\n"


@pytest.mark.parametrize(
    ("variable", "configured", "backend"),
    [(None, None, "tensorflow"), ("", "torch", "torch"), ("jax", "torch", "jax")],
)
def test_the_backend_of_keras(monkeypatch, tmp_path, variable, configured, backend):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if configured:
        (tmp_path / "keras.json").write_text(json.dumps({"backend": configured}))
    assert worker.keras_backend() == backend


@pytest.mark.slow
@pytest.mark.parametrize("command", [["demo", "--epochs", "1"], ["parity"]], ids=lambda c: c[0])
def test_commands_on_keras_with_jax(monkeypatch, tmp_path, command):
    for needed in ("keras", "jax"):
        pytest.importorskip(needed)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    done = portopt(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--epochs", "0"], "must be a whole number of at least 1, got 0"),
        (["demo", "--epochs", "2.5"], "must be a whole number of at least 1, got 2.5"),
        (["demo", "--plot", "curves.xyz"], "must end with .png, .svg or .pdf, got curves.xyz"),
        (["demo", "--plot", "nowhere/x.png"], "must be a file that can be written, got nowhere"),
        (["parity", "--json", "nowhere/x.json"], "must be a file that can be written, got nowhere"),
        (["demo", "--rule", "adagrad"], "invalid choice: 'adagrad'"),
        (["race", "adam:lr={[]:1}"], "lr must be a real number"),
        ([], "COMMAND"),
    ],
)
def test_bad_usage(arguments, words, tmp_path):
    done = portopt(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_child_that_fails_is_reported():
    with pytest.raises(worker.WorkerError, match=r"(?s)ended with status 1.*No module named"):
        list(worker.events("portopt.nothing", {}))


@pytest.mark.parametrize("command", [["rules"], ["race", "adam", "--steps", "3"]], ids=str)
def test_a_reader_that_has_read_enough_ends_it_quietly(command, tmp_path):
    arguments = [sys.executable, "-m", "portopt", *command]
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_keras_on_a_backend_that_cannot_train_is_left_out(monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    monkeypatch.setattr(worker, "missing", lambda framework: None)
    assert "keras" not in [*console.each_framework()]
    assert "Keras is left out: its backend numpy cannot train" in capsys.readouterr().out


def test_a_configuration_of_keras_that_is_no_object(monkeypatch, tmp_path):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    (tmp_path / "keras.json").write_text("[]")
    assert worker.keras_backend() == "tensorflow"
