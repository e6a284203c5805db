"""The work of `eg3d-rlhf judge calibrate`: a judge is asked about labelled pairs and damaged copies."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from eg3d_rlhf.geometry.files.model import Model
from eg3d_rlhf.geometry.files.ply import Splats
from eg3d_rlhf.people.judge.calibration import (
    Calibration,
    GoldResult,
    Unit,
    alpha_of_people,
    calibrate,
)
from eg3d_rlhf.people.judge.client import Counts
from eg3d_rlhf.people.judge.gold_pairs import DEGREES, KINDS, damaged_model, damaged_splats
from eg3d_rlhf.people.judge.judge import Judge, JudgedPair
from eg3d_rlhf.people.judge.labelled_pairs import LabelledPairs
from eg3d_rlhf.people.judge.renders import RenderCache, StoredRenders
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import QUESTIONS, JudgeSettings, Question
from eg3d_rlhf.people.judge.verdicts import Verdict
from eg3d_rlhf.people.judge.view_maps import ViewMaps, model_maps, splat_maps
from eg3d_rlhf.people.label.assets.reading import asset_hash, read_asset
from eg3d_rlhf.preferences.asset_votes import FIRST, SECOND
from training.progress import tqdm

# Question about damaged copies. Its name is no criterion, so that labels may have the same question.
DAMAGE = Question(
    name="damage",
    text=QUESTIONS["3d_plausibility"].text,
    modes=QUESTIONS["3d_plausibility"].modes,
)
_INTACT = "intact"  # degree of an undamaged asset


def gold_pairs(
    cache: RenderCache, paths: Sequence[Path], up: str = "y"
) -> tuple[list[JudgedPair], list[str]]:
    """Render assets with their damaged copies, and pair the three degrees of every kind.

    Every second pair has the less damaged copy second.

    Args:
        cache: cache of the renders.
        paths: asset files: meshes or splats.
        up: axis of the files that points up.

    Returns: pairs whose key is "KIND: number, first or second is better"; and the kind of each pair.
    """
    pairs: list[JudgedPair] = []
    kinds: list[str] = []
    with tqdm(total=len(paths) * len(KINDS), desc="damaging", unit="kind") as progress_bar:
        for path in paths:
            asset = read_asset(path)
            digest = asset_hash(path)
            # The same renders as those of the labelled pairs, from the cache.
            intact = cache.views_of(path, up)
            for kind in KINDS:
                copies = [(_INTACT, intact)]
                for degree in DEGREES:
                    # the hash decides the positions of the damage, so that a copy of the file has the same
                    make_maps = functools.partial(
                        _damaged_maps, asset, kind, degree, int(digest[:8], 16), up, cache.rig
                    )
                    # Key of the cache: all that the copy depends on. Its positions follow from the digest.
                    content = {"asset": digest, "up": up, "damage": kind, "degree": degree}
                    copies.append((degree, cache.of_maps(content, make_maps)))
                # Three pairs: intact and mild, intact and severe, mild and severe.
                pairs += _ordered_pairs(kind, len(pairs), copies)
                kinds += [kind] * 3
                progress_bar.update()
    return pairs, kinds


def _damaged_maps(asset: Model | Splats, kind: str, degree: str, seed: int, up: str, rig: Rig) -> ViewMaps:
    """Render a damaged copy of an asset, see `gold_pairs.damaged_model`."""
    if isinstance(asset, Model):
        return model_maps(damaged_model(asset, kind, degree, seed, up), rig)
    return splat_maps(damaged_splats(asset, kind, degree, seed, up), rig, up)


def _ordered_pairs(
    kind: str, first_number: int, copies: Sequence[tuple[str, StoredRenders]]
) -> list[JudgedPair]:
    """Pair three copies, from the least damaged to the most damaged one."""
    pairs = []
    for number, (better, worse) in enumerate(((0, 1), (0, 2), (1, 2)), first_number):
        sides = (copies[better][1], copies[worse][1])
        # Alternating, so that a judge with one answer is right in at most half of the pairs.
        winner = FIRST if number % 2 == 0 else SECOND
        first, second = sides if winner == FIRST else sides[::-1]
        pairs.append(
            JudgedPair(
                key=f"{kind}: {number}, {winner} is better",
                first=first,
                second=second,
                # Damaged copies are asked about by one question, and never by those of the labels.
                criteria=(DAMAGE.name,),
            )
        )
    return pairs


def run_calibration(
    settings: JudgeSettings,
    labelled: LabelledPairs,
    cache: RenderCache,
    *,
    up: str = "y",
    damage_assets: Sequence[Path] = (),
    least_kappa: float,
    echo: Callable[[str], None],
) -> tuple[Calibration, Counts, list[Unit]]:
    """Ask a judge about labelled pairs and damaged copies, and compute its calibration.

    Args:
        settings: server, limits, and the questions of the labels' criteria.
        labelled: pairs with the votes of people, under the names of the questions.
        cache: cache of the renders.
        up: axis of asset files that points up.
        damage_assets: files of which damaged copies are made.
        least_kappa: value that the lower end of kappa's interval must exceed.
        echo: function that is called with each line for the user.

    Returns: the calibration, the counts of the run, and the pairs with votes and verdicts.

    Raises: see `Judge.compare` and `LabelledPairs.renders`.
    """
    # One pair is asked once, however many people voted on it.
    keys = labelled.pair_keys
    renders = labelled.renders(cache, up, keys)
    pairs = labelled.judged(keys, renders)
    damaged, kinds = gold_pairs(cache, damage_assets, up) if damage_assets else ([], [])
    # Without labels, the settings hold the question about damage alone.
    questions = tuple(question for question in settings.questions if question.name != DAMAGE.name)
    # The gate compares these hashes with those of the labels.
    identities = {question.name: settings.identity(question, cache.rig.to_json()) for question in questions}
    if damaged:
        # One run for both, so that they share limits, counts and the file of answers.
        settings = replace(settings, questions=(*questions, DAMAGE))
    # The bar counts verdicts, each of which takes two calls.
    call_count = sum(len(pair.criteria or ()) for pair in (*pairs, *damaged))
    with (
        Judge(settings, echo) as judge,
        tqdm(total=call_count, desc="judging", unit="verdict") as progress_bar,
    ):
        verdicts = judge.compare([*pairs, *damaged], lambda verdict: progress_bar.update() and None)
    # Gold pairs are no labels of people, so they are in no measure of agreement.
    label_verdicts = [verdict for verdict in verdicts if verdict.criterion != DAMAGE.name]
    damage_verdicts = [verdict for verdict in verdicts if verdict.criterion == DAMAGE.name]
    units = labelled.units(label_verdicts)
    calibration = calibrate(
        settings.model,
        identities,
        units,
        len(keys),
        _gold_results(damage_verdicts, kinds),
        least_kappa,
    )
    return calibration, judge.counts, units


def _gold_results(verdicts: Sequence[Verdict], kinds: Sequence[str]) -> list[GoldResult]:
    """Return whether the judge chose the less damaged copy of each pair that was asked.

    A tie and an unreadable answer are wrong.
    """
    return [
        GoldResult(kind, verdict.pair.endswith(f" {verdict.outcome} is better"))
        for kind, verdict in zip(kinds, verdicts, strict=True)
        # Pairs that a limit left out are no errors of the judge.
        if verdict.is_asked
    ]


def people_alpha_by_criterion(units: Sequence[Unit]) -> dict[str, float | None]:
    """Return Krippendorff's alpha of people by criterion, the ceiling of a judge's agreement with them."""
    criteria = dict.fromkeys(unit.criterion for unit in units)
    return {name: alpha_of_people([unit for unit in units if unit.criterion == name]) for name in criteria}
