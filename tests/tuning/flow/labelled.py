"""Problems whose labels can be learnt, and the same with answers given by the toss of a coin; a folder of
such labels, for `flow tune`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from eg3d_rlhf.models.lora_settings import LoraConfig
from eg3d_rlhf.models.sparse import Latent, feats_of, latent_of, parts_of
from eg3d_rlhf.modes.flow_tune import LOSER_WEIGHT
from eg3d_rlhf.tuning.flow.base.conditioning import Conditioning, write_conditioning
from eg3d_rlhf.tuning.flow.base.pairs import PairsByStage, PreferencePair, pairs_of_prompts
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.ranking import RANKING, write_latents
from eg3d_rlhf.tuning.flow.families import hunyuan3d
from eg3d_rlhf.tuning.flow.toy.bundled import toy_problem
from eg3d_rlhf.tuning.flow.training.circular.loop_pairs import invert_pair
from eg3d_rlhf.tuning.flow.training.circular.settings import CircularSettings
from eg3d_rlhf.tuning.flow.training.settings import DpoConfig, TrainConfig
from eg3d_rlhf.tuning.flow.workspace import tune as tuning_module
from eg3d_rlhf.tuning.flow.workspace.work_folder import Tuning
from tests.modes import flow_works
from tests.tuning.flow.families.hunyuan3d.tiny_hunyuan3d import LATENTS, C, tokens
from training.phases import derive_seed

FAST = TrainConfig(
    dpo=DpoConfig(beta=20.0, loser_weight=LOSER_WEIGHT),
    lora=LoraConfig(rank=16, alpha=32),
    steps=60,
    batch=16,
    lr=1e-3,
    warmup=5,
    held_out_every=20,
    log_every=20,
)


def randomised(problem: Problem, seed: int) -> Problem:
    """Every answer given at random, those that choose and tell among them."""

    def tossed(pairs: list[PreferencePair]) -> list[PreferencePair]:
        return [invert_pair(pair) if derive_seed("answer", seed, pair.id) % 2 else pair for pair in pairs]

    return replace(
        problem,
        train_pairs=PairsByStage(problem.train_pairs, lambda stage: tossed(problem.train_pairs[stage])),
        unseen_pairs=PairsByStage(problem.unseen_pairs, lambda stage: tossed(problem.unseen_pairs[stage])),
    )


def toy(seed: int, unseen: int = 2) -> Problem:
    """The toy with few pairs to tell by."""
    problem = toy_problem(seed)
    pairs = problem.unseen_pairs
    return replace(problem, unseen_pairs=PairsByStage(pairs, lambda stage: _first(pairs[stage], unseen)))


def _first(pairs: list[PreferencePair], count: int) -> list[PreferencePair]:
    kept: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        kept.setdefault(pair.condition, []).append(pair)
    return [pair for of_condition in kept.values() for pair in of_condition[:count]]


def shapes(root: Path, seed: int, prompts: int = 30, per_condition: int = 6) -> Problem:
    """A tiny Hunyuan3D folder; people prefer latents whose mean is higher."""
    names = [f"c{i:02d}" for i in range(prompts)]
    pipeline = hunyuan3d.FAMILY.load(root, tokens(names))
    g = torch.Generator().manual_seed(seed)
    pairs = []
    for name in names:
        for k in range(per_condition):
            a, b = (
                torch.randn(LATENTS, C, generator=g) + 0.4 * torch.randn([], generator=g) for _ in range(2)
            )
            if torch.rand([], generator=g) > torch.sigmoid(8 * (a.mean() - b.mean())):
                a, b = b, a
            pairs.append(
                PreferencePair(id=f"{name}-{k}", condition=name, stage="shape", preferred=a, rejected=b)
            )
    train = names[: prompts // 2]
    choose = names[prompts // 2 : -prompts // 3]
    tell = names[-prompts // 3 :]

    return Problem(
        pipeline=pipeline,
        train_pairs={"shape": pairs_of_prompts(pairs, train)},
        unseen_pairs={"shape": pairs_of_prompts(pairs, [*choose, *tell])},
        train_prompts=train,
        choosing_prompts=choose,
        held_out_prompts=tell,
        identity={"problem": "tiny", "seed": seed},
    )


def tuning(seed: int, **changes) -> Tuning:
    return Tuning(circular=CircularSettings(human=replace(FAST, **changes), seed=seed))


# Through `flow tune`, on a family's folder.

LEARNING = "--steps=20 --batch=8 --lr=4e-3 --device=cpu".split()
LEARNING += [
    f"--set={setting}" for setting in ("lora_rank=4", "beta=20", "warmup=5", "held_out_every=10", "samples=0")
]


def write_ranked(folder: Path, like: Mapping[str, Latent], conditions: Conditioning) -> Path:
    """Three assets of every condition, ranked by the mean of their latents.

    Args: like: latents of some asset, by stage.
    """
    folder.mkdir()
    write_conditioning(folder / "conditioning.safetensors", conditions)
    g = torch.Generator().manual_seed(0)
    lines = []
    for i, name in enumerate(conditions.names):
        for rank in (1, 2, 3):
            file = f"{i:02d}-{rank}.safetensors"
            write_latents(
                folder / file, {stage: _around(latent, 0.7 * (2 - rank), g) for stage, latent in like.items()}
            )
            lines.append(json.dumps({"condition": name, "rank": rank, "latents": file}) + "\n")
    (folder / RANKING).write_text("".join(lines))
    return folder


def _around(latent: Latent, mean: float, g: torch.Generator) -> Latent:
    """A random one of the same form."""
    parts = parts_of(latent)
    free = [name for name in parts if name in ("x", "feats") or name.startswith("/")]  # of NamedSample
    return latent_of({**parts, **{name: mean + torch.randn(parts[name].shape, generator=g) for name in free}})


def check_labels_are_learnt(
    root: Path,
    like: Mapping[str, Latent],
    given: Conditioning,
    ranked: Conditioning,
    folder: Path,
    monkeypatch,
) -> None:
    """Every stage says how many held-out pairs it orders, and how many its control, which half of the pairs
    it learns from deceive.

    Args: like: latents of some asset, by stage; given: embeddings of WORK; ranked: of the assets that labels
        are of.
    """
    write_conditioning(folder / "conditioning.safetensors", given)
    labels = write_ranked(folder / "RANKED", like, ranked)
    flow_works.flow(
        "new",
        folder / "WORK",
        f"--pipeline={root}",
        f"--conditioning={folder / 'conditioning.safetensors'}",
        "--device=cpu",
    )
    trained = []
    train_stage = tuning_module.train_stage

    def seen(conditioned, pairs, config, place, **options):
        trained.append((conditioned.stage.name, pairs, options["unseen"]))
        return train_stage(conditioned, pairs, config, place, **options)

    monkeypatch.setattr(tuning_module, "train_stage", seen)
    said = flow_works.flow("tune", folder / "WORK", f"--labels={labels}", *LEARNING)
    report = json.loads((folder / "WORK" / "tune-00" / "report.json").read_text())
    assert list(report["stages"]) == list(like) == report["kept"], said
    for stage, found in report["stages"].items():
        low, high = found["held_out"]["interval"]
        assert 0.5 < low <= found["held_out"]["accuracy"] <= high and found["above_control"][1] > 0
        assert (
            found["control"]["pairs"] == found["held_out"]["pairs"] and len(found["control"]["interval"]) == 2
        )
        share = f"{found['held_out']['accuracy']:.3f}"
        assert any(line.startswith(f"| {stage} |") and share in line for line in said.splitlines())
        (_, pairs, choosing), (_, other, choosing_too) = (of for of in trained if of[0] == stage)
        as_said = [
            _same(a.preferred, b.preferred) and _same(a.rejected, b.rejected)
            for a, b in zip(pairs, other, strict=True)
        ]
        turned = [
            _same(a.preferred, b.rejected) and _same(a.rejected, b.preferred)
            for a, b in zip(pairs, other, strict=True)
        ]
        assert abs(sum(turned) - len(pairs) / 2) <= 0.5 and all(
            a != b for a, b in zip(as_said, turned, strict=True)
        )
        assert choosing and all(
            _same(a.preferred, b.preferred) for a, b in zip(choosing, choosing_too, strict=True)
        )


def _same(a: Latent, b: Latent) -> bool:
    return torch.equal(feats_of(a), feats_of(b))
