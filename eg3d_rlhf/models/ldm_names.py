"""Convert published files of latent diffusion models to the names of diffusers and transformers.

Latent diffusion models (LDM, Rombach et al. 2022), such as Stable Diffusion, are published in the layout of
their own code. The functions rename the entries of a state dict. The tensors share memory with those of the
file. The sizes of a U-Net are derived from the shapes of its tensors.

Shapes: C channels.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from eg3d_rlhf.models.weights import count, shape_of

State = dict[str, torch.Tensor]
# In all tables, the key is the beginning of a name in LDM's files, and the value the beginning in diffusers.
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

CLIP = (  # regular expressions of open_clip's names and their replacements in transformers, applied in order
    (r"^visual\.(class_embedding)$", r"vision_model.embeddings.\1"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # transformers spells the name in this way
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


def unet_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the prefixes of the names in LDM's U-Net, with the prefix in diffusers that replaces each.

    LDM numbers its blocks in two lists, input_blocks and output_blocks. diffusers numbers them by level of
    resolution, and within a level. In input_blocks, a level ends with a block that consists of a downsampling
    alone. In output_blocks, the last block of a level contains the upsampling as its last part.
    """
    diffusers_prefixes = dict(UNET)
    level = 0
    index_in_level = 0
    # Block 0 is the input convolution, which the table UNET renames.
    for block_index in range(1, count(state_dict, "input_blocks.")):
        block_prefix = f"input_blocks.{block_index}."
        # LDM calls the convolution of a downsampling "op". It is the last block of its level.
        if any(entry_name.startswith(f"{block_prefix}0.op.") for entry_name in state_dict):
            diffusers_prefixes[f"{block_prefix}0.op."] = f"down_blocks.{level}.downsamplers.0.conv."
            level = level + 1
            index_in_level = 0
            continue
        # The first part of a block is a ResNet block, the second one, if there is one, an attention block.
        diffusers_prefixes[f"{block_prefix}0."] = f"down_blocks.{level}.resnets.{index_in_level}."
        diffusers_prefixes[f"{block_prefix}1."] = f"down_blocks.{level}.attentions.{index_in_level}."
        index_in_level += 1
    level = 0
    index_in_level = 0
    for block_index in range(count(state_dict, "output_blocks.")):
        block_prefix = f"output_blocks.{block_index}."
        diffusers_prefixes[f"{block_prefix}0."] = f"up_blocks.{level}.resnets.{index_in_level}."
        diffusers_prefixes[f"{block_prefix}1."] = f"up_blocks.{level}.attentions.{index_in_level}."
        index_in_level += 1
        # The upsampling is part 1 of a block without attention, and part 2 of a block with attention. Only
        # upsamplings have an entry PART.conv.weight.
        upsamplings = [
            entry_name.removesuffix("conv.weight")
            for entry_name in state_dict
            if re.fullmatch(rf"{re.escape(block_prefix)}[12]\.conv\.weight", entry_name)
        ]
        if upsamplings:
            diffusers_prefixes[f"{upsamplings[0]}conv."] = f"up_blocks.{level}.upsamplers.0.conv."
            level = level + 1
            index_in_level = 0
    return diffusers_prefixes


def to_diffusers_unet(state_dict: Mapping[str, torch.Tensor]) -> State:
    """Rename the state dict of LDM's U-Net to diffusers' names.

    Names that no table contains stay as they are.

    Args:
        state_dict: state dict with LDM's names, without their prefix model.diffusion_model.
    """
    diffusers_prefixes = unet_names(state_dict)
    renamed_state = {}
    for entry_name, tensor in state_dict.items():
        # The longest prefix decides: the name of an upsampling,
        # "output_blocks.2.1.conv.", also begins with "output_blocks.2.1.".
        prefix = max(
            (ldm_prefix for ldm_prefix in diffusers_prefixes if entry_name.startswith(ldm_prefix)),
            key=len,
            default="",
        )
        suffix = entry_name.removeprefix(prefix)
        if "resnets." in diffusers_prefixes.get(prefix, ""):
            # The names inside of ResNet blocks differ, too. Those inside of attention blocks are the same.
            suffix = next(
                (
                    RESNET[resnet_prefix] + suffix.removeprefix(resnet_prefix)
                    for resnet_prefix in RESNET
                    if suffix.startswith(resnet_prefix)
                ),
                suffix,
            )
        renamed_state[diffusers_prefixes.get(prefix, "") + suffix] = tensor
    return renamed_state


def to_diffusers_vae(state_dict: Mapping[str, torch.Tensor]) -> State:
    """Rename the state dict of LDM's autoencoder to diffusers' names.

    Args:
        state_dict: state dict with LDM's names, without their prefix first_stage_model.
    """
    # LDM numbers the up blocks from the image inwards, diffusers in the order of computation. Block 0 of
    # diffusers is therefore the last block of LDM.
    up_block_count = count(state_dict, "decoder.up.")
    renamed_state = {}
    for name, tensor in state_dict.items():
        # Group 1 is the number of the level. Group 2 is the number of
        # a ResNet block, or None for a resampling.
        name = re.sub(
            r"\.down\.(\d+)\.(?:block\.(\d+)\.)?",
            lambda match: f".down_blocks.{match[1]}." + (f"resnets.{match[2]}." if match[2] else ""),
            name,
        )
        name = re.sub(
            r"\.up\.(\d+)\.(?:block\.(\d+)\.)?",
            lambda match: (
                f".up_blocks.{up_block_count - 1 - int(match[1])}."
                + (f"resnets.{match[2]}." if match[2] else "")
            ),
            name,
        )
        # The dot restricts the match to the beginning of a part of the name, since "norm_out." could also be
        # the end of a longer part.
        for ldm_part, diffusers_part in VAE.items():
            name = name.replace(ldm_part, diffusers_part) if f".{ldm_part}" in name else name
        name_start, attention_separator, name_end = name.partition("attentions.0.")
        if attention_separator:
            name_end = next(
                diffusers_part + name_end.removeprefix(ldm_part)
                for ldm_part, diffusers_part in VAE_ATTENTION.items()
                if name_end.startswith(ldm_part)
            )
            # LDM's attention uses 1 x 1 convolutions [C, C, 1, 1], diffusers uses linear layers [C, C].
            tensor = tensor[..., 0, 0] if tensor.ndim == 4 else tensor
        renamed_state[name_start + attention_separator + name_end] = tensor
    return renamed_state


def to_transformers_clip(state_dict: Mapping[str, torch.Tensor]) -> State:
    """Rename the state dict of an open_clip network to the names of transformers' CLIPModel.

    Names that the table CLIP does not contain stay as they are.
    """
    renamed_state: State = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in CLIP:
            name = re.sub(pattern, replacement, name)
        # open_clip stores the projections of queries, keys and values
        # as one matrix [3 C, C] and one bias [3 C].
        block_prefix, projection_separator, parameter_name = name.partition("attn.in_proj_")
        if projection_separator:
            for letter, projection in zip("qkv", tensor.chunk(3), strict=True):
                renamed_state[f"{block_prefix}self_attn.{letter}_proj.{parameter_name}"] = projection
        else:
            # open_clip computes x W with its projections, a linear layer x W^T, so they are transposed.
            renamed_state[name] = tensor.T if name.endswith("_projection.weight") else tensor
    return renamed_state


def to_transformers_text(state_dict: Mapping[str, torch.Tensor], n_layers: int) -> State:
    """Rename the text encoder of an open_clip network to the names of transformers' CLIPTextModel.

    Args:
        state_dict: state dict of the complete network or of the text encoder.
        n_layers: number of layers of the result: all layers of the file, or all but the last one, as in
            Stable Diffusion 2.
    """
    # Layers are counted from 0, so this is the first layer that is dropped.
    dropped_layer = f"text_model.encoder.layers.{n_layers}."
    return {
        name: tensor
        for name, tensor in to_transformers_clip(state_dict).items()
        if name.startswith("text_model.") and not name.startswith(dropped_layer)
    }


def unet_config(state_dict: Mapping[str, torch.Tensor], who: str, image_size: int) -> dict[str, Any]:
    """Derive the arguments of diffusers' UNet2DConditionModel from the shapes of the tensors of LDM's U-Net.

    In Stable Diffusion 2, the projections before and after the attention are linear layers, and attention
    heads have 64 channels. In Stable Diffusion 1, these projections are convolutions, and there are 8
    attention heads.

    Args:
        state_dict: state dict with LDM's names, without their prefix.
        who: name that error messages begin with.
        image_size: pixels per side of the latents.

    Raises: ValueError if the state dict is that of another network.
    """
    input_convolution_shape = shape_of(state_dict, "input_blocks.0.0.weight", who, 4)  # [out, in, 3, 3]
    diffusers_prefixes = unet_names(state_dict)
    channels_by_level = {}  # channels of each level
    attention_prefix_by_level = {}  # for each level with attention, the prefix of its last attention block
    layers_per_level = 0
    for ldm_prefix, diffusers_prefix in diffusers_prefixes.items():
        match = re.match(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)", diffusers_prefix)
        if match and match[2] == "resnets":
            channels_by_level[int(match[1])] = shape_of(
                state_dict, f"{ldm_prefix}in_layers.2.weight", who, 4
            )[0]
            layers_per_level = max(layers_per_level, int(match[3]) + 1)
        elif match and f"{ldm_prefix}proj_in.weight" in state_dict:
            attention_prefix_by_level[int(match[1])] = ldm_prefix
    if not channels_by_level or not attention_prefix_by_level:
        raise ValueError(
            f"{who}: the file contains no attention blocks of a U-Net, so it may be that of another network."
            " Use the file of a U-Net."
        )
    # All attention blocks have the same kind of projection and the same conditioning.
    ldm_prefix = next(iter(attention_prefix_by_level.values()))
    is_linear = state_dict[f"{ldm_prefix}proj_in.weight"].ndim == 2  # a matrix, and not a 1 x 1 convolution
    level_channels = [
        channels_by_level[level] for level in sorted(channels_by_level)
    ]  # channels per level, finest first
    # MVDream's network also embeds the camera, which diffusers treats as a class embedding.
    camera_weight = state_dict.get("camera_embed.0.weight")
    down_block_types = tuple(
        "CrossAttnDownBlock2D" if level in attention_prefix_by_level else "DownBlock2D"
        for level in range(len(level_channels))
    )
    return {
        "sample_size": image_size,
        "in_channels": input_convolution_shape[1],
        "out_channels": shape_of(state_dict, "out.2.weight", who, 4)[0],
        "block_out_channels": tuple(level_channels),
        "layers_per_block": layers_per_level,
        "down_block_types": down_block_types,
        # The up blocks mirror the down blocks.
        "up_block_types": tuple(
            block_type.replace("Down", "Up") for block_type in reversed(down_block_types)
        ),
        "use_linear_projection": is_linear,
        # In this class of diffusers, attention_head_dim is the number of attention heads.
        "attention_head_dim": tuple(max(width // 64, 1) for width in level_channels) if is_linear else 8,
        "cross_attention_dim": shape_of(
            state_dict, f"{ldm_prefix}transformer_blocks.0.attn2.to_k.weight", who, 2
        )[1],
        "class_embed_type": None if camera_weight is None else "projection",
        "projection_class_embeddings_input_dim": None if camera_weight is None else camera_weight.shape[1],
    }
