"""Python in a process of its own: for what would stop, fork or spoil the process of the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "core" / "scenes.py"


def child(*arguments, **environment):
    """What a scene of ``core/scenes.py`` prints; an error unless it ends well."""
    done = start(*arguments, **environment)
    try:
        output, errors = done.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        done.send_signal(signal.SIGABRT)  # which makes faulthandler say where it is
        output, errors = done.communicate(timeout=20)
    if done.returncode:
        raise AssertionError(f"{arguments} ended with {done.returncode}:\n{output}{errors}")
    return output


def start(*arguments, **environment):
    """A process at work on a scene."""
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-W", "error", str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
