"""What is timed: rules with their native twins, mixes of sizes, and which of these by default."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from portopt import worker
from portopt.parity import Twin
from portopt.rules import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Lion,
    Momentum,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    Rule,
)
from portopt.trace import trace

Shape: TypeAlias = tuple[int, ...]
OURS = "portopt"
"""The name of our path; every other path is a native one."""


def _resnet50() -> Iterator[Shape]:
    yield from ((64, 3, 7, 7), (64,), (64,))
    before = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        after = 4 * width
        for block in range(blocks):
            yield from ((width, before, 1, 1), (width,), (width,))
            yield from ((width, width, 3, 3), (width,), (width,))
            yield from ((after, width, 1, 1), (after,), (after,))
            if block == 0:
                yield from ((after, before, 1, 1), (after,), (after,))
            before = after
    yield from ((1000, 2048), (1000,))


def _transformer(width: int, layers: int) -> Iterator[Shape]:
    for _ in range(layers):
        yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (4 * width, width), (4 * width,))
        yield from ((width, 4 * width), (width,))
    yield from ((width,), (width,))


MIXES: dict[str, tuple[Shape, ...]] = {
    "16m": ((4096, 4096),),
    "resnet50": tuple(_resnet50()),
    "vit-b": (
        *((1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)),
        *_transformer(768, 12),
        *((1000, 768), (1000,)),
    ),
    "gpt2": ((50257, 768), (1024, 768), *_transformer(768, 12)),
    "1000x32x32": ((32, 32),) * 1000,
}
"""Shapes of parameters: one tensor, three models, and many small ones."""

TITLES = {
    "16m": "one tensor of 16M",
    "resnet50": "ResNet-50 (161 tensors, 26M)",
    "vit-b": "ViT-B (152 tensors, 87M)",
    "gpt2": "GPT-2 small (148 tensors, 124M)",
    "1000x32x32": "1000 tensors of 32x32",
    "numpy": "NumPy",
    "torch": "PyTorch",
    "keras": "Keras",
    "keras-torch": "Keras on PyTorch",
    "jax": "JAX",
}
"""How mixes and frameworks are called where people read it."""


class Contest(NamedTuple):
    """A rule, and the optimizers that are the same: class or function, and arguments.

    Attributes:
        rule: The rule.
        torch: Its twin in ``torch.optim``, if there is one, and ours in ``portopt_torch``.
        keras: Its twin in ``keras.optimizers``, and ours in ``portopt_tf``.
        optax: Its twin in ``optax``.
    """

    rule: Rule
    torch: Twin | None = None
    keras: Twin | None = None
    optax: Twin | None = None


def _contest(
    rule: Rule, torch: Twin | None = None, keras: Twin | None = None, optax: Twin | None = None
) -> Contest:
    """A contest at the rule's learning rate; the twins are given without it."""
    return Contest(
        rule,
        torch and (torch[0], {"lr": rule.lr, **torch[1]}),
        keras and (keras[0], {"learning_rate": rule.lr, **keras[1]}),
        optax and (optax[0], {"learning_rate": rule.lr, **optax[1]}),
    )


CENTERED = {"momentum": 0.9, "centered": True}
TAILS = {"tail": False, "tail-zeroed": True}
"""What stands around AdamW in a training loop: unscale the gradients, clip them by their global
norm, step, keep an average of the weights; then give the gradients up, or write zeros to them. In
PyTorch alone."""

RULES: dict[str, Contest] = {
    "sgd": _contest(SGD(lr=1e-4), ("SGD", {}), ("SGD", {}), ("sgd", {})),
    "momentum": _contest(
        Momentum(lr=1e-4),
        *(("SGD", {"momentum": 0.9}), ("SGD", {"momentum": 0.9}), ("sgd", {"momentum": 0.9})),
    ),
    "rmsprop": _contest(
        RMSprop(lr=1e-4), ("RMSprop", {}), ("RMSprop", {}), ("rmsprop", {"eps_in_sqrt": False})
    ),
    "rmsprop-centered": _contest(
        RMSprop(lr=1e-4, momentum=0.9, centered=True),
        *(("RMSprop", CENTERED), ("RMSprop", CENTERED), ("rmsprop", CENTERED)),
    ),
    "adam": _contest(Adam(lr=1e-4), ("Adam", {}), ("Adam", {}), ("adam", {})),
    "amsgrad": _contest(
        Adam(lr=1e-4, amsgrad=True),
        *(("Adam", {"amsgrad": True}), ("Adam", {"amsgrad": True}), ("amsgrad", {})),
    ),
    "adamw": _contest(AdamW(lr=1e-4), ("AdamW", {}), ("AdamW", {}), ("adamw", {})),
    "lion": _contest(Lion(), keras=("Lion", {}), optax=("lion", {"weight_decay": 0.0})),
    "adagrad": _contest(Adagrad(lr=1e-4), ("Adagrad", {}), ("Adagrad", {})),
    "adadelta": _contest(Adadelta(lr=1e-4), ("Adadelta", {}), ("Adadelta", {}), ("adadelta", {})),
    "adamax": _contest(Adamax(lr=1e-4), ("Adamax", {}), ("Adamax", {}), ("adamax", {})),
    "nadam": _contest(NAdam(lr=1e-4), ("NAdam", {}), ("Nadam", {}), ("nadam", {})),
    "radam": _contest(RAdam(lr=1e-4), ("RAdam", {}), optax=("radam", {})),
    "asgd": _contest(ASGD(lr=1e-4), ("ASGD", {})),
    "rprop": _contest(Rprop(lr=1e-4), ("Rprop", {}), optax=("rprop", {})),
    **{tail: _contest(AdamW(lr=1e-4), ("AdamW", {})) for tail in TAILS},
}


def bytes_per_element(name: str) -> int:
    """What a step of a rule must move for each float32 element: all it reads, all it writes."""
    slots = len(trace(RULES[name].rule).slots)
    arrays = 2 + slots + 1 + slots
    if name in TAILS:
        arrays += 1 + 2 + TAILS[name]  # the norm reads the gradient, the average, the zeros
    return 4 * arrays


class Case(NamedTuple):
    """A rule on a mix of sizes.

    Attributes:
        rule: One of `RULES`.
        mix: One of `MIXES`.
        compiled: Whether the paths that take long to compile take part.
    """

    rule: str
    mix: str
    compiled: bool

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The parameters' shapes."""
        return MIXES[self.mix]

    @property
    def elements(self) -> int:
        """The number of the parameters' elements."""
        return sum(map(math.prod, self.shapes))


FRAMEWORKS = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "keras": ("keras",),
    "keras-torch": ("keras", "torch"),
    "jax": ("optax",),
}
"""What is timed, with the modules that it needs."""
MODULES = {framework: "portopt.bench" for framework in ("numpy", "jax")} | {
    framework: f"{worker.FRAMEWORKS[framework.partition('-')[0]]}.bench"
    for framework in ("torch", "keras", "keras-torch")
}
ENVIRONMENT = {"keras-torch": {"KERAS_BACKEND": "torch"}}
"""What a framework's child finds in its environment."""
IMPORTS = {"portopt": "numpy", "portopt_torch": "torch", "portopt_tf": "keras"}
"""Our packages, each with what it stands on."""
SINGLE = ("sgd", "momentum", "rmsprop", "rmsprop-centered", "adam", "amsgrad", "adamw", "lion")
UNFUSED = ("adadelta", "adamax", "nadam", "radam", "asgd", "rprop")
"""Rules that have natives, and none of them a kernel."""
DEFAULT: dict[str, dict[str, tuple[str, ...]]] = {
    "numpy": {"16m": ("adamw", "lion"), "resnet50": ("adamw",), "1000x32x32": ("adamw",)},
    "torch": {
        "16m": (*SINGLE, *TAILS),
        "resnet50": (*SINGLE, "adagrad", *UNFUSED, *TAILS),
        "vit-b": ("momentum", "rmsprop", "adamw", "lion", *TAILS),
        "gpt2": ("momentum", "rmsprop", "adamw", "lion"),
        "1000x32x32": (*SINGLE, *TAILS),
    },
    "keras": {"16m": SINGLE, "resnet50": SINGLE, "1000x32x32": ("adamw",)},
    "keras-torch": {"resnet50": SINGLE, "1000x32x32": ("sgd", "adamw")},
    "jax": {"16m": SINGLE, "resnet50": ("adamw",), "1000x32x32": ("adamw",)},
}
"""The cases that are worth their time; others run when they are asked for."""


def plan(framework: str, rules: Sequence[str], mixes: Sequence[str], quick: bool) -> list[Case]:
    """The cases of a run.

    Args:
        framework: One of `FRAMEWORKS`.
        rules: Those to run; if there are none, all on the mixes that are given, else the default.
        mixes: The same.
        quick: Only AdamW on one tensor, with its tail, unless something else is asked for.
    """
    if rules or mixes or quick:
        some = (*rules,) or (("adamw", "tail") if quick else tuple(RULES))
        chosen = {mix: some for mix in ((*mixes,) or (("16m",) if quick else MIXES))}
    else:
        chosen = DEFAULT[framework]
    return [
        Case(rule, mix, not quick and (mix == "16m" or (rule, mix) == ("adamw", "resnet50")))
        for mix, names in chosen.items()
        for rule in names
        if rule not in TAILS or framework == "torch"
    ]
