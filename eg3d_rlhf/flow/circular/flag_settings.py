"""From the flags of `train.py --mode=circular-dpo` to a run: what is refused, and which setting each flag changes."""

from collections.abc import Mapping
from dataclasses import replace

from eg3d_rlhf.flow.circular.ablation import letters
from eg3d_rlhf.flow.circular.judging import Judging
from eg3d_rlhf.flow.circular.problems import ProblemSource
from eg3d_rlhf.flow.circular.run import CircularRun
from eg3d_rlhf.flow.circular.settings import Choosing, CircularSettings
from eg3d_rlhf.flow.dpo import PRESETS, DpoConfig, beta_T
from eg3d_rlhf.flow.lora import LoraConfig
from eg3d_rlhf.flow.tuning.config import TrainConfig

DPO_FIELDS = {
    "loss": "kind", "pair_weight": "weight_mode", **{name: name for name in (
        "label_smoothing", "margin", "loser_weight", "sft_weight", "aggregation", "drdpo_beta", "noise", "condition_dropout", "clamp",
    )},
}  # fmt: skip
TRAIN_FIELDS = (
    "lr", "steps", "warmup", "weight_decay", "clip", "batch", "batch_gpu", "ema", "draws", "cache_reference", "held_out_every", "patience",
    "max_drop", "log_every", "checkpoint_every",
)  # fmt: skip
LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets")
LOOP_ONLY = (
    "rounds", "loop_pairs", "loop_beta", "loop_loser_weight", "loop_sft_weight", "loop_lr", "loop_steps", "tau", "w1", "w2", "w2_norm",
    "roles",
)  # fmt: skip
ABLATION_ONLY = ("seeds", "workers")
WITH_RESUME = ("resume", "device", "workers", "timeout", "dry_run")


def flag(name: str) -> str:
    """As users write it."""
    return "--" + name.replace("_", "-")


def check(flags: Mapping, given: set[str]) -> None:
    """Refuse what would have no effect.

    Args: given: names of the flags that were written. Raises: ValueError naming them.
    """
    if flags["resume"] is not None:
        extra = sorted(given - set(WITH_RESUME))
        if extra:
            raise ValueError(f"{', '.join(map(flag, extra))}: expected the run's own with --resume, got others. Leave out.")
        return
    _belongs(given, ABLATION_ONLY, flags["ablate"] is not None, "--ablate")
    _belongs(given, ("no_summary",), flags["ablate"] is None, "a run without --ablate")
    _belongs(given, ("table_noises",), not flags["no_summary"], "the table, which --no-summary leaves out")
    _belongs(given, LOOP_ONLY, flags["stage"] is None, "the loop, not to --stage")
    if flags["stage"] is not None and flags["ablate"] is not None:
        raise ValueError("--stage: expected a run of one stage or an --ablate of all, got both. Leave one out.")
    if flags["ablate"] is not None:
        for name in {"rounds", "w1", "w2"} & given:
            raise ValueError(f"{flag(name)}: expected the groups of --ablate to decide, got {flags[name]}. Leave it out.")
    if flags["tune"] == "full":
        _belongs(given, LORA_FIELDS, False, "--tune=lora")
    if flags["beta_t"] is not None and flags["beta"] is None:
        raise ValueError("--beta-t: expected --beta beside it, got none. Both are multiplied.")
    if flags["choose_noises"] == 0:
        _belongs(given, ("held_out_every", "patience", "max_drop"), False, "early stopping, which --choose-noises=0 leaves out")


def _belongs(given: set[str], names, applies: bool, where: str) -> None:
    extra = [flag(name) for name in names if name in given]
    if extra and not applies:
        raise ValueError(f"{', '.join(extra)}: belongs to {where}, and would have no effect here. Leave it out.")


def resolve(flags: Mapping, defaults: CircularSettings) -> CircularRun:
    """The run that the flags describe, with a problem's `defaults` for those that are None.

    Raises: ValueError naming what does not fit.
    """
    groups = None if flags["ablate"] is None else tuple(letters(flags["ablate"]))
    seed, batch = flags["seed"], flags["judge_batch"] or (defaults.choosing or Choosing()).batch
    paths = {name: None if flags[name] is None else str(flags[name]) for name in ("pairs", "conditions")}
    plain = {name: flags[name] for name in ("pipeline", "seed", "dtype", "held_out", "flow_weights", "voxel_share", "views")}
    run = CircularRun(
        circular=settings(flags, defaults), source=ProblemSource(**plain, **paths, also=tuple(map(str, flags["also"]))),
        stage=flags["stage"], groups=groups, training_seeds=tuple(range(seed, seed + (flags["seeds"] or 3))) if groups else (),
        judging=Judging(per_condition=flags["table_noises"] or Judging().per_condition, batch=batch),
        summary=not flags["no_summary"], artefacts=str(flags["artefacts"] or flags["outdir"] / "artefacts"),
    )
    if groups is not None:
        run.plan.tasks()  # validates
    return run


def settings(flags: Mapping, defaults: CircularSettings) -> CircularSettings:
    """The defaults with what the flags change."""
    human, loop, sft = (_training(flags, config) for config in (defaults.human, defaults.loop, defaults.sft))
    human = replace(human, dpo=_loss(flags, human.dpo))
    kept = {"noise": human.dpo.noise, "condition_dropout": human.dpo.condition_dropout}
    sft = replace(sft, dpo=replace(sft.dpo, **kept))
    loop = _loop(flags, loop, human, defaults)
    pairs = replace(defaults.loop_pairs, **_some(flags, {"loop_pairs": "per_pair", "judge_batch": "batch"}))
    filtered = _some(flags, {"tau": "tau", "w1": "use_w1", "w2": "use_w2", "w2_norm": "w2_norm", "roles": "roles"})
    weighing = replace(defaults.weighing, **filtered)
    return replace(
        defaults, human=human, loop=loop, sft=sft, loop_pairs=pairs, weighing=weighing, choosing=_choosing(flags, defaults.choosing),
        rounds=flags["rounds"] or defaults.rounds, seed=flags["seed"],
    )


def _some(flags: Mapping, names: Mapping[str, str]) -> dict:
    return {field: flags[name] for name, field in names.items() if flags[name] is not None}


def _training(flags: Mapping, config: TrainConfig) -> TrainConfig:
    """All but the loss."""
    given = _some(flags, {name: name for name in TRAIN_FIELDS})
    if flags["amp"] is not None:
        given["bf16"] = flags["amp"] == "bf16"
    return replace(config, lora=_lora(flags, config.lora), **given)


def _loss(flags: Mapping, dpo: DpoConfig) -> DpoConfig:
    """Of people's pairs."""
    given = _some(flags, DPO_FIELDS)
    if flags["beta"] is not None:
        given["beta"] = beta_T(flags["beta"], flags["beta_t"] or 1.0)
    return replace(PRESETS[flags["preset"]] if flags["preset"] is not None else dpo, **given)


def _lora(flags: Mapping, lora: LoraConfig | None) -> LoraConfig | None:
    tune = flags["tune"] or ("full" if lora is None else "lora")
    given = _some(flags, {f"lora_{name}": name for name in ("rank", "alpha", "dropout")})
    if flags["lora_targets"] is not None:
        given["targets"] = tuple(name.strip() for name in flags["lora_targets"].split(","))
    if tune == "full":
        if given:
            raise ValueError(f"{', '.join(flag('lora_' + name) for name in given)}: belongs to --tune=lora. Add that, or leave it out.")
        return None
    return replace(lora or LoraConfig(), **given)


def _loop(flags: Mapping, loop: TrainConfig, human: TrainConfig, defaults: CircularSettings) -> TrainConfig:
    """The loop's loss is people's with the loop's own anchors."""
    own = defaults.loop.dpo
    beta = human.dpo.beta * own.beta / defaults.human.dpo.beta  # in this order, so that the defaults' own is exact
    anchors = {"loser_weight": own.loser_weight, "sft_weight": own.sft_weight, "beta": beta}
    anchors |= _some(flags, {"loop_loser_weight": "loser_weight", "loop_sft_weight": "sft_weight", "loop_beta": "beta"})
    loss = own if not human.dpo.needs_reference else human.dpo
    return replace(loop, dpo=replace(loss, **anchors), **_some(flags, {"loop_lr": "lr", "loop_steps": "steps"}))


def _choosing(flags: Mapping, choosing: Choosing | None) -> Choosing | None:
    if flags["choose_noises"] == 0 or (choosing is None and flags["choose_noises"] is None):
        return None
    given = _some(flags, {"choose_noises": "per_condition", "judge_batch": "batch"})
    return replace(choosing or Choosing(), **given)
