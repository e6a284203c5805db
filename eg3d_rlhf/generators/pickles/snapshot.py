"""A snapshot of EG3D as records: what it holds, what it asked for, and the tensors of its modules by
state-dict name.

A snapshot embeds the source of its modules and asks to run it. Here the call becomes a `ModuleRecord`, the
source stays text. Its tensors lie in legacy torch streams: a storage is a stream of five small pickles
(magic number, protocol 1001, system, the storage's persistent id, list of keys), the number of elements
(int64) and their bytes, little-endian. Claims about shape and stride are checked before anything is
allocated.
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
    Refusal,
    Rules,
    brief,
    brief_text,
    decode,
    members,
)

# The names that EG3D's snapshots use, and the inert record that each one stands for (eg3d.md, section 9).

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
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
    """Bytes of a storage, where they lie in the file."""

    dtype: torch.dtype
    data: memoryview


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
            self.shape,
            dtype=f"<i{size}",
            buffer=self.storage.data,
            offset=self.offset * size,
            strides=[s * size for s in self.stride],
        )
        return torch.from_numpy(view.copy(order="C")).view(dtype)


@dataclasses.dataclass(frozen=True)
class _StorageId:
    dtype: torch.dtype
    key: str
    count: int


class StorageRules(Rules):
    """Rules of the streams inside: storage classes and persistent ids of storages, and nothing else."""

    inside = " in a tensor stream"

    def find(self, name: Global) -> Global:
        """torch.FloatStorage and its kind."""
        if name.module not in ("torch", "torch.cuda") or name.name not in DTYPES:
            super().find(name)
        return name

    def persistent(self, pid: Any) -> Any:
        """('storage', class, key, location, count, view), with view None. The location is where it once was;
        we read to the CPU.
        """
        kinds: tuple[type, ...] = (str, Global, str, str, int, type(None))
        if (
            not isinstance(pid, tuple)
            or len(pid) != 6
            or not all(isinstance(v, k) for v, k in zip(pid, kinds, strict=True))
        ):
            raise Refusal(f"a storage id that is {brief(pid)}")
        if pid[0] != "storage" or isinstance(pid[4], bool) or pid[4] < 0:
            raise Refusal(f"a storage id that begins with {brief(pid[0])} and holds {brief(pid[4])} elements")
        return _StorageId(DTYPES[pid[1].name], pid[2], pid[4])


def read_storage(data: memoryview, budget: Budget, asked: Counter) -> StorageRecord:
    """Parse one legacy stream.

    Raises: Refusal for another format, a name outside DTYPES, or a size that is not what the stream holds.
    """
    position = 0
    values = []
    for _ in range(5):
        machine = Machine(data, position, StorageRules(budget, asked))
        values.append(machine.run())
        position = machine.position
    magic, version, system, storage, keys = values
    if magic != MAGIC or version != VERSION:
        raise Refusal("a tensor stream of another format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refusal("a tensor stream of a big-endian machine")
    if (
        not isinstance(storage, _StorageId)
        or not isinstance(keys, list)
        or len(keys) != 1
        or keys[0] != storage.key
    ):
        raise Refusal("a tensor stream that does not hold exactly one storage")
    if len(data) - position < 8:
        raise Refusal("the end of a tensor stream")
    (count,) = struct.unpack("<q", data[position : position + 8])
    body = data[position + 8 :]
    if count != storage.count or count * storage.dtype.itemsize != len(body):
        claim = f"{storage.count} and {count} elements of {storage.dtype.itemsize} bytes"
        raise Refusal(f"a tensor stream that claims {claim} and holds {len(body)} bytes")
    return StorageRecord(storage.dtype, body)


PLAIN_MODULES = {
    "training.triplane.OSGDecoder",
    "training.volumetric_rendering.renderer.ImportanceRenderer",
    "training.volumetric_rendering.ray_sampler.RaySampler",
    "training.volumetric_rendering.ray_marcher.MipRayMarcher2",
    "torch.nn.modules.activation.Softplus",
    "torch.nn.modules.container.Sequential",
}
DICTIONARIES = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
SCALARS = {  # NumPy's code -> struct's
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
    """A module: the name of its class and its attributes, uninterpreted."""

    class_name: str
    state: Any  # a dict; None until the stream gives it


@dataclasses.dataclass(eq=False)
class DtypeRecord:
    """A NumPy scalar type."""

    code: str  # as in SCALARS
    order: str = "<"


class SnapshotRules(Rules):
    """Rules of a snapshot's outer stream. `asked` also counts the names of the tensor streams."""

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
            # protocol 2 writes bytes and sets as calls
            "_codecs.encode": self._bytes,
            "__builtin__.bytes": self._empty_bytes,
            "__builtin__.set": self._set,
            "builtins.set": self._set,
        }

    def find(self, name: Global) -> Global:
        """A name of the list above."""
        if name.path not in self.calls and name.path not in PLAIN_MODULES and name.path not in DICTIONARIES:
            raise Refusal(f"the global {brief(name)}, which no network needs")
        return name

    def reduce(self, function: Any, args: tuple) -> Any:
        """What the call stands for."""
        path = function.path if isinstance(function, Global) else ""
        if path in DICTIONARIES:
            return self.new(function, args)
        if path not in self.calls:
            return super().reduce(function, args)
        return self.calls[path](args)

    def new(self, cls: Any, args: tuple) -> Any:
        """A module without state, or a dictionary."""
        path = cls.path if isinstance(cls, Global) else ""
        if args != ():
            raise Refusal(f"arguments for a new {brief(cls)}")
        if path in DICTIONARIES:
            return {}
        if path not in PLAIN_MODULES:
            raise Refusal(f"a new object of {brief(cls)}")
        return ModuleRecord(cls.name, None)

    def build(self, record: Any, state: Any) -> None:
        """The state of a module (once), or of a scalar type."""
        if isinstance(record, ModuleRecord) and record.state is None and self._is_state(state):
            record.state = state
        elif (
            isinstance(record, DtypeRecord)
            and isinstance(state, tuple)
            and len(state) >= 2
            and state[1] in ("<", "|", ">")
        ):
            record.order = ">" if state[1] == ">" else "<"
        else:
            raise Refusal(f"a state of {brief(state)} for {brief(record)}")

    def _is_state(self, value: Any) -> bool:
        self.budget.spend(opcodes=len(value) if isinstance(value, dict) else 0)
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)

    # Calls: arguments -> record.

    def _module(self, args: tuple) -> ModuleRecord:
        meta = _only(args, dict, "module")
        if (
            meta.get("type") != "class"
            or not isinstance(meta.get("class_name"), str)
            or not self._is_state(meta.get("state"))
        ):
            raise Refusal("a module description without type, class_name or state")
        return ModuleRecord(meta["class_name"], meta["state"])

    def _tensor(self, args: tuple) -> TensorRecord:
        """The view that a stream claims.

        Refused unless all indices lie in the storage and no element is used twice over (a stride of 0 makes
        gigabytes from one number).
        """
        if not 6 <= len(args) <= 7:
            raise Refusal(f"a tensor of {len(args)} arguments")
        storage, offset, shape, stride = args[:4]
        if not isinstance(storage, StorageRecord):
            raise Refusal(f"a tensor on {brief(storage)}")
        if (
            not isinstance(shape, tuple)
            or not isinstance(stride, tuple)
            or not len(shape) == len(stride) <= MAX_DIMENSIONS
        ):
            raise Refusal(f"a tensor of shape {brief(shape)} and stride {brief(stride)}")
        if not all(type(v) is int and 0 <= v < 1 << 62 for v in (offset, *shape, *stride)):
            raise Refusal("a tensor whose offset, shape or stride is not made of whole numbers >= 0")
        count = math.prod(shape)
        elements = len(storage.data) // storage.dtype.itemsize
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if count else offset
        if count > elements or last >= max(elements, 1):
            raise Refusal(f"a tensor of {count} elements, the last at {last}, in a storage of {elements}")
        return TensorRecord(storage, offset, shape, stride)

    def _parameter(self, args: tuple) -> TensorRecord:
        if len(args) != 3 or not isinstance(args[0], TensorRecord):
            raise Refusal("a parameter without its tensor")
        return args[0]

    def _dtype(self, args: tuple) -> DtypeRecord:
        if not args or not isinstance(args[0], str) or args[0] not in SCALARS:
            raise Refusal(f"a scalar type that is {brief(args[0] if args else None)}")
        return DtypeRecord(args[0])

    def _scalar(self, args: tuple) -> float | int | bool:
        if len(args) != 2 or not isinstance(args[0], DtypeRecord) or not isinstance(args[1], memoryview):
            raise Refusal("a scalar without its type and bytes")
        form = args[0].order + SCALARS[args[0].code]
        if len(args[1]) != struct.calcsize(form):
            raise Refusal(f"a scalar of {len(args[1])} bytes")
        return struct.unpack(form, args[1])[0]

    def _bytes(self, args: tuple) -> memoryview:
        if len(args) != 2 or not isinstance(args[0], (str, LongText)) or args[1] not in ("latin1", "latin-1"):
            raise Refusal("bytes in another encoding than latin1")
        text = args[0]
        self.budget.spend(decoded=len(text.utf8) if isinstance(text, LongText) else len(text))
        text = decode(bytes(text.utf8)) if isinstance(text, LongText) else text
        try:
            return memoryview(text.encode("latin-1"))
        except UnicodeEncodeError:
            raise Refusal("bytes with values above 255") from None

    def _empty_bytes(self, args: tuple) -> memoryview:
        if args != ():
            raise Refusal("arguments for empty bytes")
        return memoryview(b"")

    def _set(self, args: tuple) -> set:
        items = _only(args, list, "set")
        self.budget.spend(opcodes=len(items))
        return set(members(items))


def _only(args: tuple, kind: type, what: str) -> Any:
    if len(args) != 1 or not isinstance(args[0], kind):
        raise Refusal(f"a {what} of {brief(args[0]) if len(args) == 1 else f'{len(args)} arguments'}")
    return args[0]


MAX_DEPTH = 24  # modules in modules, lists in lists
MAX_NODES = 20_000  # modules and tensors of one network, or values of one option
# characters of a name, of an option
MAX_KEY = 200
MAX_OPTION = 4096
NETWORKS = ("G", "D", "G_ema")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a file holds."""

    who: str  # the file, for messages
    size: int  # bytes
    protocol: int
    networks: dict[str, ModuleRecord]  # of G, D, G_ema those that are there
    augment_pipe: ModuleRecord | None
    training_set: dict[str, Any]  # training_set_kwargs
    asked: dict[str, int]  # name that the file asks for -> how often


def read(path: str | Path) -> Snapshot:
    """Read a snapshot without running anything in it. The file is mapped into memory, tensors stay where they
    are.

    Raises: FileNotFoundError, ValueError (one line, whatever the file holds).
    """
    return parse(_mapped(path), str(path))


def parse(data: memoryview, who: str) -> Snapshot:
    """As `read`, of bytes."""
    asked: Counter = Counter()
    machine = Machine(data, 0, SnapshotRules(Budget(decoded=len(data)), asked))
    with refusing(who, machine):
        root = machine.run()
        if isinstance(root, ModuleRecord):  # a generator by itself
            root = {"G_ema": root}
        if not isinstance(root, dict):
            raise Refusal(f"{brief(root)} instead of a dictionary")
        modules = {
            name: _module(root[name], name)
            for name in (*NETWORKS, "augment_pipe")
            if root.get(name) is not None
        }
        augment = modules.pop("augment_pipe", None)
        training_set = plain(root.get("training_set_kwargs") or {})
        if not isinstance(training_set, dict):
            raise Refusal("training_set_kwargs that are not a dictionary")
        return Snapshot(who, len(data), machine.protocol, modules, augment, training_set, dict(asked))


@contextlib.contextmanager
def refusing(who: str, machine: Machine | None = None) -> Iterator[None]:
    """Turn a Refusal into the user's line: file, what was found and where."""
    try:
        yield
    except Refusal as refusal:
        where = f" (byte {machine.position})" if machine is not None else ""
        raise ValueError(
            f"{who}: expected a network pickle of EG3D, got {refusal}{where}. "
            "Nothing in it was run; get the file again from its source, or name another."
        ) from None


def _mapped(path: str | Path) -> memoryview:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a network pickle, got nothing there. Check the path.")
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            raise ValueError(
                f"{path}: expected a network pickle, got an empty file. Get it again from its source."
            )
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _module(value: Any, name: str) -> ModuleRecord:
    if not isinstance(value, ModuleRecord) or value.state is None:
        raise Refusal(f"{brief(value)} as {name}")
    return value


def plain(value: Any) -> Any:
    """Options as JSON knows them: tuples and sets become lists.

    Raises: Refusal for records among them, for more than MAX_NODES values or MAX_DEPTH levels.
    """
    count = 0

    def convert(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise Refusal(f"options of more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if (
            value is None
            or isinstance(value, (bool, int))
            or (isinstance(value, str) and len(value) <= MAX_OPTION)
        ):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        if isinstance(value, (list, tuple)):
            return [convert(v, depth + 1) for v in value]
        if isinstance(value, (set, frozenset)):
            return sorted((convert(v, depth + 1) for v in value), key=str)
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            return {k: convert(v, depth + 1) for k, v in value.items()}
        if isinstance(value, TensorRecord) and 0 < value.nbytes <= 1 << 12:
            return convert(value.tensor().tolist(), depth + 1)
        raise Refusal(
            f"an option that is {'a long text' if isinstance(value, (str, LongText)) else brief(value)}"
        )

    return convert(value, 0)


def tensors(module: ModuleRecord, name: str) -> dict[str, TensorRecord]:
    """State-dict name -> tensor, of a module and those in it, in the order of torch's state_dict.

    Raises: Refusal for what is no module, and for more than MAX_NODES of them, as where modules contain
        themselves.
    """
    records: dict[str, TensorRecord] = {}
    count = 0

    def collect(record: Any, prefix: str, depth: int) -> None:
        nonlocal count
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise Refusal(f"more than {MAX_NODES} modules or {MAX_DEPTH} levels of them in {name}")
        state = _module(record, brief_text(prefix.removesuffix(".")) or name).state
        hidden = state.get("_non_persistent_buffers_set", set())
        if not isinstance(hidden, (set, frozenset)):
            raise Refusal(f"{brief(hidden)} as names of buffers")
        for part in ("_parameters", "_buffers", "_modules"):
            children = state.get(part, {})
            few = isinstance(children, dict) and len(children) <= MAX_NODES
            if not few or not all(isinstance(k, str) and len(k) <= MAX_KEY for k in children):
                raise Refusal(f"{part} that are not a dictionary of names")
            count += len(children)
            for key, value in children.items():
                if value is None or (part == "_buffers" and key in hidden):
                    continue
                if part == "_modules":
                    collect(value, f"{prefix}{key}.", depth + 1)
                elif not isinstance(value, TensorRecord):
                    raise Refusal(f"{brief(value)} as the tensor {brief_text(prefix + key)}")
                else:
                    records[prefix + key] = value

    collect(module, "", 0)
    return records
