"""Conversion of latent diffusion's published files to the names of diffusers and transformers.

State dicts are renamed; tensors are shared, except for 1 x 1 convolutions that become linear layers. The
sizes of a U-Net are derived from the shapes of its tensors.

Shape letters: C channels.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from eg3d_rlhf.models.weights import count, shape_of

State = dict[str, torch.Tensor]
# All tables: beginning of a name in latent diffusion's files -> beginning in diffusers.
UNET = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "camera_embed.0.": "class_embedding.linear_1.",
    "camera_embed.2.": "class_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
}
RESNET = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
VAE = {
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
    "norm_out.": "conv_norm_out.",
    "nin_shortcut.": "conv_shortcut.",
    "downsample.": "downsamplers.0.",
    "upsample.": "upsamplers.0.",
}
VAE_ATTENTION = {
    "norm.": "group_norm.",
    "q.": "to_q.",
    "k.": "to_k.",
    "v.": "to_v.",
    "proj_out.": "to_out.0.",
}

CLIP = (  # regular expressions, open_clip -> transformers, applied one after the other
    (r"^visual\.(class_embedding)$", r"vision_model.embeddings.\1"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # spelled so in transformers
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
)


def unet_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Map the beginnings of a U-Net's names to diffusers' names.

    LDM numbers its blocks in flat lists, diffusers in a tree of levels. A level ends with the block that
    holds only a resampling. An up block carries its upsampling as its last part.
    """
    names = dict(UNET)
    level = 0
    part = 0
    # Block 0 is the input convolution, which the table UNET renames.
    for i in range(1, count(state, "input_blocks.")):
        block = f"input_blocks.{i}."
        # ".op" is a downsampling: it closes the level.
        if any(n.startswith(f"{block}0.op.") for n in state):
            names[f"{block}0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
            level = level + 1
            part = 0
            continue
        names[f"{block}0."], names[f"{block}1."] = (
            f"down_blocks.{level}.resnets.{part}.",
            f"down_blocks.{level}.attentions.{part}.",
        )
        part += 1
    level = part = 0
    for i in range(count(state, "output_blocks.")):
        block = f"output_blocks.{i}."
        names[f"{block}0."], names[f"{block}1."] = (
            f"up_blocks.{level}.resnets.{part}.",
            f"up_blocks.{level}.attentions.{part}.",
        )
        part += 1
        # The upsampling is part 1 of a block without attention, else part 2.
        resampled = [
            n[: -len("conv.weight")]
            for n in state
            if re.fullmatch(rf"{re.escape(block)}[12]\.conv\.weight", n)
        ]
        if resampled:
            names[f"{resampled[0]}conv."] = f"up_blocks.{level}.upsamplers.0.conv."
            level = level + 1
            part = 0
    return names


def to_diffusers_unet(state: Mapping[str, torch.Tensor]) -> State:
    """Rename a U-Net's state dict (without the prefix model.diffusion_model.) to diffusers' names.

    Unknown names stay as they are.
    """
    names = unet_names(state)
    new = {}
    for name, tensor in state.items():
        # The longest match wins: the name of an upsampling, "output_blocks.2.1.conv.", also begins with
        # "output_blocks.2.1.".
        start = max((old for old in names if name.startswith(old)), key=len, default="")
        rest = name.removeprefix(start)
        if "resnets." in names.get(start, ""):
            rest = next(
                (RESNET[old] + rest.removeprefix(old) for old in RESNET if rest.startswith(old)), rest
            )
        new[names.get(start, "") + rest] = tensor
    return new


def to_diffusers_vae(state: Mapping[str, torch.Tensor]) -> State:
    """Rename an autoencoder's state dict (without the prefix first_stage_model.) to diffusers' names.

    LDM numbers up blocks from the image inwards, diffusers in the order of computation.
    """
    # diffusers' up block 0 is LDM's last one.
    ups = count(state, "decoder.up.")
    new = {}
    for name, tensor in state.items():
        name = re.sub(
            r"\.down\.(\d+)\.(?:block\.(\d+)\.)?",
            lambda m: f".down_blocks.{m[1]}." + (f"resnets.{m[2]}." if m[2] else ""),
            name,
        )
        name = re.sub(
            r"\.up\.(\d+)\.(?:block\.(\d+)\.)?",
            lambda m: f".up_blocks.{ups - 1 - int(m[1])}." + (f"resnets.{m[2]}." if m[2] else ""),
            name,
        )
        # Only at the start of a part of a name: "q." must not match inside another word.
        for old, now in VAE.items():
            name = name.replace(old, now) if f".{old}" in name else name
        # LDM's attention uses 1 x 1 convolutions [C, C, 1, 1], diffusers linear layers [C, C].
        before, mark, rest = name.partition("attentions.0.")
        if mark:
            rest = next(
                now + rest.removeprefix(old) for old, now in VAE_ATTENTION.items() if rest.startswith(old)
            )
            tensor = tensor[..., 0, 0] if tensor.ndim == 4 else tensor
        new[before + mark + rest] = tensor
    return new


def to_transformers_clip(state: Mapping[str, torch.Tensor]) -> State:
    """Rename the state dict of open_clip's network to transformers' CLIPModel. Unknown names stay."""
    new: State = {}
    for name, tensor in state.items():
        for old, now in CLIP:
            name = re.sub(old, now, name)
        # open_clip stacks the projections of queries, keys and values in one matrix [3 C, C].
        stem, mark, part = name.partition("attn.in_proj_")
        if mark:
            new |= {
                f"{stem}self_attn.{q}_proj.{part}": x for q, x in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            # open_clip multiplies by its projections from the right, so they are transposed linear layers.
            new[name] = tensor.T if name.endswith("_projection.weight") else tensor
    return new


def to_transformers_text(state: Mapping[str, torch.Tensor], layers: int) -> State:
    """Rename open_clip's text half to the first `layers` layers of transformers' CLIPTextModel.

    The text half is transformer.resblocks.*, ln_final, ... Stable Diffusion 2 leaves out the last layer.
    """
    # The first layer beyond those that are kept.
    last = f"text_model.encoder.layers.{layers}."
    return {
        name: tensor
        for name, tensor in to_transformers_clip(state).items()
        if name.startswith("text_model.") and not name.startswith(last)
    }


def unet_config(state: Mapping[str, torch.Tensor], who: str, image_size: int) -> dict[str, Any]:
    """Derive the arguments of diffusers' UNet2DConditionModel from the shapes of a state dict.

    The names are LDM's without their prefix. Linear projections around the attention mean the form of Stable
    Diffusion 2, with heads of 64 channels. Convolutions mean that of 1.x, with 8 heads.

    Args:
        who: name that error messages begin with.
        image_size: pixels per side of the latents.
    Raises: ValueError for the file of another network.
    """
    first = shape_of(state, "input_blocks.0.0.weight", who, 4)
    names = unet_names(state)
    channels = {}
    attention = {}
    layers = 0
    # Channels and attention are read per level, from the first block that shows them.
    for block, target in names.items():
        match = re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", target)
        if match and match[2] == "resnets":
            channels[int(match[1])] = shape_of(state, f"{block}in_layers.2.weight", who, 4)[0]
            layers = max(layers, int(match[3]) + 1)
        elif match and f"{block}proj_in.weight" in state:
            attention[int(match[1])] = block
    if not channels or 0 not in attention and not attention:
        raise ValueError(
            f"{who}: the file holds no attention blocks of a U-Net. It may belong to another network: name"
            " the U-Net's file."
        )
    block = next(iter(attention.values()))
    linear = state[f"{block}proj_in.weight"].ndim == 2  # a matrix, or a 1 x 1 convolution
    widths = [channels[level] for level in sorted(channels)]  # channels per level, finest first
    # MVDream's network also embeds the camera, which diffusers treats as a class embedding.
    camera = state.get("camera_embed.0.weight")
    down = tuple(
        "CrossAttnDownBlock2D" if level in attention else "DownBlock2D" for level in range(len(widths))
    )
    return {
        "sample_size": image_size,
        "in_channels": first[1],
        "out_channels": shape_of(state, "out.2.weight", who, 4)[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "down_block_types": down,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        "use_linear_projection": linear,
        # diffusers calls the number of heads attention_head_dim here
        "attention_head_dim": tuple(max(width // 64, 1) for width in widths) if linear else 8,
        "cross_attention_dim": shape_of(state, f"{block}transformer_blocks.0.attn2.to_k.weight", who, 2)[1],
        "class_embed_type": None if camera is None else "projection",
        "projection_class_embeddings_input_dim": None if camera is None else camera.shape[1],
    }
