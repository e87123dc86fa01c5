"""Steps that no kernel takes: that they are slow, and why, is said once."""

import sys
import warnings
from functools import cache

INSIDE = {"portopt", "portopt_torch", "portopt_tf", "torch", "keras", "tensorflow"}
"""Packages whose lines call a step for somebody else."""


@cache
def warn(what: str, why: str) -> None:
    """Say so once, at the line that calls for the step.

    However many lines of ours and of the frameworks lie between: that depends on what wraps them.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals["__name__"].split(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{what} steps without a kernel, slowly: {why}", stacklevel=level)
