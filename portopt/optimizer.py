"""`Optimizer`: a rule at work on plain NumPy arrays, in place."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from portopt.arrays import STORAGE_DTYPES, Namespace, compute_dtype
from portopt.plan import Member, Name, NDArray, Places, Plan, checked_step, dtype_name, state_of
from portopt.program import Program
from portopt.rules import Around, Rule
from portopt.rules.base import Slots
from portopt.trace import specialized, trace

Arrays: TypeAlias = "Sequence[NDArray] | Mapping[str, NDArray]"


class Optimizer:
    """Updates NumPy arrays in place by a rule.

    Args:
        rule: The rule; its hyperparameters are every group's defaults.
        params: Writable arrays of dtype float16, bfloat16, float32 or float64: a sequence (named 0,
            1, ...), a dict (named by its keys), or a sequence of groups: dicts with such a
            collection under "params" and, beside it, hyperparameters of their own.
        around: What stands around the rule: clipping, an average of the weights, and the like.

    Attributes:
        rule: The rule.
        around: What stands around it, free to change between steps.
        param_groups: For each group its hyperparameters, free to change between steps, and under
            "params" its arrays by name.
        state: For each parameter that has had a gradient, by name, its "step" (an int), and
            the numbers and slots that its rule has: one that a hyperparameter turns off is dropped.
        training: Whether the parameters are those to train, and not those of `eval`.

    Raises:
        TypeError: a parameter is no array, or of another dtype; an unknown hyperparameter.
        ValueError: no parameters, one that stands there twice or cannot be written, or a
            hyperparameter out of its range.

    Example:
        >>> import numpy as np
        >>> from portopt.rules import SGD
        >>> params = {"w": np.array([1.0, 2.0]), "b": np.array([0.5])}
        >>> optimizer = Optimizer(SGD(lr=0.5), params)
        >>> optimizer.step({"w": np.array([1.0, 1.0]), "b": np.array([1.0])})
        >>> params
        {'w': array([0.5, 1.5]), 'b': array([0.])}
    """

    def __init__(
        self,
        rule: Rule,
        params: Arrays | Sequence[Mapping[str, Any]],
        *,
        around: Around | None = None,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a portopt.Rule, such as rules.Adam(), got {rule!r}")
        self.rule, self.around = rule, around
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[Name, dict[str, Any]] = {}
        self.training = True
        self._plan: Plan | None = None
        groups: Any = params
        if not (isinstance(params, Sequence) and params and isinstance(params[0], Mapping)):
            groups = [{"params": params}]
        for group in groups:
            self.add_param_group(group)

    @property
    def around(self) -> Around:
        """What stands around the rule; it may be changed between steps."""
        return self._around

    @around.setter
    def around(self, around: Around | None) -> None:
        self._around = Around.of(around)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with hyperparameters of their own.

        Args:
            group: A collection of arrays under "params"; hyperparameters beside it.

        Raises:
            TypeError, ValueError: as for the class; nothing is added then.
        """
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f'a group must be a dict with "params", got {group!r}')
        arrays = group["params"]
        if isinstance(arrays, np.ndarray) or not isinstance(arrays, Mapping | Iterable):
            raise TypeError(
                f"params must be a sequence or a dict of arrays, got {type(arrays).__name__}"
            )
        known = self._arrays()
        named: dict[Name, Any] = (
            dict(arrays) if isinstance(arrays, Mapping) else dict(enumerate(arrays, len(known)))
        )
        if not named:
            raise ValueError("params must hold at least one array, got none")
        seen = {id(array): name for name, array in known.items()}
        for name, array in named.items():
            _check_param(name, array)
            if name in known or id(array) in seen:
                other = name if name in known else seen[id(array)]
                raise ValueError(f"params[{name!r}] is there already, as params[{other!r}]")
            seen[id(array)] = name
        hyper = {key: value for key, value in group.items() if key != "params"}
        rule = self.rule.changed(hyper)
        for array in named.values():
            rule.slot_shapes(array.shape)  # whether it takes such a parameter
        self.param_groups.append({"params": named, **rule.values()})

    def step(self, grads: Sequence[NDArray | None] | Mapping[str, NDArray | None]) -> None:
        """Update every parameter that has a gradient.

        Args:
            grads: A gradient for each parameter, of its shape and dtype, or None to leave the
                parameter and its slots alone: a sequence in the order of the parameters, or a dict
                by name. One may be its own parameter, but else shares no memory with one; with
                `Around.zero_grad` neither that, nor with another gradient.

        Raises:
            TypeError, ValueError: a gradient is missing, unknown, or of another shape or dtype, or
                a parameter shares memory with another, or a gradient as it may not (as long as only
                gradients change, this is not looked for again, but for equal ones to be zeroed), or
                a parameter or slot has become read-only, or its state does not fit it, or a group's
                hyperparameter is not allowed, or the rule cannot be traced; nothing is changed
                then.
            ArithmeticError: a scalar is no real number; nothing is changed then.
            RuntimeError: after `eval`, for a rule that has other weights then.
        """
        self._check_training()
        each = self._in_order(grads)
        groups = self.param_groups
        rules = [self.rule.changed(_hyper(group)) for group in groups]
        programs = [trace(rule, self.around) for rule in rules]
        plan = self._plan
        if plan is None or not plan.fits(groups, programs, self.state, each):
            self._check_grads(each)
            plan = Plan(groups, programs, self._members(rules, programs, each))
        values = vars(self.around)
        if self.around.needs_norm:
            values = values | {"grad_norm": plan.grad_norm()}
            if self.around.skip_nonfinite and not math.isfinite(values["grad_norm"]):
                for grad in each if self.around.zero_grad else ():
                    if grad is not None:
                        grad[...] = 0.0
                return
        plan.prepare([values | vars(rule) for rule in rules])
        self._plan = plan if plan.lasts else None
        plan.run(self.state)

    def _members(
        self, rules: Sequence[Rule], programs: Sequence[Program], grads: Sequence[NDArray | None]
    ) -> list[Member]:
        """The parameters that have a gradient, with states for the step, and those that wait."""
        listed = [
            (g, name, param)
            for g, group in enumerate(self.param_groups)
            for name, param in group["params"].items()
        ]
        members = []
        for place, ((g, name, param), grad) in enumerate(zip(listed, grads, strict=True)):
            waits = grad is None
            if waits and (name not in self.state or rules[g].by_shape):
                continue
            program = specialized(programs[g], rules[g], self.around, param.shape)
            if waits:
                state = self.state[name]
                if not _is_ready(name, state, rules[g], program, param):
                    continue
            else:
                state = state_of(self.state.get(name, {}), rules[g], program, param)
                _check_member(name, state, rules[g], program, param)
            like = param if waits else grad
            operands = param, like, *(state[slot] for slot in program.slots)
            members.append(Member(place, g, program, state, operands, waits))
        if any(member.waits for member in members):
            places = Places({place: param for place, (_, _, param) in enumerate(listed)})
            members = [
                member
                for member in members
                if not member.waits or places.sharing(member.operands[0], but=member.place) is None
            ]
        return members

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle keeps."""
        return {**vars(self), "_plan": None}

    def eval(self) -> None:
        """Put the weights to evaluate the model with in the place of those to train.

        They are others for the rules that average them (`Rule.has_modes`: the schedule-free ones).

        Raises:
            TypeError, ValueError: a parameter has become read-only, or a group's hyperparameter is
                not allowed; nothing is changed then.
        """
        self._switch(training=False)

    def train(self) -> None:
        """Undo `eval`, to go on training.

        Raises:
            TypeError, ValueError: as for `eval`.
        """
        self._switch(training=True)

    def _switch(self, *, training: bool) -> None:
        if training == self.training:
            return
        new: list[tuple[NDArray, Any]] = []
        for group in self.param_groups:
            rule = self.rule.changed(_hyper(group))
            for name, param in group["params"].items():
                if rule.has_modes and name in self.state:
                    _check_param(name, param)
                    dtype = np.dtype(compute_dtype(param.dtype.name))
                    slots = {k: np.asarray(x, dtype) for k, x in self.state[name].items()}
                    own = np.asarray(param)  # a mask is not to hold anything back
                    to = rule.trained if training else rule.evaluated
                    wide: Any = own.astype(dtype)
                    new.append((own, to(cast(Namespace, np), wide, Slots(slots))))
        for own, value in new:
            own[...] = value
        self.training = training

    def _check_training(self) -> None:
        if not self.training and self.rule.has_modes:
            raise RuntimeError("the weights are those of eval(): call train() first")

    def state_dict(self) -> dict[str, Any]:
        """A copy of all that `load_state_dict` needs to go on from here.

        Returns:
            "state": for each parameter by name, its "step", numbers and slots; "param_groups": for
            each group, its hyperparameters and under "params" the names of its parameters.

        Raises:
            RuntimeError: after `eval`, for a rule that has other weights then.
        """
        self._check_training()
        state: dict[Name, dict[str, Any]] = {}
        for group in self.param_groups:
            rule = self.rule.changed(_hyper(group))
            for name, param in group["params"].items():
                if name in self.state:
                    program = trace(rule, self.around, param.shape)
                    state[name] = _copy(state_of(self.state[name], rule, program, param))
        groups = [{**_hyper(group), "params": list(group["params"])} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of an optimizer with the same groups of parameters.

        Slots keep the dtype that they were saved with.

        Raises:
            ValueError: it does not fit: other groups, names, slots or shapes; nothing is changed.
            TypeError: hyperparameters or slots of a wrong type; nothing is changed.
            RuntimeError: after `eval`, for a rule that has other weights then, as `train` would
                move the restored ones.
        """
        self._check_training()
        self._check_form(state_dict)
        names = [list(group["params"]) for group in self.param_groups]
        saved = [list(group["params"]) for group in state_dict["param_groups"]]
        if names != saved:
            raise ValueError(f"state_dict must be for the parameters {names}, is for {saved}")
        rules = [self.rule.changed(_hyper(group)) for group in state_dict["param_groups"]]
        arrays = self._arrays()
        rule_of = {name: rule for rule, group in zip(rules, names, strict=True) for name in group}
        for name, entries in state_dict["state"].items():
            if name not in arrays:
                raise ValueError(f"state[{name!r}] is of no parameter: there are {list(arrays)}")
            rule, param = rule_of[name], arrays[name]
            _check_state(name, entries, rule, trace(rule, self.around, param.shape), param)
        self.state = {name: _copy(entries) for name, entries in state_dict["state"].items()}
        for group, rule in zip(self.param_groups, rules, strict=True):
            group.update(rule.values())

    def _check_form(self, state_dict: Any) -> None:
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
            got = _shown(state_dict)
            raise TypeError(f'state_dict must be a dict with "state" and "param_groups", got {got}')
        state, groups = state_dict["state"], state_dict["param_groups"]
        for what, value, kind in (("state", state, Mapping), ("param_groups", groups, Sequence)):
            if not isinstance(value, kind):
                name = kind.__name__.lower()
                raise TypeError(f"state_dict[{what!r}] must be a {name}, got {value!r}")
        for place, group in enumerate(groups):
            wanted = ["params", *self.rule.values()]
            if not isinstance(group, Mapping) or set(group) != set(wanted):
                raise ValueError(f"param_groups[{place}] must have {wanted}, got {_shown(group)}")
            if not isinstance(group["params"], Iterable):
                got = group["params"]
                raise TypeError(f"param_groups[{place}]['params'] must be names, got {got!r}")

    def _arrays(self) -> dict[Name, NDArray]:
        return {k: array for group in self.param_groups for k, array in group["params"].items()}

    def _in_order(self, grads: Any) -> list[Any]:
        """The gradients in the order of their parameters."""
        if isinstance(grads, np.ndarray) or not isinstance(grads, Mapping | Sequence):
            raise TypeError(f"grads must be a sequence or a dict, got {type(grads).__name__}")
        names = [name for group in self.param_groups for name in group["params"]]
        given = [*grads] if isinstance(grads, Mapping) else [*range(len(grads))]
        if names != given and {*names} != {*given}:
            raise ValueError(f"grads must be for {names}, got {given}")
        return [grads[name] for name in names]

    def _check_grads(self, grads: Sequence[Any]) -> None:
        params = self._arrays()
        for (name, param), grad in zip(params.items(), grads, strict=True):
            if grad is None:
                continue
            if not isinstance(grad, np.ndarray):
                raise TypeError(f"grads[{name!r}] must be a NumPy array, got {grad!r}")
            if (grad.shape, grad.dtype) != (param.shape, param.dtype):
                raise ValueError(
                    f"grads[{name!r}] must have shape {param.shape} and dtype {param.dtype} like "
                    f"its parameter, got {grad.shape} and {grad.dtype}"
                )
            if self.around.zero_grad and not grad.flags.writeable:
                raise ValueError(f"grads[{name!r}] must be writable for zero_grad, is read-only")
            _check_param(name, param)
        self._check_places({k: x for k, x in zip(params, grads, strict=True) if x is not None})

    def _check_places(self, grads: Mapping[Name, NDArray]) -> None:
        arrays, zero_grad = self._arrays(), self.around.zero_grad
        params = {name: arrays[name] for name in grads}
        of_params, of_grads = Places(params), Places(grads if zero_grad else {})
        for name, grad in grads.items():
            other = of_params.sharing(params[name], but=name)
            if other is not None:
                raise ValueError(f"params[{name!r}] shares memory with params[{other!r}]")
            own = name if grad is params[name] and not zero_grad else None
            other = of_params.sharing(grad, but=own)
            if other is not None:
                raise ValueError(f"grads[{name!r}] shares memory with params[{other!r}]: copy it")
            other = of_grads.sharing(grad, but=name)
            if other is not None:
                raise ValueError(
                    "with zero_grad no gradient may be that of two parameters: "
                    f"grads[{name!r}] shares memory with grads[{other!r}]"
                )


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _shown(given: Any) -> Any:
    return list(given) if isinstance(given, Mapping) else given


def _copy(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of their own, and Python's numbers."""
    others = {name: value for name, value in entries.items() if name != "step"}
    return {"step": int(entries["step"])} | {
        name: value.copy("K") if isinstance(value, np.ndarray) else float(value)
        for name, value in others.items()
    }


def _check_param(name: Name, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"params[{name!r}] must be a NumPy array, got {type(array).__name__}")
    if dtype_name(array.dtype) not in STORAGE_DTYPES:
        allowed = ", ".join(STORAGE_DTYPES)
        raise TypeError(f"params[{name!r}] must have a dtype among {allowed}, got {array.dtype}")
    _check_writable(f"params[{name!r}]", array)


def _check_writable(what: str, array: NDArray) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{what} must be writable, got a read-only array")


def _is_ready(
    name: Name, state: Mapping[str, Any], rule: Rule, program: Program, param: NDArray
) -> bool:
    """Whether a parameter lacks nothing but a gradient."""
    try:
        _check_param(name, param)
        _check_member(name, state, rule, program, param)
    except (TypeError, ValueError):
        return False
    return True


def _check_member(
    name: Name, state: Mapping[str, Any], rule: Rule, program: Program, param: NDArray
) -> None:
    _check_state(name, state, rule, program, param)
    for slot in program.slots:
        _check_writable(f"state[{name!r}][{slot!r}]", state[slot])


def _check_state(
    name: Name, entries: Mapping[str, Any], rule: Rule, program: Program, param: NDArray
) -> None:
    shapes = rule.slot_shapes(param.shape)
    slots = [*program.numbers, *program.slots]
    if not isinstance(entries, Mapping) or set(entries) != {"step", *slots}:
        got = _shown(entries)
        raise ValueError(f"state[{name!r}] must have step and the slots {slots}, got {got}")
    checked_step(f"state[{name!r}]['step']", entries["step"])
    for number in program.numbers:
        if isinstance(entries[number], bool) or not isinstance(entries[number], numbers.Real):
            raise TypeError(
                f"state[{name!r}][{number!r}] must be a real number, got {entries[number]!r}"
            )
    for slot in program.slots:
        array = entries[slot]
        if not isinstance(array, np.ndarray) or dtype_name(array.dtype) not in STORAGE_DTYPES:
            raise TypeError(f"state[{name!r}][{slot!r}] must be an array of floats, got {array!r}")
        shape = shapes.get(slot, param.shape)
        if array.shape != shape:
            raise ValueError(
                f"state[{name!r}][{slot!r}] must have shape {shape}, got {array.shape}"
            )
