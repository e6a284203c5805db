"""TRELLIS's second flow, its encoder and its Gaussian decoder against reference values (fixtures/trellis): random weights, real spconv."""

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis.autoencoders import GaussianDecoder, GaussianDecoderConfig, LatentEncoder, LatentEncoderConfig
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig
from eg3d_rlhf.models.trellis.sparse_conv import downsample
from eg3d_rlhf.tuning.flow.generate import trajectory
from eg3d_rlhf.tuning.flow.stage import FlowPath, FlowStage, Sampling, SparseVoxels
from tests.compat.trellis_reference import GRADIENT, assert_like_table, close, config_of, read, state_of

TEXT = dict(
    resolution=64, in_channels=8, out_channels=8, model_channels=1024, cond_channels=768, num_blocks=24, num_heads=16, mlp_ratio=4,
    patch_size=2, num_io_res_blocks=2, io_block_channels=[128], pe_mode="ape", qk_rms_norm=True, use_fp16=True,
)  # fmt: skip
AUTOENCODER = dict(
    resolution=64, model_channels=768, latent_channels=8, num_blocks=12, num_heads=12, mlp_ratio=4, attn_mode="swin", window_size=8,
    use_fp16=True,
)
GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1}, "perturb_offset": True, "voxel_size": 1.5,
    "num_gaussians": 32, "2d_filter_kernel_size": 0.1, "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}  # fmt: skip
TABLES = {
    "slat_flow_txt_dit_L_64l8p2_fp16__denoiser": lambda: LatentFlow(LatentFlowConfig(**TEXT)),
    "slat_flow_img_dit_L_64l8p2_fp16__denoiser": lambda: LatentFlow(LatentFlowConfig(**{**TEXT, "cond_channels": 1024})),
    "slat_vae_enc_dec_gs_swin8_B_64l8_fp16__encoder": lambda: LatentEncoder(LatentEncoderConfig(in_channels=1024, **AUTOENCODER)),
    "slat_vae_enc_dec_gs_swin8_B_64l8_fp16__decoder": lambda: GaussianDecoder(
        GaussianDecoderConfig(representation_config=GAUSSIANS, **AUTOENCODER)
    ),
}


@pytest.fixture(scope="module")
def folder(fixtures_dir):
    return fixtures_dir / "trellis"


@pytest.fixture(scope="module")
def flow_values(folder):
    return read(folder / "slat_flow.npz")


@pytest.fixture(scope="module")
def vae_values(folder):
    return read(folder / "slat_vae.npz")


@pytest.fixture
def flow(flow_values):
    model = LatentFlow(LatentFlowConfig(**config_of(flow_values)))
    model.load_state_dict(state_of(flow_values, "sd/"), strict=True)
    return model


def batch_of(values, name):
    return SparseBatch(values["coords"], values[name], int(values["coords"][:, 0].max()) + 1)


@pytest.mark.parametrize("name", TABLES)
def test_full_size_parameters_have_trellis_names_shapes_and_types(folder, name):
    assert_like_table(folder / "params" / f"{name}.tsv", TABLES[name])


def test_flow_output(flow, flow_values):
    t = flow_values["t"].double() / 1000  # stored as the network reads it
    with torch.no_grad():
        close(flow(batch_of(flow_values, "x_feats"), t, flow_values["cond"]).feats, flow_values["y_feats"])


def test_convolution(flow, flow_values):
    with torch.no_grad():
        out = flow.input_blocks[0].conv1(batch_of(flow_values, "conv1_in"))
    close(out.feats, flow_values["conv1_out"])


def test_downsampling(flow_values):
    got = downsample(batch_of(flow_values, "conv1_in"))
    assert torch.equal(got.coords, flow_values["down_coords"])
    close(got.feats, flow_values["down_feats"])


def flow_matching_loss(flow, values):
    path, x_0, eps = FlowPath(), batch_of(values, "fm_x0"), batch_of(values, "fm_noise")
    v = flow(path.mix(x_0, values["fm_t"], eps), values["fm_t"], values["cond"])
    return (v.feats - path.velocity(x_0, eps).feats).square().mean()  # TRELLIS's own: one mean over the whole batch


@pytest.mark.parametrize("recompute", [False, True])
def test_flow_matching_loss_and_gradients(flow, flow_values, recompute):
    flow.recompute = recompute
    loss = flow_matching_loss(flow, flow_values)
    close(loss, flow_values["fm_loss"])
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in flow.parameters()]).norm()
    close(norm, flow_values["fm_grad_norm"], GRADIENT)
    want = flow_values["fm_grad_conv1"]
    got = flow.input_blocks[0].conv1.conv.weight.grad
    assert (got - want).norm() <= GRADIENT * want.norm()


def test_sampler_with_guidance_on_an_interval(flow, flow_values):
    stage = FlowStage(name="latent", model=flow, latents=SparseVoxels(channels=4, resolution=8))
    no_cond = flow_values["smp_neg"].expand_as(flow_values["cond"])
    sampling = Sampling(steps=4, cfg_strength=5.0, cfg_interval=(0.5, 1.0), rescale_t=3.0)
    found = list(trajectory(stage, batch_of(flow_values, "smp_noise"), flow_values["cond"], no_cond, sampling))
    close(torch.stack([x.feats for x, _ in found]), flow_values["smp_x_t"])
    close(torch.stack([x_0.feats for _, x_0 in found]), flow_values["smp_x_0"])


def test_encoder(vae_values):
    model = LatentEncoder(LatentEncoderConfig(**config_of(vae_values)["encoder"]))
    model.load_state_dict(state_of(vae_values, "enc/"), strict=True)
    with torch.no_grad():
        mean, logvar = model(batch_of(vae_values, "feats"))
    close(mean.feats, vae_values["mean"])
    close(logvar.feats, vae_values["logvar"])


def test_gaussian_decoder(vae_values):
    model = GaussianDecoder(GaussianDecoderConfig(**config_of(vae_values)["decoder"]))
    close(model.offset_perturbation, vae_values["dec/offset_perturbation"])
    model.load_state_dict(state_of(vae_values, "dec/"), strict=True)
    with torch.no_grad():
        found = model(batch_of(vae_values, "mean"))
    assert len(found) == 2
    for i, gaussians in enumerate(found):
        for name in ("xyz", "features_dc", "scaling", "rotation", "opacity"):
            want = vae_values[f"gs{i}_{name}"]
            assert getattr(gaussians, name).shape == want.shape, name
            close(getattr(gaussians, name), want)
