"""Benchmarks: the time of a step beside every native mode, and beside what memory allows.

Each framework is timed in a child process: ``python -m portopt_torch.bench``, ``portopt_tf.bench``,
and for NumPy and JAX this module. A child builds the *paths* of a case (ours, and each way to call
the native optimizer) and steps them in turn, round by round, an in-place addition before each. The
*limit* is the time in which memory, at that addition's bandwidth, moves what the rule must move.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from portopt import worker
from portopt.optimizer import Optimizer
from portopt.parity import Twin
from portopt.rules import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Momentum,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    Rule,
)
from portopt.trace import trace

Shape: TypeAlias = tuple[int, ...]
Step: TypeAlias = Callable[[], object]
OURS = "portopt"
"""The name of our path; every other path is a native one."""


def _resnet50() -> Iterator[Shape]:
    yield from ((64, 3, 7, 7), (64,), (64,))
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        after = 4 * width
        for block in range(blocks):
            yield from ((width, before, 1, 1), (width,), (width,))
            yield from ((width, width, 3, 3), (width,), (width,))
            yield from ((after, width, 1, 1), (after,), (after,))
            if block == 0:
                yield from ((after, before, 1, 1), (after,), (after,))
            before = after
    yield from ((1000, 2048), (1000,))


def _transformer(width: int, layers: int) -> Iterator[Shape]:
    for _ in range(layers):
        yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (4 * width, width), (4 * width,))
        yield from ((width, 4 * width), (width,))
    yield from ((width,), (width,))


MIXES: dict[str, tuple[Shape, ...]] = {
    "16m": ((4096, 4096),),
    "resnet50": tuple(_resnet50()),
    "vit-b": (
        *((1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)),
        *_transformer(768, 12),
        *((1000, 768), (1000,)),
    ),
    "gpt2": ((50257, 768), (1024, 768), *_transformer(768, 12)),
    "1000x32x32": ((32, 32),) * 1000,
}
"""Shapes of parameters: one tensor, three models, and many small ones."""

TITLES = {
    "16m": "one tensor of 16M",
    "resnet50": "ResNet-50 (161 tensors, 26M)",
    "vit-b": "ViT-B (152 tensors, 87M)",
    "gpt2": "GPT-2 small (148 tensors, 124M)",
    "1000x32x32": "1000 tensors of 32x32",
    "numpy": "NumPy",
    "torch": "PyTorch",
    "keras": "Keras",
    "jax": "JAX",
}
"""How mixes and frameworks are called where people read it."""


class Contest(NamedTuple):
    """A rule, and the optimizers that are the same: class or function, and arguments.

    Attributes:
        rule: The rule.
        torch: Its twin in ``torch.optim``, if there is one, and ours in ``portopt_torch``.
        keras: Its twin in ``keras.optimizers``, and ours in ``portopt_tf``.
        optax: Its twin in ``optax``.
    """

    rule: Rule
    torch: Twin | None = None
    keras: Twin | None = None
    optax: Twin | None = None


def _contest(
    rule: Rule, torch: Twin | None = None, keras: Twin | None = None, optax: Twin | None = None
) -> Contest:
    """A contest at the rule's learning rate; the twins are given without it."""
    return Contest(
        rule,
        torch and (torch[0], {"lr": rule.lr, **torch[1]}),
        keras and (keras[0], {"learning_rate": rule.lr, **keras[1]}),
        optax and (optax[0], {"learning_rate": rule.lr, **optax[1]}),
    )


CENTERED = {"momentum": 0.9, "centered": True}
TAIL = "tail"
"""What stands around AdamW in a training loop: unscale the gradients, clip them by their global
norm, step, keep an average of the weights, zero the gradients. In PyTorch alone."""

RULES: dict[str, Contest] = {
    "sgd": _contest(SGD(lr=1e-4), ("SGD", {}), ("SGD", {}), ("sgd", {})),
    "momentum": _contest(
        Momentum(lr=1e-4),
        *(("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9}), ("sgd", {"momentum": 0.9})),
    ),
    "rmsprop": _contest(
        RMSprop(lr=1e-4), ("RMSprop", {}), ("RMSprop", {}), ("rmsprop", {"eps_in_sqrt": False})
    ),
    "rmsprop-centered": _contest(
        RMSprop(lr=1e-4, momentum=0.9, centered=True),
        *(("RMSprop", CENTERED), ("RMSprop", CENTERED), ("rmsprop", CENTERED)),
    ),
    "adam": _contest(Adam(lr=1e-4), ("Adam", {}), ("Adam", {}), ("adam", {})),
    "amsgrad": _contest(
        Adam(lr=1e-4, amsgrad=True),
        *(("Adam", {"amsgrad": True}), ("Adam", {"amsgrad": True}), ("amsgrad", {})),
    ),
    "adamw": _contest(AdamW(lr=1e-4), ("AdamW", {}), ("AdamW", {}), ("adamw", {})),
    "lion": _contest(Lion(), keras=("Lion", {}), optax=("lion", {"weight_decay": 0.0})),
    "adagrad": _contest(Adagrad(lr=1e-4), ("Adagrad", {}), ("Adagrad", {})),
    "adadelta": _contest(Adadelta(lr=1e-4), ("Adadelta", {}), ("Adadelta", {}), ("adadelta", {})),
    "adamax": _contest(Adamax(lr=1e-4), ("Adamax", {}), ("Adamax", {}), ("adamax", {})),
    "nadam": _contest(NAdam(lr=1e-4), ("NAdam", {}), ("Nadam", {}), ("nadam", {})),
    "radam": _contest(RAdam(lr=1e-4), ("RAdam", {}), optax=("radam", {})),
    "asgd": _contest(ASGD(lr=1e-4), ("ASGD", {})),
    "rprop": _contest(Rprop(lr=1e-4), ("Rprop", {}), optax=("rprop", {})),
    TAIL: _contest(AdamW(lr=1e-4), ("AdamW", {})),
}


def bytes_per_element(name: str) -> int:
    """What a step of a rule must move for each float32 element: all it reads, all it writes."""
    slots = len(trace(RULES[name].rule).slots)
    arrays = 2 + slots + 1 + slots
    if name == TAIL:
        arrays += 1 + 2 + 1  # the norm reads the gradient, the average, the zeros
    return 4 * arrays


class Case(NamedTuple):
    """A rule on a mix of sizes.

    Attributes:
        rule: One of `RULES`.
        mix: One of `MIXES`.
        compiled: Whether the paths that take long to compile take part.
    """

    rule: str
    mix: str
    compiled: bool

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The parameters' shapes."""
        return MIXES[self.mix]

    @property
    def elements(self) -> int:
        """The number of the parameters' elements."""
        return sum(map(math.prod, self.shapes))


FRAMEWORKS = {"numpy": "numpy", "torch": "torch", "keras": "keras", "jax": "optax"}
"""What is timed, with the module that it needs."""
MODULES = {"numpy": "portopt.bench", "jax": "portopt.bench"} | {
    framework: f"{package}.bench" for framework, package in worker.FRAMEWORKS.items()
}
SINGLE = ("sgd", "momentum", "rmsprop", "rmsprop-centered", "adam", "amsgrad", "adamw", "lion")
UNFUSED = ("adadelta", "adamax", "nadam", "radam", "asgd", "rprop")
"""Rules that have natives, and none of them a kernel."""
DEFAULT: dict[str, dict[str, tuple[str, ...]]] = {
    "numpy": {"16m": ("adamw", "lion"), "resnet50": ("adamw",), "1000x32x32": ("adamw",)},
    "torch": {
        "16m": (*SINGLE, TAIL),
        "resnet50": (*SINGLE, "adagrad", *UNFUSED, TAIL),
        "vit-b": ("momentum", "rmsprop", "adamw", "lion", TAIL),
        "gpt2": ("momentum", "rmsprop", "adamw", "lion"),
        "1000x32x32": (*SINGLE, TAIL),
    },
    "keras": {"16m": SINGLE, "resnet50": SINGLE, "1000x32x32": ("adamw",)},
    "jax": {"16m": SINGLE, "resnet50": ("adamw",), "1000x32x32": ("adamw",)},
}
"""The cases that are worth their time; others run when they are asked for."""


def plan(framework: str, rules: Sequence[str], mixes: Sequence[str], quick: bool) -> list[Case]:
    """The cases of a run.

    Args:
        framework: One of `FRAMEWORKS`.
        rules: Those to run; none for the default.
        mixes: The same.
        quick: Only AdamW on one tensor, unless something else is asked for.
    """
    if rules or mixes or quick:
        some = (*rules,) or (("adamw", TAIL) if quick else tuple(RULES))
        chosen = {mix: some for mix in ((*mixes,) or (("16m",) if quick else MIXES))}
    else:
        chosen = DEFAULT[framework]
    return [
        Case(rule, mix, not quick and (mix == "16m" or (rule, mix) == ("adamw", "resnet50")))
        for mix, names in chosen.items()
        for rule in names
        if rule != TAIL or framework == "torch"
    ]


@dataclass(frozen=True)
class Timing:
    """What was measured of one path in one case.

    Attributes:
        framework: One of `FRAMEWORKS`.
        mode: How the framework runs it; paths are compared within a mode.
        rule: The case's rule.
        mix: The case's mix.
        path: `OURS`, or the name of a native path.
        seconds: The median time of a step.
        limit: The least time that memory allows, from the bandwidth measured beside it.
        first: The time to make the optimizer and to step once.
        extra: Peak memory beyond what was there before the step, in bytes, if the system tells.
        rounds: The number of samples behind ``seconds``.
    """

    framework: str
    mode: str
    rule: str
    mix: str
    path: str
    seconds: float
    limit: float
    first: float
    extra: int | None
    rounds: int


class Group(NamedTuple):
    """Our path beside the native ones.

    Attributes:
        ours: Our timing.
        natives: Theirs, perhaps none.
    """

    ours: Timing
    natives: tuple[Timing, ...]

    @property
    def ratio(self) -> float | None:
        """Our time over that of the fastest native path."""
        fastest = min((native.seconds for native in self.natives), default=None)
        return None if fastest is None else self.ours.seconds / fastest


def groups(timings: Sequence[Timing]) -> list[Group]:
    """The timings that are compared with each other; where ours is missing, none is."""
    found: dict[tuple[str, ...], list[Timing]] = {}
    for timing in timings:
        key = (timing.framework, timing.mode, timing.rule, timing.mix)
        found.setdefault(key, []).append(timing)
    return [
        Group(ours, tuple(timing for timing in group if timing is not ours))
        for group in found.values()
        for ours in group
        if ours.path == OURS
    ]


Table: TypeAlias = tuple[list[str], list[list[str]]]
"""Head and lines."""


def step_table(some: Sequence[Group]) -> Table:
    """The steps of one framework and mix."""
    natives = list(dict.fromkeys(native.path for group in some for native in group.natives))
    head = ["rule", "mode", "limit", OURS, *natives, "ratio", "of limit", "MB", "native MB"]
    lines = []
    for group in some:
        ours = group.ours
        times = {native.path: native.seconds for native in group.natives}
        lines.append(
            [
                *(ours.rule, ours.mode, _milliseconds(ours.limit), _milliseconds(ours.seconds)),
                *(_milliseconds(times[path]) if path in times else "-" for path in natives),
                "-" if group.ratio is None else f"{group.ratio:.2f}",
                f"{ours.limit / ours.seconds:.0%}",
                _megabytes([ours]),
                _megabytes(group.natives),
            ]
        )
    return head, lines


def first_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """First steps, from `first_steps`."""
    return ["first step", "rule", "mix", "kernels on disk", "seconds"], [
        [
            *(f"{TITLES[row['framework']]} {row['path']}", row["rule"], row["mix"], row["cache"]),
            f"{row['seconds']:.2f}",
        ]
        for row in rows
    ]


def import_table(imports: Mapping[str, float]) -> Table:
    """Import times by package."""
    return ["import", "after", "milliseconds"], [
        [package, IMPORTS[package], f"{1e3 * seconds:.0f}"] for package, seconds in imports.items()
    ]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _megabytes(timings: Sequence[Timing]) -> str:
    known = [timing.extra for timing in timings if timing.extra is not None]
    return f"{min(known) / 1e6:.1f}" if known else "-"


# ---- What runs in the child ----


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
        began = time.perf_counter()
        steps.append(contender.make())
        steps[-1]()
        first.append(time.perf_counter() - began)
    for contender, step in zip(contenders, steps, strict=True):
        contender.before()
        extra.append(peak_extra(step))
    samples: list[list[float]] = [[] for _ in steps]
    additions: list[float] = []
    order = list(range(len(steps)))
    began = time.perf_counter()
    for done in range(100):
        if done >= 3 and time.perf_counter() - began > seconds:
            break
        for place in order:
            bandwidth.sample()  # meanwhile threads that spin after the last step fall asleep
            additions.append(bandwidth.sample())
            contenders[place].before()
            samples[place].append(_timed(steps[place]))
        order.append(order.pop(0))  # nobody always follows the same one
    limit = bytes_per_element(case.rule) * case.elements / statistics.median(additions)
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
        )


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


# ---- What runs here ----


def ask(
    framework: str, cases: Sequence[Case], quick: bool, progress: Callable[[Case], None]
) -> Iterator[Timing]:
    """All timings of one framework, from a child process, as they come.

    Raises:
        WorkerError: the child failed.
    """
    spec = {"framework": framework, "cases": cases, "seconds": 0.5 if quick else 3.0}
    for event in worker.events(MODULES[framework], spec):
        if "begin" in event:
            progress(Case(*event["begin"]))
        else:
            yield Timing(**event["timing"])


FIRST = {"numpy": (), "torch": ("default", "foreach", "fused")}
"""Where kernels of ours are compiled at the first step, with the native paths to compare with."""


def first_steps(framework: str, quick: bool) -> Iterator[dict[str, Any]]:
    """The time to make an optimizer and to step once, each time in a new process.

    Ours comes first without kernels on disk, then with those that the first process left there.

    Raises:
        WorkerError: a child failed.
    """
    if framework not in FIRST:
        return
    case = Case("adamw", "16m" if quick else "resnet50", compiled=False)
    natives = () if quick else FIRST[framework]
    with tempfile.TemporaryDirectory() as cache:
        for path, state in ((OURS, "none"), (OURS, "all"), *((path, "") for path in natives)):
            spec = {"framework": framework, "first": case, "path": path, "cache": cache}
            (event,) = worker.events(MODULES[framework], spec)
            row = {"framework": framework, "rule": case.rule, "mix": case.mix, "path": path}
            yield {**row, "cache": state, "seconds": event["first"]}


IMPORTS = {"portopt": "numpy", "portopt_torch": "torch", "portopt_tf": "keras"}
"""Our packages, each with what it stands on."""


def import_time(package: str, repeats: int) -> float:
    """The median time that a package adds to the import of what it stands on.

    Raises:
        subprocess.CalledProcessError: a child failed.
    """
    code = (
        f"import time, {IMPORTS[package]}; began = time.perf_counter(); import {package}; "
        "print(time.perf_counter() - began)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                capture_output=True,
                check=True,
                text=True,
            ).stdout.splitlines()[-1]
        )
        for _ in range(repeats)
    ]
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("numpy", "torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "optax"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "python": platform.python_version(),
        "packages": packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    _spec = json.loads(sys.argv[1])
    _contenders = {"numpy": numpy_contenders, "jax": jax_contenders}[_spec["framework"]]
    answer(_spec["framework"], _contenders, _spec)
