"""Rules that are wrong in the ways that optimizers have been wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace

from portopt.rules import Adam, AdamW, Momentum, RMSprop


@dataclass(frozen=True, kw_only=True)
class NoBiasCorrection(Adam):
    def update(self, xp, t, param, grad, slot):
        return super().update(xp, 10**9, param, grad, slot)


@dataclass(frozen=True, kw_only=True)
class OffByOneStep(Adam):
    def update(self, xp, t, param, grad, slot):
        return super().update(xp, t + 1, param, grad, slot)


@dataclass(frozen=True, kw_only=True)
class SwappedBetas(Adam):
    def update(self, xp, t, param, grad, slot):
        swapped = type(self).unchecked(**{**vars(self), "beta1": self.beta2, "beta2": self.beta1})
        return Adam.update(swapped, xp, t, param, grad, slot)


@dataclass(frozen=True, kw_only=True)
class DampenedAtFirst(Momentum):
    def update(self, xp, t, param, grad, slot):
        return super().update(xp, t + 1, param, grad, slot)


def mutants(lr):
    """By name, a wrong rule and the native that it pretends to be: framework and twin."""
    torch_adam = ("torch", ("Adam", {"lr": lr}))
    keras_adam = ("keras", ("Adam", {"learning_rate": lr}))
    adam, adamw = Adam(lr=lr), AdamW(lr=lr)
    return {
        "no bias correction": (NoBiasCorrection(lr=lr), *torch_adam),
        "off by one step": (OffByOneStep(lr=lr), *torch_adam),
        "betas swapped": (SwappedBetas(lr=lr), *torch_adam),
        "epsilon inside the root": (replace(adam, eps_form="inside"), *torch_adam),
        "epsilon hat": (replace(adam, eps_form="hat"), *torch_adam),
        "epsilon not hat": (replace(adam, eps=1e-7), *keras_adam),
        "decay coupled": (replace(adamw, decoupled=False), "torch", ("AdamW", {"lr": lr})),
        "no decay": (replace(adamw, weight_decay=0.0), "torch", ("AdamW", {"lr": lr})),
        "epsilon outside the root": (
            RMSprop(lr=lr, alpha=0.9, eps=1e-7, eps_form="outside"),
            "keras",
            ("RMSprop", {"learning_rate": lr}),
        ),
        "dampened at the first step": (
            DampenedAtFirst(lr=lr, dampening=0.3, weight_decay=0.1),
            "torch",
            ("SGD", {"lr": lr, "momentum": 0.9, "weight_decay": 0.1, "dampening": 0.3}),
        ),
        "no nesterov": (
            Momentum(lr=lr, maximize=True),
            "torch",
            ("SGD", {"lr": lr, "momentum": 0.9, "maximize": True, "nesterov": True}),
        ),
    }
