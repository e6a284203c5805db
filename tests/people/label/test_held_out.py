"""Nothing that may be learnt from shows held-out seeds: new campaigns, tables and archives that are imported; studies may."""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.seeds import HELD_OUT
from eg3d_rlhf.people.label import commands
from eg3d_rlhf.people.label.archive import export_judgements, import_judgements, import_ranked_seeds
from eg3d_rlhf.people.label.entities import CampaignSettings, Mode
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.store import Store
from tests.people.label.plans import plan


@pytest.fixture
def store(tmp_path):
    with Store.open(f"sqlite:///{tmp_path / 'l.db'}") as opened:
        yield opened


@pytest.mark.parametrize("held", HELD_OUT, ids=lambda held: held.name)
def test_a_plan_that_would_reach_held_out_seeds_is_refused(held):
    with pytest.raises(ValueError, match=rf"--first-seed={held.first}, .* got {held.first} \({held.name}"):
        PairingOptions(pairs=2, gold=0, training=0, first_seed=held.first)


def test_the_command_says_so_in_one_line(tmp_path):
    result = CliRunner().invoke(commands.main, ["-n", f"--db=sqlite:///{tmp_path / 'l.db'}", "--pairs=5", "--first-seed=210000"])
    (line,) = result.output.splitlines()
    assert result.exit_code == 2
    assert line.startswith("Error: --first-seed=210000, 17 seeds: expected seeds that are not held out, got 210000")


def test_a_campaign_is_refused_and_a_study_is_not(store):
    with pytest.raises(ValueError, match=r"campaign c: expected seeds that are not held out, got 300030 \(watch"):
        store.create_campaign(CampaignSettings(name="c"), plan(3, start=300_030))
    assert store.campaigns() == []
    store.create_campaign(CampaignSettings(name="s", mode=Mode.STUDY), plan(3, start=300_030))


def test_an_imported_table_is_refused(store, tmp_path):
    (tmp_path / "table.csv").write_text(",rank1,rank2\n0,5,6\n1,7,200003\n")
    with pytest.raises(ValueError, match=r"campaign table: .* got 200003 \(latents"):
        import_ranked_seeds(store, tmp_path / "table.csv")
    assert store.campaigns() == []


def test_an_imported_archive_is_refused_and_nothing_of_it_kept(store, tmp_path):
    store.create_campaign(CampaignSettings(name="c"), plan(2))
    lines = export_judgements(store, tmp_path / "all.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[3]["seed"] = 220_001
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other:
        with pytest.raises(ValueError, match=r"all.jsonl, line 4: campaign c: .* got 220001 \(geometry"):
            import_judgements(other, tmp_path / "all.jsonl")
        assert other.campaigns() == []
