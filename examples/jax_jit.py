"""JAX: a whole training step under `jax.jit`, whose parameters and state are donated.

    python examples/jax_jit.py

The step gives back new arrays in the memory of those that it was given: there is one copy of the
weights and of each slot, as with updates in place. A schedule changes the learning rate, and
nothing is compiled again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import portopt.jax
from portopt import rules

optimizer = portopt.jax.Optimizer(rules.AdamW(), lr=optax.cosine_decay_schedule(3e-3, 440))


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy of a network of one hidden layer."""
    hidden = jax.nn.relu(x @ params["hidden"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], y).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any, jax.Array]:
    """The parameters and the state after a step, and the loss before it."""
    loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
    return *optimizer.step(params, state, gradients), loss


def main() -> None:
    """Train, and look at the arrays that were given away."""
    x, y = (jnp.asarray(array) for array in load_digits(return_X_y=True))
    x = x.astype("float32") / 16
    rng = np.random.default_rng(0)
    params = {
        "hidden": jnp.asarray(rng.normal(0, 0.1, (64, 64)), "float32"),
        "out": jnp.asarray(rng.normal(0, 0.1, (64, 10)), "float32"),
    }
    state = optimizer.init(params)
    first = params["hidden"]
    for epoch in range(1, 11):
        losses = []
        for rows in rng.permutation(1408).reshape(-1, 32):
            params, state, loss = step(params, state, x[rows], y[rows])
            losses.append(float(loss))
        print(f"epoch {epoch:2}  loss {np.mean(losses):.3f}")
    print(f"the first weights were given away: {first.is_deleted()}")
    print(f"compiled {step._cache_size()} time")


if __name__ == "__main__":
    main()
