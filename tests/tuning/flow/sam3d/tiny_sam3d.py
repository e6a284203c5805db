"""A SAM 3D Objects of random weights in its own files, small enough for a test: shapes of 64 tokens, voxels 8^3, latents of 4 channels."""

import copy

import torch
import yaml

from eg3d_rlhf.models.sam3d import (
    Embedder,
    LatentConfig,
    MixtureConfig,
    MixtureFlow,
    Pictures,
    PointConfig,
    PointPatches,
    VoxelFlow,
    VoxelFlowConfig,
)
from eg3d_rlhf.models.vit import DinoConfig
from eg3d_rlhf.tuning.flow.conditions import Conditions
from eg3d_rlhf.tuning.flow.families.trellis.files import build_model
from tests.tuning.flow.trellis.tiny_trellis import GAUSSIANS

NAMES = ("a chair", "a lamp", "a tree", "a house")
W = 6  # channels of a condition
POSE = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
TDFY = "sam3d_objects.model.backbone.tdfy_dit.models"
EMBED = "sam3d_objects.model.backbone.dit.embedder"
MIXTURE = dict(
    model_channels=12, cond_channels=W, num_blocks=1, num_heads=2, mlp_ratio=2,
    latent_share_transformer={"6drotation_normalized": list(POSE)}, is_shortcut_model=True, qk_rms_norm=True, use_fp16=True,
)
VOXELS = dict(
    resolution=8, in_channels=4, out_channels=4, model_channels=24, cond_channels=W, num_blocks=1, num_heads=2, mlp_ratio=2, patch_size=2,
    num_io_res_blocks=1, io_block_channels=[8], pe_mode="ape", qk_rms_norm=True, use_fp16=True, is_shortcut_model=True,
)
VISION = DinoConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=1, mlp_ratio=1, image_size=8, patch_size=4, num_register_tokens=2
)
POINTS = dict(input_size=8, patch_size=4, embed_dim=8, num_heads=2, remap_output="exp")
FRAMES = ("cropped", "full")
ENCODERS = {  # of a stage: what goes through each
    "ss": [("Dino", ("image", "rgb_image")), ("Dino", ("mask", "rgb_image_mask")), ("PointPatchEmbed", ("pointmap", "rgb_pointmap"))],
    "slat": [("Dino", ("image", "rgb_image")), ("Dino", ("mask", "rgb_image_mask"))],
}
STRUCTURE_DECODER = dict(out_channels=1, latent_channels=2, num_res_blocks=1, num_res_blocks_middle=1, channels=[8, 4])
DECODER = dict(
    resolution=8, model_channels=24, latent_channels=4, num_blocks=2, num_heads=2, mlp_ratio=2, attn_mode="swin", window_size=4,
    use_fp16=False, representation_config=GAUSSIANS,
)
PIPELINE = {
    "_target_": "sam3d_objects.pipeline.inference_pipeline_pointmap.InferencePipelinePointMap", "downsample_ss_dist": 1,
    "ss_cfg_interval": [0, 500], "ss_cfg_strength": 7, "ss_cfg_strength_pm": 0.0, "ss_inference_steps": 2, "ss_rescale_t": 3,
    "slat_cfg_interval": [0, 500], "slat_cfg_strength": 1, "slat_inference_steps": 2, "slat_rescale_t": 1,
    "slat_mean": [0.5, 0.0, -1.0, 0.0], "slat_std": [2.0, 1.0, 0.5, 1.5],
    **{f"{part}_{kind}_path": f"{part}{ending}" for part in ("ss_generator", "slat_generator", "ss_decoder", "slat_decoder_gs")
       for kind, ending in (("config", ".yaml"), ("ckpt", ".ckpt"))},
}


def _generator(stage, network):
    entries = [
        [{"_target_": f"{EMBED}.dino.Dino", "input_size": 8, "dino_model": "dinov2_vitl14_reg", "prenorm_features": True} if kind == "Dino"
         else {"_target_": f"{EMBED}.pointmap.PointPatchEmbed", **POINTS}, [list(pair) for pair in zip(names, FRAMES, strict=True)]]
        for kind, names in ENCODERS[stage]
    ]
    guided = {"_target_": "sam3d_objects.model.backbone.generator.classifier_free_guidance.ClassifierFreeGuidance", "backbone": network}
    flow = {"_target_": "sam3d_objects.model.backbone.generator.shortcut.model.ShortCut", "time_scale": 1000.0, "sigma_min": 0.0,
            "reverse_fn": guided}
    embedder = {"_target_": f"{EMBED}.embedder_fuser.EmbedderFuser", "embedder_list": entries, "projection_pre_norm": True,
                "projection_net_hidden_dim_multiplier": 4.0, "use_pos_embedding": "learned"}
    return {"module": {"generator": {"backbone": flow}, "condition_embedder": {"backbone": embedder}}}


def _places(name):
    if name == "shape":
        return {"_target_": f"{TDFY}.mm_latent.ShapePositionEmbedder", "model_channels": 12, "resolution": 4, "patch_size": 1}
    return {"_target_": f"{TDFY}.mm_latent.LearntPositionEmbedder", "model_channels": 12, "token_len": 1}


LATENTS = {
    name: {"_target_": f"{TDFY}.mm_latent.Latent", "in_channels": channels, "model_channels": 12, "pos_embedder": _places(name)}
    for name, channels in {"shape": 2, **POSE}.items()
}
FILES = {
    "ss_generator.yaml": _generator(
        "ss", {"_target_": f"{TDFY}.mot_sparse_structure_flow.SparseStructureFlowTdfyWrapper", "latent_mapping": LATENTS, **MIXTURE}
    ),
    "slat_generator.yaml": _generator("slat", {"_target_": f"{TDFY}.structured_latent_flow.SLatFlowModelTdfyWrapper", **VOXELS}),
    "ss_decoder.yaml": {"_target_": f"{TDFY}.sparse_structure_vae.SparseStructureDecoderTdfyWrapper", **STRUCTURE_DECODER},
    "slat_decoder_gs.yaml": {"_target_": f"{TDFY}.structured_latent_vae.decoder_gs.SLatGaussianDecoderTdfyWrapper", **DECODER},
    "pipeline.yaml": PIPELINE,
}


def _embedder(stage):
    encoders = []
    for kind, names in ENCODERS[stage]:
        module, size = (Pictures(VISION, 8, before_norm=True), 64) if kind == "Dino" else (PointPatches(PointConfig(**POINTS)), 8)
        encoders.append((module, size, list(zip(names, FRAMES, strict=True))))
    return Embedder(encoders, [16] * len(encoders), W, True)


def _networks():
    latents = {"shape": LatentConfig(in_channels=2, tokens=64, resolution=4)} | {
        name: LatentConfig(in_channels=channels, tokens=1) for name, channels in POSE.items()
    }
    return {"ss": MixtureFlow(MixtureConfig(latents=latents, **MIXTURE)), "slat": VoxelFlow(VoxelFlowConfig(**VOXELS))}


def write_sam3d(root):
    """All files; returns the folder."""
    root.mkdir(parents=True)
    for name, content in FILES.items():
        (root / name).write_text(yaml.safe_dump(content, sort_keys=False))
    torch.manual_seed(0)
    for stage, network in _networks().items():
        embedder = _embedder(stage)
        for parameter in embedder.parameters():
            parameter.data.normal_(std=0.2)
        state = {f"_base_models.generator.reverse_fn.backbone.{name}": tensor for name, tensor in network.state_dict().items()}
        state |= {f"_base_models.condition_embedder.{name}": tensor for name, tensor in embedder.state_dict().items()}
        state["_base_models.depth.scale"] = torch.ones(1)  # of something else
        torch.save({"state_dict": state, "epoch": 3}, root / f"{stage}_generator.ckpt")
    decoders = {"ss_decoder": ("SparseStructureDecoder", STRUCTURE_DECODER), "slat_decoder_gs": ("SLatGaussianDecoder", DECODER)}
    for stem, (name, args) in decoders.items():
        torch.save(build_model({"name": name, "args": args}, stem).state_dict(), root / f"{stem}.ckpt")
    return root


def changed(root, file, change):
    """A YAML file of a folder written again, after `change` of its content."""
    content = copy.deepcopy(FILES[file])
    change(content)
    (root / file).write_text(yaml.safe_dump(content, sort_keys=False))
    return root


def tokens(names=NAMES, size=W) -> Conditions:
    """Random embeddings for both stages."""
    g = torch.Generator().manual_seed(5)
    found = {n: {"structure": torch.randn(4, size, generator=g), "latent": torch.randn(3, size, generator=g)} for n in names}
    return Conditions(tokens=found, encoder="random", zero_null=True)
