"""The examples in JAX, and in every backend at once, run and print what they say."""

from __future__ import annotations

import re

import pytest
from scripts import run_example

BACKENDS = {"PyTorch": 0.0, "Keras on TensorFlow": 0.0, "JAX": 1e-6}
"""How far from NumPy, where JAX contracts multiply-adds."""


def test_a_rule_of_ones_own_takes_the_same_steps_everywhere(tmp_path):
    printed = run_example("own_rule", tmp_path)
    found = dict(re.findall(r"^(.*): largest difference from NumPy (\S+)$", printed, re.M))
    if not found:
        pytest.skip("no framework is installed")
    for name, difference in found.items():
        assert float(difference) <= BACKENDS[name]


def test_donated_weights_are_given_away_and_nothing_is_compiled_again(tmp_path):
    printed = run_example("jax_jit", tmp_path, "jax", "optax", "sklearn")
    losses = [float(x) for x in re.findall(r"loss (\S+)", printed)]
    assert losses[-1] < losses[0] / 4
    assert "given away: True" in printed
    assert "compiled 1 time\n" in printed
