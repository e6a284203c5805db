"""RewardCS (DreamCS, reconstructed): a score of a mesh for a prompt.

Tokens of the mesh attend to tokens of the prompt, and the maximum over tokens is the embedding.
The file is `<name>.safetensors` (state dict; the header holds patch options, sizes, prompts and provenance)
beside `<name>.json`.
Letters: A meshes, P patches, F faces of a patch, T tokens of a prompt (the words of the longest one + 1), C
width, H heads.
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

# Mesh encoder of MeshMAE's architecture (Liang et al. 2022), with its state-dict names. A patch of F faces
# becomes one token: LayerNorm(Linear(10 F numbers, face by face)) + MLP(mean of the face centres). Then
# follow a pre-norm transformer and a final LayerNorm. Masked patches neither attend nor are attended to, and
# do not take part in the maximum. The published code pads with zeros, which do both.

NUMBERS = 10  # features of a face
# Prefixes of MeshMAE's entries that the encoder does not use
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
    """Encoder of patches to tokens [A, P, C]. Differentiable in features and centres."""

    def __init__(self, options: EncoderOptions):
        super().__init__()
        width = options.width
        self.options = options
        self.to_patch_embedding = nn.Sequential(
            # [A, P, F, 10] -> [A, P, 10 F] -> [A, P, C]
            nn.Flatten(2),
            nn.Linear(NUMBERS * options.faces, width),
            nn.LayerNorm(width),
        )
        self.pos_embedding = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleList(Block(width, options.heads, 4 * width) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Patches) -> torch.Tensor:
        """Map patches [A, P, F, ...] to tokens [A, P, C]. Tokens of masked patches have no meaning.

        Raises: ValueError for patches with another number of faces.
        """
        check_shape(
            "MeshEncoder(features)",
            patches.features,
            ("A", "P", self.options.faces, NUMBERS),
            "Use the patch options that are stored with the reward.",
        )
        # A patch's position is the mean of its face centres.
        x = self.to_patch_embedding(patches.features) + self.pos_embedding(patches.centres.mean(dim=2))
        # A mesh without patches attends to all masked ones, since a softmax over nothing is NaN.
        keep = (patches.mask | ~patches.mask.any(dim=1, keepdim=True))[:, None, None]
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


def masked_max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the maximum over the tokens [A, P, C] that are not masked, [A, C]; 0 if all are masked."""
    # -inf is never the maximum, unless all tokens are masked.
    largest = tokens.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    return torch.where(mask.any(dim=1, keepdim=True), largest, 0.0)


def load_meshmae(encoder: MeshEncoder, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Load the trunk of a MeshMAE state dict into an encoder, strictly.

    Returns: the names that were left out (class token, heads, decoder).
    Raises: ValueError if the remaining entries do not fit.
    """
    # Checkpoints of parallel training and of the autoencoder have these prefixes.
    renamed = {
        name.removeprefix("module.").removeprefix("encoder."): value for name, value in tensors.items()
    }
    unused = sorted(name for name in renamed if name.startswith(_OTHERS))
    trunk = {name: value for name, value in renamed.items() if name not in unused}
    load_strict(encoder, trunk, f"MeshMAE, of {encoder.options}")
    return unused


# Prompts as tokens without a text model: a learned row for each known prompt, and a learned row for each
# word, by its checksum.

BUCKETS = 512  # rows for words; words with equal checksum modulo this number share one
_WORD = re.compile(r"[\w']+")


class PromptTokens(nn.Module):
    """Module that maps prompts to tokens [A, T, C] and their mask [A, T].

    Row 0 of the table is for unknown prompts.

    Another module with this signature and an attribute `width`, such as a frozen text encoder, can replace
    it.
    """

    def __init__(self, prompts: Sequence[str], width: int):
        super().__init__()
        self.prompts = tuple(prompts)
        self.width = width
        self.table = nn.Embedding(len(self.prompts) + 1, width)
        self.words = nn.Embedding(BUCKETS, width)
        # Row 0 is reserved for unknown prompts.
        self._row = {prompt: i for i, prompt in enumerate(self.prompts, 1)}

    def forward(
        self, prompts: Sequence[str], unknown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens [A, T, C] and mask [A, T].

        Args: unknown: [A] bool, prompts that are treated as unknown, so that training covers that case.
        """
        device = self.table.weight.device
        rows = torch.tensor([self._row.get(prompt, 0) for prompt in prompts], device=device)
        # The words of such a prompt are still read.
        rows = rows if unknown is None else rows.masked_fill(unknown.to(device), 0)
        # crc32 and not hash(), which changes with every process.
        words = [
            [zlib.crc32(word.encode()) % BUCKETS for word in _WORD.findall(prompt.lower())]
            for prompt in prompts
        ]
        # Shorter prompts are padded, and the mask excludes the padding.
        longest = max((len(row) for row in words), default=0)
        shape = len(prompts), longest
        index = torch.tensor(
            [row + [0] * (longest - len(row)) for row in words], dtype=torch.int64, device=device
        ).view(shape)
        mask = (
            torch.arange(longest + 1, device=device)
            <= torch.tensor([len(row) for row in words], device=device)[:, None]
        )
        return torch.cat([self.table(rows)[:, None], self.words(index)], dim=1), mask


KIND = "mesh-reward"  # kind of file, stored in it
_LEAST_SCALE = 1e-5  # least standard deviation of a feature, for features that are constant


class RewardCS(nn.Module):
    """Mesh reward, see `MeshReward`.

    `patches` states how meshes become patches, and `resolution` the cells per edge of the lattice in
    training. Features are standardised by `mean` and `scale` [10] of the training meshes.
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
        """Set mean and standard deviation of each feature from the patches of training meshes."""
        known = patches.features[patches.mask].flatten(0, 1)  # [all faces, 10]
        self.mean.copy_(known.mean(dim=0))
        # In place, because both are buffers of the state dict.
        self.scale.copy_(known.std(dim=0).clamp_min(_LEAST_SCALE))

    def embed(
        self, patches: Patches, prompts: list[str], unknown: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return embeddings [A, C].

        Differentiable in features and centres. Args: unknown: see `PromptTokens`.
        """
        assert len(prompts) == len(patches.features)
        features = (patches.features.to(self.mean) - self.mean) / self.scale
        # .to(self.mean) also moves the patches to the network's device and type.
        standard = Patches(features, patches.centres.to(self.mean), patches.mask)
        tokens = self.encoder(standard)  # [A, P, C]
        text, text_mask = self.text(prompts, unknown)
        attended = self.cross(self.norm(tokens), text, text, key_padding_mask=~text_mask, need_weights=False)[
            0
        ]
        return masked_max(self.final(tokens + attended), patches.mask)

    def forward(
        self, patches: Patches, prompts: list[str], unknown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [A], about 0..1, and embeddings [A, C] of length 1."""
        embedding = self.embed(patches, prompts, unknown)
        return self.head(embedding)[:, 0], F.normalize(embedding)

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """Return scores [A], see `MeshReward`; 1 is best."""
        return self(patches, prompts)[0]

    def save(self, path: Path) -> None:
        """Write both files, each atomically."""
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
    """Read a reward that `RewardCS.save` wrote, in eval mode and without gradients of its parameters.

    Raises: FileNotFoundError; ValueError for a damaged or foreign file.
    """
    tensors, meta = read_tensors(path, KIND, device)
    try:
        patches = PatchOptions(**meta["patches"])
        encoder = EncoderOptions(**meta["encoder"])
        reward = RewardCS(
            patches, encoder, tuple(meta["prompts"]), int(meta["resolution"]), meta["provenance"]
        )
        # Strict, so that other sizes than those of the header are an error.
        reward.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected a mesh reward of this version, got: {reason[:200]}. Train the reward again."
        ) from error
    return reward.to(device).eval().requires_grad_(False)
