"""Examples and snippets, run as a reader runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_example(name, folder, *needed):
    """What an example prints, run in a folder; skips the test where it lacks a module."""
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    return run_script(ROOT / "examples" / f"{name}.py", folder)


def run_script(path, folder, *launcher):
    """What a script prints, run in a folder by Python or by a module; it draws to files alone."""
    done = subprocess.run(
        [sys.executable, *launcher, path],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MPLBACKEND": "Agg",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
