"""Implements latent diffusion models as priors: Stable Diffusion from a folder, and MVDream from its file.
They use diffusers and transformers (optional dependencies [sd]), which are imported in functions. Also
estimates the memory that they need.

Only the U-Net may use half precision. alphas_cumprod, latents, and everything that is computed from them stay
in float32, because at t = 980 x0 is divided by 0.076.

Shape letters: B = A V images, V views of an asset, C, H, W of latents, h, w of images, T tokens, D their
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
        "Stable Diffusion 1.x: licence CreativeML OpenRAIL-M. Its use restrictions also apply to the users"
        " of what you create with it."
    ),
    1024: (
        "Stable Diffusion 2.x: licence CreativeML OpenRAIL++-M. Its use restrictions also apply to the"
        " users of what you create with it."
    ),
}
Prediction = Literal["epsilon", "v_prediction"]


# Networks by name: unet, a UNet2DConditionModel of diffusers; vae, an AutoencoderKL; text, a CLIPTextModel of
# transformers.
Networks = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """Settings of the computation of a prior."""

    device: str | torch.device = "cpu"  # of all networks
    half: bool | None = None  # use float16 for the U-Net; None: only on a GPU
    # Pass images through the autoencoder one by one, and recompute activations instead of storing them.
    checkpointing: bool = True

    @property
    def unet_dtype(self) -> torch.dtype:
        """Precision of the U-Net on this device."""
        half = torch.device(self.device).type == "cuda" if self.half is None else self.half
        return torch.float16 if half else torch.float32


class LatentPrior:
    """`DiffusionPrior` of latents. Its weights are frozen. Differentiable in images, latents and
    conditioning.

    Args:
        networks: with weights, in float32.
        tokenize: returns 77 tokens per prompt; None: `embed` must not be called.
        alphas_cumprod: [1000].
        prediction: of the network.
        options: of the computation.
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
        # Also marks device and precision of latents: other tensors are moved to it.
        self.alphas_cumprod = alphas_cumprod.float().to(options.device)
        self.unet, self.vae, self.text = (
            networks[part].eval().requires_grad_(False).to(options.device) for part in ("unet", "vae", "text")
        )
        # Only the U-Net: latents and images stay in float32.
        if options.unet_dtype == torch.float16:
            self.unet.half()
        if options.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.scaling = float(self.vae.config.scaling_factor)
        side = int(self.unet.config.sample_size)
        self.latent_shape = (int(self.unet.config.in_channels), side, side)
        # Each level of the autoencoder but the first halves the resolution.
        self.image_size = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._embedded: dict[str, torch.Tensor] = {}  # cache: prompt -> embedding [T, D]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [B, 3, h, w] in 0..1, resized (bilinearly) to the model's size, to latents [B, C, H,
        W]: the mean of the posterior.
        """
        images = images.to(self.alphas_cumprod)
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        # The autoencoder expects images in -1..1.
        return self.scaling * self._each(lambda x: self.vae.encode(2 * x - 1).latent_dist.mean, images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [B, C, H, W] to images [B, 3, h, w] in 0..1."""
        images = self._each(
            lambda x: self.vae.decode(x).sample, latents.to(self.alphas_cumprod) / self.scaling
        )
        # -1..1 to 0..1; the decoder can exceed the range slightly.
        return (0.5 * images + 0.5).clamp(0, 1)

    def _each(self, run: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """Return run(batch). With checkpointing, images are processed one by one, so that only one
        graph is in memory.
        """
        if not self.options.checkpointing:
            return run(batch)
        return torch.cat(
            [checkpoint(run, x, use_reentrant=False) if x.requires_grad else run(x) for x in batch.split(1)]
        )

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Embed prompts, [B, T, D]. A direction ("front", "side", ...) is added to a prompt that is not
        empty.
        """
        if directions is not None:
            # The null prompt stays empty.
            prompts = [f"{p}, {d} view" if p else p for p, d in zip(prompts, directions, strict=True)]
        # Prompts repeat in every step, so embeddings are cached.
        for prompt in prompts:
            if prompt not in self._embedded:
                assert self.tokenize is not None
                with torch.no_grad():
                    # One prompt at a time: the embedding of a prompt must not depend on the batch.
                    tokens = self.tokenize([prompt])[0].to(self.alphas_cumprod.device)
                    self._embedded[prompt] = self.text(tokens).last_hidden_state[0].float()
        # [B, T, D]; a prompt may occur more than once.
        return torch.stack([self._embedded[prompt] for prompt in prompts])

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise [B, C, H, W] of x_t at t [B], in float32; from v it is e = a v + s x_t."""
        # The prediction is converted back to float32 before anything is computed from it.
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
        """Return the class labels of the U-Net: none, because a single image has no camera."""
        return None


def meta_networks(folder: Path) -> Networks:
    """Make the networks that a folder's config.json files describe, on the meta device. No weights are read.

    Raises: ValueError.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    # Shapes are enough to estimate the memory before gigabytes of weights are read.
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
    """Load a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/. Only safetensors are read,
    and nothing is downloaded. The licence is printed once.

    Raises: FileNotFoundError; ValueError for missing or foreign parts, and for predictions other than epsilon
    and v.
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
    # Which quantity the U-Net predicts stands in the scheduler's configuration only.
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{FLAG}: expected a prior that predicts epsilon or v_prediction, got {prediction}. Use SD 1.5"
            " or SD 2.1."
        )
    width = text.config.hidden_size
    expected = unet.config.cross_attention_dim
    if width != expected:
        raise ValueError(
            f"{FLAG}: the U-Net expects embeddings with {expected} numbers, but the text encoder has"
            f" {width}. Use parts of the same model."
        )
    # SD 2.x pads prompts with the token of "!"; "own" uses the padding token of the folder's tokenizer.
    tokenize = clip_tokenizer(folder / "tokenizer", FLAG, text.config.vocab_size, "own")
    tell_once(LICENCES[1024 if width >= 1024 else 768])
    return LatentPrior(
        {"unet": unet, "vae": vae, "text": text}, tokenize, scheduler.alphas_cumprod, prediction, options
    )


# --- MVDream (arXiv 2308.16512): four views that attend to one another, from its published .pt file. Only
# weights are read, and diffusers runs them. The converted U-Net equals the original up to rounding (reference
# case `mvdream_unet`).

VIEWS = 4
LATENT_SIDE = 32  # of both published models, for images of 256 x 256
SCALING = 0.18215  # scaling factor of Stable Diffusion's latents
OPEN_CLIP = "cond_stage_model.model."
TRANSFORMERS = "cond_stage_model.transformer."
LICENCE = (
    "MVDream: the code has the MIT licence. See the model card for the licence of the weights. They are"
    " based on Stable Diffusion, whose OpenRAIL use restrictions apply."
)


class ViewAttention:
    """Attention processor that lets the tokens of all views of an asset attend to one another: [B, pixels, D]
    is processed as [A, V * pixels, D].
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
        # [A V, pixels, D] to [A, V pixels, D], and back below.
        together = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        out = self.inner(attn, together, encoder_hidden_states=encoder_hidden_states, **rest)
        return out.unflatten(1, (self.views, pixels)).flatten(0, 1)


def join_views(unet: Any, views: int = VIEWS) -> Any:
    """Change a U-Net to self-attention over `views` views; cross-attention does not change. Without cameras
    nothing is added to the time embedding.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    # attn1 is self-attention, attn2 cross-attention in diffusers' names.
    processors = {name: AttnProcessor2_0() for name in unet.attn_processors}
    joined = {
        name: ViewAttention(processor, views)
        for name, processor in processors.items()
        if name.endswith("attn1.processor")
    }
    unet.set_attn_processor(processors | joined)
    # diffusers raises an error without class labels; here they are the optional cameras.
    embed = type(unet).get_class_embed
    unet.get_class_embed = lambda sample, class_labels: (
        None if class_labels is None else embed(unet, sample, class_labels)
    )
    return unet


class MVDream(LatentPrior):
    """`DiffusionPrior` of four views: B is a multiple of 4, the views of an asset are adjacent, and cameras
    [B, 16] have our convention.
    """

    views = VIEWS

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Embed the prompts only, [B, T, D]. The network gets the cameras and was trained without
        directions in prompts.
        """
        return super().embed(prompts)

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        """Return the cameras in the network's convention."""
        return (
            None
            if cameras is None
            else network_cameras(cameras.float()).to(self.options.device, self.options.unet_dtype)
        )


def mvdream_networks(
    state: Mapping[str, torch.Tensor], who: str
) -> tuple[Networks, dict[str, dict[str, torch.Tensor]]]:
    """Make the networks that the shapes in a file determine, on the meta device, with their state dicts.

    Raises: ValueError for the file of another network.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    # Prefixes of the published files, which have the layout of latent diffusion (LDM).
    unet_state = below(state, "model.diffusion_model.")
    vae_state = below(state, "first_stage_model.")
    config = unet_config(unet_state, who, LATENT_SIDE)
    # The encoder gives means and log variances, so its channels are twice those of latents.
    latent_numbers = shape_of(vae_state, "encoder.conv_out.weight", who, 4)[0]
    # The first convolution of a level has its number of channels.
    levels = range(count(vae_state, "encoder.down."))
    widths = tuple(shape_of(vae_state, f"encoder.down.{i}.block.0.conv1.weight", who, 4)[0] for i in levels)
    text_config, text_state = _text(state, who)
    networks = {
        "unet": join_views(empty(lambda: UNet2DConditionModel(**config))),
        "vae": empty(
            lambda: AutoencoderKL(
                latent_channels=latent_numbers // 2,
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
    """Return configuration and state dict of the text encoder: that of open_clip without its last layer, or
    that of OpenAI unchanged.
    """
    # The prefix shows which text encoder the model uses: Stable Diffusion 1.x that of OpenAI, 2.x that of
    # open_clip.
    state_of_text = below(state, TRANSFORMERS)
    other = below(state, OPEN_CLIP)
    if not state_of_text and not other:
        raise ValueError(f"{who}: the file has no text encoder (cond_stage_model.*). Use the published file.")
    if other:
        # MVDream uses the output of the last layer but one.
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
        "num_attention_heads": max(width // 64, 1),  # 64 channels per head in both published encoders
        "bos_token_id": vocabulary - 2,  # CLIP's vocabulary ends with the start and the end token
        "eos_token_id": vocabulary - 1,
        "intermediate_size": shape_of(state_of_text, "text_model.encoder.layers.0.mlp.fc1.weight", who, 2)[0],
    }
    return config, state_of_text


def load_mvdream(path: Path, options: PriorOptions | None = None) -> MVDream:
    """Load sd-v2.1-base-4view.pt or sd-v1.5-4view.pt, with CLIP's tokenizer in the folder tokenizer/ beside
    it. No code in the file is run.

    Raises: FileNotFoundError; ValueError for a pickle with more than weights, and for the file of another
    network.
    """
    who = f"{FLAG}: {path.name}"
    state = read(path, FLAG)
    networks, states = mvdream_networks(state, who)
    for name, weights in states.items():
        # Gives the meta networks their weights without a second copy in memory.
        adopt(networks[name], weights, who)
    (steps,) = shape_of(state, "alphas_cumprod", who, 1)
    # All schedules here assume 1000 times.
    if steps != 1000:
        raise ValueError(
            f"{who}: expected alphas_cumprod of 1000 steps, got {steps}. Use the published file."
        )
    # open_clip pads with token 0, OpenAI's tokenizer with its end token.
    pad = 0 if any(name.startswith(OPEN_CLIP) for name in state) else None
    tokenize = clip_tokenizer(path.parent / "tokenizer", FLAG, networks["text"].config.vocab_size, pad)
    tell_once(LICENCE)
    return MVDream(networks, tokenize, state["alphas_cumprod"], "epsilon", options)


# --- a prior from a path: detection of its layout, its memory, and loading

WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")


def mvdream_file(path: Path) -> Path | None:
    """Return MVDream's file that a path names: the file itself, or the only one of a folder. Return None for
    a Stable Diffusion folder.

    Raises: ValueError, also if libraries for it are missing.
    """
    file = (
        None
        if (path / "unet").is_dir()
        else only_file(path, WEIGHTS, FLAG, "unet/ (Stable Diffusion) or one MVDream file")
    )
    require_extra(FLAG, "diffusers", "transformers")
    return file


def load_prior(path: str | Path, options: PriorOptions | None = None) -> CheckedPrior:
    """Load Stable Diffusion (a folder) or MVDream (a .pt file), with checks of its inputs. Nothing is
    downloaded, and no code in a file is run.
    """
    path = existing(path, FLAG)
    file = mvdream_file(path)
    return CheckedPrior(load_stable_diffusion(path, options) if file is None else load_mvdream(file, options))


def latent_costs(prior: LatentPrior, image_count: int, noises: int = 1) -> Costs:
    """Estimate the costs of one step of a latent diffusion prior, by running its methods on fake tensors.

    Args:
        prior: on the meta device. It is changed.
        image_count: B, views of all assets of a step.
        noises: K of the method; 2 for DreamDPO and PSD.
    """
    trace = MemoryTrace()
    # Fake weights: shapes and types only.
    for network in (prior.unet, prior.vae, prior.text):
        trace.fill(network)
    with trace:
        prior.alphas_cumprod = torch.empty(1000)
    prior.options = replace(prior.options, device="cpu")  # the device of fake tensors
    channels, side, _ = prior.latent_shape
    pixels = prior.image_size
    width = int(prior.text.config.hidden_size)
    dtype = prior.options.unet_dtype

    def predict(batch: int, grad: bool):
        x = torch.empty(batch, channels, side, side, requires_grad=grad)
        # Only multi-view priors get cameras.
        cameras = torch.empty(batch, 16) if prior.views > 1 else None
        t = torch.zeros(batch, dtype=torch.long)
        return x, prior.predict_noise(x, t, torch.empty(batch, CLIP_TOKENS, width), cameras)

    def backward(x: torch.Tensor, out: torch.Tensor):
        # Only the memory of the incoming gradient matters, not its values.
        return torch.autograd.grad(out, x, torch.empty_like(out))

    def encode():
        images = torch.empty(image_count, 3, pixels, pixels, requires_grad=True)
        return backward(images, prior.encode(images))

    stages = {
        f"encode {image_count} images of {pixels}^2, and backward": encode,
        f"noise of {2 * noises * image_count} latents of {side}^2 (text and null)": torch.no_grad()(
            lambda: predict(2 * noises * image_count, False)
        ),
        f"decode {image_count} images for a reward": torch.no_grad()(
            lambda: prior.decode(torch.empty(image_count, channels, side, side))
        ),
        f"gradient through the U-Net, {image_count} latents": lambda: backward(*predict(image_count, True)),
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
    path: str | Path, image_count: int, options: PriorOptions | None = None, noises: int = 1
) -> Costs:
    """Estimate the memory of a step with this prior, from its shapes only. Print the result before
    `load_prior`.

    Args:
        path: of the prior.
        image_count: B, views of all assets of a step.
        options: of the computation.
        noises: K of the method.

    Raises: as `load_prior`.
    """
    path = existing(path, FLAG)
    file = mvdream_file(path)
    options = options or PriorOptions()
    # The precision is fixed before the device becomes meta, where the default would be float32.
    options = replace(options, device="meta", half=options.unet_dtype == torch.float16)
    if file is None:
        kind = LatentPrior
        networks = meta_networks(path)
    else:
        kind = MVDream
        networks, _ = mvdream_networks(read(file, FLAG), f"{FLAG}: {file.name}")
    check_views(image_count, kind.views)
    return latent_costs(
        kind(networks, None, torch.empty(1000, device="meta"), "epsilon", options), image_count, noises
    )
