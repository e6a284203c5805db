"""Assets with labels that a stage is tuned by: a list of sampled assets with their latents, and labels of any
kind of them.

The list is what `eg3d-rlhf flow sample` wrote, or one of assets of your own (ranking.py); labels are a file
(preferences/goodness.py), and without one the list's own ranks. The toy draws its assets and has people of
its own.
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
    """A latent of one stage, and how good the asset is."""

    id: str  # unique within its set: it seeds the noise
    condition: str  # name; the pipeline knows its tokens
    stage: str
    latent: Latent
    r: float  # in 0..1; 1/2 teaches nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """Assets, and r of those that were judged."""

    assets: Sequence[Candidate]
    goodness: Mapping[str, float]  # by an asset's name

    @property
    def conditions(self) -> dict[str, str]:
        """Of every asset."""
        return {asset.name: asset.condition for asset in self.assets}

    @functools.cached_property
    def identity(self) -> str:
        """The hash of the labels by asset; latents are hashed where they are trained on."""
        return json_hash(
            {asset.name: [asset.condition, self.goodness.get(asset.name)] for asset in self.assets}
        )

    def said_by(self, labels: Path) -> "Labelled":
        """Return the same assets with the labels of a file. Raises: see `read_goodness`."""
        return replace(self, goodness=read_goodness(labels, known_of(self.assets)))

    def singles(
        self, stage: str, conditions: Collection[str] | None = None, use: str = "labels", seed: int = 0
    ) -> list[Single]:
        """Select a stage's latents of the judged assets that are not alone in their condition, with r as it
        is or as a control's.

        Args: conditions: to train on; None: all; use, seed: see `as_used`.
        Raises: ValueError where none is left, or the assets have no latents of the stage.
        """
        of = self.conditions
        kept = contrast(self.goodness, set(of.values()) if conditions is None else conditions, of)
        if not kept:
            got = f"none of {len(self.goodness)} there. Label several assets of each condition"
            raise ValueError(
                f"labels: expected two judged assets or more under a condition to train on, got {got}."
            )
        lacking = next((asset for asset in self.assets if stage not in asset.latents), None)
        if lacking is not None:
            there = ", ".join(lacking.latents) or "none"
            raise ValueError(
                f"labels: expected latents of stage {stage!r}, got those of {there}. Name one of these:"
                " --stage."
            )
        r = as_used(kept, of, use, seed)
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
    """Read the assets of a list, or of the folder that holds it, and the labels of a file; None: their own
    ranks in the list.

    Args: candidate: reads a line; on_asset: called after each.
    Raises: FileNotFoundError or ValueError naming the file, the line and a remedy.
    """
    path = assets / RANKING if assets.is_dir() else assets
    candidates = read_candidates(path, pipeline, False, on_asset, candidate)
    if not candidates:
        raise ValueError(
            f"{path.name}, line 1: expected at least one asset, got an empty list. Draw some first."
        )
    return Labelled(assets=candidates, goodness=read_goodness(labels or path, known_of(candidates)))


def known_of(candidates: Sequence[Candidate]) -> Known:
    """Return the names that labels may use for these assets: numbers in the list, or shown files."""
    return Known(
        conditions={asset.name: asset.condition for asset in candidates},
        files={asset.file.resolve(): asset.name for asset in candidates if asset.file is not None},
    )
