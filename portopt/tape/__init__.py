"""Reverse-mode automatic differentiation on NumPy, small enough to read.

Forward calls inside `with Autograd()` write a linear list of operations; gradients come from
walking it backwards. Parameters are Variables whose arrays an optimizer updates in place.

>>> import numpy as np
>>> from portopt import tape
>>> model = tape.MLP([2, 8, 2], rng=np.random.default_rng(0))
>>> params = model.parameters()
>>> x, y = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32), [0, 1, 1, 0]
>>> for step in range(100):
...     with tape.Autograd() as autograd:
...         loss = tape.softmax_cross_entropy(model(x), y)
...     for name, gradient in autograd.gradients(loss, params).items():
...         params[name].value -= 0.5 * gradient
>>> model(x).value.argmax(axis=1).tolist()
[0, 1, 1, 0]

Where to look: `engine` has the tape, `decorator` the one that also makes a user's own
operations, `ops` the built-in ones, `nn` layers and losses, `evaluation` what a
computation did as a table, `checkpoints` long chains in little memory.
"""

from portopt.tape.checkpoints import checkpoint
from portopt.tape.decorator import primitive
from portopt.tape.engine import Autograd, GradientBuffer, Operation, no_grad
from portopt.tape.evaluation import Line, Trace, trace
from portopt.tape.nn import (
    MLP,
    Identity,
    Layer,
    Linear,
    ReLU,
    Sigmoid,
    Tanh,
    mean_squared_error,
    softmax_cross_entropy,
)
from portopt.tape.ops import (
    add,
    div,
    exp,
    log,
    matmul,
    max,
    mean,
    mul,
    neg,
    outer,
    pow,
    relu,
    reshape,
    sigmoid,
    sin,
    softmax,
    sub,
    sum,
    tanh,
    transpose,
    unbroadcast,
)
from portopt.tape.variable import Variable

__all__ = [
    "MLP",
    "Autograd",
    "GradientBuffer",
    "Identity",
    "Layer",
    "Line",
    "Linear",
    "Operation",
    "ReLU",
    "Sigmoid",
    "Tanh",
    "Trace",
    "Variable",
    "add",
    "checkpoint",
    "div",
    "exp",
    "log",
    "matmul",
    "max",
    "mean",
    "mean_squared_error",
    "mul",
    "neg",
    "no_grad",
    "outer",
    "pow",
    "primitive",
    "relu",
    "reshape",
    "sigmoid",
    "sin",
    "softmax",
    "softmax_cross_entropy",
    "sub",
    "sum",
    "tanh",
    "trace",
    "transpose",
    "unbroadcast",
]
