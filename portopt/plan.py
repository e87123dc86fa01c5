"""Plans: which NumPy arrays a step updates together, by kernels, and which one by one."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property, partial
from itertools import accumulate, chain, compress
from operator import is_
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from numpy.lib.array_utils import byte_bounds

from portopt.arrays import Namespace, compute_dtype
from portopt.kernels import slow
from portopt.program import Program
from portopt.rules import Rule
from portopt.rules.around import initial
from portopt.rules.base import PARAM

NDArray: TypeAlias = npt.NDArray[Any]
Name: TypeAlias = "int | str"
State: TypeAlias = "dict[str, Any]"


class Member(NamedTuple):
    """A parameter that has a gradient, or may get one.

    Attributes:
        place: Its place among all parameters.
        group: The place of its group.
        program: What updates it.
        state: Its state, as `state_of` forms it.
        operands: Its arrays, by `Program.operands`; in the place of a gradient that is not there
            yet, what it will be like.
        waits: Whether it has none.
    """

    place: int
    group: int
    program: Program
    state: State
    operands: Sequence[NDArray]
    waits: bool


class Plan:
    """The batches of a step, which serve for the next ones as long as only gradients change.

    Args:
        groups: The optimizer's groups.
        programs: For each of them its program.
        members: The parameters that have a gradient, and those that may get one.

    Attributes:
        lasts: Whether it may serve again: all goes through kernels.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        programs: Sequence[Program],
        members: Sequence[Member],
    ) -> None:
        self._programs = programs
        self._names, self._params = listed(groups)
        names = [*chain.from_iterable(self._names)]
        kernels: dict[tuple[Program, tuple[str, ...]], list[Member]] = {}
        others: dict[tuple[Program, tuple[str, ...]], list[Member]] = {}
        for member in members:
            takes = member.program.elementwise and _takes(member.operands, silently=member.waits)
            if takes or not member.waits:
                storage = tuple(dtype_name(array.dtype) for array in member.operands)
                alike = kernels if takes else others
                alike.setdefault((member.program, storage), []).append(member)
        active = [*chain.from_iterable((*kernels.values(), *others.values()))]
        self._states = {names[member.place]: member.state for member in active}
        self._idle = sorted({*range(len(names))} - {member.place for member in active})
        self._launches = [_Launch(*key, some) for key, some in kernels.items()]
        self._batches = [*self._launches, *(_Batch(*key, some) for key, some in others.items())]
        self.lasts = not others
        zeroes = any(program.writes_grad for program in programs)
        self._may_zero_twice = zeroes and len(members) > 1

    def fits(
        self,
        groups: Sequence[Mapping[str, Any]],
        programs: Sequence[Program],
        state: Mapping[Name, State],
        grads: Sequence[NDArray | None],
    ) -> bool:
        """Whether it serves for this step as well; notes where gradients are.

        Args:
            groups: The optimizer's groups.
            programs: For each of them its program.
            state: The optimizer's state.
            grads: For each parameter its gradient, if it has one.
        """
        names, params = listed(groups)
        return (
            names == self._names
            and all(map(is_, programs, self._programs))
            and all(map(is_, params, self._params))
            and all(map(is_, map(state.get, self._states), self._states.values()))
            and all(grads[place] is None for place in self._idle)
            and all(launch.fits(grads) for launch in self._launches)
            and not (self._may_zero_twice and self._has_one_twice())
        )

    def _has_one_twice(self) -> bool:
        """Whether two gradients begin at one place."""
        found = np.sort(np.concatenate([launch.step.table[:, 1] for launch in self._launches]))
        return bool(((found[1:] == found[:-1]) & (found[1:] != 0)).any())

    def grad_norm(self) -> float:
        """The 2-norm of all gradients together."""
        from portopt.kernels import cpu

        return cpu.norm(chain.from_iterable(batch.square_sums() for batch in self._batches))

    def prepare(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Form the scalars of the step; changes nothing.

        Args:
            values: For each group what `Program.scalars` asks for.
        """
        for batch in self._batches:
            batch.prepare(values)

    def run(self, state: dict[Name, State]) -> None:
        """Update parameters and slots, and note in ``state``, the optimizer's, that it is done."""
        from portopt.kernels import pool

        state.update(self._states)
        for batch in self._batches:
            batch.count()
        pool.finish([batch.run for batch in self._batches])


class _Batch:
    """Parameters of one program that are stored alike, updated one by one."""

    def __init__(
        self, program: Program, storage: tuple[str, ...], members: Sequence[Member]
    ) -> None:
        self.program, self.storage, self.members = program, storage, members
        self.groups = [member.group for member in members]
        self.states = [member.state for member in members]
        self.here = [not member.waits for member in members]
        self.counts = ("step", *program.numbers)
        self.present = {group: place for place, group in enumerate(dict.fromkeys(self.groups))}
        self.by_group = [*map(self.present.__getitem__, self.groups)]

    def square_sums(self) -> Iterable[float]:
        """Sums of squares of the gradients."""
        from portopt.kernels import cpu

        grads = [member.operands[self.program.operands.index("grad")] for member in self.members]
        native = grads[0].dtype.newbyteorder("=")
        return cpu.square_sums([np.require(np.asarray(grad), native, ["C", "A"]) for grad in grads])

    def prepare(self, values: Sequence[Mapping[str, Any]]) -> None:
        """As `Plan.prepare`."""
        columns = [[state[name] for state in self.states] for name in self.counts]
        if all(column.count(column[0]) == len(column) for column in columns):  # as is usual
            own = [column[0] for column in columns]
            kinds, self.which = [(group, *own) for group in self.present], self.by_group
        else:
            keys = [*zip(self.groups, *columns, strict=True)]
            places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
            kinds, self.which = [*places], [*map(places.__getitem__, keys)]
        self.scalars, self.new = [], []
        for group, given, *numbers in kinds:
            step = checked_step("a state's 'step'", given)  # somebody may have changed it
            named = dict(zip(self.program.numbers, map(float, numbers), strict=True))
            scalars = self.program.scalars({**values[group], **named}, step + 1)
            self.scalars.append(scalars)
            kept = rounded(self.program.kept(scalars), self.storage[0])
            self.new.append({"step": step + 1, **kept})

    def count(self) -> None:
        """Take over the number of steps done, and the rule's new numbers."""
        for name in self.counts:
            new = [row[name] for row in self.new]
            pairs = zip(self.states, self.which, strict=True)
            for state, place in compress(pairs, self.here):
                state[name] = new[place]

    def run(self) -> None:
        """Update every parameter and slot."""
        dtype = np.dtype(compute_dtype(self.storage[0]))
        for member, place in zip(self.members, self.which, strict=True):
            stored = dict(zip(self.program.operands, member.operands, strict=True))
            # Plain arrays: a subclass may mean something else by an operator, as np.matrix by *.
            arrays = {k: x.astype(dtype, copy=False, subok=False) for k, x in stored.items()}
            with np.errstate(all="ignore"):  # NaN and Inf propagate, as in every framework
                new = self.program.run(cast(Namespace, np), self.scalars[place], arrays)
                for name, value in new.items():
                    stored[name][...] = value


class _Launch(_Batch):
    """Parameters of one program that are stored alike, updated by one launch of its kernel.

    It passes over those without a gradient.
    """

    def __init__(
        self, program: Program, storage: tuple[str, ...], members: Sequence[Member]
    ) -> None:
        from portopt.kernels import cpu, layout  # here, as `import portopt` is to be quick

        super().__init__(program, storage, members)
        self.members = ()  # their gradients are of one step alone
        self.places = [member.place for member in members]
        params, grads, *slots = zip(*(member.operands for member in members), strict=True)
        self.params, self.slots = params, [*chain.from_iterable(slots)]
        self.kept = layout.array([*params, *self.slots])
        self.kept_layout = layout.of_arrays(self.kept, moves=False)
        self.grad_layout = layout.of_arrays(layout.array(grads), moves=True)
        # As it demands. A list: dtypes may be equal, and each an object of its own.
        self.alive = [(type(grad), grad.dtype) for grad in grads]
        sizes = [grad.size for grad in grads]
        columns = self.kept_layout.addresses.reshape(-1, len(members))
        rows = np.insert(columns, 1, self._grads_at(), axis=0).T
        self.array, self.threads = layout.array, cpu.threads
        self.step = cpu.Step(program, storage, rows, sizes)
        self.make_square_sum = partial(cpu.SquareSum, storage[1], rows[:, 1], sizes)

    def fits(self, grads: Sequence[NDArray | None]) -> bool:
        """Whether all lies as it did; notes where gradients are."""
        try:
            slots = [state[name] for name in self.program.slots for state in self.states]
        except KeyError:
            return False
        given = [grads[place] for place in self.places]
        self.here = [grad is not None for grad in given]
        # A parameter lies as its gradient is to lie.
        own = [p if g is None else g for p, g in zip(self.params, given, strict=True)]
        fits = (
            all(map(is_, slots, self.slots))
            and all(name in state for name in self.counts for state in self.states)
            and self.kept_layout.fits(self.kept)
            and self.grad_layout.fits(self.array(own))
        )
        self.step.table[:, 1] = self._grads_at()
        return fits

    def _grads_at(self) -> NDArray:
        """Where gradients are; 0 for none."""
        return np.where(self.here, self.grad_layout.addresses, 0)

    @cached_property
    def square_sum(self) -> Any:
        """The norm's launch, which few steps need."""
        return self.make_square_sum()

    def square_sums(self) -> Iterable[float]:
        """Sums of squares of the gradients."""
        self.square_sum.table[:, 0] = self.step.table[:, 1]
        sums: NDArray = self.square_sum.run(self.threads())
        return sums

    def run(self) -> None:
        """Update every parameter and slot."""
        self.step.run(self.scalars, self.which, self.threads())


def listed(groups: Sequence[Mapping[str, Any]]) -> tuple[list[list[Name]], list[NDArray]]:
    """For each group the names of its parameters; and all parameters."""
    each = [group["params"] for group in groups]
    return [*map(list, each)], [*chain.from_iterable(some.values() for some in each)]


class Places:
    """Where arrays lie, to find those that share memory.

    Args:
        arrays: The arrays by name.
    """

    def __init__(self, arrays: Mapping[Name, NDArray]) -> None:
        self._arrays = arrays
        bounds = {name: byte_bounds(array) for name, array in arrays.items()}
        self._names = sorted(bounds, key=bounds.__getitem__)
        self._begins = [bounds[name][0] for name in self._names]
        self._ends = [*accumulate((bounds[name][1] for name in self._names), max)]

    def sharing(self, array: NDArray, but: Name | None) -> Name | None:
        """The name of one, ``but`` that, which shares memory with ``array``; None if none does."""
        begin, end = byte_bounds(array)
        place = bisect_left(self._begins, end) - 1
        while place >= 0 and self._ends[place] > begin:
            name = self._names[place]
            if name != but and np.shares_memory(array, self._arrays[name]):
                return name
            place -= 1
        return None


def state_of(entries: Mapping[str, Any], rule: Rule, program: Program, param: NDArray) -> State:
    """A parameter's state with just the slots and numbers that the program has now.

    Args:
        entries: Its state until now.
        rule: What the program was traced from.
        program: The program.
        param: The parameter.
    """
    shapes = rule.slot_shapes(param.shape)

    def begin(slot: str) -> NDArray:
        value, shape = initial(rule, slot), shapes.get(slot, param.shape)
        return np.full_like(param, param if value is PARAM else value, subok=False, shape=shape)

    slots = {slot: entries[slot] if slot in entries else begin(slot) for slot in program.slots}
    first = {name: rule.initial(name) for name in program.numbers if name not in entries}
    kept = {name: entries[name] for name in program.numbers if name in entries}
    return {
        "step": entries.get("step", 0),
        **kept,
        **rounded(first, dtype_name(param.dtype)),
        **slots,
    }


def checked_step(what: str, step: Any) -> int:
    """A number of steps; a TypeError, which begins with ``what``, if it is none."""
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise TypeError(f"{what} must be an int of at least 0, got {step!r}")
    return int(step)


def rounded(numbers: Mapping[str, float], dtype: str) -> dict[str, float]:
    """A rule's numbers as frameworks keep them: in float32, if the parameter is no float64."""
    kind = np.float64 if dtype == "float64" else np.float32
    return {name: float(kind(value)) for name, value in numbers.items()}


def _takes(arrays: Sequence[NDArray], *, silently: bool) -> bool:
    """Whether a kernel takes the arrays, the parameter first; else why not is said once."""
    why = _refusal(arrays)
    if why is not None and not silently:
        slow.warn("portopt.Optimizer", why)
    return why is None


def _refusal(arrays: Sequence[NDArray]) -> str | None:
    from portopt.kernels import cpu, layout

    first = arrays[0]
    if not all(array.flags.aligned and array.dtype.isnative for array in arrays):
        return "an array is not aligned, or of another byte order than this processor's"
    if first.size and not all(array.flags.c_contiguous for array in arrays):
        if not cpu.is_dense([size for size in first.shape if size > 1], _strides(first)):
            return "an array has gaps in its memory, or goes through it backwards"
        if any(_strides(array) != _strides(first) for array in arrays):
            return "a gradient or slot lies otherwise in memory than its parameter"
    why = cpu.refusal(tuple(dtype_name(array.dtype) for array in arrays))
    return why if why or layout.arrays() else layout.UNKNOWN


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Its name, which NumPy forms anew each time, slowly."""
    return str(dtype.name)


def _strides(array: NDArray) -> list[int]:
    """In elements; a dimension of one element has none."""
    return [
        n // array.itemsize for n, size in zip(array.strides, array.shape, strict=True) if size > 1
    ]
