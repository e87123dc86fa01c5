"""Keras on its other backends, each in a process of its own, without TensorFlow."""

import importlib.util

import pytest
from keras_runs import run_child


@pytest.mark.parametrize("backend", ("jax", "torch", "numpy"))
def test_backend(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    out = run_child("tests/tf/on_backend.py", KERAS_BACKEND=backend)
    assert out.splitlines()[-1] == "agreed, without TensorFlow"
