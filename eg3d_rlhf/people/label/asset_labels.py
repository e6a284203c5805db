"""Judgements of assets as files that trainings read: pairs of files, rankings of a prompt's assets, scores of single ones. JSON lines.

    asset-pairs    {"condition", "prompt", "preferred", "rejected", "tie", ...}     flow/ranking.py, and whoever trains a reward of images
    rankings       {"condition", "rank", "asset", "strength", "judgements", ...}    trellis_files.py ranking, flow_files.py ranking
    asset-scores   {"mesh", "prompt", "score" or "label", ...}                      tools/train_mesh_reward.py --data

Paths are relative to the file where an asset lies below its folder, else absolute. An asset that a generator's tool drew (flow/ranking.py)
brings along where its latents are, as its list says.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from eg3d_rlhf.people.label.entities import Choice, JudgementRow, Mode, Shape
from eg3d_rlhf.people.label.preferences import LabelFilters, kept_judgements
from eg3d_rlhf.preferences.bradley_terry import Comparison, bradley_terry
from training.storage import write_atomic

if TYPE_CHECKING:
    from eg3d_rlhf.people.label.store import Store

DRAWN = "ranking.jsonl"  # a generator's tool lists there what it drew
PLACES = ("structure", "latent", "latents", "look_at", "asset")  # fields of its lines that are paths
Where = Callable[[Path | str], str]  # a path as it is written


def export_assets(store: "Store", path: Path, kind: str, from_pairs: bool = False, **filters) -> Path:
    """Write asset-pairs, rankings or asset-scores of a store; `filters` as of `LabelFilters`. Returns the path.

    Args: from_pairs: of campaigns of pairs, both assets of each pair that was answered with "both are bad", as not good.
    Raises: as `kept_judgements`; ValueError for a campaign of generators' shapes, or where nothing is left to write.
    """
    mode = Mode.SINGLE if kind == "asset-scores" and not from_pairs else Mode.LABEL
    rows = kept_judgements(store, LabelFilters(**filters), mode)
    if from_pairs:
        rows = [replace(row, left=shape) for row in rows if row.choice is Choice.BAD for shape in (row.left, row.right)]
    rows = [row for row in rows if row.left.file]
    if not rows:
        raise ValueError(f"--kind={kind}: expected judgements of assets, got none that passes the filters. Label some with --assets.")
    texts = {found.settings.name: found.settings.extra.get("conditions", {}) for found in store.campaigns()}

    def where(place: Path | str) -> str:
        place = Path(place).resolve()
        folder = path.parent.resolve()
        return str(place.relative_to(folder)) if place.is_relative_to(folder) else str(place)

    lines = rankings(rows, where) if kind == "rankings" else [KINDS[kind](row, prompt_of(row, texts), where) for row in rows]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return path


def prompt_of(row: JudgementRow, texts: Mapping[str, Mapping]) -> str:
    """The prompt's text; its name where it is a picture alone."""
    return texts.get(row.campaign, {}).get(row.left.condition, {}).get("text") or row.left.condition


def to_pair(row: JudgementRow, prompt: str, where: Where) -> dict:
    """A judgement of two assets."""
    winner, loser = (row.right, row.left) if row.choice is Choice.RIGHT else (row.left, row.right)
    known = {
        "condition": row.left.condition, "prompt": prompt, "preferred": where(winner.source), "rejected": where(loser.source),
        "tie": row.choice not in (Choice.LEFT, Choice.RIGHT), "preferred_generator": winner.generator,
        "rejected_generator": loser.generator,
    }  # fmt: skip
    return {**known, "choice": row.choice.value, **_provenance(row)}


def to_score(row: JudgementRow, prompt: str, where: Where) -> dict:
    """A judgement of one asset."""
    said: dict = {"score": float(row.choice.value)} if row.choice.value.isdigit() else {"label": int(bool(row.choice.good))}
    known = {"mesh": where(row.left.source), "prompt": prompt, **said, "generator": row.left.generator, "condition": row.left.condition}
    return {**known, **_provenance(row)}


KINDS = {"asset-pairs": to_pair, "asset-scores": to_score}


def _provenance(row: JudgementRow) -> dict:
    known = {"annotator": row.annotator, "time": row.received_at, "campaign": row.campaign, "judgement": row.id, "kind": row.kind.value}
    return {**known, **{name: value for name, value in (("votes", row.votes), ("comment", row.comment)) if value}}


def rankings(rows: Sequence[JudgementRow], where: Where = str) -> list[dict]:
    """A line per asset that was compared, best first within its prompt: ranks by Bradley-Terry strengths, equal ones for equal strengths.

    Of assets that no chain of comparisons links, those of the largest group alone are ranked: their strengths say nothing of each other.
    """
    by_condition: dict[str, list[JudgementRow]] = defaultdict(list)
    for row in rows:
        by_condition[row.left.condition].append(row)
    lines, drawn = [], _Drawn()
    for condition, judged in by_condition.items():
        assets = {shape.source: shape for row in judged for shape in (row.left, row.right)}
        comparisons = largest_group([
            Comparison(*((row.right.source, row.left.source) if row.choice is Choice.RIGHT else (row.left.source, row.right.source)),
                       tie=row.choice not in (Choice.LEFT, Choice.RIGHT))
            for row in judged
        ])  # fmt: skip
        found = bradley_terry(comparisons)
        strengths = dict(zip(map(str, found.items), found.strength.round(9).tolist(), strict=True))
        for source in sorted(strengths, key=lambda one: (-strengths[one], one)):
            known = {
                "condition": condition, "rank": 1 + sum(other > strengths[source] for other in strengths.values()),
                "generator": assets[source].generator, "strength": strengths[source],
                "judgements": sum(source in (one.winner, one.loser) for one in comparisons),
            }  # fmt: skip
            lines.append({**(drawn.of(assets[source], where) or {"asset": where(source)}), **known})
    return lines


def largest_group(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons within the largest group of items that a chain of comparisons links."""
    items = {item: i for i, item in enumerate(dict.fromkeys(item for c in comparisons for item in (c.winner, c.loser)))}
    ends = [items[c.winner] for c in comparisons], [items[c.loser] for c in comparisons]
    _, group = connected_components(coo_matrix((np.ones(len(comparisons)), ends), shape=(len(items), len(items))), directed=False)
    largest = np.bincount(group).argmax()
    return [c for c in comparisons if group[items[c.winner]] == largest]


class _Drawn:
    """What generators' tools noted beside the assets that they drew."""

    def __init__(self):
        self._lists: dict[Path, dict[str, dict]] = {}

    def of(self, shape: Shape, where: Where) -> dict:
        """The asset's line there, its paths as they are written, without a rank; empty where nothing is noted."""
        path = Path(shape.source)
        if path.parent not in self._lists:
            self._lists[path.parent] = {str(line.get("look_at")): line for line in _lines(path.parent / DRAWN)}
        line = self._lists[path.parent].get(path.name, {})
        return {
            name: where(path.parent / value) if name in PLACES and isinstance(value, str) else value
            for name, value in line.items() if name != "rank"
        }  # fmt: skip


def _lines(path: Path) -> Iterable[dict]:
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in lines if isinstance(line, dict)]
