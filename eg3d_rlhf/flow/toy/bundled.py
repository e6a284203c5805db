"""The bundled toy: how its base networks are trained on drafts and stored, and the problem of Circular-DPO that they make."""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from eg3d_rlhf.cli import ASSETS, file_hash
from eg3d_rlhf.flow.circular.loop_pairs import LoopPairsConfig
from eg3d_rlhf.flow.circular.settings import Choosing, CircularSettings, supervised
from eg3d_rlhf.flow.dpo import DpoConfig
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.sparse import Batch, SparseBatch, count, feats_of, with_feats
from eg3d_rlhf.flow.stage import FlowStage
from eg3d_rlhf.flow.toy.judges import ChooserOracle, FinalOracle, LearnedReward, RewardTraining, human_pairs, parts
from eg3d_rlhf.flow.toy.networks import StructureFlow, VoxelFlow
from eg3d_rlhf.flow.toy.pipeline import STRUCTURE, VOXELS, ToyPipeline
from eg3d_rlhf.flow.toy.shapes import CONDITIONS, HELD_OUT, TRAINED, draw_drafts
from eg3d_rlhf.flow.tuning.update import TrainConfig
from training.storage import read_tensors, write_tensors

FOLDER = ASSETS / "toy-flow"
NETWORKS: dict[str, Callable[[], nn.Module]] = {STRUCTURE: StructureFlow, VOXELS: VoxelFlow, "reward": LearnedReward}
KIND = "toy-flow"
STEPS = {STRUCTURE: 2500, VOXELS: 1200}  # of the bundled ones


@dataclass(frozen=True, kw_only=True)
class BaseTraining:
    """How the base networks learn to draw drafts."""

    steps: int = 2500
    batch: int = 32
    lr: float = 3e-3  # of AdamW, after a warm-up, falling to 0 along a cosine
    warm_up: int = 50  # steps
    ema: float = 0.99  # kept of the average per step; the average is what is stored
    no_condition: float = 0.1  # share of samples that are drawn without their condition
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.batch, self.warm_up) < 1 or not (self.lr > 0 and 0 <= self.ema < 1 and 0 <= self.no_condition < 1):
            raise ValueError(f"BaseTraining: expected positive numbers and shares below 1, got {self}. Correct them.")


def train_base(stage_name: str, training: BaseTraining, on_step: Callable[[int, int, float], None] | None = None) -> nn.Module:
    """Plain flow matching on fresh drafts of all conditions; returns the average of the weights.

    Args: on_step: called with (step, steps, mean loss of the batch).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        pipeline = ToyPipeline(StructureFlow(), VoxelFlow())
    stage = next(one for one in pipeline.stages if one.name == stage_name)
    generator = torch.Generator().manual_seed(training.seed + 1)
    average = torch.optim.swa_utils.AveragedModel(stage.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(training.ema))
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=training.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=training.warm_up),
         torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(training.steps - training.warm_up, 1))],
        [training.warm_up],
    )  # fmt: skip
    for step in range(1, training.steps + 1):
        loss = _errors(stage, pipeline, training, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(stage.model)
        if on_step is not None:
            on_step(step, training.steps, float(loss.detach()))
    return average.module.eval()


def _errors(stage: FlowStage, pipeline: ToyPipeline, training: BaseTraining, generator: torch.Generator) -> torch.Tensor:
    """Flow-matching errors of a fresh batch, [N]."""
    picked = torch.randint(len(CONDITIONS), (training.batch,), generator=generator)
    names = [CONDITIONS[i] for i in picked.tolist()]
    x_0: Batch = draw_drafts(names, generator).latents(stage.name)
    eps = with_feats(x_0, torch.randn(feats_of(x_0).shape, generator=generator))
    t = stage.path.times(count(x_0), generator)
    cond = pipeline.conditions(names, stage.name)
    known = torch.rand(len(names), generator=generator) >= training.no_condition
    v = stage.model(_apart(stage.path.mix(x_0, t, eps)), t, cond * known.view(-1, 1, 1))
    return stage.path.errors(v, x_0, eps)


def _apart(batch: Batch) -> Batch:
    """A batch of its own, so that every step computes what depends on its voxels once and for itself."""
    return SparseBatch(batch.coords, batch.feats, batch.size) if isinstance(batch, SparseBatch) else batch


def path_of(name: str, folder: Path = FOLDER) -> Path:
    """File of a stage's network, or of "reward"."""
    return folder / f"{name}.safetensors"


def save_network(name: str, network: nn.Module, meta: dict, folder: Path = FOLDER) -> Path:
    """Store as half precision with a description."""
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in network.state_dict().items()}
    write_tensors(path_of(name, folder), KIND, tensors, {"name": name, **meta})
    return path_of(name, folder)


def load_network(name: str, folder: Path = FOLDER) -> nn.Module:
    """Read what save_network wrote, in single precision, for inference.

    Raises: FileNotFoundError, ValueError for files that are missing, damaged, or of another network.
    """
    path = path_of(name, folder)
    tensors, meta = read_tensors(path, KIND)
    if meta.get("name") != name:
        raise ValueError(f"{path}: expected the network {name!r}, got {meta.get('name')!r}. Restore the file.")
    network = NETWORKS[name]()
    try:
        network.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in tensors.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: expected the weights of this version's {name!r}, got others ({reason}). Train them again.") from None
    return network.eval()


def load_toy(device: str | torch.device = "cpu", folder: Path = FOLDER) -> ToyPipeline:
    """The bundled pipeline."""
    return ToyPipeline(load_network(STRUCTURE, folder), load_network(VOXELS, folder), device)


def describe(training: BaseTraining | RewardTraining, **found: float) -> dict:
    """What a stored network says of its making."""
    return {"training": asdict(training), **found}


@functools.cache
def bundled_hashes() -> dict[str, str]:
    """SHA-256 of the bundled files by name."""
    return {name: file_hash(path_of(name)) for name in NETWORKS}


PAIRS_PER_CONDITION = 20
_HUMAN = TrainConfig(
    dpo=DpoConfig(beta=60.0), lora=LoraConfig(rank=16, alpha=32), steps=100, batch=16, lr=1e-3, warmup=10, held_out_every=25, log_every=5,
    checkpoint_every=50,
)  # fmt: skip
_LOOP = replace(_HUMAN, dpo=DpoConfig(beta=500.0, loser_weight=0.5, sft_weight=100.0))
TOY_DEFAULTS = CircularSettings(  # chosen with ChooserOracle, never with FinalOracle
    human=_HUMAN, loop=_LOOP, sft=supervised(_HUMAN), loop_pairs=LoopPairsConfig(batch=64, chunk=256), choosing=Choosing(per_condition=8),
)


def toy_problem(seed: int = 0, device: str | torch.device = "cpu", pairs_per_condition: int = PAIRS_PER_CONDITION) -> Problem:
    """The bundled toy with the people's pairs of a seed.

    Forty conditions are for training, the other twenty-four for judging: colours that a shape has not been tuned on.
    """
    if pairs_per_condition < 1:
        raise ValueError(f"toy_problem: expected pairs_per_condition >= 1, got {pairs_per_condition}. Ask for one at least.")
    return Problem(
        pipeline=load_toy(device),
        human_pairs=lambda stage: human_pairs(stage, TRAINED, pairs_per_condition, seed),
        reward=load_network("reward"),
        chooser=ChooserOracle(),
        final=FinalOracle(),
        parts=parts,
        train_conditions=TRAINED,
        held_out_conditions=HELD_OUT,
        identity={"problem": "toy", "seed": seed, "pairs_per_condition": pairs_per_condition, **bundled_hashes()},
    )
