"""RewardCS (DreamCS, reconstructed): score of a mesh given a prompt. Mesh tokens attend to the prompt's,
their maximum is the embedding.

The file is `<name>.safetensors` (state dict; how meshes are read, sizes, prompts and provenance in its
header) beside `<name>.json`.
Letters: A meshes, P patches, F faces of a patch, T tokens of a prompt (the longest one's words + 1), C width,
H heads.
"""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.interfaces import Patches
from eg3d_rlhf.core.shapes import check_shape
from eg3d_rlhf.models.attention import Block
from eg3d_rlhf.rewards.meshes.settings import EncoderOptions, PatchOptions
from training.storage import load_strict, read_tensors, write_atomic, write_tensors

# A mesh encoder of MeshMAE's shape (Liang et al. 2022), with its state-dict names. A patch of F faces becomes
# one token: LayerNorm(Linear(10 F numbers, face by face)) + MLP(mean of the face centres). Pre-norm
# transformer, final LayerNorm. Patches that are not there neither attend nor are attended to, and take no
# part in the maximum; the published code pads with zeros that do both.

NUMBERS = 10  # of a face
# MeshMAE's, unused
_OTHERS = (
    "cls_token",
    "classifier.",
    "head.",
    "decoder",
    "mask_token",
    "to_points",
    "to_features",
    "build_up_points",
)


class MeshEncoder(nn.Module):
    """Patches to tokens [A, P, C]. Differentiable in features and centres."""

    def __init__(self, options: EncoderOptions):
        super().__init__()
        width = options.width
        self.options = options
        self.to_patch_embedding = nn.Sequential(
            nn.Flatten(2), nn.Linear(NUMBERS * options.faces, width), nn.LayerNorm(width)
        )
        self.pos_embedding = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleList(Block(width, options.heads, 4 * width) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Patches) -> torch.Tensor:
        """[A, P, F, ...] -> [A, P, C]; what stands at masked patches means nothing.

        Raises: ValueError for patches of another number of faces.
        """
        check_shape(
            "MeshEncoder(features)",
            patches.features,
            ("A", "P", self.options.faces, NUMBERS),
            "Use the reward's own patches.",
        )
        x = self.to_patch_embedding(patches.features) + self.pos_embedding(patches.centres.mean(dim=2))
        # a mesh without patches attends to all of nothing
        keep = (patches.mask | ~patches.mask.any(dim=1, keepdim=True))[:, None, None]
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


def masked_max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest of the tokens [A, P, C] that are there, [A, C]; 0 where none is."""
    largest = tokens.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    return torch.where(mask.any(dim=1, keepdim=True), largest, 0.0)


def load_meshmae(encoder: MeshEncoder, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Take over the trunk of a MeshMAE state dict; the names that were left out (class token, heads,
    decoder). Raises: ValueError.
    """
    given = {name.removeprefix("module.").removeprefix("encoder."): value for name, value in tensors.items()}
    left = sorted(name for name in given if name.startswith(_OTHERS))
    trunk = {name: value for name, value in given.items() if name not in left}
    load_strict(encoder, trunk, f"MeshMAE, of {encoder.options}")
    return left


# Prompts as tokens without a text model: a learned row for each known prompt, and one for each word by its
# checksum.

BUCKETS = 512  # rows that words share
_WORD = re.compile(r"[\w']+")


class PromptTokens(nn.Module):
    """Callable as [prompt] -> tokens [A, T, C], mask [A, T]. Row 0 of the table stands for prompts that are
    not known.

    Any other module of that signature and a `width`, such as a frozen text encoder, may take its place.
    """

    def __init__(self, prompts: Sequence[str], width: int):
        super().__init__()
        self.prompts = tuple(prompts)
        self.width = width
        self.table = nn.Embedding(len(self.prompts) + 1, width)
        self.words = nn.Embedding(BUCKETS, width)
        self._row = {prompt: i for i, prompt in enumerate(self.prompts, 1)}

    def forward(
        self, prompts: Sequence[str], forget: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: forget [A] bool: take these as unknown, so that training prepares for such."""
        device = self.table.weight.device
        rows = torch.tensor([self._row.get(prompt, 0) for prompt in prompts], device=device)
        rows = rows if forget is None else rows.masked_fill(forget.to(device), 0)
        words = [
            [zlib.crc32(word.encode()) % BUCKETS for word in _WORD.findall(prompt.lower())]
            for prompt in prompts
        ]
        longest = max((len(row) for row in words), default=0)
        shape = len(prompts), longest
        index = torch.tensor(
            [row + [0] * (longest - len(row)) for row in words], dtype=torch.int64, device=device
        ).view(shape)
        there = (
            torch.arange(longest + 1, device=device)
            <= torch.tensor([len(row) for row in words], device=device)[:, None]
        )
        return torch.cat([self.table(rows)[:, None], self.words(index)], dim=1), there


KIND = "mesh-reward"
_LEAST_SCALE = 1e-5  # of a feature's deviation


class RewardCS(nn.Module):
    """A `MeshReward`. `patches` says how meshes are read, `resolution` of how many cells per edge the lattice
    was in training.

    Features are standardised by `mean` and `scale` [10], of the training meshes.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        patches: PatchOptions,
        encoder: EncoderOptions,
        prompts: tuple[str, ...] = (),
        resolution: int = 16,
        provenance: Mapping | None = None,
    ):
        super().__init__()
        assert patches.faces == encoder.faces
        self.patches = patches
        self.resolution = resolution
        self.provenance = dict(provenance or {})
        width = encoder.width
        self.encoder = MeshEncoder(encoder)
        self.text = PromptTokens(prompts, width)
        self.norm = nn.LayerNorm(width)
        self.cross = nn.MultiheadAttention(width, encoder.heads, batch_first=True)
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
        """Embeddings [A, C]. Differentiable in features and centres. Args: forget: see `PromptTokens`."""
        assert len(prompts) == len(patches.features)
        features = (patches.features.to(self.mean) - self.mean) / self.scale
        standard = Patches(features, patches.centres.to(self.mean), patches.mask)
        tokens = self.encoder(standard)  # [A, P, C]
        text, there = self.text(prompts, forget)
        heard = self.cross(self.norm(tokens), text, text, key_padding_mask=~there, need_weights=False)[0]
        return masked_max(self.final(tokens + heard), patches.mask)

    def forward(
        self, patches: Patches, prompts: list[str], forget: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores [A], about 0..1, and embeddings [A, C] of length 1."""
        embedding = self.embed(patches, prompts, forget)
        return self.head(embedding)[:, 0], F.normalize(embedding)

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """See `MeshReward`: 1 is the best."""
        return self(patches, prompts)[0]

    def save(self, path: Path) -> None:
        """Write both files, each whole or not at all."""
        meta = {
            "patches": asdict(self.patches),
            "encoder": asdict(self.encoder.options),
            "prompts": list(self.text.prompts),
            "resolution": self.resolution,
            "provenance": self.provenance,
        }
        write_tensors(path, KIND, self.state_dict(), meta)
        write_atomic(path.with_suffix(".json"), (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())


def load_mesh_reward(path: str | Path, device: str | torch.device = "cpu") -> RewardCS:
    """A reward that `RewardCS.save` wrote, in eval mode, without gradients to it.

    Raises: FileNotFoundError, ValueError.
    """
    tensors, meta = read_tensors(path, KIND, device)
    try:
        patches = PatchOptions(**meta["patches"])
        encoder = EncoderOptions(**meta["encoder"])
        made = RewardCS(patches, encoder, tuple(meta["prompts"]), int(meta["resolution"]), meta["provenance"])
        made.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected a mesh reward of this version, got: {what[:200]}. Train it anew."
        ) from error
    return made.to(device).eval().requires_grad_(False)
