"""A TRELLIS with random weights in its published files, small enough for a test.

It has structures [2, 4, 4, 4], voxels 8^3 and latents of 4 channels. It is conditioned on texts, or on images
in the layout of TRELLIS-image-large, with a DINOv2 of 64 channels for images of 28 pixels as torch hub stores
it.
"""

import json

import torch
from safetensors.torch import save_file

from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditioning
from eg3d_rlhf.tuning.flow.base.ranking import write_import
from eg3d_rlhf.tuning.flow.families.trellis_files import build_model, normalization

NAMES = ("a red chair", "a blue chair", "a lamp", "a tree", "a house", "a boat")
R = 8
TOKENS = 3
E = 6
_FLOW = dict(
    model_channels=24,
    cond_channels=E,
    num_blocks=1,
    num_heads=2,
    mlp_ratio=2,
    pe_mode="ape",
    qk_rms_norm=True,
    use_fp16=True,
)
_SWIN = dict(
    resolution=R,
    model_channels=24,
    latent_channels=4,
    num_blocks=2,
    num_heads=2,
    mlp_ratio=2,
    window_size=4,
    use_fp16=False,
)
_LR = {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1}
GAUSSIANS = {
    "lr": _LR,
    "perturb_offset": True,
    "voxel_size": 1.5,
    "num_gaussians": 4,
    "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 0.02,
    "opacity_bias": 0.3,
    "scaling_activation": "softplus",
}
MODELS = {  # stem -> JSON
    "ss_flow": {
        "name": "SparseStructureFlowModel",
        "args": {"resolution": 4, "in_channels": 2, "out_channels": 2, "patch_size": 1, **_FLOW},
    },
    "ss_dec": {
        "name": "SparseStructureDecoder",
        "args": {
            "out_channels": 1,
            "latent_channels": 2,
            "num_res_blocks": 1,
            "num_res_blocks_middle": 1,
            "channels": [8, 4],
        },
    },
    "ss_enc_conv3d_16l8_fp16": {
        "name": "SparseStructureEncoder",
        "args": {
            "in_channels": 1,
            "latent_channels": 2,
            "num_res_blocks": 1,
            "num_res_blocks_middle": 1,
            "channels": [4, 8],
        },
    },
    "slat_flow": {
        "name": "ElasticSLatFlowModel",
        "args": {
            "resolution": R,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "num_io_res_blocks": 1,
            "io_block_channels": [8],
            **_FLOW,
        },
    },
    "slat_dec_gs": {
        "name": "ElasticSLatGaussianDecoder",
        "args": {**_SWIN, "representation_config": GAUSSIANS},
    },
    "slat_enc_swin8_B_64l8_fp16": {"name": "ElasticSLatEncoder", "args": {**_SWIN, "in_channels": 5}},
}
PIPELINE = {
    "name": "TrellisTextTo3DPipeline",
    "args": {
        "models": {
            "sparse_structure_flow_model": "ckpts/ss_flow",
            "slat_flow_model": "ckpts/slat_flow",
            "sparse_structure_decoder": "ckpts/ss_dec",
            "slat_decoder_gs": "ckpts/slat_dec_gs",
            "slat_decoder_mesh": "someone/trellis-image/ckpts/slat_dec_mesh",
        },
        "sparse_structure_sampler": {
            "name": "FlowEulerGuidanceIntervalSampler",
            "args": {"sigma_min": 1e-5},
            "params": {"steps": 3, "cfg_strength": 2.0, "cfg_interval": [0.5, 0.95], "rescale_t": 3.0},
        },
        "slat_sampler": {
            "name": "FlowEulerGuidanceIntervalSampler",
            "args": {"sigma_min": 1e-5},
            "params": {"steps": 3, "cfg_strength": 1.0, "cfg_interval": [0.5, 0.95], "rescale_t": 3.0},
        },
        "slat_normalization": {"mean": [-2.0, 0.5, 0.0, 1.0], "std": [2.0, 1.5, 0.5, 1.0]},
    },
}


DINO = 64  # channels of the tiny DINOv2
STEMS = {  # of TRELLIS-image-large
    "ss_flow": "ss_flow_img_dit_L_16l8_fp16",
    "slat_flow": "slat_flow_img_dit_L_64l8p2_fp16",
    "ss_dec": "ss_dec_conv3d_16l8_fp16",
    "slat_dec_gs": "slat_dec_gs_swin8_B_64l8gs32_fp16",
}


def write_image_trellis(root):
    """Write the variant for images under the names of TRELLIS-image-large; returns the folder."""
    changed = {
        "ss_flow": "cond_channels",
        "slat_flow": "cond_channels",
        "slat_enc_swin8_B_64l8_fp16": "in_channels",
    }
    models = {
        STEMS.get(stem, stem): {
            **content,
            "args": {**content["args"], **({changed[stem]: DINO} if stem in changed else {})},
        }
        for stem, content in MODELS.items()
    }
    args = PIPELINE["args"]
    named = {
        name: f"ckpts/{STEMS[path.removeprefix('ckpts/')]}"
        for name, path in args["models"].items()
        if path.startswith("ckpts/")
    }
    sampler = {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {"steps": 2, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0},
    }
    content = {
        "name": "TrellisImageTo3DPipeline",
        "args": {
            "models": named,
            "sparse_structure_sampler": sampler,
            "slat_sampler": sampler,
            "slat_normalization": args["slat_normalization"],
            "image_cond_model": "dinov2_vitl14_reg",
        },
    }
    return write_trellis(root, models, content)


def write_hub(path):
    """Write a DINOv2 of random weights under torch hub's names; returns the path."""
    g = torch.Generator().manual_seed(7)

    def values(*shape):
        return 0.2 * torch.randn(*shape, generator=g)

    state = {
        "cls_token": values(1, 1, DINO),
        "pos_embed": values(1, 5, DINO),
        "register_tokens": values(1, 4, DINO),
        "mask_token": values(1, DINO),
        "patch_embed.proj.weight": values(DINO, 3, 14, 14),
        "patch_embed.proj.bias": values(DINO),
        "norm.weight": values(DINO),
        "norm.bias": values(DINO),
    }
    for i in range(2):
        for name, outs, ins in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 2, 1),
            ("mlp.fc2", 1, 2),
        ):
            state |= {
                f"blocks.{i}.{name}.weight": values(outs * DINO, ins * DINO),
                f"blocks.{i}.{name}.bias": values(outs * DINO),
            }
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            state[f"blocks.{i}.{name}"] = values(DINO)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def write_trellis(root, models=MODELS, pipeline=PIPELINE):
    """Write all files; returns the folder."""
    ckpts = root / "ckpts"
    ckpts.mkdir(parents=True)
    for i, (stem, content) in enumerate(models.items()):
        torch.manual_seed(i)
        save_file(build_model(content, stem).state_dict(), ckpts / f"{stem}.safetensors")
        (ckpts / f"{stem}.json").write_text(json.dumps(content))
    (root / "pipeline.json").write_text(json.dumps(pipeline))
    return root


def tokens(names=NAMES) -> Conditioning:
    """Make random embeddings."""
    generator = torch.Generator().manual_seed(5)
    return Conditioning(
        tokens={name: torch.randn(TOKENS, E, generator=generator) for name in (*names, NULL)}, encoder="clip"
    )


def write_imported(folder, imported, file) -> dict[str, str]:
    """Write pairs as `flow tune` does."""
    return write_import(
        folder,
        imported,
        lambda stage: {"normalization": normalization(file, stage), "report": dict(imported.report)},
    )


def voxels(seed: int, count: int = 40) -> torch.Tensor:
    """Make voxels [v, 3] int32, sorted."""
    order = torch.randperm(R**3, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.stack([order // R**2, order // R % R, order % R], 1).int()
