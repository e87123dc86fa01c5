"""Which rules there are: the project's own, and those that other packages bring."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from portopt import rules
from portopt.rules.base import Rule
from portopt.rules.native import Native

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "portopt.rules"
"""The group of entry points under which a package names its rules."""


class PluginError(ImportError):
    """A package promises a rule and does not keep it: names the entry point and the package."""


@cache
def own() -> dict[str, type[Rule]]:
    """The project's rules by name."""
    found = {name: getattr(rules, name) for name in rules.__all__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, Rule) and value is not Rule
    }


def plugins() -> dict[str, EntryPoint]:
    """The entry points of installed packages by name; the first of a name counts."""
    from importlib.metadata import entry_points  # here, as `import portopt_torch` is to be quick

    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point)
    return {name: point for name, point in found.items() if _same(name, own()) is None}


def load(point: EntryPoint) -> type[Rule]:
    """The rule that an entry point names.

    Raises:
        PluginError: it cannot be imported, or is no rule.
    """
    where = f"entry point {point.name!r} ({point.value})"
    if point.dist is not None:
        where += f" of package {point.dist.name!r}"
    try:
        rule = point.load()
    except Exception as error:
        raise PluginError(f"{where} cannot be loaded: {error}") from error
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise PluginError(f"{where} must be a subclass of portopt.Rule, is {rule!r}")
    return rule


@dataclass(frozen=True)
class Entry:
    """What there is to say of an installed rule.

    Attributes:
        name: Its name.
        package: The package that brings it; "portopt" for the project's own.
        options: Its fields with their defaults; None for one that must be given.
        slots: Its slots with the defaults, for a matrix where the shape matters.
        further_slots: Those that options turn on.
        numbers: The scalars that it keeps for each parameter tensor.
        natives: The frameworks' own optimizers that are this rule.
        bytes_per_parameter: Bytes of state for each float32 element of a 1024x1024 matrix: with the
            defaults, and with every option.
    """

    name: str
    package: str
    options: dict[str, Any]
    slots: tuple[str, ...]
    further_slots: tuple[str, ...]
    numbers: tuple[str, ...]
    natives: tuple[str, ...]
    bytes_per_parameter: tuple[float, float]


def entry(name: str, rule: type[Rule], package: str = "portopt") -> Entry:
    """What a rule's class says of itself."""
    options = {field.name: rule.defaults().get(field.name) for field in fields(rule)}
    all_on = {
        key: True if value is False else 1.0
        for key, value in options.items()
        if value is None or value is False or value == 0
    }
    shape = (1024, 1024)
    slots = rule.unchecked(**options).slot_shapes(shape)
    further = rule.unchecked(**options | all_on).slot_shapes(shape)
    sizes = [sum(map(math.prod, own.values())) * 4 / math.prod(shape) for own in (slots, further)]
    return Entry(
        name=name,
        package=package,
        options=options,
        slots=tuple(slots),
        further_slots=tuple(slot for slot in further if slot not in slots),
        numbers=rule.unchecked(**options).numbers,
        natives=tuple(native.name for native in vars(rule).get("natives", ())),
        bytes_per_parameter=(sizes[0], sizes[1]),
    )


def find(name: str, framework: str | None = None) -> tuple[type[Rule], Native | None]:
    """The rule of a name, in any case, and the framework's native twin of that rule.

    Args:
        name: A native's name in ``framework`` ("nadam" in Keras), a rule's, or an entry point's.
        framework: "torch" or "keras"; without one the names of natives do not count.

    Raises:
        TypeError: ``name`` is no string.
        ValueError: there is no such rule; says which there are.
        PluginError: a package's rule is asked for that cannot be loaded.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    natives = {native.title: pair for pair in drop_ins(framework) for native in pair[1:]}
    title = _same(name, natives)
    if title is not None:
        return natives[title]
    others = plugins()
    key = _same(name, own()) or _same(name, others)
    if key is None:
        known = sorted({*natives, *own(), *others}, key=str.casefold)
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    return own().get(key) or load(others[key]), None


def parse(text: str) -> Rule:
    """The rule that a text names, with its options: ``adam`` or ``adam:lr=0.1,amsgrad=True``.

    Raises:
        ValueError: there is no such rule or option, an option is not given as NAME=VALUE or must be
            given and is not, or its value is not allowed.
        PluginError: a package's rule is asked for that cannot be loaded.

    Example:
        >>> parse("momentum:lr=0.5,buffer=average").buffer
        'average'
    """
    rule, values = read(text)
    known = [field.name for field in fields(rule)]
    missing = [key for key in known if key not in values and key not in rule.defaults()]
    if missing:
        raise ValueError(f"{text}: {rule.__name__} must be given {', '.join(missing)}")
    try:
        return rule(**values)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error


def read(text: str) -> tuple[type[Rule], dict[str, Any]]:
    """The class and the options that a text has, as `parse` takes it; the values are not checked.

    Raises:
        ValueError, PluginError: as for `parse`, for the names.
    """
    name, *options = text.replace(":", ",", 1).split(",")
    rule, _ = find(name)
    known = [field.name for field in fields(rule)]
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            allowed = ", ".join(known)
            raise ValueError(f"{text}: an option must be NAME=VALUE of {allowed}, got {option!r}")
        values[key] = _literal(value)
    return rule, values


def _literal(text: str) -> Any:
    """A number, True or False as Python writes it; else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # as it says
        return text


def drop_ins(framework: str | None) -> list[tuple[type[Rule], Native]]:
    """Each native of a framework, with its rule."""
    return [
        (rule, native)
        for rule in own().values()
        for native in vars(rule).get("natives", ())  # not those of a base class
        if native.framework == framework
    ]


def _same(name: str, known: dict[str, Any]) -> str | None:
    return next((key for key in known if key.casefold() == name.casefold()), None)
