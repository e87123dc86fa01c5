"""Imports point down only, and the core stands on NumPy alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras"}
FORBIDDEN = {
    "portopt": FRAMEWORKS | {"portopt_torch", "portopt_tf"},
    "portopt_torch": {"portopt_tf", "keras", "tensorflow"},
    "portopt_tf": {"portopt_torch", "torch"},
}
BACKENDS = {"memory_torch.py": {"torch"}}
"""What stands on a framework that Keras runs on."""
LEVELS = [
    {"arrays"},
    {"rules", "program"},
    {"trace"},
    {"kernels"},
    {"plan"},
    {"optimizer", "sharding", "tape", "jax"},
    # "" is the package's own face.
    {"", "__main__", "bench", "cli", "demo", "extras", "parity", "plots", "race", "tune", "worker"},
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
HEAVY = {
    *FRAMEWORKS,
    *("jax", "optax", "llvmlite", "numba", "triton", "matplotlib", "sklearn", "scipy", "pandas"),
    "optuna",
    *("cupy", "ml_dtypes", "array_api_compat", "array_api_strict", "portopt_torch", "portopt_tf"),
}
FILES = sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))


def imported(path):
    """Full names of what a file imports, at any depth."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_package_imports_another_framework(path):
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & (FORBIDDEN[package] - BACKENDS.get(path.name, set()))


@pytest.mark.parametrize("path", sorted((ROOT / "portopt").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_within_the_core_point_down(path):
    package, name, *_ = *path.relative_to(ROOT).with_suffix("").parts, ""
    own = "" if name == "__init__" else name
    assert package == "portopt" and own in LEVEL, f"give {own} a level"
    for other in imported(path):
        top, name, *_ = *other.split("."), ""
        name = name if name in LEVEL else ""  # `from portopt import Optimizer`: from its face
        if top == "portopt" and name != own:
            assert LEVEL[name] < LEVEL[own] or own in LEVELS[-1], f"{own} imports {other}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("def f():\n    if x:\n        from keras import ops", {"keras.ops"}),
        ("try:\n    import a, b.c\nexcept ImportError: pass", {"a", "b.c"}),
    ],
)
def test_imports_are_found_at_any_depth(source, found, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert imported(path) == found


def test_importing_the_core_loads_numpy_and_nothing_heavier():
    code = "import json, sys, portopt; print(json.dumps(sorted(sys.modules)))"
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in json.loads(child.stdout)}
    assert "numpy" in loaded
    assert not loaded & HEAVY
