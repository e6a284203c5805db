"""Assets with a label each, on which a stage is tuned: a list of assets with latents, and labels of any kind.

The list was written by `eg3d-rlhf flow sample`, or names assets of your own (ranking.py). The labels are in a
file (preferences/label_scores.py); without a file, the ranks in the list are used. The toy generates its
assets, and labels them with simulated annotators.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.models.sparse import Latent
from eg3d_rlhf.preferences.label_scores import Known, as_used, contrast, read_goodness
from eg3d_rlhf.tuning.flow.base.ranking import (
    RANKING,
    Candidate,
    Candidates,
    read_candidates,
    sampled_candidate,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Single:
    """A latent of one stage, and the label of the asset that it belongs to."""

    id: str  # unique within its set: it seeds the noise
    condition: str  # prompt; the pipeline has its conditioning tokens
    stage: str
    latent: Latent
    r: float  # label in 0..1, larger is better; 1/2 has no effect on training


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """Assets, and the label r of those that have one."""

    assets: Sequence[Candidate]
    goodness: Mapping[str, float]  # by an asset's name

    @property
    def conditions(self) -> dict[str, str]:
        """Return the prompt of every asset, by the asset's name."""
        return {asset.name: asset.condition for asset in self.assets}

    @functools.cached_property
    def identity(self) -> str:
        """Return a hash of prompts and labels by asset; training hashes the latents separately."""
        return json_hash(
            {asset.name: [asset.condition, self.goodness.get(asset.name)] for asset in self.assets}
        )

    def said_by(self, labels: Path) -> "Labelled":
        """Return the same assets with the labels of a file. Raises: see `read_goodness`."""
        return replace(self, goodness=read_goodness(labels, known_of(self.assets)))

    def singles(
        self, stage: str, conditions: Collection[str] | None = None, use: str = "labels", seed: int = 0
    ) -> list[Single]:
        """Select a stage's latents of the labelled assets whose prompt has at least two labelled assets.

        Args: conditions: prompts to train on, None: all; use, seed: r as labelled or as a control's, see
            `as_used`.
        Raises: ValueError where none is left, or the assets have no latents of the stage.
        """
        prompts = self.conditions
        # labels are compared within a prompt, so a single label there has no effect
        kept = contrast(self.goodness, set(prompts.values()) if conditions is None else conditions, prompts)
        if not kept:
            raise ValueError(
                "labels: expected two or more labelled assets for a prompt to train on, got none of"
                f" {len(self.goodness)} labels. Label several assets of each prompt."
            )
        # assets of an older list may have latents of some stages only
        lacking = next((asset for asset in self.assets if stage not in asset.latents), None)
        if lacking is not None:
            there = ", ".join(lacking.latents) or "none"
            raise ValueError(
                f"labels: expected latents of stage {stage!r}, got those of {there}. Name one of these with"
                " --stage."
            )
        r = as_used(kept, prompts, use, seed)
        return [
            Single(
                id=f"{a.condition}/{a.name}",
                condition=a.condition,
                stage=stage,
                latent=a.latents[stage],
                r=r[a.name],
            )
            for a in self.assets
            if a.name in r
        ]


def read_labelled(
    assets: Path,
    labels: Path | None,
    pipeline: Any,
    candidate: Candidates = sampled_candidate,
    on_asset: Callable[[], None] | None = None,
) -> Labelled:
    """Read the assets of a list and their labels.

    Args: assets: the list, or the folder that holds it; labels: a file of labels, None: the ranks in the
        list; candidate: reads a line; on_asset: called after each asset.
    Raises: FileNotFoundError or ValueError naming the file, the line and a remedy.
    """
    # ranks may be missing, since the labels are in another file
    path = assets / RANKING if assets.is_dir() else assets
    candidates = read_candidates(path, pipeline, False, on_asset, candidate)
    if not candidates:
        raise ValueError(
            f"{path.name}, line 1: expected at least one asset, got an empty list. Sample some first with"
            " eg3d-rlhf flow sample."
        )
    return Labelled(assets=candidates, goodness=read_goodness(labels or path, known_of(candidates)))


def known_of(candidates: Sequence[Candidate]) -> Known:
    """Return the names that labels may use for these assets: numbers in the list, or shown files."""
    # files are resolved, so that labels may name them relative to another folder
    return Known(
        conditions={asset.name: asset.condition for asset in candidates},
        files={asset.file.resolve(): asset.name for asset in candidates if asset.file is not None},
    )
