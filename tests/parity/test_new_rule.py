"""A rule that is in no adapter trains in every framework, with the same losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from portopt import demo, worker

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
HERE = Path(__file__).parent


def losses(framework):
    command = [sys.executable, HERE / "train_lion.py", framework]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected():
    return losses("numpy")


def test_lion_has_at_most_15_lines_and_learns(expected):
    source = (HERE / "lion.py").read_text()
    rule = source[source.index("@dataclass") :].strip().splitlines()
    assert len(rule) <= 15
    assert expected[-1] < 0.7 * expected[0]


@pytest.mark.parametrize("framework", worker.FRAMEWORKS)
def test_lion_has_the_same_losses_everywhere(framework, expected):
    absent = worker.missing(framework)
    if absent:
        pytest.skip(f"{absent} is not installed")
    actual = losses(framework)
    assert len(actual) == len(expected) == 44
    assert np.max(np.abs(np.subtract(actual, expected))) <= demo.FRAMEWORK_LIMIT
