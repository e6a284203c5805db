"""Read operators and weights of TensorFlow Lite files, which are flatbuffers, without TensorFlow.

Only the parts that `builders/face.py` needs are read. The numbers of fields and operators are those of the
public schema (tensorflow/lite/schema/schema.fbs, version 3).

Format of a flatbuffer: a table begins with the distance to its vtable, which stands before it. The vtable
lists the position of each field in the table, or 0 for a field with its default. Vectors and texts are
referenced by the distance from the reference, and begin with the number of their elements. All numbers are
little-endian.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IDENTIFIER = b"TFL3"  # bytes 4 to 8 of every file
# Numbers of the operators that are read, by the names of the schema's enumeration BuiltinOperator.
OPERATORS = {
    0: "ADD",
    2: "CONCATENATION",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    6: "DEQUANTIZE",
    17: "MAX_POOL_2D",
    19: "RELU",
    22: "RESHAPE",
    34: "PAD",
    54: "PRELU",
}
# Numbers of the types of tensors, from the schema's enumeration TensorType.
DTYPES: dict[int, str] = {0: "<f4", 1: "<f2", 2: "<i4"}


class Table:
    """Table of a flatbuffer, whose fields are read by their numbers in the schema.

    Args:
        data: the flatbuffer.
        position: position of the table in it.
    """

    def __init__(self, data: bytes, position: int):
        self._data = data
        self._position = position
        self._vtable = position - struct.unpack_from("<i", data, position)[0]
        self._vtable_size = struct.unpack_from("<H", data, self._vtable)[0]

    def _field(self, field: int) -> int | None:
        """Return the position of a field, or None if it has its default."""
        # The vtable begins with its own size and the size of the table, two bytes each.
        entry = 4 + 2 * field
        if entry >= self._vtable_size:
            return None
        distance = struct.unpack_from("<H", self._data, self._vtable + entry)[0]
        return self._position + distance if distance else None

    def _target(self, position: int) -> int:
        """Return the position that a reference points to."""
        return position + struct.unpack_from("<I", self._data, position)[0]

    def number(self, field: int, code: str) -> int:
        """Return an integer field, of which the default is 0. `code` is its format for `struct`."""
        position = self._field(field)
        return 0 if position is None else struct.unpack_from(f"<{code}", self._data, position)[0]

    def array(self, field: int, dtype: str) -> np.ndarray:
        """Return a field that is a vector of numbers, [elements]; it is empty by default."""
        position = self._field(field)
        if position is None:
            return np.zeros(0, dtype)
        start = self._target(position)
        element_count = struct.unpack_from("<I", self._data, start)[0]
        return np.frombuffer(self._data, dtype, element_count, start + 4)

    def tables(self, field: int) -> list["Table"]:
        """Return a field that is a vector of tables."""
        position = self._field(field)
        if position is None:
            return []
        start = self._target(position)
        element_count = struct.unpack_from("<I", self._data, start)[0]
        return [Table(self._data, self._target(start + 4 + 4 * index)) for index in range(element_count)]


@dataclass(frozen=True)
class Operator:
    """Operator of a graph: its name in the schema, and the indices of its tensors."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Graph of a TensorFlow Lite file.

    A tensor is named by its index. `constants` holds the stored tensors in the types of the file;
    `outputs` are the graph's outputs in the file's order.
    """

    operators: tuple[Operator, ...]
    constants: dict[int, np.ndarray]
    outputs: tuple[int, ...]

    def producer(self, tensor: int) -> Operator | None:
        """Return the operator that computes a tensor; None for constants and for the graph's input."""
        return next((operator for operator in self.operators if tensor in operator.outputs), None)

    def constant(self, tensor: int) -> np.ndarray:
        """Return a stored tensor in the type of the file. Raises: KeyError if the tensor is computed."""
        operator = self.producer(tensor)
        # Weights in half precision are converted to single precision by an operator of their own.
        is_converted = operator is not None and operator.name == "DEQUANTIZE"
        return self.constants[operator.inputs[0] if is_converted and operator else tensor]


def read_graph(path: Path) -> Graph:
    """Read the graph of a TensorFlow Lite file.

    Raises: ValueError for another format, or for a graph with operators or stored types that are not listed
        in this module.
    """
    data = path.read_bytes()
    if data[4:8] != IDENTIFIER:
        raise ValueError(
            f"{path}: the file is no TensorFlow Lite file, because its bytes 4 to 8 are {data[4:8]!r} instead"
            f" of {IDENTIFIER!r}. Copy it from its wheel again."
        )
    # Fields of Model: 1 operator codes, 2 subgraphs, 4 buffers. Of SubGraph: 0 tensors, 2 outputs,
    # 3 operators. Of Tensor: 0 shape, 1 type, 2 buffer. Of Operator: 0 index of the code, 1 inputs,
    # 2 outputs. Of OperatorCode: 0 the number as one byte (older files), 3 the number.
    model = Table(data, struct.unpack_from("<I", data, 0)[0])
    numbers = [max(code.number(0, "b"), code.number(3, "i")) for code in model.tables(1)]
    unknown = sorted(set(numbers) - set(OPERATORS))
    if unknown:
        raise ValueError(
            f"{path}: the operators with the numbers {unknown} are not supported. Use the file of the wheel"
            " that this builder names."
        )
    (subgraph,) = model.tables(2)
    buffers = model.tables(4)
    constants = {}
    for index, tensor in enumerate(subgraph.tables(0)):
        content = buffers[tensor.number(2, "I")].array(0, "u1")
        if not len(content):
            continue
        dtype = DTYPES.get(tensor.number(1, "b"))
        if dtype is None:
            raise ValueError(
                f"{path}: stored tensors of the type {tensor.number(1, 'b')} are not supported. Use the file"
                " of the wheel that this builder names."
            )
        constants[index] = np.frombuffer(content.tobytes(), dtype).reshape(tensor.array(0, "<i4"))
    operators = tuple(
        Operator(
            OPERATORS[numbers[operator.number(0, "I")]],
            tuple(operator.array(1, "<i4").tolist()),
            tuple(operator.array(2, "<i4").tolist()),
        )
        for operator in subgraph.tables(3)
    )
    return Graph(operators, constants, tuple(subgraph.array(2, "<i4").tolist()))


def path_weights(graph: Graph, output: int) -> list[np.ndarray]:
    """Return the weights on the path from a graph's input to a tensor, in torch's layout.

    The path follows the data from operator to operator. At a sum, it takes the operand that a convolution
    computes, and not the shortcut. A convolution gives its weight and its bias, a PReLU gives its slopes.

    Args:
        graph: graph of a file.
        output: index of the tensor at the end of the path.
    """
    weights: list[np.ndarray] = []
    tensor = output
    # The path is walked backwards, so the list is reversed at the end.
    while (operator := graph.producer(tensor)) is not None:
        tensor = operator.inputs[0]
        if operator.name == "ADD":
            producers = {index: graph.producer(index) for index in operator.inputs}
            (tensor,) = [index for index, made in producers.items() if made and made.name == "CONV_2D"]
        elif operator.name in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            kernel, bias = (graph.constant(index) for index in operator.inputs[1:])
            # [outputs, H, W, inputs] -> [outputs, inputs, H, W]; depthwise: [1, H, W, C] -> [C, 1, H, W]
            order = (0, 3, 1, 2) if operator.name == "CONV_2D" else (3, 0, 1, 2)
            weights += [bias, kernel.transpose(order)]
        elif operator.name == "PRELU":
            weights.append(graph.constant(operator.inputs[1]).reshape(-1))
    return weights[::-1]
