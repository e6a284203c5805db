"""Estimates for rendered heads whose cameras are known, and the way from photographs to an inverted head.

    python -m pytest tests/photographs/test_known_cameras.py -s

prints the errors that docs/guides/photographs.md states.
"""

import json
import math
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

import eg3d_rlhf
from eg3d_rlhf.photographs.face_geometry import angles_of
from eg3d_rlhf.photographs.poses import FacePose
from tests.photographs import heads
from tests.photographs.test_poses import CORNERS, corner_error

SEED = 0  # of the heads of the first set
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


def render_views(seed: int) -> list[tuple[int, float, float, PIL.Image.Image]]:
    """Six heads in 13 views of 512 pixels: number of the head, yaw, pitch, image."""
    return [
        (number, yaw, pitch, heads.render(head, yaw, pitch, 512))
        for number, head in enumerate(heads.heads(6, seed=seed))
        for yaw, pitch in heads.VIEWS
    ]


@pytest.fixture(scope="module")
def views() -> list[tuple[int, float, float, PIL.Image.Image]]:
    return render_views(SEED)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix)
    return left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right


def degrees_of(rotation: np.ndarray) -> float:
    return math.degrees(math.acos(np.clip((np.trace(rotation) - 1) / 2, -1, 1)))


def rotation_of(pose: FacePose) -> np.ndarray:
    return pose.label[:16].reshape(4, 4)[:3, :3]


# The mean error depends on the heads. The two further sets were measured after the first one.
@pytest.mark.parametrize("seed, bound", [(SEED, 4), (7, 5), (11, 5)])
def test_known_cameras_are_estimated(views, seed, bound):
    """All 78 views are found; without each head's constant, the mean error is at most 4 degrees on the first
    set of heads.
    """
    views = views if seed == SEED else render_views(seed)
    # Parallel to the photograph, so that the camera has the roll of the renderer, which is 0.
    results = eg3d_rlhf.poses_of([image for *_, image in views], keep_roll=True)
    assert [result.faces for result in results] == [1] * len(views)
    errors = []
    yaw_errors = []
    for number in range(6):
        estimates = []
        truths = []
        for (head, yaw, pitch, _), result in zip(views, results, strict=True):
            if head == number:
                estimates.append(rotation_of(result.poses[0]))
                truths.append(heads.pose_at(yaw, pitch)[:3, :3])
        # The axes of a rendered head differ from those of the canonical face by a constant rotation.
        constant = nearest_rotation(sum(t @ e.T for t, e in zip(truths, estimates, strict=True)))
        for truth, estimate in zip(truths, estimates, strict=True):
            errors.append(degrees_of(truth.T @ constant @ estimate))
            yaws = []
            for rotation in (truth, constant @ estimate):
                pose = np.eye(4)
                pose[:3, :3] = rotation
                yaws.append(angles_of(np.concatenate([pose.ravel(), np.eye(3).ravel()]))[0])
            yaw_errors.append(abs(yaws[0] - yaws[1]))
    raw = [
        degrees_of(heads.pose_at(yaw, pitch)[:3, :3].T @ rotation_of(result.poses[0]))
        for (_, yaw, pitch, _), result in zip(views, results, strict=True)
    ]
    print(
        f"\n{len(errors)} views: mean error {np.mean(raw):.2f} degrees, without constants"
        f" {np.mean(errors):.2f} (median {np.median(errors):.2f}, largest {max(errors):.2f}); yaw"
        f" {np.mean(yaw_errors):.2f} (largest {max(yaw_errors):.2f})"
    )
    for yaw in (0, 20, 40, 60):
        chosen = [
            error for error, (_, view_yaw, *_) in zip(errors, views, strict=True) if abs(view_yaw) == yaw
        ]
        print(f"yaw {yaw}: mean error {np.mean(chosen):.2f} of {len(chosen)} views")
    assert np.mean(errors) <= bound
    assert np.mean(yaw_errors) <= 4


@pytest.mark.parametrize(
    "scale, degrees", [(0.7, 0), (1.6, 0), (1, -10), (1, 10), (0.8, 90), (1.3, 180), (1, 35)]
)
def test_crops_follow_pasted_heads(views, scale, degrees):
    """The mean corner is within 8 pixels of 512, at other scales and turns; upside down within 10."""
    images = [image for _, yaw, pitch, image in views if pitch == 0 and abs(yaw) <= 20]
    expected = eg3d_rlhf.poses_of(images)
    pasted = [
        heads.pasted(image, scale, degrees, (1200, 1000), (610, 505), seed)
        for seed, image in enumerate(images)
    ]
    errors = []
    for before, after, (_, forward) in zip(
        expected, eg3d_rlhf.poses_of([photograph for photograph, _ in pasted]), pasted, strict=True
    ):
        corners = before.poses[0].frame.to_photograph(CORNERS, 1) @ forward[:, :2].T + forward[:, 2]
        errors.append(corner_error(after.poses[0].frame, corners))
    print(
        f"\nscale {scale}, {degrees} degrees: mean corner {np.mean(errors):.2f}, largest {max(errors):.2f} px"
    )
    # The landmarks of a face upside down are refined from a worse first guess, which costs a pixel.
    assert max(errors) < (10 if degrees == 180 else 8)


def command(*words: object) -> str:
    """Run a command of the guide in a process of its own, and return its output."""
    result = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_photographs_become_a_set_that_trains_and_a_head_that_is_inverted(repo, tmp_path):
    """The commands of docs/guides/photographs.md, on smaller heads: photographs, set, one tick, inversion."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, head in enumerate(heads.heads(6, seed=3)):
        heads.render(head, -25 + 10 * number, 0, 256).save(photos / f"{number}.png")
    faces = tmp_path / "faces"
    command("-m", "eg3d_rlhf", "data", "poses", photos, f"--outdir={faces}", "--jobs=1")
    assert len(json.loads((faces / "dataset.json").read_text())["labels"]) == 6
    runs = tmp_path / "runs"
    small = ["--cbase=512", "--cmax=8", "--nrr-initial=16", "--batch=2", "--kimg=0.002", "--tick=0.002"]
    command(
        *(repo / "train.py", f"--data={faces}", "--cfg=ffhq", "--init=scratch", "--gamma=1", *small),
        *(f"--outdir={runs}", "--device=cpu"),
    )
    (network,) = runs.glob("*/network-snapshot-*.safetensors")
    output = command(
        *("-m", "eg3d_rlhf", "generator", "invert", f"--network={network}", f"--image={photos / '3.png'}"),
        *("--weights=0", "--set=w_steps=2", "--set=pivot_steps=1", "--set=turns=0", "--set=shape_res=32"),
        *(f"--outdir={tmp_path / 'inverted'}", "--device=cpu"),
    )
    assert "photograph-crop.png" in output
    (folder,) = (tmp_path / "inverted").iterdir()
    with PIL.Image.open(folder / "photograph-crop.png") as crop:
        assert crop.size == (512, 512)
    record = json.loads((folder / "training_options.json").read_text())["photograph"]
    stored = dict(json.loads((faces / "dataset.json").read_text())["labels"])["3.png"]
    # the same photograph has the same camera in the set and in the inversion
    assert np.allclose(record["label"], stored, atol=1e-4)
    assert torch.isfinite(torch.tensor(record["frame"])).all()
