"""Measure how visible damage is to a judge: python benchmarks/judge_damage.py [--heads=2].

Damaged copies of bundled heads are rendered by the rig of the judge. For every kind, degree and view mode the
script prints the share of the asset's pixels that differ visibly (by more than 16 of 255) from the intact
head, as the mean over views and heads. A judge cannot see what does not change its images.
"""

import click
import numpy as np

from eg3d_rlhf.core.cli import aligned
from eg3d_rlhf.core.field import LEVEL
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.geometry.files.model import Model, model_from_primitives, triangle_primitive
from eg3d_rlhf.geometry.mesh_export import FieldGrid, extract_field_mesh
from eg3d_rlhf.people.judge.gold_pairs import DEGREES, KINDS, damaged_model
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import VIEW_MODES
from eg3d_rlhf.people.judge.view_maps import images_of, model_maps
from eg3d_rlhf.people.label.shape_rendering import visible_parts, within_budget
from training.progress import tqdm

VISIBLE = 16  # smallest difference of a channel that counts, of 255


def head(seed: int) -> Model:
    """Return a bundled head as a mesh with vertex colours."""
    import torch

    generator = load_generator(None).generator
    field = generator.field(ws_of_seeds(generator, [seed], 0.7))
    vertices, faces = extract_field_mesh(FieldGrid(field, 96, field.bounds.border), LEVEL)
    vertices, faces = within_budget(*visible_parts(vertices, faces), 8000)
    with torch.no_grad():
        colours = field.colour(torch.from_numpy(vertices).float()[None])[0].numpy()
    return model_from_primitives([triangle_primitive(vertices, faces, colours=colours * 255)])


@click.command()
@click.option("--heads", default=2, help="Number of heads.")
@click.option("--resolution", default=192, help="Pixels per side of a view.")
def main(heads: int, resolution: int) -> None:
    """Measure the visible change of damaged heads by kind, degree and view mode."""
    rig = Rig(resolution=resolution)
    shares: dict[tuple[str, str, str], list[float]] = {}
    with tqdm(total=heads * len(KINDS) * len(DEGREES), desc="rendering", unit="render") as progress_bar:
        for seed in range(heads):
            model = head(seed)
            intact_maps = model_maps(model, rig)
            for kind in KINDS:
                for degree in DEGREES:
                    maps = model_maps(damaged_model(model, kind, degree, seed), rig)
                    is_asset = (maps.opacity > 0.5) | (intact_maps.opacity > 0.5)
                    for mode in VIEW_MODES:
                        before, after = (
                            images_of(shown, mode, rig.ground).astype(int) for shown in (intact_maps, maps)
                        )
                        is_changed = np.abs(before - after).max(axis=-1) > VISIBLE
                        share = float((is_changed & is_asset).sum() / is_asset.sum())
                        shares.setdefault((kind, degree, mode), []).append(share)
                    progress_bar.update()
    rows = [("kind", "degree", *VIEW_MODES)]
    for kind in KINDS:
        for degree in DEGREES:
            rows.append(
                (kind, degree, *(f"{np.mean(shares[kind, degree, mode]):.0%}" for mode in VIEW_MODES))
            )
    click.echo(aligned(rows))


if __name__ == "__main__":
    main()
