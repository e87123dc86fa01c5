"""The part of ``portopt demo`` that runs in Keras: ``python -m portopt_tf.demo SPEC``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import keras

import portopt_tf
from portopt.demo import Progress, Run, Task, answer
from portopt.parity import Case


class LastBatch(keras.metrics.Metric):
    """The loss of the last batch alone; Keras reports averages over an epoch."""

    def __init__(self) -> None:
        super().__init__(name="last_batch")
        self.loss = self.add_weight(initializer="zeros", name="loss")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        losses = keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)
        self.loss.assign(keras.ops.mean(losses))

    def result(self) -> Any:
        return self.loss.value


def train(case: Case, task: Task, progress: Progress) -> Iterator[Run]:
    """Train with the rule, the drop-in class, and the native optimizer."""
    name, arguments = case.keras
    rule_name = type(case.rule).__name__
    for label, role, optimizer in (
        (f"from_rule({rule_name})", "rule", portopt_tf.from_rule(case.rule)()),
        (f"portopt_tf.{name}", "drop-in", getattr(portopt_tf, name)(**arguments)),
        (f"keras.optimizers.{name}", "native", getattr(keras.optimizers, name)(**arguments)),
    ):
        run = Run("Keras", label, role)
        hidden = keras.layers.Dense(128, activation="tanh")
        model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10)])
        model.set_weights([value.T for value in task.weights.values()])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=[LastBatch()])
        note = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda _, logs, run=run: run.losses.append(float(logs["last_batch"]))
        )
        began = time.perf_counter()
        for epoch in range(1, task.epochs + 1):
            x, y = task.epoch(epoch)
            model.fit(x, y, batch_size=task.batch_size, shuffle=False, callbacks=[note], verbose=0)
            progress(f"{run.framework}, {run.optimizer}", epoch, run.losses[-1])
        run.seconds = time.perf_counter() - began
        right = model.predict(task.x_test, verbose=0).argmax(axis=1) == task.y_test
        run.accuracy = float(right.mean())
        yield run


if __name__ == "__main__":
    answer(json.loads(sys.argv[1]), train)
