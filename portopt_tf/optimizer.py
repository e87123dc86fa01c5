"""`Optimizer`: any rule as a ``keras.optimizers.Optimizer``, on whatever backend Keras runs."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np
from keras import ops

from portopt.arrays import STORAGE_DTYPES, compute_dtype, namespace
from portopt.program import Program
from portopt.rules import HyperparameterError, Rule
from portopt.rules.base import PARAM, Slots
from portopt.trace import trace
from portopt_tf.gradients import dense, fit, path_of, shape_of
from portopt_tf.scalars import float64, is_symbolic, next_step, scalars_of

_KEEP_PROTOCOL = ("jax", "torch", "numpy")
"""The backends with array API namespaces; there, keras.ops may turn float64 into float32."""


class _Ops:
    """``keras.ops`` as a namespace of the array protocol."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def matrix_transpose(self, x: Any) -> Any:
        return ops.moveaxis(x, -1, -2)


@dataclass  # and no tuple, of which Keras would track the variables
class _Group:
    """The variables of a step, and what the next step on them needs not find out again.

    Attributes:
        variables: They.
        shapes: What `shape_of` tells of their gradients.
        can_be_compiled: What `_can_be_compiled` says of them.
        places: For each variant, the places of its own.
        plan: How kernels update them.
    """

    variables: Sequence[Any]
    shapes: Sequence[Any]
    can_be_compiled: bool
    places: dict[Hashable, list[int]]
    plan: Any = None


_GROUPS = 4
"""How many groups an optimizer remembers, as two parts of a model may be updated by turns."""


class _Work(NamedTuple):
    """What one program updates in a step.

    Attributes:
        program: It.
        scalars: What its ``scalars`` returned.
        places: The places of its variables.
    """

    program: Program
    scalars: dict[str, Any]
    places: list[int]


class Optimizer(keras.optimizers.Optimizer):
    """Base of the adapters: Keras's variables, and a rule's arithmetic.

    Clipping, averaging, gradient accumulation and loss scaling are Keras's own; weight decay is the
    rule's. A subclass is a table of translations.

    Args:
        learning_rate: A float, a ``LearningRateSchedule``, or a callable.
        hyperparameters: The other arguments that the rule knows; they become attributes.
        **kwargs: The arguments that every ``keras.optimizers.Optimizer`` takes.

    Raises:
        ValueError, TypeError: an argument is not allowed.
    """

    rule_class: ClassVar[type[Rule]]
    fields: ClassVar[Mapping[str, str]]
    """For each hyperparameter, under its name in Keras, the field of the rule."""
    fixed: ClassVar[Mapping[str, Any]]
    """Fields of the rule that make it Keras's."""
    slot_names: ClassVar[tuple[Mapping[str, str], ...]]
    """Names of the slots in Keras; one mapping for those that it creates variable by variable."""

    def __init__(
        self, learning_rate: Any, hyperparameters: Mapping[str, Any], **kwargs: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self._groups: dict[tuple[int, ...], _Group] = {}
        for name, value in hyperparameters.items():
            if hasattr(self, name):
                raise TypeError(f"{name!r} cannot be a hyperparameter: Keras uses it for its own")
            setattr(self, name, value)
        rule = self._checked(learning_rate)
        for name, field in self.fields.items():
            if getattr(self, name) is not None:
                setattr(self, name, getattr(rule, field, getattr(self, name)))

    def rule_of(self) -> tuple[type[Rule], dict[str, Any]]:
        """The rule that the attributes mean: its class, and the fields that they set but ``lr``."""
        values = {field: getattr(self, name) for name, field in self.fields.items()}
        decay = 0.0 if self.weight_decay is None else self.weight_decay
        return self.rule_class, {**self.fixed, **values, "weight_decay": decay}

    def build(self, variables: list[Any]) -> None:
        """Create the slots of ``variables``, named ``{variable}_{slot}``."""
        if not self.built:
            with _outside_graphs():  # slots must begin with values, whatever is being traced now
                self._build(variables)

    def _build(self, variables: list[Any]) -> None:
        rule = self._first_rule()
        for variable in variables:
            self._slot_shapes(rule, variable)  # whether the rule takes it
        super().build(variables)
        self._slots: dict[str, list[Any]] = {}
        for names in self.slot_names:
            used = {slot: name for slot, name in names.items() if slot in rule.slots}
            self._slots |= self._add_slots(rule, used, variables)
        wide = any(keras.backend.standardize_dtype(v.dtype) == "float64" for v in variables)
        self._numbers: dict[str, Any] = {
            name: self.add_variable(
                (), _initializer(rule.initial(name)), "float64" if wide else "float32", name=name
            )
            for name in rule.numbers
        }
        if rule.has_modes:
            self._train_mode = self.add_variable((), "ones", name="train_mode")
            self._numbers["train_mode"] = self._train_mode

    def _first_rule(self) -> Rule:
        """The rule that slots and numbers begin with.

        A callable learning rate counts its calls: where none begins with it, it is not called.
        """
        rule_class, values = self.rule_of()
        rule = rule_class.unchecked(**values, lr=math.nan)
        begin = map(rule.initial, (*rule.slots, *rule.numbers))
        if any(value != value for value in begin):  # only NaN is
            rule = rule_class.unchecked(**values, lr=self._get_current_learning_rate())
        return rule

    def _add_slots(
        self, rule: Rule, names: Mapping[str, str], variables: list[Any]
    ) -> dict[str, list[Any]]:
        """Create slots: for each, one for every variable, and None for one that has it not."""
        made: dict[str, list[Any]] = {slot: [] for slot in names}
        for variable in variables:
            shape, shapes = tuple(variable.shape), self._slot_shapes(rule, variable)
            for slot, name in names.items():
                begin, own = _initializer(rule.initial(slot), variable), None
                if shapes.get(slot) == shape:
                    own = self.add_variable_from_reference(variable, name, begin)
                elif slot in shapes:
                    name = f"{path_of(variable).replace('/', '_')}_{name}"
                    own = self.add_variable(shapes[slot], begin, variable.dtype, name=name)
                made[slot].append(own)
        return made

    def _slot_shapes(self, rule: Rule, variable: Any) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the slots that a variable is to have.

        Raises:
            ValueError: the rule updates none of its shape.
        """
        if self._overwrite_variable_with_gradient(variable):
            return {}
        return rule.slot_shapes(tuple(variable.shape))

    def eval(self) -> None:
        """Put the weights to evaluate the model with in the place of those to train.

        They are others for the rules that average them (`Rule.has_modes`: the schedule-free ones).
        ``fit`` does not call this: call it afterwards, and `train` before you go on. An eager step
        is refused in between; a compiled one cannot be, and goes on from the weights to train, but
        a variable that has no gradient then stays as it is.
        """
        self._switch(training=False)

    def train(self) -> None:
        """Undo `eval`, to go on training."""
        self._switch(training=True)

    def _switch(self, *, training: bool) -> None:
        if not (self.built and self.rule_class.has_modes) or self._is_training() == training:
            return
        rule = self.rule_for(True, self._get_current_learning_rate())
        to = rule.trained if training else rule.evaluated
        for index, variable in enumerate(self._trainable_variables):
            if self._overwrite_variable_with_gradient(variable):
                continue
            dtype = compute_dtype(keras.backend.standardize_dtype(variable.dtype))
            slots = {slot: ops.cast(own[index], dtype) for slot, own in self._slots.items()}
            self.assign(variable, to(_Ops(), ops.cast(variable, dtype), Slots(slots)))
        self._train_mode.assign(float(training))

    def _is_training(self) -> bool:
        return bool(ops.convert_to_numpy(self._train_mode))

    def variant(self, variable: Any) -> Hashable:
        """What makes the rule of a variable another than that of others: whether it decays."""
        return self._use_weight_decay(variable)

    def rule_for(self, variant: Any, learning_rate: Any) -> Rule:
        """The rule of the variables of a `variant`."""
        rule_class, values = self.rule_of()
        if not variant:
            values["weight_decay"] = 0.0
        if rule_class.has_modes and is_symbolic(self._train_mode):
            rule_class = _in_either_mode(rule_class)
        return rule_class.unchecked(**values, lr=learning_rate)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """One step of the rule for one variable and its slots."""
        rule = self.rule_for(self.variant(variable), learning_rate)
        shape = tuple(variable.shape)
        program = trace(rule, shape=shape)
        scalars = scalars_of(program, rule, self._numbers, next_step(self.iterations))
        stored = self._stored(program, gradient, variable)
        dtype = compute_dtype(keras.backend.standardize_dtype(variable.dtype))
        with float64():
            scalars = {
                k: x if isinstance(x, float) else ops.cast(x, dtype) for k, x in scalars.items()
            }
        arrays = {key: ops.cast(array, dtype) for key, array in stored.items()}
        if rule.by_shape:  # in Keras a slot may lack the axes of length 1
            for slot, own in rule.slot_shapes(shape).items():
                arrays[slot] = ops.reshape(arrays[slot], own)
        xp = namespace(arrays["param"]) if keras.backend.backend() in _KEEP_PROTOCOL else _Ops()
        for key, value in program.run(xp, scalars, arrays).items():
            new = ops.reshape(value, stored[key].shape) if rule.by_shape else value
            self.assign(stored[key], new)

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        """All variables at once, by kernels or on TensorFlow compiled; else `update_step` for each.

        That is, in the processor's memory, and wherever TensorFlow keeps one copy of each; not
        where a subclass has an `update_step` of its own.
        """
        t, group = next_step(self.iterations), self._group_of(trainable_variables)
        is_ours = _is_own(self.update_step)  # a subclass, or somebody, may have put another there
        can_be_compiled = is_ours and group.can_be_compiled and not _has_strategy()
        works: list[_Work] = []
        for variant, places in group.places.items():
            rule = self.rule_for(variant, learning_rate)
            program = trace(rule)
            works.append(_Work(program, scalars_of(program, rule, self._numbers, t), places))
        can_be_launched = can_be_compiled or (is_ours and keras.backend.backend() == "torch")
        if not (can_be_launched and _unseen(Optimizer._launched)(self, group, works, grads)):
            for program, scalars, places in works:
                own_grads = [grads[place] for place in places]
                own_variables = [trainable_variables[place] for place in places]
                if can_be_compiled and program.elementwise:
                    from portopt_tf import compiled

                    stored = map(partial(self._stored, program), own_grads, own_variables)
                    compiled.update(program, scalars, t, stored)
                else:
                    super()._backend_update_step(own_grads, own_variables, learning_rate)
        self._keep(works[-1].program, works[-1].scalars)  # the same with decay and without

    def _group_of(self, variables: Sequence[Any]) -> _Group:
        """What is known of these variables, if a step was on them lately."""
        key = tuple(map(id, variables))  # of variables that live as long as their group
        group = self._groups.get(key)
        if group is None:
            for variable in variables:
                if not self._overwrite_variable_with_gradient(variable):
                    check_dtype(variable)
            shapes = [shape_of(variable) for variable in variables]
            group = _Group([*variables], shapes, _can_be_compiled(variables), {})
            for place, variable in enumerate(variables):
                group.places.setdefault(self.variant(variable), []).append(place)
            if len(self._groups) == _GROUPS:
                self._groups.pop(next(iter(self._groups)), None)  # the oldest
            self._groups[key] = group
        return group

    def _launched(self, group: _Group, works: Sequence[_Work], grads: Sequence[Any]) -> bool:
        """Make the step by kernels, on the variables' memory; whether that was possible."""
        if is_symbolic(self.iterations) or not all(work.program.elementwise for work in works):
            return False
        from portopt_tf import launch

        if not launch.can_step():
            return False
        programs = [work.program for work in works]
        plan = group.plan  # another thread may put its own there
        if plan is None or not plan.fits(programs, grads):
            members = [
                launch.Member(
                    place,
                    number,
                    program,
                    self._stored(program, grads[place], group.variables[place]),
                )
                for number, (program, _, places) in enumerate(works)
                for place in places
            ]
            plan = group.plan = launch.Plan(programs, grads, members)
        return bool(plan.run([work.scalars for work in works], grads))

    def _keep(self, program: Program, scalars: Mapping[str, Any]) -> None:
        """Take over the rule's new numbers."""
        for name, value in program.kept(scalars).items():
            # Keras would cast a float by way of float32.
            exact = np.float64(value) if isinstance(value, float) else value
            self.assign(self._numbers[name], ops.cast(exact, self._numbers[name].dtype))

    def _stored(self, program: Program, gradient: Any, variable: Any) -> dict[str, Any]:
        """The arrays of a variable's step by `Program.operands`."""
        index = self._get_variable_index(variable)
        slots = {slot: self._slots[slot][index] for slot in program.slots}
        return {"param": variable, "grad": gradient, **slots}

    def get_config(self) -> dict[str, Any]:
        """The arguments that make this optimizer again, without its state."""
        return {**super().get_config(), **{name: getattr(self, name) for name in self.fields}}

    def exclude_from_weight_decay(self, *args: Any, **kwargs: Any) -> None:
        super().exclude_from_weight_decay(*args, **kwargs)
        self._groups.clear()  # which knew who decays

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: decay is a part of the rule."""

    def _filter_empty_gradients(self, grads: Any, variables: Any) -> tuple[list[Any], list[Any]]:
        """Keras's first look at the gradients, and so ours: nothing has changed yet."""
        if len(grads) != len(variables):
            raise ValueError(
                f"`grads` must have one gradient for each of {len(variables)} variables. "
                f"Received: {len(grads)}"
            )
        if self.rule_class.has_modes and not (is_symbolic(self._train_mode) or self._is_training()):
            raise RuntimeError("the weights are those of eval(): call train() first")
        grads, variables = super()._filter_empty_gradients(grads, variables)
        if not fit(grads, self._group_of(variables).shapes):
            grads = dense(grads, variables)
        return grads, variables

    def _checked(self, learning_rate: Any) -> Rule:
        rule_class, values = self.rule_of()
        if isinstance(learning_rate, float):
            values["lr"] = learning_rate
        else:  # a schedule's values are not known yet
            values["lr"] = getattr(rule_class, "lr", 1.0)
        try:
            return rule_class(**values)
        except HyperparameterError as error:
            names = {field: name for name, field in self.fields.items()} | {"lr": "learning_rate"}
            name = names.get(error.name, error.name)
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"`{name}` must be {error.allowed}. Received: {name}={error.value!r}"
            ) from error


@cache
def _in_either_mode(rule_class: type[Rule]) -> type[Rule]:
    """The same rule, but its steps go on from the weights to train, also after `Optimizer.eval`."""

    class InEitherMode(rule_class):
        @property
        def numbers(self) -> tuple[str, ...]:
            return (*super().numbers, "train_mode")

        def step(self, xp: Any, t: Any, param: Any, grad: Any, slot: Any) -> Any:
            away = 1 - slot.train_mode
            param = param + away * (self.trained(xp, param, slot) - param)
            param, new = super().step(xp, t, param, grad, slot)
            return param, {**new, "train_mode": slot.train_mode + away}

    return InEitherMode


_ZEROS = keras.initializers.Zeros()


def _initializer(value: Any, variable: Any = None) -> Any:
    if value is PARAM:
        return lambda shape, dtype: ops.copy(variable)
    if value == 0.0:
        return _ZEROS  # and not "zeros", which Keras would look up for each variable
    # Keras would take a Python float into float64 by way of float32.
    return keras.initializers.Constant(np.float64(value) if isinstance(value, float) else value)


def check_dtype(variable: Any) -> None:
    """Raise a TypeError unless a rule can update the variable."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    if dtype not in STORAGE_DTYPES:
        allowed = ", ".join(STORAGE_DTYPES)
        raise TypeError(
            f"variable {path_of(variable)!r} must have a dtype among {allowed}, has {dtype}"
        )


def _is_own(update_step: Any) -> bool:
    return getattr(update_step, "__func__", None) is Optimizer.update_step


def _can_be_compiled(variables: list[Any]) -> bool:
    if keras.backend.backend() != "tensorflow" or len({*map(id, variables)}) < len(variables):
        return False
    from portopt_tf import compiled

    return not compiled.are_mirrored(variables)


def _has_strategy() -> bool:
    """Whether a TensorFlow strategy runs the step, on Keras's TensorFlow backend."""
    import tensorflow as tf

    return bool(tf.distribute.has_strategy())


def _outside_graphs() -> Any:
    """Lets TensorFlow compute now what is not to be a part of a ``tf.function``."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def _unseen(function: Any) -> Any:
    """The function, into which PyTorch's compiler does not look, if that is here at all."""
    return _hidden(function) if "torch._dynamo" in sys.modules else function


@cache
def _hidden(function: Any) -> Any:
    return sys.modules["torch"].compiler.disable(function)
