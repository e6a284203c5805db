"""A snapshot of EG3D as records: its contents, the names that it refers to, and the tensors of its modules.

A snapshot contains the source text of its modules and a call that runs it. Here the call becomes a
`ModuleRecord`, and the source remains text.

Tensors are in legacy torch streams. The stream of a storage has five small pickles (magic number, protocol
1001, system, persistent id of the storage, list of keys), then the number of elements (int64) and their
bytes, little-endian. Claims about shape and stride are checked before memory is allocated.
"""

import contextlib
import dataclasses
import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eg3d_rlhf.generators.pickles.pickle_reader import (
    Budget,
    Global,
    LongText,
    Machine,
    RejectedError,
    Rules,
    decode,
    describe,
    members,
    shorten,
)

# The names that EG3D's snapshots use, and the inert records that they stand for.

MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
VERSION = 1001  # torch.serialization.PROTOCOL_VERSION
MAX_DIMENSIONS = 8
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclasses.dataclass(frozen=True, eq=False)
class StorageRecord:
    """The bytes of a storage, as a view into the file."""

    dtype: torch.dtype
    data: memoryview


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRecord:
    """A view of a storage, checked to lie inside it."""

    storage: StorageRecord
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """Return a contiguous copy."""
        dtype = self.storage.dtype
        if not self.nbytes:
            # numpy rejects a view of an empty buffer
            return torch.empty(self.shape, dtype=dtype)
        size = dtype.itemsize
        # Integers of the same size, since numpy has no bfloat16.
        # The view is inside the buffer, which `_tensor` has checked.
        view = np.ndarray(
            self.shape,
            dtype=f"<i{size}",
            buffer=self.storage.data,
            offset=self.offset * size,
            strides=[s * size for s in self.stride],
        )
        return torch.from_numpy(view.copy(order="C")).view(dtype)


@dataclasses.dataclass(frozen=True)
class _StorageId:
    """A persistent id of a storage."""

    dtype: torch.dtype
    key: str
    count: int


class StorageRules(Rules):
    """Rules of tensor streams: storage classes and persistent ids of storages are accepted, nothing else."""

    inside = " in a tensor stream"

    def find(self, name: Global) -> Global:
        """Accept torch.FloatStorage and similar names."""
        if name.module not in ("torch", "torch.cuda") or name.name not in DTYPES:
            super().find(name)
        return name

    def persistent(self, pid: Any) -> Any:
        """Accept ('storage', class, key, location, count, view) with view None.

        The location is the device of the original tensor. It is ignored: all tensors are read to the CPU.
        """
        # Types of the six members.
        kinds: tuple[type, ...] = (str, Global, str, str, int, type(None))
        if (
            not isinstance(pid, tuple)
            or len(pid) != 6
            or not all(isinstance(v, k) for v, k in zip(pid, kinds, strict=True))
        ):
            raise RejectedError(f"a storage id that is {describe(pid)}")
        if pid[0] != "storage" or isinstance(pid[4], bool) or pid[4] < 0:  # a bool is an int in Python
            raise RejectedError(
                f"a storage id that begins with {describe(pid[0])} and claims {describe(pid[4])} elements"
            )
        return _StorageId(DTYPES[pid[1].name], pid[2], pid[4])


def read_storage(data: memoryview, budget: Budget, asked: Counter) -> StorageRecord:
    """Parse one legacy stream.

    Raises: RejectedError for another format, a name outside DTYPES, or a size that differs from the stream's.
    """
    position = 0
    pickled_values = []
    for _ in range(5):
        # Five pickles follow one another without separators.
        machine = Machine(data, position, StorageRules(budget, asked))
        pickled_values.append(machine.run())
        position = machine.position
    magic, version, system, storage, keys = pickled_values
    if magic != MAGIC or version != VERSION:
        raise RejectedError("a tensor stream of another format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RejectedError("a tensor stream of a big-endian machine")
    if (
        not isinstance(storage, _StorageId)
        or not isinstance(keys, list)
        or len(keys) != 1
        or keys[0] != storage.key
    ):
        raise RejectedError("a tensor stream that does not hold exactly one storage")
    if len(data) - position < 8:
        raise RejectedError("the end of a tensor stream")
    # The number of elements is stored twice, in the persistent id and here.
    (count,) = struct.unpack("<q", data[position : position + 8])
    body = data[position + 8 :]
    if count != storage.count or count * storage.dtype.itemsize != len(body):
        claim = f"{storage.count} and {count} elements of {storage.dtype.itemsize} bytes"
        raise RejectedError(f"a tensor stream that claims {claim} and holds {len(body)} bytes")
    return StorageRecord(storage.dtype, body)


# Modules whose class is not persistent: they are pickled as plain objects.
PLAIN_MODULES = {
    "training.triplane.OSGDecoder",
    "training.volumetric_rendering.renderer.ImportanceRenderer",
    "training.volumetric_rendering.ray_sampler.RaySampler",
    "training.volumetric_rendering.ray_marcher.MipRayMarcher2",
    "torch.nn.modules.activation.Softplus",
    "torch.nn.modules.container.Sequential",
}
DICTIONARIES = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
SCALARS = {  # numpy's code -> struct's
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
    "b1": "?",
}


@dataclasses.dataclass(eq=False)
class ModuleRecord:
    """A module: the name of its class, and its attributes, uninterpreted."""

    class_name: str
    state: Any  # a dict; None until the stream sets it


@dataclasses.dataclass(eq=False)
class DtypeRecord:
    """A numpy scalar type."""

    code: str  # a key of SCALARS
    order: str = "<"


class SnapshotRules(Rules):
    """Rules of a snapshot's outer stream. `asked` also counts the names in tensor streams."""

    def __init__(self, budget: Budget, asked: Counter):
        super().__init__(budget, asked)
        self.calls: dict[str, Callable[[tuple], Any]] = {
            "torch_utils.persistence._reconstruct_persistent_obj": self._module,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.storage._load_from_bytes": lambda args: read_storage(
                _only(args, memoryview, "storage"), self.budget, self.asked
            ),
            "numpy.dtype": self._dtype,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy._core.multiarray.scalar": self._scalar,
            # protocol 2 writes bytes and sets as calls of these functions
            "_codecs.encode": self._bytes,
            "__builtin__.bytes": self._empty_bytes,
            "__builtin__.set": self._set,
            "builtins.set": self._set,
        }

    def find(self, name: Global) -> Global:
        """Accept the names of the calls, modules and dictionaries above."""
        if name.path not in self.calls and name.path not in PLAIN_MODULES and name.path not in DICTIONARIES:
            raise RejectedError(f"the global {describe(name)}, which no network needs")
        return name

    def reduce(self, function: Any, args: tuple) -> Any:
        """Return the record of a call."""
        # A call of a record instead of a name is rejected by the base class.
        path = function.path if isinstance(function, Global) else ""
        # Dictionaries are created by a call without arguments, or as new objects.
        if path in DICTIONARIES:
            return self.new(function, args)
        if path not in self.calls:
            return super().reduce(function, args)
        return self.calls[path](args)

    def new(self, cls: Any, args: tuple) -> Any:
        """Return the record of a module without state, or an empty dictionary."""
        path = cls.path if isinstance(cls, Global) else ""
        if args != ():
            raise RejectedError(f"arguments for a new {describe(cls)}")
        if path in DICTIONARIES:
            return {}
        if path not in PLAIN_MODULES:
            raise RejectedError(f"a new object of {describe(cls)}")
        return ModuleRecord(cls.name, None)

    def build(self, record: Any, state: Any) -> None:
        """Set the state of a module (once), or of a scalar type."""
        if isinstance(record, ModuleRecord) and record.state is None and self._is_state(state):
            record.state = state
        elif (
            isinstance(record, DtypeRecord)
            and isinstance(state, tuple)
            and len(state) >= 2
            and state[1] in ("<", "|", ">")
        ):
            # "|" means that the order does not apply (single bytes)
            record.order = ">" if state[1] == ">" else "<"
        else:
            raise RejectedError(f"a state of {describe(state)} for {describe(record)}")

    def _is_state(self, value: Any) -> bool:
        """Return True for a dictionary with names as keys."""
        # Checking a large dictionary again and again would take time without any opcode.
        self.budget.spend(opcodes=len(value) if isinstance(value, dict) else 0)
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)

    # Calls: each method maps arguments to a record.

    def _module(self, args: tuple) -> ModuleRecord:
        """Return the record of a persistent module from its description."""
        # The description written by torch_utils.persistence.
        meta = _only(args, dict, "module")
        if (
            meta.get("type") != "class"
            or not isinstance(meta.get("class_name"), str)
            or not self._is_state(meta.get("state"))
        ):
            # meta["module_src"], the source text that EG3D would execute, is ignored.
            raise RejectedError("a module description without type, class_name or state")
        return ModuleRecord(meta["class_name"], meta["state"])

    def _tensor(self, args: tuple) -> TensorRecord:
        """Return the view of a storage that a stream claims.

        Rejected unless all indices lie in the storage and the tensor has no more elements than the storage.
        With a stride of 0, one number could become gigabytes.
        """
        if not 6 <= len(args) <= 7:
            raise RejectedError(f"a tensor of {len(args)} arguments")
        storage, offset, shape, stride = args[:4]
        if not isinstance(storage, StorageRecord):
            raise RejectedError(f"a tensor on {describe(storage)}")
        if (
            not isinstance(shape, tuple)
            or not isinstance(stride, tuple)
            or not len(shape) == len(stride) <= MAX_DIMENSIONS
        ):
            raise RejectedError(f"a tensor of shape {describe(shape)} and stride {describe(stride)}")
        if not all(type(v) is int and 0 <= v < 1 << 62 for v in (offset, *shape, *stride)):
            # type(): a bool is an int in Python
            raise RejectedError("a tensor whose offset, shape or stride is not made of whole numbers >= 0")
        # Python integers cannot overflow.
        count = math.prod(shape)
        elements = len(storage.data) // storage.dtype.itemsize
        # index of the last element; strides are not negative
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else offset
        # an empty tensor may start at the end of an empty storage
        if count > elements or last >= max(elements, 1):
            raise RejectedError(
                f"a tensor of {count} elements, the last at {last}, in a storage of {elements}"
            )
        return TensorRecord(storage, offset, shape, stride)

    def _parameter(self, args: tuple) -> TensorRecord:
        """Return the tensor of a parameter."""
        if len(args) != 3 or not isinstance(args[0], TensorRecord):
            raise RejectedError("a parameter without its tensor")
        return args[0]

    def _dtype(self, args: tuple) -> DtypeRecord:
        """Return a scalar type."""
        if not args or not isinstance(args[0], str) or args[0] not in SCALARS:
            raise RejectedError(f"a scalar type that is {describe(args[0] if args else None)}")
        return DtypeRecord(args[0])

    def _scalar(self, args: tuple) -> float | int | bool:
        """Return a number from a scalar type and its bytes."""
        if len(args) != 2 or not isinstance(args[0], DtypeRecord) or not isinstance(args[1], memoryview):
            raise RejectedError("a scalar without its type and bytes")
        # Byte order and type in struct's notation.
        form = args[0].order + SCALARS[args[0].code]
        if len(args[1]) != struct.calcsize(form):
            raise RejectedError(f"a scalar of {len(args[1])} bytes")
        return struct.unpack(form, args[1])[0]

    def _bytes(self, args: tuple) -> memoryview:
        """Return bytes that protocol 2 has written as latin-1 text."""
        if len(args) != 2 or not isinstance(args[0], (str, LongText)) or args[1] not in ("latin1", "latin-1"):
            raise RejectedError("bytes in another encoding than latin1")
        # latin-1: each character is one byte.
        text = args[0]
        self.budget.spend(decoded=len(text.utf8) if isinstance(text, LongText) else len(text))
        text = decode(bytes(text.utf8)) if isinstance(text, LongText) else text
        try:
            return memoryview(text.encode("latin-1"))
        except UnicodeEncodeError:
            raise RejectedError("bytes with values above 255") from None

    def _empty_bytes(self, args: tuple) -> memoryview:
        """Return empty bytes, which protocol 2 writes as a call without arguments."""
        if args != ():
            raise RejectedError("arguments for empty bytes")
        return memoryview(b"")

    def _set(self, args: tuple) -> set:
        """Return a set, which protocol 2 writes as a call with a list."""
        items = _only(args, list, "set")
        # Each copy of the same list costs work.
        self.budget.spend(opcodes=len(items))
        return set(members(items))


def _only(args: tuple, kind: type, what: str) -> Any:
    """Return the only argument of a call. Raises: RejectedError for other arguments."""
    if len(args) != 1 or not isinstance(args[0], kind):
        raise RejectedError(
            f"a {what} of {describe(args[0]) if len(args) == 1 else f'{len(args)} arguments'}"
        )
    return args[0]


MAX_DEPTH = 24  # levels of nested modules, or of nested lists
MAX_NODES = 20_000  # modules and tensors of one network, or values of one option
MAX_KEY = 200  # characters of a name
MAX_OPTION = 4096  # characters of a text among options
NETWORKS = ("G", "D", "G_ema")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The contents of a file."""

    who: str  # name of the file in messages
    size: int  # bytes
    protocol: int
    networks: dict[str, ModuleRecord]  # those of G, D and G_ema that the file contains
    augment_pipe: ModuleRecord | None  # ADA's augmentation, if the file contains it
    training_set: dict[str, Any]  # training_set_kwargs
    asked: dict[str, int]  # name that the file refers to -> number of times


def read(path: str | Path) -> Snapshot:
    """Read a snapshot without running code in it.

    The file is mapped into memory, and tensors remain in it.

    Raises: FileNotFoundError; ValueError, in one line, for any file that is no such snapshot.
    """
    return parse(_mapped(path), str(path))


def parse(data: memoryview, who: str) -> Snapshot:
    """Parse the bytes of a snapshot, see `read`. `who` is the name of the file in messages."""
    asked: Counter = Counter()
    # text is at most as long as the file
    machine = Machine(data, 0, SnapshotRules(Budget(decoded=len(data)), asked))
    with reporting_rejection(who, machine):
        root = machine.run()
        # a pickled generator without the other networks
        if isinstance(root, ModuleRecord):
            root = {"G_ema": root}
        if not isinstance(root, dict):
            raise RejectedError(f"{describe(root)} instead of a dictionary")
        # Other entries of the file are ignored.
        modules = {
            name: _module(root[name], name)
            for name in (*NETWORKS, "augment_pipe")
            if root.get(name) is not None
        }
        augment = modules.pop("augment_pipe", None)
        training_set = json_values(root.get("training_set_kwargs") or {})
        if not isinstance(training_set, dict):
            raise RejectedError("training_set_kwargs that are not a dictionary")
        return Snapshot(who, len(data), machine.protocol, modules, augment, training_set, dict(asked))


@contextlib.contextmanager
def reporting_rejection(who: str, machine: Machine | None = None) -> Iterator[None]:
    """Convert a RejectedError into a message for the user: the file, the reason and its position."""
    try:
        yield
    except RejectedError as rejection:
        where = f" (byte {machine.position})" if machine is not None else ""
        raise ValueError(
            f"{who}: expected a network pickle of EG3D, got {rejection}{where}. "
            "No code in it was run. Download the file again from its source, or choose another file."
        ) from None


def _mapped(path: str | Path) -> memoryview:
    """Map a file into memory, read-only."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a network pickle, got no such file. Check the path.")
    with open(path, "rb") as file:
        # mmap rejects empty files with an error of its own
        if path.stat().st_size == 0:
            raise ValueError(
                f"{path}: expected a network pickle, got an empty file. Download it again from its source."
            )
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _module(value: Any, name: str) -> ModuleRecord:
    """Return a module record with its state. Raises: RejectedError for other values."""
    if not isinstance(value, ModuleRecord) or value.state is None:
        raise RejectedError(f"{describe(value)} as {name}")
    return value


def json_values(value: Any) -> Any:
    """Convert options to JSON values. Tuples and sets become lists.

    Raises: RejectedError for records among them, for more than MAX_NODES values or MAX_DEPTH levels.
    """
    count = 0

    def convert(value: Any, depth: int) -> Any:
        """Convert one value. Values are counted over the entire tree."""
        nonlocal count
        count += 1
        # shared containers could expand exponentially, and nested ones exceed Python's recursion limit
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise RejectedError(f"options of more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if (
            value is None
            or isinstance(value, (bool, int))
            or (isinstance(value, str) and len(value) <= MAX_OPTION)
        ):
            return value
        if isinstance(value, float) and math.isfinite(value):  # JSON has no infinity and no NaN
            return value
        if isinstance(value, (list, tuple)):
            return [convert(v, depth + 1) for v in value]
        if isinstance(value, (set, frozenset)):
            return sorted((convert(v, depth + 1) for v in value), key=str)
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {k: convert(v, depth + 1) for k, v in value.items()}
        # small tensors, such as avg_camera_pivot
        if isinstance(value, TensorRecord) and 0 < value.nbytes <= 1 << 12:
            return convert(value.tensor().tolist(), depth + 1)
        raise RejectedError(
            f"an option that is {'a long text' if isinstance(value, (str, LongText)) else describe(value)}"
        )

    return convert(value, 0)


def tensors(module: ModuleRecord, name: str) -> dict[str, TensorRecord]:
    """Return state-dict name -> tensor, of a module and its submodules, in the order of torch's state_dict.

    Raises: RejectedError for values that are no modules, and for more than MAX_NODES of them, as when a
    module contains itself.
    """
    records: dict[str, TensorRecord] = {}
    count = 0

    def collect(record: Any, prefix: str, depth: int) -> None:
        """Add the tensors of a module whose names start with `prefix`."""
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise RejectedError(f"more than {MAX_NODES} modules or {MAX_DEPTH} levels of them in {name}")
        state = _module(record, shorten(prefix.removesuffix(".")) or name).state
        non_persistent = state.get("_non_persistent_buffers_set", set())
        if not isinstance(non_persistent, (set, frozenset)):
            raise RejectedError(f"{describe(non_persistent)} as names of buffers")
        for part in ("_parameters", "_buffers", "_modules"):
            children = state.get(part, {})
            is_small = isinstance(children, dict) and len(children) <= MAX_NODES
            if not is_small or not all(isinstance(k, str) and len(k) <= MAX_KEY for k in children):
                raise RejectedError(f"{part} that are not a dictionary of names")
            count += len(children)  # tensors count as well
            for key, value in children.items():
                # absent from a state dict
                if value is None or (part == "_buffers" and key in non_persistent):
                    continue
                if part == "_modules":
                    collect(value, f"{prefix}{key}.", depth + 1)
                elif not isinstance(value, TensorRecord):
                    raise RejectedError(f"{describe(value)} as the tensor {shorten(prefix + key)}")
                else:
                    records[prefix + key] = value

    collect(module, "", 0)
    return records
