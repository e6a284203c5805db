"""Another pair strategy in one file: a plugin plans campaigns on seeds and on finished assets by its name;
tests/modes/test_flow_label.py has samples of a flow.
"""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.registry import VARIABLE
from eg3d_rlhf.modes.label import main
from eg3d_rlhf.people.label.store import Store
from tests.people.label import asset_files as files
from tests.rejections import rejected

PLUGIN = Path(__file__).parents[2] / "preferences" / "pair_strategies" / "neighbours.py"


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    """The plugin is named in the environment, and nowhere else."""
    monkeypatch.setenv(VARIABLE, str(PLUGIN))
    monkeypatch.setattr("eg3d_rlhf.people.label.server.app.serve", lambda *args, **kwargs: None)


def label(folder: Path, *flags) -> list:
    """Plan a campaign by the command; returns its pairs, without gold and training."""
    db = f"sqlite:///{folder / 'labels.db'}"
    result = CliRunner().invoke(main, [f"--db={db}", "--strategy=neighbours", *map(str, flags)])
    assert result.exit_code == 0, result.output
    with Store.open(db, create=False) as store:
        (campaign,) = store.campaigns()
        assert campaign.settings.extra["plan"]["strategy"] == "neighbours"
        shapes = dict(store.shapes(campaign.id))
        return [(shapes[a], shapes[b]) for a, b in store.pairs(campaign.id)]


def test_seeds(tmp_path):
    pairs = label(tmp_path, "--pairs=9", "--set=gold=0", "--set=training=0")
    games = Counter(shape.seed for shape in chain(*pairs))
    assert len(pairs) == 9 and sorted(games) == list(range(10_000, 10_010))
    assert sorted(games.values()) == [1, 1, *[2] * 8], "a chain"


def test_finished_assets(tmp_path):
    root = tmp_path / "assets"
    for number, generator in enumerate(("alpha", "beta", "gamma")):
        (root / generator).mkdir(parents=True)
        for prompt in ("chair", "mug"):
            (root / generator / f"{prompt}.ply").write_bytes(files.ply(seed=number))
    pairs = label(tmp_path, f"--assets={root}", "--set=gold=0", "--set=training=0")
    assert Counter(a.condition for a, _ in pairs) == {"chair": 2, "mug": 2}
    assert all(a.condition == b.condition and a.generator != b.generator for a, b in pairs)


def test_an_unknown_strategy_lists_it_too(tmp_path):
    flags = [f"--db=sqlite:///{tmp_path / 'new.db'}", "--strategy=best"]
    rejected(CliRunner().invoke(main, flags), "--strategy", "random", "neighbours", "'best'")
    result = CliRunner().invoke(main, [flags[0], "--strategy=neighbours", "--dry-run"])
    assert json.loads(result.stdout)["strategy"] == "neighbours"
