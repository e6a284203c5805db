"""Converts an asset's file to what the browser gets, in a separate process with limits on memory and time.

A file is recognised by its content, not by its name. `examine` checks files before a campaign is planned and
rejects those that cannot be shown. `clean` makes the clean form of a file when the shape is prepared, and
rejects a file that has changed since it was planned. Both start this module as a process. If a hostile file
makes a parser crash or use too much memory, only that process ends.

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
from eg3d_rlhf.geometry.files.model import GLB_MAGIC, glb_parts, kind_of_picture, small, stripped
from eg3d_rlhf.people.label.assets.damage import damage_mesh, damage_splats

SUFFIXES = (".glb", ".ply", ".obj", ".mp4", ".m4v", ".mov", ".webm")
MAX_BYTES = 512 << 20  # of a file
# Limit of the process's address space: a constant, and a multiple of the largest file's size.
MEMORY = 1 << 30
PER_BYTE = 12
SECONDS = 600  # limit of processor time for one request
# level 1: compressed textures do not shrink further, and higher levels take three times as long for a few
# percent of the geometry
_GZIP = 1
_ROOT = Path(__file__).resolve().parents[4]  # the process imports the package from here
_REJECTED = "rejected"  # field of an answer with the reason


class ChangedError(ValueError):
    """Error of a file that has changed since the campaign was planned, or is missing."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """Result of examining a file that can be shown."""

    # 'film' is a video. Study designs of version 0.1 contain this name.
    kind: str  # 'glb', 'ply', 'splats', 'obj', 'film' or 'image'
    hash: str  # SHA-256 in hex of the file; for an OBJ, also of its materials and textures
    note: str = ""  # how the page's view differs from the file; '' if it does not


def looked_at(
    paths: Sequence[Path], report: Callable[[int], None] = lambda done: None
) -> list[Examined | str]:
    """Examine files. Returns, for each of them, the result or the reason why it cannot be shown.

    Args:
        paths: of the files.
        report: called with the number of examined files.
    """
    results: list[Examined | str] = []
    while len(results) < len(paths):  # a file that ended the process is followed by a new process
        before = len(results)
        requests = [{"do": "examine", "path": str(path)} for path in paths[before:]]
        for answer in _run(requests, lambda n: report(before + n)):  # noqa: B023 (called in this iteration)
            results.append(answer[_REJECTED] if _REJECTED in answer else Examined(**answer))
    return results


def examine(paths: Sequence[Path], report: Callable[[int], None] = lambda done: None) -> list[Examined]:
    """Examine files. `report` is called with the number of examined files.

    Raises: ValueError with the names of those that cannot be shown.
    """
    results = looked_at(paths, report)
    reject({path: reason for path, reason in zip(paths, results, strict=True) if isinstance(reason, str)})
    return [result for result in results if isinstance(result, Examined)]


def reject(unfit: Mapping[Path, str]) -> None:
    """Raise ValueError for files that cannot be shown, if there are any.

    Args:
        unfit: file -> reason.
    """
    wrong = [f"{path}: {reason}" for path, reason in unfit.items()]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{'; '.join(wrong[:5])}{more}. Correct or remove {'it' if len(wrong) == 1 else 'them'}."
        )


def clean(path: Path, expected: str, degradation: str = "", seed: int = 0) -> bytes:
    """Return the clean form of an asset or of a prompt's image: GLB or GSP1 with gzip, MP4, or WebP.

    Args:
        path: of the file.
        expected: its hash when the campaign was planned.
        degradation: damage to be added, see assets.damage; '' for none.
        seed: of the damage.

    Raises: ChangedError for another hash or a missing file, ValueError if it cannot be shown.
    """
    # The process writes its result to a file, because its output is the protocol.
    with tempfile.TemporaryDirectory(prefix="eg3d-label-asset-") as folder:
        out = Path(folder) / "out"
        request = {
            "do": "clean",
            "path": str(path),
            "hash": expected,
            "degradation": degradation,
            "seed": seed,
            "out": str(out),
        }
        (answer,) = _run([request])
        if _REJECTED in answer:
            raise (ChangedError if answer.get("changed") else ValueError)(f"{path.name}: {answer[_REJECTED]}")
        return out.read_bytes()


def _run(requests: Sequence[dict], report: Callable[[int], None] = lambda done: None) -> Iterable[dict]:
    """Send requests to one process and return its answers. If the process ends early, there are fewer
    answers, and the last one says that the limits were exceeded.
    """
    largest = max((_size(Path(request["path"])) for request in requests), default=0)
    # Libraries start one thread per core otherwise, and each thread needs address space.
    environment = {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }
    command = [
        sys.executable,
        "-m",
        "eg3d_rlhf.people.label.assets.reading",
        # The limit of the address space is an argument, because the process sets it for itself.
        str(MEMORY + PER_BYTE * min(largest, MAX_BYTES)),
    ]
    answers: list[dict] = []
    with tempfile.TemporaryFile() as request_file:
        # A file and not a pipe: a pipe would block when the process ends before it has read everything.
        request_file.write("".join(json.dumps(request) + "\n" for request in requests).encode())
        request_file.seek(0)
        with subprocess.Popen(
            command, stdin=request_file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                answers.append(json.loads(line))
                report(len(answers))
    # The process has ended before its last answer: it was killed, or a parser crashed.
    if len(answers) < len(requests):
        answers.append({_REJECTED: ("the file takes more memory or time than allowed. Reduce it")})
    return answers


def _size(path: Path) -> int:
    """Return the size of a file, 0 if there is none: opening it will report that."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ---- in the separate process


@contextmanager
def _opened(path: Path):
    """Open a regular file and yield a memory-mapped view of its bytes. Raises: ChangedError, ValueError."""
    # O_NOFOLLOW: a link could have replaced the file. O_NONBLOCK: opening a pipe must not wait for a writer.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ChangedError(f"the file cannot be opened: {error.strerror}. Restore it") from None
    with os.fdopen(handle, "rb") as file:
        # fstat of the open file, so that it cannot be exchanged between check and use.
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("expected a regular file, got a folder, pipe or device")
        if not 0 < status.st_size <= MAX_BYTES:
            raise ValueError(
                f"expected a file of 1 byte to {MAX_BYTES >> 20} MB, got {status.st_size:,} bytes"
            )
        # Not closed here: arrays that refer to it may still be in use. The process ends soon.
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def kind_of(head: bytes, name: str) -> str:
    """Recognise a file by its first bytes. An OBJ file has no mark, so its name decides, too.

    Raises: ValueError for an unknown kind.
    """
    if head[:4] == GLB_MAGIC:
        return "glb"
    if head[:3] == b"ply" and head[3:4] in b"\r\n":
        return "ply"
    # The first bytes of MP4 files, and of WebM and Matroska files.
    if head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3":
        return "film"
    if kind_of_picture(head):
        return "image"
    if head[:2] == b"\x1f\x8b" or head[:2] == b"PK":
        raise ValueError("expected an asset, got a compressed file. Unpack it")
    if name.lower().endswith(".obj") and (b"\0" not in head or obj.utf16(head) is not None):
        return "obj"
    if obj.utf16(head) is not None:
        raise ValueError("expected an asset, got text in UTF-16. Save it as UTF-8")
    raise ValueError("expected the content of a GLB, PLY, OBJ, MP4 or WebM file, got something else")


def _hash(data: memoryview, path: Path, kind: str) -> str:
    """Return the SHA-256 in hex of a file. For an OBJ it covers the names and contents of its companions,
    too.
    """
    digest = hashlib.sha256(data)
    for companion in obj.companions(data, path) if kind == "obj" else ():
        digest.update(f"\0{companion.name}\0{hashlib.sha256(companion.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _examine(path: Path) -> dict:
    """Return kind, hash and note of a file. Everything but videos is read in the same way as by `_clean`, so
    a file that is accepted here can be shown later.
    """
    with _opened(path) as data:
        kind = kind_of(bytes(data[:512]), path.name)
        note = ""
        if kind == "glb":
            glb.read_glb(data)
        elif kind == "ply":
            header = ply.read_header(data)
            kind = "splats" if header.splats else kind
            # The result is dropped: only errors matter here.
            (ply.read_splats if header.splats else ply.read_mesh)(data)
        elif kind == "obj":
            obj.read_obj(data, path)
            missing = obj.missing_libraries(data, path)
            if missing:
                note = f"shown in grey, because {', '.join(missing)[:200]} cannot be read"
        elif kind == "film":
            examine_video(path)
        elif kind == "image":
            stripped(data)
        return {"kind": kind, "hash": _hash(data, path, kind), "note": note}


def _clean(path: Path, expected: str, degradation: str, seed: int, out: Path) -> dict:
    """Write the clean form of a file to `out`. Raises: ChangedError if the file is not the expected one."""
    with _opened(path) as data:
        kind = kind_of(bytes(data[:512]), path.name)
        _check_hash(data, path, kind, expected)
        if kind == "image":
            out.write_bytes(small(data))
        elif kind == "film":
            if degradation:
                raise ValueError("only meshes and splats can be damaged, got a video")
            clean_video(path, out)
        else:
            _pack(data, path, kind, degradation, seed, out)
    # Checked again, because the file may have changed while it was read: the arrays are views of it, and
    # ffmpeg has opened it by its name.
    with _opened(path) as data:
        _check_hash(data, path, kind, expected)
    return {}


def _check_hash(data: memoryview, path: Path, kind: str, expected: str) -> None:
    """Raise ChangedError if the file is not the one that the campaign was planned with."""
    if _hash(data, path, kind) != expected:
        raise ChangedError("the file has changed since the campaign was planned. Use the original file")


def _pack(data: memoryview, path: Path, kind: str, degradation: str, seed: int, out: Path) -> None:
    """Write a mesh or splats as GLB or GSP1 with gzip, damaged if `degradation` is not empty."""
    if kind == "ply" and ply.read_header(data).splats:
        splats = ply.read_splats(data)
        parts = ply.splat_parts(damage_splats(splats, degradation, seed) if degradation else splats)
    else:
        model = (
            glb.read_glb(data)
            if kind == "glb"
            else ply.read_mesh(data)
            if kind == "ply"
            else obj.read_obj(data, path)
        )
        parts = glb_parts(damage_mesh(model, degradation, seed) if degradation else model)
    # Without a name and a time in the header, equal files give equal bytes.
    with out.open("wb") as file, gzip.GzipFile("", "wb", _GZIP, file, mtime=0) as packed:
        for part in parts:
            packed.write(part)


def _answer(request: dict) -> dict:
    """Answer one request; errors of the file become answers."""
    path = Path(request["path"])
    try:
        if request["do"] == "examine":
            return _examine(path)
        return _clean(path, request["hash"], request["degradation"], request["seed"], Path(request["out"]))
    except ChangedError as error:
        return {_REJECTED: str(error), "changed": True}
    except (ValueError, OSError, MemoryError) as error:
        # Mapping a file reports a lack of memory as an OSError.
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
            return {_REJECTED: "the file takes more memory than allowed. Reduce it"}
        return {_REJECTED: str(error) or type(error).__name__}


# ---- turntable videos

MAX_VIDEO = 256 << 20  # bytes
MAX_SECONDS = 120  # length
MAX_SIDE = 4096  # pixels
_PATIENCE = 300  # limit of the encoding time in seconds
# ffmpeg's description of a video track: codec, pixel format, width, height.
_TRACK = re.compile(
    r"Stream #0:\d+.*?: Video: (\w+)[^,]*(?:\([^)]*\))?.*?, (\w+)(?:\([^)]*\))?.*?, (\d+)x(\d+)"
)
_LENGTH = re.compile(r"Duration: (\d+):(\d\d):(\d\d)")
# Hostile input: ffmpeg may read this one file only, in these containers, with a bounded number of pixels.
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
# The output contains one video track and no sound, subtitles, metadata, chapters or time codes. The index
# comes first, so that the browser can start before it has loaded everything.
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
# removes SEI units (type 6), into which encoders write names, versions and options
_H264_BARE = ("-bsf:v", "filter_units=remove_types=6")
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
    """Return codec and pixel format of a video. Raises: ValueError for another file, or one that is too
    large.
    """
    if path.stat().st_size > MAX_VIDEO:
        raise ValueError(
            f"expected a video of up to {MAX_VIDEO >> 20} MB, got {path.stat().st_size >> 20} MB. Shorten it"
        )
    text = _ffmpeg([*_INPUT, "-i", f"file:{path}"], 30)[1]
    track = _TRACK.search(text)
    length = _LENGTH.search(text)
    if track is None:
        raise ValueError("expected a video, got a file without a readable video track")
    codec = track.group(1)
    pixels = track.group(2)
    width = int(track.group(3))
    height = int(track.group(4))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"expected a video of up to {MAX_SIDE} pixels a side, got {width} x {height}")
    if (
        length
        and int(length.group(1)) * 3600 + int(length.group(2)) * 60 + int(length.group(3)) > MAX_SECONDS
    ):
        raise ValueError(f"expected a video of up to {MAX_SECONDS} s, got {':'.join(length.groups())}")
    return codec, pixels


def clean_video(path: Path, out: Path) -> None:
    """Write the clean form of a video: an MP4 of one H.264 or VP9 track and nothing else.

    Tracks that browsers can play are copied without the encoder's user data. Others are encoded again. ffmpeg
    may open this one file, in the allowed containers, for a limited time.

    Raises: ValueError if the video cannot be read.
    """
    codec, pixels = examine_video(path)
    # By default the track is encoded again.
    encoding: tuple[str, ...] = _ENCODED
    if codec == "h264" and pixels in ("yuv420p", "yuvj420p"):
        encoding = ("-c:v", "copy", *_H264_BARE)
    elif codec == "vp9" and pixels == "yuv420p":
        encoding = ("-c:v", "copy")
    code, text = _ffmpeg(
        [*_INPUT, "-i", f"file:{path}", "-t", str(MAX_SECONDS), *encoding, *_OUTPUT, "-y", f"file:{out}"],
        _PATIENCE,
    )
    # A second pass removes the name of our encoder, which x264 writes into the track.
    if not code and encoding is _ENCODED and out.is_file():
        encoded = out.rename(out.with_name("encoded.mp4"))
        code, text = _ffmpeg(
            [*_INPUT, "-i", f"file:{encoded}", "-c:v", "copy", *_H264_BARE, *_OUTPUT, "-y", f"file:{out}"],
            _PATIENCE,
        )
        encoded.unlink()
    # -fs stops at the limit without an error, so a file of that size is incomplete.
    if code or not out.is_file() or out.stat().st_size < 100 or out.stat().st_size >= MAX_VIDEO:
        reason = text.strip().splitlines()[-1][:120] if text.strip() else "ffmpeg gave no reason"
        raise ValueError(f"the video cannot be converted: {reason}")


def _ffmpeg(arguments: list[str], seconds: float) -> tuple[int, str]:
    """Run ffmpeg. Returns its exit code and the end of its messages. Raises: ValueError after `seconds`."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the video takes more than {seconds:g} s to convert. Shorten it, or reduce its resolution"
        ) from None
    return done.returncode, done.stderr[-20_000:].decode("utf-8", "replace")


if __name__ == "__main__":
    # The last limit is that of written files.
    serve_requests(_answer, int(sys.argv[1]), SECONDS, 2 * MAX_BYTES)
