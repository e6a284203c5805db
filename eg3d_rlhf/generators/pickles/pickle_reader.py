"""Interpreter of pickle opcodes, protocols 2 to 5, which produces only plain data and records.

The interpreter neither imports nor calls anything that a file names. A subclass of `Rules` defines the
meaning of names, calls and states. Anything that it does not accept is an error. A `Budget` limits the number
of opcodes and of decoded bytes for a file, including the tensor streams inside it.
"""

import dataclasses
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

MAX_OPCODES = 1_000_000  # a published snapshot has about 40,000
MAX_INTEGER_BYTES = 16  # largest size of an integer; torch's magic number has 10 bytes
MAX_NAME = 200  # largest number of characters of a module or class name
# Texts with more bytes than this are not decoded. Only source code and bytes of protocol 2 are that long.
LONG_TEXT = 1 << 16
# Largest number of bytes of one long text (such as a tensor of protocol 2), and of all short texts together.
MAX_TEXT = 1 << 27


class RejectedError(ValueError):
    """Raised for a rejected stream, with the reason: a clause about the file that begins with 'it' or 'its'.

    Example: 'it refers to os.system, which no network needs'. `reporting_rejection` completes the sentence.
    """


@dataclasses.dataclass
class Budget:
    """Amount of work that is still allowed for one file."""

    # Number of bytes that may still be decoded from long texts; initially the size of the file. A text that
    # several opcodes use counts each time.
    decoded_bytes: int
    opcode_count: int = MAX_OPCODES  # number of opcodes, or of other operations of similar cost
    text_bytes: int = MAX_TEXT  # number of bytes of short texts

    def spend(self, *, opcode_count: int = 0, decoded_bytes: int = 0, text_bytes: int = 0) -> None:
        """Subtract work from the budget.

        Args:
            opcode_count: number of opcodes, or of other operations of similar cost.
            decoded_bytes: number of bytes decoded from long texts.
            text_bytes: number of bytes of short texts.
        Raises: RejectedError if the budget is exhausted.
        """
        self.opcode_count = self.opcode_count - opcode_count
        self.decoded_bytes = self.decoded_bytes - decoded_bytes
        self.text_bytes = self.text_bytes - text_bytes
        if self.opcode_count < 0:
            raise RejectedError(f"it needs more than {MAX_OPCODES} opcodes")
        if self.decoded_bytes < 0:
            raise RejectedError("its long texts would decode to more bytes than the file has")
        if self.text_bytes < 0:
            raise RejectedError(f"its short texts have more than {MAX_TEXT} bytes together")


@dataclasses.dataclass(frozen=True)
class Global:
    """A Python name that the stream refers to. The name is compared with tables, but never imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Return the name with its module, for example 'torch.FloatStorage'."""
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class LongText:
    """A text of more than LONG_TEXT bytes, which is kept as undecoded UTF-8."""

    utf8: memoryview


def describe(value: Any) -> str:
    """Describe a value for a message in a few printable characters, even if it is very large or nested."""
    if isinstance(value, Global):
        return shorten(value.path)
    if isinstance(value, str):
        return repr(shorten(value))
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    # Members are not described, because they may be nested without end.
    if isinstance(value, (list, tuple, dict, set, frozenset, memoryview)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def shorten(untrusted_text: str, max_characters: int = 80) -> str:
    """Escape control characters in a text, and truncate it to `max_characters` characters."""
    # Truncated first, so that a text of gigabytes is not escaped.
    short_text = (
        untrusted_text if len(untrusted_text) <= max_characters else untrusted_text[:max_characters] + "..."
    )
    return short_text.encode("unicode_escape").decode("ascii")


def is_key(value: Any) -> bool:
    """Return True for a value that may be a key of a dictionary or a member of a set.

    These are None, texts and integers below 2^60. Tuples are excluded, because hashing nested tuples can take
    exponential time. Larger integers are excluded, because an attacker can choose them with equal hashes,
    which makes a dictionary slow.
    """
    return value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 1 << 60)


def decode(utf8: bytes) -> str:
    """Decode UTF-8.

    Raises: RejectedError for invalid UTF-8. This includes lone surrogates, which pickle can write.
    """
    try:
        return utf8.decode("utf-8")
    except UnicodeDecodeError:
        raise RejectedError("it contains a text that is not UTF-8") from None


def members(set_members: list) -> list:
    """Return the items of a set unchanged. Raises: RejectedError for an item that is no key (`is_key`)."""
    for set_member in set_members:
        if not is_key(set_member):
            raise RejectedError(
                f"it has a set with the member {describe(set_member)} instead of a text, None or an integer"
                " below 2^60"
            )
    return set_members


def fill(dictionary: dict, *, keys_and_values: list) -> dict:
    """Add entries to a dictionary, in place, and return it. `keys_and_values` has keys and values in turn.

    A later value of the same key replaces an earlier one, as in pickle.

    Raises: RejectedError for an odd number of items, or a value that cannot be a key (`is_key`).
    """
    if len(keys_and_values) % 2:
        raise RejectedError("it has a dictionary key without a value")
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        if not is_key(key):
            raise RejectedError(
                f"it has a dictionary with the key {describe(key)} instead of a text, None or an integer"
                " below 2^60"
            )
        dictionary[key] = value
    return dictionary


class Rules:
    """Rules that define which names, calls, objects and states of a stream are accepted.

    Each method returns a record, or raises RejectedError for an argument that it does not accept. This base
    class accepts nothing.

    Args:
        budget: remaining work, shared by all streams of a file.
        name_counts: counter of the names that the streams refer to, shared by all streams of a file.
    """

    location = ""  # end of messages that names the kind of the stream, such as " in a tensor stream"

    def __init__(self, budget: Budget, name_counts: Counter):
        self.budget = budget
        self.name_counts = name_counts

    def find(self, name: Global) -> Global:
        """Return a name that the stream refers to. Other names than the accepted ones are an error."""
        raise RejectedError(f"it refers to {describe(name)}{self.location}, which is not allowed")

    def reduce(self, function: Any, args: tuple) -> Any:
        """Return the record that represents the result of a function call."""
        raise RejectedError(f"it calls {describe(function)}{self.location}, which is not allowed")

    def new(self, cls: Any, args: tuple) -> Any:
        """Return the record that represents a new object of the class `cls`, without its state."""
        raise RejectedError(f"it creates an object of {describe(cls)}{self.location}, which is not allowed")

    def build(self, target_record: Any, state: Any) -> None:
        """Set the state of a record that `new` or `reduce` returned."""
        raise RejectedError(
            f"it sets the state of {describe(target_record)}{self.location}, which is not allowed"
        )

    def persistent(self, pid: Any) -> Any:
        """Return the record of the object outside of the stream that has the persistent id `pid`."""
        raise RejectedError(f"it has a persistent id ({describe(pid)}), which is not allowed here")


class Machine:
    """Interpreter of one pickle stream.

    A pickle is a program for a stack machine. Its opcodes push values onto a stack, combine the topmost
    values, and store values in a memo for later use.

    Args:
        data: bytes that contain the stream.
        start: index of the stream's first byte.
        rules: rules that define which names, calls and states are accepted.
    """

    def __init__(self, data: memoryview, start: int, rules: Rules):
        self.data = data
        self.position = start
        self.rules = rules
        self.stack: list = []
        self.below: list[list] = []  # for each open mark, the values below it
        self.memo: dict[int, Any] = {}  # index -> stored value
        self.protocol = 0

    def run(self) -> Any:
        """Execute the stream and return its value. `position` is then the index of the byte after the stream.

        Raises: RejectedError for a damaged stream, or for anything that the rules do not accept.
        """
        # 0x80 is PROTO, the first opcode of every pickle from protocol 2 on.
        if self.u1() != 0x80:
            raise RejectedError("it does not begin like a pickle of protocol 2 or later")
        self.protocol = self.u1()
        if not 2 <= self.protocol <= 5:
            raise RejectedError(f"it has the pickle protocol {self.protocol}, which is not one of 2 to 5")
        while True:
            self.rules.budget.spend(opcode_count=1)
            opcode = self.u1()
            if opcode == 0x2E:  # STOP
                if len(self.stack) != 1 or self.below:
                    raise RejectedError("it does not end with exactly one value")
                return self.pop()
            # An opcode outside the table is rejected.
            operation = OPERATIONS.get(opcode)
            if operation is None:
                raise RejectedError(f"it uses the opcode 0x{opcode:02x}, which network pickles do not use")
            operation(self)

    # Methods that read bytes of the stream.

    def take(self, byte_count: int) -> memoryview:
        """Return the next `byte_count` bytes without copying them.

        Raises: RejectedError if fewer bytes remain.
        """
        remaining_byte_count = len(self.data) - self.position
        if byte_count > remaining_byte_count:
            raise RejectedError(
                f"it ends too early: {byte_count} bytes are needed, but {remaining_byte_count} remain"
            )
        self.position += byte_count
        return self.data[self.position - byte_count : self.position]

    def u1(self) -> int:
        """Read one unsigned byte."""
        return self.take(1)[0]

    def number(self, struct_format: str) -> Any:
        """Read one number. `struct_format` is its format in the notation of the module `struct`."""
        return struct.unpack(struct_format, self.take(struct.calcsize(struct_format)))[0]

    def line(self) -> str:
        """Read text up to a newline, which is not part of the result.

        Raises: RejectedError if there is no newline within MAX_NAME bytes.
        """
        # The search is limited, so that a file without newline is not searched to its end.
        search_window = bytes(self.data[self.position : self.position + MAX_NAME + 1])
        line_length = search_window.find(b"\n")
        if line_length < 0:
            raise RejectedError(f"it has a name of more than {MAX_NAME} characters, or ends within a name")
        self.position += line_length + 1
        return decode(search_window[:line_length])

    def text(self, byte_count: int) -> "str | LongText":
        """Read a text of `byte_count` bytes of UTF-8. A text of more than LONG_TEXT bytes is not decoded."""
        if byte_count > MAX_TEXT:
            raise RejectedError(f"it has a text of {byte_count} bytes, which is more than {MAX_TEXT}")
        utf8_view = self.take(byte_count)
        if byte_count > LONG_TEXT:
            return LongText(utf8_view)
        self.rules.budget.spend(text_bytes=byte_count)
        return decode(bytes(utf8_view))

    def integer(self, byte_count: int) -> int:
        """Read a signed integer of `byte_count` bytes, in little-endian two's complement."""
        if not 0 <= byte_count <= MAX_INTEGER_BYTES:
            raise RejectedError(
                f"it has an integer of {byte_count} bytes instead of 0 to {MAX_INTEGER_BYTES}"
            )
        return int.from_bytes(self.take(byte_count), "little", signed=True)

    # Methods on the stack.

    def push(self, value: Any) -> None:
        """Push a value onto the stack."""
        self.stack.append(value)

    def top(self, required_type: type | tuple = object) -> Any:
        """Return the topmost value of the stack.

        Raises: RejectedError if the stack is empty, or if the value does not have the type `required_type`.
        """
        if not self.stack:
            raise RejectedError("it has an opcode without the values that the opcode needs")
        if not isinstance(self.stack[-1], required_type):
            raise RejectedError(f"it has an opcode that cannot be applied to {describe(self.stack[-1])}")
        return self.stack[-1]

    def pop(self, required_type: type | tuple = object) -> Any:
        """Remove the topmost value of the stack and return it. `required_type` is its type, see `top`."""
        value = self.top(required_type)
        del self.stack[-1]
        return value

    def pop_to_mark(self) -> list:
        """Close the last mark. Remove and return all values above it."""
        if not self.below:
            raise RejectedError("it has an opcode without the mark that the opcode needs")
        values_above_mark = self.stack
        self.stack = self.below.pop()
        return values_above_mark

    def mark(self) -> None:
        """Open a mark. The values below it cannot be accessed until the mark is closed, as in pickle."""
        self.below.append(self.stack)
        self.stack = []

    # Methods that create or extend containers.

    def tuple_of(self, value_count: int) -> None:
        """Replace the topmost `value_count` values by a tuple."""
        if len(self.stack) < value_count:
            raise RejectedError("it has an opcode without the values that the opcode needs")
        self.stack[-value_count:] = [tuple(self.stack[-value_count:])]

    def extend(self, added_values: list, container_type: type) -> None:
        """Add `added_values` to the list or set on top of the stack. `container_type` is list or set."""
        # The check of the type prevents that the stream extends a record.
        container = self.top(container_type)
        container.extend(added_values) if container_type is list else container.update(members(added_values))

    # Methods on the memo.

    def put(self, memo_index: int) -> None:
        """Store the topmost value in the memo. The value remains on the stack."""
        self.memo[memo_index] = self.top()

    def get(self, memo_index: int) -> None:
        """Push a value from the memo."""
        if memo_index not in self.memo:
            raise RejectedError(f"it uses the memo entry {memo_index} before it is stored")
        self.push(self.memo[memo_index])

    # Other operations. The rules decide whether a name is accepted.

    def find(self, module: str, name: str) -> None:
        """Push a Python name if the rules accept it, and count it in `name_counts`."""
        # The opcode STACK_GLOBAL takes both texts from the stack, where they may be long.
        if max(len(module), len(name)) > MAX_NAME:
            raise RejectedError(f"it has a name of more than {MAX_NAME} characters")
        requested_name = Global(module, name)
        # Counted before the rules decide, so that a rejected name is counted, too.
        self.rules.name_counts[requested_name.path] += 1
        self.push(self.rules.find(requested_name))

    def frame(self) -> None:
        """Read and check the length of a frame.

        A frame is a block that pickle reads at once. Here the file is in memory, so frames have no effect.
        """
        frame_size = self.number("<Q")
        remaining_byte_count = len(self.data) - self.position
        if frame_size > remaining_byte_count:
            raise RejectedError(f"it has a frame of {frame_size} bytes, but {remaining_byte_count} remain")


# Opcode -> operation on a machine `m`, with the names of pickletools in comments. Python evaluates
# arguments in the order in which they are written, so the argument that is popped first is the topmost
# value of the stack.
OPERATIONS: dict[int, Callable[[Machine], object]] = {
    0x95: Machine.frame,  # FRAME
    0x28: Machine.mark,  # MARK
    0x32: lambda m: m.push(m.top()),  # DUP
    # POP, which closes the last mark if there is no value above it
    0x30: lambda m: m.stack.pop() if m.stack else m.pop_to_mark(),
    0x31: lambda m: m.pop_to_mark(),  # POP_MARK
    0x4E: lambda m: m.push(None),  # NONE
    0x88: lambda m: m.push(True),  # NEWTRUE
    0x89: lambda m: m.push(False),  # NEWFALSE
    0x4A: lambda m: m.push(m.number("<i")),  # BININT
    0x4B: lambda m: m.push(m.u1()),  # BININT1
    0x4D: lambda m: m.push(m.number("<H")),  # BININT2
    0x8A: lambda m: m.push(m.integer(m.u1())),  # LONG1
    0x8B: lambda m: m.push(m.integer(m.number("<i"))),  # LONG4
    0x47: lambda m: m.push(m.number(">d")),  # BINFLOAT
    0x58: lambda m: m.push(m.text(m.number("<I"))),  # BINUNICODE
    0x8C: lambda m: m.push(m.text(m.u1())),  # SHORT_BINUNICODE
    0x8D: lambda m: m.push(m.text(m.number("<Q"))),  # BINUNICODE8
    0x42: lambda m: m.push(m.take(m.number("<I"))),  # BINBYTES
    0x43: lambda m: m.push(m.take(m.u1())),  # SHORT_BINBYTES
    0x8E: lambda m: m.push(m.take(m.number("<Q"))),  # BINBYTES8
    0x96: lambda m: m.push(m.take(m.number("<Q"))),  # BYTEARRAY8
    0x29: lambda m: m.push(()),  # EMPTY_TUPLE
    0x74: lambda m: m.push(tuple(m.pop_to_mark())),  # TUPLE
    0x85: lambda m: m.tuple_of(1),  # TUPLE1
    0x86: lambda m: m.tuple_of(2),  # TUPLE2
    0x87: lambda m: m.tuple_of(3),  # TUPLE3
    0x5D: lambda m: m.push([]),  # EMPTY_LIST
    0x6C: lambda m: m.push(m.pop_to_mark()),  # LIST
    0x61: lambda m: m.extend([m.pop()], list),  # APPEND
    0x65: lambda m: m.extend(m.pop_to_mark(), list),  # APPENDS
    0x7D: lambda m: m.push({}),  # EMPTY_DICT
    0x64: lambda m: m.push(fill({}, keys_and_values=m.pop_to_mark())),  # DICT
    # SETITEM; the value is popped before the key, so the pair is reversed
    0x73: lambda m: fill(keys_and_values=[m.pop(), m.pop()][::-1], dictionary=m.top(dict)),
    0x75: lambda m: fill(keys_and_values=m.pop_to_mark(), dictionary=m.top(dict)),  # SETITEMS
    0x8F: lambda m: m.push(set()),  # EMPTY_SET
    0x90: lambda m: m.extend(m.pop_to_mark(), set),  # ADDITEMS
    0x91: lambda m: m.push(frozenset(members(m.pop_to_mark()))),  # FROZENSET
    0x71: lambda m: m.put(m.u1()),  # BINPUT
    0x72: lambda m: m.put(m.number("<I")),  # LONG_BINPUT
    0x94: lambda m: m.put(len(m.memo)),  # MEMOIZE
    0x68: lambda m: m.get(m.u1()),  # BINGET
    0x6A: lambda m: m.get(m.number("<I")),  # LONG_BINGET
    0x63: lambda m: m.find(m.line(), m.line()),  # GLOBAL
    0x93: lambda m: m.find(name=m.pop(str), module=m.pop(str)),  # STACK_GLOBAL
    0x52: lambda m: m.push(m.rules.reduce(args=m.pop(tuple), function=m.pop())),  # REDUCE
    0x81: lambda m: m.push(m.rules.new(args=m.pop(tuple), cls=m.pop())),  # NEWOBJ
    0x62: lambda m: m.rules.build(state=m.pop(), target_record=m.top()),  # BUILD
    0x51: lambda m: m.push(m.rules.persistent(m.pop())),  # BINPERSID
}
