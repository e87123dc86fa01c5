"""The examples that need no framework run, and print what they say."""

from __future__ import annotations

import re

from scripts import run_example


def test_momentum_by_hand_has_the_bits_of_ours(tmp_path):
    assert "bit-equal: True" in run_example("momentum_by_hand", tmp_path)


def test_parts_of_a_batch_are_worth_the_whole(tmp_path):
    printed = run_example("micro_batches", tmp_path)
    found = re.findall(r"(\d) parts of .* weight (\S+)$", printed, re.M)
    assert [parts for parts, _ in found] == ["2", "4", "8"]
    assert all(float(difference) < 1e-12 for _, difference in found)


def test_the_tape_learns_the_digits(tmp_path):
    printed = run_example("numpy_tape", tmp_path, "sklearn")
    assert float(re.findall(r"test accuracy (\S+)", printed)[-1]) > 0.85
