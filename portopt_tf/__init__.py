"""portopt's rules as Keras optimizers, on any backend of Keras."""

from portopt_tf.drop_in import SGD, Adam, AdamW, RMSprop
from portopt_tf.from_rule import from_rule
from portopt_tf.optimizer import Optimizer

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop", "from_rule"]
