"""The occupancy autoencoder with group norms against the same written out in float64; of layer norms tests/compat has reference values."""

import pytest
import torch
import torch.nn.functional as F

from eg3d_rlhf.models.trellis.structure_vae import StructureDecoder, StructureEncoder, StructureVAEConfig

SMALL = dict(latent_channels=3, num_res_blocks=1, num_res_blocks_middle=1, norm_type="group")


class Oracle:
    """Layers by their names in a state dict, float64."""

    def __init__(self, model):
        self.p = {name: value.double() for name, value in model.state_dict().items()}

    def conv(self, x, name, **options):
        return F.conv3d(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"], **options)

    def norm(self, x, name):
        """Each sample's groups of C / 32 channels have mean 0 and deviation 1."""
        out = torch.empty_like(x)
        size = x.shape[1] // 32
        for one, into in zip(x, out, strict=True):
            for g in range(32):
                group = one[g * size : (g + 1) * size]
                into[g * size : (g + 1) * size] = (group - group.mean()) / (group.var(correction=0) + 1e-5).sqrt()
        return out * self.p[f"{name}.weight"].view(-1, 1, 1, 1) + self.p[f"{name}.bias"].view(-1, 1, 1, 1)

    def residual(self, x, name):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", padding=1)
        return x + self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", padding=1)

    def out(self, x):
        return self.conv(F.silu(self.norm(x, "out_layer.0")), "out_layer.2", padding=1)


def drawn(model, seed=0):
    """Norms of a fresh network are the identity; here they are not."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "out_layer.0" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def test_encoder_with_group_norms():
    torch.manual_seed(0)
    model = drawn(StructureEncoder(StructureVAEConfig(in_channels=1, channels=(32, 64), **SMALL)))
    x, o = (torch.rand(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float(), Oracle(model)
    h = o.residual(o.conv(x.double(), "input_layer", padding=1), "blocks.0")
    h = o.residual(o.conv(h, "blocks.1.conv", stride=2), "blocks.2")
    want = o.out(o.residual(h, "middle_block.0"))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(model(x), 1).double(), want, rtol=1e-5, atol=1e-5)


def test_decoder_with_group_norms():
    torch.manual_seed(0)
    model = drawn(StructureDecoder(StructureVAEConfig(out_channels=1, channels=(64, 32), **SMALL)))
    x, o = torch.randn(2, 3, 2, 2, 2, generator=torch.Generator().manual_seed(1)), Oracle(model)
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


def test_norms_that_are_refused():
    with pytest.raises(ValueError, match="expected norm_type layer or group, got 'batch'"):
        StructureVAEConfig(in_channels=1, channels=(32,), **{**SMALL, "norm_type": "batch"})
    with pytest.raises(ValueError, match=r"expected channels in multiples of 32 with norm_type 'group', got \[8, 32\]"):
        StructureVAEConfig(in_channels=1, channels=(8, 32), **SMALL)
