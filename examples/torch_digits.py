"""A PyTorch loop: a small convolutional network, its gradients zeroed against accumulated.

    python examples/torch_digits.py

Trains on scikit-learn's digits twice, from the same weights and on the same batches. PyTorch adds
each gradient to the last one, so a loop that forgets `zero_grad` steps along the sum of all of
them. Prints both accuracies and draws torch_digits.png, the two loss curves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import portopt_torch

BATCH = 32
torch.set_num_threads(1)  # the network is so small that threads would only wait


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images, of shape (1, 8, 8) and in [0, 1], and their labels, shuffled."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return images[order], torch.tensor(y)[order]


def network() -> nn.Sequential:
    """Two convolutions and a linear layer, the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def batches(x: Tensor, y: Tensor, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a new order each epoch, the same orders every time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            yield x[rows], y[rows]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images whose label the model finds."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def train(model: nn.Module, x: Tensor, y: Tensor, *, zeroed: bool) -> list[float]:
    """Train the model; its loss at each step."""
    optimizer = portopt_torch.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for images, labels in batches(x, y, epochs=3):
        if zeroed:
            optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train both ways, print and draw."""
    x, y = digits()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name, zeroed in {"zeroed": True, "accumulated": False}.items():
        model = network()
        losses = train(model, x[:1408], y[:1408], zeroed=zeroed)
        print(f"gradients {name:11}  test accuracy {accuracy(model, x[1408:], y[1408:]):.3f}")
        axis.plot(losses, label=f"gradients {name}")
    axis.set(title="The same loop with and without zero_grad", xlabel="step", yscale="log")
    axis.set_ylabel("cross-entropy of the batch")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig("torch_digits.png")


if __name__ == "__main__":
    main()
