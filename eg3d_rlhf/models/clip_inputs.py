"""Prepare the inputs of published image rewards: preprocessed images and tokenized prompts.

Images are resized and normalised differentiably and without torchvision.

Shapes: B images or prompts, h rows and w columns of pixels, S pixels per side of the network's input, T
    tokens.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.weights import library_errors_as_one_line, require_extra

# Mean and standard deviation of pixel values 0..1 per channel (R, G, B), from the published code of CLIP
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(images: torch.Tensor, side_pixels: int = 224) -> torch.Tensor:
    """Preprocess images as CLIP does: resize, crop the centre, normalise.

    The shorter side is resized to `side_pixels` pixels (bicubic, antialiased). The longer side is scaled
    alike and rounded down. The result equals that of torchvision's transforms Resize, CenterCrop and
    Normalize bitwise.

    Args:
        images: images [B, 3, h, w] of values 0..1.
        side_pixels: pixels per side of the result, S.

    Returns: a new tensor [B, 3, S, S].
    Differentiable in: images.
    """
    height, width = images.shape[-2:]
    shorter_side = min(height, width)
    resized_images = _resize(
        images,
        (side_pixels, side_pixels * width // shorter_side)
        if height <= width
        else (side_pixels * height // shorter_side, side_pixels),
    )
    # round() rounds halves to the even number, as torchvision's CenterCrop does.
    top, left = (round((length - side_pixels) / 2) for length in resized_images.shape[-2:])
    return normalise(resized_images[..., top : top + side_pixels, left : left + side_pixels])


def pad_preprocess(images: torch.Tensor, side_pixels: int = 224) -> torch.Tensor:
    """Preprocess images as HPSv2 does (open_clip's ResizeMaxSize): resize, pad with black bars, normalise.

    The longer side is resized to `side_pixels` pixels. Equal black bars on both sides fill the shorter
    dimension.

    Args:
        images: images [B, 3, h, w] of values 0..1.
        side_pixels: pixels per side of the result, S.

    Returns: a new tensor [B, 3, S, S].
    Differentiable in: images.
    """
    height, width = images.shape[-2:]
    scale = side_pixels / max(height, width)
    # At least one pixel: the shorter side of a very long image would otherwise be rounded to 0.
    resized_rows = max(round(height * scale), 1)
    resized_columns = max(round(width * scale), 1)
    top = (side_pixels - resized_rows) // 2
    left = (side_pixels - resized_columns) // 2
    return normalise(
        # Padding comes before normalisation, so the bars are black and not of the mean colour.
        F.pad(
            _resize(images, (resized_rows, resized_columns)),
            (left, side_pixels - resized_columns - left, top, side_pixels - resized_rows - top),
        )
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise images [B, 3, h, w] of values 0..1 by CLIP's mean and standard deviation of each channel.

    Returns: a new tensor (images - mean) / std of the same shape.
    """
    # [3, 1, 1], broadcast over rows and columns
    mean, std = (images.new_tensor(statistics).view(3, 1, 1) for statistics in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def _resize(images: torch.Tensor, target_size: tuple[int, int]) -> torch.Tensor:
    """Resize images [B, 3, h, w] to a number of rows and columns, bicubically with antialiasing."""
    # An interpolation to the same size would change some values slightly.
    if images.shape[-2:] == target_size:
        return images
    return F.interpolate(images, size=target_size, mode="bicubic", antialias=True, align_corners=False)


# Tokenizers, read from local folders. transformers is imported inside functions because that takes seconds.


CLIP_TOKENS = 77  # length T of CLIP's text input, including the start and the end token
# Function that converts B prompts to token ids [B, T] and a mask [B, T] bool, True for tokens of the prompt
Tokenize = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]


def bert_tokenizer(folder: Path, flag: str, max_tokens: int, vocabulary_size: int) -> Tokenize:
    """Load BERT's tokenizer from a folder with the file vocab.txt.

    The tokenizer pads the prompts of a call to the length T of the longest one.

    Args:
        folder: folder of the tokenizer's files.
        flag: option that error messages begin with.
        max_tokens: number of tokens at which prompts are truncated.
        vocabulary_size: number of tokens that the network embeds.

    Raises: ValueError if the library transformers or a file is missing, or if the tokenizer has more tokens
        than the network.
    """
    tokenizer = _load("BertTokenizer", folder, flag, ("vocab.txt",), "bert-base-uncased")
    # A larger vocabulary would give ids beyond the network's table of embeddings.
    if len(tokenizer) > vocabulary_size:
        raise ValueError(
            f"{flag}: the tokenizer in {folder} has {len(tokenizer)} tokens, but the network has at most"
            f" {vocabulary_size}. Use the tokenizer of bert-base-uncased."
        )

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        encoding = tokenizer(
            list(prompts),
            # Padding to the longest prompt of this call
            padding="longest",
            truncation=True,
            max_length=max_tokens,
            return_tensors="pt",
        )
        return encoding.input_ids, encoding.attention_mask.bool()

    return tokenize


def clip_tokenizer(
    folder: Path, flag: str, vocabulary_size: int, padding_token: int | str | None = None
) -> Tokenize:
    """Load CLIP's tokenizer from a folder with the files vocab.json and merges.txt.

    Prompts are truncated or padded to T = 77 tokens.

    Args:
        folder: folder of the tokenizer's files.
        flag: option that error messages begin with.
        vocabulary_size: number of tokens that the network embeds.
        padding_token: token id that fills short prompts, for example 0 as in open_clip. "folder" uses the
            padding token that the folder states. None uses the end token, as in OpenAI's CLIP.

    Raises: ValueError if the library transformers or a file is missing, or if the end token is not the last
        token that the network embeds.
    """
    tokenizer = _load("CLIPTokenizer", folder, flag, ("vocab.json", "merges.txt"), "CLIP")
    # The network reads its output at the end token, which it recognises by this id.
    end_id = tokenizer.eos_token_id
    if end_id != vocabulary_size - 1:
        raise ValueError(
            f"{flag}: the end token of the tokenizer in {folder} has the id {end_id}, but the network with"
            f" {vocabulary_size} tokens expects {vocabulary_size - 1}. Use the tokenizer of this CLIP."
        )

    if padding_token is None:
        pad_id = end_id
    else:
        pad_id = tokenizer.pad_token_id if padding_token == "folder" else padding_token

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        # Prompts are padded here, because the tokenizer would always use its own padding token.
        token_ids = [
            tokenizer(prompt, truncation=True, max_length=CLIP_TOKENS).input_ids for prompt in prompts
        ]
        padded_ids = [ids + [pad_id] * (CLIP_TOKENS - len(ids)) for ids in token_ids]
        lengths = torch.tensor([len(ids) for ids in token_ids])  # [B] numbers of tokens before the padding
        return torch.tensor(padded_ids), torch.arange(CLIP_TOKENS) < lengths[:, None]

    return tokenize


def _load(class_name: str, folder: Path, flag: str, file_names: Sequence[str], model_name: str):
    """Load a tokenizer of the library transformers from a local folder.

    Args:
        class_name: name of the tokenizer's class in the library transformers.
        folder: folder of the tokenizer's files.
        flag: option that error messages begin with.
        file_names: names of the files that must exist.
        model_name: name of the model to which the tokenizer belongs, for error messages.

    Raises: ValueError if the library or a file is missing, or if a file is damaged.
    """
    require_extra(flag, "transformers")
    missing_files = [file_name for file_name in file_names if not (folder / file_name).is_file()]
    if missing_files:
        raise ValueError(
            f"{flag}: the folder {folder} lacks these files of the tokenizer: {', '.join(missing_files)}."
            f" Copy the files of {model_name}'s tokenizer into this folder."
        )
    import transformers

    # The library raises many kinds of errors for damaged files. Each becomes a ValueError of one line.
    with library_errors_as_one_line(f"{flag}: {folder.name}", f"Copy {model_name}'s tokenizer again."):
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
