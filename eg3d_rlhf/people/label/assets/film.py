"""Turntable videos: whatever ffmpeg makes of a file becomes an MP4 of one H.264 or VP9 track and nothing else.

Tracks that browsers play are copied, without what encoders write into them about themselves; others are encoded anew. ffmpeg may open this
one file, in four containers, for a limited time.
"""

import re
import subprocess
from pathlib import Path

MAX_BYTES, MAX_SECONDS, MAX_SIDE = 256 << 20, 120, 4096
_PATIENCE = 300  # seconds of encoding
_TRACK = re.compile(r"Stream #0:\d+.*?: Video: (\w+)[^,]*(?:\([^)]*\))?.*?, (\w+)(?:\([^)]*\))?.*?, (\d+)x(\d+)")
_LENGTH = re.compile(r"Duration: (\d+):(\d\d):(\d\d)")
_INPUT = ("-nostdin", "-hide_banner", "-protocol_whitelist", "file", "-format_whitelist", "mov,matroska", "-max_pixels", "33554432")
_OUTPUT = (
    "-map", "0:v:0", "-an", "-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact",
    "-write_tmcd", "0", "-movflags", "+faststart", "-threads", "1", "-fs", str(MAX_BYTES), "-f", "mp4",
)  # fmt: skip
_H264_BARE = ("-bsf:v", "filter_units=remove_types=6")  # user data of encoders: names, versions, options
_ENCODED = ("-c:v", "libx264", "-crf", "14", "-preset", "fast", "-pix_fmt", "yuv420p", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2")


def is_film(head: bytes) -> bool:
    """Whether a file begins as MP4, WebM or Matroska do."""
    return head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3"


def examine(path: Path) -> tuple[str, str]:
    """Codec and pixel format of a film. Raises: ValueError for what is none, or is too large."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"expected a video of up to {MAX_BYTES >> 20} MB, got {path.stat().st_size >> 20} MB")
    text = _ffmpeg([*_INPUT, "-i", f"file:{path}"], 30)[1]
    track, length = _TRACK.search(text), _LENGTH.search(text)
    if track is None:
        raise ValueError("expected a video, got a file without a track that can be read")
    codec, pixels, width, height = track.group(1), track.group(2), int(track.group(3)), int(track.group(4))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"expected a video of up to {MAX_SIDE} pixels a side, got {width} x {height}")
    if length and int(length.group(1)) * 3600 + int(length.group(2)) * 60 + int(length.group(3)) > MAX_SECONDS:
        raise ValueError(f"expected a video of up to {MAX_SECONDS} s, got {':'.join(length.groups())}")
    return codec, pixels


def clean(path: Path, out: Path) -> None:
    """Write a film's clean form. Raises: ValueError."""
    codec, pixels = examine(path)
    how: tuple[str, ...] = _ENCODED
    if codec == "h264" and pixels in ("yuv420p", "yuvj420p"):
        how = ("-c:v", "copy", *_H264_BARE)
    elif codec == "vp9" and pixels == "yuv420p":
        how = ("-c:v", "copy")
    code, text = _ffmpeg([*_INPUT, "-i", f"file:{path}", "-t", str(MAX_SECONDS), *how, *_OUTPUT, "-y", f"file:{out}"], _PATIENCE)
    if not code and how is _ENCODED and out.is_file():  # without our encoder's name, as those that are copied
        encoded = out.rename(out.with_name("encoded.mp4"))
        code, text = _ffmpeg([*_INPUT, "-i", f"file:{encoded}", "-c:v", "copy", *_H264_BARE, *_OUTPUT, "-y", f"file:{out}"], _PATIENCE)
        encoded.unlink()
    if code or not out.is_file() or out.stat().st_size < 100 or out.stat().st_size >= MAX_BYTES:
        raise ValueError(f"expected a video that can be read, got: {text.strip().splitlines()[-1][:120] if text.strip() else 'nothing'}")


def _ffmpeg(arguments: list[str], seconds: float) -> tuple[int, str]:
    """Exit code and what it says."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), *arguments]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f"expected a video that is ready within {seconds:g} s, got one that takes longer") from None
    return done.returncode, done.stderr[-20_000:].decode("utf-8", "replace")
