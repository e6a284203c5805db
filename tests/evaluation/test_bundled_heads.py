"""Shapes of the bundled generator of heads: faces match the ground truth, and backs differ from it."""

import itertools

import numpy as np
import pytest

from eg3d_rlhf.core.seeds import LATENTS
from eg3d_rlhf.evaluation import heads
from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.measures.people import VOXEL, back_of_head, face_depth, face_relief, relief_correlation
from training.heads.people_mesh import grid_points

pytestmark = pytest.mark.long
SEEDS = LATENTS.take(100)


@pytest.fixture(scope="module")
def generator():
    return load_generator().generator


@pytest.fixture(scope="module")
def ground_truth(generator):
    return heads.ground_truth_heads(generator, SEEDS)


def test_faces_are_those_that_latents_name(generator, ground_truth):
    scans = heads.sample_shapes(generator, SEEDS, psi=0.7)
    pairs = list(zip(scans, ground_truth, strict=True))
    alike = [relief_correlation(face_relief(scan), face_relief(head)) for scan, head in pairs]
    distances = [np.nanmedian(np.abs(face_depth(scan) - face_depth(head))) / VOXEL for scan, head in pairs]
    enough = np.sum(np.array(alike) >= 0.9)
    print(
        f"relief: median {np.median(alike):.3f}, {enough} of 100 at least .9; distance"
        f" {np.median(distances):.3f} voxel"
    )
    assert enough >= 90 and np.median(distances) <= 0.25


def back_depth(values: np.ndarray) -> np.ndarray:
    """Return z [n, n] of the rearmost surface at the back, world units; NaN where there is none."""
    points = grid_points(len(values))
    here = (values < 0) & back_of_head(points)
    return np.where(here.any(axis=2), points[0, 0, here.argmax(axis=2), 2], np.nan)


def test_backs_differ(generator, ground_truth):
    scans = heads.sample_shapes(generator, SEEDS[:40])
    depths = [back_depth(scan) for scan in scans]
    apart = [a - b for a, b in itertools.combinations(depths, 2) if np.isfinite(a - b).any()]
    pairs = [np.nanmedian(np.abs(difference)) / VOXEL for difference in apart]
    defective = heads.find_defective(heads.measure_heads(scans, ground_truth[: len(scans)])).mean()
    print(
        f"backs of two latents differ by {np.median(pairs):.2f} voxels in the median; {defective:.0%} of 40"
        " are defective"
    )
    assert np.median(pairs) >= 1
