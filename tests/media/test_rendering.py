"""Pictures that depend on the seed alone, cameras as EG3D places them, and films with the promised frames."""

import math

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.media.rendering import Orbit, conditioned_ws, distances, refine, render, shade_depth, tile, to_uint8
from eg3d_rlhf.media.video import Film, FilmOptions, LatentWalk, camera_at, write_mp4
from training.rendering.cameras import FOV_to_intrinsics, LookAtPoseSampler, pack_label


@pytest.fixture
def G(tiny_networks):
    return load_generator(tiny_networks).G


def test_cameras_are_those_of_eg3ds_sampler():
    orbit = Orbit(radius=2.7, pivot=(0.0, 0.0, 0.2))
    pose = LookAtPoseSampler.sample(math.pi / 2 + 0.4, math.pi / 2 - 0.2, torch.tensor([0, 0, 0.2]), radius=2.7)
    torch.testing.assert_close(orbit.label(0.4, -0.2), pack_label(pose, FOV_to_intrinsics(18.837)))
    with pytest.raises(ValueError, match="0 < fov < 180"):
        Orbit(radius=1.0, pivot=(0, 0, 0), fov=180)


def test_the_orbit_of_a_generator_is_its_own(G):
    G.rendering_kwargs.update(avg_camera_radius=1.7, avg_camera_pivot=[0, 0, -0.06])
    assert Orbit.of(G) == Orbit(radius=1.7, pivot=(0, 0, -0.06))
    assert Orbit.of(G, fov=45.0).fov == 45


@pytest.mark.parametrize("noise_mode", ["const", "random", "none"])
def test_a_picture_depends_on_its_seed_and_camera_alone(G, noise_mode):
    orbit = Orbit.of(G)
    left, right = orbit.label(0.4), orbit.label(-0.4)
    ws = conditioned_ws(G, [3], orbit, 0.7)
    state = torch.random.get_rng_state()
    first = render(G, ws, [left, right], 3, noise_mode)
    assert torch.equal(torch.random.get_rng_state(), state) and G._last_planes is None
    torch.rand(5)
    again = render(G, conditioned_ws(G, [9, 3], orbit, 0.7)[1:], [left], 3, noise_mode)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[0].shape == (32, 32, 3) and first[0].dtype == np.uint8
    assert not np.array_equal(first[0], first[1])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        direct = G.synthesis(ws, left, noise_mode=noise_mode)["image"]
    np.testing.assert_array_equal(first[0], to_uint8(direct[0]))


def test_truncation_and_its_cutoff(G):
    G.backbone.mapping.w_avg.copy_(torch.randn(16))
    orbit = Orbit.of(G)
    whole, zero = conditioned_ws(G, [1], orbit), conditioned_ws(G, [1], orbit, psi=0)
    torch.testing.assert_close(zero[0], G.backbone.mapping.w_avg.expand_as(zero[0]))
    part = conditioned_ws(G, [1], orbit, psi=0, cutoff=2)
    torch.testing.assert_close(part, torch.cat([zero[:, :2], whole[:, 2:]], dim=1))


def test_raw_pictures_and_distances(G):
    ws, label = conditioned_ws(G, [0], Orbit.of(G)), Orbit.of(G).label()
    refine(G, sample_mult=1.5, nrr=12)
    assert (G.rendering_kwargs["depth_resolution"], G.rendering_kwargs["depth_resolution_importance"]) == (6, 6)
    raw, depth = (render(G, ws, [label], mode=mode)[0] for mode in ("image_raw", "image_depth"))
    assert raw.shape == (12, 12, 3) and depth.shape == (12, 12)
    out = {"image_depth": torch.tensor([[[[2.5, 9.0]]]]), "image_opacity": torch.tensor([[[[0.9, 0.1]]]])}
    np.testing.assert_array_equal(distances(out), np.float32([[2.5, np.inf]]))
    with pytest.raises(ValueError, match="sample_mult > 0"):
        refine(G, sample_mult=0)


def test_near_is_bright_and_nothing_is_black():
    grey = shade_depth(np.float32([[2.0, 3.0], [2.5, np.inf]]))[..., 0]
    np.testing.assert_array_equal(grey, [[255, 32], [144, 0]])
    assert shade_depth(np.full((2, 2), np.inf)).max() == 0


def test_tiles_run_row_by_row():
    pictures = [np.full((2, 3, 3), i, np.uint8) for i in range(6)]
    np.testing.assert_array_equal(tile(pictures, 3)[::2, ::3, 0], [[0, 1, 2], [3, 4, 5]])


def test_to_uint8_maps_the_range():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0]).expand(3, 1, 4))[0, :, 0].tolist() == [0, 0, 128, 255]


def test_a_walk_passes_its_keyframes_and_closes_smoothly():
    ws = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    walk = LatentWalk(ws)
    for time in range(4):
        torch.testing.assert_close(walk.at(time)[0], ws[time])
    torch.testing.assert_close(walk.at(4.0)[0], ws[0])
    step = 1e-3
    before, after = (walk.at(4.0) - walk.at(4.0 - step)) / step, (walk.at(step) - walk.at(0.0)) / step
    torch.testing.assert_close(before, after, atol=0.05, rtol=0.05)
    torch.testing.assert_close(LatentWalk(ws[:1]).at(0.7), ws[:1])


def test_the_swing_closes():
    orbit = Orbit(radius=2.7, pivot=(0.0, 0.0, 0.0))
    torch.testing.assert_close(camera_at(orbit, 0.0), camera_at(orbit, 1.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(camera_at(orbit, 0.25), orbit.label(0.35, -0.05), atol=1e-5, rtol=0)


def test_seeds_of_the_cells():
    assert FilmOptions(grid=(2, 1)).cells([5, 6, 7, 8]) == [[5, 6], [7, 8]]
    assert FilmOptions(grid=(2, 1), keyframes=3).cells([5, 6]) == [[5, 6, 5], [6, 5, 6]]
    shuffled = FilmOptions(grid=(2, 2), shuffle_seed=1).cells(list(range(8)))
    assert sorted(sum(shuffled, [])) == list(range(8)) and shuffled != FilmOptions(grid=(2, 2)).cells(list(range(8)))
    with pytest.raises(ValueError, match="expected a multiple of 4 seeds for a grid of 2x2, got 3"):
        FilmOptions(grid=(2, 2)).cells([1, 2, 3])


@pytest.mark.parametrize("mode", ["image", "image_depth", "image_raw"])
def test_a_film_has_its_frames(G, mode, tmp_path):
    options = FilmOptions(grid=(2, 1), frames=3, mode=mode)
    film = Film(G, [0, 1, 2, 3], Orbit.of(G), options)
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
    with pytest.raises(ValueError, match="ending in .mp4, got 'a.avi'"):
        write_mp4(tmp_path / "a.avi", [])
    with pytest.raises(ValueError, match="at least one frame"):
        write_mp4(tmp_path / "a.mp4", [])
    with pytest.raises(ValueError, match="expected grid, keyframes and frames >= 1"):
        FilmOptions(frames=0)
    with pytest.raises(ValueError, match="image mode of image, image_depth, image_raw"):
        FilmOptions(mode="normals")

    def broken():
        yield np.zeros((16, 16, 3), np.uint8)
        raise ValueError("the renderer stopped")

    with pytest.raises(ValueError, match="renderer stopped"):
        write_mp4(tmp_path / "a.mp4", broken())
    assert list(tmp_path.iterdir()) == []  # neither half a film nor a temporary
