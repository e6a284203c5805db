"""Scores of samples on held-out conditions, by which checkpoints are chosen and the final table is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.models.sparse import Latent, SparseSample, feats_of
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import HeldOut, Models, crossed, generate
from eg3d_rlhf.tuning.flow.base.stage import Voxels
from training.config import check_knobs, knob
from training.distributed import SINGLE, Ranks
from training.phases import derive_seed
from training.progress import tqdm

TABLE = "Judging and ablation"  # title of its flags
JUDGES = ("final", "chooser", "reward")


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """On what the win rate is measured that chooses checkpoints and stops training early."""

    per_condition: int = knob(4, "Noises for each held-out condition.", TABLE, name="choose_noises", low=1)
    batch: int = knob(64, "Assets at once; bounds memory.", TABLE, name="judge_batch", low=1, rare=True)
    seed: int = 0  # of the noises, which are not those of the table

    def __post_init__(self):
        check_knobs(self)

    def held_out(
        self, problem: Problem, stage: str, others: Models, against: Models, ranks: Ranks = SINGLE
    ) -> HeldOut | None:
        """Make the evaluator of a stage's training; None for a problem that has none to choose by.

        Args: others, against, ranks: see HeldOut.
        """
        if problem.chooser is None:
            return None
        conditions, seeds = crossed(problem.choosing, self.per_condition, self.seed)
        return HeldOut(
            pipeline=problem.pipeline,
            stage=stage,
            reward=problem.chooser,
            conditions=conditions,
            seeds=seeds,
            others=others,
            against=against,
            batch=self.batch,
            ranks=ranks,
        )


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What is generated for the table: the same noises whatever is judged, so that generators are compared
    pair by pair.
    """

    per_condition: int = knob(
        8, "Assets per held-out condition and training behind the table.", TABLE, name="table_noises", low=2
    )
    batch: int = knob(
        64,
        "Assets at once; bounds memory.",
        TABLE,
        name="judge_batch",
        low=1,
        shown="the problem's own",
        rare=True,
    )
    seed: int = 0  # of the noises, apart from those that are trained or chosen on

    def __post_init__(self):
        check_knobs(self)

    def crossed(self, problem: Problem) -> tuple[list[str], list[int]]:
        """Return every held-out condition per noise, and the noises' seeds, [C S] each."""
        pairs = [(name, k) for name in problem.held_out_conditions for k in range(self.per_condition)]
        return [name for name, _ in pairs], [
            derive_seed("table", self.seed, name, k) % 2**31 for name, k in pairs
        ]


def judged(
    problem: Problem,
    models: Models,
    judging: Judging,
    on_asset: Callable[[int], None] | None = None,
    spreads: bool = False,
    given: Mapping[str, Sequence[Voxels]] | None = None,
) -> dict:
    """Score the held-out conditions' assets; returns JSON: {"conditions": [C], "scores":
    {judge or part: [C][S]}}.

    Judges: those of JUDGES that the problem has, and the parts of its table. The noises are the same whatever
    is judged, so that generators are compared asset by asset.
    Args: spreads: with "spread": {stage: [C]} of the stages before the last, see `spread`; and of the final
        score, its standard deviation over a condition's assets. given: by the name of a stage, what the
        stages before leave to it, [C S] in the order of Judging.crossed; they are not run.
    Raises: ValueError for a score that is not finite.
    """
    judges = {name: judge for name in JUDGES if (judge := getattr(problem, name)) is not None}
    scores: dict[str, list] = {}
    spread_of: dict[str, list[float]] = (
        {stage.name: [] for stage in problem.pipeline.stages[:-1]} if spreads else {}
    )
    names = list(problem.held_out_conditions)
    S = judging.per_condition
    block = max(1, judging.batch // S)
    all_conditions, all_seeds = judging.crossed(problem)
    for i in tqdm(
        range(0, len(names), block),
        desc="judging",
        unit="batch",
        leave=False,
        disable=True if on_asset else None,
    ):
        part = names[i : i + block]
        rows = slice(i * S, (i + block) * S)
        conditions = all_conditions[rows]
        seeds = all_seeds[rows]
        left = {stage: places[rows] for stage, places in (given or {}).items()}
        assets = generate(problem.pipeline, conditions, seeds, models, judging.batch, left)
        values = {name: judge(assets, conditions) for name, judge in judges.items()}
        if problem.parts is not None:
            values |= problem.parts(assets, conditions)
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: expected finite scores, got {value.tolist()}. Correct that judge.")
            scores.setdefault(name, []).extend(value.detach().double().cpu().view(-1, S).tolist())
        encoded = problem.pipeline.encode(assets) if spread_of else []
        # encoded latents of the last stage may be dear, and are not needed
        for stage, of_stage in spread_of.items():
            of_stage += [
                spread([latents[stage] for latents in encoded[k * S : (k + 1) * S]]) for k in range(len(part))
            ]
        if on_asset:
            on_asset(len(assets))
    if not spreads:
        return {"conditions": names, "scores": scores}
    spread_of["score"] = torch.tensor(scores["final"], dtype=torch.float64).std(1).tolist()
    return {"conditions": names, "scores": scores, "spread": spread_of}


def spread(latents: Sequence[Latent]) -> float:
    """Measure how far assets of one condition differ: the standard deviation over them of every number, in
    the mean; 0 where all are alike.

    On voxels, of the mean features, since they lie in different places.
    """
    rows = [x.feats.mean(0) if isinstance(x, SparseSample) else feats_of(x).flatten() for x in latents]
    return float(torch.stack(rows).double().std(0).mean())
