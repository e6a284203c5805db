"""Tensors of a pickle: the legacy torch streams inside it, and claims about shape and stride that are checked before anything is allocated.

A storage is a stream of five small pickles (magic number, protocol 1001, system, the storage's persistent id, list of keys), the number of
elements (int64) and their bytes, little-endian.
"""

import dataclasses
import math
import struct
from collections import Counter
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.pickles.machine import Machine
from eg3d_rlhf.pickles.values import Budget, Global, Refusal, brief

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
MAX_DIMENSIONS = 8
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}


@dataclasses.dataclass(frozen=True, eq=False)
class StorageRecord:
    """Bytes of a storage, where they lie in the file."""

    dtype: torch.dtype
    data: memoryview

    @property
    def count(self) -> int:
        """Elements."""
        return len(self.data) // self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRecord:
    """A view of a storage, proved to lie inside it."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """A contiguous copy."""
        dtype = self.storage.dtype
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        size = dtype.itemsize
        view = np.ndarray(
            self.shape, dtype=f"<i{size}", buffer=self.storage.data, offset=self.offset * size, strides=[s * size for s in self.stride]
        )
        return torch.from_numpy(view.copy(order="C")).view(dtype)


@dataclasses.dataclass(frozen=True)
class _StorageId:
    dtype: torch.dtype
    key: str
    count: int


class StorageRules:
    """Rules of the streams inside: storage classes and persistent ids of storages, and nothing else."""

    def find(self, name: Global) -> Global:
        """torch.FloatStorage and its kind."""
        if name.module not in ("torch", "torch.cuda") or name.name not in DTYPES:
            raise Refusal(f"the global {brief(name)} in a tensor stream")
        return name

    def reduce(self, function: Any, args: tuple, budget: Budget) -> Any:
        """No calls."""
        del args, budget
        raise Refusal(f"a call of {brief(function)} in a tensor stream")

    def new(self, cls: Any, args: tuple) -> Any:
        """No objects."""
        del args
        raise Refusal(f"an object of {brief(cls)} in a tensor stream")

    def build(self, record: Any, state: Any, budget: Budget) -> None:
        """No states."""
        del state, budget
        raise Refusal(f"a state for {brief(record)} in a tensor stream")

    def persistent(self, pid: Any) -> Any:
        """('storage', class, key, location, count, view), with view None. The location is where it once was; we read to the CPU."""
        kinds = (str, Global, str, str, int, type(None))
        if not isinstance(pid, tuple) or len(pid) != 6 or not all(isinstance(v, k) for v, k in zip(pid, kinds, strict=True)):
            raise Refusal(f"a storage id that is {brief(pid)}")
        if pid[0] != "storage" or isinstance(pid[4], bool) or pid[4] < 0:
            raise Refusal(f"a storage id that begins with {brief(pid[0])} and holds {brief(pid[4])} elements")
        return _StorageId(DTYPES[pid[1].name], pid[2], pid[4])


def read_storage(data: memoryview, budget: Budget, asked: Counter) -> StorageRecord:
    """Parse one legacy stream.

    Raises: Refusal for another format, a name outside DTYPES, or a size that is not what the stream holds.
    """
    position, values = 0, []
    for _ in range(5):
        machine = Machine(data, position, StorageRules(), budget, asked)
        values.append(machine.run())
        position = machine.position
    magic, version, system, storage, keys = values
    if magic != MAGIC or version != VERSION:
        raise Refusal("a tensor stream of another format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refusal("a tensor stream of a big-endian machine")
    if not isinstance(storage, _StorageId) or not isinstance(keys, list) or len(keys) != 1 or keys[0] != storage.key:
        raise Refusal("a tensor stream that does not hold exactly one storage")
    if len(data) - position < 8:
        raise Refusal("the end of a tensor stream")
    (count,) = struct.unpack("<q", data[position : position + 8])
    body = data[position + 8 :]
    if count != storage.count or count * storage.dtype.itemsize != len(body):
        claim = f"{storage.count} and {count} elements of {storage.dtype.itemsize} bytes"
        raise Refusal(f"a tensor stream that claims {claim} and holds {len(body)} bytes")
    return StorageRecord(storage.dtype, body)


def view_storage(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    """The view that a stream claims.

    Raises: Refusal unless all indices lie in the storage and no element is used twice over (a stride of 0 makes gigabytes from one number).
    """
    if not isinstance(storage, StorageRecord):
        raise Refusal(f"a tensor on {brief(storage)}")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or not len(shape) == len(stride) <= MAX_DIMENSIONS:
        raise Refusal(f"a tensor of shape {brief(shape)} and stride {brief(stride)}")
    if not all(type(v) is int and 0 <= v < 1 << 62 for v in (offset, *shape, *stride)):
        raise Refusal("a tensor whose offset, shape or stride is not made of whole numbers >= 0")
    count = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else offset
    if count > storage.count or last >= max(storage.count, 1):
        raise Refusal(f"a tensor of {count} elements, the last at {last}, in a storage of {storage.count}")
    return TensorRecord(storage, offset, shape, stride)
