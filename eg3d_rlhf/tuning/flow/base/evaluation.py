"""Evaluation of generators on held-out prompts: scores and spread of their samples, for the final table.

The same prompts and noise seeds are used for every generator, so that scores can be compared asset by asset.

Shape letters: C held-out prompts, S assets per prompt.
"""

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
    """Score the assets of the held-out prompts with every evaluator that the problem has.

    Returns JSON: {"conditions": [C] prompts, "scores": {evaluator or part: [C][S]}}. The evaluators are those
    of EVALUATORS and the sub-scores `problem.parts`.
    Args:
        models: networks by stage, in place of the pipeline's own.
        on_asset: called with the number of assets after each batch.
        spreads: also return "spread": {stage: [C]} for the stages before the last (see `spread`), and under
            "score" the standard deviation of the final score over a prompt's assets.
        given: by the name of a stage, the output of the stages before it, [C S] in the order of
            Evaluation.crossed. Those stages are then not run.
    Raises: ValueError for a score that is not finite.
    """
    evaluators = {name: evaluator for name in EVALUATORS if (evaluator := getattr(problem, name)) is not None}
    scores: dict[str, list] = {}
    spread_of: dict[str, list[float]] = (
        {stage.name: [] for stage in problem.pipeline.stages[:-1]} if spreads else {}
    )
    names = list(problem.held_out_conditions)
    S = evaluation.per_condition
    # a batch holds whole prompts, so that each row of S scores is complete
    block = max(1, evaluation.batch // S)
    all_prompts, all_seeds = evaluation.crossed(problem)
    for i in tqdm(
        range(0, len(names), block),
        desc="evaluation",
        unit="batch",
        leave=False,
        disable=True if on_asset else None,  # the caller shows its own bar; two would overwrite each other
    ):
        part = names[i : i + block]
        rows = slice(i * S, (i + block) * S)
        prompts = all_prompts[rows]
        seeds = all_seeds[rows]
        left = {stage: places[rows] for stage, places in (given or {}).items()}
        assets = generate(problem.pipeline, prompts, seeds, models, evaluation.batch, left)
        values = {name: evaluator(assets, prompts) for name, evaluator in evaluators.items()}
        if problem.parts is not None:
            values |= problem.parts(assets, prompts)
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"{name}: expected finite scores, got {value.tolist()}. Correct that evaluator."
                )
            # [prompts in the batch * S] -> [prompts, S]: `crossed` lists all noises of a prompt in a row
            scores.setdefault(name, []).extend(value.detach().double().cpu().view(-1, S).tolist())
        encoded = problem.pipeline.encode(assets) if spread_of else []
        # only stages before the last: the last latents of some pipelines are costly to encode
        for stage, values_of_stage in spread_of.items():
            values_of_stage += [
                spread([latents[stage] for latents in encoded[k * S : (k + 1) * S]]) for k in range(len(part))
            ]
        if on_asset:
            on_asset(len(assets))
    if not spreads:
        return {"conditions": names, "scores": scores}
    spread_of["score"] = torch.tensor(scores["final"], dtype=torch.float64).std(1).tolist()
    return {"conditions": names, "scores": scores, "spread": spread_of}


def spread(latents: Sequence[Latent]) -> float:
    """Measure how much the latents of one prompt differ: 0 where all are equal.

    Returns the standard deviation over the latents of each number, averaged over the numbers. Sparse latents
    are first averaged over their voxels, because the voxels of two latents lie in different places.
    """
    rows = [x.feats.mean(0) if isinstance(x, SparseSample) else feats_of(x).flatten() for x in latents]
    return float(torch.stack(rows).double().std(0).mean())
