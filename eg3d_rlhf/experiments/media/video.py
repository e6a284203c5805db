"""Films of a generator: the camera moves around the object while the latent moves through keyframes.

A film shows a grid of cells. Each cell has its own keyframes, between which the latent is interpolated.

Shapes: K keyframes of a cell, T frames of the film, N cells of the grid, L layers of ws, W width of ws.
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
from eg3d_rlhf.core.field import DEFAULT_OPTIONS, CameraFamily, RenderOptions
from eg3d_rlhf.experiments.media.rendering import camera, conditioned_ws, render, shade_depth, tile

# angles of the camera in radians, from EG3D's gen_videos.py
YAW_RANGE = 0.35
PITCH_RANGE = 0.25
PITCH_MEAN = -0.05
# options of ffmpeg with which equal frames give equal bytes
_SAME_BYTES = ["-f", "mp4", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-threads", "1"]
# Number of copies of the keyframes before the first and after the last one. They make the cubic spline smooth
# where the film starts again. EG3D's gen_videos.py uses the same number.
_WRAPS = 2


@dataclass(frozen=True, kw_only=True)
class FilmOptions:
    """Options that determine the content of a film."""

    grid: tuple[int, int] = (1, 1)  # number of cells side by side and one below another, each >= 1
    keyframes: int | None = None  # number of keyframes of each cell, >= 1; None: seeds divided by cells
    frames: int = 120  # number of frames from one keyframe to the next, >= 1
    shuffle_seed: int | None = None  # random seed for shuffling the list of seeds; None: not shuffled
    mode: str = "image"  # kind of image: 'image', 'image_depth' or 'image_raw'
    psi: float = 1.0  # truncation psi
    cutoff: int | None = 14  # number of layers of ws that are truncated; None: all layers
    noise_mode: str = "const"  # noise of the synthesis layers: "const", "random" or "none"

    def cells(self, seeds: Sequence[int]) -> list[list[int]]:
        """Divide the seeds among the cells of the grid.

        If there are fewer seeds than cells times keyframes, the list of seeds is repeated; if there are more,
        the last seeds are not used. The cells get the seeds in order, or in random order if `shuffle_seed` is
        set.

        Args:
            seeds: seeds of the keyframes.

        Returns:
            N lists, each with the K seeds of one cell.

        Raises:
            ValueError: there are no seeds, or `keyframes` is None and the number of seeds is not a multiple
                of the number of cells.
        """
        if not seeds:
            raise ValueError("seeds: the list of seeds is empty. Pass at least one seed with --seeds.")
        cell_count = self.grid[0] * self.grid[1]
        keyframe_count = self.keyframes
        if keyframe_count is None:
            if len(seeds) % cell_count:
                raise ValueError(
                    f"seeds: {len(seeds)} seeds cannot be divided evenly among the {cell_count} cells of a"
                    f" grid of {self.grid[0]}x{self.grid[1]}. Pass a multiple of {cell_count} seeds, another"
                    " --grid, or --num-keyframes, the number of seeds in each cell."
                )
            keyframe_count = len(seeds) // cell_count
        keyframe_seeds = [seeds[index % len(seeds)] for index in range(cell_count * keyframe_count)]
        if self.shuffle_seed is not None:
            np.random.RandomState(self.shuffle_seed).shuffle(keyframe_seeds)
        return [
            keyframe_seeds[index * keyframe_count : (index + 1) * keyframe_count]
            for index in range(cell_count)
        ]


class LatentWalk:
    """Closed cubic spline through the keyframes of a cell.

    Keyframe i is reached at time i, and at time K the path is at keyframe 0 again.

    Args:
        ws: keyframes, [K, L, W].
    """

    def __init__(self, ws: torch.Tensor):
        keyframe_count = len(ws)
        keyframe_times = np.arange(-keyframe_count * _WRAPS, keyframe_count * (_WRAPS + 1))
        self._ws = ws
        self._device = ws.device
        # the keyframes are repeated in time: [(2 * _WRAPS + 1) * K, L, W]
        repeated_ws = np.tile(ws.cpu().double().numpy(), (2 * _WRAPS + 1, 1, 1))
        # a single keyframe is constant in time and needs no spline
        self._spline = (
            interp1d(keyframe_times, repeated_ws, kind="cubic", axis=0) if keyframe_count > 1 else None
        )

    def at(self, time: float) -> torch.Tensor:
        """Return ws [1, L, W] at a time in 0..K."""
        if self._spline is None:
            return self._ws
        return torch.from_numpy(self._spline(time)).to(self._device, torch.float32)[None]


def camera_at(cameras: CameraFamily, path_share: float) -> torch.Tensor:
    """Make the camera label [1, 25] at a moment of the camera's closed path around the object.

    With the angle a = 2 pi share, the yaw is 0.35 sin a and the pitch is -0.05 + 0.25 cos a, in radians.

    Args:
        cameras: family of cameras.
        path_share: position on the path, from 0 (start) to 1 (end, which is the start again).
    """
    angle = 2 * math.pi * path_share
    return camera(cameras, YAW_RANGE * math.sin(angle), PITCH_MEAN + PITCH_RANGE * math.cos(angle))


class Film:
    """Film of a generator, whose frames are rendered when they are requested.

    Args:
        generator: generator that synthesises the images.
        seeds: seeds of the keyframes, see `FilmOptions.cells`.
        cameras: family of cameras.
        options: options of the content.
        render_options: options of the volume rendering.

    Deviates: the last frame leads exactly back to the first one (EG3D's gen_videos.py writes pi as 3.14).
    A frame does not depend on the random numbers of other frames.
    """

    def __init__(
        self,
        generator: generators.Generator,
        seeds: Sequence[int],
        cameras: CameraFamily,
        options: FilmOptions,
        render_options: RenderOptions = DEFAULT_OPTIONS,
    ):
        self.generator = generator
        self.cameras = cameras
        self.options = options
        self.render_options = render_options
        cells = options.cells(seeds)
        self.first_seed = cells[0][0]  # random seed of the rendering of all frames
        self.walks = [
            LatentWalk(conditioned_ws(generator, cell, cameras, options.psi, options.cutoff))
            for cell in cells
        ]
        self.count = len(cells[0]) * options.frames  # T

    def ws(self, frame_index: int) -> list[torch.Tensor]:
        """Return ws of every cell at the frame with the number `frame_index`, 0..T-1: N tensors [1, L, W]."""
        return [walk.at(frame_index / self.options.frames) for walk in self.walks]

    def frame(self, frame_index: int) -> np.ndarray:
        """Render a frame.

        Args:
            frame_index: number of the frame, 0..T-1.

        Returns:
            Image of the grid, uint8 [height, width, 3].
        """
        # all cells of a frame are rendered from the same camera
        camera_label = camera_at(self.cameras, frame_index / self.count)
        options = self.options
        images = []
        for ws in self.ws(frame_index):
            # All frames are rendered with the same seed. With different seeds, the jitter of the rays would
            # make the film flicker.
            images += render(
                self.generator,
                ws,
                [camera_label],
                self.first_seed,
                options.noise_mode,
                options.mode,
                self.render_options,
            )
        # `render` returns distances for this mode, which are converted to grey values
        if options.mode == "image_depth":
            images = [shade_depth(depth) for depth in images]
        return tile(images, options.grid[0])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.frame(index) for index in range(self.count))


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float = 60, bitrate: str = "10M") -> Path:
    """Write frames into an .mp4 file (codec H.264) atomically, and return its path.

    Equal frames give equal bytes. The codec needs an even height and width, so the last row or column of a
    frame with an odd size is repeated.

    Args:
        path: file with the suffix .mp4, whose folder is made if it does not exist.
        frames: images of one size, uint8 [height, width, 3].
        fps: frames per second.
        bitrate: bits per second of the codec, in the spelling of ffmpeg.

    Raises:
        ValueError: the suffix is not .mp4, there are no frames, or imageio-ffmpeg is not installed.
        OSError: ffmpeg fails.
    """
    path = check_mp4(path)
    # the package is optional, so it is imported after the check that it is installed
    import imageio_ffmpeg

    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that the final rename is atomic
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    ffmpeg_writer = None
    try:
        for frame in frames:
            # pads one row at the bottom and one column at the right if the size is odd
            frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            # ffmpeg is started with the first frame, because it needs the size
            if ffmpeg_writer is None:
                ffmpeg_writer = imageio_ffmpeg.write_frames(
                    str(temporary_path),
                    (frame.shape[1], frame.shape[0]),
                    fps=fps,
                    codec="libx264",
                    bitrate=bitrate,
                    macro_block_size=2,
                    ffmpeg_log_level="error",
                    output_params=_SAME_BYTES,
                )
                # the writer is a Python generator, which must be advanced to its first yield
                ffmpeg_writer.send(None)
            try:
                ffmpeg_writer.send(np.ascontiguousarray(frame))
            except OSError as error:
                last_line = str(error).strip().splitlines()[-1]  # ffmpeg states the cause in its last line
                raise OSError(
                    f"{path}: ffmpeg stopped while the film was written: {last_line!r}. Check the free space"
                    " of the disk."
                ) from error
        if ffmpeg_writer is None:
            raise ValueError(f"write_mp4: there are no frames to write into {path}. Pass at least one frame.")
        ffmpeg_writer.close()
        if not temporary_path.exists() or temporary_path.stat().st_size == 0:
            raise OSError(f"{path}: ffmpeg wrote an empty file. Check the free space of the disk.")
        os.replace(temporary_path, path)
    finally:
        # after an error, `close` ends the process of ffmpeg; a second call has no effect
        if ffmpeg_writer is not None:
            ffmpeg_writer.close()
        temporary_path.unlink(missing_ok=True)
    return path


def check_mp4(path: str | Path) -> Path:
    """Check that a film can be written to a path, and return the path.

    Raises:
        ValueError: the suffix is not .mp4, or the package imageio-ffmpeg is not installed.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(
            f"write_mp4: the file {path.name!r} does not have the suffix .mp4. Pass a path that ends in .mp4."
        )
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(
            "write_mp4: the package imageio-ffmpeg is not installed. Install it with pip install"
            " imageio-ffmpeg."
        )
    return path
