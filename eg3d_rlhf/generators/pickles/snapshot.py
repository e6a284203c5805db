"""Reader of EG3D's snapshots as records: modules, tensors, and the Python names that a file refers to.

A snapshot is a pickle that contains the source text of its modules, and calls that execute this text. Here
each call becomes a `ModuleRecord`, and the text is not executed.

Tensors are stored in legacy torch streams. The stream of a storage consists of five small pickles (magic
number, protocol number 1001, properties of the system, persistent id of the storage, list of keys), the
number of elements (int64) and the bytes of the elements, all little-endian. The shape and the stride of a
tensor are checked before memory is allocated.
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
from training.input_paths import existing_file
from training.storage import reject_lfs_pointer

# Records and rules of the tensor streams.

MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
VERSION = 1001  # torch.serialization.PROTOCOL_VERSION
MAX_DIMENSIONS = 8  # largest number of axes of a tensor
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
    """A storage of tensors in the file."""

    dtype: torch.dtype  # type of the elements
    data: memoryview  # bytes of the elements, a view into the file


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRecord:
    """A tensor of a file. All its elements are known to lie inside its storage."""

    storage: StorageRecord  # storage that contains the elements
    offset: int  # index of the first element in the storage
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # distance of neighbours along each axis, in elements

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def tensor(self) -> torch.Tensor:
        """Return the tensor as a contiguous copy on the CPU."""
        dtype = self.storage.dtype
        if not self.nbytes:
            # numpy rejects a view of an empty buffer.
            return torch.empty(self.shape, dtype=dtype)
        element_size = dtype.itemsize
        # The bytes are copied as integers of the same size, because numpy has no bfloat16. `_tensor` has
        # checked that the view lies inside the buffer.
        file_view = np.ndarray(
            self.shape,
            dtype=f"<i{element_size}",
            buffer=self.storage.data,
            offset=self.offset * element_size,
            strides=[axis_stride * element_size for axis_stride in self.stride],
        )
        return torch.from_numpy(file_view.copy(order="C")).view(dtype)


@dataclasses.dataclass(frozen=True)
class _StorageId:
    """Persistent id of a storage, by which a pickle refers to data outside of its stream."""

    dtype: torch.dtype  # type of the elements
    key: str  # name of the storage in its stream
    count: int  # number of elements


class StorageRules(Rules):
    """Rules of tensor streams, which accept only storage classes and persistent ids of storages."""

    location = " in a tensor stream"

    def find(self, name: Global) -> Global:
        """Return the name of a storage class such as torch.FloatStorage. Reject all other names."""
        if name.module not in ("torch", "torch.cuda") or name.name not in DTYPES:
            super().find(name)
        return name

    def persistent(self, pid: Any) -> Any:
        """Return the record of the storage that a persistent id refers to.

        Args: pid: tuple ('storage', class, key, location, count, None). The location is the device of the
            original tensor. It is ignored, because all tensors are read to the CPU.
        Raises: RejectedError for any other persistent id.
        """
        member_types: tuple[type, ...] = (str, Global, str, str, int, type(None))
        if (
            not isinstance(pid, tuple)
            or len(pid) != 6
            or not all(
                isinstance(member, member_type) for member, member_type in zip(pid, member_types, strict=True)
            )
        ):
            raise RejectedError(f"it has the invalid storage id {describe(pid)}")
        id_prefix, storage_class, storage_key, _, element_count, _ = pid
        # bool is a subclass of int in Python, so it is excluded explicitly.
        if id_prefix != "storage" or isinstance(element_count, bool) or element_count < 0:
            raise RejectedError(
                f"it has a storage id that begins with {describe(id_prefix)} and states"
                f" {describe(element_count)} elements, instead of 'storage' and a number >= 0"
            )
        return _StorageId(DTYPES[storage_class.name], storage_key, element_count)


def read_storage(data: memoryview, budget: Budget, name_counts: Counter) -> StorageRecord:
    """Parse the legacy torch stream of one storage.

    Args:
        data: bytes of the stream.
        budget: remaining work of the file.
        name_counts: counter of the names that the file refers to.
    Raises: RejectedError for another format, a name outside DTYPES, or a number of elements that does not fit
        the length of the stream.
    """
    byte_position = 0
    pickled_values = []
    for _ in range(5):
        # The five pickles follow one another without separators.
        machine = Machine(data, byte_position, StorageRules(budget, name_counts))
        pickled_values.append(machine.run())
        byte_position = machine.position
    magic_number, protocol_number, system_properties, storage_id, storage_keys = pickled_values
    if magic_number != MAGIC or protocol_number != VERSION:
        raise RejectedError(
            "it has a tensor stream with another magic number or protocol number than torch's"
        )
    if not isinstance(system_properties, dict) or system_properties.get("little_endian") is not True:
        raise RejectedError("it has a tensor stream from a big-endian machine")
    if (
        not isinstance(storage_id, _StorageId)
        or not isinstance(storage_keys, list)
        or len(storage_keys) != 1
        or storage_keys[0] != storage_id.key
    ):
        raise RejectedError("it has a tensor stream that does not contain exactly one storage")
    if len(data) - byte_position < 8:
        raise RejectedError("it has a tensor stream without a number of elements")
    # The number of elements (8 bytes) is stored a second time, after the persistent id.
    (element_count,) = struct.unpack("<q", data[byte_position : byte_position + 8])
    element_bytes = data[byte_position + 8 :]
    if element_count != storage_id.count or element_count * storage_id.dtype.itemsize != len(element_bytes):
        stated_size = f"{storage_id.count} and {element_count} elements of {storage_id.dtype.itemsize} bytes"
        raise RejectedError(
            f"it has a tensor stream that states {stated_size}, but contains {len(element_bytes)} bytes"
        )
    return StorageRecord(storage_id.dtype, element_bytes)


# Classes of modules without the decorator of torch_utils.persistence. They are pickled as ordinary objects.
PLAIN_MODULES = {
    "training.triplane.OSGDecoder",
    "training.volumetric_rendering.renderer.ImportanceRenderer",
    "training.volumetric_rendering.ray_sampler.RaySampler",
    "training.volumetric_rendering.ray_marcher.MipRayMarcher2",
    "torch.nn.modules.activation.Softplus",
    "torch.nn.modules.container.Sequential",
}
# Classes whose objects are read as dictionaries.
DICTIONARIES = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
SCALARS = {  # numpy's code of a scalar type -> the code of the module struct
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
    """A module in the file."""

    class_name: str  # name of its class, without the Python module
    state: Any  # its attributes by name, a dict; None until the stream sets it


@dataclasses.dataclass(eq=False)
class DtypeRecord:
    """A numpy scalar type."""

    code: str  # numpy's code of the type, a key of SCALARS
    order: str = "<"  # byte order, "<" little-endian or ">" big-endian


class SnapshotRules(Rules):
    """Rules of a snapshot's outer stream. For the tensor streams inside it, `StorageRules` apply."""

    def __init__(self, budget: Budget, name_counts: Counter):
        super().__init__(budget, name_counts)
        # Path of a function -> method that returns the record of a call of this function.
        self.calls: dict[str, Callable[[tuple], Any]] = {
            "torch_utils.persistence._reconstruct_persistent_obj": self._module,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.storage._load_from_bytes": lambda args: read_storage(
                _only(args, memoryview, "storage"), self.budget, self.name_counts
            ),
            "numpy.dtype": self._dtype,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy._core.multiarray.scalar": self._scalar,
            # Protocol 2 writes bytes and sets as calls of these functions.
            "_codecs.encode": self._bytes,
            "__builtin__.bytes": self._empty_bytes,
            "__builtin__.set": self._set,
            "builtins.set": self._set,
        }

    def find(self, name: Global) -> Global:
        """Return a name if it is in `calls`, PLAIN_MODULES or DICTIONARIES. Reject all other names."""
        if name.path not in self.calls and name.path not in PLAIN_MODULES and name.path not in DICTIONARIES:
            raise RejectedError(f"it refers to {describe(name)}, which no network needs")
        return name

    def reduce(self, function: Any, args: tuple) -> Any:
        """Return the record that represents the result of a function call, or an empty dictionary.

        Only the functions in `calls` and the classes in DICTIONARIES are accepted.
        """
        # The path is empty for a call of something that is no name. The base class rejects it below.
        function_path = function.path if isinstance(function, Global) else ""
        # Pickle creates dictionaries either by a call without arguments or as new objects.
        if function_path in DICTIONARIES:
            return self.new(function, args)
        if function_path not in self.calls:
            return super().reduce(function, args)
        return self.calls[function_path](args)

    def new(self, cls: Any, args: tuple) -> Any:
        """Return a record without state for a class in PLAIN_MODULES, or {} for a class in DICTIONARIES."""
        class_path = cls.path if isinstance(cls, Global) else ""
        if args != ():
            raise RejectedError(f"it passes arguments to a new {describe(cls)}, which takes none")
        if class_path in DICTIONARIES:
            return {}
        if class_path not in PLAIN_MODULES:
            raise RejectedError(f"it creates an object of {describe(cls)}, which no network needs")
        return ModuleRecord(cls.name, None)

    def build(self, target_record: Any, state: Any) -> None:
        """Set the state of a module, which must have none yet, or the byte order of a scalar type."""
        if isinstance(target_record, ModuleRecord) and target_record.state is None and self._is_state(state):
            target_record.state = state
        elif (
            isinstance(target_record, DtypeRecord)
            and isinstance(state, tuple)
            and len(state) >= 2
            and state[1] in ("<", "|", ">")
        ):
            # "|" means that the type has a single byte, so that the order does not matter.
            target_record.order = ">" if state[1] == ">" else "<"
        else:
            raise RejectedError(
                f"it sets the state of {describe(target_record)} to {describe(state)}, which is not allowed"
            )

    def _is_state(self, value: Any) -> bool:
        """Return True for a dictionary whose keys are all texts."""
        # The check of a large dictionary takes time, and a stream can request it many times.
        self.budget.spend(opcode_count=len(value) if isinstance(value, dict) else 0)
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)

    # Methods for the table `calls`. Each converts the arguments of a call to a record.

    def _module(self, args: tuple) -> ModuleRecord:
        """Return the record of a module from the dictionary that torch_utils.persistence wrote."""
        module_description = _only(args, dict, "module")
        if (
            module_description.get("type") != "class"
            or not isinstance(module_description.get("class_name"), str)
            or not self._is_state(module_description.get("state"))
        ):
            raise RejectedError("it has a module description without a valid type, class_name or state")
        # module_description["module_src"], the source text that EG3D would execute, is ignored.
        return ModuleRecord(module_description["class_name"], module_description["state"])

    def _tensor(self, args: tuple) -> TensorRecord:
        """Return the record of a tensor from its storage, offset, shape and stride.

        Raises: RejectedError if an element lies outside the storage, or if the tensor has more elements than
            the storage. With a stride of 0, a small file could otherwise contain a tensor of many gigabytes.
        """
        # torch writes six arguments, newer versions seven. Only the first four matter here.
        if not 6 <= len(args) <= 7:
            raise RejectedError(f"it creates a tensor from {len(args)} arguments instead of 6 or 7")
        storage, offset, shape, stride = args[:4]
        if not isinstance(storage, StorageRecord):
            raise RejectedError(f"it has a tensor whose storage is {describe(storage)} instead of a storage")
        if (
            not isinstance(shape, tuple)
            or not isinstance(stride, tuple)
            or not len(shape) == len(stride) <= MAX_DIMENSIONS
        ):
            raise RejectedError(
                f"it has a tensor with the shape {describe(shape)} and the stride {describe(stride)} instead"
                f" of two tuples of the same length, at most {MAX_DIMENSIONS}"
            )
        # type() is compared, because bool is a subclass of int. The products below cannot overflow, because
        # Python's integers have no fixed size.
        if not all(type(entry) is int and 0 <= entry < 1 << 62 for entry in (offset, *shape, *stride)):
            raise RejectedError(
                "it has a tensor whose offset, shape or stride contains a value that is not an integer from 0"
                " to 2^62 - 1"
            )
        element_count = math.prod(shape)
        storage_count = len(storage.data) // storage.dtype.itemsize
        # Strides are not negative, so the last element has the largest index.
        last_index = offset
        if element_count:
            last_index += sum(
                (axis_size - 1) * axis_stride for axis_size, axis_stride in zip(shape, stride, strict=True)
            )
        # max: an empty tensor has the last index 0 in an empty storage.
        if element_count > storage_count or last_index >= max(storage_count, 1):
            raise RejectedError(
                f"it has a tensor of {element_count} elements with the last index {last_index} in a storage"
                f" of {storage_count}"
            )
        return TensorRecord(storage, offset, shape, stride)

    def _parameter(self, args: tuple) -> TensorRecord:
        """Return the tensor of a parameter."""
        if len(args) != 3 or not isinstance(args[0], TensorRecord):
            raise RejectedError("it has a parameter without a tensor")
        return args[0]

    def _dtype(self, args: tuple) -> DtypeRecord:
        """Return the record of a numpy scalar type from its code."""
        if not args or not isinstance(args[0], str) or args[0] not in SCALARS:
            raise RejectedError(f"it has the unknown scalar type {describe(args[0] if args else None)}")
        return DtypeRecord(args[0])

    def _scalar(self, args: tuple) -> float | int | bool:
        """Return a number from a scalar type and its bytes."""
        if len(args) != 2 or not isinstance(args[0], DtypeRecord) or not isinstance(args[1], memoryview):
            raise RejectedError("it has a number without its type and bytes")
        # Byte order and type in the notation of the module struct.
        struct_format = args[0].order + SCALARS[args[0].code]
        if len(args[1]) != struct.calcsize(struct_format):
            raise RejectedError(
                f"it has a number of {len(args[1])} bytes instead of {struct.calcsize(struct_format)}"
            )
        return struct.unpack(struct_format, args[1])[0]

    def _bytes(self, args: tuple) -> memoryview:
        """Return bytes that protocol 2 has written as latin-1 text, one character for each byte."""
        if len(args) != 2 or not isinstance(args[0], (str, LongText)) or args[1] not in ("latin1", "latin-1"):
            raise RejectedError("it has bytes in another encoding than latin1")
        latin1_text = args[0]
        self.budget.spend(
            decoded_bytes=len(latin1_text.utf8) if isinstance(latin1_text, LongText) else len(latin1_text)
        )
        latin1_text = decode(bytes(latin1_text.utf8)) if isinstance(latin1_text, LongText) else latin1_text
        try:
            return memoryview(latin1_text.encode("latin-1"))
        except UnicodeEncodeError:
            raise RejectedError("it has bytes with values above 255") from None

    def _empty_bytes(self, args: tuple) -> memoryview:
        """Return empty bytes, which protocol 2 writes as a call without arguments."""
        if args != ():
            raise RejectedError("it passes arguments to a call that creates empty bytes")
        return memoryview(b"")

    def _set(self, args: tuple) -> set:
        """Return a set, which protocol 2 writes as a call with the list of its members."""
        set_members = _only(args, list, "set")
        # A stream can convert the same list many times, so its length counts each time.
        self.budget.spend(opcode_count=len(set_members))
        return set(members(set_members))


def _only(args: tuple, required_type: type, object_name: str) -> Any:
    """Return the only argument of a call that creates an object, after checking its type.

    Args:
        args: arguments of the call.
        required_type: type that the argument must have.
        object_name: name of the object in messages, such as "set".
    Raises: RejectedError for another number of arguments or another type.
    """
    if len(args) != 1:
        raise RejectedError(f"it creates a {object_name} from {len(args)} arguments instead of one")
    if not isinstance(args[0], required_type):
        raise RejectedError(f"it creates a {object_name} from {describe(args[0])}")
    return args[0]


MAX_DEPTH = 24  # largest number of levels of nested modules, or of nested lists
MAX_NODES = 20_000  # largest number of modules and tensors of a network, or of values in a set of options
MAX_KEY = 200  # largest number of characters of a name
MAX_OPTION = 4096  # largest number of characters of a text among options
NETWORKS = ("G", "D", "G_ema")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The contents of a network pickle of EG3D as records."""

    who: str  # name of the file in messages
    size: int  # size of the file in bytes
    protocol: int  # version of the pickle format
    networks: dict[str, ModuleRecord]  # "G", "D" or "G_ema" -> network, for the networks in the file
    augment_pipe: ModuleRecord | None  # ADA's augmentation, or None if the file does not contain it
    training_set: dict[str, Any]  # options of the dataset (training_set_kwargs)
    name_counts: dict[str, int]  # Python name that the file refers to -> number of times


def read(path: str | Path) -> Snapshot:
    """Read a network pickle of EG3D as records, without running code from it.

    The file is mapped into memory, and tensors are not copied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no network pickle of EG3D. The message is one line.
    """
    return parse(_mapped(path), str(path))


def parse(data: memoryview, who: str) -> Snapshot:
    """Parse the bytes of a network pickle, see `read`.

    Args: data: bytes of the file; who: name of the file in messages.
    """
    name_counts: Counter = Counter()
    # A file cannot contain more bytes of text than it has itself.
    machine = Machine(data, 0, SnapshotRules(Budget(decoded_bytes=len(data)), name_counts))
    with reporting_rejection(who, machine):
        root_object = machine.run()
        # The file may be a pickled generator, not a dictionary of networks.
        if isinstance(root_object, ModuleRecord):
            root_object = {"G_ema": root_object}
        if not isinstance(root_object, dict):
            raise RejectedError(f"it contains {describe(root_object)} instead of a dictionary of networks")
        # Other keys of the dictionary are ignored.
        module_records = {
            module_name: _module(root_object[module_name], module_name)
            for module_name in (*NETWORKS, "augment_pipe")
            if root_object.get(module_name) is not None
        }
        augment_record = module_records.pop("augment_pipe", None)
        training_set = json_values(root_object.get("training_set_kwargs") or {})
        if not isinstance(training_set, dict):
            raise RejectedError("its training_set_kwargs are not a dictionary")
        return Snapshot(
            who, len(data), machine.protocol, module_records, augment_record, training_set, dict(name_counts)
        )


@contextlib.contextmanager
def reporting_rejection(who: str, machine: Machine | None = None) -> Iterator[None]:
    """Convert a RejectedError in the block into a ValueError that states the file and the reason.

    Args:
        who: name of the file.
        machine: interpreter of the stream, whose position the message states; None: no position.
    """
    try:
        yield
    except RejectedError as rejection:
        position_text = f" (byte {machine.position})" if machine is not None else ""
        raise ValueError(
            f"{who}: the file is not accepted as a network pickle of EG3D: {rejection}{position_text}. No"
            " code from the file was run. Download the file again from its source, or choose another file."
        ) from None


def _mapped(path: str | Path) -> memoryview:
    """Map a file into memory, read-only, and return its bytes."""
    path = existing_file(path, "network pickle")
    reject_lfs_pointer(path)
    with open(path, "rb") as file:
        # Checked here, because mmap's own error for empty files does not name the file.
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty. Download the network pickle again from its source.")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _module(value: Any, module_name: str) -> ModuleRecord:
    """Return `value` unchanged. Raises: RejectedError unless it is a module record with a state.

    Args: value: any value of the stream; module_name: name of the module in messages.
    """
    if not isinstance(value, ModuleRecord) or value.state is None:
        raise RejectedError(f"its {module_name} is {describe(value)} instead of a module with a state")
    return value


def json_values(value: Any) -> Any:
    """Convert options to JSON values. Tuples, sets and small tensors become lists.

    Raises: RejectedError for other records, NaN, infinity, long texts, and for more than MAX_NODES values or
        MAX_DEPTH levels.
    """
    value_count = 0

    def convert(value: Any, depth: int) -> Any:
        """Convert one value at the nesting level `depth`. All values of the tree are counted together."""
        nonlocal value_count
        value_count += 1
        # A list that contains the same list twice, and so on, expands exponentially. Deep nesting would
        # exceed Python's recursion limit.
        if value_count > MAX_NODES or depth > MAX_DEPTH:
            raise RejectedError(f"its options have more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if (
            value is None
            or isinstance(value, (bool, int))
            or (isinstance(value, str) and len(value) <= MAX_OPTION)
        ):
            return value
        if isinstance(value, float) and math.isfinite(value):  # JSON has no infinity and no NaN
            return value
        if isinstance(value, (list, tuple)):
            return [convert(member, depth + 1) for member in value]
        if isinstance(value, (set, frozenset)):
            # Sorted, because the order of a set differs between processes.
            return sorted((convert(member, depth + 1) for member in value), key=str)
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {key: convert(member, depth + 1) for key, member in value.items()}
        # Options such as avg_camera_pivot may be small tensors.
        if isinstance(value, TensorRecord) and 0 < value.nbytes <= 1 << 12:
            return convert(value.tensor().tolist(), depth + 1)
        value_description = "a long text" if isinstance(value, (str, LongText)) else describe(value)
        raise RejectedError(f"one of its options is {value_description}")

    return convert(value, 0)


def tensors(network_record: ModuleRecord, network_name: str) -> dict[str, TensorRecord]:
    """Return the state dict of a module and its submodules: name -> tensor, in the order of torch.

    Args: network_record: record of the network; network_name: name of the network in messages.
    Raises: RejectedError for submodules or tensors of another type, and for more than MAX_NODES modules and
        tensors, for example if a module contains itself.
    """
    record_by_name: dict[str, TensorRecord] = {}
    node_count = 0

    def collect(parent_record: Any, prefix: str, depth: int) -> None:
        """Add the tensors of a module at the nesting level `depth`. Their names begin with `prefix`."""
        nonlocal node_count
        node_count += 1
        if node_count > MAX_NODES or depth > MAX_DEPTH:
            raise RejectedError(
                f"its {network_name} has more than {MAX_NODES} modules or {MAX_DEPTH} levels of modules"
            )
        module_state = _module(parent_record, shorten(prefix.removesuffix(".")) or network_name).state
        non_persistent_names = module_state.get("_non_persistent_buffers_set", set())
        if not isinstance(non_persistent_names, (set, frozenset)):
            raise RejectedError(
                f"its {network_name} has a module whose _non_persistent_buffers_set is"
                f" {describe(non_persistent_names)} instead of a set"
            )
        for attribute_name in ("_parameters", "_buffers", "_modules"):
            children = module_state.get(attribute_name, {})
            is_small = isinstance(children, dict) and len(children) <= MAX_NODES
            if not is_small or not all(
                isinstance(child_name, str) and len(child_name) <= MAX_KEY for child_name in children
            ):
                raise RejectedError(
                    f"its {network_name} has a module whose {attribute_name} are not a dictionary of at most"
                    f" {MAX_NODES} names of at most {MAX_KEY} characters"
                )
            node_count += len(children)  # tensors are counted, too
            for child_name, child in children.items():
                # torch's state_dict leaves out missing tensors and non-persistent buffers, too.
                if child is None or (attribute_name == "_buffers" and child_name in non_persistent_names):
                    continue
                if attribute_name == "_modules":
                    collect(child, f"{prefix}{child_name}.", depth + 1)
                elif not isinstance(child, TensorRecord):
                    raise RejectedError(
                        f"its entry {shorten(prefix + child_name)} is {describe(child)} instead of a tensor"
                    )
                else:
                    record_by_name[prefix + child_name] = child

    collect(network_record, "", 0)
    return record_by_name
