"""What a generator makes, to look at: images beside real ones, and shapes from two views, with the numbers of the seeds.

Letters: N latents, R pixels per edge.
"""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from eg3d_rlhf.core.field import RenderOptions, render_each
from eg3d_rlhf.evaluation.pictures import PITCH, USUAL, YAW, PictureOptions
from eg3d_rlhf.experiments.media.sheet import Row, sheet, to_uint8
from eg3d_rlhf.generators import Generator, camera, device_of, latents, ws_of_seeds
from eg3d_rlhf.geometry.level_set import LevelSet
from eg3d_rlhf.measures.surface_view import SUPERSAMPLE, look, paint, shrink
from training.dataset import ImageFolderDataset

COLUMNS = 8
THUMB = 112  # least pixels per edge of an image


def image_sheet(
    generator: Generator, dataset: ImageFolderDataset, seeds: Sequence[int], psi: float, samples: int = USUAL.samples
) -> np.ndarray:
    """Images of seeds beside as many of the data, each pair under one camera: uint8 [H, B, 3].

    The data's are drawn by the first seed.
    """
    chosen = np.random.RandomState(seeds[0]).permutation(len(dataset))[: len(seeds)]
    real = torch.stack([torch.from_numpy(dataset[int(i)][0]) for i in chosen]).float().expand(-1, 3, -1, -1) / 255
    labels = torch.from_numpy(dataset.get_labels()[chosen]).to(device_of(generator))
    fake = []
    with torch.no_grad():
        for seed, label in zip(tqdm(seeds, desc="images", unit="image"), labels.split(1), strict=True):
            z = latents([seed], generator.z_dim).to(label.device)
            field = generator.field(generator.mapping(z, label, truncation_psi=psi))
            fake.append(render_each(field, [label], RenderOptions(samples=samples), seed)[0].image[0].float().cpu() / 2 + 0.5)
    blocks = [
        sheet(title, _rows([to_uint8(picture.movedim(0, -1)) for picture in _enlarged(images)]))
        for title, images in ((f"{len(seeds)} generated, psi {psi:g}", torch.stack(fake)), (f"{len(real)} of the data", real))
    ]
    return np.concatenate(blocks, axis=1)


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, R, R] at a multiple of their size that is at least THUMB."""
    factor = max(1, -(-THUMB // images.shape[-1]))
    return torch.nn.functional.interpolate(images, scale_factor=factor, mode="bicubic") if factor > 1 else images


def shape_sheet(generator: Generator, seeds: Sequence[int], psi: float, o: PictureOptions = USUAL) -> np.ndarray:
    """Shapes of seeds, each from the front above a three-quarter view: uint8 [H, B, 3]."""
    front: list[np.ndarray] = []
    turned: list[np.ndarray] = []
    for seed in tqdm(seeds, desc="shapes", unit="shape"):
        with torch.no_grad():
            surface = LevelSet.of(generator.field(ws_of_seeds(generator, [seed], psi)), o.resolution)
        for yaw, views in ((0.0, front), (YAW, turned)):
            view = look(surface, camera(generator, yaw, PITCH), o.film * SUPERSAMPLE)
            views.append(to_uint8(shrink(paint(view)).cpu()))
    rows = []
    for start in range(0, len(seeds), COLUMNS):
        part = slice(start, start + COLUMNS)
        rows += [Row(cells=front[part], parted=start > 0), Row(cells=turned[part], captions=[f"seed {seed}" for seed in seeds[part]])]
    return sheet("", rows)


def _rows(cells: Sequence[np.ndarray]) -> list[Row]:
    return [Row(cells=cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)]
