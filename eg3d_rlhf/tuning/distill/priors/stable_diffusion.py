"""Stable Diffusion from a folder in the published layout, through diffusers and transformers (extra [sd]), which are imported in functions.

The U-Net alone may run in half precision: alphas, latents and what is computed of them stay float32 (at t = 980 x0 divides by .076).

Shape letters: B pictures, C, H, W of latents, h, w of pictures, T tokens, D their width.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.models.local_files import build_on_meta, existing, from_folder, one_line, require_extra, tell_once
from eg3d_rlhf.models.tokens import Tokenize, clip_tokenizer

FLAG = "--prior"
LICENCES = {
    768: "Stable Diffusion 1.x: CreativeML OpenRAIL-M. Its use restrictions pass on to the users of what you make with it.",
    1024: "Stable Diffusion 2.x: CreativeML OpenRAIL++-M. Its use restrictions pass on to the users of what you make with it.",
}
Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True, kw_only=True)
class LatentNetworks:
    """The parts of a latent diffusion model; on the meta device where only their shapes are wanted."""

    unet: Any  # diffusers' UNet2DConditionModel
    vae: Any  # AutoencoderKL
    text: Any  # transformers' CLIPTextModel


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """How a prior runs."""

    device: str | torch.device = "cpu"
    half: bool | None = None  # the U-Net in float16; None: on a GPU alone
    checkpointing: bool = True  # pictures pass the autoencoder one by one; graphs are computed twice instead of held
    posterior: torch.Generator | None = None  # draws of the encoder's posterior; None: its mean

    @property
    def unet_dtype(self) -> torch.dtype:
        """Of the U-Net's numbers."""
        half = torch.device(self.device).type == "cuda" if self.half is None else self.half
        return torch.float16 if half else torch.float32

    def on_meta(self) -> "PriorOptions":
        """The same without memory."""
        return replace(self, device="meta", half=self.unet_dtype == torch.float16)


class LatentPrior:
    """A diffusion model of latents as `DiffusionPrior`. Frozen; differentiable in pictures, latents and conditions.

    Args:
        networks: with weights, float32. tokenize: 77 tokens per prompt; None: `embed` is not called. alphas_cumprod: [1000].
    """

    views = 1

    def __init__(
        self, networks: LatentNetworks, tokenize: Tokenize | None, alphas_cumprod: torch.Tensor, prediction: Prediction = "epsilon",
        options: PriorOptions | None = None,
    ):
        options = options or PriorOptions()
        self.options, self.tokenize, self.prediction = options, tokenize, prediction
        self.alphas_cumprod = alphas_cumprod.float().to(options.device)
        self.unet, self.vae, self.text = (
            net.eval().requires_grad_(False).to(options.device) for net in (networks.unet, networks.vae, networks.text)
        )
        if options.unet_dtype == torch.float16:
            self.unet.half()
        if options.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.scaling = float(self.vae.config.scaling_factor)
        side = int(self.unet.config.sample_size)
        self.latent_shape = (int(self.unet.config.in_channels), side, side)
        self.image_size = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._embedded: dict[str, torch.Tensor] = {}

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, H, W] of images [B, 3, h, w] in 0..1, resized to the model's size (bilinear): the posterior's mean."""
        images = images.to(self.alphas_cumprod)
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False)
        mean, std = self._each(self._posterior, images).chunk(2, 1)
        if self.options.posterior is not None:
            drawn = self.options.posterior
            mean = mean + std * torch.randn(mean.shape, generator=drawn, device=drawn.device).to(mean)
        return self.scaling * mean

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h, w] in 0..1 of latents [B, C, H, W]."""
        images = self._each(lambda x: self.vae.decode(x).sample, latents.to(self.alphas_cumprod) / self.scaling)
        return (0.5 * images + 0.5).clamp(0, 1)

    def _posterior(self, images: torch.Tensor) -> torch.Tensor:
        found = self.vae.encode(2 * images - 1).latent_dist
        return torch.cat([found.mean, found.std], 1)

    def _each(self, run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """run(batch), with checkpointing one picture at a time: the graph of one alone is held."""
        if not self.options.checkpointing:
            return run(batch)
        return torch.cat([checkpoint(run, one, use_reentrant=False) if one.requires_grad else run(one) for one in batch.split(1)])

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Conditions [B, T, D]; a direction ("front", "side", ...) is said after a prompt that is not empty."""
        if directions is not None:
            prompts = [f"{p}, {d} view" if p else p for p, d in zip(prompts, directions, strict=True)]
        for prompt in prompts:
            if prompt not in self._embedded:
                assert self.tokenize is not None
                with torch.no_grad():
                    tokens = self.tokenize([prompt])[0].to(self.alphas_cumprod.device)
                    self._embedded[prompt] = self.text(tokens).last_hidden_state[0].float()
        return torch.stack([self._embedded[prompt] for prompt in prompts])

    def predict_noise(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None) -> torch.Tensor:
        """Noise [B, C, H, W], float32, of x_t at t [B]; e = a v + s x_t where the network predicts v."""
        dtype = self.options.unet_dtype
        labels = self._labels(cameras)
        out = self.unet(x_t.to(dtype), t, encoder_hidden_states=cond.to(dtype), class_labels=labels).sample.float()
        if self.prediction == "epsilon":
            return out
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * out + (1 - alpha).sqrt() * x_t

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        return None  # one picture knows nothing of its camera


def meta_prior(folder: Path, options: PriorOptions) -> LatentPrior:
    """The prior that a folder's config.json files describe, on the meta device: no weights are read. Raises: ValueError."""
    require_extra(FLAG, "diffusers", "transformers")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    files = [existing(folder / part / "config.json", FLAG) for part in ("unet", "vae", "text_encoder")]
    with one_line(f"{FLAG}: {folder.name}", "Copy the folder again."):
        configs = [json.loads(file.read_text()) for file in files]
        makers: list[Callable[[], Any]] = [
            lambda: UNet2DConditionModel.from_config(configs[0]), lambda: AutoencoderKL.from_config(configs[1]),
            lambda: CLIPTextModel(CLIPTextConfig(**configs[2])),
        ]
        unet, vae, text = (build_on_meta(make) for make in makers)
    return LatentPrior(LatentNetworks(unet=unet, vae=vae, text=text), None, torch.empty(1000, device="meta"), "epsilon", options.on_meta())


def load_stable_diffusion(folder: Path, options: PriorOptions | None = None) -> LatentPrior:
    """A folder with unet/, vae/, text_encoder/, tokenizer/, scheduler/. Safetensors only; nothing is fetched; the licence is told once.

    Raises: FileNotFoundError; ValueError for a missing extra, missing or foreign parts, and predictions other than epsilon and v.
    """
    require_extra(FLAG, "diffusers", "transformers")
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        existing(folder / part, FLAG)
    parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    unet, vae, text = (from_folder(cls, folder / part, FLAG) for part, cls in parts.items())
    existing(folder / "scheduler" / "scheduler_config.json", FLAG)
    with one_line(f"{FLAG}: {folder.name}/scheduler", "Copy the folder again."):
        scheduler = DDPMScheduler.from_pretrained(str(folder / "scheduler"), local_files_only=True)
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"{FLAG}: expected a prior that predicts epsilon or v_prediction, got {prediction}. Use SD 1.5 or 2.1.")
    width, wanted = text.config.hidden_size, unet.config.cross_attention_dim
    if width != wanted:
        raise ValueError(f"{FLAG}: expected conditions of {wanted} numbers, got a text encoder of {width}. Use the folder's own parts.")
    tokenize = clip_tokenizer(folder / "tokenizer", FLAG, text.config.vocab_size, pad_of(folder / "tokenizer"))
    tell_once(LICENCES[1024 if width >= 1024 else 768])
    return LatentPrior(LatentNetworks(unet=unet, vae=vae, text=text), tokenize, scheduler.alphas_cumprod, prediction, options)


def pad_of(folder: Path) -> int | None:
    """Number that a tokenizer folder fills up with; None: the end mark. SD 2.x names "!", which is 0."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            pad = json.loads((folder / name).read_text()).get("pad_token")
            pad = pad.get("content") if isinstance(pad, dict) else pad
            if pad is not None:
                words = json.loads((folder / "vocab.json").read_text()) if (folder / "vocab.json").is_file() else {}
                return None if pad == "<|endoftext|>" else words.get(pad)
    return None
