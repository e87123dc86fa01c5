"""NumPy alone: the digits learnt with gradients of the tape and steps of `portopt.Optimizer`.

python examples/numpy_tape.py
"""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from portopt import Optimizer, rules, tape


def main() -> None:
    """Train a network of one hidden layer, and print its loss and accuracy by epoch."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    model = tape.MLP([64, 64, 10], rng=rng)
    params = model.parameters()
    optimizer = Optimizer(rules.Adam(lr=3e-3), {name: p.value for name, p in params.items()})
    for epoch in range(1, 9):
        losses = []
        for rows in rng.permutation(1408).reshape(-1, 32):
            with tape.Autograd() as autograd:
                loss = tape.softmax_cross_entropy(model(x[rows]), y[rows])
            optimizer.step(autograd.gradients(loss, params))
            losses.append(loss.value)
        accuracy = np.mean(model(x[1408:]).value.argmax(axis=1) == y[1408:])
        print(f"epoch {epoch}  loss {np.mean(losses):.3f}  test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
