"""A momentum loop written by hand, and the same with ours: the same bits after 500 steps.

python examples/momentum_by_hand.py
"""

from __future__ import annotations

import numpy as np

from portopt import Optimizer
from portopt.rules import Momentum

LR, MOMENTUM, STEPS = 0.05, 0.9, 500


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Least squares: 256 rows of 20 features, and targets with a little noise, in float32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 20), np.float32)
    noise = rng.standard_normal(256, np.float32)
    return x, x @ rng.standard_normal(20, np.float32) + np.float32(0.1) * noise


def gradient(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Of the mean of squared errors over 2."""
    return x.T @ (x @ w - y) / len(x)


def by_hand(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Polyak's heavy ball, as `torch.optim.SGD` has it."""
    w = np.zeros(20, np.float32)
    b = np.zeros(20, np.float32)
    for _ in range(STEPS):
        b = MOMENTUM * b + gradient(x, y, w)
        w = w - LR * b
    return w


def by_rule(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The rule, which updates ``w`` in place by one compiled kernel."""
    w = np.zeros(20, np.float32)
    optimizer = Optimizer(Momentum(lr=LR, momentum=MOMENTUM), [w])
    for _ in range(STEPS):
        optimizer.step([gradient(x, y, w)])
    return w


def main() -> None:
    """Run both and compare."""
    x, y = problem()
    for function in (by_hand, by_rule):
        w = function(x, y)
        print(f"{function.__name__:8} w[:4] = {w[:4]}  loss = {np.mean((x @ w - y) ** 2) / 2:.6f}")
    print(f"bit-equal: {by_hand(x, y).tobytes() == by_rule(x, y).tobytes()}")


if __name__ == "__main__":
    main()
