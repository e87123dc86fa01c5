"""The parent's part: what children answer, first steps, imports, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from portopt import worker
from portopt.bench.cases import ENVIRONMENT, IMPORTS, MODULES, OURS, Case
from portopt.bench.child import usable_cores
from portopt.bench.results import Timing


def ask(
    framework: str, cases: Sequence[Case], quick: bool, progress: Callable[[Case], None]
) -> Iterator[Timing]:
    """All timings of one framework, from a child process, as they come.

    Raises:
        WorkerError: the child failed.
    """
    spec = {"framework": framework, "cases": cases, "seconds": 0.5 if quick else 3.0}
    for event in worker.events(MODULES[framework], spec, ENVIRONMENT.get(framework, {})):
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


def import_time(package: str, repeats: int) -> float:
    """The median time that a package adds to the import of what it stands on, once it is bytecode.

    Raises:
        subprocess.CalledProcessError: a child failed.
    """
    code = (
        f"import time, {IMPORTS[package]}; began = time.perf_counter(); import {package}; "
        "print(time.perf_counter() - began)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
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
