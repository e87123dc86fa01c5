"""portopt's rules as ``torch.optim.Optimizer`` subclasses."""

from portopt_torch.drop_in import SGD, Adam, AdamW, RMSprop
from portopt_torch.from_rule import from_rule
from portopt_torch.optimizer import Optimizer

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "from_rule"]
