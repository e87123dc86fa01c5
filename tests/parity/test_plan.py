"""``portopt plan``, and the example of two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from portopt import cli
from portopt.cli import plan

ROOT = Path(__file__).parents[2]


def test_figure_1_of_the_zero_paper(capsys, tmp_path):
    file = tmp_path / "plan.json"
    arguments = ["--params", "7.5e9", "--workers", "64", "--memory", "32e9", "--json", str(file)]
    assert cli.main(["plan", *arguments]) == 0
    together = [line.split("  ") for line in capsys.readouterr().out.splitlines() if " GB" in line]
    output = " ".join(cell.strip() for line in together for cell in line)
    assert all(f" {total} GB" in output for total in ("120", "31.4", "16.6", "1.88"))
    results = json.loads(file.read_text())
    assert (results["params"], results["workers"], results["rule"]) == (7.5e9, 64, "adam")
    assert [stage["total"] / 1e9 for stage in results["stages"]] == pytest.approx(
        [120, 31.40625, 16.640625, 1.875]
    )
    assert [stage["largest"] / 1e9 for stage in results["stages"]] == pytest.approx(
        [2, 7.641791, 14.422535, 128]
    )


def test_a_model_of_a_module_of_the_user(capsys, tmp_path, monkeypatch):
    (tmp_path / "model_of_a_user.py").write_text("def make():\n    return {'w': (300, 40)}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    common = ["plan", "--model", "model_of_a_user:make", "--precision", "float32", "--workers"]
    assert cli.main([*common, "2", "--rule", "adam:amsgrad=True"]) == 0
    assert "72 kB" in capsys.readouterr().out  # half of three slots
    assert cli.main([*common, "2", "--rule", "muon"]) == 0
    assert "the fullest of 2 workers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--params", "0", "--workers", "2"], "--params: must be a number in (0, 2**63), got 0"),
        (["--params", "x", "--workers", "2"], "--params: must be a number in (0, 2**63), got x"),
        (["--params", "1e9", "--workers", "0"], "--workers: must be a whole number of at least 1"),
        (["--params", "1e9", "--workers", "9" * 400], "--workers: must be at most 1000000, got 9"),
        (["--params", "1e308", "--workers", "2"], "--params: must be a number in (0, 2**63), got"),
        (["--params", "1e9"], "required: --workers"),
        (["--workers", "2"], "one of the arguments --params --model is required"),
        (["--params", "1e9", "--workers", "2", "--rule", "adem"], "adem"),
        (["--params", "1e9", "--workers", "2", "--rule", "adafactor"], "depends on shapes"),
        (["--model", "nowhere.npz", "--workers", "2"], "nowhere.npz"),
        (["--model", "no_such_module:f", "--workers", "2"], "No module named 'no_such_module'"),
        (["--model", "builtins:object", "--workers", "2"], "must be a module, a dict or a seq"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        status = cli.main(["plan", *arguments])
    except SystemExit as end:  # argparse's
        status = end.code
    assert status == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (1.875e9, "1.88 GB"), (4.1875e15, "4188 TB")],
)
def test_sizes(count, text):
    assert plan.size(count) == text


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    assert cli.main(["plan", "--params", "1e9", "--workers", "3000", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_example_of_two_workers():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "sharded_momentum.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "identical" in line]
    assert "DIFFERENT" not in done.stdout and rows
    for _, whole, first, second, _ in rows:
        assert int(first) + int(second) == int(whole)
        assert abs(int(first) - int(second)) <= 2 * 16 * 4
