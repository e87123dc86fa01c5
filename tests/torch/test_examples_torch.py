"""The examples in PyTorch run, and print and draw what they say."""

from __future__ import annotations

import re

from scripts import run_example

NEEDED = ("sklearn", "matplotlib")


def accuracies(printed):
    return [float(found) for found in re.findall(r"accuracy.* (0\.\d+)$", printed, re.M)]


def test_gradients_zeroed_learn_and_gradients_accumulated_do_not(tmp_path):
    zeroed, accumulated = accuracies(run_example("torch_digits", tmp_path, *NEEDED))
    assert zeroed > 0.85
    assert accumulated < 0.5
    assert (tmp_path / "torch_digits.png").read_bytes().startswith(b"\x89PNG")


def test_frozen_layers_keep_their_bits(tmp_path):
    printed = run_example("torch_frozen", tmp_path, *NEEDED)
    rows = re.findall(r"^\d\S+ +(frozen|trained) +(.*?) +state: (.*)$", printed, re.M)
    frozen, trained = ("frozen", "same bits", "none"), ("trained", "moved")
    assert rows == [frozen] * 4 + [(*trained, "step, exp_avg, exp_avg_sq")] * 2
    assert accuracies(printed)[0] > 0.7


def test_a_straight_through_gradient_teaches_what_is_below_a_sign(tmp_path):
    printed = run_example("torch_function", tmp_path, *NEEDED)
    plain, through = map(float, re.findall(r"moved by (\S+)", printed))
    assert plain == 0 < through
    plain, through = accuracies(printed)
    assert plain < through


def test_the_profiler_names_our_step(tmp_path):
    printed = run_example("torch_profile", tmp_path, *NEEDED)
    row = re.search(r"^ *Optimizer\.step#AdamW\.step .* (\d+) *$", printed, re.M)
    assert row and row[1] == "40"
