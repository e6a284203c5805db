"""Evaluation of generators on held-out prompts: scores and diversity of their samples, for the results table.

Every generator is evaluated with the same prompts and noise seeds, so that its assets can be compared in
pairs.

Shapes: C held-out prompts; S assets of each prompt.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from eg3d_rlhf.models.sparse import Latent, SparseSample, feats_of
from eg3d_rlhf.tuning.flow.base.problem import Problem
from eg3d_rlhf.tuning.flow.base.sampling import Models, generate
from eg3d_rlhf.tuning.flow.base.settings import EVALUATORS, Evaluation
from eg3d_rlhf.tuning.flow.base.stage import Voxels
from training import rehearsal
from training.progress import tqdm


def evaluate(
    problem: Problem,
    models: Models,
    evaluation_settings: Evaluation,
    on_asset: Callable[[int], None] | None = None,
    measures_spread: bool = False,
    given_outputs: Mapping[str, Sequence[Voxels]] | None = None,
) -> dict:
    """Generate assets of the held-out prompts, and score them with every evaluator that the problem has.

    The evaluators are the fields of the problem that EVALUATORS lists, and its sub-scores `parts`. Below, C
    is the number of held-out prompts and S the number of assets of each prompt.

    Args:
        problem: tuning problem.
        models: name of a stage -> network to use in place of the network of the pipeline.
        evaluation_settings: settings of the samples.
        on_asset: function that is called with the number of assets after each batch; None to show a progress
            bar instead.
        measures_spread: True to measure the diversity of the assets, too.
        given_outputs: name of one stage -> its C S inputs, in the order of Evaluation.crossed. The stages
            before it are then not sampled. None: all stages are sampled.
    Returns: dictionary of values for JSON. "conditions" is a list of the C prompts. "scores" is a dictionary
    from the name of an evaluator to C lists of S scores. If the diversity is measured, the dictionary also
    has the key "spread". Its value is a dictionary from the name of each stage before the last to C values of
    `spread`, and from "score" to C standard deviations of the final score over the assets of a prompt.
    Raises: ValueError for a score that is NaN or infinite.
    """
    with rehearsal.timed(rehearsal.SUMMARY, "evaluation"):
        return _evaluate(problem, models, evaluation_settings, on_asset, measures_spread, given_outputs or {})


def _evaluate(
    problem: Problem,
    models: Models,
    evaluation_settings: Evaluation,
    on_asset: Callable[[int], None] | None,
    measures_spread: bool,
    given_outputs: Mapping[str, Sequence[Voxels]],
) -> dict:
    """Generate and score assets, see `evaluate`. A rehearsal does the first batch alone."""
    evaluators = {
        evaluator_name: evaluator
        for evaluator_name in EVALUATORS
        if (evaluator := getattr(problem, evaluator_name)) is not None
    }
    scores_by_evaluator: dict[str, list] = {}
    spreads_by_stage: dict[str, list[float]] = {}
    if measures_spread:
        # Without the last stage, because its latents are expensive to encode in some pipelines.
        spreads_by_stage = {stage.name: [] for stage in problem.pipeline.stages[:-1]}
    held_out_prompts = list(problem.held_out_prompts)
    S = evaluation_settings.per_condition
    # A batch contains all S assets of a prompt, so that the scores of a prompt are complete.
    prompts_per_batch = max(1, evaluation_settings.batch // S)
    all_prompts, all_seeds = evaluation_settings.crossed(problem)
    for first_prompt_index in tqdm(
        rehearsal.first(range(0, len(held_out_prompts), prompts_per_batch)),
        desc="evaluation",
        unit="batch",
        leave=False,
        disable=on_asset is not None,  # the caller has a progress bar; two bars would overwrite each other
    ):
        batch_slice = slice(first_prompt_index * S, (first_prompt_index + prompts_per_batch) * S)
        prompts = all_prompts[batch_slice]
        seeds = all_seeds[batch_slice]
        batch_given_outputs = {
            stage: stage_outputs[batch_slice] for stage, stage_outputs in given_outputs.items()
        }
        assets = generate(
            problem.pipeline, prompts, seeds, models, evaluation_settings.batch, batch_given_outputs
        )
        batch_scores = {
            evaluator_name: evaluator(assets, prompts) for evaluator_name, evaluator in evaluators.items()
        }
        if problem.parts is not None:
            batch_scores |= problem.parts(assets, prompts)
        for evaluator_name, evaluator_scores in batch_scores.items():
            if not bool(evaluator_scores.isfinite().all()):
                raise ValueError(
                    f"{evaluator_name}: the evaluator returned NaN or infinity among the scores"
                    f" {evaluator_scores.tolist()}. Use an evaluator that returns finite scores."
                )
            # The assets of a prompt are adjacent, so the scores of a batch are [prompts, S].
            scores_by_evaluator.setdefault(evaluator_name, []).extend(
                evaluator_scores.detach().double().cpu().view(-1, S).tolist()
            )
        encoded_assets = problem.pipeline.encode(assets) if spreads_by_stage else []
        for stage, stage_spreads in spreads_by_stage.items():
            for first_asset_index in range(0, len(encoded_assets), S):
                prompt_assets = encoded_assets[first_asset_index : first_asset_index + S]
                stage_spreads.append(spread([latents[stage] for latents in prompt_assets]))
        if on_asset:
            on_asset(len(assets))
    if not measures_spread:
        return {"conditions": held_out_prompts, "scores": scores_by_evaluator}
    spreads_by_stage["score"] = (
        torch.tensor(scores_by_evaluator["final"], dtype=torch.float64).std(1).tolist()
    )
    return {"conditions": held_out_prompts, "scores": scores_by_evaluator, "spread": spreads_by_stage}


def latent_vector(latent: Latent) -> torch.Tensor:
    """Return a latent as one vector [D], in float64. A sparse latent is averaged over its voxels.

    Two sparse latents have different voxels, so only their means can be compared.
    """
    vector = latent.feats.mean(0) if isinstance(latent, SparseSample) else feats_of(latent).flatten()
    return vector.double()


def spread(latents: Sequence[Latent]) -> float:
    """Measure the diversity of the latents of one prompt; 0 if all are equal.

    It is the standard deviation of each number over the latents (`latent_vector`), averaged over the numbers.
    """
    return float(torch.stack([latent_vector(latent) for latent in latents]).std(0).mean())
