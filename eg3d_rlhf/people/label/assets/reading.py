"""From an asset's file to what the browser gets, in a process of its own with limits on memory and time.

The file is told apart by its content, whatever it is called. `examine` looks at files before a campaign is
planned, and refuses the unfit; `clean` makes one's clean form when its turn comes, and refuses a file that is
no longer the one that was planned. Both start this module as a process, so that whatever a hostile file makes
of a parser, it ends there.

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
MAX_BYTES = 512 << 20
# address space of the process: so much, and so many times the file's size
MEMORY = 1 << 30
PER_BYTE = 12
SECONDS = 600  # of processor time
_GZIP = 1  # textures do not shrink, and higher levels take three times as long for a few percent of geometry
_ROOT = Path(__file__).resolve().parents[4]
_REFUSED = "refused"


class ChangedError(ValueError):
    """A file is not what it was when the campaign was planned, or it is gone: no fault of the asset's."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a file that is fit to be shown."""

    kind: str  # 'glb', 'ply', 'splats', 'obj', 'film' or 'picture'
    hash: str  # SHA-256 hex of the file; of an OBJ with companions, of all of them
    note: str = ""  # what is shown otherwise than the file says


def looked_at(paths: Sequence[Path], tell: Callable[[int], None] = lambda done: None) -> list[Examined | str]:
    """What each of the files is, or why it cannot be shown; `tell` hears how many were looked at."""
    seen: list[Examined | str] = []
    while len(seen) < len(paths):  # a file that ends the process costs a new one
        before = len(seen)
        requests = [{"do": "examine", "path": str(path)} for path in paths[before:]]
        for answer in _run(requests, lambda n: tell(before + n)):  # noqa: B023 (called within this turn)
            seen.append(answer[_REFUSED] if _REFUSED in answer else Examined(**answer))
    return seen


def examine(paths: Sequence[Path], tell: Callable[[int], None] = lambda done: None) -> list[Examined]:
    """What the files are; `tell` hears how many were looked at.

    Raises: ValueError naming those that cannot be shown.
    """
    seen = looked_at(paths, tell)
    refuse({path: why for path, why in zip(paths, seen, strict=True) if isinstance(why, str)})
    return [known for known in seen if isinstance(known, Examined)]


def refuse(unfit: Mapping[Path, str]) -> None:
    """Raise ValueError for files that cannot be shown, if there are any. Args: unfit: with the reasons."""
    wrong = [f"{path}: {why}" for path, why in unfit.items()]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{'; '.join(wrong[:5])}{more}. Mend or remove {'it' if len(wrong) == 1 else 'them'}."
        )


def clean(path: Path, expected: str, degradation: str = "", seed: int = 0) -> bytes:
    """The clean form of an asset, or of a prompt's picture: gzip of a GLB or of GSP1, an MP4, or WebP."""
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
        if _REFUSED in answer:
            raise (ChangedError if answer.get("changed") else ValueError)(f"{path.name}: {answer[_REFUSED]}")
        return out.read_bytes()


def _run(requests: Sequence[dict], tell: Callable[[int], None] = lambda done: None) -> Iterable[dict]:
    """Answers to requests from one process; fewer where it died, the last one saying so."""
    largest = max((_size(Path(request["path"])) for request in requests), default=0)
    environment = {
        **os.environ,
        "PYTHONPATH": str(_ROOT),
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }
    command = [
        sys.executable,
        "-m",
        "eg3d_rlhf.people.label.assets.reading",
        str(MEMORY + PER_BYTE * min(largest, MAX_BYTES)),
    ]
    answers: list[dict] = []
    with tempfile.TemporaryFile() as asked:
        asked.write("".join(json.dumps(request) + "\n" for request in requests).encode())
        asked.seek(0)
        with subprocess.Popen(
            command, stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                answers.append(json.loads(line))
                tell(len(answers))
    if len(answers) < len(requests):
        answers.append(
            {
                _REFUSED: (
                    "expected an asset that can be read with bounded memory and time, got one that takes more"
                )
            }
        )
    return answers


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# ---- in the process


@contextmanager
def _opened(path: Path):
    """A regular file's bytes, mapped: a view of them."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ChangedError(f"expected a file, got: {error.strerror}") from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("expected a file, got something else")
        if not 0 < status.st_size <= MAX_BYTES:
            raise ValueError(
                f"expected a file of 1 byte to {MAX_BYTES >> 20} MB, got {status.st_size:,} bytes"
            )
        # arrays may outlive this; the process does not
        yield memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def kind_of(head: bytes, name: str) -> str:
    """What a file is by its first bytes; of an OBJ, which has no mark, also by its name.

    Raises: ValueError.
    """
    if head[:4] == GLB_MAGIC:
        return "glb"
    if head[:3] == b"ply" and head[3:4] in b"\r\n":
        return "ply"
    # Whether a file begins as MP4, WebM or Matroska do
    if head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3":
        return "film"
    if kind_of_picture(head):
        return "picture"
    if head[:2] == b"\x1f\x8b" or head[:2] == b"PK":
        raise ValueError("expected an asset, got a compressed file; unpack it")
    if name.lower().endswith(".obj") and (b"\0" not in head or obj.utf16(head) is not None):
        return "obj"
    if obj.utf16(head) is not None:
        raise ValueError("expected an asset, got text in UTF-16; save it as UTF-8")
    raise ValueError("expected GLB, PLY, OBJ, MP4 or WebM by content, got something else")


def _hash(data: memoryview, path: Path, kind: str) -> str:
    digest = hashlib.sha256(data)
    for companion in obj.companions(data, path) if kind == "obj" else ():
        digest.update(f"\0{companion.name}\0{hashlib.sha256(companion.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()


def _examine(path: Path) -> dict:
    """Kind and hash; all but videos is read as `_clean` will,
    so that what is accepted here is shown there.
    """
    with _opened(path) as data:
        kind = kind_of(bytes(data[:512]), path.name)
        note = ""
        if kind == "glb":
            glb.read_glb(data)
        elif kind == "ply":
            header = ply.read_header(data)
            kind = "splats" if header.splats else kind
            (ply.read_splats if header.splats else ply.read_mesh)(data)
        elif kind == "obj":
            obj.read_obj(data, path)
            missing = obj.missing_libraries(data, path)
            note = f"without {', '.join(missing)[:200]}, which it names: shown in grey" if missing else ""
        elif kind == "film":
            examine_film(path)
        elif kind == "picture":
            stripped(data)
        return {"kind": kind, "hash": _hash(data, path, kind), "note": note}


def _clean(path: Path, expected: str, degradation: str, seed: int, out: Path) -> dict:
    with _opened(path) as data:
        kind = kind_of(bytes(data[:512]), path.name)
        _check_hash(data, path, kind, expected)
        if kind == "picture":
            out.write_bytes(small(data))
        elif kind == "film":
            if degradation:
                raise ValueError("expected a mesh or splats to damage, got a video")
            clean_film(path, out)
        else:
            _pack(data, path, kind, degradation, seed, out)
    # nor while it was read: arrays are views of the file, and ffmpeg opens it by itself
    with _opened(path) as data:
        _check_hash(data, path, kind, expected)
    return {}


def _check_hash(data: memoryview, path: Path, kind: str, expected: str) -> None:
    if _hash(data, path, kind) != expected:
        raise ChangedError(
            "expected the file that the campaign was planned with, got a changed one; restore it"
        )


def _pack(data: memoryview, path: Path, kind: str, degradation: str, seed: int, out: Path) -> None:
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
    with out.open("wb") as file, gzip.GzipFile("", "wb", _GZIP, file, mtime=0) as packed:
        for part in parts:
            packed.write(part)


def _answer(request: dict) -> dict:
    path = Path(request["path"])
    try:
        if request["do"] == "examine":
            return _examine(path)
        return _clean(path, request["hash"], request["degradation"], request["seed"], Path(request["out"]))
    except ChangedError as error:
        return {_REFUSED: str(error), "changed": True}
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
            return {
                _REFUSED: "expected an asset that can be read with bounded memory, got one that takes more"
            }
        return {_REFUSED: str(error) or type(error).__name__}


# ---- turntable videos

MAX_FILM = 256 << 20
MAX_SECONDS = 120
MAX_SIDE = 4096
_PATIENCE = 300  # seconds of encoding
_TRACK = re.compile(
    r"Stream #0:\d+.*?: Video: (\w+)[^,]*(?:\([^)]*\))?.*?, (\w+)(?:\([^)]*\))?.*?, (\d+)x(\d+)"
)
_LENGTH = re.compile(r"Duration: (\d+):(\d\d):(\d\d)")
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
    str(MAX_FILM),
    "-f",
    "mp4",
)
_H264_BARE = ("-bsf:v", "filter_units=remove_types=6")  # user data of encoders: names, versions, options
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


def examine_film(path: Path) -> tuple[str, str]:
    """Codec and pixel format of a film. Raises: ValueError for what is none, or is too large."""
    if path.stat().st_size > MAX_FILM:
        raise ValueError(f"expected a video of up to {MAX_FILM >> 20} MB, got {path.stat().st_size >> 20} MB")
    text = _ffmpeg([*_INPUT, "-i", f"file:{path}"], 30)[1]
    track = _TRACK.search(text)
    length = _LENGTH.search(text)
    if track is None:
        raise ValueError("expected a video, got a file without a track that can be read")
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


def clean_film(path: Path, out: Path) -> None:
    """Write a film's clean form: an MP4 of one H.264 or VP9 track and nothing else.

    Tracks that browsers play are copied, without what encoders write into them about themselves; others are
    encoded anew. ffmpeg may open this one file, in four containers, for a limited time. Raises: ValueError.
    """
    codec, pixels = examine_film(path)
    how: tuple[str, ...] = _ENCODED
    if codec == "h264" and pixels in ("yuv420p", "yuvj420p"):
        how = ("-c:v", "copy", *_H264_BARE)
    elif codec == "vp9" and pixels == "yuv420p":
        how = ("-c:v", "copy")
    code, text = _ffmpeg(
        [*_INPUT, "-i", f"file:{path}", "-t", str(MAX_SECONDS), *how, *_OUTPUT, "-y", f"file:{out}"],
        _PATIENCE,
    )
    if not code and how is _ENCODED and out.is_file():  # without our encoder's name, as those that are copied
        encoded = out.rename(out.with_name("encoded.mp4"))
        code, text = _ffmpeg(
            [*_INPUT, "-i", f"file:{encoded}", "-c:v", "copy", *_H264_BARE, *_OUTPUT, "-y", f"file:{out}"],
            _PATIENCE,
        )
        encoded.unlink()
    if code or not out.is_file() or out.stat().st_size < 100 or out.stat().st_size >= MAX_FILM:
        raise ValueError(
            "expected a video that can be read, got:"
            f" {text.strip().splitlines()[-1][:120] if text.strip() else 'nothing'}"
        )


def _ffmpeg(arguments: list[str], seconds: float) -> tuple[int, str]:
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
            f"expected a video that is ready within {seconds:g} s, got one that takes longer"
        ) from None
    return done.returncode, done.stderr[-20_000:].decode("utf-8", "replace")


if __name__ == "__main__":
    serve_requests(_answer, int(sys.argv[1]), SECONDS, 2 * MAX_BYTES)
