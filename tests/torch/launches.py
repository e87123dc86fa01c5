"""Launching Triton kernels on tensors with guards around them, and what NumPy makes of the same.

On the CPU that is Triton's interpreter, in a process of its own: it must be chosen before Triton is
imported.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context

import numpy as np
import torch
from bits import assert_bits
from support import assert_agree, gradients, weights
from torch import Tensor

from portopt.arrays import compute_dtype
from portopt.rules import Around

GUARD = 64  # elements on either side of a tensor
CANARY = -77.0
ALONE = Around()


class Guarded:
    """A copy of a 1-d tensor ``shift`` elements past an aligned address: ``inner``, with guards."""

    def __init__(self, tensor, shift, device):
        before, after = (tensor.new_full((size,), CANARY) for size in (GUARD + shift, GUARD))
        self.buffer = torch.cat([before, tensor, after]).to(device)
        self.parts = len(before), len(tensor), len(after)
        self.inner = self.buffer.split(self.parts)[1]

    def read(self):
        """The tensor, on the CPU; raises AssertionError if something was written outside."""
        before, inner, after = self.buffer.cpu().split(self.parts)
        guards = torch.cat([before, after]).double()
        outside = torch.full_like(guards, CANARY)
        assert_agree(guards, outside, "same", what="memory outside a tensor")
        return inner


def make_tensors(program, storage, sizes, seed=0):
    """For each size a dict of 1-d tensors on the CPU: the operands of ``program``."""
    tensors = []
    for number, size in enumerate(sizes, start=seed):
        values = {}
        for place, name in enumerate(program.operands):
            array = weights(size, seed=100 * number + place)
            values[name] = array * array if "sq" in name else array  # a mean of squares
        values["grad"] = next(gradients(size, 1, seed=number))
        tensors.append(
            {
                name: torch.from_numpy(array).to(getattr(torch, dtype))
                for (name, array), dtype in zip(values.items(), storage, strict=True)
            }
        )
    return tensors


def make_scalars(program, rule, t=1, around=ALONE):
    """The scalars of step ``t``."""
    kept = {name: rule.initial(name) for name in program.numbers}
    return program.scalars(vars(rule) | vars(around) | kept | {"grad_norm": 7.0}, t)


def whole(tensors, longest=1000):
    """Spans of all elements."""
    return [
        (number, start, min(longest, size - start))
        for number, size in enumerate(tensor["param"].numel() for tensor in tensors)
        for start in range(0, size, longest)
    ]


def launch(program, storage, tensors, scalars, spans, found_inf=None, shift=0, device="cpu"):
    """Run the kernel; returns the operands of each tensor afterwards, on the CPU.

    Args:
        shift: How many elements each operand begins further from an aligned address than the one
            before it.

    Raises:
        AssertionError: something was written outside the tensors.
    """
    from portopt.kernels import triton

    compute = getattr(torch, compute_dtype(storage[0]))
    rows = [[row[name] for name in program.scalar_names] for row in scalars]
    rows = torch.tensor(rows, dtype=torch.float64).to(device, compute)
    memory = [
        {
            name: Guarded(tensor, shift * place, device)
            for place, (name, tensor) in enumerate(operands.items())
        }
        for operands in tensors
    ]
    table = [
        [guarded.inner.data_ptr() for guarded in operands.values()] + [row.data_ptr()]
        for operands, row in zip(memory, rows, strict=True)
    ]
    table = torch.tensor(table, device=device)
    spans = torch.tensor(spans, dtype=torch.int64, device=device).reshape(-1, 3)
    flag = None if found_inf is None else torch.tensor([found_inf], device=device)
    triton.launch(program, storage, table, spans, flag)
    return [{name: guarded.read() for name, guarded in own.items()} for own in memory]


def square_sums(dtype, grads, spans, shift=0, device="cpu"):
    """Run the kernel of sums of squares; returns them."""
    from portopt.kernels import triton

    memory = [Guarded(grad, shift, device) for grad in grads]
    table = torch.tensor([[0, guarded.inner.data_ptr()] for guarded in memory], device=device)
    spans = torch.tensor(spans, dtype=torch.int64, device=device)
    sums = Guarded(torch.zeros(len(spans), dtype=torch.float64), 0, device)
    triton.launch_square_sums(dtype, table[:, 1], spans, sums.inner)
    for guarded, grad in zip(memory, grads, strict=True):
        assert_agree(guarded.read().double(), grad.double(), "same", what="gradient")
    return sums.read()


def run_steps(program, storage, tensors, grads, scalars, device="cpu"):
    """Steps of `portopt_torch.cuda.Step` and the norm's square before each; returns both.

    Args:
        grads: For each step a gradient for each tensor, in memory of its own, or None.
        scalars: For each step two results of `Program.scalars`: of the first tensor and of the
            others. At odd steps they come from the host, at even ones as tensors.
    """
    from portopt_torch import cuda

    copied = partial(Tensor.to, device=device, copy=True)  # a process shares what it is handed
    memory = [{name: copied(x) for name, x in operands.items()} for operands in tensors]
    grads = [[grad if grad is None else copied(grad) for grad in step] for step in grads]
    addresses = [[x.data_ptr() for x in operands.values()] for operands in memory]
    sizes = [operands["param"].numel() for operands in memory]
    step = cuda.Step(program, storage, addresses, sizes, torch.device(device))
    norm = cuda.SquareSum(storage[1], [row[1] for row in addresses], sizes, torch.device(device))
    squares = []
    for number, (moved, (first, others)) in enumerate(zip(grads, scalars, strict=True), start=1):
        places = [0 if grad is None else grad.data_ptr() for grad in moved]
        step.table[:, 1] = norm.table[:, 0] = places
        if number % 2:
            step.set([first, others], [0] + [1] * (len(sizes) - 1))
        else:
            step.set_on_device(slice(0, 1), first)
            many = {name: torch.full((len(sizes) - 1,), x).double() for name, x in others.items()}
            step.set_on_device(slice(1, None), {k: x.to(device) for k, x in many.items()})
        squares.append(float(norm.run().sum()))
        step.run()
    memory = [{name: x.cpu() for name, x in operands.items()} for operands in memory]
    return memory, squares


def train_by_triton(name, groups, grads, *, on_device, scale=None, skipped=(), **options):
    """Train an optimizer whose parameters go the way of CUDA's; returns them, and its state.

    Args:
        name: Its class.
        groups: Its groups, whose parameters are what they begin with.
        grads: For each step a gradient for each parameter, or None.
        on_device: Whether steps but the first are counted as on a device, where the host must not
            ask.
        scale: That of GradScaler, by which the gradients are multiplied.
        skipped: The steps before which it has found infinite ones.
        options: The class's arguments.
    """
    import portopt_torch.plan
    from portopt_torch.launch import CudaBatch

    portopt_torch.plan.Batch = CudaBatch
    params = [[torch.nn.Parameter(x.clone()) for x in group["params"]] for group in groups]
    groups = [{**group, "params": own} for group, own in zip(groups, params, strict=True)]
    optimizer = getattr(portopt_torch, name)(groups, **options)
    for number, step in enumerate(grads):
        for param, grad in zip(chain(*params), step, strict=True):
            param.grad = None if grad is None else grad * (scale or 1)
        optimizer.found_inf = torch.tensor(float(number in skipped)) if skipped else None
        optimizer.grad_scale = scale and torch.tensor(scale)
        optimizer.step()
        if on_device:
            for batch in optimizer._plan.batches:
                batch.on_device, batch.columns = True, {}
    return [param.detach() for param in chain(*params)], optimizer.state_dict()["state"]


def capture_by_triton():
    """Take a step whose number the host counts while, so it seems, a CUDA graph takes it in."""
    import portopt_torch.plan
    from portopt_torch import cuda
    from portopt_torch.launch import CudaBatch

    portopt_torch.plan.Batch, is_captured = CudaBatch, cuda.Launch.is_captured
    cuda.Launch.is_captured = lambda self: True
    try:
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        portopt_torch.Adam([param]).step()
    finally:
        cuda.Launch.is_captured = is_captured


def expected(program, storage, tensors, scalars, spans):
    """What `launch` must return: the program, operation by operation, on NumPy arrays."""
    dtype = compute_dtype(storage[0])
    results = [{name: tensor.clone() for name, tensor in operands.items()} for operands in tensors]
    for number, start, length in spans:
        part = slice(start, start + length)
        arrays = {
            name: tensor[part].to(getattr(torch, dtype)).numpy()
            for name, tensor in tensors[number].items()
        }
        with np.errstate(all="ignore"):
            for name, array in program.run(np, scalars[number], arrays).items():
                results[number][name][part] = torch.from_numpy(array)
    return results


def assert_same(actual, expected):
    """Raise unless all tensors are the same, bit for bit; a NaN is a NaN."""
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for name, tensor in ours.items():
            both = tensor.double().numpy(), theirs[name].double().numpy()
            assert_bits(*both, what=f"tensor {number}, {name}")


def interpreter():
    """A pool of one process, in which Triton's kernels run on the CPU."""
    return ProcessPoolExecutor(1, get_context("spawn"), _start)


def _start():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    from triton.runtime import interpreter

    _repair(interpreter)
    _hold_to_promises(interpreter)


def _hold_to_promises(interpreter):
    """Refuse an address that is no multiple of what the kernel says; the compiler believes it."""

    def set_attr(handle, name, values):
        if name == "tt.divisibility" and (handle.data % values[0]).any():
            raise AssertionError(f"{handle.data} is no multiple of {values[0]}")

    interpreter.TensorHandle.set_attr = set_attr


def _repair(interpreter):
    """Change what Triton 3.6's interpreter does otherwise than its compiler."""
    # NumPy 2.4 makes no integer of an array with one element, which range(tensor) asks for.
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched

    # It cuts a float32 to bfloat16 instead of rounding it, and misreads subnormal bfloat16.
    convert = interpreter._convert_float

    def converted(data, source, target, rounding):
        data = np.ascontiguousarray(data)
        if (source.name, target.name) == ("fp32", "bf16"):
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
        if (source.name, target.name) == ("bf16", "fp32"):
            return torch.from_numpy(data).view(torch.bfloat16).float().numpy()
        return convert(data, source, target, rounding)

    interpreter._convert_float = converted
