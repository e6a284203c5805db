"""Agreement of methods, rewards with re-drawn weights, and what is shown on the surface."""

import json
import re

import numpy as np
import pytest
import torch

from eg3d_rlhf.core.spec import SlabSpec
from eg3d_rlhf.evaluation.attribution.attribution_report import (
    diverging_colours,
    labels_at,
    region_colours,
    render_coloured_mesh,
    slab_index,
    voxels_at,
)
from eg3d_rlhf.evaluation.attribution.regions import face_partition
from eg3d_rlhf.evaluation.attribution.shapley import agreement, randomise_weights
from eg3d_rlhf.experiments.pages import ColouredMesh, Layer, mesh_page
from eg3d_rlhf.geometry.mesh import extract_mesh
from eg3d_rlhf.rewards.ensembles import build_network
from eg3d_rlhf.rewards.presets import preset

SPEC = SlabSpec(resolution=48)


def test_agreement_per_latent_and_overall():
    a = np.random.default_rng(0).standard_normal((5, 9))
    result = agreement({"one": a, "same": 2 * a, "opposite": -a})
    assert [(e["first"], e["second"]) for e in result] == [
        ("one", "same"),
        ("one", "opposite"),
        ("same", "opposite"),
    ]
    assert (
        result[0]["spearman"]["mean"]["mean"] == pytest.approx(1)
        and len(result[0]["kendall"]["per_latent"]) == 5
    )
    assert result[1]["spearman"]["overall"] == pytest.approx(-1)


def test_redrawn_weights_keep_scale_and_forget_the_rest():
    torch.manual_seed(0)
    reward = build_network("sigma", preset("tiny").network).eval()
    other = randomise_weights(reward, 1)
    same = randomise_weights(reward, 1)
    for (name, a), b, c in zip(reward.named_parameters(), other.parameters(), same.parameters(), strict=True):
        assert torch.equal(b, c) and not b.requires_grad, name
        if a.numel() > 500:
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.2)
            assert abs(np.corrcoef(a.detach().flatten(), b.flatten())[0, 1]) < 0.2


def ball():
    spec = SlabSpec.cube(24)
    points = spec.points()
    return extract_mesh(10 + 100 * (0.3 - points.norm(dim=-1)), spec)


def test_slab_index_of_grid_points():
    points = SPEC.points().reshape(-1, 3).numpy()
    expected = np.stack(np.meshgrid(*(np.arange(n) for n in SPEC.shape), indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    np.testing.assert_allclose(slab_index(points, SPEC), expected, atol=1e-4)
    assert (
        labels_at(points, face_partition(SPEC), SPEC) == face_partition(SPEC).labels.flatten().numpy()
    ).all()


def test_voxels_on_the_surface():
    voxels = torch.zeros(SPEC.shape)
    voxels[10, 11, 12] = 2.0
    points = SPEC.points()
    at = np.stack(
        [
            points[10, 11, 12].numpy(),
            points[11, 12, 13].numpy(),
            points[0, 0, 0].numpy(),
            np.array([0.49, 0, 0]),
        ]
    )
    np.testing.assert_allclose(voxels_at(at, voxels, SPEC), [2, 2, 0, 0], atol=1e-3)


def test_colours_and_render():
    vertices, faces = ball()
    colours = diverging_colours(vertices[:, 0], 0.3)
    assert tuple(diverging_colours(np.array([0.3, 0.0, -9.0]), 0.3).flatten()) == (
        213,
        94,
        0,
        235,
        235,
        235,
        0,
        114,
        178,
    )
    drawn = render_coloured_mesh(vertices, faces, colours, resolution=64)
    assert (
        (drawn[0, 0] == 255).all()
        and drawn[32, 18, 2] > drawn[32, 18, 0]
        and drawn[32, 46, 0] > drawn[32, 46, 2]
    )
    grey = region_colours(np.array([-1, 0]))
    assert tuple(grey[0]) == (160, 160, 160)


def test_mesh_page_needs_nothing_from_elsewhere():
    vertices, faces = ball()
    layer = Layer(
        name="a </script> b", colours=np.zeros((len(vertices), 3)), legend=[("raises <it>", (1, 2, 3))]
    )
    text = mesh_page([ColouredMesh(name="seed 1", vertices=vertices, faces=faces, layers=[layer])], "A & B")
    assert text.count("</script>") == 1 and "A &amp; B" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "http" not in text.replace("http-equiv", "")
    values = json.loads(re.search(r"const MESHES = (.*);\n", text).group(1))
    assert values[0]["layers"][0]["legend"] == [["raises <it>", "rgb(1, 2, 3)"]]
