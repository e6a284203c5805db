"""Encoder and Gaussian decoder: windows, activations, and settings that do not fit."""

import math

import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis.autoencoders import (
    GaussianDecoder,
    GaussianDecoderConfig,
    Gaussians,
    LatentEncoder,
    LatentEncoderConfig,
    StructureDecoder,
    StructureEncoder,
    StructureVAEConfig,
    perturbation,
)
from eg3d_rlhf.models.trellis.blocks import position_embedding
from tests.models.test_sparse_attention import along_curve, oracle
from tests.models.test_sparse_conv import R, random_batch
from tests.rejections import raising

SETTINGS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 4,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 4e-3,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}
SMALL = dict(resolution=R, model_channels=12, latent_channels=3, num_blocks=2, num_heads=2, window_size=2)


def gaussian_settings(**changes):
    return GaussianDecoderConfig(representation_config={**SETTINGS, **changes}, **SMALL).gaussians


def encoder(**changes):
    torch.manual_seed(0)
    return LatentEncoder(LatentEncoderConfig(in_channels=3, **{**SMALL, **changes}))


def decoder(**changes):
    torch.manual_seed(0)
    return GaussianDecoder(GaussianDecoderConfig(representation_config={**SETTINGS, **changes}, **SMALL))


CHANGES = [
    {},
    {"attn_mode": "full"},
    {"attn_mode": "shift_window"},
    {"qk_rms_norm": True},
    {"use_checkpoint": True},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_encodes_every_voxel_and_trains_every_parameter(changes):
    x = random_batch(dtype=torch.float32)
    model = encoder(**changes)
    mean, logvar = model(x)
    assert mean.feats.shape == logvar.feats.shape == (len(x.coords), 3) and mean.coords is x.coords
    (mean.feats.sum() + logvar.feats.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def reached(blocks):
    """Return the voxels along a full axis whose features the output at voxel 0 depends on."""
    coords = torch.zeros(R, 4, dtype=torch.int32)
    coords[:, 1] = torch.arange(R)
    feats = torch.randn(R, 3, requires_grad=True)
    mean, _ = encoder(num_blocks=blocks)(SparseBatch(coords, feats, 1))
    return torch.autograd.grad(mean.feats[0].sum(), feats)[0].abs().sum(1).nonzero().flatten().tolist()


def test_every_other_block_attends_across_the_borders_of_windows():
    assert reached(1) == [0, 1]  # windows of two voxels
    assert reached(2) == [0, 1]  # shifted by one: voxel 0 is alone in its own
    assert reached(3) == [0, 1, 2, 3]


@pytest.mark.parametrize(("mode", "odd"), [("shift_window", {"shift": 16}), ("shift_sequence", {"start": 1})])
def test_windows_along_the_curve_of_every_block(mode, odd):
    """Compare the encoder in float64 with masked attention; every other block has another curve, or other
    cuts.
    """
    x = random_batch(dtype=torch.float32)
    model = encoder(attn_mode=mode, window_size=3, num_blocks=3)
    x.coords[:, 1:] *= 11  # far enough apart that 16 voxels make another curve
    p = {name: value.double() for name, value in model.state_dict().items()}
    together = [along_curve(x, 3), along_curve(x, 3, **odd)]
    assert not torch.equal(*together)

    def linear(h, name):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(h, eps):
        return (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + eps).sqrt()

    h = linear(x.feats.double(), "input_layer") + position_embedding(x.coords[:, 1:], 12).double()
    for i in range(3):
        q, k, v = linear(norm(h, 1e-6), f"blocks.{i}.attn.to_qkv").view(-1, 3, 2, 6).unbind(1)
        h = h + linear(oracle(q, k, v, together[i % 2]).flatten(1), f"blocks.{i}.attn.to_out")
        inner = F.gelu(linear(norm(h, 1e-6), f"blocks.{i}.mlp.mlp.0"), approximate="tanh")
        h = h + linear(inner, f"blocks.{i}.mlp.mlp.2")
    want = linear(norm(h, 1e-5), "out_layer")
    with torch.no_grad():
        got = torch.cat([part.feats for part in model(x)], 1)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_zeros_mean_the_biases_of_the_file(activation):
    zeros = Gaussians(
        xyz=torch.full([1, 3], 0.5),
        features_dc=torch.zeros(1, 1, 3),
        scaling=torch.zeros(1, 3),
        rotation=torch.zeros(1, 4),
        opacity=torch.zeros(1, 1),
        settings=gaussian_settings(scaling_activation=activation),
    )
    assert zeros.means.tolist() == [[0, 0, 0]] and zeros.rotations.tolist() == [[1, 0, 0, 0]]
    torch.testing.assert_close(zeros.scales, torch.full([1, 3], math.hypot(4e-3, 9e-4)))
    torch.testing.assert_close(zeros.opacities, torch.tensor([[0.1]]))


def test_gaussians_stay_within_reach_of_their_voxel():
    x = random_batch(dtype=torch.float32)
    model = decoder()
    objects = model(x)
    assert [len(g.xyz) for g in objects] == (4 * x.lengths).tolist()
    centre = ((x.samples()[0].coords + 0.5) / R).repeat_interleave(4, 0)
    assert (objects[0].xyz - centre).abs().max() <= 0.5 * 1.5 / R
    assert (objects[0].scales > 0).all() and ((objects[0].opacities > 0) & (objects[0].opacities < 1)).all()
    torch.testing.assert_close(objects[0].rotations.norm(dim=1), torch.ones(len(objects[0].xyz)))


def test_without_offsets_gaussians_lie_on_a_hammersley_set():
    offsets = perturbation(gaussian_settings()).tanh() * 1.5
    want = torch.tensor([[0, 0, 0], [1 / 4, 1 / 2, 1 / 3], [2 / 4, 1 / 4, 2 / 3], [3 / 4, 3 / 4, 1 / 9]])
    torch.testing.assert_close((offsets + 1) / 2, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"voxel_size": 1.0}, ("voxel_size", "perturb_offset", "1.0")),
        (
            {"lr": {"_xyz": 1.0}},
            ("lr", "_features_dc, _scaling, _rotation, _opacity"),
        ),
        ({"scaling_activation": "relu"}, ("scaling_activation", "softplus", "'relu'")),
        ({"opacity_bias": 1.0}, ("opacity_bias", "1.0")),
        ({"sh_degree": 3}, ("representation_config", "sh_degree")),
    ],
)
def test_settings_of_gaussians_that_do_not_fit_are_rejected(changes, names):
    with raising(*names):
        decoder(**changes)


# The occupancy autoencoder with group norms against the same written out in float64; of layer norms
# tests/compat has reference values.


GRIDS = dict(latent_channels=3, num_res_blocks=1, num_res_blocks_middle=1, norm_type="group")


class Oracle:
    """The layers of a state dict by name, in float64."""

    def __init__(self, model):
        self.p = {name: value.double() for name, value in model.state_dict().items()}

    def conv(self, x, name, **options):
        return F.conv3d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], **options)

    def norm(self, x, name):
        """Normalise each sample's groups of C / 32 channels to mean 0 and standard deviation 1."""
        out = torch.empty_like(x)
        size = x.shape[1] // 32
        for sample, into in zip(x, out, strict=True):
            for g in range(32):
                group = sample[g * size : (g + 1) * size]
                into[g * size : (g + 1) * size] = (group - group.mean()) / (
                    group.var(correction=0) + 1e-5
                ).sqrt()
        return out * self.p[f"{name}.weight"].view(-1, 1, 1, 1) + self.p[f"{name}.bias"].view(-1, 1, 1, 1)

    def residual(self, x, name):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        return x + self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)

    def out(self, x):
        return self.conv(F.silu(self.norm(x, "out_layer.0")), "out_layer.2", padding=1)


def drawn(model, seed=0):
    """Randomise the norms of a fresh network, which would otherwise be the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "out_layer.0" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def test_encoder_with_group_norms():
    torch.manual_seed(0)
    model = drawn(StructureEncoder(StructureVAEConfig(in_channels=1, channels=(32, 64), **GRIDS)))
    x = (torch.rand(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    o = Oracle(model)
    h = o.residual(o.conv(x.double(), "input_layer", padding=1), "blocks.0")
    h = o.residual(o.conv(h, "blocks.1.conv", stride=2), "blocks.2")
    want = o.out(o.residual(h, "middle_block.0"))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(model(x), 1).double(), want, rtol=1e-5, atol=1e-5)


def test_decoder_with_group_norms():
    torch.manual_seed(0)
    model = drawn(StructureDecoder(StructureVAEConfig(out_channels=1, channels=(64, 32), **GRIDS)))
    x = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    o = Oracle(model)
    h = o.residual(o.residual(o.conv(x.double(), "input_layer", padding=1), "middle_block.0"), "blocks.0")
    h = o.conv(h, "blocks.1.conv", padding=1)  # [2, 8 * 32, 2, 2, 2]
    up = torch.empty(2, 32, 4, 4, 4, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            for k in range(2):
                up[:, :, i::2, j::2, k::2] = h[:, 4 * i + 2 * j + k :: 8]
    want = o.out(o.residual(up, "blocks.2"))
    with torch.no_grad():
        torch.testing.assert_close(model(x).double(), want, rtol=1e-5, atol=1e-5)


def test_unsupported_norms_are_rejected():
    with raising("norm_type", "layer", "group", "'batch'"):
        StructureVAEConfig(in_channels=1, channels=(32,), **{**GRIDS, "norm_type": "batch"})
    with raising("channels", "32", "'group'", "[8, 32]"):
        StructureVAEConfig(in_channels=1, channels=(8, 32), **GRIDS)
