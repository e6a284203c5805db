"""What a generator's assets are worth to every judge, on the conditions and noises of the final table.

Shape letters: C conditions, S noises per condition.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eg3d_rlhf.flow.generate import Models, generate
from eg3d_rlhf.flow.problem import Problem
from eg3d_rlhf.flow.sparse import Latent, SparseSample
from training.phases import derive_seed


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What is generated for the table: the same noises whatever is judged, so that generators are compared pair by pair."""

    per_condition: int = 8  # noises, S
    batch: int = 64  # assets at once; bounds memory
    seed: int = 0  # of the noises, apart from those that are trained or chosen on

    def __post_init__(self):
        for name, least in (("per_condition", 2), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"Judging.{name}: expected at least {least}, got {getattr(self, name)}. Raise it.")

    def noises(self, condition: str) -> list[int]:
        """Seeds [S] of a condition's assets."""
        return [derive_seed("table", self.seed, condition, k) % 2**31 for k in range(self.per_condition)]


def judge(problem: Problem, models: Models, judging: Judging, on_asset: Callable[[int], None] | None = None) -> dict:
    """Scores of the held-out conditions' assets, as JSON: {"conditions": [C], "scores": {judge or part: [C][S]}, "spread": {stage: [C]}}.

    Judges: "final", "chooser" and "reward", those that the problem has, and the parts of its table.
    Spread: of the stages before the last, see `spread`; and of the final score, its standard deviation over a condition's assets.
    Raises: ValueError for a problem without a final judge, or a score that is not finite.
    """
    if problem.final is None:
        raise ValueError("judge: expected a problem with a final judge, got none. A table needs one that nothing was trained or chosen on.")
    judges = {"final": problem.final, "chooser": problem.chooser, "reward": problem.reward}
    found: dict[str, list] = {}
    spreads: dict[str, list[float]] = {stage.name: [] for stage in problem.pipeline.stages[:-1]}
    names, S = list(problem.held_out_conditions), judging.per_condition
    block = max(1, judging.batch // S)
    for i in range(0, len(names), block):
        part = names[i : i + block]
        conditions = [name for name in part for _ in range(S)]
        seeds = [seed for name in part for seed in judging.noises(name)]
        assets = generate(problem.pipeline, conditions, seeds, models, judging.batch)
        values = {name: one(assets, conditions) for name, one in judges.items() if one is not None}
        if problem.parts is not None:
            values |= problem.parts(assets, conditions)
        for name, value in values.items():
            found.setdefault(name, []).extend(_rows(name, value, S))
        encoded = problem.pipeline.encode(assets)
        for stage, out in spreads.items():  # encoded latents of the last stage may be dear, and are not needed
            out += [spread([one[stage] for one in encoded[k * S : (k + 1) * S]]) for k in range(len(part))]
        if on_asset:
            on_asset(len(assets))
    spreads["score"] = torch.tensor(found["final"], dtype=torch.float64).std(1).tolist()
    return {"conditions": names, "scores": found, "spread": spreads}


def _rows(name: str, values: torch.Tensor, S: int) -> list[list[float]]:
    if not bool(values.isfinite().all()):
        raise ValueError(f"judge: expected finite scores of {name}, got {values.tolist()}. Correct that judge.")
    return values.detach().double().cpu().view(-1, S).tolist()


def spread(latents: Sequence[Latent]) -> float:
    """How far assets of one condition differ: standard deviation over them, of every number, in the mean; 0 where all are alike.

    On voxels, of the mean features, since they lie in different places.
    """
    rows = [x.feats.mean(0) if isinstance(x, SparseSample) else x.flatten() for x in latents]
    return float(torch.stack(rows).double().std(0).mean())
