"""Gradients accumulated over the parts of a batch, then one step: equal to the full batch.

python examples/micro_batches.py
"""

from __future__ import annotations

import numpy as np

from portopt import Optimizer, rules, tape

STEPS, BATCH = 50, 128


def train(parts: int) -> dict[str, np.ndarray]:
    """Weights after training on batches that are gone through in so many parts."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, 10))
    y = rng.integers(0, 3, BATCH)
    model = tape.MLP([10, 16, 3], tape.Tanh, rng=rng, dtype=np.float64)
    params = model.parameters()
    optimizer = Optimizer(rules.AdamW(lr=0.01), {name: p.value for name, p in params.items()})
    for _ in range(STEPS):
        buffer = tape.GradientBuffer()
        for rows in np.split(rng.permutation(BATCH), parts):
            with tape.Autograd() as autograd:
                # The mean over the batch is the mean of the parts' means.
                loss = tape.softmax_cross_entropy(model(x[rows]), y[rows]) / parts
            autograd.backward(loss)
            buffer.add(autograd.buffer)
        optimizer.step({name: buffer.get(p) for name, p in params.items()})
    return {name: p.value for name, p in params.items()}


def main() -> None:
    """Train with the whole batch and with parts of it, and compare."""
    whole = train(parts=1)
    for parts in (2, 4, 8):
        found = train(parts)
        difference = max(np.max(np.abs(found[name] - whole[name])) for name in whole)
        size = BATCH // parts
        print(f"{parts} parts of {size:2}: largest difference of a weight {difference:.1e}")


if __name__ == "__main__":
    main()
