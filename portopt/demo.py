"""The demo: one rule trains one small network in every framework, beside the native optimizers.

A multilayer perceptron (64-128-10, tanh) learns scikit-learn's handwritten digits from the same
weights and the same batches in NumPy, PyTorch and Keras. The loss of every step is kept. (Tanh, as
the kinks of ReLU now and then blow the last bit of a weight up to 1e-4 of a loss.)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from portopt import extras, tape, worker
from portopt.optimizer import Optimizer
from portopt.parity import Case
from portopt.rules import SGD, Adam, AdamW, Momentum, RMSprop

NDArray = npt.NDArray[Any]

NATIVE_LIMIT = 1e-5
"""Largest difference of a loss between a drop-in and its native twin, at any step."""

FRAMEWORK_LIMIT = 1e-3
"""Largest difference of a loss between frameworks with the same rule, in the first epoch."""

CASES = {
    "sgd": Case(SGD(lr=0.1), torch=("SGD", {"lr": 0.1}), keras=("SGD", {"learning_rate": 0.1})),
    "momentum": Case(
        Momentum(lr=0.02),
        torch=("SGD", {"lr": 0.02, "momentum": 0.9}),
        keras=("SGD", {"learning_rate": 0.02, "momentum": 0.9}),
    ),
    "rmsprop": Case(RMSprop(lr=1e-3), torch=("RMSprop", {"lr": 1e-3}), keras=("RMSprop", {})),
    "adam": Case(Adam(), torch=("Adam", {}), keras=("Adam", {})),
    "adamw": Case(AdamW(), torch=("AdamW", {}), keras=("AdamW", {})),
}
"""For each choice of ``--rule`` the rule, and the optimizers that go by that name."""


@dataclass(frozen=True)
class Task:
    """The digits: images as rows of 64 floats in [0, 1], labels from 0 to 9.

    Attributes:
        x_train: 1408 images: 44 full batches.
        y_train: Their labels.
        x_test: The other 389 images.
        y_test: Their labels.
        weights: The initial weights by name, as `portopt.tape.MLP` has them.
        epochs: How often the training images are gone through.
    """

    x_train: NDArray
    y_train: NDArray
    x_test: NDArray
    y_test: NDArray
    weights: dict[str, NDArray]
    epochs: int
    batch_size: int = 32

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches of an epoch."""
        return len(self.x_train) // self.batch_size

    def epoch(self, number: int) -> tuple[NDArray, NDArray]:
        """The training images and labels in the order of an epoch, from 1."""
        order = np.random.default_rng(number).permutation(len(self.x_train))
        return self.x_train[order], self.y_train[order]

    def batches(self, number: int) -> Iterator[tuple[NDArray, NDArray]]:
        """The batches of an epoch, from 1."""
        x, y = self.epoch(number)
        for start in range(0, len(x), self.batch_size):
            yield x[start : start + self.batch_size], y[start : start + self.batch_size]


def digits(epochs: int) -> Task:
    """The task, the same in every process.

    Raises:
        ModuleNotFoundError: scikit-learn is missing; says which extra to install.
    """
    x, y = extras.load("sklearn.datasets", "plot").load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int64)
    weights = {name: p.value for name, p in tape.MLP([64, 128, 10], rng=rng).parameters().items()}
    return Task(x[:1408], y[:1408], x[1408:], y[1408:], weights, epochs)


@dataclass
class Run:
    """One training run.

    Attributes:
        framework: "NumPy", "PyTorch" or "Keras".
        optimizer: What trained it.
        role: "rule" (the rule as it stands), "drop-in" or "native".
        losses: The loss at every step, before the update.
        accuracy: On the test images, in the end.
        seconds: Wall time of the training.
    """

    framework: str
    optimizer: str
    role: str
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0


Progress = Callable[[str, int, float], None]
"""Told the run, the epoch and its last loss."""


def train_numpy(case: Case, task: Task, progress: Progress) -> list[Run]:
    """Train through the tape with `portopt.Optimizer`."""
    run = Run("NumPy", f"portopt {type(case.rule).__name__}", "rule")
    model = tape.MLP([64, 128, 10], tape.Tanh)
    params = model.parameters()
    for name, param in params.items():
        param.value[...] = task.weights[name]
    optimizer = Optimizer(case.rule, {name: param.value for name, param in params.items()})
    began = time.perf_counter()
    for epoch in range(1, task.epochs + 1):
        for x, y in task.batches(epoch):
            with tape.Autograd() as autograd:
                loss = tape.softmax_cross_entropy(model(x), y)
            optimizer.step(autograd.gradients(loss, params))
            run.losses.append(float(loss.value))
        progress(f"{run.framework}, {run.optimizer}", epoch, run.losses[-1])
    run.seconds = time.perf_counter() - began
    run.accuracy = float(np.mean(model(task.x_test).value.argmax(axis=1) == task.y_test))
    return [run]


def train_child(framework: str, rule: str, epochs: int, progress: Progress) -> list[Run]:
    """Train in another framework, in a child process: `answer` there.

    Raises:
        portopt.worker.WorkerError: the child failed.
    """
    runs = []
    spec = {"rule": rule, "epochs": epochs}
    for event in worker.events(f"{worker.FRAMEWORKS[framework]}.demo", spec):
        if "run" in event:
            runs.append(Run(**event["run"]))
        else:
            progress(event["name"], event["epoch"], event["loss"])
    return runs


def answer(spec: dict[str, Any], train: Callable[[Case, Task, Progress], Iterator[Run]]) -> None:
    """The child's part: train, and send every epoch and every run."""

    def progress(name: str, epoch: int, loss: float) -> None:
        worker.emit(name=name, epoch=epoch, loss=loss)

    for run in train(CASES[spec["rule"]], digits(spec["epochs"]), progress):
        worker.emit(run=asdict(run))


@dataclass(frozen=True)
class Difference:
    """How far the losses of two runs are apart.

    Attributes:
        between: The two runs: framework and optimizer.
        steps: The number of steps, from the first, that are compared.
        largest: The largest difference of a loss there.
        limit: How large it may be.
    """

    between: tuple[tuple[str, str], tuple[str, str]]
    steps: int
    largest: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether it is within the limit; not so if it is no number."""
        return self.largest <= self.limit


def differences(runs: list[Run], steps_per_epoch: int) -> list[Difference]:
    """Every drop-in against its native, and the rule in every framework against every other."""
    natives = {run.framework: run for run in runs if run.role == "native"}
    dropped_in = [run for run in runs if run.role == "drop-in"]
    same = itertools.combinations([run for run in runs if run.role == "rule"], 2)
    pairs = [(run, natives[run.framework], len(run.losses), NATIVE_LIMIT) for run in dropped_in]
    pairs += [(b, a, steps_per_epoch, FRAMEWORK_LIMIT) for a, b in same]
    return [
        Difference(
            between=((a.framework, a.optimizer), (b.framework, b.optimizer)),
            steps=steps,
            largest=float(np.max(np.abs(np.subtract(a.losses[:steps], b.losses[:steps])))),
            limit=limit,
        )
        for a, b, steps, limit in pairs
    ]
