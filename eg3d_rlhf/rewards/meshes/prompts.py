"""Prompts as tokens without a text model: a learned row for each known prompt, and one for each word by its checksum.

Letters: A prompts, T tokens (the longest prompt's words + 1), C width.
"""

import re
import zlib
from collections.abc import Sequence

import torch
from torch import nn

BUCKETS = 512  # rows that words share
_WORD = re.compile(r"[\w']+")


class PromptTokens(nn.Module):
    """Callable as [prompt] -> tokens [A, T, C], mask [A, T]. Row 0 of the table stands for prompts that are not known.

    Any other module of that signature and a `width`, such as a frozen text encoder, may take its place.
    """

    def __init__(self, prompts: Sequence[str], width: int):
        super().__init__()
        self.prompts, self.width = tuple(prompts), width
        self.table = nn.Embedding(len(self.prompts) + 1, width)
        self.words = nn.Embedding(BUCKETS, width)
        self._row = {prompt: i for i, prompt in enumerate(self.prompts, 1)}

    def forward(self, prompts: Sequence[str], forget: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: forget [A] bool: take these as unknown, so that training prepares for such."""
        device = self.table.weight.device
        rows = torch.tensor([self._row.get(prompt, 0) for prompt in prompts], device=device)
        rows = rows if forget is None else rows.masked_fill(forget.to(device), 0)
        words = [[zlib.crc32(word.encode()) % BUCKETS for word in _WORD.findall(prompt.lower())] for prompt in prompts]
        longest = max((len(own) for own in words), default=0)
        shape = len(prompts), longest
        index = torch.tensor([own + [0] * (longest - len(own)) for own in words], dtype=torch.int64, device=device).view(shape)
        there = torch.arange(longest + 1, device=device) <= torch.tensor([len(own) for own in words], device=device)[:, None]
        return torch.cat([self.table(rows)[:, None], self.words(index)], dim=1), there
