"""The face detector finds ground-truth heads from the front, and neither backs of heads nor noise."""

import math

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.field import RenderOptions
from eg3d_rlhf.core.seeds import IMAGES
from eg3d_rlhf.generators import load_generator, ws_of_seeds
from eg3d_rlhf.measures.image_metrics import detect_faces
from training.heads.people import heads_from_latents, render_head
from training.rendering.cameras import (
    FFHQ_FOCAL,
    FFHQ_RADIUS,
    camera_position,
    intrinsics_matrix,
    look_at,
    pack_label,
)


def pose(yaw: float) -> torch.Tensor:
    """Return cam2world [1, 4, 4] of a horizontal camera; yaw in radians from frontal."""
    angles = (
        torch.tensor([[math.pi / 2 + yaw]], dtype=torch.float64),
        torch.tensor([[math.pi / 2]], dtype=torch.float64),
    )
    return look_at(camera_position(*angles, FFHQ_RADIUS), torch.zeros(3, dtype=torch.float64)).float()


def renders(yaw: float, n: int = 6) -> torch.Tensor:
    heads = heads_from_latents(np.random.default_rng(5).standard_normal((n, 64)))
    images = np.stack([render_head(head, pose(yaw)[0].numpy(), FFHQ_FOCAL, 128)[0] for head in heads])
    return torch.from_numpy(images).float().permute(0, 3, 1, 2) * 2 - 1


def test_ground_truth_heads_have_a_face_only_from_the_front():
    assert detect_faces(renders(0.0)).mean() >= 0.5
    assert not detect_faces(renders(math.pi)).any()
    assert not detect_faces(torch.rand(2, 3, 64, 64) * 2 - 1).any()


@pytest.mark.long
def test_the_bundled_generator_generates_faces():
    generator = load_generator().generator
    camera = pack_label(pose(0.0), intrinsics_matrix(FFHQ_FOCAL))
    detections = []
    for ws in ws_of_seeds(generator, IMAGES.take(24), truncation_psi=0.7).split(4):
        with torch.no_grad():
            detections.append(
                detect_faces(
                    generator.field(ws)
                    .render(camera.expand(len(ws), -1), RenderOptions(resolution=128))
                    .image
                )
            )
    assert np.concatenate(detections).mean() >= 0.5
