"""What every step asks of many tensors: their gradients, and where and how they lie in memory.

Compiled loops ask (`portopt_torch.native`): ten answers of theirs cost less than one of Python's.
Where there are none, Python asks for as little as it may.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import numpy as np
from torch import Tensor

from portopt.kernels.layout import Layout, Objects, array
from portopt_torch import native

_GRAD = "grad"


def of_tensors(tensors: Objects, *, moves: bool) -> Layout | Asked:
    """The devices, dtypes, shapes and strides of tensors.

    One that is negated or conjugated lazily does not fit.

    Args:
        tensors: Those whose layout it is, all of them `Tensor` or `torch.nn.Parameter` themselves.
        moves: Whether they may lie elsewhere later on, and be others. What stays at its address
            can be trusted to have its dtype and size.
    """
    loop = native.layouts()
    if loop is None:
        return Asked(tensors, moves=moves)
    words = sum(len(native.KIND) + 2 * tensor.dim() for tensor in tensors)
    return Layout(loop, tensors, words, moves=moves)


class Asked:
    """A `Layout` without a loop."""

    def __init__(self, tensors: Objects, *, moves: bool) -> None:
        self._moves = moves
        self.addresses, self._known = self._ask(tensors)

    def fits(self, tensors: Objects) -> bool:
        """As `Layout.fits`."""
        try:
            addresses, found = self._ask(tensors)
        except RuntimeError:  # one has no address, as a sparse one
            return False
        if any(map(Tensor.is_neg, tensors)) or any(map(Tensor.is_conj, tensors)):
            return False
        if found != self._known or not (self._moves or np.array_equal(addresses, self.addresses)):
            return False
        self.addresses = addresses
        return True

    def _ask(self, tensors: Objects) -> tuple[Any, Any]:
        each = tensors.tolist()
        order = all(map(Tensor.is_contiguous, each)) or [*map(Tensor.stride, each)]
        kind = [(x.dtype, x.shape, x.device) for x in each] if self._moves else None
        return np.array([*map(Tensor.data_ptr, each)], np.uint64), (order, kind)


class Holdings:
    """What parameters and their states hold.

    Args:
        params: The parameters.
        states: For each of them, the dict of its state.
        names: What is to stay the same there.
    """

    def __init__(
        self, params: Sequence[Tensor], states: Sequence[Mapping[str, Any]], names: Sequence[str]
    ) -> None:
        self.params, self.states, self.names = array(params), array(states), array(names)
        self.entries = array([*self._entries()])
        self.loop = native.gradients() if {*map(type, states)} == {dict} else None
        if self.loop is not None:
            self._before = np.zeros((len(params), 2), np.uint64)
            kept = (self._before, self.states, self.names)
            self._of = self.loop.functions.ctypes.data, id(Tensor), id(_GRAD)
            self._in = *(x.ctypes.data for x in kept), len(names), self.entries.ctypes.data

    def gradients(self) -> Objects | None:
        """The gradients, if each is a `Tensor` itself, and all entries are the same; else None."""
        if self.loop is None:
            try:
                same = all(map(is_, self._entries(), self.entries))
            except KeyError:
                return None
            grads = array([param.grad for param in self.params])
            return grads if same and {*map(type, grads)} == {Tensor} else None
        n = len(self.params)
        grads = np.empty(n, object)
        at = *self._of, self.params.ctypes.data, n, grads.ctypes.data, *self._in
        return grads if self.loop.call(*at) == n else None

    def _entries(self) -> Iterable[Any]:
        """What the states hold now.

        Raises:
            KeyError: one of them lacks a name.
        """
        if not len(self.names):
            return ()
        found = map(itemgetter(*self.names), self.states)
        return found if len(self.names) == 1 else chain.from_iterable(found)
