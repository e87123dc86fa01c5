"""What every step asks of many tensors: which they are, and where and how they lie in memory.

A compiled look asks (`portopt_torch.native`), on several threads: ten answers of its cost less than
one of Python's. Where there is none, Python asks for as little as it may.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from portopt.kernels import pool
from portopt.kernels.contents import Contents
from portopt.kernels.layout import ids
from portopt_torch import native

Table: TypeAlias = npt.NDArray[np.uint64]


def holdings(
    params: Sequence[Tensor],
    states: Sequence[Mapping[str, Any]],
    *others: Any,
    contents: Contents | None,
) -> Holdings:
    """What a batch works on; the arguments are those of `Holdings`."""
    can_be_asked = contents is None or contents.checks is not None
    looks = can_be_asked and native.look() is not None and {*map(type, states)} == {dict}
    return (Looked if looks else Holdings)(params, states, *others, contents)


class Holdings:
    """Parameters, their gradients and slots, and what else their states hold, as it is now.

    Args:
        params: The parameters.
        states: For each of them its state.
        slots: The names there of tensors that lie as the parameter does.
        counts: The names of what else is to stay.
        table: For each parameter where it, its gradient and its slots begin, as `addresses` finds
            it, and what else may follow. A look notes where the gradients are.
        here: Whether each has one: a look notes that, too.
        contents: What else is to stay as it is, if anything.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        slots: Sequence[str],
        counts: Sequence[str],
        table: Table,
        here: npt.NDArray[np.bool_],
        contents: Contents | None,
    ) -> None:
        self._table, self._here, self._contents = table, here, contents
        self._params, self._states, self._names = params, states, (*slots, *counts)
        self._entries = [*self._held()]
        columns = [params, *([state[slot] for state in states] for slot in slots)]
        self._kept = [*chain.from_iterable(zip(*columns, strict=True))]
        self._lie = [*map(_lies, self._kept)]
        self._grad_kind = _kind(like(params))

    def fit(self, helpers: int) -> bool:
        """Whether all is as it was but the gradients, which are `Tensor`s themselves and lie alike.

        Nothing may be negated or conjugated lazily.

        Args:
            helpers: How many other threads may look, too.
        """
        try:
            if not all(map(is_, self._held(), self._entries)):
                return False
        except KeyError:
            return False
        if self._contents is not None and not self._contents.are():
            return False
        pairs = [(param, param.grad) for param in self._params]
        given = [(param, grad) for param, grad in pairs if grad is not None]
        grads = [grad for _, grad in given]
        if not {*map(type, grads)} <= {Tensor}:
            return False
        tensors = [*self._kept, *grads]
        if any(map(Tensor.is_neg, tensors)) or any(map(Tensor.is_conj, tensors)):
            return False
        try:
            places = [*map(Tensor.data_ptr, tensors)]
        except RuntimeError:  # one has no address, as a sparse one
            return False
        width = len(self._kept) // len(self._params)
        kept = np.delete(self._table, 1, axis=1)[:, :width]
        if not np.array_equal(np.reshape(places[: kept.size], kept.shape), kept):
            return False
        self._here[:] = [grad is not None for _, grad in pairs]
        self._table[:, 1] = 0
        self._table[self._here, 1] = places[kept.size :]
        if ((self._table[:, 1] == 0) != (self._table[:, 0] == 0))[self._here].any():
            return False  # zeros without memory
        return [*map(_lies, self._kept)] == self._lie and all(
            _kind(grad) == self._grad_kind and grad.shape == param.shape and lie_alike(grad, param)
            for param, grad in given
        )

    def _held(self) -> Iterable[Any]:
        """What the states hold.

        Raises:
            KeyError: one of them lacks a name.
        """
        if not self._names:
            return ()
        found = map(itemgetter(*self._names), self._states)
        return found if len(self._names) == 1 else chain.from_iterable(found)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device


def _lies(tensor: Tensor) -> tuple[Any, ...]:
    return *_kind(tensor), tensor.shape, tensor.stride()


class Looked(Holdings):
    """The same, looked at by compiled functions."""

    def __init__(self, *held: Any) -> None:
        super().__init__(*held)
        look, n = native.look(), len(self._params)
        if look is None:
            raise RuntimeError("there is no compiled look here")
        columns = len(self._kept) // n
        shapes = [(param.dim(), *param.shape, *param.stride()) for param in self._params]
        begins = np.cumsum([0, *map(len, shapes)])[:-1]
        firsts = np.arange(0, n, _SHARE)
        kinds = [*map(native.kind_of, (*self._kept[:columns], like(self._params)))]
        arrays = {
            "known": look.known,
            "starts": np.append(np.stack([firsts, begins[firsts]], axis=1), n),
            "shapes": np.fromiter(chain.from_iterable(shapes), np.int64),
            "kinds": np.array(kinds, np.int64),
            "kept": ids(self._kept),
            "table": self._table,
            "grads": np.zeros(n, np.uint64),
            "here": self._here,
            "states": ids(self._states),
            "names": ids(self._names),
            "entries": ids(self._entries),
        }
        told = {name: each.ctypes.data for name, each in arrays.items()}
        told |= {"columns": columns, "last": columns * n - 1, "width": self._table.shape[1]}
        told |= {"n": n, "n_names": len(self._names)}
        check = checks = n_checks = 0
        if self._contents is not None and self._contents.checks is not None:
            check = self._contents.checks.function
            checks, n_checks = self._contents.checks.arguments
        told |= {"check": check, "checks": checks, "n_checks": n_checks}
        self._alive = arrays
        self._job = pool.Job(
            look.tensors,
            len(firsts),
            [told[name] for name in native.TOLD],
            first=look.entries,
            linger=pool.LINGER,
        )

    def fit(self, helpers: int) -> bool:
        return not self._job.do(helpers, locked=True)


_SHARE = 64  # parameters that a thread looks at at once


def addresses(params: Sequence[Tensor], slots: Sequence[Sequence[Tensor]]) -> Table:
    """Where parameters begin, their gradients, 0 for none, and their slots: for each a row."""
    grads = [0 if param.grad is None else param.grad.data_ptr() for param in params]
    first, *others = ([*map(Tensor.data_ptr, column)] for column in (params, *slots))
    return np.array([first, grads, *others], np.uint64).T


def like(params: Sequence[Tensor]) -> Tensor:
    """What all gradients are to be like: one that is there, else a parameter."""
    return next((param.grad for param in params if param.grad is not None), params[0])


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape have their elements in the same order in memory."""
    return one.stride() == other.stride() or _strides(one) == _strides(other)


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return [stride for stride, size in pairs if size > 1] if tensor.numel() else []
