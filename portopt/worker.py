"""Work in child processes: one framework each, so that none of them meets another.

A child is ``python -m MODULE SPEC``, with a specification in JSON; it answers with events, one
JSON object a line behind a mark, so that whatever else a framework prints does no harm. The core
thereby uses the adapters without importing a framework.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

MARK = "portopt-event "
FRAMEWORKS = {"torch": "portopt_torch", "keras": "portopt_tf"}
"""The frameworks that have an adapter, with the adapter."""

Event = dict[str, Any]


class WorkerError(RuntimeError):
    """A child process failed; the message ends with what it wrote last."""


def missing(framework: str) -> str | None:
    """The module to install before ``framework`` can be used here, or None if it is all there."""
    needed = [framework]
    if framework == "keras":
        needed.append(keras_backend())
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def keras_backend() -> str:
    """The backend that Keras would run on: as its environment or configuration file says."""
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        configured = json.loads((folder / "keras.json").read_text()).get("backend")
    except (OSError, ValueError, AttributeError):  # it may be no object
        configured = None
    return os.environ.get("KERAS_BACKEND") or configured or "tensorflow"


def emit(**event: Any) -> None:
    """Send an event from a child to its parent."""
    print(MARK + json.dumps(event), flush=True)


def events(
    module: str, spec: Event, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Event]:
    """Run a child and yield its events as they come.

    Args:
        module: The module to run, such as "portopt_torch.demo".
        spec: What it is to do; it finds this as JSON in ``sys.argv[1]``.
        environment: What it finds in its environment beside what is in ours.

    Raises:
        WorkerError: the child ended with an error.
    """
    # The child looks for modules where we do, and not in the current folder because of "-m".
    safe = ["-P"] if sys.version_info >= (3, 11) else []
    command = [sys.executable, *safe, "-m", module, json.dumps(spec)]
    path = os.pathsep.join(filter(None, sys.path))
    own = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ, **environment, "PYTHONPATH": path}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=own
        ) as child,
    ):
        try:
            for line in child.stdout or ():
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
        finally:
            child.kill() if sys.exc_info()[0] else child.wait()
        if child.returncode:
            errors.seek(0)
            last = "".join(errors.readlines()[-20:])
            raise WorkerError(f"{module} ended with status {child.returncode}:\n{last}")
