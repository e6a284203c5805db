"""Plans are those of version 0.1 (commit 52ebe99): the same pairs in the same order, with the same report.

`plans_of_52ebe99.json` holds a SHA-256 of every plan below, computed with that commit. A plan that differs
would make another campaign, other labels and another reward of the same seed.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eg3d_rlhf.core import bundled
from eg3d_rlhf.people.label.assets.collection import Asset, Collection, plan_assets
from eg3d_rlhf.people.label.pairing import PairingOptions, plan
from eg3d_rlhf.people.study.design import study_pairs
from eg3d_rlhf.preferences.labels import Preference
from eg3d_rlhf.preferences.pair_strategies import Ensemble, Scored
from tests.people.study.people import small_design

FILE = Path(__file__).parent / "plans_of_52ebe99.json"
GENERATOR = SimpleNamespace(hash="c" * 64, path=bundled.GENERATOR, generator=SimpleNamespace(level=10.0))


def digest(plan: object) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def planned(plan) -> str:
    return digest([[asdict(pair) for pair in plan.pairs], plan.report])


def scored(seeds) -> Scored:
    """Scores of two members and embeddings of seeds: sums of sines, as disordered as a reward's."""
    numbers = np.asarray(seeds, dtype=np.float64)
    scores = np.stack([3 * np.sin(0.7 * numbers), 3 * np.sin(0.7 * numbers) + np.sin(2.3 * numbers)])
    return Scored(scores, np.stack([np.sin(k * numbers) for k in (1.1, 1.7, 2.9)], axis=1))


def answered(plan) -> list[Preference]:
    """Simulated answers to a plan: an order of seeds without meaning, and some ties."""
    pairs = [(pair.first.seed, pair.second.seed) for pair in plan.pairs if pair.expected is None]
    return [
        Preference(
            winner=max(pair, key=lambda seed: seed * 7919 % 104_729),
            loser=min(pair, key=lambda seed: seed * 7919 % 104_729),
            tie=sum(pair) % 5 == 0,
            generator=GENERATOR.hash,
            psi=1.0,
        )
        for pair in pairs
    ]


def plans_of_seeds(seed: int) -> Iterator[tuple[str, str]]:
    for pairs in (5, 60, 201):
        yield f"random {pairs}", planned(plan(PairingOptions(pairs=pairs, seed=seed), GENERATOR))
        single = PairingOptions(pairs=pairs, seed=seed, single="thumbs", gold=7, training=2)
        yield f"single {pairs}", planned(plan(single, GENERATOR))
        for pool, doubtful, diversity in ((2.0, 1.0, 0.5), (2.25, 0.4, 0.0), (3.1, 1.0, 1.0)):
            active = PairingOptions(
                pairs=pairs,
                seed=seed,
                strategy="active",
                pool=pool,
                doubtful=doubtful,
                diversity=diversity,
                rewards=("a", "b"),
            )
            ensemble = Ensemble(scored, 2, [{"file": "a"}, {"file": "b"}])
            yield (
                f"active {pairs} {pool} {doubtful} {diversity}",
                planned(plan(active, GENERATOR, ensemble=ensemble)),
            )
    for pairs, rounds in ((40, 4), (37, 3), (10, 1)):
        options = PairingOptions(pairs=pairs, seed=seed, strategy="tournament", rounds=rounds, first_seed=77)
        first = plan(options, GENERATOR)
        yield f"tournament {pairs} {rounds}", planned(first)
        results = answered(first)
        for more in (1, 2):
            later = plan(replace(options, pairs=pairs // more), GENERATOR, results)
            yield f"tournament {pairs} {rounds} later {more}", planned(later)
            results += answered(later)


def collection(generators: int, prompts: int, seeds: int) -> Collection:
    """Assets of which nothing is read; some are films, some are the same file twice."""
    return Collection(
        [
            Asset(
                path=Path(f"/{g}/{p}-{s}.glb"),
                generator=f"g{g}",
                prompt=f"p{p * 37 % 101:03d}",
                seed=s,
                kind="film" if p % 4 == 3 else "glb",
                hash=f"{g}-{p}-{s}" if s % 3 else f"{p}",
            )
            for g in range(generators)
            for p in range(prompts)
            for s in range(seeds - (g + p) % 2)
        ]
    )


def plans_of_assets(seed: int) -> Iterator[tuple[str, str]]:
    for sizes in ((1, 6, 4), (2, 20, 3), (4, 9, 2)):
        for pairs in (3, 25, 400):
            options = PairingOptions(pairs=pairs, seed=seed)
            yield f"assets {sizes} {pairs}", planned(plan_assets(options, collection(*sizes)))
            single = replace(options, single="scores", gold=5)
            yield f"single assets {sizes} {pairs}", planned(plan_assets(single, collection(*sizes)))


def plans_of_studies(seed: int) -> Iterator[tuple[str, str]]:
    rows = tuple(
        {
            "prompt": f"p{i}",
            "seed": i,
            **{
                side: {"file": f"/{side}{i}", "hash": f"{side}{i}", "kind": "film" if i % 5 == 4 else "glb"}
                for side in "ab"
            },
        }
        for i in range(90)
    )
    for changes in (
        {"trials": 40},
        {"trials": 333, "gold_every": 7},
        {"trials": 41, "gold_every": 0},
        {"trials": 100, "annotators_per_pair": 1, "assets": rows, "shapes": len(rows), "gold_every": 4}
        | {"trials": 80},
    ):
        design = small_design(seed=seed, **changes)
        pairs = [asdict(pair) for pair in study_pairs(design)]
        yield f"study {len(changes)} {design.trials}", digest([pairs, design.hash])


def every_plan(seed: int) -> dict[str, str]:
    return {
        f"seed {seed}: {name}": value
        for kind in (plans_of_seeds, plans_of_assets, plans_of_studies)
        for name, value in kind(seed)
    }


@pytest.mark.parametrize("seed", [0, 1, 2, 1234])
def test_plans_are_those_of_version_0_1(seed):
    stored = json.loads(FILE.read_text())
    computed = every_plan(seed)
    assert len(computed) == 46 and {name: stored[name] for name in computed} == computed
