"""Write TRELLIS's values by this project's own code, with other sizes and settings; see make_set."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.models.lora import adapted_layers, adapter_state, merged_state
from eg3d_rlhf.models.policies import PREFIX
from eg3d_rlhf.models.sparse import SparseBatch, feats_of
from eg3d_rlhf.models.trellis.autoencoders import (
    GaussianDecoder,
    GaussianDecoderConfig,
    LatentEncoder,
    LatentEncoderConfig,
    StructureDecoder,
    StructureEncoder,
    StructureVAEConfig,
    voxels_of,
)
from eg3d_rlhf.models.trellis.flows import LatentFlow, LatentFlowConfig, StructureFlow, StructureFlowConfig
from eg3d_rlhf.models.trellis.sparse_conv import downsample
from eg3d_rlhf.tuning.flow.base.sampling import trajectory
from eg3d_rlhf.tuning.flow.base.stage import DenseGrid, FlowPath, FlowStage, Sampling, SparseVoxels
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from tests.compat.making import Maker, as_the_references, json_bytes, norm_of, on

PATH = FlowPath(sigma_min=1e-5)
TABLE = "ss_vae_conv3d_16l8_fp16__decoder"
SETTINGS = {
    "plain": {"steps": 3, "cfg_strength": 0.0, "rescale_t": 2.0},
    "strong": {"steps": 5, "cfg_strength": 2.5, "cfg_interval": (0.3, 0.8), "rescale_t": 1.5},
}
FLOW = {"in_channels": 3, "out_channels": 3, "cond_channels": 10, "mlp_ratio": 2}


def make(root: Path, seed: int) -> None:
    """Write a dense flow with adapters, a sparse one, both autoencoders, and one of the tables."""
    folder = root / "trellis"
    with as_the_references():
        dense_flow(Maker(seed + 10), folder)
        sparse_flow(Maker(seed + 20), folder)
        structure_autoencoder(Maker(seed + 30), folder)
        latent_autoencoder(Maker(seed + 40), folder)
    config = StructureVAEConfig(
        out_channels=1, channels=(512, 128, 32), latent_channels=8, num_res_blocks=2, use_fp16=True
    )
    with torch.device("meta"):
        state = StructureDecoder(config).state_dict()
    rows = [f"{key}\t{tuple(t.shape)}\t{str(t.dtype).removeprefix('torch.')}" for key, t in state.items()]
    (folder / "params").mkdir(parents=True, exist_ok=True)
    (folder / "params" / f"{TABLE}.tsv").write_text("\n".join(rows) + "\n")


def values_of_path(m: Maker, model: nn.Module, x_0, noise, cond: torch.Tensor) -> None:
    """Record flow matching, whose loss is one mean over the whole batch."""
    t = m.times(len(cond))
    x_t = PATH.mix(x_0, t, noise)
    target = feats_of(PATH.velocity(x_0, noise))
    model.requires_grad_(True).zero_grad()
    loss = (feats_of(model(x_t, t, cond)) - target).square().mean()
    loss.backward()
    m.put(fm_x0=feats_of(x_0), fm_noise=feats_of(noise), fm_t=t, fm_loss=loss, fm_grad_norm=norm_of(model))
    if not isinstance(x_0, SparseBatch):
        m.put(
            fm_x_t=x_t, fm_target=target, fm_grad_block0_to_qkv=model.blocks[0].self_attn.to_qkv.weight.grad
        )
    else:
        m.put(fm_grad_conv1=model.input_blocks[0].conv1.conv.weight.grad)
    model.requires_grad_(False)


@torch.no_grad()
def trajectories(m: Maker, model: nn.Module, noise, cond: torch.Tensor, settings: dict) -> None:
    kind = SparseVoxels if isinstance(noise, SparseBatch) else DenseGrid
    latents = kind(channels=model.config.in_channels, resolution=model.config.resolution)
    empty = m.normal(1, *cond.shape[1:])
    stage = FlowStage(name="flow", model=model, latents=latents, path=PATH)
    m.put(smp_noise=feats_of(noise), smp_neg=empty, smp_json=json_bytes(settings))
    for name, given in settings.items():
        sampling = Sampling(**given)
        steps = list(trajectory(stage, noise, cond, empty.expand_as(cond), sampling))
        at = f"smp_{name}_" if name else "smp_"
        m.add(
            {
                f"{at}{key}": torch.stack([feats_of(s[i]) for s in steps])
                for i, key in enumerate(("x_t", "x_0"))
            }
        )
        if not isinstance(noise, SparseBatch):
            m.add({f"{at}out": steps[-1][0]})


def dense_flow(m: Maker, folder: Path) -> None:
    config = {**FLOW, "resolution": 6, "patch_size": 2, "model_channels": 24, "num_blocks": 3, "num_heads": 2}
    config |= {"share_mod": True, "qk_rms_norm": True}
    model = StructureFlow(StructureFlowConfig(**config))
    m.fill(model)
    shape = (3, 6, 6, 6)
    x = m.normal(2, *shape)
    t = 1000 * m.times(2)
    cond = m.normal(2, 4, 10)
    with torch.no_grad():
        y = model(x, t.double() / 1000, cond)
    m.put(x=x, t=t, cond=cond, y=y, config_json=json_bytes(config))
    m.add(model.state_dict(), "sd/")
    values_of_path(m, model, m.normal(2, *shape), m.normal(2, *shape), cond)
    told = m.normal(3, 4, 10)
    m.put(smp_cond=told)
    trajectories(m, model, m.normal(3, *shape), told, SETTINGS)
    errors = m.normal(8).abs()
    before = m.normal(8).abs()
    pairs = PairErrors.split(errors, before)
    losses = {f"dso_dpo_beta{beta}": pair_loss(pairs, DpoConfig(beta=beta / 2)).mean() for beta in (3, 70)}
    losses |= {
        f"dso_{kind}": pair_loss(PairErrors.split(errors), DpoConfig(kind=kind)).mean()
        for kind in ("sft", "dro")
    }
    m.add({"dpo_mse_theta": errors, "dpo_mse_ref": before} | losses)
    m.write(folder / "dense.npz")
    adapters(m, model, (x, t / 1000, cond), folder)


@torch.no_grad()
def adapters(m: Maker, model: nn.Module, inputs: tuple, folder: Path) -> None:
    """Write adapters in PEFT's form, and in a full state of merged weights."""
    lora = {"r": 3, "lora_alpha": 6, "target_modules": ["to_q", "to_qkv"]}
    with tempfile.TemporaryDirectory() as place:
        tuned = m.adapters(model, Path(place), lora["r"], lora["lora_alpha"], lora["target_modules"])
    own = Maker(m.seed)
    own.put(y_on=tuned(*inputs), y_off=model(*inputs), lora_json=json_bytes(lora))
    own.add(adapter_state(tuned), f"adapter/{PREFIX}")
    merged = merged_state(tuned)
    layers = adapted_layers(tuned)
    for name in tuned.state_dict():
        stem, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            own.add({f"full/{PREFIX}{stem}.default.{leaf}": tuned.state_dict()[name]})
        else:
            plain = name.replace(".base_layer.", ".")
            assert (plain.rpartition(".")[0] in layers) == (plain != name)
            own.add({f"full/{PREFIX}{name}": merged[plain]})
    own.write(folder / "dense_adapters.npz")


def sparse_flow(m: Maker, folder: Path) -> None:
    config = {
        **FLOW,
        "resolution": 12,
        "patch_size": 2,
        "model_channels": 24,
        "num_blocks": 1,
        "num_heads": 3,
    }
    config |= {"num_io_res_blocks": 2, "io_block_channels": [8], "qk_rms_norm": False}
    model = LatentFlow(LatentFlowConfig(**config))
    m.fill(model)
    coords = m.voxels((21, 40, 13), 12)
    count = len(coords)
    x = on(coords, m.normal(count, 3))
    t = 1000 * m.times(3)
    cond = m.normal(3, 6, 10)
    inner = on(coords, m.normal(count, 8))
    down = downsample(inner)
    with torch.no_grad():
        y = model(x, t.double() / 1000, cond)
        conv = model.input_blocks[0].conv1(inner)
    m.put(coords=coords, x_feats=x.feats, t=t, cond=cond, y_feats=y.feats, config_json=json_bytes(config))
    m.put(conv1_in=inner.feats, conv1_out=conv.feats, down_coords=down.coords, down_feats=down.feats)
    m.add(model.state_dict(), "sd/")
    values_of_path(m, model, x.with_feats(m.normal(count, 3)), x.with_feats(m.normal(count, 3)), cond)
    told = {"": {"steps": 3, "cfg_strength": 1.5, "cfg_interval": (0.2, 0.9), "rescale_t": 2.0}}
    trajectories(m, model, x.with_feats(m.normal(count, 3)), cond, told)
    m.write(folder / "sparse.npz")


@torch.no_grad()
def structure_autoencoder(m: Maker, folder: Path) -> None:
    common = {"latent_channels": 3, "num_res_blocks": 1, "num_res_blocks_middle": 1}
    config = {
        "encoder": {"in_channels": 1, "channels": [4, 8, 8], **common},
        "decoder": {"out_channels": 1, "channels": [8, 8, 4], **common},
    }
    encoder = m.fill(StructureEncoder(StructureVAEConfig(**config["encoder"])))
    decoder = m.fill(StructureDecoder(StructureVAEConfig(**config["decoder"])))
    occupied = (m.normal(3, 1, 8, 8, 8) > 0.4).float()
    mean, logvar = encoder(occupied)
    logits = decoder(mean)
    coords = [torch.nn.functional.pad(voxels, (1, 0), value=b) for b, voxels in enumerate(voxels_of(logits))]
    m.put(occ=occupied, mean=mean, logvar=logvar, logits=logits, config_json=json_bytes(config))
    m.put(coords=torch.cat(coords).int())
    m.add(encoder.state_dict(), "enc/")
    m.add(decoder.state_dict(), "dec/")
    m.write(folder / "structure_autoencoder.npz")


@torch.no_grad()
def latent_autoencoder(m: Maker, folder: Path) -> None:
    common = {"resolution": 12, "model_channels": 24, "latent_channels": 5, "num_blocks": 3, "num_heads": 2}
    common |= {"mlp_ratio": 2, "attn_mode": "swin", "window_size": 3}
    gaussians = {
        "lr": {"_xyz": 0.5, "_features_dc": 1.0, "_opacity": 2.0, "_scaling": 1.0, "_rotation": 0.2},
        "perturb_offset": True,
        "voxel_size": 1.2,
        "num_gaussians": 3,
        "2d_filter_kernel_size": 0.2,
        "3d_filter_kernel_size": 0.001,
        "scaling_bias": 0.005,
        "opacity_bias": 0.2,
        "scaling_activation": "softplus",
    }
    config = {
        "encoder": {"in_channels": 9, **common},
        "decoder": {**common, "representation_config": gaussians},
    }
    encoder = m.fill(LatentEncoder(LatentEncoderConfig(**config["encoder"])))
    decoder = m.fill(GaussianDecoder(GaussianDecoderConfig(**config["decoder"])))
    coords = m.voxels((30, 18, 44), 12)
    feats = m.normal(len(coords), 9)
    mean, logvar = encoder(on(coords, feats))
    m.put(coords=coords, feats=feats, mean=mean.feats, logvar=logvar.feats, config_json=json_bytes(config))
    for i, made in enumerate(decoder(mean)):
        kept = {name: x for name, x in vars(made).items() if isinstance(x, torch.Tensor)}
        m.add({f"gs{i}_{name}": x for name, x in kept.items()})
    m.add(encoder.state_dict(), "enc/")
    m.add(decoder.state_dict(), "dec/")
    m.write(folder / "latent_autoencoder.npz")
