"""How the arrays of a library are cut, written and updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from portopt.arrays import STORAGE_DTYPES, compute_dtype, namespace
from portopt.plan import Places
from portopt.program import Program


class Work(NamedTuple):
    """One tensor's part of a step.

    Attributes:
        program: What to compute.
        scalars: What `Program.scalars` returned.
        operands: The arrays by the names in `Program.operands`.
    """

    program: Program
    scalars: Mapping[str, Any]
    operands: Mapping[str, Any]


class Buffers:
    """Arrays of the array API standard that can be changed, such as PyTorch's tensors.

    Pieces are views. Programs run operation by operation, half types in float32.
    """

    def dtype(self, array: Any) -> str:
        """The name of an array's dtype."""
        dtype = array.dtype
        return str(getattr(dtype, "name", str(dtype).rpartition(".")[2]))

    def check(self, what: str, array: Any) -> None:
        """Refuse a parameter that cannot be cut and written.

        Raises:
            TypeError: its dtype is none of `STORAGE_DTYPES`.
            ValueError: its elements do not lie side by side, or PyTorch would record its changes.
        """
        if not hasattr(array, "dtype") or self.dtype(array) not in STORAGE_DTYPES:
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{what} must be of a dtype in {', '.join(STORAGE_DTYPES)}, got {got}")
        if not self._is_contiguous(array):
            raise ValueError(f"{what} must be contiguous in C's order and aligned, is not")
        if getattr(array, "requires_grad", False):
            raise ValueError(f"{what} must not require a gradient: pass its .detach()")

    def check_apart(self, arrays: Mapping[Any, Any]) -> None:
        """Refuse parameters, by name, that share memory, if the library tells.

        Raises:
            ValueError: two do.
        """

    def cut(self, array: Any, start: int, length: int) -> Any:
        """Elements of an array as a flat one."""
        return array.reshape(-1)[start : start + length]

    def write(self, array: Any, start: int, piece: Any) -> None:
        """Put a flat array back to where it was cut from."""
        self.cut(array, start, len(piece))[...] = piece

    def writable(self, array: Any) -> bool:
        """Whether an array's elements can be changed."""
        return True

    def fill(self, array: Any, value: float) -> None:
        """Make all elements the same."""
        array[...] = value

    def shaped(self, piece: Any, shape: tuple[int, ...]) -> Any:
        """A flat array in another shape."""
        return piece.reshape(shape)

    def full(self, like: Any, shape: tuple[int, ...], value: float) -> Any:
        """A new array of the dtype and place of another."""
        return namespace(like).full(shape, value, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]

    def copy(self, array: Any) -> Any:
        """An array of its own with the same elements."""
        return namespace(array).asarray(array, copy=True)  # type: ignore[attr-defined]

    def cast(self, array: Any, dtype: Any) -> Any:
        """An array in another dtype, given by name or as that of another array."""
        xp: Any = namespace(array)
        return xp.astype(array, getattr(xp, dtype) if isinstance(dtype, str) else dtype, copy=False)

    def host(self, piece: Any) -> Any:
        """A flat NumPy array of the same numbers; float32 for a half type."""
        return np.asarray(self.cast(piece, compute_dtype(self.dtype(piece))))

    def mean(self, pieces: Sequence[Any]) -> Any:
        """Their sum, from the first on, times one over their number, rounded to their dtype."""
        compute = compute_dtype(self.dtype(pieces[0]))
        with np.errstate(all="ignore"):  # NaN and Inf propagate
            total = self.cast(pieces[0], compute)
            for piece in pieces[1:]:
                total = total + self.cast(piece, compute)
            return self.cast(total * (1 / len(pieces)), pieces[0].dtype)

    def square_sums(self, chunks: Sequence[Any]) -> npt.NDArray[np.float64]:
        """The sum of squares in float64 of each flat array of the host, of at most `SPAN` elements.

        Its bits depend on the elements alone, as long as the same kernels can be used.
        """
        from portopt.kernels import cpu

        sums = np.zeros(len(chunks))
        for dtype in {chunk.dtype for chunk in chunks}:
            places = [place for place, chunk in enumerate(chunks) if chunk.dtype == dtype]
            sums[places] = cpu.square_sums([chunks[place] for place in places])
        return sums

    def run(self, work: Sequence[Work]) -> list[dict[str, Any]]:
        """The new values of each tensor's operands, by name; arrays may be changed in place."""
        return [self._run_plain(item) for item in work]

    def _namespace(self, array: Any) -> Any:
        return namespace(array)

    def _is_contiguous(self, array: Any) -> bool:
        return bool(array.is_contiguous())

    def _run_plain(self, item: Work) -> dict[str, Any]:
        param = item.operands["param"]
        compute = compute_dtype(self.dtype(param))
        arrays = {name: self.cast(array, compute) for name, array in item.operands.items()}
        with np.errstate(all="ignore"):  # NaN and Inf propagate, as in every framework
            new = item.program.run(self._namespace(param), item.scalars, arrays)
        return {name: self.cast(value, item.operands[name].dtype) for name, value in new.items()}


class NumPyBuffers(Buffers):
    """NumPy arrays, updated in place by the CPU kernels; those that no kernel takes, one by one."""

    def check(self, what: str, array: Any) -> None:
        """See `Buffers`; a read-only array is refused too."""
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{what} must be a NumPy array, got {type(array).__name__}")
        super().check(what, array)
        if not self.writable(array):
            raise ValueError(f"{what} must be writable, got a read-only array")

    def check_apart(self, arrays: Mapping[Any, Any]) -> None:
        """See `Buffers`."""
        places = Places(arrays)
        for name, array in arrays.items():
            other = places.sharing(array, but=name)
            if other is not None:
                raise ValueError(f"params[{name!r}] shares memory with params[{other!r}]")

    def writable(self, array: Any) -> bool:
        """See `Buffers`."""
        return bool(array.flags.writeable)

    def dtype(self, array: Any) -> str:
        """See `Buffers`; one of another byte order than this processor's has another name."""
        return str(array.dtype.name if array.dtype.isnative else array.dtype)

    def cut(self, array: Any, start: int, length: int) -> Any:
        """See `Buffers`; a copy where a kernel could not read it as it is."""
        piece = np.asarray(array).reshape(-1)[start : start + length]
        return np.require(piece, requirements="A")

    def cast(self, array: Any, dtype: Any) -> Any:
        """See `Buffers`."""
        return np.asarray(array).astype(dtype, copy=False)

    def host(self, piece: Any) -> Any:
        """The array itself."""
        return piece

    def run(self, work: Sequence[Work]) -> list[dict[str, Any]]:
        """See `Buffers`."""
        from portopt.kernels import cpu  # here, as `import portopt` is to be quick

        alike: dict[tuple[Program, tuple[str, ...]], list[Work]] = {}
        results: list[dict[str, Any]] = []
        for item in work:
            storage = tuple(array.dtype.name for array in item.operands.values())
            if item.program.elementwise and cpu.refusal(storage) is None:
                alike.setdefault((item.program, storage), []).append(item)
                results.append(dict(item.operands))
            else:
                results.append(self._run_plain(item))
        for (program, storage), items in alike.items():
            step = cpu.Step(
                program,
                storage,
                [[array.ctypes.data for array in item.operands.values()] for item in items],
                [item.operands["param"].size for item in items],
            )
            step.run([item.scalars for item in items], range(len(items)), cpu.threads())
        return results

    def _namespace(self, array: Any) -> Any:
        return np

    def _is_contiguous(self, array: Any) -> bool:
        return bool(array.flags.c_contiguous and array.flags.aligned)


class VariableBuffers(Buffers):
    """Variables that hold arrays which cannot be changed, such as TensorFlow's.

    Args:
        xp: The namespace of the variables' arrays: ``keras.ops``.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def cut(self, array: Any, start: int, length: int) -> Any:
        """See `Buffers`."""
        return self.xp.reshape(array, (-1,))[start : start + length]

    def write(self, array: Any, start: int, piece: Any) -> None:
        """See `Buffers`; it makes the whole array anew."""
        flat = self.xp.reshape(array, (-1,))
        new = self.xp.concatenate([flat[:start], piece, flat[start + piece.shape[0] :]])
        array.assign(self.xp.reshape(new, array.shape))

    def writable(self, array: Any) -> bool:
        """A gradient is no variable."""
        return False

    def shaped(self, piece: Any, shape: tuple[int, ...]) -> Any:
        """See `Buffers`."""
        return self.xp.reshape(piece, shape)

    def full(self, like: Any, shape: tuple[int, ...], value: float) -> Any:
        """See `Buffers`."""
        return self.xp.full(shape, value, dtype=self.dtype(like))

    def copy(self, array: Any) -> Any:
        """The array itself: nobody can change it."""
        return array

    def cast(self, array: Any, dtype: Any) -> Any:
        """See `Buffers`."""
        return self.xp.cast(array, getattr(dtype, "name", dtype))

    def _namespace(self, array: Any) -> Any:
        return self.xp

    def _is_contiguous(self, array: Any) -> bool:
        return True


NUMPY = NumPyBuffers()
