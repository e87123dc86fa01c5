"""Two workers that hold half of the momentum each, and train as one that holds all of it.

    python examples/sharded_momentum.py

Runs in NumPy, and in PyTorch and TensorFlow where they are installed. The workers are threads of
this process; `portopt.sharding.simulate` carries what they say to one another.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from portopt import Optimizer
from portopt.rules import Momentum
from portopt.sharding import Buffers, NumPyBuffers, Sharded, VariableBuffers, simulate

RULE = Momentum(lr=0.1, momentum=0.9)
SHAPES = {"embedding": (1000, 64), "hidden": (64, 64), "bias": (64,)}
STEPS = 20


@dataclass
class Library:
    """How a library makes its parameters and gradients of NumPy arrays."""

    name: str
    buffers: Buffers
    param: Callable[[Any], Any]
    grad: Callable[[Any], Any]


def libraries() -> list[Library]:
    """Those that are installed."""
    found = [Library("NumPy", NumPyBuffers(), np.copy, np.copy)]
    if importlib.util.find_spec("torch"):
        import torch

        found.append(Library("PyTorch", Buffers(), torch.tensor, torch.tensor))
    if importlib.util.find_spec("keras") and importlib.util.find_spec("tensorflow"):
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        os.environ["KERAS_BACKEND"] = "tensorflow"
        import keras
        import tensorflow as tf

        found.append(
            Library("TensorFlow", VariableBuffers(keras.ops), tf.Variable, tf.convert_to_tensor)
        )
    return found


def draw() -> Iterator[dict[str, Any]]:
    """The parameters to start with, then for each step the gradients of two batches."""
    rng = np.random.default_rng(0)
    while True:
        yield {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def unsharded() -> tuple[dict[str, Any], Optimizer]:
    """The parameters after a training that sees both batches at once, and its optimizer."""
    drawn = draw()
    params = next(drawn)
    optimizer = Optimizer(RULE, params)
    for _ in range(STEPS):
        first, second = next(drawn), next(drawn)
        optimizer.step({name: (first[name] + second[name]) * np.float32(0.5) for name in SHAPES})
    return params, optimizer


def sharded(library: Library) -> list[tuple[dict[str, Any], Sharded]]:
    """The same of each of two workers, which see a batch each."""

    def work(collectives: Any) -> tuple[dict[str, Any], Sharded]:
        drawn = draw()  # both draw the same
        params = {name: library.param(value) for name, value in next(drawn).items()}
        optimizer = Sharded(RULE, params, collectives, stage=2, buffers=library.buffers)
        for _ in range(STEPS):
            batch = (next(drawn), next(drawn))[collectives.rank]
            optimizer.step({name: library.grad(value) for name, value in batch.items()})
        return {name: np.asarray(param) for name, param in params.items()}, optimizer

    return simulate(2, work, library.buffers)


def momentum_bytes(optimizer: Optimizer | Sharded) -> int:
    """What it keeps."""
    return sum(np.asarray(state["momentum_buffer"]).nbytes for state in optimizer.state.values())


def main() -> None:
    """Train with one worker and with two, and compare."""
    expected, whole = unsharded()
    runs = {library.name: sharded(library) for library in libraries()}
    print(f"{', '.join(SHAPES)} are tensors 0, 1, 2:\n\n{runs['NumPy'][0][1].plan}\n")
    print("bytes of momentum  unsharded  worker 0  worker 1  parameters")
    for name, workers in runs.items():
        same = all(
            params[key].tobytes() == expected[key].tobytes()
            for params, _ in workers
            for key in SHAPES
        )
        first, second = (momentum_bytes(optimizer) for _, optimizer in workers)
        said = "bit-identical" if same else "DIFFERENT"
        print(f"{name:17}  {momentum_bytes(whole):9}  {first:8}  {second:8}  {said}")


if __name__ == "__main__":
    main()
