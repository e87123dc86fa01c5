"""Tests of `portopt_tf` on Keras's TensorFlow backend."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's notes on the CPU it finds
missing = [name for name in ("keras", "tensorflow") if importlib.util.find_spec(name) is None]
if missing or os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    collect_ignore_glob = ["test_*"]  # nothing here can be imported


def pytest_collection_modifyitems(items):
    # TensorFlow's variables have an old __array__: NumPy 2 warns when Keras copies one.
    old_array = pytest.mark.filterwarnings(
        "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    )
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(old_array)


@pytest.fixture
def double(monkeypatch):
    """Everything that Keras makes is float64, and starts from the same seed."""
    import keras
    from keras_runs import exact_cast

    monkeypatch.setattr("keras.src.ops.cast", exact_cast)
    keras.utils.set_random_seed(0)
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
