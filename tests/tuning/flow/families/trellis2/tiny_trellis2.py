"""A TRELLIS.2 with random weights in its published files, small enough for a test.

It has structures [2, 4, 4, 4] and a cascade from 4^3 to 8^3 voxels.
"""

import copy
import json

import torch
from safetensors.torch import save_file

from eg3d_rlhf.models.trellis2 import BLOCK, MERGE, SPLIT
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning
from eg3d_rlhf.tuning.flow.families.trellis2_files import ARCHITECTURES, TEXTURING
from eg3d_rlhf.tuning.flow.families.trellis_files import build_model

NAMES = ("a chair", "a lamp", "a tree", "a house")
E = 6
_FLOW = dict(
    model_channels=24,
    cond_channels=E,
    num_blocks=1,
    num_heads=2,
    mlp_ratio=2,
    pe_mode="rope",
    share_mod=True,
    initialization="scaled",
    qk_rms_norm=True,
    qk_rms_norm_cross=True,
    dtype="bfloat16",
)
_DECODER = dict(
    model_channels=[16, 8],
    latent_channels=4,
    num_blocks=[1, 0],
    block_type=[BLOCK, BLOCK],
    up_block_type=[SPLIT],
    block_args=[{"use_checkpoint": False}, {}],
    use_fp16=True,
)
_ENCODER = dict(
    model_channels=[8, 16],
    latent_channels=4,
    num_blocks=[0, 1],
    block_type=[BLOCK, BLOCK],
    down_block_type=[MERGE],
    use_fp16=True,
)


def _flow(name, resolution, channels, given=0):
    return {
        "name": name,
        "args": {
            "resolution": resolution,
            "in_channels": channels + given,
            "out_channels": channels,
            **_FLOW,
        },
    }


MODELS = {  # stem -> JSON
    "ss_flow": _flow("SparseStructureFlowModel", 4, 2),
    "shape_512": _flow("SLatFlowModel", 4, 4),
    "shape_1024": _flow("SLatFlowModel", 8, 4),
    "tex_512": _flow("SLatFlowModel", 4, 4, given=4),
    "tex_1024": _flow("SLatFlowModel", 8, 4, given=4),
    "shape_dec": {"name": "FlexiDualGridVaeDecoder", "args": {"resolution": 16, **_DECODER}},
    "shape_enc": {"name": "FlexiDualGridVaeEncoder", "args": _ENCODER},
    "tex_enc_next_dc_f16c32_fp16": {"name": "SparseUnetVaeEncoder", "args": {"in_channels": 6, **_ENCODER}},
    "tex_dec": {
        "name": "SparseUnetVaeDecoder",
        "args": {"out_channels": 6, "pred_subdiv": False, **_DECODER},
    },
}
_STRUCTURE = {"latent_channels": 2, "num_res_blocks": 1, "num_res_blocks_middle": 1}
STRUCTURE = {  # beside, in TRELLIS's own folder
    "ss_dec": {
        "name": "SparseStructureDecoder",
        "args": {"out_channels": 1, "channels": [8, 4], **_STRUCTURE},
    },
    "ss_enc_conv3d_16l8_fp16": {
        "name": "SparseStructureEncoder",
        "args": {"in_channels": 1, "channels": [4, 8], **_STRUCTURE},
    },
}


def _sampler(strength, rescale):
    params = {
        "steps": 2,
        "guidance_strength": strength,
        "guidance_rescale": rescale,
        "guidance_interval": [0.6, 1.0],
        "rescale_t": 5.0,
    }
    return {"name": "FlowEulerGuidanceIntervalSampler", "args": {"sigma_min": 1e-5}, "params": params}


PIPELINE = {
    "name": "Trellis2ImageTo3DPipeline",
    "args": {
        "models": {
            "sparse_structure_flow_model": "ckpts/ss_flow",
            "sparse_structure_decoder": "someone/trellis/ckpts/ss_dec",
            "shape_slat_flow_model_512": "ckpts/shape_512",
            "shape_slat_flow_model_1024": "ckpts/shape_1024",
            "shape_slat_decoder": "ckpts/shape_dec",
            "tex_slat_flow_model_512": "ckpts/tex_512",
            "tex_slat_flow_model_1024": "ckpts/tex_1024",
            "tex_slat_decoder": "ckpts/tex_dec",
        },
        "sparse_structure_sampler": _sampler(7.5, 0.7),
        "shape_slat_sampler": _sampler(7.5, 0.5),
        "tex_slat_sampler": _sampler(1.0, 0.0),
        "shape_slat_normalization": {"mean": [0.5, 0.0, -1.0, 0.0], "std": [2.0, 1.0, 0.5, 1.5]},
        "tex_slat_normalization": {"mean": [0.0, 1.0, 0.0, 0.0], "std": [1.0, 2.0, 1.0, 1.0]},
        "image_cond_model": {
            "name": "DinoV3FeatureExtractor",
            "args": {"model_name": "facebook/dinov3-vitl16-pretrain-lvd1689m"},
        },
        "default_pipeline_type": "1024_cascade",
    },
}


def write_trellis2(root):
    """Write all files, the structure's autoencoder in a folder beside; returns the folder."""
    for i, (stem, content) in enumerate({**MODELS, **STRUCTURE}.items()):
        ckpts = (root.parent / "trellis" if stem in STRUCTURE else root) / "ckpts"
        ckpts.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(i)
        save_file(build_model(content, stem, ARCHITECTURES).state_dict(), ckpts / f"{stem}.safetensors")
        (ckpts / f"{stem}.json").write_text(json.dumps(content))
    (root / TEXTURING).write_text(json.dumps({"args": {"models": {"shape_slat_encoder": "ckpts/shape_enc"}}}))
    write_pipeline(root)
    return root


def write_pipeline(root, **args):
    """Write pipeline.json with some of its args changed."""
    content = copy.deepcopy(PIPELINE)
    content["args"] |= args
    (root / "pipeline.json").write_text(json.dumps(content))
    return root


def tokens(names=NAMES, size=E) -> Conditioning:
    """Make random embeddings of images at two sizes."""
    g = torch.Generator().manual_seed(5)
    embeddings = {
        name: {"512": torch.randn(3, size, generator=g), "1024": torch.randn(5, size, generator=g)}
        for name in names
    }
    return Conditioning(tokens=embeddings, zero_null=True)
