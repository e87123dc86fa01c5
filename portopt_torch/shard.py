"""A part of a tensor as ``torch.distributed.checkpoint`` writes and reads it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

aten = torch.ops.aten


def boxes(
    start: int, stop: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The elements from ``start`` to ``stop`` of a tensor in C's order, as boxes one after another.

    Yields:
        Offsets and sizes, each a number for each dimension.

    Example:
        >>> list(boxes(1, 8, (3, 3)))
        [((0, 1), (1, 2)), ((1, 0), (1, 3)), ((2, 0), (1, 2))]
    """
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the rows that are whole
    if first > last:
        parts = [(last, start - last * row, stop - last * row)]
    else:
        parts = [(first - 1, start - (first - 1) * row, row), (last, 0, stop - last * row)]
    found = [
        ((at, *offsets), (1, *sizes))
        for at, begin, end in parts
        for offsets, sizes in boxes(begin, end, shape[1:])
    ]
    if first < last:
        found.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    yield from sorted(found)


class Shard(Tensor):
    """Elements of a tensor that lie side by side, with the shape of all of it.

    ``torch.distributed.checkpoint`` writes them as what they are of the whole, and reads them from
    a checkpoint whatever parts it was written in. Nothing can be computed with it.

    Args:
        local: The elements, flat.
        start: The place of the first one in the whole tensor, counted in C's order.
        shape: That of the whole tensor.

    Attributes:
        local: As given: what is read goes there.
        start: As given.
    """

    local: Tensor
    start: int

    @staticmethod
    def __new__(cls, local: Tensor, start: int, shape: tuple[int, ...]) -> Shard:
        whole: Shard = Tensor._make_wrapper_subclass(
            cls, shape, dtype=local.dtype, device=local.device
        )
        whole.local, whole.start = local, start
        return whole

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (aten.detach.default, aten.clone.default, aten._to_copy.default):
            (shard,) = args
            return Shard(func(shard.local, **(kwargs or {})), shard.start, tuple(shard.shape))
        raise RuntimeError(
            f"{func} cannot be done with {args[0]!r}, which is but a part of a tensor"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        stop = self.start + self.local.numel()
        return f"Shard([{self.start}:{stop}] of {tuple(self.shape)}, {self.local})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Shard, (self.local, self.start, tuple(self.shape))

    def __deepcopy__(self, memo: Any) -> Shard:
        return self.clone()

    def _chunks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        at = 0
        for offsets, sizes in boxes(self.start, self.start + self.local.numel(), (*self.shape,)):
            size = math.prod(sizes)
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            yield chunk, self.local[at : at + size].view(sizes)
            at += size

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What there is to write."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk, _ in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        """What there is to read."""
        return [chunk for chunk, _ in self._chunks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """Where to read one of them to, or from."""
        return next(part for chunk, part in self._chunks() if chunk.offsets == index.offset)


class _Replacing(FileSystem):
    """Leaves a file in its place until another one takes it."""

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        """Nothing: what follows is `rename`, which replaces."""


class Writer(FileSystemWriter):
    """A ``FileSystemWriter`` whose folder holds a whole checkpoint at any time.

    ``FileSystemWriter`` writes over the files of the checkpoint before, so that a save that dies
    half-way leaves none. This one writes files of new names; the list of files, ``.metadata``,
    takes the place of the old one in one go; and at last the old files are deleted.

    Args:
        folder: The folder, with the checkpoint before or none.
        options: As those of ``FileSystemWriter``.

    Example::

        checkpoint.save(state, storage_writer=Writer(folder))
        checkpoint.load(state, checkpoint_id=folder)
    """

    def __init__(self, folder: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(folder, **options)
        self.fs = _Replacing()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the folder."""
        self.fs.mkdir(self.path)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Choose new names."""
        names = (f"{self.save_id}_{rank}_" for rank in range(len(plans)))
        return [
            replace(plan, storage_data=_StoragePrefix(name))
            for plan, name in zip(plans, names, strict=True)
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Replace the list of files, and delete the old ones."""
        super().finish(metadata, results)
        for path in Path(self.path).glob("*.distcp"):
            if not path.name.startswith(self.save_id):
                path.unlink()
