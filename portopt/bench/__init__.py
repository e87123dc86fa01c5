"""Benchmarks: the time of a step beside every native mode, and beside what memory allows.

Each framework is timed in a child process: ``python -m portopt_torch.bench``, ``portopt_tf.bench``,
and for NumPy and JAX this module. A child builds the *paths* of a case (ours, and each way to call
the native optimizer) and steps them in turn, round by round, an in-place addition before each. The
*limit* is the time in which memory, at that addition's bandwidth, moves what the rule must move.
"""

from portopt.bench.cases import (
    FRAMEWORKS,
    IMPORTS,
    MIXES,
    OURS,
    RULES,
    TAILS,
    TITLES,
    Case,
    bytes_per_element,
    plan,
)
from portopt.bench.child import Contender, Step, answer, peak_extra
from portopt.bench.parent import ask, first_steps, import_time, machine
from portopt.bench.results import Group, Timing, first_table, groups, import_table, step_table

__all__ = [
    "FRAMEWORKS",
    "IMPORTS",
    "MIXES",
    "OURS",
    "RULES",
    "TAILS",
    "TITLES",
    "Case",
    "Contender",
    "Group",
    "Step",
    "Timing",
    "answer",
    "ask",
    "bytes_per_element",
    "first_steps",
    "first_table",
    "groups",
    "import_table",
    "import_time",
    "machine",
    "peak_extra",
    "plan",
    "step_table",
]
