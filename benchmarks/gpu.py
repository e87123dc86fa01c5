"""Times optimizer steps on a GPU: ours against torch.optim, and both against the memory.

    python benchmarks/gpu.py [folder]

Writes ``gpu-<device>.json`` to the folder and prints a table. Every time is a median over rounds in
which all contestants take turns, from an idle device to the end of the step, by CUDA events.

"kernel" is the launch alone, with its table, spans and scalars in place; "portopt" the whole
``portopt_torch`` optimizer, once that has its way onto CUDA. The limit is what a step must read and
write at the bandwidth of a copy within the device, measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import portopt_torch
from portopt import rules
from portopt.kernels import triton
from portopt.trace import trace

Step = Callable[[], Any]
ROUNDS = 20
LR = 1e-6

# For each rule ours, the native, and what both take.
RULES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "Adam": (rules.Adam, "Adam", {}),
    "AdamW": (rules.AdamW, "AdamW", {}),
    "SGD": (rules.Momentum, "SGD", {"momentum": 0.9}),
    "RMSprop": (rules.RMSprop, "RMSprop", {}),
}


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of ResNet-50's 161 parameters."""
    shapes: list[tuple[int, ...]] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

    convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            if block == 0:
                convolution(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """The shapes of GPT-2 small's 148 parameters."""
    d = 768
    norm: list[tuple[int, ...]] = [(d,), (d,)]
    attention: list[tuple[int, ...]] = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp: list[tuple[int, ...]] = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *12 * [*norm, *attention, *norm, *mlp], *norm]


MIXES: dict[str, list[tuple[int, ...]]] = {
    "one 16M": [(2**24,)],
    "one 128M": [(2**27,)],
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2(),
    "1000 32x32": [(32, 32)] * 1000,
}


def make_params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters with gradients."""
    params = []
    for shape in shapes:
        params.append(torch.randn(shape, device="cuda", dtype=dtype).requires_grad_())
        params[-1].grad = torch.randn_like(params[-1])
    return params


def make_kernel(rule: rules.Rule, params: list[torch.Tensor], span: int = triton.SPAN) -> Step:
    """The launch alone; what it works on is kept alive by it."""
    program = trace(rule)
    dtype = params[0].dtype
    storage = (str(dtype).removeprefix("torch."),) * len(program.operands)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    scalars = program.scalars(vars(rule), 10)
    row = torch.tensor([scalars[name] for name in program.scalar_names], device="cuda").to(compute)
    slots = [[torch.zeros_like(param) for _ in program.slots] for param in params]
    operands = [[p, p.grad, *own, row] for p, own in zip(params, slots, strict=True)]
    table = torch.tensor([[x.data_ptr() for x in own] for own in operands], device="cuda")
    spans = torch.tensor(
        [
            (number, start, min(span, param.numel() - start))
            for number, param in enumerate(params)
            for start in range(0, param.numel(), span)
        ],
        device="cuda",
    )
    return lambda alive=operands: triton.launch(program, storage, table, spans)


def contestants(name: str, params: list[torch.Tensor]) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps by name, warm; and why some are missing."""
    rule, native, options = RULES[name]
    makers: dict[str, Callable[[], Step]] = {
        "kernel": lambda: make_kernel(rule(lr=LR, **options), params),
        "portopt": lambda: getattr(portopt_torch, native)(params, LR, **options).step,
    }
    for mode in ({}, {"foreach": False}, {"foreach": True}, {"fused": True}):
        label = ", ".join(f"{key}={value}" for key, value in mode.items()) or "default"
        make = partial(getattr(torch.optim, native), params, LR, **options, **mode)
        makers[f"torch {label}"] = lambda make=make: make().step
    steps, missing = {}, {}
    for label, make in makers.items():
        try:
            step = make()
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        except (AttributeError, RuntimeError, TypeError) as error:
            missing[label] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            steps[label] = step
    return steps, missing


def milliseconds(steps: dict[str, Step], rounds: int = ROUNDS) -> dict[str, float]:
    """Each step's median time; they take turns."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(rounds):
        for label, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times[label].append(begin.elapsed_time(end))
    return {label: statistics.median(values) for label, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes read and written in a millisecond by a copy within the device."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = milliseconds({"copy": lambda: target.copy_(source)})
    return 2 * source.numel() * source.element_size() / times["copy"]


def traffic(rule: rules.Rule, params: list[torch.Tensor]) -> int:
    """The bytes that a step must read and write."""
    program = trace(rule)
    arrays = len(program.operands) + len(program.outputs)
    return arrays * sum(param.numel() * param.element_size() for param in params)


def compare(name: str, mix: str, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """One row of the table."""
    rule, _, options = RULES[name]
    params = make_params(MIXES[mix], dtype)
    steps, missing = contestants(name, params)
    times = milliseconds(steps)
    limit = traffic(rule(lr=LR, **options), params) / bandwidth
    native = min(time for label, time in times.items() if label.startswith("torch"))
    print(
        f"{name:8} {mix:12} {str(dtype)[6:]:9} limit {limit:8.3f} ms, "
        + ", ".join(f"{label} {time:.3f}" for label, time in times.items())
        + f"; kernel / fastest native {times['kernel'] / native:.2f}, "
        f"limit / kernel {limit / times['kernel']:.2f}"
    )
    return {
        "rule": name,
        "mix": mix,
        "dtype": str(dtype)[6:],
        "tensors": len(params),
        "elements": sum(param.numel() for param in params),
        "limit_ms": limit,
        "median_ms": times,
        "missing": missing,
    }


def span_lengths() -> list[dict[str, Any]]:
    """How the length of the spans matters to Adam's kernel."""
    rows = []
    for mix in ("one 16M", "one 128M", "GPT-2 small"):
        params = make_params(MIXES[mix], torch.float32)
        lengths = [2**power for power in range(10, 19, 2)] + [triton.SPAN]
        steps = {str(n): make_kernel(rules.Adam(lr=LR), params, n) for n in lengths}
        for step in steps.values():
            step()
        rows.append({"mix": mix, "median_ms": milliseconds(steps)})
        print("spans", rows[-1])
        del params, steps
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    """Measure all, print and write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    print(f"{device}: a copy moves {bandwidth / 1e6:.0f} GB/s")
    result: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "copy_bytes_per_second": 1e3 * bandwidth,
        "rounds": ROUNDS,
        "steps": [],
    }
    path = folder / f"gpu-{device.lower().replace(' ', '-')}.json"
    cases = [(name, mix, torch.float32) for name in RULES for mix in MIXES]
    for case in [*cases, *(("Adam", mix, torch.bfloat16) for mix in MIXES)]:
        result["steps"].append(compare(*case, bandwidth))
        path.write_text(json.dumps(result, indent=1) + "\n")  # whole, should the time run out
        torch.cuda.empty_cache()
    result["span_lengths"] = span_lengths()
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
