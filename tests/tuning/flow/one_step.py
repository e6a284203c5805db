"""One DPO step of a stage's adapters, as every family's tests take it."""

import copy
from collections.abc import Sequence

import pytest
import torch

from eg3d_rlhf.models.lora import adapters_off, add_lora, lora_parameters
from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.tuning.flow.base.pairs import PreferencePair
from eg3d_rlhf.tuning.flow.training.dpo import PairErrors, draw_pairs, pair_loss
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig
from eg3d_rlhf.tuning.flow.workspace.sampled_assets import draw


def pairs_of(pipeline, stage: str, prompts: Sequence[str]) -> list[PreferencePair]:
    """A pair per condition of what the generator draws with seeds 0 and 1."""
    drawn = [[draw(pipeline, [name], [seed])[0][0][stage] for seed in (0, 1)] for name in prompts]
    both = zip(prompts, drawn, strict=True)
    return [
        PreferencePair(id=name, condition=name, stage=stage, preferred=a, rejected=b) for name, (a, b) in both
    ]


def check_one_dpo_step(pipeline, name: str, prompts: Sequence[str]) -> torch.nn.Module:
    """The loss begins at log 2 and falls with a step of the adapters, which alone are trained. Returns the
    adapted network.
    """
    stage = next(s for s in pipeline.stages if s.name == name)
    pairs = pairs_of(pipeline, name, prompts)
    model = copy.deepcopy(stage.model)
    add_lora(model, LoraConfig(rank=2, targets=stage.lora_targets), seed=0)
    given = draw_pairs(stage, pairs, pipeline.conditioning(prompts, name), None, DpoConfig(), seed=0, epoch=0)

    def loss():
        errors = stage.path.errors(
            stage.velocity(given.x_t, given.t, given.cond, model), given.x_0, given.eps
        )
        with torch.no_grad(), adapters_off(model):
            reference = stage.path.errors(
                stage.velocity(given.x_t, given.t, given.cond, model), given.x_0, given.eps
            )
        return pair_loss(PairErrors.split(errors, reference), DpoConfig(beta=50.0)).mean()

    before = loss()
    assert float(before.detach()) == pytest.approx(0.6931472, abs=1e-6)  # adapters begin as nothing
    before.backward()
    torch.optim.SGD(lora_parameters(model), lr=0.01).step()
    assert loss() < before and all(
        not p.requires_grad for n, p in model.named_parameters() if "lora" not in n
    )
    return model
