"""The sharded update: each worker keeps the slots of its own spans, and updates these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np

from portopt.arrays import SIZES
from portopt.plan import checked_step, rounded
from portopt.program import Program
from portopt.rules import Around, Rule
from portopt.rules.around import AVERAGE, initial
from portopt.rules.base import PARAM
from portopt.sharding.buffers import NUMPY, Buffers, Work
from portopt.sharding.collectives import Collectives
from portopt.sharding.norm import grad_norm
from portopt.sharding.plan import Span, divide
from portopt.trace import trace

Name: TypeAlias = "int | str"
T = TypeVar("T")


class _Part(NamedTuple):
    """What a worker has to do for a parameter, of which it has a span.

    Attributes:
        name: The parameter's.
        span: Its own.
        state: What becomes of the span's state, but for the slots.
        work: The update.
    """

    name: Name
    span: Span
    state: dict[str, Any]
    work: Work


class Sharded:
    """One worker's part of an optimizer whose state is divided among all workers: ZeRO's.

    Every worker has all parameters, and makes one of these from the same rule and the same
    parameters. In `step` each brings its own gradients; they are averaged, each worker updates its
    spans, and the new parameters go to all. Parameters are the same on all workers before and
    after, bit for bit those of an unsharded optimizer that is given the averaged gradients.

    Args:
        rule: The rule.
        params: Contiguous arrays, in the forms that `portopt.Optimizer` takes: a sequence, a dict,
            or groups. What is frozen stays out, as the plan would count it.
        collectives: The connection to the other workers.
        around: What stands around the rule; the norm is that of all averaged gradients.
        stage: 1: each worker gets all averaged gradients. 2: only those of its spans (and, for a
            norm, of each chunk that begins in them).
        average: False if the gradients that `step` gets are averaged already, as beside PyTorch's
            DistributedDataParallel; then none are sent.
        buffers: The library of the arrays; NumPy by default.

    Attributes:
        rule: The rule.
        around: What stands around it, free to change between steps.
        param_groups: For each group its hyperparameters, free to change between steps, and under
            "params" its arrays by name.
        plan: Who updates what; tensors are numbered in the order of the groups.
        state: For each parameter of which this worker has a span and that has had a gradient, by
            name, its "step", the rule's numbers, and slots: flat arrays as long as the span, but of
            the parameter's shape where the span is all of it.

    Raises:
        TypeError: a parameter is of a wrong type or dtype; an unknown hyperparameter; ``around`` is
            no `Around`.
        ValueError: no parameters, one that is there twice or cannot be cut or written or shares
            memory with another, or a hyperparameter or ``stage`` that is not allowed.

    Source:
        Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
        Models", sections 5.1 and 5.2. https://arxiv.org/abs/1910.02054

    Example:
        >>> from portopt.rules import Momentum
        >>> from portopt.sharding import simulate
        >>> def work(collectives):
        ...     param = np.zeros(32)
        ...     optimizer = Sharded(Momentum(lr=0.5), [param], collectives)
        ...     optimizer.step([np.full(32, collectives.rank * 2.0)])
        ...     return param[0].item(), optimizer.state[0]["momentum_buffer"].size
        >>> simulate(2, work)
        [(-0.5, 16), (-0.5, 16)]
    """

    def __init__(
        self,
        rule: Rule,
        params: Any,
        collectives: Collectives,
        *,
        around: Around | None = None,
        stage: Literal[1, 2] = 1,
        average: bool = True,
        buffers: Buffers = NUMPY,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a portopt.Rule, such as rules.Adam(), got {rule!r}")
        if stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {stage!r}")
        self.rule, self.around = rule, Around.of(around)
        self.collectives, self.buffers = collectives, buffers
        self.stage, self.average = stage, average
        self.param_groups = self._groups(params)
        self.state: dict[Name, dict[str, Any]] = {}
        self._params = {
            name: array for group in self.param_groups for name, array in group["params"].items()
        }
        buffers.check_apart(self._params)
        self._names = list(self._params)
        cuttable = {
            name: trace(self._rule(group), self.around, _shape(array)).elementwise
            for group in self.param_groups
            for name, array in group["params"].items()
        }
        self.plan = divide(
            [math.prod(_shape(array)) for array in self._params.values()],
            collectives.size,
            whole=[place for place, name in enumerate(self._names) if not cuttable[name]],
            widths=[SIZES[buffers.dtype(array)] for array in self._params.values()],
        )

    def step(self, grads: Sequence[Any] | Mapping[str, Any]) -> None:
        """Update every parameter that has a gradient; all workers do it together.

        Args:
            grads: This worker's gradients, as `portopt.Optimizer.step` takes them: for each
                parameter one of its shape and dtype, or None, then on all workers.

        Raises:
            TypeError, ValueError: a gradient is missing, unknown, or of another shape or dtype, or
                not there on all workers, or a group's hyperparameter is not allowed, or what is in
                ``state`` does not fit, or a parameter has become read-only; nothing is changed
                then.
            ArithmeticError: a scalar is no real number; nothing is changed then.
            RuntimeError: another worker cannot make the step; parameters and states are unchanged.
        """
        given = self._checked(grads)
        rules = [self._rule(group) for group in self.param_groups]
        self._agree(given)
        pieces = self._averaged(given)
        values = vars(self.around)
        finite = True
        if self.around.needs_norm:
            present = {place for place, name in enumerate(given) if given[name] is not None}
            norm = grad_norm(
                pieces,
                list(self._params.values()),
                self.plan,
                self.collectives,
                self.buffers,
                scattered=present if self.average and self.stage == 2 else (),
            )
            values = values | {"grad_norm": norm}
            finite = math.isfinite(norm) or not self.around.skip_nonfinite
        if finite:
            parts = self._together(lambda: self._parts(rules, pieces, values))
            self._update(parts)
            self._gather(given)
        for grad in given.values() if self.around.zero_grad else ():
            if grad is not None:
                self.buffers.fill(grad, 0.0)  # all of it, which a kernel on spans would not

    def _agree(self, given: Mapping[Name, Any]) -> None:
        """Check that all workers have gradients of the same parameters: they exchange these."""
        here = np.array([grad is not None for grad in given.values()], np.float64)
        count = self.collectives.all_reduce(here)
        for name, workers in zip(given, count, strict=True):
            if 0 < workers < self.collectives.size:
                raise ValueError(
                    f"grads[{name!r}] must be None on all workers or on none, is an array on "
                    f"{workers:g} of {self.collectives.size}"
                )

    def _together(self, prepare: Callable[[], T]) -> T:
        """Do what may fail before anything is changed; all workers go on, or none."""
        result, failure = None, None
        try:
            result = prepare()
        except Exception as error:
            failure = error
        failed = self.collectives.all_reduce(np.array([failure is not None], np.float64)).item()
        if failure is not None:
            raise failure
        if failed:
            raise RuntimeError(
                f"the step is not made, as {failed:g} of the other workers cannot: parameters and "
                "states are unchanged"
            )
        return cast(T, result)

    def _averaged(self, given: Mapping[Name, Any]) -> dict[Span, Any]:
        """The averaged gradients that this worker may see, as pieces."""
        spans = self._with_grad(self.plan.spans, given)
        pieces = self._cut(given, spans)
        rank = self.collectives.rank
        if self.average:
            pieces[rank] = self.collectives.reduce_scatter(pieces)
            if self.stage == 2:
                return dict(zip(spans[rank], pieces[rank], strict=True))
            pieces = self.collectives.all_gather(pieces)
        return {
            span: piece
            for some, theirs in zip(spans, pieces, strict=True)
            for span, piece in zip(some, theirs, strict=True)
        }

    def _parts(
        self, rules: Sequence[Rule], pieces: Mapping[Span, Any], values: Mapping[str, Any]
    ) -> list[_Part]:
        """What this worker has to do; changes nothing."""
        around = replace(self.around, zero_grad=False)
        mine = {self._names[s.tensor]: s for s in self.plan.spans[self.collectives.rank]}
        parts: list[_Part] = []
        for rule, group in zip(rules, self.param_groups, strict=True):
            fixed, known = {**values, **vars(rule)}, {}
            for name, array in group["params"].items():
                span = mine.get(name)
                if span is None or span not in pieces:
                    continue
                whole = span.length == self.plan.sizes[span.tensor]
                shape = _shape(array) if whole else (span.length,)
                param, grad = (
                    self.buffers.shaped(piece, shape)
                    for piece in (self.buffers.cut(array, *span[1:]), pieces[span])
                )
                program = trace(rule, around, _shape(array))
                state = self._state(name, rule, program, param, shape)
                state["step"] += 1
                own = {number: state[number] for number in program.numbers}
                key = (program, state["step"], *own.values())
                if key not in known:  # once for all parameters that share it
                    known[key] = program.scalars(fixed | own, state["step"])
                state |= rounded(program.kept(known[key]), self.buffers.dtype(array))
                arrays = {"param": param, "grad": grad, **state}
                operands = {operand: arrays[operand] for operand in program.operands}
                parts.append(_Part(name, span, state, Work(program, known[key], operands)))
        return parts

    def _update(self, parts: Sequence[_Part]) -> None:
        results = self.buffers.run([part.work for part in parts])
        for (name, span, state, work), new in zip(parts, results, strict=True):
            self.state[name] = state | {slot: new[slot] for slot in work.program.slots}
            if new["param"] is not work.operands["param"]:
                flat = self.buffers.shaped(new["param"], (span.length,))
                self.buffers.write(self._params[name], span.start, flat)

    def _state(
        self, name: Name, rule: Rule, program: Program, param: Any, shape: Any
    ) -> dict[str, Any]:
        """A span's state with just the slots that the program has now.

        Raises:
            TypeError, ValueError: what is there does not fit, by somebody else's hand.
        """
        entries = self.state.get(name, {})
        shapes = {AVERAGE: shape, **rule.slot_shapes(shape)}

        def begin(slot: str) -> Any:
            value = initial(rule, slot)
            if value is PARAM:
                return self.buffers.copy(param)
            return self.buffers.full(param, shapes[slot], value)

        for slot in (slot for slot in program.slots if slot in entries):
            what = f"state[{name!r}][{slot!r}]"
            self.buffers.check(what, entries[slot])
            if _shape(entries[slot]) != shapes[slot]:
                wanted, got = shapes[slot], _shape(entries[slot])
                raise ValueError(f"{what} must have shape {wanted}, has {got}")
        step = checked_step(f"state[{name!r}]['step']", entries.get("step", 0))
        slots = {slot: entries[slot] if slot in entries else begin(slot) for slot in program.slots}
        first = {name: rule.initial(name) for name in program.numbers if name not in entries}
        kept = {name: float(entries[name]) for name in program.numbers if name in entries}
        return {"step": step, **kept, **rounded(first, self.buffers.dtype(param)), **slots}

    def _gather(self, given: Mapping[Name, Any]) -> None:
        """Send the new parameters of this worker's spans, and receive the others'."""
        spans = self._with_grad(self.plan.spans, given)
        pieces = self._cut(self._params, spans)
        for rank, theirs in enumerate(self.collectives.all_gather(pieces)):
            for span, before, now in zip(spans[rank], pieces[rank], theirs, strict=True):
                if rank != self.collectives.rank and now is not before:
                    self.buffers.write(self._params[self._names[span.tensor]], span.start, now)

    def _with_grad(
        self, spans: Iterable[Iterable[Span]], given: Mapping[Name, Any]
    ) -> list[list[Span]]:
        """For each rank, those of its spans whose parameter has a gradient."""
        return [
            [span for span in some if given[self._names[span.tensor]] is not None] for some in spans
        ]

    def _cut(self, arrays: Mapping[Name, Any], spans: Iterable[Iterable[Span]]) -> list[list[Any]]:
        return [
            [
                self.buffers.cut(arrays[self._names[tensor]], start, length)
                for tensor, start, length in some
            ]
            for some in spans
        ]

    def _groups(self, params: Any) -> list[dict[str, Any]]:
        grouped = isinstance(params, Sequence) and params and isinstance(params[0], Mapping)
        groups: list[dict[str, Any]] = []
        names: dict[int, Name] = {}  # by the identity of their arrays
        for group in params if grouped else [{"params": params}]:
            if not isinstance(group, Mapping) or "params" not in group:
                raise TypeError(f'a group must be a dict with "params", got {group!r}')
            arrays = group["params"]
            if not isinstance(arrays, Mapping):
                arrays = dict(enumerate(arrays, len(names)))
            for name, array in arrays.items():
                self.buffers.check(f"params[{name!r}]", array)
                if name in names.values() or id(array) in names:
                    other = names.get(id(array), name)
                    raise ValueError(f"params[{name!r}] is there already, as params[{other!r}]")
                names[id(array)] = name
            rule = self._rule(group)
            groups.append({"params": dict(arrays), **rule.values()})
        if not names:
            raise ValueError("params must hold at least one array, got none")
        return groups

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return self.rule.changed({key: x for key, x in group.items() if key != "params"})

    def _checked(self, grads: Any) -> dict[Name, Any]:
        if not isinstance(grads, Mapping | Sequence):
            raise TypeError(f"grads must be a sequence or a dict, got {type(grads).__name__}")
        named = dict(grads) if isinstance(grads, Mapping) else dict(enumerate(grads))
        if set(named) != set(self._names):
            raise ValueError(f"grads must be for {self._names}, got {list(named)}")
        for name, grad in named.items():
            if grad is not None:
                param = self._params[name]
                self.buffers.check(f"params[{name!r}]", param)  # which may have become read-only
                expected = _shape(param), self.buffers.dtype(param)
                if not hasattr(grad, "dtype"):
                    raise TypeError(f"grads[{name!r}] must be an array, got {grad!r}")
                if (_shape(grad), self.buffers.dtype(grad)) != expected:
                    raise ValueError(
                        f"grads[{name!r}] must have shape {expected[0]} and dtype {expected[1]} "
                        f"like its parameter, got {_shape(grad)} and {self.buffers.dtype(grad)}"
                    )
                if self.around.zero_grad and not self.buffers.writable(grad):
                    raise ValueError(f"grads[{name!r}] must be writable for zero_grad, is not")
        return {name: named[name] for name in self._names}


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)
