"""RewardCS (DreamCS, reconstructed): score of a mesh given a prompt. Mesh tokens attend to the prompt's, their maximum is the embedding.

The file is `<name>.safetensors` (state dict; how meshes are read, sizes, prompts and provenance in its header) beside `<name>.json`.
Letters: A meshes, P patches, T tokens of a prompt, C width.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.interfaces import Patches
from eg3d_rlhf.rewards.meshes.encoder import NUMBERS, EncoderOptions, MeshEncoder, masked_max
from eg3d_rlhf.rewards.meshes.meshing.patches import PatchOptions
from eg3d_rlhf.rewards.meshes.prompts import PromptTokens
from training.storage import read_tensors, write_atomic, write_tensors

KIND = "mesh-reward"
_LEAST_SCALE = 1e-5  # of a feature's deviation


class RewardCS(nn.Module):
    """A `MeshReward`. `patches` says how meshes are read, `resolution` of how many cells per edge the lattice was in training.

    Features are standardised by `mean` and `scale` [10], of the training meshes.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, patches: PatchOptions, encoder: EncoderOptions, prompts: tuple[str, ...] = (), resolution: int = 16,
        provenance: Mapping | None = None,
    ):
        super().__init__()
        if patches.faces != encoder.faces:
            raise ValueError(f"RewardCS: expected an encoder of patches of {patches.faces} faces, got {encoder.faces}. Use the same.")
        self.patches, self.resolution, self.provenance = patches, resolution, dict(provenance or {})
        width = encoder.width
        self.encoder, self.text = MeshEncoder(encoder), PromptTokens(prompts, width)
        self.norm, self.cross = nn.LayerNorm(width), nn.MultiheadAttention(width, encoder.heads, batch_first=True)
        self.final = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.register_buffer("mean", torch.zeros(NUMBERS))
        self.register_buffer("scale", torch.ones(NUMBERS))

    @torch.no_grad()
    def calibrate(self, patches: Patches) -> None:
        """Take means and deviations from the patches of training meshes."""
        known = patches.features[patches.mask].flatten(0, 1)
        self.mean.copy_(known.mean(dim=0))
        self.scale.copy_(known.std(dim=0).clamp_min(_LEAST_SCALE))

    def embed(self, patches: Patches, prompts: list[str], forget: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [A, C]. Differentiable in features and centres. Args: forget: see `PromptTokens`.

        Raises: ValueError for another number of prompts than of meshes.
        """
        if len(prompts) != len(patches.features):
            raise ValueError(f"RewardCS: expected a prompt for each of {len(patches.features)} meshes, got {len(prompts)}. Give one each.")
        features = (patches.features.to(self.mean) - self.mean) / self.scale
        standard = Patches(features, patches.centres.to(self.mean), patches.mask)
        tokens = self.encoder(standard)  # [A, P, C]
        text, there = self.text(prompts, forget)
        heard = self.cross(self.norm(tokens), text, text, key_padding_mask=~there, need_weights=False)[0]
        return masked_max(self.final(tokens + heard), patches.mask)

    def forward(self, patches: Patches, prompts: list[str], forget: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [A], about 0..1, and embeddings [A, C] of length 1."""
        embedding = self.embed(patches, prompts, forget)
        return self.head(embedding)[:, 0], F.normalize(embedding)

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """See `MeshReward`: 1 is the best."""
        return self(patches, prompts)[0]

    def save(self, path: Path) -> None:
        """Write both files, each whole or not at all. Raises: ValueError for another suffix."""
        if path.suffix != ".safetensors":
            raise ValueError(f"RewardCS.save: expected a name ending in .safetensors, got {path.name}. Rename it.")
        meta = {"patches": asdict(self.patches), "encoder": asdict(self.encoder.options), "prompts": list(self.text.prompts),
                "resolution": self.resolution, "provenance": self.provenance}
        write_tensors(path, KIND, self.state_dict(), meta)
        write_atomic(path.with_suffix(".json"), (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())


def load_mesh_reward(path: str | Path, device: str | torch.device = "cpu") -> RewardCS:
    """A reward that `RewardCS.save` wrote, in evaluation mode, its parameters without gradient.

    Raises: FileNotFoundError; ValueError for a damaged or foreign file.
    """
    tensors, meta = read_tensors(path, KIND, device)
    try:
        patches, encoder = PatchOptions(**meta["patches"]), EncoderOptions(**meta["encoder"])
        made = RewardCS(patches, encoder, tuple(meta["prompts"]), int(meta["resolution"]), meta["provenance"])
        made.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(f"{path}: expected a mesh reward of this version, got: {what[:200]}. Train it anew.") from error
    return made.to(device).eval().requires_grad_(False)
