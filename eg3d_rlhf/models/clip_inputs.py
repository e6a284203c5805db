"""What published scorers are fed: pictures as they expect them, differentiable and without torchvision, and
prompts as token numbers.

Shape letters: B pictures, h, w of the pictures, S side that the scorer sees.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from eg3d_rlhf.models.weights import one_line, require_extra

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocess(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Short side to `size` (bicubic, antialiased; the long side is truncated to a whole number), centre cut,
    CLIP's statistics.

    Args: images [B, 3, h, w] in 0..1. Returns: [B, 3, S, S], a new tensor. Differentiable in images.
    Equals torchvision's Resize - CenterCrop - Normalize bit for bit (reference case `preprocess`).
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    resized = _resize(
        images, (size, size * width // short) if height <= width else (size * height // short, size)
    )
    top, left = (round((side - size) / 2) for side in resized.shape[-2:])
    return normalise(resized[..., top : top + size, left : left + size])


def pad_preprocess(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Long side to `size`, black bars about the short one, CLIP's statistics: open_clip's ResizeMaxSize, as
    HPSv2 sees pictures.

    Args: images [B, 3, h, w] in 0..1. Returns: [B, 3, S, S], a new tensor. Differentiable in images.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    rows = max(round(height * scale), 1)
    columns = max(round(width * scale), 1)
    top = (size - rows) // 2
    left = (size - columns) // 2
    return normalise(
        F.pad(_resize(images, (rows, columns)), (left, size - columns - left, top, size - rows - top))
    )


def normalise(images: torch.Tensor) -> torch.Tensor:
    """(images - mean) / deviation of CLIP's data, per channel; the argument is left as it is."""
    mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def _resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False)


# Prompts as token numbers, by tokenizers in local folders. transformers is imported inside functions: it
# takes seconds.


CLIP_TOKENS = 77
# B prompts -> numbers [B, T], mask [B, T] bool
Tokenize = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]


def bert_tokenizer(folder: Path, flag: str, limit: int, vocabulary: int) -> Tokenize:
    """BERT's tokenizer (vocab.txt), cutting at `limit` tokens; T is the longest prompt's.

    Raises: ValueError where transformers or the folder is missing, or has more words than the network.
    """
    tokenizer = _load("BertTokenizer", folder, flag, ("vocab.txt",), "bert-base-uncased's")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{flag}: expected a vocabulary of at most {vocabulary} words, got {len(tokenizer)}. Use"
            " bert-base-uncased's."
        )

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer(
            list(prompts), padding="longest", truncation=True, max_length=limit, return_tensors="pt"
        )
        return found.input_ids, found.attention_mask.bool()

    return tokenize


def clip_tokenizer(folder: Path, flag: str, vocabulary: int, pad: int | str | None = None) -> Tokenize:
    """CLIP's tokenizer (vocab.json, merges.txt); T = 77.

    Args:
        pad: number that fills up: 0 as in open_clip; own: the folder's; None as in OpenAI's CLIP: the end
            mark.
    Raises: ValueError where transformers or the folder is missing, or its end mark is not the network's last
        word.
    """
    tokenizer = _load("CLIPTokenizer", folder, flag, ("vocab.json", "merges.txt"), "CLIP's")
    end = tokenizer.eos_token_id
    if end != vocabulary - 1:
        raise ValueError(
            f"{flag}: expected {vocabulary} words in {folder}, the end mark last, got it as {end}. Use CLIP's"
            " tokenizer."
        )

    fill = end if pad is None else tokenizer.pad_token_id if pad == "own" else pad

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [tokenizer(prompt, truncation=True, max_length=CLIP_TOKENS).input_ids for prompt in prompts]
        filled = [row + [fill] * (CLIP_TOKENS - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
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

    with one_line(f"{flag}: {folder.name}", f"Copy {whose} tokenizer again."):
        return getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
