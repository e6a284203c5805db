"""Values that --help shows as defaults of flags of flow tuning that are no knobs, or that several trainings
of a run have: see `eg3d_rlhf.core.cli.HelpValues`.
"""

from typing import Any

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.tuning.flow.training.circular.settings import CircularSettings
from eg3d_rlhf.tuning.flow.training.offline.settings import OfflineRun
from eg3d_rlhf.tuning.flow.training.online.settings import DPO, OnlineRun, divided
from eg3d_rlhf.tuning.flow.training.settings import ArmsRun


def of_circular(settings: CircularSettings) -> list[object]:
    """Return the values of a loop: --lr and others are those of training on people's pairs."""
    loop = settings.loop
    choosing = settings.choosing
    return [
        {
            **_adapters(settings.human.lora),
            "rounds": settings.rounds,
            "loop_beta": loop.dpo.beta,
            "loop_loser_weight": loop.dpo.loser_weight,
            "loop_sft_weight": loop.dpo.sft_weight,
            "loop_lr": loop.lr,
            "loop_steps": loop.steps,
            "choose_noises": 0 if choosing is None else choosing.per_condition,
        },
        settings,
    ]


def of_online(run: OnlineRun) -> list[object]:
    """Return the values of an online run: those of the loss of its first arm."""
    kind, _ = divided(run.arms[0])
    config = run.losses.grpo_plain if kind == DPO else run.losses.of(kind)
    return [{**_adapters(config.lora), **_table(run)}, config, run]


def of_offline(run: OfflineRun) -> list[object]:
    """Return the values of an offline run: those of training on single assets."""
    return [{**_adapters(run.singles.lora), **_table(run)}, run.singles, run]


def _adapters(lora: LoraConfig | None) -> dict[str, Any]:
    targets = {} if lora is None or lora.targets is None else {"lora_targets": ",".join(lora.targets)}
    return {"tune": "full" if lora is None else "lora", **targets}


def _table(run: ArmsRun) -> dict[str, Any]:
    return {
        "arms": ",".join(run.arms),
        "seeds": ",".join(map(str, run.training_seeds)),
        "choose_noises": 0 if run.choosing is None else run.choosing.per_condition,
    }
