"""Layers and losses, composed from the primitives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from portopt.tape import ops
from portopt.tape.decorator import Result, primitive
from portopt.tape.variable import Array, Operand, Variable, check_floating


class Layer(ABC):
    """A callable from a Variable or array to a Variable, with named parameters."""

    @abstractmethod
    def __call__(self, x: Operand) -> Variable:
        """Compute the layer's value on `x`."""

    def parameters(self) -> dict[str, Variable]:
        """Return the parameters by name, in a stable order; their `value` is updated in place."""
        return {}


class Identity(Layer):
    """`x`, unchanged."""

    def __call__(self, x: Operand) -> Variable:
        """Return `x`."""
        return x if isinstance(x, Variable) else Variable(x)


class Sigmoid(Layer):
    """`1 / (1 + exp(-x))`, elementwise."""

    def __call__(self, x: Operand) -> Variable:
        """Return `ops.sigmoid(x)`."""
        return ops.sigmoid(x)


class Tanh(Layer):
    """`tanh(x)`, elementwise."""

    def __call__(self, x: Operand) -> Variable:
        """Return `ops.tanh(x)`."""
        return ops.tanh(x)


class ReLU(Layer):
    """`maximum(x, 0)`, elementwise."""

    def __call__(self, x: Operand) -> Variable:
        """Return `ops.relu(x)`."""
        return ops.relu(x)


class Linear(Layer):
    """An affine map.

        value = x @ weight.T + bias

    Shapes: x (..., in_features) -> (..., out_features). Parameters: `weight` (out_features,
    in_features) and `bias` (out_features,), drawn from U(-r, r) with r = 1 / sqrt(in_features).

    Args:
        in_features: at least 1.
        out_features: at least 1.
        bias: whether there is a `bias`.
        rng: source of the initial values; default: a fresh, unseeded generator.
        dtype: floating dtype of the parameters.

    Raises:
        TypeError: a size is not an integer, or `dtype` is not floating.
        ValueError: a size is below 1; in a call, `x` has not `in_features` columns.

    Source: the shapes and the initial distribution of `torch.nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rng: np.random.Generator | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        """Draw the initial parameters."""
        _check_size(in_features, "in_features")
        _check_size(out_features, "out_features")
        check_floating(np.dtype(dtype), "dtype")
        rng = np.random.default_rng() if rng is None else rng
        radius = in_features**-0.5

        def draw(*shape: int) -> Variable:
            return Variable(rng.uniform(-radius, radius, shape).astype(dtype))

        self.weight = draw(out_features, in_features)
        self.bias = draw(out_features) if bias else None

    def __call__(self, x: Operand) -> Variable:
        """Return `x @ weight.T + bias`."""
        shape = _shape(x)
        if shape[-1:] != self.weight.shape[1:]:
            raise ValueError(f"x must have shape (..., {self.weight.shape[1]}), got {shape}")
        product = ops.matmul(x, self.weight.T)
        return product if self.bias is None else product + self.bias

    def parameters(self) -> dict[str, Variable]:
        """Return `{"weight": ..., "bias": ...}`, or the weight alone."""
        return {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})


class MLP(Layer):
    """A multilayer perceptron: Linear layers with an activation between each two.

        h = x; for each layer but the last: h = activation(linear(h)); value = linear(h)

    Shapes: x (..., sizes[0]) -> (..., sizes[-1]). Parameters: those of the i-th Linear layer as
    `"i.weight"` and `"i.bias"`.

    Args:
        sizes: at least two, each at least 1: features of the input, hidden layers and output.
        activation: a Layer class without parameters.
        rng: source of the initial values; default: a fresh, unseeded generator.
        dtype: floating dtype of the parameters.

    Raises:
        TypeError: a size is not an integer, `activation` is no Layer class, `dtype` not floating.
        ValueError: fewer than two sizes, or a size below 1.

    >>> model = MLP([4, 3, 2], rng=np.random.default_rng(0))
    >>> {name: p.shape for name, p in model.parameters().items()}
    {'0.weight': (3, 4), '0.bias': (3,), '1.weight': (2, 3), '1.bias': (2,)}
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: type[Layer] = ReLU,
        *,
        rng: np.random.Generator | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        """Draw the initial parameters, layer by layer."""
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least two sizes, got {list(sizes)}")
        for index, size in enumerate(sizes):
            _check_size(size, f"sizes[{index}]")
        if not (isinstance(activation, type) and issubclass(activation, Layer)):
            raise TypeError(f"activation must be a Layer class such as ReLU, got {activation!r}")
        rng = np.random.default_rng() if rng is None else rng
        self.activation = activation()
        self.linears = [
            Linear(fan_in, fan_out, rng=rng, dtype=dtype) for fan_in, fan_out in pairwise(sizes)
        ]

    def __call__(self, x: Operand) -> Variable:
        """Apply the layers in turn."""
        first, *others = self.linears
        h = first(x)
        for linear in others:
            h = linear(self.activation(h))
        return h

    def parameters(self) -> dict[str, Variable]:
        """Return `{"0.weight": ..., "0.bias": ..., "1.weight": ..., ...}`."""
        return {
            f"{index}.{name}": parameter
            for index, linear in enumerate(self.linears)
            for name, parameter in linear.parameters().items()
        }


def mean_squared_error(prediction: Operand, target: Operand) -> Variable:
    """Return the mean of the squared differences, of shape ().

        value = mean((prediction - target)**2)
        grad_prediction = g * 2 * (prediction - target) / prediction.size
        grad_target = -grad_prediction

    Raises:
        ValueError: `prediction` and `target` differ in shape (broadcasting here is a mistake
            more often than a wish), or are empty.
    """
    if _shape(prediction) != _shape(target):
        raise ValueError(
            f"target must have the shape of prediction {_shape(prediction)}, got {_shape(target)}"
        )
    if 0 in _shape(prediction):
        raise ValueError(f"prediction must not be empty, got shape {_shape(prediction)}")
    difference = ops.sub(prediction, target)
    return ops.mean(difference * difference)


def softmax_cross_entropy(logits: Operand, labels: ArrayLike) -> Variable:
    """Return the mean over the batch of -log(softmax(logits)[label]), of shape ().

        value = mean(log(sum(exp(logits))) - logits[i, labels[i]])
        grad_logits = g * (softmax(logits) - one_hot(labels)) / batch

    Args:
        logits: (batch, classes), floating; the largest is subtracted first, so none overflows.
        labels: (batch,), integers in [0, classes).

    Raises:
        TypeError: `labels` are not integers.
        ValueError: `logits` has not two axes or is empty, `labels` has not shape (batch,), or a
            label is out of range.
    """
    shape = _shape(logits)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"logits must have shape (batch, classes), not empty, got {shape}")
    chosen = np.array(labels)  # a copy: the gradient is that of these labels
    if chosen.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got dtype {chosen.dtype}")
    if chosen.shape != shape[:1]:
        raise ValueError(f"labels must have shape {shape[:1]}, got {chosen.shape}")
    wrong = chosen[(chosen < 0) | (chosen >= shape[1])]
    if wrong.size:
        raise ValueError(f"labels must be in [0, {shape[1]}), got {wrong[0]}")
    return _softmax_cross_entropy(logits, labels=chosen)


@primitive
def _softmax_cross_entropy(logits: Array, /, *, labels: Array) -> Result:
    picked = np.arange(len(labels)), labels
    shifted = logits - logits.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(axis=1, keepdims=True)

    def grad_logits(g: Array) -> Array:
        difference: Array = e / total
        difference[picked] -= 1
        return difference * ops.shared(g, len(labels))

    return np.mean(np.log(total[:, 0]) - shifted[picked]), grad_logits


def _shape(operand: Operand) -> tuple[int, ...]:
    return operand.shape if isinstance(operand, Variable) else np.shape(operand)


def _check_size(size: int, argument: str) -> None:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
        raise TypeError(f"{argument} must be an integer, got {size!r}")
    if size < 1:
        raise ValueError(f"{argument} must be at least 1, got {size}")
