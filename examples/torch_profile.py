"""Where the time of a training step goes: our optimizer in PyTorch's profiler, by its name.

    python examples/torch_profile.py

Like every optimizer of PyTorch it shows as "Optimizer.step#" and its class.
"""

from __future__ import annotations

from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile, record_function
from torch_digits import batches, digits, network

import portopt_torch


def main() -> None:
    """Profile an epoch and print the table."""
    model = network()
    optimizer = portopt_torch.AdamW(model.parameters())
    steps = batches(*digits(), epochs=1)

    def step() -> None:
        images, labels = next(steps)
        optimizer.zero_grad()
        with record_function("forward"):
            loss = cross_entropy(model(images), labels)
        with record_function("backward"):
            loss.backward()
        optimizer.step()

    step()  # the first one compiles the kernel
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(40):
            step()
    averages = profiler.key_averages()
    print(averages.table(sort_by="cpu_time_total", top_level_events_only=True))


if __name__ == "__main__":
    main()
