"""A TRELLIS of random weights in its own files, small enough for a test: structures [2, 4, 4, 4], voxels 8^3, latents of 4 channels."""

import json

import torch
from safetensors.torch import save_file

from eg3d_rlhf.flow.embeddings import NULL, Conditions
from eg3d_rlhf.flow.trellis.files import build_model

NAMES = ("a red chair", "a blue chair", "a lamp", "a tree", "a house", "a boat")
R, TOKENS, E = 8, 3, 6
_FLOW = dict(model_channels=24, cond_channels=E, num_blocks=1, num_heads=2, mlp_ratio=2, pe_mode="ape", qk_rms_norm=True, use_fp16=True)
_SWIN = dict(resolution=R, model_channels=24, latent_channels=4, num_blocks=2, num_heads=2, mlp_ratio=2, window_size=4, use_fp16=False)
_LR = {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1}
GAUSSIANS = {
    "lr": _LR, "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "2d_filter_kernel_size": 0.1, "3d_filter_kernel_size": 9e-4,
    "scaling_bias": 0.02, "opacity_bias": 0.3, "scaling_activation": "softplus",
}
MODELS = {  # stem -> JSON
    "ss_flow": {
        "name": "SparseStructureFlowModel", "args": {"resolution": 4, "in_channels": 2, "out_channels": 2, "patch_size": 1, **_FLOW}
    },
    "ss_dec": {
        "name": "SparseStructureDecoder",
        "args": {"out_channels": 1, "latent_channels": 2, "num_res_blocks": 1, "num_res_blocks_middle": 1, "channels": [8, 4]},
    },
    "ss_enc_conv3d_16l8_fp16": {
        "name": "SparseStructureEncoder",
        "args": {"in_channels": 1, "latent_channels": 2, "num_res_blocks": 1, "num_res_blocks_middle": 1, "channels": [4, 8]},
    },
    "slat_flow": {
        "name": "ElasticSLatFlowModel",
        "args": {
            "resolution": R, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_io_res_blocks": 1, "io_block_channels": [8], **_FLOW
        },
    },
    "slat_dec_gs": {"name": "ElasticSLatGaussianDecoder", "args": {**_SWIN, "representation_config": GAUSSIANS}},
    "slat_enc_swin8_B_64l8_fp16": {"name": "ElasticSLatEncoder", "args": {**_SWIN, "in_channels": 5}},
}
PIPELINE = {
    "name": "TrellisTextTo3DPipeline",
    "args": {
        "models": {
            "sparse_structure_flow_model": "ckpts/ss_flow", "slat_flow_model": "ckpts/slat_flow",
            "sparse_structure_decoder": "ckpts/ss_dec", "slat_decoder_gs": "ckpts/slat_dec_gs",
            "slat_decoder_mesh": "someone/trellis-image/ckpts/slat_dec_mesh",
        },
        "sparse_structure_sampler": {
            "name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5},
            "params": {"steps": 3, "cfg_strength": 2.0, "cfg_interval": [0.5, 0.95], "rescale_t": 3.0},
        },
        "slat_sampler": {
            "name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5},
            "params": {"steps": 3, "cfg_strength": 1.0, "cfg_interval": [0.5, 0.95], "rescale_t": 3.0},
        },
        "slat_normalization": {"mean": [-2.0, 0.5, 0.0, 1.0], "std": [2.0, 1.5, 0.5, 1.0]},
    },
}


def write_trellis(root):
    """All files; returns the folder."""
    ckpts = root / "ckpts"
    ckpts.mkdir(parents=True)
    for i, (stem, content) in enumerate(MODELS.items()):
        torch.manual_seed(i)
        save_file(build_model(content, stem).state_dict(), ckpts / f"{stem}.safetensors")
        (ckpts / f"{stem}.json").write_text(json.dumps(content))
    (root / "pipeline.json").write_text(json.dumps(PIPELINE))
    return root


def tokens(names=NAMES) -> Conditions:
    """Random embeddings."""
    generator = torch.Generator().manual_seed(5)
    return Conditions(tokens={name: torch.randn(TOKENS, E, generator=generator) for name in (*names, NULL)}, encoder="clip")


def voxels(seed: int, count: int = 40) -> torch.Tensor:
    """[v, 3] int32, sorted."""
    order = torch.randperm(R**3, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return torch.stack([order // R**2, order // R % R, order % R], 1).int()
