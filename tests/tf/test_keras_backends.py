"""Keras on its other backends, each in a process of its own, without TensorFlow."""

import importlib.util

import pytest
from keras_runs import run_child


@pytest.mark.parametrize(
    ("backend", "needed"),
    [("jax", "jax"), ("torch", "torch"), ("numpy", "jax")],  # Keras's numpy backend imports JAX
)
def test_backend(backend, needed):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    out = run_child("tests/tf/on_backend.py", KERAS_BACKEND=backend)
    assert out.splitlines()[-1] == "agreed, without TensorFlow"
