"""Plans: what a step launches, and what it updates the plain way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from portopt.kernels import cpu
from portopt.kernels.contents import Contents
from portopt.program import Program
from portopt.rules import Around, Rule
from portopt.rules.around import AVERAGE, initial
from portopt.rules.base import PARAM
from portopt.trace import specialized, trace
from portopt_torch.launch import Batch, CudaBatch, gradient, storage
from portopt_torch.layout import lie_alike, like
from portopt_torch.plain import Member, host
from portopt_torch.ways import Shape, extent, has_address, overlapping, waits, way_of

if TYPE_CHECKING:
    from portopt_torch.optimizer import Optimizer


class Asked(NamedTuple):
    """What an optimizer's groups, and what stands around their rules, ask for.

    Attributes:
        settings: What it was made of; nothing if some of that can change in itself.
        around: What stands around the rules.
        rules: For each group, the rule.
        programs: For each group, the program.
        values: For each group, what `Program.scalars` asks for, but the norm of the gradients.
        flags: For each group, what chooses its parameters' way.
    """

    settings: list[Any]
    around: Around
    rules: list[Rule]
    programs: list[Program]
    values: list[dict[str, Any]]
    flags: list[tuple[Any, ...]]


_SETTLED = (float, int, str, tuple, Tensor, torch.dtype, Around, type(None))
"""What is the same as long as it is the same object; of a tensor no more is asked before it is
used."""


def settings_of(optimizer: Optimizer, around: Around) -> list[Any]:
    """All that decides what is asked for, and what has the parameters and states."""
    settings: list[Any] = [around, optimizer.state]
    for group in optimizer.param_groups:
        settings += group.values()
        settings += [param.dtype for param in group["params"][:1]]
    return settings


def ask(optimizer: Optimizer, around: Around) -> Asked:
    """What the groups ask for now, with ``around`` around them.

    Raises:
        TypeError: a hyperparameter is no number.
    """
    groups = optimizer.param_groups
    values = (x for group in groups for name, x in group.items() if name != "params")
    settled = all(isinstance(value, _SETTLED) for value in values)
    rules = [cls.unchecked(**values) for cls, values in map(optimizer.rule_of, groups)]
    for rule in rules:
        _check_numbers(rule)
    return Asked(
        settings=settings_of(optimizer, around) if settled else [],
        around=around,
        rules=rules,
        programs=[trace(rule, around) for rule in rules],
        values=[vars(around) | vars(rule) for rule in rules],
        flags=_flags(groups),
    )


def _check_numbers(rule: Rule) -> None:
    for name in rule.hyperparameters():
        value = getattr(rule, name)
        is_one = hasattr(type(value), "__float__")
        if torch.is_tensor(value):
            is_one = value.numel() == 1 and not value.is_complex()
        if not is_one:
            raise TypeError(f"{name} must be a number, or a real tensor of one, got {value!r}")


class Plan(NamedTuple):
    """What a step launches, as long as nothing but the gradients moves, comes or goes.

    Attributes:
        asked: What it does.
        contents: The parameters of each group, and all states.
        params: All parameters.
        idle: Those of them that must have no gradient.
        batches: The launches.
        rest: Those that do not go through a kernel.
        rest_at: Where those begin.
        apart: Where the gradients were, if anywhere, when they were found to share no memory.
        made: Entries of states that this plan has made.
    """

    asked: Asked
    contents: Contents
    params: list[Tensor]
    idle: list[Tensor]
    batches: list[Batch]
    rest: list[Member]
    rest_at: list[int]
    apart: list[Any]
    made: list[tuple[Tensor, str]]

    def renewed(self, optimizer: Optimizer, around: Around) -> Plan | None:
        """The plan with what is asked for now, if that goes the same ways; else None."""
        last = self.asked
        settings = settings_of(optimizer, around)
        if len(settings) == len(last.settings) and all(map(is_, settings, last.settings)):
            return self
        asked = ask(optimizer, around)
        same = (
            asked.flags == last.flags
            and all(map(is_, asked.programs, last.programs))
            and self.contents.of(*_contents(optimizer))
        )
        return self._replace(asked=asked) if same else None

    def fits(self, optimizer: Optimizer) -> bool:
        """Whether it holds for this step as well; notes where the gradients are now.

        Raises:
            RuntimeError, TypeError: as `make_plan` does.
        """
        for batch in self.batches:  # before anyone else looks at memory
            if not batch.fits():
                return False
        if self.batches and not (self.idle or self.rest):  # as is usual
            return True
        return (
            (bool(self.batches) or self.contents.are())  # the first batch has looked at them
            and all(param.grad is None for param in self.idle)
            and all(self._still_rests(optimizer, member) for member in self.rest)
            and self.rest_at == _begins(self.rest)  # who shares memory takes turns
        )

    def _still_rests(self, optimizer: Optimizer, member: Member) -> bool:
        counts = ["step"] if optimizer.keeps_step else []
        needed = (*member.program.slots, *member.program.numbers, *counts)
        if member.param.grad is None or any(member.state.get(name) is None for name in needed):
            return False
        group = optimizer.param_groups[member.group]
        way = way_of(optimizer, group, member.program, member.shapes, member.param)
        return way == member.way

    def rest_alike(self) -> Iterable[tuple[tuple[int, Program], list[Member]]]:
        """What does not go through a kernel, by group and program."""
        alike: dict[tuple[int, Program], list[Member]] = {}
        for member in self.rest:
            alike.setdefault((member.group, member.program), []).append(member)
        return alike.items()

    def done(self) -> Plan:
        """The plan for the next step."""
        if not self.rest and not self.made:
            return self
        return self._replace(rest=[member._replace(first=False) for member in self.rest], made=[])

    def undo(self, optimizer: Optimizer) -> None:
        """Leave no trace of a step that is not to be."""
        for param, name in self.made:
            del optimizer.state[param][name]
            if not optimizer.state[param]:
                del optimizer.state[param]

    @torch.no_grad()
    def zero_grads(self) -> None:
        """Do after a step that is skipped what it would have done to the gradients."""
        if self.asked.around.zero_grad:
            torch._foreach_zero_([param.grad for param in self.params if param.grad is not None])

    def check_grads(self) -> None:
        """Raise a RuntimeError if zeros for one gradient would also be another's, still unread."""
        if not self.asked.around.zero_grad:
            return
        rest = [*filter(has_address, (gradient(member.param) for member in self.rest))]
        own = np.array([(x.data_ptr(), x.data_ptr() + extent(x)) for x in rest], np.uint64)
        begins = np.concatenate([*(x.places() for x in self.batches), own.reshape(-1, 2)[:, 0]])
        if not rest and self.apart and np.array_equal(self.apart[0], begins):
            return
        ends = [*(batch.grad_ends() for batch in self.batches), own.reshape(-1, 2)[:, 1]]
        found = np.stack([begins, np.concatenate(ends)])
        found = found[:, found[0] < found[1]]  # without what is empty, or not there
        begins_in_order, ends_in_order = found[:, np.argsort(found[0])]
        if (begins_in_order[1:] < np.maximum.accumulate(ends_in_order)[:-1]).any():
            raise RuntimeError(
                "with zero_grad no gradient may be that of two parameters, nor share their memory"
            )
        self.apart[:] = [begins]

    @property
    def on_device(self) -> bool:
        """Whether the host knows nothing of the steps, so that nothing may ask it to wait."""
        return bool(self.batches) and not self.rest and all(x.on_device for x in self.batches)

    @torch.no_grad()
    def grad_norm(self) -> Any:
        """The 2-norm of all gradients together: a number, or a tensor of one on the device."""
        sums = [batch.sum_squares() for batch in self.batches]
        if self.on_device:
            return torch.cat([one.to(sums[0].device) for one in sums]).sum().sqrt()
        found = [*chain.from_iterable(map(Tensor.tolist, sums))]
        for member in self.rest:
            grad = gradient(member.param)
            real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
            found.append(host(torch.linalg.vector_norm(real, dtype=torch.float64).square()))
        return cpu.norm(found)


def make_plan(optimizer: Optimizer, asked: Asked, *, compiling: bool) -> Plan:
    """Give every parameter with a gradient its state, and its way to go.

    Args:
        optimizer: The optimizer, whose state gets what it lacks.
        asked: What its groups ask for; a rule that looks at shapes has other programs for its
            parameters.
        compiling: Whether ``torch.compile`` is to see the plain way.

    Raises:
        RuntimeError: a gradient is sparse, or ``fused=True`` cannot be; nothing is changed then.
        TypeError: a parameter's dtype is none that can be updated; nothing is changed then.
    """
    groups, state, rules = optimizer.param_groups, optimizer.state, asked.rules
    params = [(g, param) for g, group in enumerate(groups) for param in group["params"]]
    ways: dict[int, str] = {}
    traced: dict[int, tuple[Program, Mapping[str, Shape]]] = {}
    waiting: dict[int, Tensor] = {}
    for place, (g, param) in enumerate(params):
        if param.grad is None and (compiling or rules[g].by_shape):
            continue
        shapes = shapes_of(rules[g], param)
        program = specialized(asked.programs[g], rules[g], asked.around, param.shape)
        if optimizer.into_grad:
            program = _into_grad(program)
        traced[place] = program, shapes
        if param.grad is not None:
            ways[place] = way_of(optimizer, groups[g], program, shapes, param, compiling=compiling)
        elif waits(optimizer, groups[g], program, param):
            waiting[place] = param
    together = [params[place] for place, way in ways.items() if way in ("kernel", "foreach")]
    present = [param for _, param in together]
    alone = overlapping(present)
    if waiting:
        overlap = overlapping([*present, *waiting.values()])
        ways |= {place: "kernel" for place, param in waiting.items() if id(param) not in overlap}
    if any(groups[g].get("fused") and id(param) in alone for g, param in together):
        raise RuntimeError("`fused=True` is not possible: two parameters share memory")
    alike: dict[Any, list[Member]] = {}
    rest: list[Member] = []
    made: list[tuple[Tensor, str]] = []
    for place, way in sorted(ways.items()):
        g, param = params[place]
        program, shapes = traced[place]
        slots = program.slots
        own = state[param] if slots or optimizer.keeps_step else {}
        lacking = [name for name in slots if own.get(name) is None]
        first = {*lacking} >= {*slots} - {AVERAGE}
        counts = (*(["step"] if optimizer.keeps_step else []), *program.numbers)
        for name in counts:
            if own.get(name) is None:
                lacking.append(name)
                own[name] = begin_count(name, rules[g], groups[g], param)
        made += [(param, name) for name in lacking]
        add_slots(own, rules[g], slots, param)
        takes_turns = id(param) in alone
        member = Member(place, g, param, own, program, shapes, first, way, takes_turns)
        if way != "kernel" or takes_turns:
            rest.append(member)
            continue
        stored = [param, like([param]), *(own[slot] for slot in slots)]
        places = [(own[name].device, own[name].dtype) for name in counts]
        key = (program, param.device, *places, param.is_complex(), storage(stored))
        alike.setdefault(key, []).append(member)
    contents = Contents(*_contents(optimizer))
    batches: list[Batch] = []
    for (program, device, *_), some in alike.items():
        kind = CudaBatch if device.type == "cuda" else Batch
        batches.append(kind(program, some, None if batches else contents))
    return Plan(
        asked=asked,
        contents=contents,
        params=[param for _, param in params],
        idle=[param for place, (_, param) in enumerate(params) if place not in ways],
        batches=batches,
        rest=rest,
        rest_at=_begins(rest),
        apart=[],
        made=made,
    )


def _begins(members: Sequence[Member]) -> list[int]:
    return [*map(Tensor.data_ptr, filter(has_address, (member.param for member in members)))]


def _contents(optimizer: Optimizer) -> tuple[list[list[Tensor]], Mapping[Tensor, Any]]:
    return [group["params"] for group in optimizer.param_groups], optimizer.state


def _flags(groups: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("foreach", "fused", "differentiable", "capturable")
    return [tuple(map(group.get, names)) for group in groups]


@cache
def _into_grad(program: Program) -> Program:
    """The same, but that the new parameter is written where the gradient is."""
    outputs = tuple(("grad" if name == "param" else name, new) for name, new in program.outputs)
    return replace(program, outputs=outputs)


def begin_count(name: str, rule: Rule, group: Mapping[str, Any], param: Tensor) -> Tensor:
    """The "step", or one of a rule's numbers, before the first step, as ``torch.optim`` has it."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    beside = group.get("capturable") or group.get("fused")
    value = 0.0 if name == "step" else host(rule.initial(name))
    # Under FakeTensorMode what torch.tensor makes keeps its value, and others have none.
    return torch.tensor(float(value), dtype=dtype, device=param.device if beside else "cpu")


def shapes_of(rule: Rule, param: Tensor) -> dict[str, Shape]:
    """The shapes of a parameter's slots, if its rule looks at shapes; else they have its own."""
    return rule.slot_shapes(tuple(param.shape)) if rule.by_shape else {}


def add_slots(state: dict[str, Any], rule: Rule, slots: tuple[str, ...], param: Tensor) -> None:
    """Give ``state`` the slots that it lacks, and all of them the order of ``param`` in memory."""
    shapes = shapes_of(rule, param)
    for slot in slots:
        old, shape = state.get(slot), shapes.get(slot, param.shape)
        if shape != param.shape:
            if old is None:
                state[slot] = param.detach().new_full(shape, host(initial(rule, slot)))
        elif old is None:
            state[slot] = _initial(initial(rule, slot), param)
        elif not lie_alike(old, param):  # as a native's may be, which copies the gradient
            state[slot] = torch.empty_like(param, dtype=old.dtype).copy_(old)


def _initial(value: Any, param: Tensor) -> Tensor:
    if value is PARAM:
        return param.detach().clone(memory_format=torch.preserve_format)
    number = host(value)
    if param.is_complex():  # two numbers
        number = complex(number, number)
    return torch.full_like(param, number, memory_format=torch.preserve_format)
