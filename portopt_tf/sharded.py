"""`Sharded`: a rule under ``tf.distribute``, its state divided among the replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from portopt.rules import Rule
from portopt.sharding.plan import ALIGN
from portopt.trace import trace
from portopt_tf import compiled
from portopt_tf.gradients import dense, path_of
from portopt_tf.optimizer import check_dtype
from portopt_tf.scalars import scalars_of


class Sharded:
    """An optimizer of which every replica keeps, and runs, one part: ZeRO's stage 1.

    Make it within the scope of a ``tf.distribute`` strategy, for variables that were made there,
    and call `apply` in ``strategy.run``. The variables of a dtype are seen as one line, padded with
    zeros and cut into pieces of equal length; a replica holds the slots of its piece only. From the
    same averaged gradients the variables become, bit for bit, those of the rule's own
    ``portopt_tf.Optimizer`` without a strategy.

    Args:
        rule: A rule that updates each element by itself.
        variables: Variables of TensorFlow or Keras, of a floating dtype each.

    Attributes:
        learning_rate: A variable, at first the rule's ``lr``; float32, or float64 if one of the
            variables is, as Keras keeps it. Assign to it between steps.
        iterations: A variable, the number of steps made.

    Raises:
        TypeError: ``rule`` is no rule, or a variable has a dtype that it cannot update.
        ValueError: the rule looks at more than one element or keeps other weights to evaluate with,
            or there are no variables, one is there twice or was made outside the strategy's scope.
        RuntimeError: Keras does not run on TensorFlow.

    Source:
        Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
        Models", section 5.1. https://arxiv.org/abs/1910.02054

    Example:
        >>> from portopt import rules
        >>> variable = tf.Variable([1.0, 2.0])  # without a strategy there is one replica
        >>> optimizer = Sharded(rules.SGD(lr=0.5), [variable])
        >>> optimizer.apply([tf.constant([1.0, 2.0])])
        >>> print(variable.numpy())
        [0.5 1. ]
    """

    def __init__(self, rule: Rule, variables: Iterable[Any]) -> None:
        self.rule, self._variables = rule, list(variables)
        self._strategy = tf.distribute.get_strategy()
        self._check()
        self._program = trace(rule)
        lines: dict[tf.DType, list[int]] = {}
        for place, variable in enumerate(self._variables):
            lines.setdefault(tf.as_dtype(variable.dtype), []).append(place)
        self._lines = [
            _Line(dtype, places, [self._variables[place] for place in places], rule)
            for dtype, places in lines.items()
        ]
        number = tf.float64 if tf.float64 in lines else tf.float32
        self.learning_rate = tf.Variable(rule.lr, dtype=number, trainable=False)
        self.iterations = _counted(0, tf.int64)
        self._numbers = {name: _counted(rule.initial(name), number) for name in rule.numbers}

    def apply(self, grads: Sequence[Any]) -> None:
        """Average the gradients over the replicas and make a step; in ``strategy.run``.

        Args:
            grads: This replica's, one for each variable, of its shape; rows of an embedding
                (``tf.IndexedSlices``) are summed.

        Raises:
            RuntimeError: it is not called in ``run`` of the strategy in whose scope this was made.
            ValueError: a gradient is missing or of another shape; nothing is changed then.
        """
        context = tf.distribute.get_replica_context()
        if context is None or context.strategy is not self._strategy:
            raise RuntimeError("apply must be called in strategy.run of its own strategy")
        grads = self._checked(grads)
        values = {**vars(self.rule), "lr": self.learning_rate}
        t = self.iterations + 1
        scalars = scalars_of(self._program, type(self.rule).unchecked(**values), self._numbers, t)
        fused = "CPU" in self.iterations.device
        updated: dict[int, Any] = {}
        for line in self._lines:
            own_grads = {place: grads[place] for place in line.places}  # of one dtype, as TF wants
            mean = context.all_reduce(tf.distribute.ReduceOp.MEAN, own_grads)
            arrays = {
                "param": line.piece(self._variables),
                "grad": line.piece(mean),
                **{slot: own.read_value() for slot, own in line.slots.items()},
            }
            new = compiled.outputs(self._program, scalars, t, arrays, fused=fused)
            for slot, own in line.slots.items():
                own.assign(new[slot])
            updated |= line.split(context.all_gather(new["param"], axis=0))
        context.merge_call(self._assign, args=(updated,))
        for name, value in self._program.kept(scalars).items():
            number = self._numbers[name]
            number.assign(tf.cast(tf.convert_to_tensor(value, tf.float64), number.dtype))
        self.iterations.assign(t)

    def state(self) -> dict[str, Any]:
        """The whole state, for any number of replicas; outside ``run``, on all workers.

        Returns:
            "step", the rule's numbers, and for each slot a list of NumPy arrays, of the shapes of
            the variables and in their order.
        """
        found: dict[str, Any] = {"step": int(self.iterations.read_value())}
        found |= {name: float(number.read_value()) for name, number in self._numbers.items()}
        for slot in self._program.slots:
            arrays: dict[int, Any] = {}
            for line in self._lines:
                arrays |= line.split(self._on_replicas(line.gathered, slot))
            found[slot] = [arrays[place].numpy() for place in range(len(self._variables))]
        return found

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, also with another number of replicas.

        Raises:
            ValueError: ``state`` is of another rule or other variables; nothing is changed then.
        """
        names = ["step", *self._numbers, *self._program.slots]
        if set(state) != set(names):
            raise ValueError(f"state must have {', '.join(names)}, has {', '.join(state)}")
        shapes = [tuple(variable.shape) for variable in self._variables]
        for slot in self._program.slots:
            own = [np.shape(array) for array in state[slot]]
            if own != shapes:
                raise ValueError(f"state[{slot!r}] must have shapes {shapes}, has {own}")
        kept: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        try:  # all is converted before any of it is kept
            for slot in self._program.slots:
                for line in self._lines:
                    arrays = {n: tf.cast(state[slot][n], line.dtype) for n in line.places}
                    kept.append((line.keep, (slot, arrays)))
            for name, number in {"step": self.iterations, **self._numbers}.items():
                kept.append((number.assign, (tf.constant(state[name], number.dtype, ()),)))
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise ValueError(f"state must have numbers and arrays of them: {error}") from error
        for keep, args in kept:
            self._on_replicas(keep, *args)

    def _on_replicas(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function returns on the first replica of this worker."""
        run = tf.function(lambda *args: self._strategy.run(function, args), autograph=False)
        return self._strategy.experimental_local_results(run(*args))[0]

    def _assign(self, strategy: tf.distribute.Strategy, updated: Mapping[int, Any]) -> None:
        for place, value in updated.items():
            strategy.extended.update(_native(self._variables[place]), _assign, (value,))

    def _check(self) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(f"Keras must run on tensorflow, runs on {keras.backend.backend()}")
        if not isinstance(self.rule, Rule):
            raise TypeError(f"rule must be a portopt.Rule, such as rules.Adam(), got {self.rule!r}")
        name = type(self.rule).__name__
        if self.rule.by_shape or not trace(self.rule).elementwise:
            raise ValueError(f"rule must update each element by itself, {name} looks at whole ones")
        if self.rule.has_modes:
            raise ValueError(f"rule must have one set of weights, {name} evaluates with others")
        if not self._variables:
            raise ValueError("variables must hold at least one variable, got none")
        seen: set[int] = set()
        for variable in self._variables:
            check_dtype(variable)
            native = _native(variable)
            if id(native) in seen:
                raise ValueError(f"variable {path_of(variable)!r} is there twice")
            if not self._strategy.extended.variable_created_in_scope(native):
                raise ValueError(
                    f"variable {path_of(variable)!r} must be made in the scope of this strategy"
                )
            seen.add(id(native))

    def _checked(self, grads: Sequence[Any]) -> list[Any]:
        if len(grads) != len(self._variables):
            raise ValueError(
                f"grads must be one for each of {len(self._variables)} variables, got {len(grads)}"
            )
        for grad, variable in zip(grads, self._variables, strict=True):
            if grad is None:
                raise ValueError(f"variable {path_of(variable)!r} must have a gradient, got None")
        return dense(grads, self._variables)


class _Line:
    """The variables of one dtype, one after another; and one replica's piece of their slots.

    Attributes:
        dtype: Their dtype.
        places: Where they are among all variables.
        slots: For each slot a variable with a value of its own on each replica.
    """

    def __init__(
        self, dtype: tf.DType, places: list[int], variables: list[Any], rule: Rule
    ) -> None:
        self.dtype, self.places = dtype, places
        self._shapes = [tuple(variable.shape) for variable in variables]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self._length = ALIGN * max(1, math.ceil(sum(self._sizes) / (ALIGN * replicas)))
        self._padding = self._length * replicas - sum(self._sizes)
        self.slots = {
            slot: tf.Variable(
                np.full(self._length, rule.initial(slot)),
                dtype=dtype,
                trainable=False,
                name=slot,
                synchronization=tf.VariableSynchronization.ON_READ,
            )
            for slot in rule.slots
        }

    def split(self, line: Any) -> dict[int, Any]:
        """The arrays of a line, by their places."""
        parts = tf.split(line, [*self._sizes, self._padding])[:-1]
        shaped = map(tf.reshape, parts, self._shapes)
        return dict(zip(self.places, shaped, strict=True))

    def piece(self, arrays: Any) -> Any:
        """This replica's piece of the line of arrays, which are found by their places."""
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        begin = int(tf.get_static_value(replica)) * self._length
        found, start = [], 0
        for place, size in zip(self.places, self._sizes, strict=True):
            first, last = max(begin - start, 0), min(begin + self._length - start, size)
            if first < last:
                found.append(tf.reshape(arrays[place], [-1])[first:last])
            start += size
        padding = self._length - sum(x.shape[0] for x in found)
        return tf.concat([*found, tf.zeros(padding, self.dtype)], 0)

    def gathered(self, slot: str) -> Any:
        """A slot's line, from all replicas."""
        own = self.slots[slot].read_value()
        return tf.distribute.get_replica_context().all_gather(own, axis=0)

    def keep(self, slot: str, arrays: Any) -> None:
        """Take this replica's piece of a slot's line."""
        self.slots[slot].assign(self.piece(arrays))


def _counted(value: float, dtype: tf.DType) -> tf.Variable:
    """A number that every replica keeps, and that is the same on all."""
    return tf.Variable(
        value,
        dtype=dtype,
        trainable=False,
        synchronization=tf.VariableSynchronization.ON_READ,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def _native(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _assign(variable: Any, value: Any) -> None:
    variable.assign(value)
