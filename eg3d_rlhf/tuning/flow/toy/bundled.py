"""Networks of the bundled toy, their files, and the toy's tuning problem.

The two velocity networks are small transformers over patches of the grid and over voxels. They were trained
on drafts (toy_pipeline.py).

Shapes: L tokens of the longest sample; V voxels of all samples; C channels of a token; H attention heads;
other letters as in the package's docstring.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eg3d_rlhf.core.cli import ASSETS, file_hash
from eg3d_rlhf.models.sparse import SparseBatch
from eg3d_rlhf.models.trellis.blocks import CrossAttention, DenseLayout, SelfAttention
from eg3d_rlhf.tuning.flow.base.pairs import Lazy, PairsByStage, PreferencePair
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.toy.names import COLOURS, SHAPES, STAGES, STRUCTURE, VOXELS
from eg3d_rlhf.tuning.flow.toy.toy_oracles import (
    ChooserOracle,
    FinalOracle,
    LearnedReward,
    RewardTraining,
    fit,
    simulated_pairs,
    simulated_singles,
)
from eg3d_rlhf.tuning.flow.toy.toy_pipeline import CHOOSING, DEFECTS, HELD_OUT, TRAINED, R, ToyPipeline
from training.storage import load_strict, read_tensors, write_tensors

PATCH = 2  # number of cells per axis of one token of the structure
FREQUENCIES = 32  # number of frequencies of the embedding of the time


@dataclass(frozen=True, kw_only=True)
class Width:
    """Sizes of the layers of a toy network."""

    width: int = 64  # C
    blocks: int = 2
    heads: int = 2  # H
    condition: int = len(SHAPES) + len(COLOURS)  # E, entries of a conditioning token


@dataclass(frozen=True)
class Packing:
    """Conversion between rows [V, ...] of all samples and a padded batch [N, L, ...].

    The rows of a sample keep their order; shorter samples are padded with zeros at the end.
    """

    shape: tuple[int, int]  # N, L
    places: torch.Tensor  # [V] int64, index of each row in the padded batch, 0 to N * L - 1
    keep: torch.Tensor  # [N, 1, 1, L] bool, true at rows, false at padding; the mask of attention

    @classmethod
    def from_batch(cls, batch: SparseBatch) -> "Packing":
        """Return the packing of a batch's voxels, which is computed once and kept in the batch's cache."""
        if "packing" not in batch.cache:
            lengths = batch.lengths
            sample_count = batch.size
            max_length = int(lengths.max())
            # [V]: number of a row within its sample = its number in the batch - first number of its sample
            row_in_sample = (
                torch.arange(len(batch.sample), device=lengths.device)
                - (lengths.cumsum(0) - lengths)[batch.sample]
            )
            is_row = torch.arange(max_length, device=lengths.device) < lengths[:, None]  # [N, L]
            batch.cache["packing"] = cls(
                (sample_count, max_length), batch.sample * max_length + row_in_sample, is_row[:, None, None]
            )
        return batch.cache["packing"]

    def pad(self, voxel_rows: torch.Tensor) -> torch.Tensor:
        """Convert rows [V, ...] to a padded batch [N, L, ...]."""
        padded_batch = voxel_rows.new_zeros(math.prod(self.shape), *voxel_rows.shape[1:])
        return padded_batch.index_copy(0, self.places, voxel_rows).unflatten(0, self.shape)

    def flat(self, padded_batch: torch.Tensor) -> torch.Tensor:
        """Convert a padded batch [N, L, ...] to rows [V, ...]."""
        return padded_batch.flatten(0, 1).index_select(0, self.places)


class Block(nn.Module):
    """Transformer block: self-attention, cross-attention to the conditioning tokens, feed-forward.

    Self-attention and feed-forward are modulated by the sample's time and conditioning (adaptive layer norm).
    """

    def __init__(self, sizes: Width):
        super().__init__()
        C = sizes.width
        self.self_attn = SelfAttention(C, sizes.heads)
        self.cross_attn = CrossAttention(C, sizes.condition, sizes.heads)
        self.norm = nn.LayerNorm(C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(approximate="tanh"), nn.Linear(2 * C, C))
        # Added to the modulation that all blocks share.
        self.modulation = nn.Parameter(torch.randn(6 * C) * 0.02)

    def forward(
        self,
        x: torch.Tensor,
        shared_modulation: torch.Tensor,
        cond: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the output tokens, [N, L, C].

        Args:
            x: [N, L, C], input tokens.
            shared_modulation: [N, 6 C], modulation that all blocks share.
            cond: [N, T, E], conditioning tokens.
            attention_mask: [N, 1, 1, L], mask of `Packing`; None without padding.
        """
        # [N, 1, C] each
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (shared_modulation + self.modulation)[
            :, None
        ].chunk(6, dim=2)
        x = x + gate_1 * self.self_attn(
            torch.addcmul(shift_1, _norm(x), 1 + scale_1), DenseLayout(attention_mask)
        )
        x = x + self.cross_attn(self.norm(x), cond, DenseLayout(attention_mask))
        return x + gate_2 * self.mlp(torch.addcmul(shift_2, _norm(x), 1 + scale_2))


class Trunk(nn.Module):
    """Transformer from input tokens to output tokens, the common part of both velocity networks.

    Args:
        sizes: sizes of the layers.
        channels: number of entries of an input token.
        positions: number of positions in the grid; each has a learned embedding.
    """

    def __init__(self, sizes: Width, channels: int, positions: int):
        super().__init__()
        C = sizes.width
        self.input_layer = nn.Linear(channels, C)
        self.position = nn.Parameter(torch.randn(positions, C) * 0.2)
        self.t_embedder = nn.Sequential(nn.Linear(2 * FREQUENCIES, C), nn.SiLU(), nn.Linear(C, C))
        self.c_embedder = nn.Linear(sizes.condition, C)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))

    def forward(
        self,
        tokens: torch.Tensor,
        position_embeddings: torch.Tensor,
        t: torch.Tensor,
        cond: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the output tokens [N, L, C].

        Args:
            tokens: [N, L, channels], input tokens.
            position_embeddings: embeddings of the tokens' positions, a shape that broadcasts to [N, L, C].
            t: [N], times in 0..1.
            cond: [N, T, E], conditioning tokens.
            attention_mask: [N, 1, 1, L], mask of `Packing`; None without padding.
        """
        # Angles of the Fourier features of the time, [N, FREQUENCIES], with wavelengths from 2 pi to 2 pi /
        # 100.
        angles = t[:, None] * 100 ** torch.linspace(0, 1, FREQUENCIES, device=t.device)
        time_embedding = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1))
        # The tokens of shape and colour are summed, because the modulation is one vector for each sample.
        shared_modulation = self.modulation(time_embedding + self.c_embedder(cond.sum(1)))
        x = self.input_layer(tokens) + position_embeddings
        for block in self.blocks:
            x = block(x, shared_modulation, cond, attention_mask)
        return _norm(x)


class StructureFlow(nn.Module):
    """Network of the structure's velocity, over the occupancy grid [N, 1, R, R, R]."""

    def __init__(self, sizes: Width | None = None):
        super().__init__()
        sizes = sizes or Width()
        self.trunk = Trunk(sizes, PATCH**3, (R // PATCH) ** 3)
        self.out_layer = _zeros(nn.Linear(sizes.width, PATCH**3))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        """Predict the velocity at x_t, both [N, 1, R, R, R], at times t [N], with conditioning [N, T, E]."""
        sample_count = len(x_t)
        patches_per_axis = R // PATCH
        # Patches of 2^3 cells become tokens: [N, 4, 4, 4, 2, 2, 2].
        cells = x_t.view(
            sample_count, patches_per_axis, PATCH, patches_per_axis, PATCH, patches_per_axis, PATCH
        ).permute(0, 1, 3, 5, 2, 4, 6)
        # [N, 64, 8]
        velocity_patches = self.out_layer(
            self.trunk(cells.flatten(4).flatten(1, 3), self.trunk.position, t, cond)
        )
        # The inverse permutation converts patches back to the grid.
        cells = velocity_patches.view(
            sample_count, patches_per_axis, patches_per_axis, patches_per_axis, PATCH, PATCH, PATCH
        ).permute(0, 1, 4, 2, 5, 3, 6)
        return cells.reshape(x_t.shape)


class VoxelFlow(nn.Module):
    """Network of the velocity of the voxels' colour and size, [V, 4].

    The input token of a voxel is its 4 features and the occupancy of its 3 x 3 x 3 neighbourhood.
    """

    def __init__(self, sizes: Width | None = None):
        super().__init__()
        sizes = sizes or Width()
        self.trunk = Trunk(sizes, 4 + 27, R**3)
        self.out_layer = _zeros(nn.Linear(sizes.width, 4))

    def forward(self, x_t: SparseBatch, t: torch.Tensor, cond: torch.Tensor) -> SparseBatch:
        """Predict the velocity at voxels x_t, features [V, 4], times t [N], with conditioning [N, T, E]."""
        surrounding_occupancy = surroundings(x_t)
        x, y, z = x_t.coords[:, 1:].long().unbind(1)
        tokens = torch.cat([x_t.feats, surrounding_occupancy.to(x_t.feats.dtype)], dim=1)
        packing = Packing.from_batch(x_t)
        # one learned embedding per place of the grid, [R^3, C] -> [V, C]
        position_embeddings = self.trunk.position.index_select(0, (x * R + y) * R + z)
        token_velocities = self.out_layer(
            self.trunk(packing.pad(tokens), packing.pad(position_embeddings), t, cond, packing.keep)
        )
        return x_t.with_feats(packing.flat(token_velocities))


def surroundings(batch: SparseBatch) -> torch.Tensor:
    """Return the occupancy of each voxel's 3 x 3 x 3 neighbourhood, [V, 27] float of 0 and 1.

    The occupancy is computed once and kept in the batch's cache.
    """
    if "surroundings" not in batch.cache:
        sample_index, x, y, z = batch.coords.long().unbind(1)
        # A border of one cell, so that voxels at the edge have empty neighbours.
        padded_occupancy = torch.zeros(batch.size, R + 2, R + 2, R + 2, device=batch.coords.device)
        padded_occupancy[sample_index, x + 1, y + 1, z + 1] = 1
        offsets = [(i, j, k) for i in range(3) for j in range(3) for k in range(3)]
        batch.cache["surroundings"] = torch.stack(
            [padded_occupancy[sample_index, x + i, y + j, z + k] for i, j, k in offsets], dim=1
        )
    return batch.cache["surroundings"]


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Apply layer norm without a learned scale and shift, because the modulation has its own."""
    return F.layer_norm(x, x.shape[-1:])


def _zeros(layer: nn.Linear) -> nn.Linear:
    """Set a layer's parameters to zero, so that an untrained network predicts zero velocity; return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


FOLDER = ASSETS / "toy-flow"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    STRUCTURE: StructureFlow,
    VOXELS: VoxelFlow,
    "reward": LearnedReward,
}
KIND = "toy-flow"  # kind of a file, which its header states


def path_of(network_name: str, folder: Path = FOLDER) -> Path:
    """Return the path of the file of a network: "structure", "voxels" or "reward"."""
    return folder / f"{network_name}.safetensors"


def write_network(
    path: Path, network_name: str, weights: Mapping[str, torch.Tensor], metadata: Mapping
) -> None:
    """Write the weights of a network in half precision; the file's header has its name and `metadata`."""
    tensors = {
        key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in weights.items()
    }
    write_tensors(path, KIND, tensors, {"name": network_name, **metadata})


def load_network(network_name: str, folder: Path = FOLDER) -> nn.Module:
    """Read a network from a file of `write_network`, in float32 and in eval mode.

    Raises: FileNotFoundError if there is no file; ValueError if it is damaged or contains another network.
    """
    path = path_of(network_name, folder)
    tensors, metadata = read_tensors(path, KIND)
    if metadata.get("name") != network_name:
        raise ValueError(
            f"{path}: expected the network {network_name!r}, got {metadata.get('name')!r}. Restore the file"
            " from a copy."
        )
    network = NETWORKS[network_name]()
    float32_weights = {
        key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()
    }
    load_strict(network, float32_weights, str(path))
    return network.eval()


PAIRS_PER_CONDITION = 20  # number of pairs of a prompt to train on
UNSEEN_PER_CONDITION = 6  # number of pairs of a prompt to choose on, or of a held-out prompt


def toy_problem(
    seed: int = 0,
    device: str | torch.device = "cpu",
    pairs_per_condition: int = PAIRS_PER_CONDITION,
    labelled: str = "others",
) -> Problem:
    """Make the tuning problem of the bundled toy, with simulated preference pairs.

    Of the 192 prompts, 64 are for training, 32 for choosing checkpoints and settings, and 96 for the results
    table.

    Args:
        seed: seed of the simulated pairs.
        device: device of the generator.
        pairs_per_condition: number of pairs of a prompt to train on.
        labelled: source of the labelled drafts. "own": drafts with the defects on which the generator was
            trained; "others": drafts with twice as many floaters, holes and wrong sizes, like assets of an
            older generator.
    """
    defects = DEFECTS[labelled]
    other_prompts = (*CHOOSING, *HELD_OUT)
    other_pairs_per_condition = min(UNSEEN_PER_CONDITION, pairs_per_condition)
    return Problem(
        pipeline=ToyPipeline(load_network(STRUCTURE), load_network(VOXELS), device),
        train_prompts=TRAINED,
        held_out_prompts=HELD_OUT,
        choosing_prompts=CHOOSING,
        train_pairs=PairsByStage(
            STAGES, lambda stage: simulated_pairs(stage, TRAINED, pairs_per_condition, seed, defects)
        ),
        unseen_pairs=PairsByStage(
            STAGES,
            lambda stage: simulated_pairs(stage, other_prompts, other_pairs_per_condition, seed, defects),
        ),
        labelled=Lazy(
            ("thumbs", "ranks"),
            lambda kind: simulated_singles(kind, TRAINED, pairs_per_condition, seed, defects),
        ),
        reward=load_network("reward"),
        chooser=ChooserOracle(),
        final=FinalOracle(),
        fitted_to={"reward": TRAINED},
        fit_reward=fit_reward,
        parts=FinalOracle().parts,
        measures=FinalOracle().measures,
        identity={
            "problem": "toy",
            "seed": seed,
            "pairs_per_condition": pairs_per_condition,
            "labelled": labelled,
            **{name: file_hash(path_of(name)) for name in NETWORKS},
        },
    )


def fit_reward(pairs: Sequence[PreferencePair], seed: int) -> LearnedReward:
    """Fit a reward of finished assets to preference pairs of the last stage.

    Args:
        pairs: pairs of latents; the reward is fitted to the assets that are decoded from them.
        seed: seed of the initial weights and of the order of the pairs.
    """
    decoder = ToyPipeline(nn.Identity(), nn.Identity())  # decoding needs no networks
    # Pairs contain latents, and the reward scores the decoded assets.
    better_assets, worse_assets = (
        [asset for pair in pairs for asset in decoder.decode(SparseBatch.join([getattr(pair, pair_field)]))]
        for pair_field in ("preferred", "rejected")
    )
    return fit(
        better_assets,
        worse_assets,
        [pair.condition for pair in pairs],
        RewardTraining(seed=seed),
        torch.Generator().manual_seed(seed),
    )
