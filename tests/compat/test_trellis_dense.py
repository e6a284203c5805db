"""TRELLIS's first flow and its structure autoencoder against reference values (fixtures/trellis): random weights, two architectures."""

import pytest
import torch

from eg3d_rlhf.models.trellis.autoencoders import StructureDecoder, StructureEncoder, StructureVAEConfig, grid_of, voxels_of
from eg3d_rlhf.models.trellis.flows import StructureFlow, StructureFlowConfig, from_patches, to_patches
from eg3d_rlhf.tuning.flow.generate import trajectory
from eg3d_rlhf.tuning.flow.stage import DenseGrid, FlowPath, FlowStage, Sampling
from tests.compat.trellis_reference import GRADIENT, assert_like_table, close, config_of, read, state_of

LARGE = dict(
    resolution=16, in_channels=8, out_channels=8, model_channels=1024, num_blocks=24, num_heads=16, mlp_ratio=4, patch_size=1,
    pe_mode="ape", qk_rms_norm=True, use_fp16=True,
)
VAE = dict(latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, use_fp16=True)
TABLES = {
    "ss_flow_txt_dit_L_16l8_fp16__denoiser": lambda: StructureFlow(StructureFlowConfig(cond_channels=768, **LARGE)),
    "ss_flow_img_dit_L_16l8_fp16__denoiser": lambda: StructureFlow(StructureFlowConfig(cond_channels=1024, **LARGE)),
    "ss_vae_conv3d_16l8_fp16__encoder": lambda: StructureEncoder(StructureVAEConfig(in_channels=1, channels=(32, 128, 512), **VAE)),
    "ss_vae_conv3d_16l8_fp16__decoder": lambda: StructureDecoder(StructureVAEConfig(out_channels=1, channels=(512, 128, 32), **VAE)),
}
SAMPLINGS = {
    "euler": Sampling(steps=4, cfg_strength=0.0, rescale_t=1.0),
    "cfg": Sampling(steps=4, cfg_strength=5.0, cfg_interval=(0.0, 1.0), rescale_t=3.0),
    "interval": Sampling(steps=5, cfg_strength=7.5, cfg_interval=(0.5, 0.95), rescale_t=3.0),
}


@pytest.fixture(scope="module")
def folder(fixtures_dir):
    return fixtures_dir / "trellis"


@pytest.fixture(scope="module", params=["ss_flow_p1", "ss_flow_p2"])
def values(request, folder):
    return read(folder / f"{request.param}.npz")


@pytest.fixture
def flow(values):
    model = StructureFlow(StructureFlowConfig(**config_of(values)))
    close(model.pos_emb, values["sd/pos_emb"])
    model.load_state_dict(state_of(values, "sd/"), strict=True)
    return model


@pytest.mark.parametrize("name", TABLES)
def test_full_size_parameters_have_trellis_names_shapes_and_types(folder, name):
    assert_like_table(folder / "params" / f"{name}.tsv", TABLES[name])


def test_flow_output(flow, values):
    t = values["t"].double() / 1000  # stored as the network reads it
    with torch.no_grad():
        close(flow(values["x"], t, values["cond"]), values["y"])


@pytest.mark.parametrize("recompute", [False, True])
def test_flow_matching_loss_and_gradients(flow, values, recompute):
    flow.recompute = recompute
    path, x_0, t, eps = FlowPath(), values["fm_x0"], values["fm_t"], values["fm_noise"]
    x_t = path.mix(x_0, t, eps)
    close(x_t, values["fm_x_t"])
    close(path.velocity(x_0, eps), values["fm_target"])
    loss = path.errors(flow(x_t, t, values["cond"]), x_0, eps).mean()
    close(loss, values["fm_loss"])
    loss.backward()
    close(torch.stack([p.grad.norm() for p in flow.parameters()]).norm(), values["fm_grad_norm"], GRADIENT)
    want = values["fm_grad_block0_to_qkv"]
    assert (flow.blocks[0].self_attn.to_qkv.weight.grad - want).norm() <= GRADIENT * want.norm()


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampler(flow, values, name):
    config = config_of(values)
    kind = DenseGrid(channels=config["in_channels"], resolution=config["resolution"])
    stage = FlowStage(name="structure", model=flow, latents=kind)
    cond = values["smp_cond"]
    found = list(trajectory(stage, values["smp_noise"], cond, values["smp_neg"].expand_as(cond), SAMPLINGS[name]))
    close(torch.stack([x for x, _ in found]), values[f"smp_{name}_x_t"])
    close(torch.stack([x_0 for _, x_0 in found]), values[f"smp_{name}_x_0"])
    close(found[-1][0], values[f"smp_{name}_out"])


def test_structure_autoencoder(folder):
    values = read(folder / "ss_vae.npz")
    config = config_of(values)
    encoder = StructureEncoder(StructureVAEConfig(**config["encoder"]))
    decoder = StructureDecoder(StructureVAEConfig(**config["decoder"]))
    encoder.load_state_dict(state_of(values, "enc/"), strict=True)
    decoder.load_state_dict(state_of(values, "dec/"), strict=True)
    with torch.no_grad():
        mean, logvar = encoder(values["occ"])
        logits = decoder(values["mean"])
    close(mean, values["mean"])
    close(logvar, values["logvar"])
    close(logits, values["logits"])
    coords = values["coords"]
    voxels = voxels_of(values["logits"])
    assert torch.equal(torch.cat(voxels), coords[:, 1:]) and [len(v) for v in voxels] == torch.bincount(coords[:, 0]).tolist()
    assert torch.equal(grid_of(voxels, 8), (values["logits"] > 0).float())


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_are_taken_apart_and_put_together(p):
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = to_patches(x, p)
    assert patches.shape == (2, (4 // p) ** 3, 3 * p**3)
    assert torch.equal(from_patches(patches, p), x)
    g = 4 // p
    first = x[0, :, :p, (g - 1) * p :, :p].reshape(-1)  # channels first, then the points of the patch
    assert torch.equal(patches[0, (g - 1) * g], first)


def test_half_precision_blocks_between_float32_ends(values):
    model = StructureFlow(StructureFlowConfig(**{**config_of(values), "use_fp16": True}))
    model.load_state_dict(state_of(values, "sd/"), strict=True)
    assert model.out_layer.weight.dtype == torch.float32 and model.blocks[0].mlp.mlp[0].weight.dtype == torch.float16
    with torch.no_grad():
        got = model(values["x"], values["t"].double() / 1000, values["cond"])
    assert got.dtype == torch.float32
    close(got, values["y"], 2e-2)


def test_wrong_sizes_are_refused(flow, values):
    t = torch.rand(3)
    with pytest.raises(ValueError, match=r"StructureFlow.x_t: expected \[N, 4, 4, 4, 4\], got \[3, 4, 2, 2, 2\]"):
        flow(values["x"][..., :2, :2, :2], t, values["cond"])
    with pytest.raises(ValueError, match=r"StructureFlow.cond: expected \[3, L, 12\], got \[2, 5, 12\]"):
        flow(values["x"], t, values["cond"][:2])
    with pytest.raises(ValueError, match="expected pe_mode 'ape', got 'rope'"):
        StructureFlowConfig(**{**config_of(values), "pe_mode": "rope"})


def test_autocast_stays_near_float32_and_gives_gradients(flow, values):
    with torch.autocast("cpu", torch.bfloat16):
        got = flow(values["x"], values["t"].double() / 1000, values["cond"])
    assert got.dtype == torch.float32
    close(got, values["y"], 0.1)
    got.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in flow.parameters())
