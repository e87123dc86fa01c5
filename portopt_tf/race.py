"""The part of ``portopt race`` that runs in Keras: ``python -m portopt_tf.race SPEC``."""

from __future__ import annotations

import json
import sys
from typing import Any

import keras

from portopt.race import Step, answer
from portopt.rules import Rule
from portopt_tf.from_rule import from_rule


def begin(rule: Rule, start: Any) -> Step:
    """Steps of `from_rule` on a float64 variable."""
    variable = keras.Variable(start, dtype="float64")
    optimizer = from_rule(rule)()

    def step(grad: Any) -> Any:
        optimizer.apply([keras.ops.convert_to_tensor(grad)], [variable])
        return keras.ops.convert_to_numpy(variable)

    return step


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]), begin)
