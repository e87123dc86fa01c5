"""Arrays of awkward values, and their comparison bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from support import assert_agree


def dtype_of(name):
    """A dtype by name; skips the test where bfloat16 is not installed."""
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def specials(name):
    """NaN, infinities, zeros of both signs, and the ends of the dtype's range."""
    dtype = dtype_of(name)
    tiny, large = {
        "float16": (2.0**-14, 65504.0),
        "bfloat16": (2.0**-126, 255 * 2.0**120),
        "float32": (2.0**-126, (2 - 2.0**-23) * 2.0**127),
        "float64": (2.0**-1022, (2 - 2.0**-52) * 2.0**1023),
    }[name]
    smallest = np.array([1], f"u{dtype.itemsize}").view(dtype)[0]
    found = [0.0, 1.0, tiny, tiny * 0.75, large, float(smallest), np.inf, np.nan]
    return np.array([*found, *(-x for x in found[:-1])], dtype)


def awkward(rng, size, name):
    """Values of random sign, magnitudes from 1e-9 to 10, every fifth or so a special one."""
    plain = rng.standard_normal(size) * 10.0 ** rng.uniform(-9, 1, size)
    return np.where(rng.random(size) < 0.2, rng.choice(specials(name), size), plain).astype(
        dtype_of(name)
    )


def assert_bits(actual, expected, what="values"):
    """Raise unless the arrays are the same bit for bit; every NaN is the same."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{what}: {actual.dtype} is not {expected.dtype}")
    with np.errstate(invalid="ignore"):  # a signaling NaN
        assert_agree(actual, expected, "same", what=what)
        zeros = expected == 0
    signs = [np.signbit(x[zeros]).astype(float) for x in (actual, expected)]
    assert_agree(*signs, "same", what=f"{what}: signs of zeros")
