"""Films of a generator: the camera swings about the object while the latent moves through keyframes.

Letters: K keyframes, T frames, N grid cells, L, W = layers and width of ws.
"""

import importlib.util
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import interp1d

from eg3d_rlhf import generators
from eg3d_rlhf.core.field import OWN, CameraFamily, RenderOptions
from eg3d_rlhf.experiments.media.rendering import camera, conditioned_ws, render, shade_depth, tile

# in radians, from EG3D's gen_videos
YAW_RANGE = 0.35
PITCH_RANGE = 0.25
PITCH_MEAN = -0.05
# ffmpeg's options for equal bytes from equal frames
_SAME_BYTES = ["-f", "mp4", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "1"]
_WRAPS = 2  # copies of the keyframes before and after, so that the cubic closes smoothly


@dataclass(frozen=True, kw_only=True)
class FilmOptions:
    """Contents of a film."""

    grid: tuple[int, int] = (1, 1)  # cells across and down, each >= 1
    keyframes: int | None = None  # latents of every cell's path, >= 1; None = seeds / cells
    frames: int = 120  # frames from one keyframe to the next, >= 1
    shuffle_seed: int | None = None  # order of the seeds; None = as given
    mode: str = "image"  # 'image', 'image_depth' or 'image_raw'
    psi: float = 1.0  # truncation
    cutoff: int | None = 14  # number of ws layers that are truncated; None = all
    noise_mode: str = "const"  # of the synthesis

    def cells(self, seeds: Sequence[int]) -> list[list[int]]:
        """Divide the seeds among the cells: N lists of K. Too few seeds are repeated.

        Raises: ValueError for no seeds, or where the number of keyframes is not given and the seeds do not
            fill the grid evenly.
        """
        if not seeds:
            raise ValueError("seeds: expected at least one seed, got none. Name some seeds.")
        cells = self.grid[0] * self.grid[1]
        keyframes = self.keyframes
        if keyframes is None:
            if len(seeds) % cells:
                raise ValueError(
                    f"seeds: expected a multiple of {cells} seeds for a grid of"
                    f" {self.grid[0]}x{self.grid[1]}, got {len(seeds)}. Change the seeds or the grid, or give"
                    " the number of keyframes."
                )
            keyframes = len(seeds) // cells
        chosen = [seeds[i % len(seeds)] for i in range(cells * keyframes)]
        if self.shuffle_seed is not None:
            np.random.RandomState(self.shuffle_seed).shuffle(chosen)
        return [chosen[i * keyframes : (i + 1) * keyframes] for i in range(cells)]


class LatentWalk:
    """Closed cubic spline through keyframes ws [K, L, W] at the times 0, 1, ..., K - 1; time K is time 0."""

    def __init__(self, ws: torch.Tensor):
        count = len(ws)
        times = np.arange(-count * _WRAPS, count * (_WRAPS + 1))
        self._ws = ws
        self._device = ws.device
        # repeated in time: [(2 * _WRAPS + 1) * K, L, W]
        values = np.tile(ws.cpu().double().numpy(), (2 * _WRAPS + 1, 1, 1))
        self._spline = interp1d(times, values, kind="cubic", axis=0) if count > 1 else None

    def at(self, time: float) -> torch.Tensor:
        """Return ws [1, L, W] at a time of 0..K."""
        if self._spline is None:  # a single keyframe
            return self._ws
        return torch.from_numpy(self._spline(time)).to(self._device, torch.float32)[None]


def camera_at(cameras: CameraFamily, share: float) -> torch.Tensor:
    """Make the camera label [1, 25] after a share 0..1 of a swing: yaw 0.35 sin, pitch -0.05 + 0.25 cos."""
    angle = 2 * math.pi * share
    return camera(cameras, YAW_RANGE * math.sin(angle), PITCH_MEAN + PITCH_RANGE * math.cos(angle))


class Film:
    """Frames of one film.

    Args: seeds: see `FilmOptions.cells`; look: options of the rendering.
    Deviates: the swing closes (EG3D writes pi as 3.14), and a frame does not depend on the random numbers of
    others.
    """

    def __init__(
        self,
        generator: generators.Generator,
        seeds: Sequence[int],
        cameras: CameraFamily,
        options: FilmOptions,
        look: RenderOptions = OWN,
    ):
        self.generator = generator
        self.cameras = cameras
        self.options = options
        self.look = look
        cells = options.cells(seeds)
        self.first_seed = cells[0][0]
        self.walks = [
            LatentWalk(conditioned_ws(generator, cell, cameras, options.psi, options.cutoff))
            for cell in cells
        ]
        self.count = len(cells[0]) * options.frames  # T

    def ws(self, index: int) -> list[torch.Tensor]:
        """Return the ws [1, L, W] of every cell in frame `index`."""
        return [walk.at(index / self.options.frames) for walk in self.walks]

    def frame(self, index: int) -> np.ndarray:
        """Render frame `index` of 0..T-1: uint8 [rows, columns, 3] in pixels."""
        label = camera_at(self.cameras, index / self.count)
        options = self.options
        # one seed for all frames: the jitter of rays does not flicker
        images = [
            render(self.generator, ws, [label], self.first_seed, options.noise_mode, options.mode, self.look)[
                0
            ]
            for ws in self.ws(index)
        ]
        if options.mode == "image_depth":
            images = [shade_depth(depth) for depth in images]
        return tile(images, options.grid[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.frame(index) for index in range(self.count))


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float = 60, bitrate: str = "10M") -> Path:
    """Write frames, uint8 [H, B, 3] of one size, as H.264 in an .mp4 file, atomically.

    Equal frames give equal bytes. The format needs even sizes, so the last row or column of odd ones is
    repeated.

    Raises: ValueError for another suffix, no frames, or where imageio-ffmpeg is missing; OSError where ffmpeg
        fails.
    """
    path = check_mp4(path)
    import imageio_ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the final rename is atomic
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = None
    try:
        for frame in frames:
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if writer is None:
                writer = imageio_ffmpeg.write_frames(
                    str(temporary),
                    (frame.shape[1], frame.shape[0]),
                    fps=fps,
                    codec="libx264",
                    bitrate=bitrate,
                    macro_block_size=2,
                    ffmpeg_log_level="error",
                    output_params=_SAME_BYTES,
                )
                writer.send(None)
            try:
                writer.send(np.ascontiguousarray(frame))
            except OSError as error:
                last = str(error).strip().splitlines()[-1]
                raise OSError(
                    f"{path}: expected ffmpeg to accept every frame, got {last!r}. Check the free space of"
                    " the disk."
                ) from error
        if writer is None:
            raise ValueError("write_mp4: expected at least one frame, got none. Pass some frames.")
        writer.close()
        if not temporary.exists() or temporary.stat().st_size == 0:
            raise OSError(f"{path}: expected a film from ffmpeg, got none. Check the disk's free space.")
        os.replace(temporary, path)
    finally:
        if writer is not None:
            writer.close()
        temporary.unlink(missing_ok=True)
    return path


def check_mp4(path: str | Path) -> Path:
    """Return the path. Raises: ValueError unless it ends in .mp4 and imageio-ffmpeg is installed."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"write_mp4: expected a file ending in .mp4, got {path.name!r}. Change the suffix.")
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            "write_mp4: expected the package imageio-ffmpeg, got none. Run pip install imageio-ffmpeg."
        )
    return path
