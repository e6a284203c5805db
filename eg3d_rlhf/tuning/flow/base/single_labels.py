"""Assets with one label each, on which a stage is tuned.

The assets are in a list that `eg3d-rlhf flow sample` has written, or that names assets of the user
(ranking.py). The labels are in a file (preferences/label_scores.py), or they are the ranks in the list. The
toy generates its assets, and simulated annotators label them.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eg3d_rlhf.experiments.store import json_hash
from eg3d_rlhf.models.sparse import Latent
from eg3d_rlhf.preferences.label_scores import (
    KnownAssets,
    contrast,
    goodness_for_use,
    read_counted_goodness,
)
from eg3d_rlhf.preferences.provenance import PEOPLE_ONLY, LabelChoice, LabelUse
from eg3d_rlhf.tuning.flow.base.ranking import (
    RANKING,
    Candidate,
    Candidates,
    read_candidates,
    sampled_candidate,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Single:
    """A latent of one stage, with the label of its asset."""

    id: str  # name that is unique within a set of examples; the noise in training is derived from it
    condition: str  # prompt
    stage: str  # name of the stage
    latent: Latent
    r: float  # label in 0..1, where larger is better; 1/2 has no effect on training


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """Assets, some or all of which have a label."""

    assets: Sequence[Candidate]
    goodness: Mapping[str, float]  # name of an asset -> label r in 0..1, where larger is better
    # numbers of labels of people and of judges; None: simulated labels of the toy
    use: LabelUse | None = None

    @property
    def prompt_of(self) -> dict[str, str]:
        """Prompts of the assets: name of an asset -> prompt."""
        return {asset.name: asset.condition for asset in self.assets}

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the prompts and labels of all assets. It does not contain the latents."""
        return json_hash(
            {asset.name: [asset.condition, self.goodness.get(asset.name)] for asset in self.assets}
        )

    def with_labels_of(self, labels_path: Path, choice: LabelChoice = PEOPLE_ONLY) -> "Labelled":
        """Return the same assets with the labels in the file `labels_path`.

        Args:
            labels_path: file of labels.
            choice: selection of the labels by their origin.
        Raises: FileNotFoundError or ValueError if the file cannot be read, see `read_counted_goodness`.
        """
        goodness, use = read_counted_goodness(labels_path, known_of(self.assets), choice)
        return replace(self, goodness=goodness, use=use)

    def singles(
        self, stage: str, prompts: Collection[str] | None = None, label_use: str = "labels", seed: int = 0
    ) -> list[Single]:
        """Return the training examples of a stage: the labelled assets whose prompt has at least two labels.

        Args:
            stage: name of the stage.
            prompts: prompts to train on; None for all prompts.
            label_use: "labels" for the labels as they are, or the name of a control, see `goodness_for_use`.
            seed: seed of the random numbers of a control.
        Raises: ValueError if there is no example, or if the assets have no latents of the stage.
        """
        prompt_by_asset = self.prompt_of
        used_prompts = set(prompt_by_asset.values()) if prompts is None else prompts
        # Labels are compared within a prompt, so the only label of a prompt has no effect and is left out.
        used_labels = contrast(self.goodness, used_prompts, prompt_by_asset)
        if not used_labels:
            raise ValueError(
                f"labels: none of the training prompts has two or more of the {len(self.goodness)} labels."
                " Label at least two assets of each prompt."
            )
        # Assets of an older list may have latents of some stages only.
        asset_without_stage = next((asset for asset in self.assets if stage not in asset.latents), None)
        if asset_without_stage is not None:
            available_stages = ", ".join(asset_without_stage.latents) or "no stage"
            raise ValueError(
                f"labels: the assets have latents of {available_stages}, but not of stage {stage!r}. Name a"
                " stage with latents by --stage."
            )
        used_label_by_asset = goodness_for_use(used_labels, prompt_by_asset, label_use, seed)
        return [
            Single(
                id=f"{asset.condition}/{asset.name}",
                condition=asset.condition,
                stage=stage,
                latent=asset.latents[stage],
                r=used_label_by_asset[asset.name],
            )
            for asset in self.assets
            if asset.name in used_label_by_asset
        ]


def read_labelled(
    assets_path: Path,
    labels_path: Path | None,
    pipeline: Any,
    make_candidate: Candidates = sampled_candidate,
    on_asset: Callable[[], None] | None = None,
    choice: LabelChoice = PEOPLE_ONLY,
) -> Labelled:
    """Read the assets of a list and their labels.

    Args:
        assets_path: path of the list, or of the folder that contains it.
        labels_path: path of a file with labels; None for the ranks in the list.
        pipeline: generator to which the latents belong.
        make_candidate: function that makes a candidate from a line of the list.
        on_asset: function that is called after each asset; None for no call.
        choice: selection of the labels by their origin.
    Raises: FileNotFoundError or ValueError if the list or the labels cannot be read. The message names the
    file and the line.
    """
    path = assets_path / RANKING if assets_path.is_dir() else assets_path
    # False: the lines need no ranks, because the labels may be in another file.
    candidates = read_candidates(path, pipeline, False, on_asset, make_candidate)
    if not candidates:
        raise ValueError(
            f"{path.name}, line 1: the list is empty, but at least one asset is needed. Sample assets with"
            " eg3d-rlhf flow sample."
        )
    goodness, use = read_counted_goodness(labels_path or path, known_of(candidates), choice)
    return Labelled(assets=candidates, goodness=goodness, use=use)


def known_of(candidates: Sequence[Candidate]) -> KnownAssets:
    """Return the identifiers by which labels can name assets: their numbers in the list, or their files."""
    # Paths are made absolute, because a file of labels may be in another folder than the assets.
    return KnownAssets(
        prompt_of={asset.name: asset.condition for asset in candidates},
        files={asset.file.resolve(): asset.name for asset in candidates if asset.file is not None},
    )
