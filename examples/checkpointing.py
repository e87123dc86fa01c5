"""What checkpointing saves and costs, for chains of 100 to 10,000 operations.

    python examples/checkpointing.py

Prints a table and draws checkpointing.png: the values that are held at once, the memory at its
peak, and how often a function is called for a gradient.
"""

from __future__ import annotations

import math
import tracemalloc
import weakref
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from portopt import tape

LENGTHS = [100, 300, 1000, 10_000]
SIZE = 256  # elements of a value, 2 KiB


@dataclass
class Cost:
    """Of one gradient: values held at once, function calls, and MiB at the peak."""

    held: int = 0
    calls: int = 0
    mib: float = 0.0


def plain(functions, x):
    """Apply the functions in turn, recorded one by one."""
    for function in functions:
        x = function(x)
    return x


def measure(chain, n: int) -> tuple[Cost, np.ndarray]:
    """The cost of the gradient of a chain of n operations, and the gradient."""
    cost, alive = Cost(), 0

    def released() -> None:
        nonlocal alive
        alive -= 1

    def step(h):
        nonlocal alive
        h = tape.sin(h)
        weakref.finalize(h.value.base, released)  # h.value is a read-only view of it
        alive += 1
        cost.calls += 1
        cost.held = max(cost.held, alive)
        return h

    x = tape.Variable(np.linspace(0.1, 1.5, SIZE))
    tracemalloc.start()
    with tape.Autograd() as autograd:
        loss = tape.sum(chain([step] * n, x))
    gradient = autograd.gradients(loss, x)
    cost.mib = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return cost, gradient


def main() -> None:
    """Measure, print and draw."""
    costs = {"plain tape": [], "checkpoint": []}
    print(f"{'n':>6} {'chain':12} {'held':>6} {'MiB':>6} {'calls':>6}")
    for n in LENGTHS:
        gradients = []
        for (name, found), chain in zip(costs.items(), (plain, tape.checkpoint), strict=True):
            cost, gradient = measure(chain, n)
            print(f"{n:6} {name:12} {cost.held:6} {cost.mib:6.2f} {cost.calls:6}")
            found.append(cost)
            gradients.append(gradient)
        print(f"{'':6} the same bits: {gradients[0].tobytes() == gradients[1].tobytes()}")

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = {"held": "values held at once", "mib": "memory at the peak [MiB]"}
    panels |= {"calls": "function calls for a gradient"}
    for axis, (field, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for marker, (name, found) in zip("os", costs.items(), strict=True):
            axis.plot(LENGTHS, [getattr(cost, field) for cost in found], f"{marker}-", label=name)
        if field == "held":
            roots = [3 * math.sqrt(n) for n in LENGTHS]
            axis.plot(LENGTHS, roots, "--", color="grey", label="3 sqrt(n)")
        axis.set(title=title, xlabel="operations in the chain, n", xscale="log", yscale="log")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig("checkpointing.png")


if __name__ == "__main__":
    main()
