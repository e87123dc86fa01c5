"""A race on every backend."""

from __future__ import annotations

import json

import pytest
from support import assert_agree

from portopt import cli, worker

RULES = ["momentum:lr=0.0009765625", "adam:lr=0.5"]  # learning rates that float32 holds


@pytest.mark.parametrize("backend", ["jax", "torch", "keras"])
def test_every_backend_runs_the_same_race(backend, tmp_path):
    if worker.missing(backend):
        pytest.skip(f"{backend} is not installed")
    results = {}
    for name in ("numpy", backend):
        file = tmp_path / f"{name}.json"
        words = ["race", *RULES, "--steps", "20", "--backend", name, "--json", file]
        assert cli.main([*map(str, words), "--plot", str(tmp_path / "race.png")]) == 0
        results[name] = json.loads(file.read_text())["rules"]
    for rule in RULES:
        ours, reference = (results[name][rule]["points"] for name in (backend, "numpy"))
        assert len(ours) == 21
        assert_agree(ours, reference, "float64")
