"""The child's part: paths that take turns, beside the bandwidth of memory."""

from __future__ import annotations

import ctypes
import gc
import itertools
import operator
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from portopt import worker
from portopt.bench.cases import OURS, RULES, Case, bytes_per_element
from portopt.bench.results import Timing
from portopt.optimizer import Optimizer

Step: TypeAlias = Callable[[], object]


class Contender(NamedTuple):
    """A path that takes part.

    Attributes:
        mode: As in `Timing`.
        path: As in `Timing`.
        make: Makes the optimizer and returns its step.
        before: What must be done before each step, off the clock.
    """

    mode: str
    path: str
    make: Callable[[], Step]
    before: Step = lambda: None


Contenders: TypeAlias = Callable[[Case], Sequence[Contender]]


def answer(framework: str, contenders: Contenders, spec: Mapping[str, Any]) -> None:
    """The child's part: measure each case and send its timings.

    Args:
        framework: One of `FRAMEWORKS`.
        contenders: Builds the paths of a case, on parameters and gradients of their own.
        spec: "cases", and "seconds" to spend on each; or "first": a case and a path to step once,
            with a folder for kernels under "cache".
    """
    if "first" in spec:
        os.environ["PORTOPT_CACHE_DIR"] = spec["cache"]
        (chosen,) = (c for c in contenders(Case(*spec["first"])) if c.path == spec["path"])
        chosen.before()
        worker.emit(first=_timed(lambda: chosen.make()()))
        return
    bandwidth = Bandwidth()
    for case in itertools.starmap(Case, spec["cases"]):
        worker.emit(begin=case)
        for timing in _measure(framework, case, contenders(case), bandwidth, spec["seconds"]):
            worker.emit(timing=asdict(timing))
        gc.collect()


def _measure(
    framework: str,
    case: Case,
    contenders: Sequence[Contender],
    bandwidth: Bandwidth,
    seconds: float,
) -> Iterator[Timing]:
    """Step all paths in turn, as long as ``seconds`` permit."""
    steps: list[Step] = []
    first, extra = [], []
    for contender in contenders:
        contender.before()
        gc.collect()  # of all that TensorFlow has: 0.3 s, which are to fall on nobody
        began = time.perf_counter()
        steps.append(contender.make())
        steps[-1]()
        first.append(time.perf_counter() - began)
    for contender, step in zip(contenders, steps, strict=True):
        contender.before()
        extra.append(peak_extra(step))
    samples: list[list[float]] = [[] for _ in steps]
    additions: list[float] = []
    order, shuffle = list(range(len(steps))), random.Random(0).shuffle
    began = time.perf_counter()
    for done in range(100):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        shuffle(order)  # nobody always follows the same one
        for place in order:
            bandwidth.sample()  # meanwhile threads that spin after the last step fall asleep
            additions.append(bandwidth.sample())
            contenders[place].before()
            samples[place].append(_timed(steps[place]))
    limit = bytes_per_element(case.rule) * case.elements / statistics.median(additions)
    ours = {c.mode: own for c, own in zip(contenders, samples, strict=True) if c.path == OURS}
    for place, contender in enumerate(contenders):
        yield Timing(
            framework=framework,
            mode=contender.mode,
            rule=case.rule,
            mix=case.mix,
            path=contender.path,
            seconds=statistics.median(samples[place]),
            limit=limit,
            first=first[place],
            extra=extra[place],
            rounds=len(samples[place]),
            ours=_ratio(ours.get(contender.mode), samples[place]),
        )


def _ratio(ours: Sequence[float] | None, others: Sequence[float]) -> float | None:
    return statistics.median(map(operator.truediv, ours, others)) if ours else None


def _timed(step: Step) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


class Bandwidth:
    """What memory gives an addition in place of two arrays too large for any cache."""

    def __init__(self) -> None:
        size, part = 1 << 24, 1 << 19
        a, b = np.zeros(size, np.float32), np.ones(size, np.float32)
        self.moved = 3 * a.nbytes  # two arrays read, one written
        self.parts = [(a[i : i + part], b[i : i + part]) for i in range(0, size, part)]
        self.helpers = usable_cores() - 1
        self.pool = ThreadPoolExecutor(self.helpers or 1)

    def sample(self) -> float:
        """Bytes a second, on every core; a core that is kept busy elsewhere adds less."""
        parts = iter(self.parts)

        def work() -> None:
            for a, b in parts:
                np.add(a, b, out=a)

        began = time.perf_counter()
        others = [self.pool.submit(work) for _ in range(self.helpers)]
        work()
        for other in others:
            other.result()
        return self.moved / (time.perf_counter() - began)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_extra(step: Step) -> int | None:
    """How far the resident memory rises during a step, in bytes; None where Linux is not.

    Native allocations count, which no Python tool sees: the kernel's own high-water mark is reset
    first. So is memory that the allocator keeps for the next time, or it would hide what is used.
    """
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        step()
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _resident("VmRSS")
    clear.write_text("5")  # sets VmHWM back to VmRSS
    step()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return 1024 * int(line.split()[1])


def numpy_contenders(case: Case) -> list[Contender]:
    """`portopt.Optimizer` on NumPy arrays."""
    rng = np.random.default_rng(0)
    params, grads = (
        [rng.standard_normal(shape, np.float32) for shape in case.shapes] for _ in range(2)
    )

    def make() -> Step:
        optimizer = Optimizer(RULES[case.rule].rule, params)
        return lambda: optimizer.step(grads)

    return [Contender("step", OURS, make)]


def jax_contenders(case: Case) -> list[Contender]:
    """`portopt.jax.Optimizer` and Optax, both jitted, with donated buffers."""
    import jax
    import optax

    from portopt.jax import Optimizer

    contest = RULES[case.rule]
    rng = np.random.default_rng(0)
    start, grads = (
        [jax.numpy.asarray(rng.standard_normal(shape, np.float32)) for shape in case.shapes]
        for _ in range(2)
    )

    def path(init: Callable[[Any], Any], update: Callable[..., Any]) -> Callable[[], Step]:
        def make() -> Step:
            params = [param.copy() for param in start]
            state = init(params)
            compiled = jax.jit(update, donate_argnums=(0, 1))

            def step() -> None:
                nonlocal params, state
                params, state = compiled(params, state, grads)
                jax.block_until_ready(params)  # type: ignore[no-untyped-call]

            return step

        return make

    ours = Optimizer(contest.rule)
    found = [Contender("jit", OURS, path(ours.init, ours.step))]
    if contest.optax is not None:
        name, arguments = contest.optax
        native = getattr(optax, name)(**arguments)

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = native.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        found.append(Contender("jit", "optax", path(native.init, update)))
    return found
