"""portopt: an optimizer's arithmetic, written once, run everywhere."""

from portopt import rules
from portopt.optimizer import Optimizer
from portopt.program import Program
from portopt.rules import Around, Rule
from portopt.trace import TraceError, trace

__version__ = "0.1.0"
__all__ = ["Around", "Optimizer", "Program", "Rule", "TraceError", "rules", "trace"]
