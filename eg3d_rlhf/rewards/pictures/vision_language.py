"""A vision-language model as judge: any server that speaks the chat-completions protocol, local or hosted.

The key comes from the environment alone, never from a flag, a file or the source; without one, none is sent (local servers need none).
"""

import base64
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eg3d_rlhf.experiments.media.rendering import png, tile
from eg3d_rlhf.rewards.pictures.judges import Pair

KEY_VARIABLE = "EG3D_RLHF_JUDGE_KEY"
_WHICH = (
    "Each picture shows one 3D object from several sides. The object was made for: {prompt!r}. Which is better: the first or the second? "
    "Consider whether it fits the text, whether the shape is plausible from all sides, and detail. Answer with 1 or 2 alone."
)
_ABOUT = "The picture shows one 3D object from several sides, made for: {prompt!r}. Answer each question with a line 'Yes' or 'No'.\n{list}"


def picture(views: torch.Tensor) -> bytes:
    """Views [V, C, h, w] in 0..1 side by side, as PNG."""
    pixels = (views[:, :3].detach().clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return png(np.asarray(tile(list(pixels), len(pixels))))


@dataclass(frozen=True, kw_only=True)
class VisionLanguageJudge:
    """`PairwiseJudge`, and the answers of a `YesNoJudge`. A server that says neither 1 nor 2 gives no answer (-1); one that fails warns."""

    url: str  # of the chat completions, as http://localhost:8000/v1/chat/completions
    model: str
    timeout: float = 60.0  # seconds

    def __post_init__(self) -> None:
        if not re.match(r"https?://", self.url):
            raise ValueError(f"--judge: expected the address of a server, http:// or https://, got {self.url!r}. Give its completions.")

    def judge(self, prompts: list[str], pairs: list[Pair], shuffle_order: bool = True) -> list[int]:
        """See `PairwiseJudge`. Whether the two change places is drawn from their pixels: the same pair is asked in the same order."""
        found = []
        for prompt, (first, second) in zip(prompts, pairs, strict=True):
            pictures = [picture(first), picture(second)]
            swapped = shuffle_order and hashlib.sha256(b"".join(sorted(pictures))).digest()[0] % 2 == 1
            said = re.search(r"[12]", self._ask(_WHICH.format(prompt=prompt), pictures[::-1] if swapped else pictures) or "")
            found.append(-1 if said is None else (int(said.group()) - 1) ^ int(swapped))
        return found

    def answers(self, pictures: torch.Tensor, prompt: str, questions: Sequence[str]) -> str:
        """Lines for `YesNoJudge`; empty without an answer."""
        numbered = "\n".join(f"{i}. {question}" for i, question in enumerate(questions, 1))
        return self._ask(_ABOUT.format(prompt=prompt, list=numbered), [picture(pictures)]) or ""

    def _ask(self, text: str, pictures: Sequence[bytes]) -> str | None:
        content: list[dict] = [{"type": "text", "text": text}]
        for data in pictures:
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except (urllib.error.URLError, TimeoutError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = type(error).__name__ + (f" {error.code}" if isinstance(error, urllib.error.HTTPError) else "")
            warnings.warn(f"judge {self.model}: expected an answer, got {reason}. Check the server, and {KEY_VARIABLE}.", stacklevel=3)
            return None
