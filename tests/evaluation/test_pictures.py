"""The pictures that end a run: their size, what they need, and what the tint says."""

import json

import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.core.field import CameraFamily
from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation import pictures
from eg3d_rlhf.evaluation.pictures import TrueHead, fit_colours, image_sheet, nearest, shape_sheet
from eg3d_rlhf.experiments.media.sheet import CLAY, look, paint, tint
from eg3d_rlhf.measures.true_heads import HeadPose
from eg3d_rlhf.modes import reports, samples
from tests.evaluation import comparisons
from tests.geometry.test_level_set import body, sphere
from training.dataset import ImageFolderDataset
from training.heads.family import APPEARANCE_COUNT, SHAPE_COUNT

CELL = 40
SMALL = pictures.PictureOptions(shown=2, meshes=1, resolution=32, cell=CELL, film=CELL, rays=8, turns=3, samples=4)
FRONT = CameraFamily().label(0.4)


def with_heads(loaded):
    """A loaded generator whose fields are true heads: the tiny network's own have no surface."""
    generator = loaded.generator

    class Head:
        level, bounds = 0.0, generator.bounds

        def __init__(self, ws):
            self._ws, self._field = ws, generator.field(ws)
            self._head = head(0.3 * float(ws.mean()))

        def __len__(self):
            return len(self._ws)

        def density(self, points):
            return self._head.surface(SlabSpec.cube(4)).density(points)[None]

        def density_grid(self, grid):
            return self._head.surface(grid).cube[None]

        def render(self, cameras, options):
            return self._field.render(cameras, options)

    return comparisons.replaced(loaded, field=Head)


def head(width: float = 0.0) -> TrueHead:
    pose = HeadPose(torch.full((1, SHAPE_COUNT), width).clamp(-1, 1), torch.zeros(1, 3), torch.zeros(1, 1))
    return TrueHead(pose, torch.full((1, APPEARANCE_COUNT), 0.4))


@pytest.fixture(scope="module")
def heads(tiny_networks, tiny_reward, tiny_pair):
    """A comparison of generators whose shapes are heads, of a synthetic set by name."""
    c = comparisons.load(tiny_networks, tiny_reward, after=tiny_pair[0], data="synthetic:heads32@n=8")
    return comparisons.dataclasses.replace(c, before=with_heads(c.before), after=with_heads(c.after))


@pytest.mark.parametrize("synthetic", [True, False])
def test_the_pictures_are_written_with_and_without_a_true_family(heads, synthetic, tmp_path):
    c = heads if synthetic else comparisons.dataclasses.replace(heads, data="")
    written = pictures.write_pictures(c, tmp_path, SMALL)
    assert written == ["comparison.png", "turntable.mp4", "meshes/*.ply"] and len(list((tmp_path / "meshes").iterdir())) == 2
    picture = np.array(PIL.Image.open(tmp_path / "comparison.png"))
    wide = CELL - 2 * round(pictures.TRIMMED * CELL)
    assert picture.shape[1] == pictures.NAMES + 2 * wide + 24 and (6 if synthetic else 4) * CELL < picture.shape[0] < 8 * CELL + 150
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "turntable.mp4"))
    next(frames)
    assert sum(1 for _ in frames) == 4  # there and back


def test_shapes_without_a_surface_are_white_and_stop_nothing(tiny_comparison, tmp_path):
    assert "meshes/*.ply" in pictures.write_pictures(tiny_comparison, tmp_path, SMALL)
    assert (tmp_path / "comparison.png").exists()


def test_a_missing_encoder_is_said_and_the_rest_written(heads, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("eg3d_rlhf.experiments.media.video.importlib.util.find_spec", lambda name: None)
    c = comparisons.dataclasses.replace(heads, data="")
    assert pictures.write_pictures(c, tmp_path, SMALL) == ["comparison.png", "meshes/*.ply"]
    assert "No turntable.mp4: write_mp4: expected the package imageio-ffmpeg" in capsys.readouterr().out
    assert not (tmp_path / "turntable.mp4").exists()


def test_the_change_of_a_generator_against_itself_is_none(heads):
    same = comparisons.dataclasses.replace(heads, after=heads.before)
    found = pictures.surface_change(same, pictures.JUDGE.take(1))["surface_change_voxels"]
    assert found["n"] == 1 and found["median"] < 0.02
    assert pictures.surface_change(heads, pictures.JUDGE.take(1))["surface_change_voxels"]["median"] > 2 * found["median"]


def test_the_tint_of_identical_shapes_is_neutral_and_of_a_grown_one_red_everywhere():
    spec = SlabSpec.cube(64)
    same, grown = sphere(0.25, spec=spec), sphere(0.25 + spec.voxel, spec=spec)
    for after, colour in ((same, "neutral"), (grown, "red")):
        view = look(after, FRONT, 64)
        albedo = tint(pictures.displacement(same, view.points, view.normals), 1.0)
        if colour == "neutral":
            assert torch.allclose(albedo, torch.tensor(CLAY), atol=1e-4)
        else:
            assert (albedo[:, 0] > 0.8).all() and (albedo[:, 2] < 0.15).all()
    assert tint(torch.tensor([-1.0]), 1.0)[0, 2] > tint(torch.tensor([-1.0]), 1.0)[0, 0]


def test_a_part_that_vanished_is_drawn_as_a_blue_ghost():
    spec = SlabSpec.cube(64)
    above = torch.tensor([0.0, 0.26, 0.0])
    both = body(lambda points: torch.minimum(points.norm(dim=-1) - 0.12, (points - above).norm(dim=-1) - 0.05), spec)
    pair = (pictures.Side(None, both), pictures.Side(None, sphere(0.12, spec=spec)))
    before, after = pictures.Look.at(pair, FRONT, 128).drawn(1.0, 2)
    blue = after[..., 2].astype(int) - after[..., 0] > 15
    floater = (before.min(axis=-1) < 225) & (np.arange(64)[:, None] < 14)
    assert floater.sum() > 30 and blue[floater].mean() > 0.8 and not blue[20:].any()


def test_full_colour_is_the_first_scale_that_holds_nearly_all():
    assert pictures.full_scale([torch.linspace(-0.9, 0.9, 100)]) == 1.0
    assert pictures.full_scale([torch.cat([torch.zeros(99), torch.tensor([9.0])])]) == pictures.SCALES[0]
    assert pictures.full_scale([]) == pictures.SCALES[0] and pictures.full_scale([torch.full((9,), 9.0)]) == pictures.SCALES[-1]


@pytest.mark.long
def test_a_true_head_is_found_again_with_its_colours():
    truth, spec = head(), SlabSpec.cube(64)
    truth.appearance[0, :3] = torch.tensor([0.8, 0.5, 0.3])  # skin
    image = truth.image(FRONT, 48)
    (found,) = nearest([[truth.surface(spec)]], image.movedim(-1, 0)[None], FRONT)
    assert found is not None and (found.image(FRONT, 48) - image).abs().mean() < 0.03
    moved = HeadPose(truth.pose.shape, torch.tensor([[0.02, 0.03, 0.0]]), torch.tensor([[0.1]]))
    posed = TrueHead(moved, truth.appearance)
    seen = paint(look(posed.surface(spec), FRONT, 48)).lt(1).any(dim=-1)
    assert (posed.image(FRONT, 48).lt(0.99).any(dim=-1) == seen).float().mean() > 0.97  # colour and shape agree about where it stands
    assert fit_colours(moved, image.movedim(-1, 0)[None], FRONT).shape == (1, APPEARANCE_COUNT)


def test_contact_sheets(heads, tiny_data):
    images = image_sheet(heads.before.generator, ImageFolderDataset(tiny_data, use_labels=True, c_dim=25), range(9), 0.7, samples=4)
    assert images.shape[1] == 2 * (8 * 128 + 24) and images.dtype == np.uint8  # 32 pixels four times as large, twice
    shapes = shape_sheet(heads.before.generator, range(3), 0.7, SMALL)
    assert shapes.shape[1] == 3 * CELL + 24 and 2 * CELL < shapes.shape[0] < 2 * CELL + 80


def run(tool, *flags):
    return CliRunner().invoke(tool, [str(flag) for flag in flags])


def test_the_tool_that_draws_contact_sheets(tiny_networks, tiny_data, tmp_path):
    found = run(samples.sheet, f"--network={tiny_networks}", f"--data={tiny_data}", "--seeds=0-3", "--shapes=1", f"--outdir={tmp_path}/a")
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["images.png", "shapes.png"]
    few = run(samples.sheet, f"--network={tiny_networks}", f"--data={tiny_data}", "--seeds=0-99", f"--outdir={tmp_path}/b")
    assert few.exit_code == 2 and "--data: expected at least 100 images, got 24. Name fewer --latents." in few.stderr
    assert not (tmp_path / "b").exists()


def test_the_tool_that_draws_a_run_again_states_what_it_compares(tiny_networks, tiny_reward, tiny_pair, tmp_path):
    named = [f"--before={tiny_networks}", f"--run={tiny_pair[0]}", f"--reward-ckpt={tiny_reward}"]
    found = run(reports.pictures, *named, "--dry-run")
    assert found.exit_code == 0 and json.loads(found.stdout)["out"] == str(tiny_pair[0])
    missing = run(reports.pictures, f"--run={tmp_path}/none")
    assert missing.exit_code == 2 and missing.stderr.startswith("Error: --run: expected a run folder")
