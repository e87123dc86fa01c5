"""The plain way: a program run by PyTorch's own operations, on one tensor or on lists of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from array_api_compat import torch as xp
from torch import Tensor

from portopt.arrays import FUNCTIONS, STORAGE_DTYPES, compute_dtype
from portopt.program import OPS, Program
from portopt.rules import Rule, Slots

_COMPUTE_DTYPES: dict[torch.dtype, torch.dtype] = {
    getattr(torch, storage): getattr(torch, compute_dtype(storage)) for storage in STORAGE_DTYPES
} | {
    torch.complex32: torch.float32,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}


class Member(NamedTuple):
    """One parameter that is to be updated.

    Attributes:
        place: Its place among all parameters of the optimizer.
        group: The place of its group.
        param: The parameter, which has a gradient.
        state: Its state, with every slot, and with "step" if steps are counted.
        program: What updates it.
        shapes: Those of its slots, if its rule looks at shapes.
        first: Whether this is its first step.
        way: How it is updated: by "kernel", "foreach" (along with others, by lists of tensors),
            "rows" (those alone that its sparse gradient has) or "plain".
        takes_turns: Whether it must be updated by itself, as it shares memory with another.
    """

    place: int
    group: int
    param: Tensor
    state: dict[str, Any]
    program: Program
    shapes: Mapping[str, tuple[int, ...]]
    first: bool
    way: str
    takes_turns: bool


try:  # to hide a call from PyTorch's compiler takes longer than to ask whether it looks at any
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as watcher
except ImportError:

    def watcher() -> object:
        """What looks at every call; None if nothing does."""
        return True


class Scalars:
    """The scalar part of a program, evaluated once for all parameters of one step count.

    Args:
        program: The program.
        values: What `Program.scalars` asks for: numbers, or tensors of one element.
        on_device: Whether the scalars must be tensors, as a graph must see them.
    """

    def __init__(self, program: Program, values: Mapping[str, Any], on_device: bool) -> None:
        self.program, self.values, self.on_device = program, values, on_device
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def at(self, t: Any, numbers: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
        """The scalars of step ``t`` from the rule's numbers; what is a tensor has ``dtype``."""
        key = (t, *numbers.values(), dtype)
        if key not in self._known:
            number = as_scalar if self.on_device or torch.is_grad_enabled() else host
            values = {name: number(self.values[name]) for name in self.program.hyperparameters}
            values |= {name: number(value) for name, value in numbers.items()}
            scalars = self.program.scalars(values, number(t), as_scalar)
            self._known[key] = {
                name: s.to(dtype) if torch.is_tensor(s) else s for name, s in scalars.items()
            }
        return self._known[key]


def update(scalars: Scalars, members: Iterable[Member]) -> None:
    """Update parameters of one group and program, each that may be along with others like it."""
    alike: dict[Any, tuple[dict[str, Any], list[Member]]] = {}
    for member in members:
        t: Any = 1 if member.first else 2  # all that a rule without a count may ask
        numbers = {name: member.state[name] for name in scalars.program.numbers}
        if "step" in member.state:
            member.state["step"] += 1
            t = member.state["step"] if scalars.on_device else int(member.state["step"].item())
        if not scalars.on_device:
            numbers = {name: host(value) for name, value in numbers.items()}
        own = scalars.at(t, numbers, _COMPUTE_DTYPES[member.param.dtype])
        key = (id(own), member.param.dtype, member.param.device)
        together = member.way == "foreach" and not member.takes_turns
        key += () if together else (member.place,)
        alike.setdefault(key, (own, []))[1].append(member)
        for name, value in scalars.program.kept(own).items():  # at once: it may stand here twice
            member.state[name].copy_(torch.as_tensor(value))
    for own, some in alike.values():
        if some[0].way == "rows":
            seen = torch.compiler.is_compiling() or watcher() is not None
            update = _update_rows_unseen if seen else _update_rows
            update(scalars.program, own, some[0])
        else:
            _update(scalars.program, own, some)


def _update(program: Program, scalars: Mapping[str, Any], members: Sequence[Member]) -> None:
    stored = {name: [_operand(member, name) for member in members] for name in program.operands}
    dtype = _COMPUTE_DTYPES[members[0].param.dtype]
    # Autograd may keep what the rule read, and what it read is about to be written.
    copy = torch.is_grad_enabled()
    read = {
        name: [_real(x).to(dtype, copy=copy) for x in tensors] for name, tensors in stored.items()
    }
    with _in_full_precision(members[0].param.device.type):
        if len(members) == 1:
            one = program.run(xp, scalars, {name: tensors[0] for name, tensors in read.items()})
            new = {name: [value] for name, value in one.items()}
        else:
            lists = {name: TensorList(tensors) for name, tensors in read.items()}
            new = {k: v.tensors for k, v in program.run(_Functions(), scalars, lists).items()}
    for name, values in new.items():
        for tensor, value in zip(stored[name], values, strict=True):
            tensor.copy_(torch.view_as_complex(value) if tensor.is_complex() else value)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# PyTorch's compiler before 2.12 cannot look into it. This is what
# torch.compiler.assume_constant_result sets, whose import takes a second.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _in_full_precision(device_type: str) -> Any:
    """Keep ``torch.autocast`` from multiplying matrices in a half type."""
    if not _has_autocast(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _update_rows(program: Program, scalars: Mapping[str, Any], member: Member) -> None:
    """Update what a sparse gradient speaks of as if there were nothing else."""
    stored = {name: _operand(member, name) for name in program.operands}
    grad = stored.pop("grad").coalesce()
    rows, dtype = tuple(grad.indices()), _COMPUTE_DTYPES[member.param.dtype]
    read = {"grad": grad.values(), **{name: tensor[rows] for name, tensor in stored.items()}}
    new = program.run(xp, scalars, {name: _real(x).to(dtype) for name, x in read.items()})
    for name, value in new.items():
        whole = torch.view_as_complex(value) if stored[name].is_complex() else value
        stored[name][rows] = whole.to(stored[name].dtype)


_update_rows_unseen = torch._disable_dynamo(_update_rows)  # which does not know sparse tensors


def switch(rule: Rule, param: Tensor, state: Mapping[str, Any], *, training: bool) -> None:
    """Give a parameter the values that its rule trains, or else those to evaluate."""
    dtype = _COMPUTE_DTYPES[param.dtype]
    slots = {slot: _real(state[slot]).to(dtype) for slot in rule.slots}
    rule = type(rule).unchecked(**{name: host(value) for name, value in vars(rule).items()})
    to = rule.trained if training else rule.evaluated
    new: Any = to(xp, _real(param).to(dtype), Slots(slots))
    param.copy_(torch.view_as_complex(new) if param.is_complex() else new)


_FOREACH: dict[str, Callable[..., Any]] = {
    "add": torch._foreach_add,
    "sub": torch._foreach_sub,
    "mul": torch._foreach_mul,
    "div": torch._foreach_div,
    "neg": torch._foreach_neg,
    "abs": torch._foreach_abs,
    "exp": torch._foreach_exp,
    "log": torch._foreach_log,
    "sign": torch._foreach_sign,
    "sqrt": torch._foreach_sqrt,
    "maximum": torch._foreach_maximum,
    "minimum": torch._foreach_minimum,
}
"""What PyTorch does to all tensors of a list at once."""


class TensorList:
    """Tensors of one dtype and device as one array of the protocol."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __add__(self, other: Any) -> TensorList:
        return _apply("add", self, other)

    def __radd__(self, other: Any) -> TensorList:
        return _apply("add", self, other)

    def __sub__(self, other: Any) -> TensorList:
        return _apply("sub", self, other)

    def __rsub__(self, other: Any) -> TensorList:
        return _apply("sub", other, self)

    def __mul__(self, other: Any) -> TensorList:
        return _apply("mul", self, other)

    def __rmul__(self, other: Any) -> TensorList:
        return _apply("mul", self, other)

    def __truediv__(self, other: Any) -> TensorList:
        return _apply("div", self, other)

    def __rtruediv__(self, other: Any) -> TensorList:
        return _apply("div", other, self)

    def __matmul__(self, other: TensorList) -> TensorList:
        return _apply("matmul", self, other)

    def __neg__(self) -> TensorList:
        return _apply("neg", self)

    def __abs__(self) -> TensorList:
        return _apply("abs", self)

    def __lt__(self, other: Any) -> TensorList:
        return _apply("less", self, other)

    def __gt__(self, other: Any) -> TensorList:
        return _apply("less", other, self)


class _Functions:
    """The namespace of `TensorList`."""

    def sum(self, x: TensorList, axis: int | None = None, keepdims: bool = False) -> TensorList:
        return _apply("sum", x) if axis is None else _apply("sum_axis", x, axis)

    def __getattr__(self, name: str) -> Callable[..., TensorList]:
        if name not in FUNCTIONS:
            raise AttributeError(f"the array protocol has no {name!r}")
        return lambda *operands: _apply(name, *operands)


def _apply(op: str, *operands: Any) -> TensorList:
    """An operation on lists and scalars: at once if PyTorch can, else tensor by tensor."""
    together = _FOREACH.get(op)
    plain = [x.tensors if isinstance(x, TensorList) else x for x in operands]
    if together and isinstance(plain[0], Sequence) and not any(map(torch.is_tensor, plain)):
        return TensorList(together(*plain))
    rows = zip(*(x if isinstance(x, Sequence) else repeat(x) for x in plain), strict=False)
    return TensorList([OPS[op].meaning(xp, *row) for row in rows])


def host(value: Any) -> Any:
    """A number on the host."""
    return value.item() if torch.is_tensor(value) else value


def as_scalar(value: Any) -> Any:
    """A number, in float64, and a tensor if it is one."""
    return value.double().reshape(()) if torch.is_tensor(value) else float(value)


def _operand(member: Member, name: str) -> Tensor:
    own = {"param": member.param, "grad": member.param.grad}
    found: Tensor = own[name] if name in own else member.state[name]
    return found.to_dense() if found.is_sparse and member.way != "rows" else found


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def check_dtype(dtype: torch.dtype) -> None:
    """Raise a TypeError if parameters of ``dtype`` cannot be updated."""
    if dtype not in _COMPUTE_DTYPES:
        raise TypeError(
            f"parameters with a gradient must be of {', '.join(STORAGE_DTYPES)} or complex numbers "
            f"of these, got {dtype}"
        )
