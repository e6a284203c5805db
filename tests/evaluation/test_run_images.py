"""Images at the end of a run: their size, the latents that they show, and contact sheets."""

import json

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from eg3d_rlhf.core import bundled
from eg3d_rlhf.core.field import CameraFamily
from eg3d_rlhf.evaluation import run_images as pictures
from eg3d_rlhf.evaluation.run_images import image_sheet, shape_sheet
from eg3d_rlhf.experiments.media.sheet import Row, look, paint, sheet
from eg3d_rlhf.generators import latents, load_generator
from eg3d_rlhf.modes import reports, samples
from tests.evaluation import comparisons
from tests.rejections import rejected
from training.dataset import ImageFolderDataset
from training.heads import people, people_mesh

CELL = 40
SMALL = pictures.ImageOptions(
    shown=2, meshes=1, resolution=32, cell=CELL, film=CELL, thumb=CELL, rays=8, turns=3, samples=4
)
FRONT = CameraFamily().label(0.4)


def with_spheres(loaded, radius: float, z_dim: int = people.LATENT):
    """A loaded generator of latents of people whose fields are spheres: the tiny network's own have no
    surface.
    """
    generator = loaded.generator

    class Sphere:
        level = 10.0
        bounds = generator.bounds

        def __init__(self, ws):
            self._ws = ws
            self._field = generator.field(ws)
            self._radius = radius + 0.02 * ws.mean(dim=(1, 2))[:, None]

        def __len__(self):
            return len(self._ws)

        def density(self, points):
            return 10 - 400 * (points.reshape(1, -1, 3).norm(dim=-1) - self._radius)

        def density_grid(self, grid):
            return self.density(grid.points()).reshape(len(self), *grid.shape)

        def render(self, cameras, options):
            return self._field.render(cameras, options)

    def mapping(z, c, **truncation):
        return generator.mapping(z[:, : generator.z_dim], c, **truncation)

    return comparisons.replaced(loaded, f"sphere {radius}", field=Sphere, mapping=mapping, z_dim=z_dim)


@pytest.fixture(scope="module")
def heads(tiny_networks, tiny_reward, tiny_pair):
    """A comparison of generators of spheres, of a synthetic set by name, whose latents are already chosen."""
    c = comparisons.load(tiny_networks, tiny_reward, after=tiny_pair[0], data="synthetic:people32@n=8")
    known = {
        pictures.CHOSEN: [210_003, 210_001],
        ("evaluators", "post-processing", "before"): {"any_method": np.array([0])},
    }
    return comparisons.dataclasses.replace(
        c, before=with_spheres(c.before, 0.2), after=with_spheres(c.after, 0.24), memory=known
    )


@pytest.mark.parametrize("of_people", [True, False])
def test_the_images_are_written_with_and_without_heads_of_people(heads, of_people, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "GRID", 16)
    c = heads if of_people else comparisons.dataclasses.replace(heads, data="")
    assert pictures.write_images(c, tmp_path, SMALL) == ["comparison.png", "turntable.webp", "meshes/*.ply"]
    assert sorted(path.name for path in (tmp_path / "meshes").iterdir()) == [
        "seed210003-after.ply",
        "seed210003-before.ply",
    ]
    height, width = (round(CELL * pictures.CROP[2 + i]) - round(CELL * pictures.CROP[i]) for i in (1, 0))
    image = np.array(PIL.Image.open(tmp_path / "comparison.png"))
    assert image.shape[1] == pictures.NAMES + 2 * width + 24
    rows = 8 if of_people else 6
    assert rows * height < image.shape[0] < rows * (height + 22) + 400  # and the caption
    assert PIL.Image.open(tmp_path / "turntable.webp").n_frames == 3


def test_the_caption_says_that_scans_are_damaged_deliberately(heads):
    with_scans = pictures.describe_comparison(heads, 6)
    without = pictures.describe_comparison(comparisons.dataclasses.replace(heads, data=""), 6)
    assert bundled.DAMAGED in with_scans and bundled.DAMAGED not in without and "psi 1" in with_scans


def test_latents_are_shown_by_rule_and_kept_for_another_process(heads):
    c = comparisons.dataclasses.replace(heads, memory={})
    shown = pictures.choose_latents(c, 6)
    pool = pictures.EVALUATION.take(pictures.POOL)
    scores = c.scores(c.before, pool, 1.0).tolist()
    rewards = [scores[pool.index(seed)] for seed in shown]
    assert (
        rewards == sorted(rewards)
        and (rewards[0], rewards[-1]) == (min(scores), max(scores))
        and len(set(shown)) == 6
    )
    assert (
        pictures.choose_latents(
            comparisons.dataclasses.replace(c, reward=None, memory={pictures.CHOSEN: shown})
        )
        == shown
    )


def test_shapes_without_a_surface_state_the_reason_and_stop_nothing(tiny_comparison, tmp_path, capsys):
    readable = comparisons.dataclasses.replace(SMALL, cell=160)
    assert "meshes/*.ply" in pictures.write_images(tiny_comparison, tmp_path, readable)
    image = np.array(PIL.Image.open(tmp_path / "comparison.png").convert("L"))
    cell_width, cell_height = (
        round(160 * pictures.CROP[2 + i]) - round(160 * pictures.CROP[i]) for i in (0, 1)
    )
    # the second row of cells shows shapes from the back: one pixel of the margin, and the words
    top = 12 + 4 + cell_height + 4
    for column in range(2):
        left = 12 + pictures.NAMES + column * cell_width
        cell = image[top : top + cell_height, left : left + cell_width]
        assert (cell < 180).mean() > 0.01 and (cell[:, 0] == 255).all()
    printed = capsys.readouterr().out
    assert printed.count("No mesh") <= 1


def test_a_grid_is_drawn_where_its_surface_is():
    sphere = np.linalg.norm(people_mesh.grid_points(24), axis=-1) - 0.3
    view = look(pictures.level_set_from_grid(sphere), FRONT, 32)
    assert view.hit.any() and (view.points.norm(dim=1) - 0.3).abs().max() < 2e-3


def test_a_whole_head_is_seen_where_its_photograph_shows_it():
    (head,) = people.heads_from_latents(latents([5], people.LATENT))
    view = pictures.view_of_head(
        head, pictures.level_set_from_grid(people_mesh.head_grid(head, 16)), FRONT, 32
    )
    _, distance = people.render_head(head, FRONT[0, :16].reshape(4, 4).numpy(), float(FRONT[0, 16]), 32)
    assert (view.hit.numpy() == np.isfinite(distance)).all()
    assert np.abs(view.depth.numpy() - distance)[np.isfinite(distance)].max() < 1e-3
    assert 0.05 < view.light.min() and 0.3 < paint(view)[view.hit].mean() < 0.95


def test_small_print_is_wrapped_into_lines_within_the_sheet():
    cell = np.full((10, 120, 3), 255, np.uint8)
    bare, noted = (sheet("", [Row(cells=[cell, cell])], note=note).shape for note in ("", "word " * 40))
    assert noted[1] == bare[1] and noted[0] > bare[0] + 4 * 19


def test_the_change_of_a_generator_against_itself_is_none(heads):
    same = comparisons.dataclasses.replace(heads, after=heads.before)
    result = pictures.surface_change(same, pictures.EVALUATION.take(1))["surface_change_voxels"]
    assert result["n"] == 1 and result["median"] < 0.02
    assert pictures.surface_change(heads, pictures.EVALUATION.take(1))["surface_change_voxels"]["median"] > 1


def test_contact_sheets(heads, tiny_networks, tiny_data):
    generator = load_generator(tiny_networks).generator
    images = image_sheet(
        generator, ImageFolderDataset(tiny_data, use_labels=True, c_dim=25), range(9), 0.7, samples_per_ray=4
    )
    # 32 pixels four times as large, twice
    assert images.shape[1] == 2 * (8 * 128 + 24) and images.dtype == np.uint8
    shapes = shape_sheet(heads.before.generator, range(3), 1.0, SMALL)
    height, width = (round(CELL * pictures.CROP[2 + i]) - round(CELL * pictures.CROP[i]) for i in (1, 0))
    assert shapes.shape[1] == 3 * width + 24 and 2 * height < shapes.shape[0] < 2 * height + 220


def run(tool, *flags):
    return CliRunner().invoke(tool, [str(flag) for flag in flags])


def test_the_tool_that_draws_contact_sheets(tiny_networks, tiny_data, tmp_path):
    result = run(
        samples.sheet,
        f"--network={tiny_networks}",
        f"--data={tiny_data}",
        "--seeds=0-3",
        "--shapes=1",
        "--set=level=1.2",
        f"--outdir={tmp_path}/a",
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["images.png", "shapes.png"]
    few = run(
        samples.sheet,
        f"--network={tiny_networks}",
        f"--data={tiny_data}",
        "--seeds=0-99",
        f"--outdir={tmp_path}/b",
    )
    rejected(few, "--data", "100", "24", "--latents")
    assert not (tmp_path / "b").exists()


def test_the_tool_that_draws_a_run_again_states_what_it_compares(
    tiny_networks, tiny_reward, tiny_pair, tmp_path
):
    named = [f"--before={tiny_networks}", f"--run={tiny_pair[0]}", f"--reward-ckpt={tiny_reward}"]
    result = run(reports.images, *named, "--dry-run")
    assert result.exit_code == 0 and json.loads(result.stdout)["outdir"] == str(tiny_pair[0])
    missing = run(reports.images, f"--run={tmp_path}/none")
    rejected(missing, "--run", f"{tmp_path}/none")
