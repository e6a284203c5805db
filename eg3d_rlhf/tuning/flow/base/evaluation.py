"""Scores of samples on held-out conditions, by which checkpoints are chosen and the final table is made."""

from collections.abc import Callable, Mapping, Sequence

import torch

from eg3d_rlhf.models.sparse import Latent, SparseSample, feats_of
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import Models, generate
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS, Evaluation
from eg3d_rlhf.tuning.flow.base.stage import Voxels
from training.progress import tqdm


def evaluate(
    problem: Problem,
    models: Models,
    evaluation: Evaluation,
    on_asset: Callable[[int], None] | None = None,
    spreads: bool = False,
    given: Mapping[str, Sequence[Voxels]] | None = None,
) -> dict:
    """Score the held-out conditions' assets; returns JSON: {"conditions": [C], "scores":
    {evaluator or part: [C][S]}}.

    Evaluators: those of EVALUATORS that the problem has, and the parts of its table. The noises are the same
    whatever is evaluated, so that generators are compared asset by asset.
    Args: spreads: with "spread": {stage: [C]} of the stages before the last, see `spread`; and of the final
        score, its standard deviation over a condition's assets. given: by the name of a stage, what the
        stages before leave to it, [C S] in the order of Evaluation.crossed; they are not run.
    Raises: ValueError for a score that is not finite.
    """
    evaluators = {name: evaluator for name in EVALUATORS if (evaluator := getattr(problem, name)) is not None}
    scores: dict[str, list] = {}
    spread_of: dict[str, list[float]] = (
        {stage.name: [] for stage in problem.pipeline.stages[:-1]} if spreads else {}
    )
    names = list(problem.held_out_conditions)
    S = evaluation.per_condition
    block = max(1, evaluation.batch // S)
    all_conditions, all_seeds = evaluation.crossed(problem)
    for i in tqdm(
        range(0, len(names), block),
        desc="evaluation",
        unit="batch",
        leave=False,
        disable=True if on_asset else None,
    ):
        part = names[i : i + block]
        rows = slice(i * S, (i + block) * S)
        conditions = all_conditions[rows]
        seeds = all_seeds[rows]
        left = {stage: places[rows] for stage, places in (given or {}).items()}
        assets = generate(problem.pipeline, conditions, seeds, models, evaluation.batch, left)
        values = {name: evaluator(assets, conditions) for name, evaluator in evaluators.items()}
        if problem.parts is not None:
            values |= problem.parts(assets, conditions)
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name}: expected finite scores, got {value.tolist()}. Correct that evaluator."
                )
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
