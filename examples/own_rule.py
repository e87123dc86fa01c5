"""A rule of one's own in ten lines, on every backend that is installed.

    python examples/own_rule.py

AdaBelief (Zhuang et al. 2020, https://arxiv.org/abs/2010.07468, algorithm 2) divides by how far the
gradient strays from its average. Takes the same steps everywhere and says how far apart they end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from portopt import Optimizer, Rule, trace
from portopt.rules import Decay, NonNegative


@dataclass(frozen=True, kw_only=True)
class AdaBelief(Rule):  # noqa: D101
    lr: NonNegative = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: NonNegative = 1e-8
    slots = ("exp_avg", "exp_avg_var")

    def update(self, xp, t, param, grad, slot):  # noqa: D102
        m = slot.exp_avg + (1 - self.beta1) * (grad - slot.exp_avg)
        s = slot.exp_avg_var + (1 - self.beta2) * ((grad - m) * (grad - m) - slot.exp_avg_var)
        denom = (1 - self.beta2**t) ** -0.5 * xp.sqrt(s) + self.eps
        return param - self.lr / (1 - self.beta1**t) * m / denom, {"exp_avg": m, "exp_avg_var": s}


RULE = AdaBelief(lr=2.0**-6)  # which float32 holds, as Keras keeps it in that
START = np.linspace(-1, 1, 1000, dtype=np.float32)
GRADIENTS = np.random.default_rng(0).standard_normal((100, 1000)).astype(np.float32)


def in_numpy() -> np.ndarray:
    """Steps of `portopt.Optimizer`."""
    param = START.copy()
    optimizer = Optimizer(RULE, [param])
    for gradient in GRADIENTS:
        optimizer.step([gradient])
    return param


def in_torch() -> np.ndarray:
    """Steps of a ``torch.optim.Optimizer``."""
    import torch

    import portopt_torch

    param = torch.nn.Parameter(torch.tensor(START))
    optimizer = portopt_torch.from_rule(RULE)([param])
    for gradient in GRADIENTS:
        param.grad = torch.from_numpy(gradient)
        optimizer.step()
    return param.detach().numpy()


def in_keras() -> np.ndarray:
    """Steps of a ``keras.optimizers.Optimizer``."""
    import keras

    import portopt_tf

    param = keras.Variable(START)
    optimizer = portopt_tf.from_rule(RULE)()
    for gradient in GRADIENTS:
        optimizer.apply([keras.ops.convert_to_tensor(gradient)], [param])
    return keras.ops.convert_to_numpy(param)


def in_jax() -> np.ndarray:
    """Pure steps, compiled."""
    import jax

    import portopt.jax

    optimizer = portopt.jax.Optimizer(RULE)
    step = jax.jit(optimizer.step)
    param = jax.numpy.asarray(START)
    state = optimizer.init(param)
    for gradient in GRADIENTS:
        param, state = step(param, state, jax.numpy.asarray(gradient))
    return np.asarray(param)


BACKENDS: dict[str, tuple[str, Callable[[], np.ndarray]]] = {
    "PyTorch": ("torch", in_torch),
    "Keras on TensorFlow": ("tensorflow", in_keras),
    "JAX": ("jax", in_jax),
}


def main() -> None:
    """Print the traced rule, and for each backend how far it ends from NumPy."""
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    print(trace(RULE))
    expected = in_numpy()
    for name, (module, run) in BACKENDS.items():
        if find_spec(module) is None:
            print(f"{name}: not installed")
            continue
        difference = np.max(np.abs(run() - expected))
        print(f"{name}: largest difference from NumPy {difference:.1e}")


if __name__ == "__main__":
    main()
