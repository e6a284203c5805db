"""Implements latent diffusion models as priors: Stable Diffusion from a folder, and MVDream from its file.

The module also estimates the memory that a step with these priors needs. It uses diffusers and transformers,
which are optional dependencies ([sd]) and are therefore imported in functions.

Only the U-Net may use half precision. alphas_cumprod, latents, and everything that is computed from them stay
in float32, because the estimate x0 at t = 980 is divided by a = 0.076, which amplifies rounding errors.

Shapes: A = number of assets; V views of an asset; B = A V images; K noises; C, H, W channels, rows and
columns of latents; h, w rows and columns of images; T tokens of a prompt with D entries each.
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
    count,
    empty,
    entries_below,
    from_folder,
    library_errors_as_one_line,
    only_file,
    print_once,
    read,
    require_extra,
    shape_of,
)
from eg3d_rlhf.tuning.distill.schedule import NoiseSchedule
from training.input_paths import existing_path

FLAG = "--prior"  # flag that messages name
# Width of the text encoder -> notice about the licence of the model.
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
Prediction = Literal["epsilon", "v_prediction"]  # quantity that the U-Net predicts


# Networks of a model by name: "unet", a UNet2DConditionModel of diffusers; "vae", an AutoencoderKL of
# diffusers; "text", a CLIPTextModel of transformers.
Networks = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PriorOptions:
    """Settings for computing a prior: device, precision, and saving of memory."""

    device: str | torch.device = "cpu"  # device of all networks
    half: bool | None = None  # True: float16 for the U-Net; False: float32; None: float16 on a GPU only
    # True: images pass through the autoencoder one by one, and activations are recomputed in the backward
    # pass.
    checkpointing: bool = True

    @property
    def unet_dtype(self) -> torch.dtype:
        """Data type of the U-Net's weights and activations."""
        uses_half = torch.device(self.device).type == "cuda" if self.half is None else self.half
        return torch.float16 if uses_half else torch.float32


class LatentPrior:
    """Latent diffusion model with the interface `DiffusionPrior`.

    Its weights are frozen. It is differentiable in images, latents and conditioning.

    Args:
        networks: networks with their weights in float32.
        tokenize: function that returns 77 tokens for each prompt. None if `embed` is not called.
        alphas_cumprod: [1000], alphas_cumprod of the noise schedule.
        prediction: quantity that the U-Net predicts: the noise (epsilon), or v.
        options: device and precision; None uses the defaults of `PriorOptions`.
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
        # `.to(self.alphas_cumprod)` gives images and latents its device and data type, float32.
        self.alphas_cumprod = alphas_cumprod.float().to(options.device)
        self.unet, self.vae, self.text = (
            networks[name].eval().requires_grad_(False).to(options.device) for name in ("unet", "vae", "text")
        )
        if options.unet_dtype == torch.float16:
            self.unet.half()
        if options.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.scaling = float(self.vae.config.scaling_factor)
        side = int(self.unet.config.sample_size)
        self.latent_shape = (int(self.unet.config.in_channels), side, side)
        # Each level of the encoder except the first halves the resolution.
        self.image_size = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self._embeddings: dict[str, torch.Tensor] = {}  # cache: prompt -> embedding [T, D]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images as latents.

        Args:
            images: [B, 3, h, w] in 0..1. Images of another size than the model's are resized bilinearly.
        Returns: [B, C, H, W], mean of the encoder's posterior.
        """
        images = images.to(self.alphas_cumprod)
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False
            )
        # 2 x - 1: the autoencoder expects images in -1..1.
        return self.scaling * self._each(lambda x: self.vae.encode(2 * x - 1).latent_dist.mean, images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents [B, C, H, W] to images [B, 3, h, w] in 0..1."""
        images = self._each(
            lambda x: self.vae.decode(x).sample, latents.to(self.alphas_cumprod) / self.scaling
        )
        # From -1..1 to 0..1. The output of the decoder can exceed its range slightly.
        return (0.5 * images + 0.5).clamp(0, 1)

    def _each(self, process: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """Return process(batch) for a batch of images or latents [B, ...].

        With checkpointing, the images of the batch are processed one by one, so that the activations of only
        one image are in memory.
        """
        if not self.options.checkpointing:
            return process(batch)
        processed_images = []
        for image in batch.split(1):
            # torch's checkpoint is needed for tensors with a gradient only.
            if image.requires_grad:
                processed_images.append(checkpoint(process, image, use_reentrant=False))
            else:
                processed_images.append(process(image))
        return torch.cat(processed_images)

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Return the embeddings of B prompts, [B, T, D].

        Args:
            prompts: B prompts. "" is the null prompt.
            directions: B viewing directions such as "front", which are appended to the prompts except the
                null prompt; or None.
        """
        if directions is not None:
            prompts = [
                f"{prompt}, {direction} view" if prompt else prompt
                for prompt, direction in zip(prompts, directions, strict=True)
            ]
        # The prompts are the same in every step, so their embeddings are cached.
        for prompt in prompts:
            if prompt not in self._embeddings:
                assert self.tokenize is not None
                with torch.no_grad():
                    # One prompt at a time, so that its embedding is bitwise independent of the batch.
                    tokens = self.tokenize([prompt])[0].to(self.alphas_cumprod.device)
                    self._embeddings[prompt] = self.text(tokens).last_hidden_state[0].float()
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    def predict_noise(
        self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor, cameras: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict the noise of noised latents, [B, C, H, W] in float32.

        Args:
            x_t: [B, C, H, W], noised latents.
            t: [B], times.
            cond: [B, T, D], embeddings of the prompts.
            cameras: [B, 16], cam2world matrices, or None.
        """
        dtype = self.options.unet_dtype
        class_labels = self._labels(cameras)
        # Converted to float32 before the noise is computed from it.
        prediction = self.unet(
            x_t.to(dtype), t, encoder_hidden_states=cond.to(dtype), class_labels=class_labels
        ).sample.float()
        if self.prediction == "epsilon":
            return prediction
        return NoiseSchedule(self.alphas_cumprod).noise_of_velocity(x_t, prediction, t)

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        """Return the class labels of the U-Net, which are None, since this model does not use cameras."""
        return None


def meta_networks(folder: Path) -> Networks:
    """Make the networks of a Stable Diffusion folder on the meta device, without reading weights.

    Their shapes are enough to estimate the memory of a step.

    Args:
        folder: folder whose subfolders contain config.json files.
    Raises: FileNotFoundError or ValueError for a missing or invalid config.json.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config_files = [
        existing_path(folder / subfolder / "config.json", FLAG)
        for subfolder in ("unet", "vae", "text_encoder")
    ]
    with library_errors_as_one_line(f"{FLAG}: {folder.name}", "Copy the folder again."):
        configs = [json.loads(file.read_text()) for file in config_files]
        make_network_functions: list[Callable[[], Any]] = [
            lambda: UNet2DConditionModel.from_config(configs[0]),
            lambda: AutoencoderKL.from_config(configs[1]),
            lambda: CLIPTextModel(CLIPTextConfig(**configs[2])),
        ]
        return dict(zip(("unet", "vae", "text"), map(empty, make_network_functions), strict=True))


def load_stable_diffusion(folder: Path, options: PriorOptions | None = None) -> LatentPrior:
    """Load Stable Diffusion from a folder in the layout of diffusers.

    Weights are read from safetensors files only, and nothing is downloaded. A notice about the licence is
    printed once.

    Args:
        folder: folder with the subfolders unet, vae, text_encoder, tokenizer and scheduler.
        options: device and precision; None uses the defaults of `PriorOptions`.
    Raises: FileNotFoundError for a missing subfolder or file; ValueError if the parts do not belong together,
    or if the model predicts neither epsilon nor v.
    """
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    for subfolder in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        existing_path(folder / subfolder, FLAG)
    class_by_subfolder = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    unet, vae, text_encoder = (
        from_folder(network_class, folder / subfolder, FLAG)
        for subfolder, network_class in class_by_subfolder.items()
    )
    existing_path(folder / "scheduler" / "scheduler_config.json", FLAG)
    with library_errors_as_one_line(f"{FLAG}: {folder.name}/scheduler", "Copy the folder again."):
        scheduler = DDPMScheduler.from_pretrained(str(folder / "scheduler"), local_files_only=True)
    # The quantity that the U-Net predicts is stored in the configuration of the scheduler, not of the U-Net.
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{FLAG}: this model predicts {prediction}, but a prior has to predict epsilon or v_prediction."
            " Use Stable Diffusion 1.5 or 2.1."
        )
    width = text_encoder.config.hidden_size
    required_width = unet.config.cross_attention_dim
    if width != required_width:
        raise ValueError(
            f"{FLAG}: the U-Net needs embeddings with {required_width} entries, but those of the text encoder"
            f" have {width}. Use the U-Net and the text encoder of the same model."
        )
    # SD 2.x pads prompts with the token of "!"; "folder" uses the padding token of the folder's tokenizer.
    tokenize = clip_tokenizer(folder / "tokenizer", FLAG, text_encoder.config.vocab_size, "folder")
    print_once(LICENCES[1024 if width >= 1024 else 768])
    return LatentPrior(
        {"unet": unet, "vae": vae, "text": text_encoder},
        tokenize,
        scheduler.alphas_cumprod,
        prediction,
        options,
    )


# --- MVDream (arXiv 2308.16512), a model of four views that attend to one another, from its published .pt
# file. Only the weights are read from the file, and networks of diffusers use them. The predictions equal
# those of the original code up to rounding (reference case `mvdream_unet`).

VIEWS = 4
LATENT_SIDE = 32  # edge of the latents of both published models, whose images have 256 x 256 pixels
SCALING = 0.18215  # scaling factor of Stable Diffusion's latents
# Prefixes of the text encoder's tensors: the model based on Stable Diffusion 2 uses open_clip, that based on
# 1.5 uses transformers.
OPEN_CLIP = "cond_stage_model.model."
TRANSFORMERS = "cond_stage_model.transformer."
LICENCE = (
    "MVDream: the code has the MIT licence. See the model card for the licence of the weights. They are"
    " based on Stable Diffusion, whose OpenRAIL use restrictions apply."
)


class ViewAttention:
    """Attention processor of diffusers in which the tokens of all views of an asset attend to one another.

    Hidden states [B, pixels, D] are processed as [A, V * pixels, D].

    Args:
        inner_processor: attention processor that computes the attention.
        views: number V of views.
    """

    def __init__(self, inner_processor: Any, views: int = VIEWS):
        self.inner = inner_processor
        self.views = views

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **other_arguments: Any,
    ):
        pixel_count = hidden_states.shape[1]
        # [A V, pixels, D] to [A, V pixels, D], and back below.
        joined_states = hidden_states.unflatten(0, (-1, self.views)).flatten(1, 2)
        attended_states = self.inner(
            attn, joined_states, encoder_hidden_states=encoder_hidden_states, **other_arguments
        )
        return attended_states.unflatten(1, (self.views, pixel_count)).flatten(0, 1)


def join_views(unet: Any, views: int = VIEWS) -> Any:
    """Change a U-Net of diffusers so that its self-attention joins the views of an asset.

    Cross-attention to the prompt does not change. The U-Net also accepts inputs without cameras; nothing is
    then added to its time embedding.

    Args:
        unet: UNet2DConditionModel, which is changed.
        views: number of views of an asset.
    Returns: the same U-Net.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    # In the names of diffusers, attn1 is self-attention and attn2 cross-attention.
    processors = {processor_name: AttnProcessor2_0() for processor_name in unet.attn_processors}
    view_processors = {
        processor_name: ViewAttention(processor, views)
        for processor_name, processor in processors.items()
        if processor_name.endswith("attn1.processor")
    }
    unet.set_attn_processor(processors | view_processors)
    # The cameras are class labels of the U-Net. Without class labels, the method of diffusers raises an
    # error.
    embed_labels = type(unet).get_class_embed
    unet.get_class_embed = lambda sample, class_labels: (
        None if class_labels is None else embed_labels(unet, sample, class_labels)
    )
    return unet


class MVDream(LatentPrior):
    """Multi-view diffusion model with the interface `DiffusionPrior`, for four views of an asset at a time.

    The number B of images is a multiple of 4, and the views of an asset are adjacent. Cameras [B, 16] have
    the convention of this package.
    """

    views = VIEWS

    def embed(self, prompts: list[str], directions: list[str] | None = None) -> torch.Tensor:
        """Return the embeddings of B prompts, [B, T, D].

        The directions are not used, because the network gets the cameras, and was trained on prompts without
        directions.
        """
        return super().embed(prompts)

    def _labels(self, cameras: torch.Tensor | None) -> torch.Tensor | None:
        """Return the cameras [B, 16] in MVDream's convention, or None without cameras."""
        if cameras is None:
            return None
        return network_cameras(cameras.float()).to(self.options.device, self.options.unet_dtype)


def mvdream_networks(
    file_tensors: Mapping[str, torch.Tensor], who: str
) -> tuple[Networks, dict[str, dict[str, torch.Tensor]]]:
    """Make the networks of MVDream on the meta device. Their sizes follow from the shapes of the tensors.

    Args:
        file_tensors: tensors of the published file.
        who: beginning of error messages, with the name of the file.
    Returns: the networks by name, and the state dict of each network by the same name.
    Raises: ValueError for the file of another network.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    # Prefixes of the layout of latent diffusion (LDM), which the published files have.
    unet_state = entries_below(file_tensors, "model.diffusion_model.")
    vae_state = entries_below(file_tensors, "first_stage_model.")
    config = unet_config(unet_state, who, LATENT_SIDE)
    # The encoder returns means and log variances, so it has twice as many output channels as the latents.
    encoder_channels = shape_of(vae_state, "encoder.conv_out.weight", who, 4)[0]
    # The first convolution of a level determines its number of channels.
    levels = range(count(vae_state, "encoder.down."))
    level_widths = tuple(
        shape_of(vae_state, f"encoder.down.{i}.block.0.conv1.weight", who, 4)[0] for i in levels
    )
    text_config, text_state = _text(file_tensors, who)
    networks = {
        "unet": join_views(empty(lambda: UNet2DConditionModel(**config))),
        "vae": empty(
            lambda: AutoencoderKL(
                latent_channels=encoder_channels // 2,
                block_out_channels=level_widths,
                layers_per_block=count(vae_state, "encoder.down.0.block."),
                down_block_types=("DownEncoderBlock2D",) * len(level_widths),
                up_block_types=("UpDecoderBlock2D",) * len(level_widths),
                scaling_factor=SCALING,
                sample_size=LATENT_SIDE * 2 ** (len(level_widths) - 1),
            )
        ),
        "text": empty(lambda: CLIPTextModel(CLIPTextConfig(**text_config))),
    }
    return networks, {
        "unet": to_diffusers_unet(unet_state),
        "vae": to_diffusers_vae(vae_state),
        "text": text_state,
    }


def _text(
    file_tensors: Mapping[str, torch.Tensor], who: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the configuration and the state dict of MVDream's text encoder, in the layout of transformers.

    Args:
        file_tensors: tensors of the published file.
        who: beginning of error messages, with the name of the file.
    Raises: ValueError if the file contains no text encoder, or one of less than two layers.
    """
    # The prefix of the tensors shows whether the text encoder is that of OpenAI or of open_clip.
    text_state = entries_below(file_tensors, TRANSFORMERS)
    open_clip_state = entries_below(file_tensors, OPEN_CLIP)
    if not text_state and not open_clip_state:
        raise ValueError(
            f"{who}: the file contains no text encoder (tensors cond_stage_model.*). Download the file that"
            " MVDream publishes."
        )
    if open_clip_state:
        # Stable Diffusion 2 and MVDream use the output of the last layer but one, so the last layer is left
        # out.
        layer_count = count(open_clip_state, "transformer.resblocks.") - 1
        activation_name = "gelu"
        if layer_count < 1:
            raise ValueError(
                f"{who}: the text encoder has {layer_count + 1} layers, but needs at least 2. Download the"
                " file that MVDream publishes."
            )
        text_state = to_transformers_text(open_clip_state, layer_count)
    else:
        layer_count = count(text_state, "text_model.encoder.layers.")
        activation_name = "quick_gelu"
    vocabulary_size, width = shape_of(text_state, "text_model.embeddings.token_embedding.weight", who, 2)
    config = {
        "vocab_size": vocabulary_size,
        "hidden_size": width,
        "num_hidden_layers": layer_count,
        "hidden_act": activation_name,
        "projection_dim": width,
        "num_attention_heads": max(
            width // 64, 1
        ),  # both published encoders have 64 channels per attention head
        "bos_token_id": vocabulary_size
        - 2,  # the last two tokens of CLIP's vocabulary are the start and the end token
        "eos_token_id": vocabulary_size - 1,
        "intermediate_size": shape_of(text_state, "text_model.encoder.layers.0.mlp.fc1.weight", who, 2)[0],
    }
    return config, text_state


def load_mvdream(path: Path, options: PriorOptions | None = None) -> MVDream:
    """Load MVDream from its published file, sd-v2.1-base-4view.pt or sd-v1.5-4view.pt.

    Only tensors are read from the file; code in it is not executed. A notice about the licence is printed
    once.

    Args:
        path: path of the file. The folder tokenizer/ beside the file contains CLIP's tokenizer.
        options: device and precision; None uses the defaults of `PriorOptions`.
    Raises: FileNotFoundError for a missing file or tokenizer; ValueError for a pickle that contains other
    objects than tensors, and for the file of another network.
    """
    who = f"{FLAG}: {path.name}"
    file_tensors = read(path, FLAG)
    networks, weights_by_network = mvdream_networks(file_tensors, who)
    for network_name, network_weights in weights_by_network.items():
        # Replaces the meta tensors of a network by the tensors of the file, without a second copy in memory.
        adopt(networks[network_name], network_weights, who)
    (time_count,) = shape_of(file_tensors, "alphas_cumprod", who, 1)
    if time_count != 1000:
        raise ValueError(
            f"{who}: alphas_cumprod has {time_count} entries, but the noise schedule needs 1000. Download the"
            " file that MVDream publishes."
        )
    # open_clip pads prompts with the token 0. None: OpenAI's tokenizer pads with its end token.
    pad_token = 0 if any(tensor_name.startswith(OPEN_CLIP) for tensor_name in file_tensors) else None
    tokenize = clip_tokenizer(path.parent / "tokenizer", FLAG, networks["text"].config.vocab_size, pad_token)
    print_once(LICENCE)
    return MVDream(networks, tokenize, file_tensors["alphas_cumprod"], "epsilon", options)


# --- a prior from a path: detection of its layout, estimate of its memory, and loading

WEIGHTS = (".pt", ".pth", ".ckpt", ".safetensors")  # endings of files with weights


def mvdream_file(path: Path) -> Path | None:
    """Return the path of MVDream's file, or None for a Stable Diffusion folder.

    Args:
        path: path of MVDream's file, of a folder in which it is the only file with weights, or of a Stable
            Diffusion folder.
    Raises: ValueError if the path names neither, or if diffusers or transformers is not installed.
    """
    weights_file = (
        None
        if (path / "unet").is_dir()
        else only_file(path, WEIGHTS, FLAG, "unet/ (Stable Diffusion) or one MVDream file")
    )
    require_extra(FLAG, "diffusers", "transformers")
    return weights_file


def load_prior(path: str | Path, options: PriorOptions | None = None) -> CheckedPrior:
    """Load a prior from local files. Nothing is downloaded, and code in a file is not executed.

    Args:
        path: Stable Diffusion folder, or file of MVDream, see `mvdream_file`.
        options: device and precision; None uses the defaults of `PriorOptions`.
    Returns: the prior in a wrapper that checks the shapes of its inputs and outputs.
    Raises: the errors of `load_stable_diffusion` and `load_mvdream`.
    """
    path = existing_path(path, FLAG)
    weights_file = mvdream_file(path)
    return CheckedPrior(
        load_stable_diffusion(path, options) if weights_file is None else load_mvdream(weights_file, options)
    )


def latent_costs(prior: LatentPrior, image_count: int, noise_count: int = 1) -> Costs:
    """Estimate the memory of one step with a latent diffusion prior, by running its methods on fake tensors.

    Args:
        prior: prior whose networks are on the meta device. It is changed.
        image_count: number B of images in a step.
        noise_count: number K of noises of the method.
    Returns: memory of the weights, and peak memory of each stage of a step.
    """
    trace = MemoryTrace()
    # Gives the networks fake weights, which have shapes and data types but no values.
    for network in (prior.unet, prior.vae, prior.text):
        trace.fill(network)
    with trace:
        prior.alphas_cumprod = torch.empty(1000)
    prior.options = replace(prior.options, device="cpu")  # fake tensors are on the CPU
    channels, latent_side, _ = prior.latent_shape
    image_side = prior.image_size
    width = int(prior.text.config.hidden_size)
    dtype = prior.options.unet_dtype

    # The functions below run the stages of a step.
    def predict(batch_size: int, needs_grad: bool):
        x = torch.empty(batch_size, channels, latent_side, latent_side, requires_grad=needs_grad)
        # Only multi-view priors get cameras.
        cameras = torch.empty(batch_size, 16) if prior.views > 1 else None
        t = torch.zeros(batch_size, dtype=torch.long)
        return x, prior.predict_noise(x, t, torch.empty(batch_size, CLIP_TOKENS, width), cameras)

    def backward(x: torch.Tensor, output_tensor: torch.Tensor):
        # empty_like: the memory of the incoming gradient counts, and its values do not matter.
        return torch.autograd.grad(output_tensor, x, torch.empty_like(output_tensor))

    def encode():
        images = torch.empty(image_count, 3, image_side, image_side, requires_grad=True)
        return backward(images, prior.encode(images))

    # The prior predicts the noise with the prompt and with the null prompt.
    noised_count = 2 * noise_count * image_count
    stages = {
        f"encode {image_count} images of {image_side}^2, and backward": encode,
        f"noise of {noised_count} latents of {latent_side}^2 (text and null)": torch.no_grad()(
            lambda: predict(noised_count, False)
        ),
        f"decode {image_count} images for a reward": torch.no_grad()(
            lambda: prior.decode(torch.empty(image_count, channels, latent_side, latent_side))
        ),
        f"gradient through the U-Net, {image_count} latents": lambda: backward(*predict(image_count, True)),
    }
    return Costs(
        weights={
            f"U-Net, {str(dtype).removeprefix('torch.')}": weight_row(prior.unet, dtype),
            "autoencoder, float32": weight_row(prior.vae),
            "text encoder, float32": weight_row(prior.text),
        },
        stages={stage_name: trace.peak_of(stage) for stage_name, stage in stages.items()},
    )


def prior_costs(
    path: str | Path, image_count: int, options: PriorOptions | None = None, noise_count: int = 1
) -> Costs:
    """Estimate the memory of a step with a prior, without loading its networks.

    Args:
        path: path of the prior, as for `load_prior`.
        image_count: number B of images in a step.
        options: device and precision; None uses the defaults of `PriorOptions`.
        noise_count: number K of noises of the method.
    Returns: memory of the weights, and peak memory of each stage of a step.
    Raises: the errors of `load_prior`; ValueError if the prior cannot process B images.
    """
    path = existing_path(path, FLAG)
    weights_file = mvdream_file(path)
    options = options or PriorOptions()
    # `half` is set explicitly, because its default depends on the device, which is replaced by meta here.
    options = replace(options, device="meta", half=options.unet_dtype == torch.float16)
    if weights_file is None:
        prior_class = LatentPrior
        networks = meta_networks(path)
    else:
        prior_class = MVDream
        networks, _ = mvdream_networks(read(weights_file, FLAG), f"{FLAG}: {weights_file.name}")
    check_views(image_count, prior_class.views)
    return latent_costs(
        prior_class(networks, None, torch.empty(1000, device="meta"), "epsilon", options),
        image_count,
        noise_count,
    )
