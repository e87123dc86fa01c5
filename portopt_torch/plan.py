"""Plans: which parameters go through kernels, and which the plain way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from portopt.kernels import cpu
from portopt.program import Program
from portopt.rules import Around
from portopt_torch import cuda
from portopt_torch.launch import STORAGE, Batch, CudaBatch, gradient, storage
from portopt_torch.plain import Member, check_dtype, host

if TYPE_CHECKING:
    from portopt_torch.optimizer import Optimizer


class Plan(NamedTuple):
    """What a step launches, as long as nothing but the gradients moves.

    Attributes:
        programs: For each group, its program.
        params: All parameters.
        present: For each parameter, whether it has a gradient.
        states: All states, by their identities: the batches keep them alive.
        batches: The launches.
        rest: Those that do not go through a kernel.
    """

    programs: list[Program]
    params: list[Tensor]
    present: list[bool]
    states: list[int]
    batches: list[Batch]
    rest: list[Member]

    def fits(
        self, programs: list[Program], groups: list[dict[str, Any]], state: Mapping[Any, Any]
    ) -> bool:
        """Whether it holds for these as well; notes where the gradients are now."""
        params = [param for group in groups for param in group["params"]]
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        grads = [param.grad for param in params]
        return (
            all(map(is_, programs, self.programs))
            and [grad is not None for grad in grads] == self.present
            and [*map(id, state.values())] == self.states
            and all(batch.fits(grads) for batch in self.batches)
        )

    def zero_grads(self, around: Around) -> None:
        """Do after a step that is skipped what it would have done to the gradients."""
        grads = [param.grad for param in self.params if param.grad is not None]
        if around.zero_grad:
            torch._foreach_zero_(grads)

    @property
    def on_device(self) -> bool:
        """Whether the host knows nothing of the steps, so that nothing may ask it to wait."""
        return bool(self.batches) and not self.rest and all(b.on_device for b in self.batches)

    def grad_norm(self) -> Any:
        """The 2-norm of all gradients together: a number, or a tensor of one on the device."""
        total: Any = sum(batch.sum_squares() for batch in self.batches)
        for member in self.rest:
            grad = gradient(member.param)
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            total = total + torch.linalg.vector_norm(real, dtype=torch.float64).square()
        return total.sqrt() if self.on_device else math.sqrt(host(total))


def make_plan(optimizer: Optimizer, programs: list[Program], *, compiling: bool) -> Plan:
    """Give every parameter with a gradient its state, and its way to go.

    Args:
        optimizer: The optimizer, whose state gets what it lacks.
        programs: For each of its groups, the program.
        compiling: Whether ``torch.compile`` is to see the plain way.

    Raises:
        RuntimeError: a gradient is sparse, or ``fused=True`` cannot be; nothing is changed then.
        TypeError: a parameter's dtype is none that can be updated; nothing is changed then.
    """
    groups, state, keeps_step = optimizer.param_groups, optimizer.state, optimizer.keeps_step
    params = [(g, param) for g, group in enumerate(groups) for param in group["params"]]
    ways = {}
    for place, (g, param) in enumerate(params):
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
        check_dtype(param.dtype)
        kept = state.get(param, {})
        ways[place] = "plain" if compiling else _way(groups[g], programs[g].slots, param, kept)
    alike: dict[Any, list[Member]] = {}
    rest: list[Member] = []
    seen: set[int] = set()  # what stands there twice is updated twice, one after the other
    for place, way in ways.items():
        g, param = params[place]
        slots = programs[g].slots
        own = state[param] if slots or keeps_step else {}
        first = all(own.get(slot) is None for slot in slots)
        if keeps_step and "step" not in own:
            own["step"] = zero_steps(groups[g], param)
        add_slots(own, slots, param)
        member = Member(place, g, param, own, first, way == "foreach")
        if way != "kernel" or id(param) in seen:
            rest.append(member)
            continue
        seen.add(id(param))
        stored = [param, gradient(param), *(own[slot] for slot in slots)]
        counted = [own["step"]] if keeps_step else []
        where = param.device, *(step.device for step in counted)
        alike.setdefault((programs[g], *where, *storage(stored + counted)), []).append(member)
    return Plan(
        programs=programs,
        params=[param for _, param in params],
        present=[param.grad is not None for _, param in params],
        states=[*map(id, state.values())],
        batches=[
            (CudaBatch if device.type == "cuda" else Batch)(program, members)
            for (program, device, *_), members in alike.items()
        ],
        rest=rest,
    )


def zero_steps(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """A count of steps as ``torch.optim`` keeps it."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    beside = group.get("capturable") or group.get("fused")
    return torch.zeros((), dtype=dtype, device=param.device if beside else "cpu")


def add_slots(state: dict[str, Any], slots: tuple[str, ...], param: Tensor) -> None:
    """Give ``state`` the slots that it lacks, and all of them the order of ``param`` in memory."""
    for slot in slots:
        old = state.get(slot)
        if old is None:
            state[slot] = torch.zeros_like(param, memory_format=torch.preserve_format)
        elif old.stride() != param.stride():  # as a native's may be, which copies the gradient
            state[slot] = torch.empty_like(param, dtype=old.dtype).copy_(old)


def _way(
    group: Mapping[str, Any], slots: tuple[str, ...], param: Tensor, state: Mapping[str, Any]
) -> str:
    """How ``param`` is updated: by "kernel", "foreach", or "plain"."""
    foreach, fused = group.get("foreach"), group.get("fused")
    if group.get("differentiable"):
        return "plain"
    if not fused and foreach is not None:
        return "foreach" if foreach else "plain"
    other = "foreach" if param.is_cuda else "plain"
    if fused is False:
        return other
    kept = [state[slot] for slot in slots if state.get(slot) is not None]
    in_order = [slot for slot in kept if slot.stride() == param.stride()]  # the others will be
    why = _refusal([param, gradient(param), *in_order], state.get("step"))
    if why is None:
        return "kernel"
    if fused:
        raise RuntimeError(f"`fused=True` is not possible: {why}")
    _warn(why)
    return other


def _refusal(tensors: Sequence[Tensor], step: Tensor | None) -> str | None:
    """Why the operands of one parameter cannot go through a kernel; None if they can.

    Args:
        tensors: The parameter, its gradient and its slots.
        step: Its number of steps, if there is one.
    """
    param = tensors[0]
    places = (param.device, torch.device("cpu"))
    if step is not None and not (step.is_floating_point() and step.device in places):
        return f"a number of steps is a {step.dtype} on device {step.device}"
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return f"a tensor is a {type(tensor).__name__} of layout {tensor.layout}"
        if tensor.device.type not in ("cpu", "cuda") or tensor.device != param.device:
            return f"a tensor is on device {tensor.device}"
        if tensor.dtype not in STORAGE:
            return f"a tensor has dtype {tensor.dtype}"
        if tensor.is_conj() or tensor.is_neg():
            return "a tensor is a lazy conjugate or negative"
        if tensor.shape != param.shape or tensor.stride() != param.stride():
            return "a gradient or slot lies otherwise in memory than its parameter"
    if not cpu.is_dense(param.shape, param.stride()):
        return "a parameter has gaps in its memory"
    if param.is_cuda:
        return cuda.refusal(storage(tensors))
    return cpu.refusal(storage(tensors))


@cache
def _warn(why: str) -> None:
    """Say once that steps are slow, and why."""
    warnings.warn(f"portopt_torch updates parameters without a kernel, slowly: {why}", stacklevel=7)
