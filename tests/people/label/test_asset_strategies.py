"""Strategies of pairs on finished assets: scores by mesh rewards, and tournaments over several campaigns."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.assets.collection import read_collection
from eg3d_rlhf.people.label.entities import Choice
from eg3d_rlhf.people.label.launch import mesh_ensemble
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.preferences.pair_strategies.by_scores import disagreement
from eg3d_rlhf.rewards.meshes.dataset import load_mesh
from eg3d_rlhf.rewards.meshes.model import RewardCS, load_mesh_reward
from eg3d_rlhf.rewards.meshes.patches import compute_mesh_patches
from eg3d_rlhf.rewards.meshes.settings import EncoderOptions, PatchOptions
from tests.people.label import asset_files as files
from tests.people.label.plans import answer_all
from tests.rejections import rejected

GENERATORS = ("alpha", "beta", "gamma", "delta")
PROMPTS = ("chair", "mug")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("assets")
    for number, generator in enumerate(GENERATORS):
        (root / generator).mkdir()
        for place, prompt in enumerate(PROMPTS):
            mesh = files.ply(60 + 20 * number, seed=4 * place + number)
            (root / generator / f"{prompt}.ply").write_bytes(mesh)
    return root


@pytest.fixture(scope="module")
def rewards(tmp_path_factory) -> list[Path]:
    paths = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            options = EncoderOptions(faces=8, width=16, depth=1, heads=2)
            reward = RewardCS(PatchOptions(patches=12 + 4 * seed, faces=8), options, PROMPTS, 12)
        paths.append(tmp_path_factory.mktemp("rewards") / f"reward-{seed}.safetensors")
        reward.save(paths[-1])
    return paths


@pytest.fixture
def label(folder, tmp_path, monkeypatch):
    """Plan a campaign by the command, in one database; returns the result."""
    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", lambda *args, **kwargs: None)
    known = (f"--db={url(tmp_path)}", f"--assets={folder}", "--set=gold=0", "--set=training=0")
    return lambda *flags: CliRunner().invoke(main, [*known, *map(str, flags)])


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'labels.db'}"


def pairs_of(folder: Path, campaign: int) -> list[tuple[str, frozenset]]:
    """(prompt, generators) of a campaign's pairs."""
    with Store.open(url(folder), create=False) as store:
        shapes = dict(store.shapes(campaign))
        pairs = [(shapes[a], shapes[b]) for a, b in store.pairs(campaign)]
    assert all(a.condition == b.condition for a, b in pairs)
    return [(a.condition, frozenset((a.generator, b.generator))) for a, b in pairs]


def test_scores_are_those_of_the_rewards(folder, rewards):
    collection = read_collection(folder)
    scored = mesh_ensemble("active", list(map(str, rewards)), collection).score(range(8))
    for row, path in zip(scored.scores, rewards, strict=True):
        reward = load_mesh_reward(path)
        for number, asset in enumerate(collection.assets):
            alone = reward.score(
                compute_mesh_patches([load_mesh(asset.path)], reward.patches), [asset.prompt]
            )
            assert row[number] == pytest.approx(float(alone), abs=1e-5)
    assert scored.embeddings.shape == (8, 32)


@pytest.mark.parametrize("strategy", ["active", "close"])
def test_pairs_by_scores(label, folder, rewards, strategy, tmp_path):
    result = label(f"--strategy={strategy}", "--pairs=4", *(f"--reward={path}" for path in rewards))
    assert result.exit_code == 0, result.output
    with Store.open(url(tmp_path), create=False) as store:
        plan = store.campaigns()[0].settings.extra["plan"]
    assert plan["candidates"] == 12 and len(plan["why"]) == len(set(pairs_of(tmp_path, 1))) == 4
    assert [reward["file"] for reward in plan["rewards"]] == [path.name for path in rewards]
    if strategy == "active":
        collection = read_collection(folder)
        scores = mesh_ensemble(strategy, list(map(str, rewards)), collection).score(range(8)).scores
        pairs = np.array([(a, b) for a in range(8) for b in range(a) if a % 2 == b % 2])
        assert plan["why"][0]["disagreement"] == pytest.approx(disagreement(scores, pairs).max(), abs=2e-5)


def test_a_tournament_goes_on_from_its_answers(label, tmp_path):
    assert label("--strategy=tournament", "--pairs=8", "--set=rounds=2").exit_code == 0
    first = pairs_of(tmp_path, 1)
    assert Counter(name for prompt, pair in first for name in (prompt, *pair)) == {
        **dict.fromkeys(GENERATORS, 4),
        **dict.fromkeys(PROMPTS, 4),
    }
    with Store.open(url(tmp_path), create=False) as store:

        def earlier(left, right):
            return Choice.LEFT if left.generator < right.generator else Choice.RIGHT

        answer_all(store, 1, store.annotator_without_token("local", "admin").id, earlier)
    later = ("--strategy=tournament", "--pairs=4", "--after=labels", "--campaign=second")
    assert label(*later).exit_code == 0
    second = pairs_of(tmp_path, 2)
    assert len(second) == 4 and not set(first) & set(second), "none meets the same one twice"
    rejected(label("--after=labels", "--campaign=x"), "--after", "--strategy=tournament", "random")
    rejected(label("--strategy=tournament", "--after=none", "--campaign=x"), "--after", "'none'")


def test_answers_on_other_assets_are_rejected(label, tmp_path):
    with Store.open(url(tmp_path), create=True) as store:
        assert label("--pairs=2", "--campaign=labels").exit_code == 0
        answer_all(store, 1, store.annotator_without_token("local", "admin").id)
    other = tmp_path / "other"
    for generator in ("alpha", "beta"):
        (other / generator).mkdir(parents=True)
        (other / generator / "chair.ply").write_bytes(files.ply(seed=len(generator)))
    flags = (f"--assets={other}", "--strategy=tournament", "--after=labels", "--campaign=x")
    rejected(label(*flags), "--after", "seed")


def test_scores_that_cannot_be_had_are_rejected(label, folder, rewards, tmp_path, tiny_reward):
    rejected(label("--strategy=active"), "--strategy=active", "mesh", "--reward=FILE", "2", "WORK")
    rejected(label("--strategy=active", f"--reward={rewards[0]}"), "--strategy=active", "2", "1")
    rejected(label("--strategy=close", f"--reward={tiny_reward}"), str(tiny_reward))
    rejected(label("--strategy=close", "--set=pool=3"), "--set pool=VALUE", "--assets")
    for generator in GENERATORS[:2]:
        (tmp_path / "splats" / generator).mkdir(parents=True)
        (tmp_path / "splats" / generator / "cat.ply").write_bytes(files.splats(seed=len(generator)))
    flags = (f"--assets={tmp_path / 'splats'}", "--strategy=close", f"--reward={rewards[0]}")
    rejected(label(*flags), "--strategy=close", "cat.ply", "splats", "--strategy=random")
