"""Prompts as token numbers, by tokenizers in local folders. transformers is imported inside functions: it takes seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from eg3d_rlhf.models.local_files import one_line, require_extra

CLIP_TOKENS = 77
Tokenize = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]  # B prompts -> numbers [B, T], mask [B, T] bool


def bert_tokenizer(folder: Path, flag: str, limit: int, vocabulary: int) -> Tokenize:
    """BERT's tokenizer (vocab.txt), cutting at `limit` tokens; T is the longest prompt's.

    Raises: ValueError where transformers or the folder is missing, or has more words than the network.
    """
    tokenizer = _load("BertTokenizer", folder, flag, ("vocab.txt",), "bert-base-uncased's")
    if len(tokenizer) > vocabulary:
        raise ValueError(f"{flag}: expected a vocabulary of at most {vocabulary} words, got {len(tokenizer)}. Use bert-base-uncased's.")

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = tokenizer(list(prompts), padding="longest", truncation=True, max_length=limit, return_tensors="pt")
        return found.input_ids, found.attention_mask.bool()

    return tokenize


def clip_tokenizer(folder: Path, flag: str, vocabulary: int, pad: int | None = None) -> Tokenize:
    """CLIP's tokenizer (vocab.json, merges.txt); T = 77.

    Args:
        pad: number that fills up: 0 as in open_clip, None as in OpenAI's CLIP: the end mark.
    Raises: ValueError where transformers or the folder is missing, or its end mark is not the network's last word.
    """
    tokenizer = _load("CLIPTokenizer", folder, flag, ("vocab.json", "merges.txt"), "CLIP's")
    end = tokenizer.eos_token_id
    if end != vocabulary - 1:
        raise ValueError(f"{flag}: expected {vocabulary} words in {folder}, the end mark last, got it as {end}. Use CLIP's tokenizer.")

    def tokenize(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [tokenizer(prompt, truncation=True, max_length=CLIP_TOKENS).input_ids for prompt in prompts]
        filled = [row + [end if pad is None else pad] * (CLIP_TOKENS - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        return torch.tensor(filled), torch.arange(CLIP_TOKENS) < lengths[:, None]

    return tokenize


def _load(name: str, folder: Path, flag: str, files: Sequence[str], whose: str):
    require_extra(flag, "transformers")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{flag}: expected {' and '.join(missing)} in {folder}, got none. Put {whose} tokenizer there.")
    import transformers

    with one_line(f"{flag}: {folder.name}", f"Copy {whose} tokenizer again."):
        return getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
