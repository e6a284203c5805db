"""Encoders of prompts and of images for conditioning: CLIP for texts, DINOv2 for images.

Weights are read from this machine; nothing is downloaded. CLIP needs the package transformers.

Shapes: N number of prompts or images, L number of tokens, E channels of a token.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.models.dino import Dino, Dino3, address_of, dino3_files, dino_files, read_dino
from eg3d_rlhf.models.image_preprocessing import on_black, read_cut_out
from eg3d_rlhf.models.weights import State, empty, require_extra, shapes
from eg3d_rlhf.tuning.flow.base.conditioning import NULL, Conditioning
from eg3d_rlhf.tuning.flow.base.family import Network
from eg3d_rlhf.tuning.flow.families.folder import embedding_progress
from training.storage import reject_lfs_pointer

# Path of an encoder's weights, channels of a token, tensors of the file, and expected tensors.
EncoderFiles = tuple[Path, int, State, State]
FindEncoder = Callable[[], EncoderFiles]
TEXT_TOKENS = 77  # length of CLIP's text input


class NotOnThisMachineError(ValueError):
    """Error for a network of transformers whose files are not on this machine."""


def pretrained(class_name: str, name: str):
    """Load a model or a tokenizer of the package transformers from the local cache.

    Args:
        class_name: name of a class of transformers, such as "CLIPTextModel".
        name: name of the model on huggingface.co, or a local folder.
    Raises: NotOnThisMachineError if its files are not on this machine; ValueError for pointers of Git LFS.
    """
    require_extra(name, "transformers")
    import transformers

    for path in sorted(Path(name).glob("*")):
        reject_lfs_pointer(path, name)
    try:
        # local_files_only: transformers would otherwise download what is missing.
        return getattr(transformers, class_name).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        # At most 100 characters of the first line, because messages of transformers are long.
        error_summary = (str(error).splitlines() or [""])[0][:100]
        raise NotOnThisMachineError(
            f"{name}: the weights are not on this machine ({error_summary}). Download them with `hf download"
            f" {name}` from https://huggingface.co/{name}."
        ) from None


EMBED_IMAGES = "embedding of images"
EMBED_TEXTS = "embedding of texts"


def _encoder_network(
    name: str, widths: Collection[int], address: str, without: str, find: FindEncoder
) -> Network:
    """Describe an encoder of prompts or images for `flow check`; without its files, a missing network.

    Args:
        name: name of the encoder.
        widths: numbers of channels of the conditioning tokens that the flows read.
        address: address at which the encoder is published.
        without: description of what cannot be done without the encoder.
        find: function that returns the file of the weights, the number of channels of a token, the tensors of
            the file, and the expected tensors.
    """
    common: dict[str, Any] = dict(name=name, without=without, address=address, embeds=True)
    try:
        require_extra(name, "transformers")
    except ValueError as error:
        return Network(file=Path(name), expected={}, tensors={}, missing=str(error), **common)
    try:
        path, width, tensors, expected = find()
    except FileNotFoundError as error:
        return Network(file=Path(name), expected={}, tensors={}, missing=str(error), **common)
    except ValueError as error:
        # A damaged file. The message states the remedy.
        return Network(file=Path(name), expected={}, tensors={}, faults=[str(error)], **common)
    width_fault = (
        f"{name} embeds in {width} channels, but the flows read {' and '.join(map(str, sorted(widths)))}:"
        f" {path}. Replace it by the encoder that belongs to the generator ({address})."
    )
    return Network(
        file=path,
        expected=shapes(expected),
        tensors=tensors,
        faults=[] if set(widths) == {width} else [width_fault],
        **common,
    )


def image_encoder_network(name: str, widths: Collection[int], dino3: bool = False) -> Network:
    """Describe the DINO that embeds images, see `_encoder_network`. `dino3`: True for DINOv3."""

    def find() -> EncoderFiles:
        path, config, tensors = dino3_files(name) if dino3 else dino_files(name)
        # Built without weights, for the names and shapes of its tensors.
        network: nn.Module = empty(lambda: (Dino3 if dino3 else Dino)(config))
        return path, config.hidden_size, tensors, network.state_dict()

    return _encoder_network(name, widths, address_of(name), EMBED_IMAGES, find)


def text_encoder_network(name: str, widths: Collection[int]) -> Network:
    """Describe the CLIP that embeds texts, see `_encoder_network`."""

    def find() -> EncoderFiles:
        try:
            model = pretrained("CLIPTextModel", name)
            pretrained("AutoTokenizer", name)
        except NotOnThisMachineError as error:
            raise FileNotFoundError(str(error)) from None
        return Path(name), model.config.hidden_size, model.state_dict(), model.state_dict()

    return _encoder_network(name, widths, f"https://huggingface.co/{name}", EMBED_TEXTS, find)


class TextEncoder:
    """CLIP text encoder, as TRELLIS uses it.

    Its tokens are the last hidden states. Texts are padded or cut to 77 tokens.
    """

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self.tokenizer = pretrained("AutoTokenizer", name)
        self.model = pretrained("CLIPTextModel", name).eval().to(device)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode texts as tokens [N, 77, E] float32 on the CPU."""
        # No attention mask is passed, as in TRELLIS: the padding is encoded, too.
        token_ids = self.tokenizer(
            list(texts), max_length=TEXT_TOKENS, padding="max_length", truncation=True, return_tensors="pt"
        )["input_ids"]
        return self.model(input_ids=token_ids.to(self.model.device)).last_hidden_state.float().cpu()

    def embed(self, texts: Sequence[str]) -> Conditioning:
        """Embed texts, and the empty text for guidance. The name of an embedding is its text."""
        # dict.fromkeys removes duplicates and keeps the order. NULL is the empty text.
        unique_texts = list(dict.fromkeys([*texts, NULL]))
        return Conditioning(
            tokens={name: self([name])[0] for name in embedding_progress(unique_texts, "text")},
            encoder=self.name,
        )


class ImageEncoder:
    """DINOv2 image encoder, as TRELLIS uses it.

    The tokens of an image are 1 class token, 4 register tokens and 37 x 37 patch tokens, taken before the
    last layer norm of the network.
    """

    def __init__(self, name: str = "dinov2_vitl14_reg", device: str | torch.device = "cpu"):
        self.name = name
        self.model = read_dino(name, device)
        self.size = self.model.config.image_size  # pixels per side

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [N, 3, 518, 518] of values 0..1 as tokens [N, L, E] float32, before the last norm."""
        return self.model(images.to(self.model.layernorm.weight.device), normed=False)

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [N, 3, 518, 518] of values 0..1 as maps of patch tokens, [N, E, 37, 37]."""
        config = self.model.config
        patches_per_side = config.image_size // config.patch_size
        return (
            # Without class token and registers: [N, 37^2, E] -> [N, E, 37, 37]
            self.tokens(images)[:, 1 + config.num_register_tokens :]
            .transpose(1, 2)
            .unflatten(2, (patches_per_side, patches_per_side))
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images [N, 3, 518, 518] of values 0..1 as conditioning tokens [N, L, E] on the CPU.

        A layer norm without learnt parameters replaces the last norm of the network, as in TRELLIS.
        """
        tokens = self.tokens(images)
        return F.layer_norm(tokens, tokens.shape[-1:]).cpu()

    def embed(self, images: Mapping[str, Path]) -> Conditioning:
        """Embed images with transparent backgrounds. Embeddings have the names of the images."""
        # A generator: only one image is in memory at a time.
        prepared_images = (
            (name, read_cut_out(path, lambda image: on_black(image, self.size)))
            for name, path in embedding_progress(images.items(), "image")
        )
        tokens = {name: self(image[None])[0] for name, image in prepared_images}
        return Conditioning(tokens=tokens, encoder=self.name, zero_null=True)
