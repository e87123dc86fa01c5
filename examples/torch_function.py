"""An autograd Function of one's own: a network whose activations are -1 or 1.

    python examples/torch_function.py

The derivative of the sign is 0 wherever it exists, so that nothing below it learns. The
straight-through estimator passes the gradient on where |x| <= 1, as if the sign were not there
(Bengio et al. 2013, https://arxiv.org/abs/1308.3432; Hubara et al. 2016, equation 4,
https://arxiv.org/abs/1602.02830). Trains with both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_digits import accuracy, batches, digits

import portopt_torch


class StraightThrough(torch.autograd.Function):
    """The sign, with the derivative of the identity clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """The sign of x."""
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient, where |x| <= 1."""
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class Binary(nn.Module):
    """A linear layer, activations of -1 or 1, and another linear layer."""

    def __init__(self, sign: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sign = sign
        self.hidden, self.out = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits, from images of shape (1, 8, 8)."""
        return self.out(self.sign(self.hidden(x.flatten(1))))


def main() -> None:
    """Train with the plain sign and with ours."""
    x, y = digits()
    for name, sign in {"torch.sign": torch.sign, "StraightThrough": StraightThrough.apply}.items():
        model = Binary(sign)
        before = model.hidden.weight.detach().clone()
        optimizer = portopt_torch.Adam(model.parameters(), lr=3e-3)
        for images, labels in batches(x[:1408], y[:1408], epochs=5):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        moved = (model.hidden.weight - before).abs().max().item()
        found = accuracy(model, x[1408:], y[1408:])
        print(f"{name:15}  hidden weights moved by {moved:.3f}  test accuracy {found:.3f}")


if __name__ == "__main__":
    main()
