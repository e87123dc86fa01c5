"""Sharding: optimizer state divided among workers, so that each keeps and updates its part.

`divide` makes the plan, `Collectives` is what workers say to one another, `Sharded` is the update;
`simulate` runs any number of workers in one process.
"""

from portopt.sharding.buffers import Buffers, NumPyBuffers, VariableBuffers
from portopt.sharding.collectives import Collectives, Simulated, simulate
from portopt.sharding.memory import ModelState, read_shapes
from portopt.sharding.norm import grad_norm
from portopt.sharding.plan import Plan, Span, divide
from portopt.sharding.update import Sharded

__all__ = [
    "Buffers",
    "Collectives",
    "ModelState",
    "NumPyBuffers",
    "Plan",
    "Sharded",
    "Simulated",
    "Span",
    "VariableBuffers",
    "divide",
    "grad_norm",
    "read_shapes",
    "simulate",
]
