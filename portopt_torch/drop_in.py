"""The optimizers of ``torch.optim``, by the same names, with the same arguments and state.

The four that most programs use are written out, for editors and type checkers to read; the others
are made from what their rules say of them, by `drop_in`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from portopt import rules
from portopt.rules import registry
from portopt_torch.from_rule import from_rule
from portopt_torch.optimizer import Optimizer
from portopt_torch.plan import add_slots, begin_count

Fields = tuple[type[rules.Rule], dict[str, Any]]
FLAGS = ("amsgrad", "centered", "decoupled_weight_decay", "maximize", "nesterov")
LATER = (*FLAGS, "momentum", "foreach", "capturable", "differentiable", "fused")
"""What ``torch.optim`` fills in where a state of an older version lacks it."""


class SGD(Optimizer):
    """``torch.optim.SGD``: the rule `portopt.rules.Momentum`, or `portopt.rules.SGD` without one.

    Arguments, groups and ``state_dict`` are those of ``torch.optim.SGD``, with ``around`` on top.
    Of a sparse gradient the rows alone are updated; with a momentum, everything.
    """

    keeps_step = False
    sparse = "also"
    may_lack = LATER

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        around: rules.Around | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, around)

    @classmethod
    def rule_of(cls, group: Mapping[str, Any]) -> Fields:
        if group["momentum"] == 0:
            return rules.SGD, _same(group, "lr", "weight_decay", "maximize")
        return cls.checked_as(group)

    @classmethod
    def checked_as(cls, group: Mapping[str, Any]) -> Fields:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return rules.Momentum, _same(group, *names)


class RMSprop(Optimizer):
    """``torch.optim.RMSprop``: the rule `portopt.rules.RMSprop` as it stands.

    Arguments, groups and ``state_dict`` are those of ``torch.optim.RMSprop``, with ``around`` on
    top.
    """

    may_lack = LATER

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        around: rules.Around | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, around)

    @classmethod
    def rule_of(cls, group: Mapping[str, Any]) -> Fields:
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
        return rules.RMSprop, _same(group, *names)


class Adam(Optimizer):
    """``torch.optim.Adam``: the rule `portopt.rules.Adam` as it stands.

    Arguments, groups and ``state_dict`` are those of ``torch.optim.Adam``, with ``around`` on top.
    """

    may_lack = LATER

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        around: rules.Around | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, around)

    @classmethod
    def rule_of(cls, group: Mapping[str, Any]) -> Fields:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers in [0, 1), got {betas!r}")
        decay = {"decoupled": _flag(group["decoupled_weight_decay"])}
        same = _same(group, "lr", "eps", "weight_decay", "amsgrad", "maximize")
        return rules.Adam, {**same, **decay, "beta1": betas[0], "beta2": betas[1]}


class AdamW(Adam):
    """``torch.optim.AdamW``: the rule `portopt.rules.Adam`, decoupled.

    Arguments, groups and ``state_dict`` are those of ``torch.optim.AdamW``, with ``around`` on top.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        around: rules.Around | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            around=around,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Decay stays decoupled, also when the state was Adam's."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True


def _same(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: _flag(group[name]) if name in FLAGS else group[name] for name in names}


def _dtype(group: Mapping[str, Any]) -> torch.dtype:
    first = next(iter(group.get("params", ())), None)  # a saved group has numbers there
    return first.dtype if torch.is_tensor(first) else torch.get_default_dtype()


def _flag(value: Any) -> Any:
    """PyTorch takes any value for a flag; 0 and 1 are plain enough to be taken for one here."""
    return bool(value) if isinstance(value, int) else value


WRITTEN_OUT = {cls.__name__: cls for cls in (SGD, RMSprop, Adam, AdamW)}


def names() -> list[str]:
    """The optimizers of the installed ``torch.optim`` that have a drop-in class."""
    natives = {native.title for _, native in registry.drop_ins("torch")}
    return sorted(title for title in natives if hasattr(torch.optim, title))


def get(name: str) -> type[Optimizer]:
    """An optimizer class by its name, in upper or lower case.

    Args:
        name: One of ``torch.optim``'s; else that of a rule, of portopt or of an installed package
            (entry points ``portopt.rules``), of which `from_rule` makes a class.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: there is none of this name; says which there are.
        ImportError: the package that brings the rule cannot be imported.

    Example:
        >>> get("lion"), get("adagrad")
        (<class 'portopt_torch.from_rule.Lion'>, <class 'portopt_torch.Adagrad'>)
    """
    rule, native = registry.find(name, "torch")
    if native is None or not hasattr(torch.optim, native.title):
        return from_rule(rule)
    return WRITTEN_OUT.get(native.title) or drop_in(rule, native)


@cache
def drop_in(rule: type[rules.Rule], native: rules.Native) -> type[Optimizer]:
    """The class that stands in for a native, with its arguments, groups and ``state_dict``."""
    signature = inspect.signature(getattr(torch.optim, native.title).__init__)
    around = inspect.Parameter("around", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = signature.replace(parameters=[*signature.parameters.values(), around])
    is_bool = {field.name: field.type == "bool" for field in fields(rule)}
    targets = {name: native.target(name) for name in signature.parameters}
    own = [name for name, to in targets.items() if isinstance(to, tuple) or to in is_bool]
    defaults = native.fields({name: signature.parameters[name].default for name in own})
    scalars = rule.hyperparameters()
    resolutions = [name for name, value in defaults.items() if value is None and name in scalars]

    class DropIn(Optimizer):
        __doc__ = (
            f"``{native.name}``: the rule `portopt.rules.{rule.__name__}`.\n\n"
            "Arguments, groups and ``state_dict`` are the native's, with ``around`` on top."
        )
        may_lack = LATER
        sparse = native.sparse
        words = native.words
        keeps_step = native.keeps_step

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:  # in the words of a function that is written out
                raise TypeError(f"{native.title}.__init__() {error}") from None
            bound.apply_defaults()
            given = dict(bound.arguments)
            del given["self"]
            super().__init__(given.pop("params"), given, given.pop("around"))
            for group in self.param_groups if native.eager else ():
                rule, _ = self._traced(group)
                for param in group["params"]:
                    self.state[param]["step"] = begin_count("step", rule, group, param)
                    add_slots(self.state[param], rule, rule.slots, param)

        if native.eager:

            def share_memory(self) -> None:
                """Let other processes share the slots."""
                for group in self.param_groups:
                    for slot in self._traced(group)[0].slots:
                        for param in group["params"]:
                            self.state[param][slot].share_memory_()

        @classmethod
        def rule_of(cls, group: Mapping[str, Any]) -> Fields:
            given = native.fields({name: group[name] for name in own})
            for name in resolutions:
                # That of the first parameter decides, as natively.
                if given[name] is None:
                    given[name] = torch.finfo(_dtype(group)).eps
            flags = {name: _flag(value) for name, value in given.items() if is_bool[name]}
            return rule, {**native.values, **given, **flags}

    DropIn.__init__.__signature__ = signature  # type: ignore[attr-defined]
    DropIn.__name__ = DropIn.__qualname__ = native.title
    DropIn.__module__ = __package__
    return DropIn
