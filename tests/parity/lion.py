"""A new rule, whole: nothing else in the project knows it. Chen et al. 2023, algorithm 2."""

from dataclasses import dataclass

from portopt import Rule


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    slots = ("exp_avg",)

    def update(self, xp, t, param, grad, slot):
        direction = xp.sign(slot.exp_avg + (1 - self.beta1) * (grad - slot.exp_avg))
        m = slot.exp_avg + (1 - self.beta2) * (grad - slot.exp_avg)
        return param - self.lr * direction, {"exp_avg": m}
