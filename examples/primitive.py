"""An operation of one's own: softplus, log(1 + exp(x)), without the overflow of its formula.

python examples/primitive.py
"""

from __future__ import annotations

import numpy as np

from portopt import tape


@tape.primitive
def softplus(x):
    """Smooth maximum of 0 and x, elementwise.

    value = log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|))
    grad_x = g / (1 + exp(-x))
    """
    small = np.exp(-np.abs(x))  # at most 1
    value = np.maximum(x, 0) + np.log1p(small)
    return value, lambda g: g * np.where(x > 0, 1, small) / (1 + small)


def as_written(x):
    """The formula, of the operations that are there."""
    return tape.log(1.0 + tape.exp(x))


def main() -> None:
    """Print values and derivatives of both forms."""
    points = np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0])
    for function in (as_written, softplus):
        x = tape.Variable(points)
        with np.errstate(over="ignore", invalid="ignore"):
            with tape.Autograd() as autograd:
                y = function(x)
            autograd.backward(y, gradient=np.ones(5))
        names = ", ".join(operation.name for operation in autograd.operations)
        print(f"{function.__name__}: recorded {names}")
        for title, row in (("value", y.value), ("derivative", autograd.buffer.get(x))):
            print(f"  {title:10}", *(f"{number:9.4g}" for number in row))


if __name__ == "__main__":
    main()
