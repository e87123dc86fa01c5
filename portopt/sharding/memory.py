"""What a model's training keeps in memory on each of N workers, and sends in each step."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from portopt.rules import Rule
from portopt.sharding.plan import divide
from portopt.trace import trace

STAGES = (0, 1, 2, 3)
"""What is divided: nothing, the optimizer's state, gradients too, parameters too."""
PRECISIONS = {"mixed": 2, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of a parameter and of a gradient. ``mixed``: 16 bits, and in the optimizer's state float32,
with a copy of the parameters."""
PASSES = {0: 2, 1: 2, 2: 2, 3: 3}
"""How often all parameters' number of elements passes a worker in a step: gradients are scattered,
and they or the parameters gathered; in stage 3 parameters are gathered twice."""


class Memory(NamedTuple):
    """Bytes on one worker."""

    params: float
    grads: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


@dataclass(frozen=True)
class ModelState:
    """A model's parameters, their gradients and an optimizer's state, in bytes, undivided.

    Attributes:
        elements: The number of parameters.
        width: Bytes of a parameter, and of a gradient.
        optimizer: Bytes of the optimizer's state.
        tensors: If the tensors are known, for each its number of elements, bytes of state, and
            whether it may be cut.

    Source:
        Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
        Models", figure 1, table 1, section 7. https://arxiv.org/abs/1910.02054

    Example:
        >>> from portopt.rules import Adam
        >>> model = ModelState.of_count(7.5e9, Adam())
        >>> [round(model.memory(stage, 64).total / 1e9, 2) for stage in STAGES]
        [120.0, 31.41, 16.64, 1.88]
    """

    elements: float
    width: int
    optimizer: float
    tensors: tuple[tuple[int, float, bool], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.elements < 2**63:
            raise ValueError(f"elements must be in (0, 2**63), got {self.elements}")

    @classmethod
    def of_count(cls, elements: float, rule: Rule, precision: str = "mixed") -> ModelState:
        """A model of which only the number of parameters is known.

        Args:
            elements: The number of parameters.
            rule: The rule.
            precision: One of `PRECISIONS`.

        Raises:
            ValueError: ``elements`` is not in (0, 2**63), the precision is unknown, or the rule's
                slots depend on shapes.
        """
        if rule.by_shape:
            name = type(rule).__name__
            raise ValueError(f"the state of {name} depends on shapes: give a model, not a count")
        _check_precision(precision)
        slots = len(trace(rule).slots)
        return cls(elements, PRECISIONS[precision], elements * _state_bytes(1, slots, precision))

    @classmethod
    def of_shapes(
        cls, shapes: Sequence[tuple[int, ...]], rule: Rule, precision: str = "mixed"
    ) -> ModelState:
        """A model of tensors of these shapes, and any rule.

        Args:
            shapes: The shapes.
            rule: The rule.
            precision: As for `of_count`.

        Raises:
            ValueError: ``precision`` is unknown, or the rule takes no tensor of such a shape.
        """
        _check_precision(precision)
        tensors = tuple(
            (
                size := math.prod(shape),
                _state_bytes(
                    size, sum(map(math.prod, rule.slot_shapes(shape).values())), precision
                ),
                trace(rule, shape=shape).elementwise,
            )
            for shape in shapes
        )
        elements = sum(size for size, *_ in tensors)
        return cls(elements, PRECISIONS[precision], sum(x for _, x, _ in tensors), tensors)

    def memory(self, stage: int, workers: int) -> Memory:
        """What the fullest worker holds.

        Args:
            stage: One of `STAGES`.
            workers: The number of workers.

        Raises:
            ValueError: there is no such stage, or no worker.
        """
        _check(stage, workers)
        shares = [(self.elements / workers, self.optimizer / workers)]
        if stage and self.tensors:
            shares = self._shares(workers)
        params = self.elements * self.width
        return max(
            (
                Memory(
                    elements * self.width if stage >= 3 else params,
                    elements * self.width if stage >= 2 else params,
                    optimizer if stage >= 1 else self.optimizer,
                )
                for elements, optimizer in shares
            ),
            key=lambda memory: memory.total,
        )

    def _shares(self, workers: int) -> list[tuple[float, float]]:
        """For each worker its elements, and bytes of state, by the plan."""
        sizes, states, cut = zip(*self.tensors, strict=True)
        plan = divide(sizes, workers, whole=[i for i, may in enumerate(cut) if not may])
        return [
            (
                sum(span.length for span in mine),
                sum(states[span.tensor] * span.length / sizes[span.tensor] for span in mine),
            )
            for mine in plan.spans
        ]

    def sent(self, stage: int, workers: int) -> float:
        """Bytes that each worker sends in a step; on a ring no fewer are possible.

        ``PASSES[stage] * elements * (workers - 1) / workers`` elements: in section 7 of the paper
        two times, and in stage 3 three times the number of parameters.
        """
        _check(stage, workers)
        return PASSES[stage] * self.elements * self.width * (workers - 1) / workers

    def largest(self, stage: int, workers: int, memory: float) -> float:
        """How many parameters a model of this kind may have, to fit into so many bytes a worker."""
        even = replace(self, tensors=())
        return self.elements * memory / even.memory(stage, workers).total


def read_shapes(source: str) -> list[tuple[int, ...]]:
    """The shapes of a model's parameters.

    Args:
        source: A file, of which only the headers are read, that ends with ``.npz`` or
            ``.safetensors``; or ``module:callable``, which returns a model of PyTorch or Keras, or
            arrays or shapes, in a dict or a sequence. Frozen parameters of a model do not count.

    Raises:
        ValueError: it is none of these, or what is found there has no shapes.
        OSError: the file cannot be read.
    """
    module, _, name = source.partition(":")
    read = {".npz": _npz, ".safetensors": _safetensors}.get(Path(source).suffix, _made)
    if read is _made and not (module and name):
        raise ValueError(f"model must be a .npz or .safetensors file or module:callable: {source}")
    try:
        return [_shape(array) for array in read(source)]
    except OSError:
        raise
    except (Exception, SystemExit) as error:  # a module may do anything
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"the shapes of {source} cannot be read: {why}") from error


def _npz(source: str) -> list[tuple[int, ...]]:
    shapes = []
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                version = np.lib.format.read_magic(file)
                read = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shapes.append(read(file)[0])
    return shapes


def _safetensors(source: str) -> list[Any]:
    path = Path(source)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is longer than it")
        header = json.loads(file.read(length))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]


def _made(source: str) -> Iterable[Any]:
    module, _, name = source.partition(":")
    model = getattr(import_module(module), name)()
    if hasattr(model, "named_parameters"):  # torch.nn.Module
        return [param for _, param in model.named_parameters() if param.requires_grad]
    if hasattr(model, "trainable_variables"):  # keras.Model, tf.Module
        return list(model.trainable_variables)
    if isinstance(model, Mapping):
        return model.values()
    if isinstance(model, Iterable):
        return model
    raise TypeError(f"a model must be a module, a dict or a sequence, got {type(model).__name__}")


def _shape(array: Any) -> tuple[int, ...]:
    shape = getattr(array, "shape", array)
    if isinstance(shape, Iterable):
        sizes = tuple(shape)
        if all(isinstance(n, int | np.integer) and n >= 0 for n in sizes):
            return tuple(map(int, sizes))
    raise ValueError(f"{array!r} has no shape and is none")


def _state_bytes(elements: float, slot_elements: float, precision: str) -> float:
    if precision == "mixed":
        return 4 * (elements + slot_elements)
    return PRECISIONS[precision] * slot_elements


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _check(stage: int, workers: int) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage must be one of 0, 1, 2, 3, got {stage!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
