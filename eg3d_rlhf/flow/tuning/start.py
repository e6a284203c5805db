"""What a stage's training begins with: pairs that fit, a network to train, and what it is compared with."""

import copy
from collections.abc import Sequence

import torch

from eg3d_rlhf.flow.lora import add_lora
from eg3d_rlhf.flow.pairs import PreferencePair, check_unique
from eg3d_rlhf.flow.policies import shared_copy
from eg3d_rlhf.flow.reference import AdapterOff, FrozenModel, Reference
from eg3d_rlhf.flow.sparse import Latent, SparseSample, collate
from eg3d_rlhf.flow.stage import FlowStage, Pipeline, check_convention
from eg3d_rlhf.flow.tuning.config import TrainConfig
from training.storage import checksum

CHECKED = 8  # preferred latents that the network's convention is checked on


def check_pairs(pipeline: Pipeline, stage: FlowStage, pairs: Sequence[PreferencePair]) -> None:
    """Refuse what cannot be trained on, before anything is written.

    Raises: ValueError for no pairs, pairs of another stage, ids that occur twice, latents that the stage cannot have, and a network whose
    data lie at t = 1.
    """
    who = f"train_stage({stage.name})"
    if not pairs:
        raise ValueError(f"{who}: expected pairs to learn from, got none. Make or label some.")
    check_unique(who, pairs)
    for pair in pairs:
        if pair.stage != stage.name:
            raise ValueError(f"{who}: expected pairs of this stage, got {pair.id!r} of {pair.stage!r}. Train that stage on it.")
        for side in ("preferred", "rejected"):
            stage.check(f"{who}, pair {pair.id!r}, {side}", getattr(pair, side))
    device, some = next(stage.model.parameters()).device, pairs[:CHECKED]
    cond = pipeline.conditions([pair.condition for pair in some], stage.name).to(device)
    with torch.no_grad():
        check_convention(stage, collate([pair.preferred for pair in some]).to(device), cond)


def origin(stage: FlowStage, pairs: Sequence[PreferencePair]) -> dict[str, str]:
    """Hashes of the network that training starts from and of the pairs."""
    latents = {f"{p.id}/{side}/{k}": v for p in pairs for side in ("preferred", "rejected") for k, v in _tensors(getattr(p, side)).items()}
    columns = [[p.id, p.condition, p.source, p.w2, p.provenance.get("w2_norm")] for p in pairs]
    return {"base": checksum(stage.model.state_dict(), type(stage.model).__name__), "pairs": checksum(latents, columns)}


def _tensors(latent: Latent) -> dict[str, torch.Tensor]:
    return {"coords": latent.coords, "feats": latent.feats} if isinstance(latent, SparseSample) else {"x": latent}


def policy_and_reference(stage: FlowStage, config: TrainConfig) -> tuple[torch.nn.Module, Reference | None]:
    """A network to train, and what it is compared with, which takes no memory besides the stage's own; None where the loss needs none."""
    if config.lora is not None:
        policy = shared_copy(stage.model)
        add_lora(policy, config.lora, config.seed)
        return policy, AdapterOff(policy) if config.dpo.needs_reference else None
    policy = copy.deepcopy(stage.model).float().requires_grad_(True)
    return policy, FrozenModel(shared_copy(stage.model).float(), policy) if config.dpo.needs_reference else None
