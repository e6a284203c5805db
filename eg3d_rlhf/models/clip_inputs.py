"""Inputs of published scorers: preprocessed images and tokenized prompts.

Images are resized and normalised differentiably and without torchvision.

Shape letters: B images, h, w rows and columns of the images, S pixels per side of the scorer's input.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.weights import one_line, require_extra

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Preprocess images as CLIP does: resize, crop the centre, normalise.

    The short side is resized to `size` (bicubic, antialiased). The long side is truncated to a whole number
    of pixels. Equals torchvision's Resize - CenterCrop - Normalize bitwise (reference case `preprocess`).

    Args: images: [B, 3, h, w] of values 0..1.
    Returns: [B, 3, S, S], a new tensor.
    Differentiable in: images.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = _resize(
        images, (size, size * width // short) if height <= width else (size * height // short, size)
    )
    # round() takes halves to the even number, as torchvision's CenterCrop does.
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return normalise(resized[..., top : top + size, left : left + size])


def pad_preprocess(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Preprocess images as HPSv2 does (open_clip's ResizeMaxSize): resize, pad with black bars, normalise.

    The long side is resized to `size`; the bars are on both sides of the short axis.

    Args: images: [B, 3, h, w] of values 0..1.
    Returns: [B, 3, S, S], a new tensor.
    Differentiable in: images.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    # At least one pixel: a very long image would otherwise round to none.
    rows = max(round(height * scale), 1)
    columns = max(round(width * scale), 1)
    top = (size - rows) // 2
    left = (size - columns) // 2
    return normalise(
        # Padding comes before normalisation, so the bars are black and not of the mean colour.
        F.pad(_resize(images, (rows, columns)), (left, size - columns - left, top, size - rows - top))
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Return (images - mean) / standard deviation per channel, with CLIP's statistics, as a new tensor."""
    # [3, 1, 1], broadcast over rows and columns
    mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    # Interpolation to the same size is not exactly the identity.
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


# Tokenizers, read from local folders. transformers is imported inside functions because that takes seconds.


CLIP_TOKENS = 77  # length of CLIP's text input, with start and end token
# B prompts -> token ids [B, T] and mask [B, T] bool, True for tokens of the prompt
Tokenize = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]


def bert_tokenizer(folder: Path, flag: str, limit: int, vocabulary: int) -> Tokenize:
    """Load BERT's tokenizer (vocab.txt). It truncates at `limit` tokens; T is the length of the longest
    prompt.

    Args:
        flag: option that error messages name.
        vocabulary: number of words that the network embeds.
    Raises: ValueError if transformers or the folder is missing, or if the tokenizer has more words than the
        network.
    """
    tokenizer = _load("BertTokenizer", folder, flag, ("vocab.txt",), "bert-base-uncased's")
    # A larger vocabulary would give ids beyond the network's table of embeddings.
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{flag}: expected a vocabulary of at most {vocabulary} words, got {len(tokenizer)}. Use"
            " bert-base-uncased's."
        )

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded = tokenizer(
            # Padded to the longest prompt of this call only
            list(prompts),
            padding="longest",
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        return encoded.input_ids, encoded.attention_mask.bool()

    return tokenize


def clip_tokenizer(folder: Path, flag: str, vocabulary: int, pad: int | str | None = None) -> Tokenize:
    """Load CLIP's tokenizer (vocab.json, merges.txt); T is always 77.

    Args:
        flag: option that error messages name.
        vocabulary: number of words that the network embeds.
        pad: token id that fills up short prompts: 0 as in open_clip; "own": the folder's padding token; None:
            the end token, as in OpenAI's CLIP.
    Raises: ValueError if transformers or the folder is missing, or if the end token is not the network's last
        word.
    """
    tokenizer = _load("CLIPTokenizer", folder, flag, ("vocab.json", "merges.txt"), "CLIP's")
    # The network reads its output at the end token, which it recognises by this id.
    end = tokenizer.eos_token_id
    if end != vocabulary - 1:
        raise ValueError(
            f"{flag}: expected {vocabulary} words in {folder} with the end token last, but the end token has"
            f" the id {end}. Use CLIP's tokenizer."
        )

    fill = end if pad is None else tokenizer.pad_token_id if pad == "own" else pad

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        # Padded here and not by the tokenizer, whose padding token is not the one that `pad` asks for.
        rows = [tokenizer(prompt, truncation=True, max_length=CLIP_TOKENS).input_ids for prompt in prompts]
        filled = [row + [fill] * (CLIP_TOKENS - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows])  # [B], tokens before the padding
        return torch.tensor(filled), torch.arange(CLIP_TOKENS) < lengths[:, None]

    return tokenize


def _load(name: str, folder: Path, flag: str, files: Sequence[str], whose: str):
    require_extra(flag, "transformers")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"{flag}: expected {' and '.join(missing)} in {folder}, got none. Put {whose} tokenizer there."
        )
    import transformers

    # The library raises many kinds of errors for damaged files; all become one line.
    with one_line(f"{flag}: {folder.name}", f"Copy {whose} tokenizer again."):
        return getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
