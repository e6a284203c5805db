"""RewardCS, a reward that scores a mesh for a prompt (DreamCS, arXiv 2506.09814, reconstructed).

Tokens of the mesh attend to tokens of the prompt, and the maximum over the tokens is the embedding. A reward
is stored in `<name>.safetensors`, which contains the state dict and, in its header, patch options, sizes,
prompts and provenance. `<name>.json` beside it repeats the header in readable form.

Shapes: P patches, F faces of a patch, T tokens of a prompt (1 + number of words of the longest prompt), C
channels. A is the number of meshes.
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

# Mesh encoder with the architecture and the state-dict names of MeshMAE (Liang et al. 2022, arXiv
# 2207.10228). Each patch of F faces becomes one token: LayerNorm(Linear(10 F features of its faces)) +
# MLP(mean of the centres of its faces). A pre-norm transformer and a final LayerNorm follow. Masked patches
# (which do not exist) are not attended to and are left out of the maximum. In the published code, they are
# patches of zeros that are attended to.

NUMBERS = 10  # number of features of a face
# Beginnings of the names of MeshMAE's entries that the encoder does not use
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
    """Encoder that turns each patch into a token: patches [A, P, F, ...] -> tokens [A, P, C].

    Differentiable in the features and the centres of the faces.

    Args: options: sizes of the encoder.
    """

    def __init__(self, options: EncoderOptions):
        super().__init__()
        width = options.width
        self.options = options
        self.to_patch_embedding = nn.Sequential(
            # [A, P, F, 10] -> [A, P, 10 F] -> [A, P, C] -> [A, P, C]
            nn.Flatten(2),
            nn.Linear(NUMBERS * options.faces, width),
            nn.LayerNorm(width),
        )
        self.pos_embedding = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = nn.ModuleList(Block(width, options.heads, 4 * width) for _ in range(options.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: Patches) -> torch.Tensor:
        """Compute tokens [A, P, C] of patches [A, P, F, ...]. Tokens of masked patches have no meaning.

        Raises: ValueError for patches whose number of faces differs from `options.faces`.
        """
        check_shape(
            "MeshEncoder(features)",
            patches.features,
            ("A", "P", self.options.faces, NUMBERS),
            "Use the patch options that are stored with the reward.",
        )
        # The position of a patch is the mean of the centres of its faces.
        x = self.to_patch_embedding(patches.features) + self.pos_embedding(patches.centres.mean(dim=2))
        # A softmax without any entry would be NaN. If all patches of a mesh are masked, all are therefore
        # attended to. [A, 1, 1, P]
        attention_mask = (patches.mask | ~patches.mask.any(dim=1, keepdim=True))[:, None, None]
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.norm(x)


def masked_max(tokens: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """Compute the maximum [A, C] over the tokens of each mesh that are not masked.

    Args:
        tokens: tokens [A, P, C].
        token_mask: bool [A, P], False for masked tokens; the result is 0 if all tokens of a mesh are masked.
    """
    # -inf is never the maximum, unless all tokens are masked.
    maximum = tokens.masked_fill(~token_mask[..., None], -torch.inf).amax(dim=1)
    return torch.where(token_mask.any(dim=1, keepdim=True), maximum, 0.0)


def load_meshmae(encoder: MeshEncoder, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Load the encoder's weights from a MeshMAE state dict, strictly.

    Args:
        encoder: encoder to fill, in place.
        tensors: state dict of MeshMAE.
    Returns: sorted names of the entries that were not used (class token, output heads, decoder).
    Raises: ValueError if the used entries do not match the encoder.
    """
    # Names have the prefix "module." after parallel training, and "encoder." in the autoencoder.
    renamed_tensors = {
        name.removeprefix("module.").removeprefix("encoder."): tensor for name, tensor in tensors.items()
    }
    unused_names = sorted(name for name in renamed_tensors if name.startswith(_OTHERS))
    encoder_tensors = {name: tensor for name, tensor in renamed_tensors.items() if name not in unused_names}
    load_strict(encoder, encoder_tensors, f"MeshMAE state dict for {encoder.options}")
    return unused_names


# Prompts become tokens without a text model: one learned embedding for each prompt of the training, and one
# learned embedding for each word, chosen by a checksum of the word.

BUCKETS = 512  # number of embeddings of words; words with equal checksum modulo this number share one
_WORD = re.compile(r"[\w']+")


class PromptTokens(nn.Module):
    """Module that maps prompts to tokens [A, T, C] and their mask [A, T].

    The first token of a prompt represents the complete prompt, and the others represent its words. Row 0 of
    the table of prompts is for unknown prompts. Any other module with this interface and an attribute
    `width`, for example a frozen text encoder, can replace this module.

    Args:
        prompts: prompts of the training.
        width: number of channels, C.
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
        self, prompts: Sequence[str], is_unknown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [A, T, C] of prompts and their mask [A, T], which is False for padding.

        Args:
            prompts: prompt of each mesh, length A.
            is_unknown: bool [A], True for prompts that are treated as unknown, although they may be prompts
                of the training; None if there is no such prompt. The words of these prompts are still read.
        """
        device = self.table.weight.device
        prompt_rows = torch.tensor([self._row.get(prompt, 0) for prompt in prompts], device=device)
        prompt_rows = prompt_rows if is_unknown is None else prompt_rows.masked_fill(is_unknown.to(device), 0)
        # Rows of the words of each prompt. Unlike crc32, Python's hash() changes with every process.
        word_rows = []
        for prompt in prompts:
            prompt_words = _WORD.findall(prompt.lower())
            word_rows.append([zlib.crc32(word.encode()) % BUCKETS for word in prompt_words])
        # Shorter prompts are padded, and the mask excludes the padding.
        word_counts = [len(prompt_word_rows) for prompt_word_rows in word_rows]
        largest_count = max(word_counts, default=0)
        padded_rows = [
            prompt_word_rows + [0] * (largest_count - len(prompt_word_rows)) for prompt_word_rows in word_rows
        ]
        # view() gives the right shape also without words.
        word_indices = torch.tensor(padded_rows, dtype=torch.int64, device=device).view(
            len(prompts), largest_count
        )
        # A prompt with n words has n + 1 tokens, with the indices 0..n.
        token_index = torch.arange(largest_count + 1, device=device)
        token_mask = token_index <= torch.tensor(word_counts, device=device)[:, None]
        return torch.cat([self.table(prompt_rows)[:, None], self.words(word_indices)], dim=1), token_mask


KIND = "mesh-reward"  # kind of the file, which the file itself states
_MIN_SCALE = 1e-5  # smallest standard deviation of a feature; it avoids a division by 0 for constant features


class RewardCS(nn.Module):
    """Reward network of meshes, which implements `MeshReward`.

    Features of faces are standardised by the mean and the standard deviation of the training meshes.

    Args:
        patches: settings with which meshes are converted to patches.
        encoder: sizes of the mesh encoder.
        prompts: prompts of the training.
        resolution: number of cells per edge of the lattice on which the training meshes were extracted.
        provenance: facts about the training, JSON values.
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
        """Set mean and standard deviation of each feature from the patches of all training meshes."""
        # Masked patches are left out. [number of faces, 10]
        features = patches.features[patches.mask].flatten(0, 1)
        # Both are buffers of the state dict, so they are changed in place.
        self.mean.copy_(features.mean(dim=0))
        self.scale.copy_(features.std(dim=0).clamp_min(_MIN_SCALE))

    def embed(
        self, patches: Patches, prompts: list[str], is_unknown: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute embeddings [A, C] of meshes with their prompts.

        Differentiable in the features and the centres of the faces.

        Args:
            patches: patches of the meshes, [A, P, F, ...].
            prompts: prompt of each mesh, length A.
            is_unknown: bool [A], True for prompts that are treated as unknown; None if there is no such
                prompt, see `PromptTokens.forward`.
        """
        assert len(prompts) == len(patches.features)
        # .to(self.mean) moves the patches to the device and the type of the network.
        features = (patches.features.to(self.mean) - self.mean) / self.scale
        standardised_patches = Patches(features, patches.centres.to(self.mean), patches.mask)
        tokens = self.encoder(standardised_patches)  # [A, P, C]
        text_tokens, text_mask = self.text(prompts, is_unknown)
        # torch's key_padding_mask is True for keys that are ignored.
        attended_tokens, _ = self.cross(
            self.norm(tokens), text_tokens, text_tokens, key_padding_mask=~text_mask, need_weights=False
        )
        return masked_max(self.final(tokens + attended_tokens), patches.mask)

    def forward(
        self, patches: Patches, prompts: list[str], is_unknown: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute scores [A], which are trained to be 0..1, and embeddings [A, C] of length 1.

        The arguments are described in `embed`.
        """
        embedding = self.embed(patches, prompts, is_unknown)
        return self.head(embedding)[:, 0], F.normalize(embedding)

    def score(self, patches: Patches, prompts: list[str]) -> torch.Tensor:
        """Return the scores [A] of meshes for their prompts, trained to be 0 (worst) to 1 (best)."""
        return self(patches, prompts)[0]

    def save(self, path: Path) -> None:
        """Write the weights to `path` (.safetensors) and a readable description to a .json file beside it.

        Each file is written atomically.
        """
        file_header = {
            "patches": asdict(self.patches),
            "encoder": asdict(self.encoder.options),
            "prompts": list(self.text.prompts),
            "resolution": self.resolution,
            "provenance": self.provenance,
        }
        write_tensors(path, KIND, self.state_dict(), file_header)
        write_atomic(
            path.with_suffix(".json"), (json.dumps(file_header, indent=1, sort_keys=True) + "\n").encode()
        )


def load_mesh_reward(path: str | Path, device: str | torch.device = "cpu") -> RewardCS:
    """Read a reward that `RewardCS.save` wrote, in eval mode and without gradients of its parameters.

    Args:
        path: file with the ending .safetensors.
        device: device of the network.
    Raises: FileNotFoundError if the file is missing; ValueError if it is damaged or is no mesh reward.
    """
    tensors, file_header = read_tensors(path, KIND, device)
    try:
        patch_options = PatchOptions(**file_header["patches"])
        encoder_options = EncoderOptions(**file_header["encoder"])
        reward = RewardCS(
            patch_options,
            encoder_options,
            tuple(file_header["prompts"]),
            int(file_header["resolution"]),
            file_header["provenance"],
        )
        # Strict loading reports weights whose sizes differ from the sizes that the header states.
        reward.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path}: this mesh reward cannot be read by this version of the package ({reason[:200]}). Open"
            " it with the version that wrote it, or train it again."
        ) from error
    return reward.to(device).eval().requires_grad_(False)
