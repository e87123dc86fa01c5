"""The ways of parameters: which go through a kernel, which along with others, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from portopt.kernels import cpu, slow
from portopt.program import Program
from portopt.rules import Around
from portopt_torch import cuda
from portopt_torch.launch import STORAGE, gradient, storage
from portopt_torch.layout import lie_alike
from portopt_torch.plain import check_dtype

if TYPE_CHECKING:
    from portopt_torch.optimizer import Optimizer

Shape: TypeAlias = "tuple[int, ...]"


def way_of(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    program: Program,
    shapes: Mapping[str, Shape],
    param: Tensor,
    *,
    compiling: bool = False,
) -> str:
    """How ``param``, which has a gradient, is updated: a `Member.way`; changes nothing.

    Args:
        optimizer: Its optimizer.
        group: Its group.
        program: What updates it.
        shapes: Those of its slots, if its rule looks at shapes.
        param: It.
        compiling: Whether ``torch.compile`` is to see the plain way.

    Raises:
        RuntimeError: its gradient is sparse where that is not possible, a slot has another shape
            than it should, a number of steps is no tensor, or ``fused=True`` cannot be.
        TypeError: its dtype is none that can be updated.
    """
    grad, state = gradient(param), optimizer.state.get(param, {})
    check_dtype(param.dtype)
    _check_sparse(optimizer, group, grad)
    if shapes and param.is_complex():
        raise RuntimeError(f"{type(optimizer).__name__} does not support complex parameters")
    kept = {slot: state[slot] for slot in program.slots if state.get(slot) is not None}
    for slot, value in kept.items():
        shape = shapes.get(slot, param.shape)
        if value.shape != shape:
            what = "the shape" if shape is not param.shape else "its parameter's shape"
            raise RuntimeError(f"{slot} must have {what} {tuple(shape)}, has {tuple(value.shape)}")
    for name in ("step", *program.numbers):
        if not isinstance(state.get(name), Tensor | None):
            raise RuntimeError(
                f"state[{name!r}] must be a tensor of one number, is {state[name]!r}"
            )
    fused = group.get("fused")
    if grad.is_sparse:
        if fused:
            raise RuntimeError("`fused=True` is not possible: a gradient is sparse")
        return "plain" if group.get("momentum") else "rows"  # whose buffer goes on everywhere
    asked = _asked(group, param, compiling=compiling)
    if asked is not None:
        return asked
    in_order = [value for value in kept.values() if lie_alike(value, param)]
    counts = [state[name] for name in ("step", *program.numbers) if state.get(name) is not None]
    why = _refusal([param, grad, *in_order], counts)  # the others will be
    if not program.elementwise:
        why = f"{program.rule} does not update each element by itself"
    if why is None:
        return "kernel"
    if fused:
        raise RuntimeError(f"`fused=True` is not possible: {why}")
    if program.elementwise:
        slow.warn("portopt_torch", why)
    return _beside(param)


def waits(optimizer: Optimizer, group: Mapping[str, Any], program: Program, param: Tensor) -> bool:
    """Whether ``param`` lacks nothing but a gradient to go through a kernel.

    Where the device counts its steps it does: the host says there which have one.
    """
    names = [*program.slots, *program.numbers, *(["step"] if optimizer.keeps_step else [])]
    own = optimizer.state.get(param, {})
    is_frozen = not (param.requires_grad or own)  # and may never have one
    if is_frozen or not all(torch.is_tensor(own.get(name)) for name in names):
        return False
    slots = [own[name] for name in program.slots]
    counts = [own[name] for name in names if name not in program.slots]
    return (
        program.elementwise
        and _asked(group, param) is None
        and not any(count.is_cuda for count in counts)
        and _refusal([param, *slots], counts) is None
    )


def _asked(group: Mapping[str, Any], param: Tensor, *, compiling: bool = False) -> str | None:
    """The way that flags ask for; None for a kernel, where that is possible."""
    foreach, fused = group.get("foreach"), group.get("fused")
    if compiling or group.get("differentiable"):
        return "plain"
    if not fused and foreach is not None:
        return "foreach" if foreach else "plain"
    return _beside(param) if fused is False else None


def _beside(param: Tensor) -> str:
    """The way of one that does not go through a kernel."""
    return "foreach" if param.is_cuda else "plain"


def _check_sparse(optimizer: Optimizer, group: Mapping[str, Any], grad: Tensor) -> None:
    """Raise a RuntimeError, in the natives' words, if the gradient is of the wrong kind."""
    name = type(optimizer).__name__
    if not grad.is_sparse:
        if optimizer.sparse == "only":
            raise RuntimeError(
                f"{name} does not support dense gradients, please consider Adam instead"
            )
        return
    if optimizer.sparse == "no":
        raise RuntimeError(f"{name} does not support sparse gradients")
    if group.get("weight_decay"):
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")
    if optimizer.around != Around():
        raise RuntimeError("around is not compatible with sparse gradients")


def _refusal(tensors: Sequence[Tensor], counts: Sequence[Tensor]) -> str | None:
    """Why the operands of one parameter cannot go through a kernel; None if they can.

    Args:
        tensors: The parameter, its gradient and its slots.
        counts: Its number of steps and the rule's numbers, as far as they are there.
    """
    param = tensors[0]
    places = (param.device, torch.device("cpu"))
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return f"a tensor is a {type(tensor).__name__} of layout {tensor.layout}"
        if tensor.device.type not in ("cpu", "cuda") or tensor.device != param.device:
            return f"a tensor is on device {tensor.device}"
        if tensor.dtype not in STORAGE:
            return f"a tensor has dtype {tensor.dtype}"
        if tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor():
            return "a tensor is a lazy conjugate or negative, or zeros without memory"
        if tensor is param and not cpu.is_dense(param.shape, param.stride()):
            return "a parameter has gaps in its memory"
        if tensor.shape != param.shape or not lie_alike(tensor, param):
            return "a gradient or slot lies otherwise in memory than its parameter"
    for count in counts:
        if not (count.is_floating_point() and count.device in places):
            return f"a number of steps is a {count.dtype} on device {count.device}"
        is_single = count.untyped_storage().nbytes() == count.itemsize
        if is_single and not count.is_cuda and count.is_shared():
            return "a number of steps is in memory that processes share"
    if param.is_cuda:
        return cuda.refusal(storage(tensors))
    return cpu.refusal(storage(tensors))


def overlapping(params: Iterable[Tensor]) -> set[int]:
    """Those that share memory with another, or stand there twice."""
    found: set[int] = set()
    end, holder = 0, 0
    for param in sorted(filter(has_address, params), key=Tensor.data_ptr):
        begin = param.data_ptr()
        if begin < end:
            found |= {holder, id(param)}
        if begin + extent(param) > end:
            end, holder = begin + extent(param), id(param)
    return found


def has_address(tensor: Tensor) -> bool:
    """Whether it can be asked where its elements are."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type in ("cpu", "cuda")


def extent(tensor: Tensor) -> int:
    """How many bytes there are from the first element's begin to the last one's end."""
    if tensor.is_contiguous():
        return tensor.nbytes
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * (1 + sum((size - 1) * stride for size, stride in pairs))
