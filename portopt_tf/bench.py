"""The part of ``portopt bench`` that runs in Keras: ``python -m portopt_tf.bench SPEC``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import portopt_tf
from portopt.bench import OURS, RULES, Case, Contender, Step, answer


def modes(case: Case) -> dict[str, Callable[[Step], Step]]:
    """How a step is run: eagerly and, on TensorFlow, in a graph and through XLA."""
    eager: dict[str, Callable[[Step], Step]] = {"eager": lambda step: step}
    if keras.backend.backend() != "tensorflow" or not case.compiled:
        return eager
    import tensorflow as tf

    return {
        **eager,
        "graph": tf.function,
        "xla": lambda step: tf.function(step, jit_compile=True),
    }


def contenders(case: Case) -> list[Contender]:
    """Ours and the native in every mode, on the same gradients.

    Each has its own variables: a compiled step leaves their values in memory of another kind, which
    an eager one would copy first.
    """
    rng = np.random.default_rng(0)
    values, gradients = (
        [rng.standard_normal(shape, np.float32) for shape in case.shapes] for _ in range(2)
    )
    grads = [keras.ops.convert_to_tensor(gradient) for gradient in gradients]

    def path(make_optimizer: Callable[[], Any], wrap: Callable[[Step], Step]) -> Any:
        variables = [keras.Variable(value) for value in values]

        def make() -> Step:
            optimizer = make_optimizer()
            optimizer.build(variables)
            return wrap(lambda: optimizer.apply(grads))

        return make

    contest = RULES[case.rule]
    if contest.keras is None:
        paths = {OURS: portopt_tf.from_rule(contest.rule)}
    else:
        name, arguments = contest.keras
        paths = {
            OURS: lambda: getattr(portopt_tf, name)(**arguments),
            "keras": lambda: getattr(keras.optimizers, name)(**arguments),
        }
    numbers = keras.ops.zeros(1 << 20)

    def wake() -> None:
        """Have the backend's threads do something, as a backward pass does."""
        keras.ops.add(numbers, 1.0)

    return [
        Contender(mode, name, path(make, wrap), wake)
        for mode, wrap in modes(case).items()
        for name, make in paths.items()
    ]


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    answer(spec["framework"], contenders, spec)
