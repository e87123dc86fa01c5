"""Frozen layers in PyTorch: what was learnt on the digits 0 to 4 reads 5 to 9.

    python examples/torch_frozen.py

Trains a convolutional network, freezes its convolutions, and trains a new last layer on the other
digits. The optimizer is given all parameters: those without a gradient keep their bits, and no
state is made for them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_digits import accuracy, batches, digits, network

import portopt_torch


def train(model: nn.Module, x: Tensor, y: Tensor) -> portopt_torch.Optimizer:
    """Train what is not frozen."""
    optimizer = portopt_torch.AdamW(model.parameters(), lr=5e-3)
    for images, labels in batches(x, y, epochs=4):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return optimizer


def main() -> None:
    """Train, freeze, train the rest, and say what has changed."""
    x, y = digits()
    early = y < 5
    model = network()
    train(model, x[early], y[early])

    *convolutions, _ = model
    for parameter in nn.ModuleList(convolutions).parameters():
        parameter.requires_grad_(False)
    model[-1] = nn.Linear(64, 10)
    before = [parameter.clone() for parameter in model.parameters()]
    late_x, late_y = x[~early], y[~early]
    optimizer = train(model, late_x[:600], late_y[:600])

    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        said = "trained" if parameter.requires_grad else "frozen"
        same = "same bits" if parameter.equal(old) else "moved"
        state = ", ".join(optimizer.state[parameter]) if parameter in optimizer.state else "none"
        print(f"{name:9} {said:7}  {same:9}  state: {state}")
    print(f"test accuracy on 5 to 9: {accuracy(model, late_x[600:], late_y[600:]):.3f}")


if __name__ == "__main__":
    main()
