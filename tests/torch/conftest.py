"""Collect nothing here where PyTorch is missing: these tests are of its adapter."""

from importlib.util import find_spec

# This folder, seen from tests/, is itself an importable "torch" without an origin.
found = find_spec("torch")
collect_ignore_glob = ["*.py"] if found is None or found.origin is None else []
