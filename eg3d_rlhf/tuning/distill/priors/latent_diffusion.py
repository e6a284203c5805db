"""Latent diffusion models as priors: Stable Diffusion from a folder, MVDream from its file, through diffusers
and transformers (extra [sd]), which are imported in functions; and what they will need of memory.

The U-Net alone may run in half precision: alphas, latents and what is computed of them stay float32
(at t = 980 x0 divides by .076).

Shape letters: B = A V pictures, V views of an asset, C, H, W of latents, h, w of pictures, T tokens, D their
width.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from eg3d_rlhf.core.interfaces import CheckedPrior, check_views
from eg3d_rlhf.core.memory import Costs, MemoryTrace, weight_row
from eg3d_rlhf.generators.assets.views import network_cameras
from eg3d_rlhf.models.clip_inputs import CLIP_TOKENS, Tokenize, clip_tokenizer
from eg3d_rlhf.models.ldm_names import to_diffusers_unet, to_diffusers_vae, to_transformers_text, unet_config
from eg3d_rlhf.models.weights import (
    adopt,
    below,
    count,
    empty,
    existing,
    from_folder,
    one_line,
    only_file,
    read,
    require_extra,
    shape_of,
    tell_once,
)
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule

FLAG = "--prior"
LICENCES = {
    768: (
        "Stable Diffusion 1.x: CreativeML OpenRAIL-M. Its use restrictions pass on to the users of what you"
        " make with it."
    ),
    1024: (
        "Stable Diffusion 2.x: CreativeML OpenRAIL++-M. Its use restrictions pass on to the users of what you"
        " make with it."
    ),
}
Prediction = Literal["epsilon", "v_prediction"]


# unet, diffusers' UNet2DConditionModel; vae, AutoencoderKL; text, transformers' CLIPTextModel
Networks = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """How a prior runs."""

    device: str | torch.device = "cpu"
    half: bool | None = None  # the U-Net in float16; None: on a GPU alone
    # pictures pass the autoencoder one by one; graphs are computed twice instead of held
    checkpointing: bool = True

    @property
    def unet_dtype(self) -> torch.dtype:
        half = torch.device(self.device).type == "cuda" if self.half is None else self.half
        return torch.float16 if half else torch.float32


class LatentPrior:
    """A diffusion model of latents as `DiffusionPrior`. Frozen; differentiable in pictures, latents and
    conditions.

    Args:
        networks: with weights, float32. tokenize: 77 tokens per prompt; None: `embed` is not called.
            alphas_cumprod: [1000].
    """

    views = 1

    def __init__(
        self,
        networks: Networks,
        tokenize: Tokenize | None,
        alphas_cumprod: torch.Tensor,
        prediction: Prediction = "epsilon",
        options: PriorOptions | None = None,
    ):
        options = options or PriorOptions()
        self.options = options
        self.tokenize = tokenize
        self.prediction = prediction
        self.alphas_cumprod = alphas_cumprod.float().to(options.device)
        self.unet, self.vae, self.text = (
            networks[part].eval().requires_grad_(False).to(options.device) for part in ("unet", "vae", "text")
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
        """Latents [B, C, H, W] of images [B, 3, h, w] in 0..1, resized to the model's size (bilinear): the
        posterior's mean.
        """
        images = images.to(self.alphas_cumprod)
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        return self.scaling * self._each(lambda x: self.vae.encode(2 * x - 1).latent_dist.mean, images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h, w] in 0..1 of latents [B, C, H, W]."""
        images = self._each(
            lambda x: self.vae.decode(x).sample, latents.to(self.alphas_cumprod) / self.scaling
        )
        return (0.5 * images + 0.5).clamp(0, 1)

    def _each(self, run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """run(batch), with checkpointing one picture at a time: the graph of one alone is held."""
        if not self.options.checkpointing:
            return run(batch)
        return torch.cat(
            [checkpoint(run, x, use_reentrant=False) if x.requires_grad else run(x) for x in batch.split(1)]
        )

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Conditions [B, T, D]; a direction ("front", "side", ...)
        is said after a prompt that is not empty.
        """
        if directions is not None:
            prompts = [f"{p}, {d} view" if p else p for p, d in zip(prompts, directions, strict=True)]
        for prompt in prompts:
            if prompt not in self._embedded:
                assert self.tokenize is not None
                with torch.no_grad():
                    tokens = self.tokenize([prompt])[0].to(self.alphas_cumprod.device)
                    self._embedded[prompt] = self.text(tokens).last_hidden_state[0].float()
        return torch.stack([self._embedded[prompt] for prompt in prompts])

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Noise [B, C, H, W], float32, of x_t at t [B]; e = a v + s x_t where the network predicts v."""
        dtype = self.options.unet_dtype
        labels = self._labels(cameras)
        out = self.unet(
            x_t.to(dtype), t, encoder_hidden_states=cond.to(dtype), class_labels=labels
        ).sample.float()
        return (
            out
            if self.prediction == "epsilon"
            else NoiseSchedule(self.alphas_cumprod).noise_of_velocity(x_t, out, t)
        )

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        return None  # one picture knows nothing of its camera


def meta_networks(folder: Path) -> Networks:
    """Make the networks that a folder's config.json files describe, on the meta device: no weights are read.

    Raises: ValueError.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    files = [existing(folder / part / "config.json", FLAG) for part in ("unet", "vae", "text_encoder")]
    with one_line(f"{FLAG}: {folder.name}", "Copy the folder again."):
        configs = [json.loads(file.read_text()) for file in files]
        makers: list[Callable[[], Any]] = [
            lambda: UNet2DConditionModel.from_config(configs[0]),
            lambda: AutoencoderKL.from_config(configs[1]),
            lambda: CLIPTextModel(CLIPTextConfig(**configs[2])),
        ]
        return dict(zip(("unet", "vae", "text"), map(empty, makers), strict=True))


def load_stable_diffusion(folder: Path, options: PriorOptions | None = None) -> LatentPrior:
    """A folder with unet/, vae/, text_encoder/, tokenizer/, scheduler/. Safetensors only; nothing is fetched;
    the licence is told once.

    Raises: FileNotFoundError; ValueError for missing or foreign parts, and predictions other than epsilon and
        v.
    """
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
        raise ValueError(
            f"{FLAG}: expected a prior that predicts epsilon or v_prediction, got {prediction}. Use SD 1.5 or"
            " 2.1."
        )
    width = text.config.hidden_size
    wanted = unet.config.cross_attention_dim
    if width != wanted:
        raise ValueError(
            f"{FLAG}: expected conditions of {wanted} numbers, got a text encoder of {width}. Use the"
            " folder's own parts."
        )
    # SD 2.x fills up with "!"
    tokenize = clip_tokenizer(folder / "tokenizer", FLAG, text.config.vocab_size, "own")
    tell_once(LICENCES[1024 if width >= 1024 else 768])
    return LatentPrior(
        {"unet": unet, "vae": vae, "text": text}, tokenize, scheduler.alphas_cumprod, prediction, options
    )


# MVDream (2308.16512), four views that attend to one another, from its published .pt file: weights alone are
# read, and run by diffusers. The converted U-Net equals the original to rounding (reference case
# `mvdream_unet`).

VIEWS = 4
LATENT_SIDE = 32  # of both published models: pictures of 256 x 256
SCALING = 0.18215
OPEN_CLIP = "cond_stage_model.model."
TRANSFORMERS = "cond_stage_model.transformer."
LICENCE = (
    "MVDream: code MIT; check the model card for the weights' licence, and Stable Diffusion's OpenRAIL use"
    " restrictions behind them."
)


class ViewAttention:
    """Attention processor: tokens of all views of an asset attend to one another, [B, pixels, D] as
    [A, V * pixels, D].
    """

    def __init__(self, inner: Any, views: int = VIEWS):
        self.inner = inner
        self.views = views

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **rest: Any,
    ):
        pixels = hidden_states.shape[1]
        together = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        out = self.inner(attn, together, encoder_hidden_states=encoder_hidden_states, **rest)
        return out.unflatten(1, (self.views, pixels)).flatten(0, 1)


def join_views(unet: Any, views: int = VIEWS) -> Any:
    """The U-Net with self-attention over `views` views; cross-attention stays. Without cameras nothing is
    added to the time embedding.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    kinds = {name: AttnProcessor2_0() for name in unet.attn_processors}
    joined = {
        name: ViewAttention(kind, views) for name, kind in kinds.items() if name.endswith("attn1.processor")
    }
    unet.set_attn_processor(kinds | joined)
    embed = type(unet).get_class_embed
    unet.get_class_embed = lambda sample, class_labels: (
        None if class_labels is None else embed(unet, sample, class_labels)
    )
    return unet


class MVDream(LatentPrior):
    """Four views as `DiffusionPrior`: B is a multiple of 4, an asset's views are adjacent, cameras [B, 16]
    are ours.
    """

    views = VIEWS

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Conditions [B, T, D] of the prompts alone: the network sees the cameras, and was never told
        directions.
        """
        return super().embed(prompts)

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        return (
            None
            if cameras is None
            else network_cameras(cameras.float()).to(self.options.device, self.options.unet_dtype)
        )


def mvdream_networks(
    state: Mapping[str, torch.Tensor], who: str
) -> tuple[Networks, dict[str, dict[str, torch.Tensor]]]:
    """The networks that a file's shapes tell, on the meta device, and their state dicts.

    Raises: ValueError for another network's file.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet_state = below(state, "model.diffusion_model.")
    vae_state = below(state, "first_stage_model.")
    config = unet_config(unet_state, who, LATENT_SIDE)
    first = shape_of(vae_state, "encoder.conv_out.weight", who, 4)[0]
    levels = range(count(vae_state, "encoder.down."))
    widths = tuple(shape_of(vae_state, f"encoder.down.{i}.block.0.conv1.weight", who, 4)[0] for i in levels)
    text_config, text_state = _text(state, who)
    networks = {
        "unet": join_views(empty(lambda: UNet2DConditionModel(**config))),
        "vae": empty(
            lambda: AutoencoderKL(
                latent_channels=first // 2,
                block_out_channels=widths,
                layers_per_block=count(vae_state, "encoder.down.0.block."),
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                scaling_factor=SCALING,
                sample_size=LATENT_SIDE * 2 ** (len(widths) - 1),
            )
        ),
        "text": empty(lambda: CLIPTextModel(CLIPTextConfig(**text_config))),
    }
    return networks, {
        "unet": to_diffusers_unet(unet_state),
        "vae": to_diffusers_vae(vae_state),
        "text": text_state,
    }


def _text(state: Mapping[str, torch.Tensor], who: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, state dict) of the text encoder: open_clip's without its last layer, or OpenAI's as it
    is.
    """
    state_of_text = below(state, TRANSFORMERS)
    other = below(state, OPEN_CLIP)
    if not state_of_text and not other:
        raise ValueError(
            f"{who}: expected its text encoder (cond_stage_model.*), got none. Use the published file."
        )
    if other:
        layers = count(other, "transformer.resblocks.") - 1
        act = "gelu"
        if layers < 1:
            raise ValueError(
                f"{who}: expected a text encoder of at least 2 layers, got {layers + 1}. Use the published"
                " file."
            )
        state_of_text = to_transformers_text(other, layers)
    else:
        layers = count(state_of_text, "text_model.encoder.layers.")
        act = "quick_gelu"
    vocabulary, width = shape_of(state_of_text, "text_model.embeddings.token_embedding.weight", who, 2)
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "hidden_act": act,
        "projection_dim": width,
        "num_attention_heads": max(width // 64, 1),
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "intermediate_size": shape_of(state_of_text, "text_model.encoder.layers.0.mlp.fc1.weight", who, 2)[0],
    }
    return config, state_of_text


def load_mvdream(path: Path, options: PriorOptions | None = None) -> MVDream:
    """sd-v2.1-base-4view.pt or sd-v1.5-4view.pt, with CLIP's tokenizer in the folder tokenizer/ beside it.
    Nothing in the file is run.

    Raises: FileNotFoundError; ValueError for a pickle that wants more than weights, and another network's
        file.
    """
    who = f"{FLAG}: {path.name}"
    state = read(path, FLAG)
    networks, states = mvdream_networks(state, who)
    for name, weights in states.items():
        adopt(networks[name], weights, who)
    (steps,) = shape_of(state, "alphas_cumprod", who, 1)
    if steps != 1000:
        raise ValueError(
            f"{who}: expected alphas_cumprod of 1000 steps, got {steps}. Use the published file."
        )
    pad = 0 if any(name.startswith(OPEN_CLIP) for name in state) else None
    tokenize = clip_tokenizer(path.parent / "tokenizer", FLAG, networks["text"].config.vocab_size, pad)
    tell_once(LICENCE)
    return MVDream(networks, tokenize, state["alphas_cumprod"], "epsilon", options)


# A prior from a path: which of the published layouts it is, what it will need of memory, and the prior
# itself.

WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")


def weights_of(path: Path) -> Path | None:
    """MVDream's file that a path names: the file, or a folder's only one; None for a Stable Diffusion folder.

    Raises: ValueError, also where the libraries are missing that run either.
    """
    file = (
        None
        if (path / "unet").is_dir()
        else only_file(path, WEIGHTS, FLAG, "unet/ (Stable Diffusion) or one MVDream file")
    )
    require_extra(FLAG, "diffusers", "transformers")
    return file


def load_prior(path: str | Path, options: PriorOptions | None = None) -> CheckedPrior:
    """Stable Diffusion (a folder) or MVDream (a .pt file), with checks. Nothing is fetched and nothing in a
    file is run.
    """
    path = existing(path, FLAG)
    file = weights_of(path)
    return CheckedPrior(load_stable_diffusion(path, options) if file is None else load_mvdream(file, options))


def latent_costs(prior: LatentPrior, pictures: int, noises: int = 1) -> Costs:
    """Estimate the costs of one step of a latent diffusion prior: its own methods are run on fake numbers.

    Args: prior: on the meta device; it is changed. pictures: B, views of all assets of a step. noises: K of
        the method: 2 of DreamDPO and PSD.
    """
    trace = MemoryTrace()
    for network in (prior.unet, prior.vae, prior.text):
        trace.fill(network)
    with trace:
        prior.alphas_cumprod = torch.empty(1000)
    prior.options = replace(prior.options, device="cpu")  # where fake numbers are
    channels, side, _ = prior.latent_shape
    pixels = prior.image_size
    width = int(prior.text.config.hidden_size)
    dtype = prior.options.unet_dtype

    def noise(batch: int, grad: bool):
        x = torch.empty(batch, channels, side, side, requires_grad=grad)
        cameras = torch.empty(batch, 16) if prior.views > 1 else None
        t = torch.zeros(batch, dtype=torch.long)
        return x, prior.predict_noise(x, t, torch.empty(batch, CLIP_TOKENS, width), cameras)

    def back(x: torch.Tensor, out: torch.Tensor):
        return torch.autograd.grad(out, x, torch.empty_like(out))

    def encode():
        images = torch.empty(pictures, 3, pixels, pixels, requires_grad=True)
        return back(images, prior.encode(images))

    stages = {
        f"encode {pictures} pictures of {pixels}^2, and back": encode,
        f"noise of {2 * noises * pictures} latents of {side}^2 (text and null)": torch.no_grad()(
            lambda: noise(2 * noises * pictures, False)
        ),
        f"decode {pictures} pictures for a reward": torch.no_grad()(
            lambda: prior.decode(torch.empty(pictures, channels, side, side))
        ),
        f"gradient through the U-Net, {pictures} latents": lambda: back(*noise(pictures, True)),
    }
    return Costs(
        weights={
            f"U-Net, {str(dtype).removeprefix('torch.')}": weight_row(prior.unet, dtype),
            "autoencoder, float32": weight_row(prior.vae),
            "text encoder, float32": weight_row(prior.text),
        },
        stages={name: trace.peak_of(stage) for name, stage in stages.items()},
    )


def prior_costs(
    path: str | Path, pictures: int, options: PriorOptions | None = None, noises: int = 1
) -> Costs:
    """What a step with this prior will hold in memory, from its shapes alone: print it before `load_prior`.

    Args: pictures: B, views of all assets of a step. noises: K of the method.
    Raises: as `load_prior`.
    """
    path = existing(path, FLAG)
    file = weights_of(path)
    options = options or PriorOptions()
    options = replace(options, device="meta", half=options.unet_dtype == torch.float16)
    if file is None:
        kind = LatentPrior
        networks = meta_networks(path)
    else:
        kind = MVDream
        networks, _ = mvdream_networks(read(file, FLAG), f"{FLAG}: {file.name}")
    check_views(pictures, kind.views)
    return latent_costs(
        kind(networks, None, torch.empty(1000, device="meta"), "epsilon", options), pictures, noises
    )
