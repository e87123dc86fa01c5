"""What every rule is: checked hyperparameters, named slots, one pure update."""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    get_args,
    get_origin,
    get_type_hints,
)

from portopt.arrays import Array, Namespace
from portopt.rules.native import Native

if TYPE_CHECKING:
    from typing_extensions import Self

Update = tuple[Array, dict[str, Array]]


@dataclass(frozen=True)
class Interval:
    """The values that a float hyperparameter may take, in the usual notation: ``[0, 1)``.

    Attributes:
        text: The notation.
        sensible: Those that are worth a search, where more are allowed.
    """

    text: str
    sensible: Interval | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end."""
        low, high = map(float, self.text[1:-1].split(","))
        return low, high

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = value >= low if self.text[0] == "[" else value > low
        below = value <= high if self.text[-1] == "]" else value < high
        return above and below


FIXED = "fixed"
"""Said of a float, ``Annotated[float, interval, FIXED]``: another value is another formula."""

PARAM = "param"
"""What `Rule.initial` says of a slot that begins as a copy of its parameter."""

REAL = Interval("(-inf, inf)")
Real = Annotated[float, REAL]
NonNegative = Annotated[float, Interval("[0, inf)")]
Decay = Annotated[float, Interval("[0, 1)")]
LooseDecay = Annotated[float, Interval("[0, inf)", sensible=Interval("[0, 1)"))]
"""A decay which the natives let be 1 and more."""


class HyperparameterError(ValueError):
    """A hyperparameter has a value that is not allowed.

    Attributes:
        name: The field of the rule.
        value: What was given.
        allowed: What may be given, in words.
    """

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name} must be {allowed}, got {value!r}")
        self.name, self.value, self.allowed = name, value, allowed

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is copied and pickled: by what it was made of, and not by its message."""
        return type(self), (self.name, self.value, self.allowed)


class HyperparameterTypeError(HyperparameterError, TypeError):
    """A hyperparameter has a value of a type that is not allowed."""


class Slots(Mapping[str, Any]):
    """The slots of one parameter, read as attributes: ``slot.exp_avg``. They cannot be changed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no slot {name!r}: the rule's slots are {', '.join(self) or 'none'}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"slot.{name} cannot be assigned: return the new slots instead")

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(abc.ABC):  # noqa: B024 (what derives from it may be abstract)
    """A frozen dataclass whose fields are checked, and of two kinds.

    A field annotated ``float`` is a scalar, free to change from step to step. Every other field (a
    bool, a ``Literal``, a float that is `FIXED`) chooses between formulas, and so does whether a
    float is zero.

    Raises:
        HyperparameterError: a `ValueError`: a value out of its range or not among its choices.
        HyperparameterTypeError: a `TypeError` too: a value of the wrong type.
    """

    def __post_init__(self) -> None:
        for name, field in _fields(type(self)).items():
            object.__setattr__(self, name, field.check(name, getattr(self, name)))

    @classmethod
    def hyperparameters(cls) -> tuple[str, ...]:
        """Names of the float fields, which are scalars of the update."""
        return tuple(name for name, field in _fields(cls).items() if field.is_scalar)

    @classmethod
    def intervals(cls) -> dict[str, Interval]:
        """The range of each of the `hyperparameters`."""
        return {
            name: field.interval
            for name, field in _fields(cls).items()
            if field.is_scalar and field.interval
        }

    @property
    def structure(self) -> tuple[object, ...]:
        """All that may be branched on: with equal structures go equal programs."""
        return tuple(
            is_zero(value) if field.is_scalar else repr(value) if is_zero(value) else value
            for name, field in _fields(type(self)).items()
            for value in [getattr(self, name)]
        )

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The fields that need not be given, with their values."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            if field.default is not MISSING:
                found[field.name] = field.default
            elif field.default_factory is not MISSING:
                found[field.name] = field.default_factory()
        return found

    def values(self) -> dict[str, Any]:
        """The fields that can be given, with their values."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def changed(self, values: Mapping[str, Any]) -> Self:
        """The same with these values.

        Raises:
            TypeError: there is no such field.
            HyperparameterError: a value is not allowed.
        """
        known = self.values()
        for name in values:
            if name not in known:
                cls = type(self).__name__
                raise TypeError(f"unknown hyperparameter {name!r}: {cls} has {', '.join(known)}")
        return replace(self, **values)

    @classmethod
    def unchecked(cls, **values: Any) -> Self:
        """One of any values: symbols, 0-d arrays, a schedule's next value."""
        new = object.__new__(cls)
        new.__dict__.update(cls.defaults() | values)
        return new


@dataclass(frozen=True, kw_only=True)
class Rule(Hyperparameters):
    """One optimizer's arithmetic: hyperparameters with a pure `update`.

    An update may branch on its fields that are no floats, and on whether a float is zero.

    Every rule takes the four fields below; `step` alone knows the last three, but for the decay of
    rules with `decay_of_its_own`.

    Args:
        lr: Learning rate, in [0, inf).
        weight_decay: Weight decay, in [0, inf). 0.0 by default.
        decoupled: Shrink the parameter (``param - lr*weight_decay*param``) before the update,
            instead of adding ``weight_decay*param`` to the gradient. False by default.
        maximize: Ascend: the gradient's sign is turned first of all. False by default.

    Raises:
        HyperparameterError: a `ValueError`: a value out of its range or not among its choices.
        HyperparameterTypeError: a `TypeError` too: a value of the wrong type.

    Source:
        Coupled and decoupled weight decay: Loshchilov & Hutter 2019, "Decoupled Weight Decay
        Regularization", algorithm 1, lines 6 and 12. https://arxiv.org/abs/1711.05101
    """

    natives: ClassVar[tuple[Native, ...]] = ()
    """The frameworks' own optimizers that are this rule."""
    by_shape: ClassVar[bool] = False
    """Whether the update, or what it keeps, depends on the shape of the parameter."""
    decay_of_its_own: ClassVar[bool] = False
    """Whether `update` itself applies a weight decay that is not `decoupled`."""
    has_modes: ClassVar[bool] = False
    """Whether it is evaluated at other weights than it is trained at: `evaluated`, `trained`."""

    lr: NonNegative
    weight_decay: NonNegative = 0.0
    decoupled: bool = False
    maximize: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays kept for each parameter, of its dtype."""
        return ()

    def slot_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The slots of a parameter of this shape, with their shapes: all of them, and the same.

        Others, or other shapes, has only a rule that says so by `by_shape`.

        Raises:
            ValueError: the rule updates no parameter of this shape.
        """
        return dict.fromkeys(self.slots, shape)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the scalars kept for each parameter, beside the slots: made of scalars alone."""
        return ()

    def initial(self, slot: str) -> Any:
        """What a slot or number is before the first step: one value, or `PARAM` for a copy."""
        return 0.0

    def evaluated(self, xp: Namespace, param: Array, slot: Any) -> Array:
        """The weights to evaluate the model at, where the parameter is what it is trained at."""
        return param

    def trained(self, xp: Namespace, param: Array, slot: Any) -> Array:
        """The reverse of `evaluated`: the weights to go on with."""
        return param

    @abc.abstractmethod
    def update(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        """The new parameter, slots and numbers; changes nothing and asks for no framework.

        Args:
            xp: The arrays' namespace; the functions in `portopt.arrays.FUNCTIONS`.
            t: The number of this step, from 1: a scalar.
            param: The parameter; its shape may be asked for if `by_shape` says so.
            grad: Its gradient, of the same shape and dtype.
            slot: The slots and numbers, as attributes.
        """

    def step(self, xp: Namespace, t: int, param: Array, grad: Array, slot: Any) -> Update:
        """One whole step: `maximize`, weight decay, then `update`. Arguments as there."""
        if self.maximize:
            grad = -grad
        if self.weight_decay:
            if self.decoupled:
                param = param - self.lr * self.weight_decay * param
            elif not self.decay_of_its_own:
                grad = grad + self.weight_decay * param
        return self.update(xp, t, param, grad, slot)


def presets(rule: Rule | type[Rule]) -> tuple[type[Rule], dict[str, Any]]:
    """A rule's class, and what can be given to it: of a class, the defaults, else its values."""
    if isinstance(rule, type):
        given = {field.name for field in fields(rule) if field.init}
        return rule, {name: value for name, value in rule.defaults().items() if name in given}
    return type(rule), rule.values()


def ema(old: Array, new: Array, decay: float) -> Array:
    """The exponential moving average ``decay*old + (1 - decay)*new``.

    It moves from old to new by ``1 - decay``: in the textbook form the rounding of ``decay`` itself
    accumulates over ``1/(1 - decay)`` steps (1e-5 of the value for 0.999 in float32).
    """
    return old + (1 - decay) * (new - old) if decay else new


def mean_square(xp: Namespace, old: Array, grad: Array, decay: float) -> Array:
    """The `ema` of ``grad**2``.

    Once it has overflowed it stays infinite, so that its weight stands still; infinity minus
    infinity would make that weight NaN, and with it the whole model.
    """
    square = grad * grad
    # Of the difference, not of the sum: the same bits, and under XLA a sixth less time.
    return old + xp.where(old < math.inf, (1 - decay) * (square - old), 0.0) if decay else square


def is_zero(value: object) -> bool:
    """Whether a hyperparameter is zero; a 0-d array is not, as asking would wait for its device."""
    return isinstance(value, numbers.Real) and value == 0


Check = Callable[[str, Any], Any]


class _Field(NamedTuple):
    """A field: whether it is a scalar of the update, what checks it, and the range of a float."""

    is_scalar: bool
    check: Check
    interval: Interval | None = None


@cache
def _fields(cls: type[Hyperparameters]) -> dict[str, _Field]:
    try:
        hints = get_type_hints(cls, include_extras=True)
    except NameError as error:  # an annotation that is text is read in the module
        named = next((f.name for f in fields(cls) if str(error.name) in str(f.type)), "a variable")
        raise TypeError(
            f"{cls.__name__}.{named}: its type has the name {error.name!r}, which must be one of "
            f"the module {cls.__module__}"
        ) from error
    table: dict[str, _Field] = {}
    bases = [base for base in cls.__mro__[1:] if issubclass(base, Hyperparameters)]
    for field in fields(cls):
        if field.name == "params":
            raise TypeError(f"{cls.__name__}: a field cannot be named 'params', as parameters are")
        hint = hints[field.name]
        notes: list[Any] = []
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
        intervals = [note for note in notes if isinstance(note, Interval)]
        inherited = [base for base in bases if field.name in _fields(base)]
        if hint is float and inherited and not intervals:
            table[field.name] = _fields(inherited[0])[field.name]  # with its range
        elif hint is float:
            interval = intervals[0] if intervals else REAL
            table[field.name] = _Field(FIXED not in notes, _float_in(interval), interval)
        elif hint is int:
            table[field.name] = _Field(False, _int_in(intervals[0] if intervals else REAL))
        elif hint is bool:
            table[field.name] = _Field(False, _bool)
        elif get_origin(hint) is Literal:
            table[field.name] = _Field(False, _one_of(get_args(hint)))
        else:
            table[field.name] = _Field(False, _anything)
    return table


def _float_in(interval: Interval) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise HyperparameterTypeError(name, value, f"a real number in {interval.text}")
        try:
            number = float(value)
        except OverflowError:  # an integer beyond every float
            number = math.inf
        if number not in interval:
            raise HyperparameterError(name, value, f"in {interval.text}")
        return number

    return check


def _int_in(interval: Interval) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise HyperparameterTypeError(name, value, f"a whole number in {interval.text}")
        if int(value) not in interval:
            raise HyperparameterError(name, value, f"a whole number in {interval.text}")
        return int(value)

    return check


def _one_of(choices: tuple[object, ...]) -> Check:
    def check(name: str, value: Any) -> Any:
        if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
            raise HyperparameterError(name, value, f"one of {', '.join(map(repr, choices))}")
        return value

    return check


def _bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise HyperparameterTypeError(name, value, "True or False")
    return value


def _anything(name: str, value: Any) -> Any:
    return value
