"""The examples of the tape run, and print and draw what they say."""

from __future__ import annotations

import re

import pytest
from scripts import run_example


def test_three_ways_to_a_derivative_agree(tmp_path):
    printed = run_example("derivatives", tmp_path, "sympy")
    rows = re.findall(r"^  (\w+) +\S+ +\S+ +(\S+e[-+]\d+) ", printed, re.M)
    assert [name for name, _ in rows] == ["symbols", "differences", "tape"] * 2
    for name, error in rows:
        assert float(error) < (1e-7 if name == "differences" else 1e-12)


def test_a_primitive_of_ones_own_does_not_overflow(tmp_path):
    written, own = run_example("primitive", tmp_path).split("softplus: recorded softplus")
    assert "nan" in written
    assert "nan" not in own
    assert "1000" in own


@pytest.mark.slow
def test_checkpointing_is_measured_and_drawn(tmp_path):
    printed = run_example("checkpointing", tmp_path, "matplotlib")
    held = dict(re.findall(r"^ *10000 (plain tape|checkpoint) +(\d+)", printed, re.M))
    assert held == {"plain tape": "10000", "checkpoint": "200"}
    assert "same bits: True" in printed
    assert "same bits: False" not in printed
    assert (tmp_path / "checkpointing.png").read_bytes().startswith(b"\x89PNG")
