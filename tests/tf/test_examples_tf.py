"""The examples in Keras and TensorFlow run, and print what they say."""

from __future__ import annotations

import re

from scripts import run_example


def test_fit_learns_as_with_the_native(tmp_path):
    printed = run_example("keras_fit", tmp_path, "sklearn")
    ours, native = printed.split("keras.AdamW")
    losses = [[float(x) for x in re.findall(r"loss (\S+)", part)] for part in (ours, native)]
    assert len(losses[0]) == 4 and losses[0][-1] < losses[0][0] / 2
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3


def test_a_loop_with_a_gradient_tape_is_traced_once(tmp_path):
    printed = run_example("tf_gradient_tape", tmp_path, "sklearn")
    losses = [float(x) for x in re.findall(r"loss (\S+)", printed)]
    assert losses[-1] < losses[0] / 4
    assert "280 steps, traced 1 time\n" in printed
