"""MVDream (2308.16512), four views that attend to one another, from its published .pt file: weights alone are read, and run by diffusers.

The converted U-Net equals the original to rounding (reference case `mvdream_unet`). Shape letters: B = A * V pictures, V views of an asset.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from eg3d_rlhf.generators.assets.views import network_cameras
from eg3d_rlhf.models.ldm_names import to_diffusers_unet, to_diffusers_vae, to_transformers_text, unet_config
from eg3d_rlhf.models.local_files import below, build_on_meta, count, load_strict, read_state, require_extra, shape_of, tell_once
from eg3d_rlhf.models.tokens import clip_tokenizer
from eg3d_rlhf.tuning.distill.priors.stable_diffusion import FLAG, LatentNetworks, LatentPrior, PriorOptions

VIEWS = 4
LATENT_SIDE = 32  # of both published models: pictures of 256 x 256
SCALING = 0.18215
OPEN_CLIP, TRANSFORMERS = "cond_stage_model.model.", "cond_stage_model.transformer."
LICENCE = "MVDream: code MIT; check the model card for the weights' licence, and Stable Diffusion's OpenRAIL use restrictions behind them."


class ViewAttention:
    """Attention processor: tokens of all views of an asset attend to one another, [B, pixels, D] as [A, V * pixels, D]."""

    def __init__(self, inner: Any, views: int = VIEWS):
        self.inner, self.views = inner, views

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **rest: Any):
        """What diffusers calls for self-attention (encoder_hidden_states None)."""
        pixels = hidden_states.shape[1]
        together = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        out = self.inner(attn, together, encoder_hidden_states=encoder_hidden_states, **rest)
        return out.unflatten(1, (self.views, pixels)).flatten(0, 1)


def join_views(unet: Any, views: int = VIEWS) -> Any:
    """The U-Net with self-attention over `views` views; cross-attention stays. Without cameras nothing is added to the time embedding."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    kinds = {name: AttnProcessor2_0() for name in unet.attn_processors}
    joined = {name: ViewAttention(kind, views) for name, kind in kinds.items() if name.endswith("attn1.processor")}
    unet.set_attn_processor(kinds | joined)
    embed = type(unet).get_class_embed
    unet.get_class_embed = lambda sample, class_labels: None if class_labels is None else embed(unet, sample, class_labels)
    return unet


class MVDream(LatentPrior):
    """Four views as `DiffusionPrior`: B is a multiple of 4, an asset's views are adjacent, cameras [B, 16] are ours."""

    views = VIEWS

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Conditions [B, T, D] of the prompts alone: the network sees the cameras, and was never told directions."""
        return super().embed(prompts)

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        return None if cameras is None else network_cameras(cameras.float()).to(self.options.device, self.options.unet_dtype)


def mvdream_networks(state: Mapping[str, torch.Tensor], who: str) -> tuple[LatentNetworks, dict[str, dict[str, torch.Tensor]]]:
    """The networks that a file's shapes tell, on the meta device, and their state dicts: unet, vae, text.

    Raises: ValueError for a missing extra and another network's file.
    """
    require_extra(FLAG, "diffusers", "transformers")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet_state, vae_state = below(state, "model.diffusion_model."), below(state, "first_stage_model.")
    config = unet_config(unet_state, who, LATENT_SIDE)
    first = shape_of(vae_state, "encoder.conv_out.weight", who, 4)[0]
    levels = range(count(vae_state, "encoder.down."))
    widths = tuple(shape_of(vae_state, f"encoder.down.{i}.block.0.conv1.weight", who, 4)[0] for i in levels)
    text_config, text_state = _text(state, who)
    networks = LatentNetworks(
        unet=join_views(build_on_meta(lambda: UNet2DConditionModel(**config))),
        vae=build_on_meta(lambda: AutoencoderKL(
            latent_channels=first // 2, block_out_channels=widths, layers_per_block=count(vae_state, "encoder.down.0.block."),
            down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
            scaling_factor=SCALING, sample_size=LATENT_SIDE * 2 ** (len(widths) - 1),
        )),
        text=build_on_meta(lambda: CLIPTextModel(CLIPTextConfig(**text_config))),
    )
    return networks, {"unet": to_diffusers_unet(unet_state), "vae": to_diffusers_vae(vae_state), "text": text_state}


def _text(state: Mapping[str, torch.Tensor], who: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, state dict) of the text encoder: open_clip's without its last layer, or OpenAI's as it is."""
    own, other = below(state, TRANSFORMERS), below(state, OPEN_CLIP)
    if not own and not other:
        raise ValueError(f"{who}: expected its text encoder (cond_stage_model.*), got none. Use the published file.")
    if other:
        layers, act = count(other, "transformer.resblocks.") - 1, "gelu"
        if layers < 1:
            raise ValueError(f"{who}: expected a text encoder of at least 2 layers, got {layers + 1}. Use the published file.")
        try:
            own = to_transformers_text(other, layers)
        except KeyError as error:
            raise ValueError(f"{who}: expected the text encoder's {error}, got no such entry. Use the published file.") from None
    else:
        layers, act = count(own, "text_model.encoder.layers."), "quick_gelu"
    vocabulary, width = shape_of(own, "text_model.embeddings.token_embedding.weight", who, 2)
    config = {
        "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "hidden_act": act, "projection_dim": width,
        "num_attention_heads": max(width // 64, 1), "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
        "intermediate_size": shape_of(own, "text_model.encoder.layers.0.mlp.fc1.weight", who, 2)[0],
    }
    return config, own


def load_mvdream(path: Path, options: PriorOptions | None = None) -> MVDream:
    """sd-v2.1-base-4view.pt or sd-v1.5-4view.pt, with CLIP's tokenizer in the folder tokenizer/ beside it. Nothing in the file is run.

    Raises: FileNotFoundError; ValueError for a missing extra, a pickle that wants more than weights, and another network's file.
    """
    who = f"{FLAG}: {path.name}"
    require_extra(FLAG, "diffusers", "transformers")
    state = read_state(path, FLAG)
    networks, states = mvdream_networks(state, who)
    for name, own in states.items():
        load_strict(getattr(networks, name), own, who)
    (steps,) = shape_of(state, "alphas_cumprod", who, 1)
    if steps != 1000:
        raise ValueError(f"{who}: expected alphas_cumprod of 1000 steps, got {steps}. Use the published file.")
    pad = 0 if any(name.startswith(OPEN_CLIP) for name in state) else None
    tokenize = clip_tokenizer(path.parent / "tokenizer", FLAG, networks.text.config.vocab_size, pad)
    tell_once(LICENCE)
    return MVDream(networks, tokenize, state["alphas_cumprod"], "epsilon", options)


def meta_mvdream(path: Path, options: PriorOptions) -> MVDream:
    """The prior that a file's shapes describe, on the meta device. Raises: as `load_mvdream`."""
    require_extra(FLAG, "diffusers", "transformers")
    networks, _ = mvdream_networks(read_state(path, FLAG), f"{FLAG}: {path.name}")
    return MVDream(networks, None, torch.empty(1000, device="meta"), "epsilon", options.on_meta())
