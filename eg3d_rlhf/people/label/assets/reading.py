"""Conversion of asset files for the browser, in a separate process with limits of memory and time.

The format of a file is recognised by its content, not by its name. `examine` checks files before a campaign
is planned, and rejects files that cannot be shown. `clean` makes the clean form of a file, which contains no
metadata, when a shape is prepared. It rejects a file that has changed since the campaign was planned. Both
start this module as a process. If a malicious file makes a parser crash or use too much memory, only this
process ends.

Example:
    python -m eg3d_rlhf.people.label.assets.reading < requests.jsonl
"""

import errno
import gzip
import hashlib
import json
import mmap
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eg3d_rlhf.experiments.process import serve_requests
from eg3d_rlhf.geometry.files import glb, obj, ply
from eg3d_rlhf.geometry.files.model import (
    GLB_MAGIC,
    Model,
    Note,
    glb_parts,
    preview_image,
)
from eg3d_rlhf.geometry.files.mtl import utf16
from eg3d_rlhf.people.label.assets.damage import damage_mesh, damage_splats

MESH_KINDS = ("glb", "ply", "obj")  # kinds of files that are shown as a mesh with materials
SUFFIXES = (".glb", ".ply", ".obj", ".mp4", ".m4v", ".mov", ".webm")
MAX_BYTES = 512 << 20  # largest size of a file in bytes
# Largest address space of the process in bytes: MEMORY, and PER_BYTE for each byte of the largest file.
MEMORY = 1 << 30
PER_BYTE = 12
SECONDS = 600  # largest processor time of one request in seconds
# Compression level of gzip. Compressed textures do not become smaller with higher levels, and the geometry
# becomes only a few percent smaller in three times the time.
_GZIP = 1
_ROOT = Path(__file__).resolve().parents[4]  # folder from which the process imports this package
_REJECTED = "rejected"  # key of an answer whose value is the reason why a file was rejected


class ChangedError(ValueError):
    """Error of a file that has changed since the campaign was planned, or is missing."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """Kind and hash of a file that the label page can show."""

    # 'glb', 'ply', 'splats', 'obj', 'film' (a video; study designs of version 0.1 contain this name) or
    # 'image'
    kind: str
    hash: str  # SHA-256 in hex of the file; for an OBJ or PLY file, also of its materials and textures
    note: str = ""  # difference between the file and its view on the page; '' if there is none
    untextured: bool = False  # True if a texture or colour of the file is not shown


def examine_or_reason(
    paths: Sequence[Path],
    on_progress: Callable[[int], None] = lambda done: None,
    root: Path | None = None,
) -> list[Examined | str]:
    """Recognise the kinds of files, and check whether the label page can show them.

    Args:
        paths: paths of the files.
        on_progress: function that is called with the number of examined files after each file.
        root: folder in which the textures of the files may lie; None: the folder of each file.

    Returns:
        For each file an `Examined`, or the reason why the file cannot be shown.
    """
    file_results: list[Examined | str] = []
    # If a file ends the process, another process is started for the files after it.
    while len(file_results) < len(paths):
        done_count = len(file_results)
        requests = [
            {"do": "examine", "path": str(path), "root": str(root or path.parent)}
            for path in paths[done_count:]
        ]
        # _run calls the function in this iteration
        for answer in _run(requests, lambda n: on_progress(done_count + n)):  # noqa: B023
            file_results.append(answer[_REJECTED] if _REJECTED in answer else Examined(**answer))
    return file_results


def examine(
    paths: Sequence[Path],
    on_progress: Callable[[int], None] = lambda done: None,
    root: Path | None = None,
) -> list[Examined]:
    """Recognise the kinds of files, and raise an error if the label page cannot show one of them.

    Args:
        paths: paths of the files.
        on_progress: function that is called with the number of examined files after each file.
        root: folder in which the textures of the files may lie; None: the folder of each file.

    Raises:
        ValueError: files cannot be shown; the message names them.
    """
    file_results = examine_or_reason(paths, on_progress, root)
    reject(
        {path: reason for path, reason in zip(paths, file_results, strict=True) if isinstance(reason, str)}
    )
    return [file_result for file_result in file_results if isinstance(file_result, Examined)]


def reject(reason_by_path: Mapping[Path, str]) -> None:
    """Raise ValueError if there are files that cannot be shown.

    Args:
        reason_by_path: path of a file -> reason why it cannot be shown.
    """
    reason_texts = [f"{path}: {reason}" for path, reason in reason_by_path.items()]
    if reason_texts:
        # at most five files, so that the message stays one readable line
        omitted_text = f"; and {len(reason_texts) - 5} more files" if len(reason_texts) > 5 else ""
        files_text = "this file" if len(reason_texts) == 1 else "these files"
        raise ValueError(f"{'; '.join(reason_texts[:5])}{omitted_text}. Convert or remove {files_text}.")


def clean(path: Path, expected_hash: str, degradation: str = "", seed: int = 0) -> bytes:
    """Return an asset or the image of a prompt in a form for the browser, which contains no metadata.

    The form is GLB or GSP1, compressed with gzip, for meshes and splats, MP4 for videos, and WebP for images.

    Args:
        path: path of the file.
        expected_hash: hash that the file had when the campaign was planned, see `Examined`.
        degradation: kind of damage that is added, see assets.damage; '' for no damage.
        seed: seed of the damage.

    Raises:
        ChangedError: the file is missing, or has changed since the campaign was planned.
        ValueError: the file cannot be shown.
    """
    # The standard output of the process contains its answers, so the result is written into a file.
    with tempfile.TemporaryDirectory(prefix="eg3d-label-asset-") as folder:
        out_path = Path(folder) / "out"
        request = {
            "do": "clean",
            "path": str(path),
            "hash": expected_hash,
            "degradation": degradation,
            "seed": seed,
            "out": str(out_path),
        }
        (answer,) = _run([request])
        if _REJECTED in answer:
            raise (ChangedError if answer.get("changed") else ValueError)(f"{path.name}: {answer[_REJECTED]}")
        return out_path.read_bytes()


def _run(requests: Sequence[dict], on_progress: Callable[[int], None] = lambda done: None) -> Iterable[dict]:
    """Start a process that runs this module, send requests to it, and return its answers.

    If the process ends early, there are fewer answers than requests, and the last answer states that the
    limits were exceeded.

    Args:
        requests: requests for `_answer`.
        on_progress: function that is called with the number of answers so far, after each answer.
    """
    largest_size = max((_size(Path(request["path"])) for request in requests), default=0)
    # With one thread, numpy needs less address space than with a thread for each processor.
    environment = {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }
    command = [
        sys.executable,
        "-m",
        "eg3d_rlhf.people.label.assets.reading",
        # The process sets this limit of its address space itself.
        str(MEMORY + PER_BYTE * min(largest_size, MAX_BYTES)),
    ]
    answers: list[dict] = []
    with tempfile.TemporaryFile() as request_file:
        # Writing to a pipe would block if the process ended before it has read all requests, so a file is
        # used.
        request_file.write("".join(json.dumps(request) + "\n" for request in requests).encode())
        request_file.seek(0)
        with subprocess.Popen(
            command, stdin=request_file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as process:
            assert process.stdout is not None
            for answer_line in process.stdout:
                answers.append(json.loads(answer_line))
                on_progress(len(answers))
    # Fewer answers: the process was killed, or a parser crashed.
    if len(answers) < len(requests):
        answers.append({_REJECTED: "the file takes more memory or time than allowed. Reduce its size"})
    return answers


def _size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if it cannot be read. Opening it later reports the error."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ---- in the separate process


@contextmanager
def _opened(path: Path):
    """Open a regular file inside the context, and yield a memory-mapped view of its bytes.

    Raises:
        ChangedError: the file cannot be opened.
        ValueError: the path is not a regular file, or the file is empty or too large.
    """
    # O_NOFOLLOW rejects a link, which could have replaced the file. O_NONBLOCK: if a pipe has replaced the
    # file, opening it must not wait for a writer.
    try:
        file_descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ChangedError(f"the file cannot be opened: {error.strerror}. Restore it") from None
    with os.fdopen(file_descriptor, "rb") as file:
        # fstat checks the file that is open. A check of the path could be of another file.
        file_status = os.fstat(file_descriptor)
        if not stat.S_ISREG(file_status.st_mode):
            raise ValueError("the path is a folder, pipe or device. Use a regular file")
        if not 0 < file_status.st_size <= MAX_BYTES:
            raise ValueError(
                f"the file has {file_status.st_size:,} bytes, but must have 1 byte to {MAX_BYTES >> 20} MB"
            )
        # The mapping is not closed, because arrays that refer to it may still be in use. The process ends
        # soon.
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def kind_of(first_bytes: bytes, name: str) -> str:
    """Recognise the kind of a file by its first bytes.

    An OBJ file has no characteristic first bytes, so its name must end in .obj.

    Args:
        first_bytes: first bytes of the file, at most 512.
        name: name of the file.

    Returns:
        Kind, see `Examined`; "ply" also for splats.

    Raises:
        ValueError: the kind is unknown.
    """
    # imported here, because --help must not load PIL
    from training.image_reading import looks_like_image

    if first_bytes[:4] == GLB_MAGIC:
        return "glb"
    if first_bytes[:3] == b"ply" and first_bytes[3:4] in b"\r\n":
        return "ply"
    # Before videos, because AVIF files have 'ftyp' at byte 4, too.
    if looks_like_image(first_bytes):
        return "image"
    # MP4 files have 'ftyp' at byte 4. WebM and Matroska files begin with the identifier of EBML.
    if first_bytes[4:8] == b"ftyp" or first_bytes[:4] == b"\x1a\x45\xdf\xa3":
        return "film"
    # the first bytes of gzip and zip files
    if first_bytes[:2] == b"\x1f\x8b" or first_bytes[:2] == b"PK":
        raise ValueError("the file is compressed with gzip or zip. Unpack it")
    # A text contains no NUL bytes, except in UTF-16.
    if name.lower().endswith(".obj") and (b"\0" not in first_bytes or utf16(first_bytes) is not None):
        return "obj"
    if utf16(first_bytes) is not None:
        raise ValueError("the file is a text in UTF-16. Save it as UTF-8")
    raise ValueError("the format is unknown. Use a GLB, PLY, OBJ, MP4 or WebM file")


def _hash(file_bytes: memoryview, path: Path, file_kind: str, root: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits.

    For an OBJ or PLY file, the names and contents of its companions (materials and textures) are hashed, too.

    Args:
        file_bytes: content of the file.
        path: path of the file.
        file_kind: kind of the file, see `kind_of`.
        root: folder in which companions may lie.
    """
    digest = hashlib.sha256(file_bytes)
    for companion in _companions(file_bytes, path, file_kind, root):
        digest.update(f"\0{companion.name}\0{hashlib.sha256(companion.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def asset_hash(path: Path, root: Path | None = None) -> str:
    """Return the SHA-256 in hex of an asset file with its materials and textures, as `Examined.hash`.

    Args:
        path: path of the file.
        root: folder in which its textures may lie; None: the folder of the file.

    Raises:
        ValueError: the file cannot be opened, or its kind is unknown.
    """
    with _opened(path) as file_bytes:
        return _hash(file_bytes, path, kind_of(bytes(file_bytes[:512]), path.name), root or path.parent)


def read_asset(path: Path, root: Path | None = None) -> Model | ply.Splats:
    """Read a mesh or splats in this process. For the arguments, see `asset_hash`.

    Raises:
        ValueError: the file cannot be read, or is an image or a video.
    """
    with _opened(path) as mapped_bytes:
        # a copy, because the arrays of the result are views of the bytes
        file_bytes = memoryview(bytes(mapped_bytes))
    file_kind = kind_of(bytes(file_bytes[:512]), path.name)
    if file_kind == "ply" and ply.read_header(file_bytes).splats:
        return ply.read_splats(file_bytes)
    if file_kind not in MESH_KINDS:
        raise ValueError("the file is an image or a video. Use a mesh or splats")
    return _read_model(file_bytes, path, file_kind, root or path.parent)


def _companions(file_bytes: memoryview, path: Path, file_kind: str, root: Path) -> list[Path]:
    """Return the files that a file needs, such as textures. For the arguments, see `_hash`."""
    if file_kind == "obj":
        return obj.companion_files(file_bytes, path, root)
    return ply.companion_files(file_bytes, path, root) if file_kind == "ply" else []


def _read_model(file_bytes: memoryview, path: Path, file_kind: str, root: Path) -> Model:
    """Read a mesh with its materials. For the arguments, see `_hash`."""
    if file_kind == "glb":
        return glb.read_glb(file_bytes)
    if file_kind == "ply":
        return ply.read_mesh(file_bytes, path=path, root=root)
    return obj.read_obj(file_bytes, path, root=root)


def _examine(path: Path, root: Path) -> dict:
    """Return the fields of `Examined` for a file.

    All files except videos are read completely, by the functions that `_clean` uses. So a file that is
    accepted here can be shown later.

    Args:
        path: path of the file.
        root: folder in which the textures of the file may lie.

    Raises:
        ValueError: the file cannot be shown.
    """
    with _opened(path) as file_bytes:
        file_kind = kind_of(bytes(file_bytes[:512]), path.name)
        notes: list[Note] = []
        if file_kind == "ply" and ply.read_header(file_bytes).splats:
            file_kind = "splats"
            # The result is not used. The function is called for its errors.
            ply.read_splats(file_bytes)
        elif file_kind in MESH_KINDS:
            notes = _read_model(file_bytes, path, file_kind, root).notes
        elif file_kind == "film":
            examine_video(path)
        elif file_kind == "image":
            preview_image(file_bytes)
        return {
            "kind": file_kind,
            "hash": _hash(file_bytes, path, file_kind, root),
            # shortened, because texts of an untrusted file may be very long
            "note": " ".join(note.text for note in notes[:3])[:400],
            "untextured": any(note.kind == "untextured" for note in notes),
        }


def _clean(path: Path, expected_hash: str, degradation: str, seed: int, out_path: Path) -> dict:
    """Write the clean form of a file to `out_path`, and return an empty answer.

    Args:
        path: path of the file.
        expected_hash: hash that the file must have.
        degradation: kind of damage; '' for no damage.
        seed: seed of the damage.
        out_path: path of the clean form.

    Raises:
        ChangedError: the file has another hash.
        ValueError: the file cannot be shown or damaged.
    """
    with _opened(path) as file_bytes:
        file_kind = kind_of(bytes(file_bytes[:512]), path.name)
        root = _root_of_hash(file_bytes, path, file_kind, expected_hash)
        if file_kind == "image":
            out_path.write_bytes(preview_image(file_bytes))
        elif file_kind == "film":
            if degradation:
                raise ValueError("a video cannot be damaged. Use a mesh or splats")
            clean_video(path, out_path)
        else:
            _pack(file_bytes, path, file_kind, root, degradation, seed, out_path)
    # The hash is checked again, because the file may have changed while it was read: the arrays are views of
    # the file, and ffmpeg has opened it by its name.
    with _opened(path) as file_bytes:
        _root_of_hash(file_bytes, path, file_kind, expected_hash)
    return {}


def _root_of_hash(file_bytes: memoryview, path: Path, file_kind: str, expected_hash: str) -> Path:
    """Return the folder in which the textures of a file may lie, and with which the file has a known hash.

    The plan stores no such folder, but the hash depends on the textures, so the folder is found by it: it is
    the folder of the file or one above it. A texture that the plan does not contain cannot be served, because
    the hash would differ.

    Raises:
        ChangedError: there is no such folder.
    """
    has_companions = file_kind in ("obj", "ply")
    for root in path.parents if has_companions else [path.parent]:
        if _hash(file_bytes, path, file_kind, root) == expected_hash:
            return root
    raise ChangedError("the file has changed since the campaign was planned. Use the original file")


def _pack(
    file_bytes: memoryview,
    path: Path,
    file_kind: str,
    root: Path,
    degradation: str,
    seed: int,
    out_path: Path,
) -> None:
    """Write a mesh as GLB or splats as GSP1, compressed with gzip, and damaged unless `degradation` is ''."""
    if file_kind == "ply" and ply.read_header(file_bytes).splats:
        splats = ply.read_splats(file_bytes)
        file_parts = ply.splat_parts(damage_splats(splats, degradation, seed) if degradation else splats)
    else:
        mesh_model = _read_model(file_bytes, path, file_kind, root)
        file_parts = glb_parts(damage_mesh(mesh_model, degradation, seed) if degradation else mesh_model)
    # The header of gzip contains no name and no time, so that equal files give equal bytes.
    with out_path.open("wb") as out_file, gzip.GzipFile("", "wb", _GZIP, out_file, mtime=0) as gzip_file:
        for file_part in file_parts:
            gzip_file.write(file_part)


def _answer(request: dict) -> dict:
    """Examine or clean the file of one request, and return the answer as JSON values.

    Args:
        request: {"do": "examine", "path", "root"}, or {"do": "clean", "path", "hash", "degradation", "seed",
            "out"}.

    Returns:
        Result of `_examine` or `_clean`. If the file cannot be used, {_REJECTED: reason}, with "changed":
        True for a `ChangedError`.
    """
    path = Path(request["path"])
    try:
        if request["do"] == "examine":
            return _examine(path, Path(request.get("root") or path.parent))
        return _clean(path, request["hash"], request["degradation"], request["seed"], Path(request["out"]))
    except ChangedError as error:
        return {_REJECTED: str(error), "changed": True}
    except (ValueError, OSError, MemoryError) as error:
        # mmap raises an OSError with ENOMEM if there is not enough memory
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
            return {_REJECTED: "the file takes more memory than allowed. Reduce its size"}
        return {_REJECTED: str(error) or type(error).__name__}


# ---- turntable videos

MAX_VIDEO = 256 << 20  # largest size of a video in bytes
MAX_SECONDS = 120  # largest length of a video in seconds
MAX_SIDE = 4096  # largest width and height of a video in pixels
_ENCODING_SECONDS = 300  # largest time for one run of ffmpeg, in seconds
# ffmpeg's description of a video track, with the groups codec, pixel format, width and height
_TRACK = re.compile(
    r"Stream #0:\d+.*?: Video: (\w+)[^,]*(?:\([^)]*\))?.*?, (\w+)(?:\([^)]*\))?.*?, (\d+)x(\d+)"
)
_LENGTH = re.compile(r"Duration: (\d+):(\d\d):(\d\d)")
# The input may be malicious. ffmpeg may read this file only, in these containers, with at most 2^25 pixels.
_INPUT = (
    "-nostdin",
    "-hide_banner",
    "-protocol_whitelist",
    "file",
    "-format_whitelist",
    "mov,matroska",
    "-max_pixels",
    "33554432",
)
# The output contains one video track and no sound, subtitles, metadata, chapters or time codes. The index is
# at the start of the file, so that the browser can start to play before it has loaded the entire file.
_OUTPUT = (
    "-map",
    "0:v:0",
    "-an",
    "-sn",
    "-dn",
    "-map_metadata",
    "-1",
    "-map_chapters",
    "-1",
    "-fflags",
    "+bitexact",
    "-flags:v",
    "+bitexact",
    "-write_tmcd",
    "0",
    "-movflags",
    "+faststart",
    "-threads",
    "1",
    "-fs",
    str(MAX_VIDEO),
    "-f",
    "mp4",
)
# Filter that removes SEI units (type 6) of H.264, in which encoders store their name, version and options.
_H264_BARE = ("-bsf:v", "filter_units=remove_types=6")
# Options for encoding as H.264. The format needs an even width and height, so a row or column is added.
_ENCODED = (
    "-c:v",
    "libx264",
    "-crf",
    "14",
    "-preset",
    "fast",
    "-pix_fmt",
    "yuv420p",
    "-vf",
    "pad=ceil(iw/2)*2:ceil(ih/2)*2",
)


def examine_video(path: Path) -> tuple[str, str]:
    """Return the codec and the pixel format of a video.

    Raises:
        ValueError: the file contains no readable video track, or the video is too large or too long.
    """
    if path.stat().st_size > MAX_VIDEO:
        raise ValueError(
            f"the video has {path.stat().st_size >> 20} MB, but at most {MAX_VIDEO >> 20} MB are allowed."
            " Shorten it"
        )
    # Without an output file, ffmpeg prints a description of the input and exits with an error, which is
    # ignored.
    _exit_code, ffmpeg_description = _ffmpeg([*_INPUT, "-i", f"file:{path}"], 30)
    track_match = _TRACK.search(ffmpeg_description)
    duration_match = _LENGTH.search(ffmpeg_description)
    if track_match is None:
        raise ValueError("the file contains no video track that can be read. Convert it to MP4")
    codec = track_match.group(1)
    pixel_format = track_match.group(2)
    width = int(track_match.group(3))
    height = int(track_match.group(4))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(
            f"the video has {width} x {height} pixels, but at most {MAX_SIDE} x {MAX_SIDE} are allowed."
            " Reduce its size"
        )
    if duration_match:
        hours, minutes, seconds = (int(number_text) for number_text in duration_match.groups())
        if hours * 3600 + minutes * 60 + seconds > MAX_SECONDS:
            raise ValueError(
                f"the video lasts {':'.join(duration_match.groups())}, but at most {MAX_SECONDS} s are"
                " allowed. Shorten it"
            )
    return codec, pixel_format


def clean_video(path: Path, out_path: Path) -> None:
    """Write the clean form of a video: an MP4 file with one H.264 or VP9 track and no other content.

    A track that browsers can play is copied, without the user data of its encoder. Another track is encoded
    again as H.264. ffmpeg may open only this file, in the allowed containers, for a limited time.

    Args:
        path: path of the video.
        out_path: path of the MP4 file.

    Raises:
        ValueError: the video cannot be read or converted.
    """
    codec, pixel_format = examine_video(path)
    encoding_options: tuple[str, ...] = _ENCODED  # a track is encoded again unless browsers can play it
    if codec == "h264" and pixel_format in ("yuv420p", "yuvj420p"):
        encoding_options = ("-c:v", "copy", *_H264_BARE)
    elif codec == "vp9" and pixel_format == "yuv420p":
        encoding_options = ("-c:v", "copy")
    exit_code, ffmpeg_messages = _ffmpeg(
        [
            *_INPUT,
            "-i",
            f"file:{path}",
            "-t",
            str(MAX_SECONDS),
            *encoding_options,
            *_OUTPUT,
            "-y",
            f"file:{out_path}",
        ],
        _ENCODING_SECONDS,
    )
    # x264 writes its name and options into the track. A second run of ffmpeg removes them.
    if not exit_code and encoding_options is _ENCODED and out_path.is_file():
        encoded_path = out_path.rename(out_path.with_name("encoded.mp4"))
        exit_code, ffmpeg_messages = _ffmpeg(
            [
                *_INPUT,
                "-i",
                f"file:{encoded_path}",
                "-c:v",
                "copy",
                *_H264_BARE,
                *_OUTPUT,
                "-y",
                f"file:{out_path}",
            ],
            _ENCODING_SECONDS,
        )
        encoded_path.unlink()
    # The option -fs stops at the limit without an error, so a file of this size is incomplete. A file of less
    # than 100 bytes contains no video.
    if (
        exit_code
        or not out_path.is_file()
        or out_path.stat().st_size < 100
        or out_path.stat().st_size >= MAX_VIDEO
    ):
        reason = (
            ffmpeg_messages.strip().splitlines()[-1][:120]
            if ffmpeg_messages.strip()
            else "ffmpeg gave no reason"
        )
        raise ValueError(f"the video cannot be converted: {reason}")


def _ffmpeg(arguments: list[str], max_seconds: float) -> tuple[int, str]:
    """Run ffmpeg, and return its exit code and the end of its messages.

    Args:
        arguments: command-line arguments of ffmpeg, without the name of the program.
        max_seconds: time limit in seconds.

    Raises:
        ValueError: ffmpeg takes more time.
    """
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), *arguments]
    try:
        completed_process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=max_seconds,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the video takes more than {max_seconds:g} s to convert. Shorten it, or reduce its resolution"
        ) from None
    return completed_process.returncode, completed_process.stderr[-20_000:].decode("utf-8", "replace")


if __name__ == "__main__":
    # The arguments are the limits of memory, of processor time, and of the size of written files.
    serve_requests(_answer, int(sys.argv[1]), SECONDS, 2 * MAX_BYTES)
