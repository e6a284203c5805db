"""SAM 3D's networks apart from their reference values (tests/compat/test_family_sam3d.py): independence of
batches, the step size, and the transforms of points.
"""

import pytest
import torch

from eg3d_rlhf.models.sam3d import (
    REMAPS,
    LatentConfig,
    MixtureConfig,
    MixtureFlow,
    VoxelFlow,
    VoxelFlowConfig,
    remapped,
)
from tests.models.test_trellis_flows import SMALL, inputs
from tests.rejections import raising

POSE = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
LATENTS = {"shape": LatentConfig(in_channels=2, tokens=8, resolution=2)} | {
    name: LatentConfig(in_channels=channels, tokens=1) for name, channels in POSE.items()
}
SIZES = dict(
    latents=LATENTS,
    model_channels=12,
    cond_channels=5,
    num_blocks=2,
    num_heads=2,
    mlp_ratio=2,
    is_shortcut_model=True,
    qk_rms_norm=True,
    latent_share_transformer={"6drotation_normalized": tuple(POSE)},
)


def flow(**changes):
    torch.manual_seed(0)
    return MixtureFlow(MixtureConfig(**{**SIZES, **changes})).eval()


def drawn(size=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = {
        name: torch.randn(size, latent.tokens, latent.in_channels, generator=g)
        for name, latent in LATENTS.items()
    }
    return x, torch.rand(size, generator=g), torch.randn(size, 3, 5, generator=g)


@torch.no_grad()
def test_a_sample_is_the_same_in_any_batch():
    model = flow()
    x, t, cond = drawn(3)
    together = model(x, t, cond)
    alone = model({name: part[1:2] for name, part in x.items()}, t[1:2], cond[1:2])
    for name, part in alone.items():
        torch.testing.assert_close(part, together[name][1:2], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_latents_and_steps_that_do_not_fit_are_rejected():
    model = flow()
    x, t, cond = drawn()
    with raising("MixtureFlow.x_t", "6drotation_normalized", "scale, shape."):
        model({name: x[name] for name in ("shape", "scale")}, t, cond)
    with raising("[0.5, 0.5]"):
        flow(is_shortcut_model=False)(x, t, cond, torch.full([2], 0.5))
    with raising("[0.0, 0.0]"):
        VoxelFlow(VoxelFlowConfig(**SMALL))(*inputs(), torch.zeros(2))
    with raising("MixtureConfig", "'shape'", "'all'"):
        flow(latent_share_transformer={"all": tuple(LATENTS)})


def test_points_are_transformed_by_their_formulas():
    x, y, z = point = (0.5, -2.0, 4.0)

    def asinh(v):
        return float(torch.tensor(v).asinh())

    def log(v):
        return float(torch.tensor(v).log())

    want = {
        "linear": point,
        "sinh": tuple(map(asinh, point)),
        "exp": (x / (1 + z), y / (1 + z), log(1 + z)),
        "exp_disparity": (x / z, y / z, log(z)),
        "sinh_exp": (asinh(x), asinh(y), log(z)),
    }
    assert set(want) == set(REMAPS)
    for how, values in want.items():
        assert remapped(torch.tensor(point)[None], how)[0].tolist() == pytest.approx(values, rel=1e-6)
