"""Stages of the published generators without their weights: their sizes, from the configurations that were
published with them.

What the memory and time of drawing and training are estimated for where there is no folder yet.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eg3d_rlhf.models import hunyuan3d, sam3d, trellis2
from eg3d_rlhf.models.trellis import flows as trellis
from eg3d_rlhf.models.weights import empty
from eg3d_rlhf.tuning.flow.base.stage import (
    DenseGrid,
    Dictionary,
    FlowStage,
    Sampling,
    SparseVoxels,
    TokenSet,
)
from eg3d_rlhf.tuning.flow.families import FlowFamily
from eg3d_rlhf.tuning.flow.families import sam3d as sam3d_pipeline
from eg3d_rlhf.tuning.flow.families.hunyuan3d import LORA_TARGETS, MAIN, SHAPE, call, sampling
from eg3d_rlhf.tuning.flow.families.trellis_files import KINDS, TOKENS

# shape of a condition: tokens [L, E], or of several tensors by name
Told = Sequence[int] | Mapping[str, Sequence[int]]
DINO3 = {"512": 1029, "1024": 4101}  # tokens of DINOv3 by the picture's edge


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A stage whose network has shapes and no numbers."""

    stage: FlowStage
    told: Told


def of_folder(family: FlowFamily, root: Path) -> list[Sized]:
    """The stages of a folder, by its settings; weights are not read. Raises: as the family's loader."""
    if family.bundled:
        import torch  # its networks are small

        pipeline = family.load(root, None, dtype=torch.float32, device="cpu")
        return [
            Sized(stage=s, told=list(pipeline.no_condition(1, s.name).shape[1:])) for s in pipeline.stages
        ]
    if family.encoder is None or family.told is None:
        raise ValueError(
            f"estimate: expected a family that says what its stages are told, got {family.name}. Register"
            " `told`."
        )
    # of encoders, which nobody asks here
    options = {"share": 0.25, "views": 1} if "views" in family.options else {}
    pipeline = family.encoder(root, **options)
    return [Sized(stage=stage, told=family.told(pipeline, stage.name)) for stage in pipeline.stages]


def _trellis(kind: str, width: int) -> list[Sized]:
    common: dict[str, Any] = dict(
        in_channels=8,
        out_channels=8,
        model_channels=1024,
        cond_channels=width,
        num_blocks=24,
        num_head_channels=64,
        qk_rms_norm=True,
    )
    structure = trellis.StructureFlowConfig(resolution=16, patch_size=1, **common)
    latent = trellis.LatentFlowConfig(resolution=64, patch_size=2, io_block_channels=(128,), **common)
    stages = (
        ("structure", partial(trellis.StructureFlow, structure), DenseGrid(channels=8, resolution=16)),
        ("latent", partial(trellis.LatentFlow, latent), SparseVoxels(channels=8, resolution=64)),
    )
    return [
        Sized(
            told=[TOKENS[kind], width],
            stage=FlowStage(name=name, model=empty(make), latents=latents, sampling=KINDS[kind]),
        )
        for name, make, latents in stages
    ]


def _trellis2() -> list[Sized]:
    made = []
    for name, cells, channels, given, edge in (
        ("structure", 16, 8, 0, "512"),
        ("shape_512", 32, 32, 0, "512"),
        ("shape_1024", 64, 32, 0, "1024"),
        ("texture", 64, 32, 32, "1024"),
    ):
        config = trellis2.FlowConfig(
            resolution=cells,
            in_channels=channels + given,
            out_channels=channels,
            model_channels=1536,
            cond_channels=1024,
            num_blocks=30,
            num_heads=12,
            mlp_ratio=5.3334,
            pe_mode="rope",
            share_mod=True,
            qk_rms_norm=True,
            qk_rms_norm_cross=True,
        )
        grid = dict(channels=channels, resolution=cells)
        kind: Any = (
            partial(DenseGrid, **grid) if name == "structure" else partial(SparseVoxels, given=given, **grid)
        )
        make = trellis2.StructureFlow if name == "structure" else trellis2.VoxelFlow
        stage = FlowStage(
            name=name,
            model=empty(partial(make, config)),
            latents=kind(),
            sampling=Sampling(steps=12, cfg_strength=6.5),
        )
        made.append(Sized(stage=stage, told=[DINO3[edge], 1024]))
    return made


def _hunyuan3d() -> list[Sized]:
    config = hunyuan3d.DenoiserConfig(
        input_size=4096,
        in_channels=64,
        hidden_size=2048,
        context_dim=1024,
        depth=21,
        num_heads=16,
        text_len=1370,
        qk_norm=True,
        qkv_bias=False,
        num_moe_layers=6,
        num_experts=8,
        moe_top_k=2,
        use_attention_pooling=False,
    )
    stage = FlowStage(
        name=SHAPE,
        model=empty(partial(hunyuan3d.Denoiser, config)),
        latents=TokenSet(tokens=4096, channels=64),
        call=call,
        data_at_one=True,
        sampling=sampling(),
        lora_targets=LORA_TARGETS,
    )
    return [Sized(stage=stage, told={MAIN: [1370, 1024]})]


def _sam3d() -> list[Sized]:
    common: dict[str, Any] = dict(
        model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16, qk_rms_norm=True
    )
    pose = {"6drotation_normalized": 6, "translation": 3, "scale": 3, "translation_scale": 1}
    latents = {sam3d.SHAPE: sam3d.LatentConfig(in_channels=8, tokens=4096, resolution=16)}
    latents |= {name: sam3d.LatentConfig(in_channels=channels, tokens=1) for name, channels in pose.items()}
    first = sam3d.MixtureConfig(
        latents=latents,
        latent_share_transformer={"6drotation_normalized": tuple(pose)},
        is_shortcut_model=True,
        **common,
    )
    second = sam3d.VoxelFlowConfig(
        resolution=64,
        in_channels=8,
        out_channels=8,
        patch_size=2,
        io_block_channels=(128,),
        num_io_res_blocks=2,
        **common,
    )
    sizes = {name: [latent.tokens, latent.in_channels] for name, latent in latents.items()}
    return [
        Sized(
            told=[sam3d_pipeline.TOKENS["structure"], 1024],
            stage=FlowStage(
                name="structure",
                model=empty(partial(sam3d.MixtureFlow, first)),
                latents=Dictionary(shapes=sizes),
                data_at_one=True,
                call=sam3d_pipeline.call_mixture,
                sampling=Sampling(cfg_strength=7.0),
                lora_targets=sam3d_pipeline.targets_of(first),
            ),
        ),
        Sized(
            told=[sam3d_pipeline.TOKENS["latent"], 1024],
            stage=FlowStage(
                name="latent",
                model=empty(partial(sam3d.VoxelFlow, second)),
                latents=SparseVoxels(channels=8, resolution=64),
                data_at_one=True,
                call=sam3d_pipeline.call_voxels,
                sampling=Sampling(rescale_t=1.0, cfg_strength=1.0),
            ),
        ),
    ]


RELEASED: Mapping[str, Callable[[], list[Sized]]] = {  # by what the table calls them
    "TRELLIS-text-large": partial(_trellis, "text", 768),
    "TRELLIS-image-large": partial(_trellis, "image", 1024),
    "TRELLIS.2-4B": _trellis2,
    "Hunyuan3D-2.1": _hunyuan3d,
    "SAM 3D Objects": _sam3d,
}
