"""Pictures that depend on the seed alone, cameras as EG3D places them, and films with the promised frames."""

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import Rendering, RenderOptions
from eg3d_rlhf.experiments.media import rendering
from eg3d_rlhf.experiments.media.settings import FFHQ_FOV
from eg3d_rlhf.experiments.media.video import Film, FilmOptions, LatentWalk, write_mp4
from eg3d_rlhf.generators import load_generator
from tests.rejections import raising
from training.rendering.cameras import FOV_to_intrinsics


@pytest.fixture
def G(tiny_networks):
    return load_generator(tiny_networks).generator


@pytest.mark.parametrize("fov", [FFHQ_FOV, 18, 45.0])
def test_the_cameras_of_a_generator_are_its_own(G, fov):
    """18 is the default of EG3D's tool: its cameras are had with --fov-deg=18."""
    G.module.rendering_kwargs.update(avg_camera_radius=1.7, avg_camera_pivot=[0, 0, -0.06])
    cameras = rendering.cameras_of(G, fov)
    assert (cameras.radius, cameras.pivot) == (1.7, (0, 0, -0.06))
    assert torch.equal(rendering.camera(cameras)[0, 16:], FOV_to_intrinsics(fov).flatten())
    assert rendering.cameras_of(G, pivot=(0, 0, 0.2)).pivot == (0, 0, 0.2)
    with pytest.raises(ValueError, match="field of view"):
        rendering.cameras_of(G, 180)


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_a_picture_depends_on_its_seed_and_camera_alone(G, noise_mode):
    cameras = rendering.cameras_of(G)
    left = rendering.camera(cameras, 0.4)
    right = rendering.camera(cameras, -0.4)
    ws = rendering.conditioned_ws(G, [3], cameras, 0.7)
    state = torch.random.get_rng_state()
    first = rendering.render(G, ws, [left, right], 3, noise_mode)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    again = rendering.render(G, rendering.conditioned_ws(G, [9, 3], cameras, 0.7)[1:], [left], 3, noise_mode)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[0].shape == (32, 32, 3) and first[0].dtype == np.uint8
    assert not np.array_equal(first[0], first[1])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        direct = G.module.synthesis(ws, left, noise_mode=noise_mode)["image"]
    np.testing.assert_array_equal(first[0], rendering.to_uint8(direct[0]))


def test_raw_pictures_and_distances(G):
    ws = rendering.conditioned_ws(G, [0], rendering.cameras_of(G))
    label = rendering.camera(rendering.cameras_of(G))
    options = RenderOptions(sample_mult=1.5, resolution=12)
    kept = dict(G.module.rendering_kwargs)
    raw, depth = (
        rendering.render(G, ws, [label], mode=mode, options=options)[0]
        for mode in ("image_raw", "image_depth")
    )
    assert G.module.rendering_kwargs == kept
    six = RenderOptions(samples=6, resolution=12)
    np.testing.assert_array_equal(raw, rendering.render(G, ws, [label], mode="image_raw", options=six)[0])
    assert raw.shape == (12, 12, 3) and depth.shape == (12, 12)
    nothing = torch.zeros(1, 3, 1, 2)
    out = Rendering(nothing, nothing, torch.tensor([[[[2.5, 9.0]]]]), torch.tensor([[[[0.9, 0.1]]]]))
    np.testing.assert_array_equal(rendering.distances(out), np.float32([[2.5, np.inf]]))
    with raising("RenderOptions", "sample_mult=0"):
        RenderOptions(sample_mult=0)


def test_near_is_bright_and_nothing_is_black():
    grey = rendering.shade_depth(np.float32([[2.0, 3.0], [2.5, np.inf]]))[..., 0]
    np.testing.assert_array_equal(grey, [[255, 32], [144, 0]])
    assert rendering.shade_depth(np.full((2, 2), np.inf)).max() == 0


def test_a_walk_passes_its_keyframes_and_closes_smoothly():
    ws = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    walk = LatentWalk(ws)
    for time in range(4):
        torch.testing.assert_close(walk.at(time)[0], ws[time])
    torch.testing.assert_close(walk.at(4.0)[0], ws[0])
    step = 1e-3
    before = (walk.at(4.0) - walk.at(4.0 - step)) / step
    after = (walk.at(step) - walk.at(0.0)) / step
    torch.testing.assert_close(before, after, atol=0.05, rtol=0.05)
    torch.testing.assert_close(LatentWalk(ws[:1]).at(0.7), ws[:1])


def test_seeds_of_the_cells():
    assert FilmOptions(grid=(2, 1)).cells([5, 6, 7, 8]) == [[5, 6], [7, 8]]
    assert FilmOptions(grid=(2, 1), keyframes=3).cells([5, 6]) == [[5, 6, 5], [6, 5, 6]]
    shuffled = FilmOptions(grid=(2, 2), shuffle_seed=1).cells(list(range(8)))
    assert sorted(sum(shuffled, [])) == list(range(8)) and shuffled != FilmOptions(grid=(2, 2)).cells(
        list(range(8))
    )
    with raising("seeds", "4", "2x2", "3"):
        FilmOptions(grid=(2, 2)).cells([1, 2, 3])


@pytest.mark.parametrize("mode", ["image", "image_depth", pytest.param("image_raw", marks=pytest.mark.long)])
def test_a_film_has_its_frames(G, mode, tmp_path):
    options = FilmOptions(grid=(2, 1), frames=3, mode=mode)
    film = Film(G, [0, 1, 2, 3], rendering.cameras_of(G), options)
    side = 32 if mode == "image" else 8
    assert film.count == 6
    path = write_mp4(tmp_path / "new" / "a.mp4", film, fps=30)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    assert meta["size"] == (2 * side, side) and meta["fps"] == 30
    assert len(list(reader)) == 6
    assert write_mp4(tmp_path / "b.mp4", film, fps=30).read_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_films_show_what_they_were_given_and_fill_odd_sizes(tmp_path):
    frames = [np.full((31, 45, 3), value, np.uint8) for value in (30, 120, 220)]
    reader = imageio_ffmpeg.read_frames(str(write_mp4(tmp_path / "a.mp4", frames)))
    assert next(reader)["size"] == (46, 32)
    means = [np.frombuffer(frame, np.uint8).mean() for frame in reader]
    np.testing.assert_allclose(means, [30, 120, 220], atol=6)


def test_user_errors(tmp_path):
    with raising(".mp4", "'a.avi'"):
        write_mp4(tmp_path / "a.avi", [])
    with raising("frame"):
        write_mp4(tmp_path / "a.mp4", [])
    stopped = ValueError("stopped")

    def broken():
        yield np.zeros((16, 16, 3), np.uint8)
        raise stopped

    with pytest.raises(ValueError) as caught:
        write_mp4(tmp_path / "a.mp4", broken())
    assert caught.value is stopped
    assert list(tmp_path.iterdir()) == []  # neither half a film nor a temporary
