"""TRELLIS's two flows and its autoencoders against reference values (fixtures/trellis): random weights, of
the sparse ones real spconv.
"""

import ast
import functools

import pytest
import torch

from eg3d_rlhf.models.sparse import SparseBatch, feats_of
from eg3d_rlhf.models.trellis.autoencoders import (
    GaussianDecoder,
    GaussianDecoderConfig,
    LatentEncoder,
    LatentEncoderConfig,
    StructureDecoder,
    StructureEncoder,
    StructureVAEConfig,
    grid_of,
    voxels_of,
)
from eg3d_rlhf.models.trellis.flows import (
    LatentFlow,
    LatentFlowConfig,
    StructureFlow,
    StructureFlowConfig,
    from_patches,
    to_patches,
)
from eg3d_rlhf.models.trellis.sparse_conv import downsample
from eg3d_rlhf.tuning.flow.base.sampling import trajectory
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, SparseVoxels
from tests.compat import reference
from tests.compat.absent import some
from tests.compat.reference import of_set
from tests.compat.trellis_reference import (
    FOLDER,
    config_of,
    each,
    prefix,
    read,
    sampling_of,
    trajectories,
)

OUTPUT = 1e-5
GRADIENT = 1e-3
close = functools.partial(reference.close, tolerance=OUTPUT)
LARGE = dict(
    resolution=16,
    in_channels=8,
    out_channels=8,
    model_channels=1024,
    num_blocks=24,
    num_heads=16,
    mlp_ratio=4,
    patch_size=1,
    pe_mode="ape",
    qk_rms_norm=True,
    use_fp16=True,
)
SPARSE = {**LARGE, "resolution": 64, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [128]}
VAE = dict(latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, use_fp16=True)
AUTOENCODER = dict(
    resolution=64,
    model_channels=768,
    latent_channels=8,
    num_blocks=12,
    num_heads=12,
    mlp_ratio=4,
    attn_mode="swin",
    window_size=8,
    use_fp16=True,
)
GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 32,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 4e-3,
    "opacity_bias": 0.1,
    "scaling_activation": "softplus",
}
TABLES = {
    "ss_flow_txt_dit_L_16l8_fp16__denoiser": lambda: StructureFlow(
        StructureFlowConfig(cond_channels=768, **LARGE)
    ),
    "ss_flow_img_dit_L_16l8_fp16__denoiser": lambda: StructureFlow(
        StructureFlowConfig(cond_channels=1024, **LARGE)
    ),
    "ss_vae_conv3d_16l8_fp16__encoder": lambda: StructureEncoder(
        StructureVAEConfig(in_channels=1, channels=(32, 128, 512), **VAE)
    ),
    "ss_vae_conv3d_16l8_fp16__decoder": lambda: StructureDecoder(
        StructureVAEConfig(out_channels=1, channels=(512, 128, 32), **VAE)
    ),
    "slat_flow_txt_dit_L_64l8p2_fp16__denoiser": lambda: LatentFlow(
        LatentFlowConfig(cond_channels=768, **SPARSE)
    ),
    "slat_flow_img_dit_L_64l8p2_fp16__denoiser": lambda: LatentFlow(
        LatentFlowConfig(cond_channels=1024, **SPARSE)
    ),
    "slat_vae_enc_dec_gs_swin8_B_64l8_fp16__encoder": lambda: LatentEncoder(
        LatentEncoderConfig(in_channels=1024, **AUTOENCODER)
    ),
    "slat_vae_enc_dec_gs_swin8_B_64l8_fp16__decoder": lambda: GaussianDecoder(
        GaussianDecoderConfig(representation_config=GAUSSIANS, **AUTOENCODER)
    ),
}
FLOWS = each("config_json", "t", "cond")


def loaded(model, values, prefix="sd/"):
    model.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in values.items() if name.startswith(prefix)},
        strict=True,
    )
    return model


def given(values, name):
    """An input: features on the voxels of a sparse set, the grid itself of a dense one."""
    if "coords" not in values:
        return values[name]
    feats = values.get(f"{name}_feats", values.get(name))
    return SparseBatch(values["coords"], feats, int(values["coords"][:, 0].max()) + 1)


@pytest.fixture(scope="module")
def path(request):
    return request.param


@pytest.fixture(scope="module")
def values(path):
    return read(path)


@pytest.fixture
def flow(values):
    kind, config = (
        (LatentFlow, LatentFlowConfig) if "coords" in values else (StructureFlow, StructureFlowConfig)
    )
    model = kind(config(**config_of(values)))
    if "sd/pos_emb" in values:
        close(model.pos_emb, values["sd/pos_emb"])
    return loaded(model, values)


def output(model, values):
    """Features that a flow gives for the stored input; times are stored as the network reads them."""
    return feats_of(model(given(values, "x"), values["t"].double() / 1000, values["cond"]))


LISTED = [path.stem for path in sorted((FOLDER / "params").glob("*.tsv")) if path.stem in TABLES]


@pytest.mark.parametrize(
    "name", some(LISTED, "this set has no table of a published network in trellis/params")
)
def test_full_size_parameters_have_trellis_names_shapes_and_types(name):
    rows = [line.split("\t") for line in (FOLDER / "params" / f"{name}.tsv").read_text().splitlines()]
    with torch.device("meta"):
        state = TABLES[name]().state_dict()
    ours = [
        (key, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for key, tensor in state.items()
    ]
    assert ours == [(key, ast.literal_eval(shape), dtype) for key, shape, dtype in rows]


@FLOWS
def test_flow_output(flow, values):
    (want,) = of_set(values, "y_feats" if "coords" in values else "y")
    with torch.no_grad():
        close(output(flow, values), want)


@each("config_json", "fm_x0", "fm_t", "fm_noise", "cond")
@pytest.mark.parametrize("recompute", [False, True])
def test_flow_matching_loss_and_gradients(flow, values, recompute):
    flow.recompute = recompute
    path = FlowPath()
    x_0 = given(values, "fm_x0")
    t = values["fm_t"]
    eps = given(values, "fm_noise")
    x_t = path.mix(x_0, t, eps)
    target = feats_of(path.velocity(x_0, eps))
    for found, key in ((x_t, "fm_x_t"), (target, "fm_target")):
        if key in values:
            close(found, values[key])
    # TRELLIS's own: one mean over the whole batch
    loss = (feats_of(flow(x_t, t, values["cond"])) - target).square().mean()
    close(loss, *of_set(values, "fm_loss"))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in flow.parameters()]).norm()
    if "fm_grad_norm" in values:
        close(norm, values["fm_grad_norm"], tolerance=GRADIENT)
    if "fm_grad_conv1" in values:
        near(flow.input_blocks[0].conv1.conv.weight.grad, values["fm_grad_conv1"])
    if "fm_grad_block0_to_qkv" in values:
        near(flow.blocks[0].self_attn.to_qkv.weight.grad, values["fm_grad_block0_to_qkv"])


def near(got, want):
    assert (got - want).norm() <= GRADIENT * want.norm()


@pytest.mark.parametrize(("path", "name"), trajectories(), indirect=["path"])
def test_sampler(flow, values, name):
    sampling = sampling_of(values, name)
    at = prefix(name)
    config = config_of(values)
    kind = SparseVoxels if "coords" in values else DenseGrid
    stage = FlowStage(
        name="flow", model=flow, latents=kind(channels=config["in_channels"], resolution=config["resolution"])
    )
    cond = values.get("smp_cond", values["cond"])
    steps = list(
        trajectory(stage, given(values, "smp_noise"), cond, values["smp_neg"].expand_as(cond), sampling)
    )
    close(torch.stack([feats_of(x) for x, _ in steps]), values[f"{at}x_t"])
    close(torch.stack([feats_of(x_0) for _, x_0 in steps]), *of_set(values, f"{at}x_0"))
    if f"{at}out" in values:
        close(steps[-1][0], values[f"{at}out"])


@each("config_json", "conv1_in", "conv1_out", "down_coords", "down_feats")
def test_convolution_and_downsampling(flow, values):
    x = given(values, "conv1_in")
    with torch.no_grad():
        close(flow.input_blocks[0].conv1(x).feats, values["conv1_out"])
    got = downsample(x)
    assert torch.equal(got.coords, values["down_coords"])
    close(got.feats, values["down_feats"])


@each("config_json", "occ", "mean", "logvar", "logits", "coords")
def test_structure_autoencoder(values):
    config = config_of(values)
    encoder = loaded(StructureEncoder(StructureVAEConfig(**config["encoder"])), values, "enc/")
    decoder = loaded(StructureDecoder(StructureVAEConfig(**config["decoder"])), values, "dec/")
    with torch.no_grad():
        mean, logvar = encoder(values["occ"])
        logits = decoder(values["mean"])
    close(mean, values["mean"])
    close(logvar, values["logvar"])
    close(logits, values["logits"])
    coords = values["coords"]
    voxels = voxels_of(values["logits"])
    assert (
        torch.equal(torch.cat(voxels), coords[:, 1:])
        and [len(v) for v in voxels] == torch.bincount(coords[:, 0]).tolist()
    )
    assert torch.equal(grid_of(voxels, logits.shape[-1]), (values["logits"] > 0).float())


@each("config_json", "feats", "mean", "logvar", "coords")
def test_latent_autoencoder(values):
    config = config_of(values)
    encoder = loaded(LatentEncoder(LatentEncoderConfig(**config["encoder"])), values, "enc/")
    decoder = GaussianDecoder(GaussianDecoderConfig(**config["decoder"]))
    close(decoder.offset_perturbation, values["dec/offset_perturbation"])
    with torch.no_grad():
        mean, logvar = encoder(given(values, "feats"))
        samples = loaded(decoder, values, "dec/")(mean.with_feats(values["mean"]))
    close(mean.feats, values["mean"])
    close(logvar.feats, values["logvar"])
    assert len(samples) == int(values["coords"][:, 0].max()) + 1
    for i, gaussians in enumerate(samples):
        for name in ("xyz", "features_dc", "scaling", "rotation", "opacity"):
            assert getattr(gaussians, name).shape == values[f"gs{i}_{name}"].shape, name
            close(getattr(gaussians, name), values[f"gs{i}_{name}"])


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_are_taken_apart_and_put_together(p):
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    patches = to_patches(x, p)
    assert patches.shape == (2, (4 // p) ** 3, 3 * p**3) and torch.equal(from_patches(patches, p), x)
    g = 4 // p
    first = x[0, :, :p, (g - 1) * p :, :p].reshape(-1)  # channels first, then the points of the patch
    assert torch.equal(patches[0, (g - 1) * g], first)


@each("config_json", "x", "t", "cond", "y", without="coords")
def test_half_precision_and_autocast_stay_near_float32_and_give_gradients(flow, values):
    """Check the dense flow; tests/models/test_trellis_flows.py checks the sparse one."""
    half = loaded(StructureFlow(StructureFlowConfig(**{**config_of(values), "use_fp16": True})), values)
    assert (
        half.out_layer.weight.dtype == torch.float32
        and half.blocks[0].mlp.mlp[0].weight.dtype == torch.float16
    )
    with torch.no_grad():
        close(output(half, values), values["y"], tolerance=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        got = output(flow, values)
    assert got.dtype == torch.float32
    close(got, values["y"], tolerance=0.1)
    got.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in flow.parameters()
    )
