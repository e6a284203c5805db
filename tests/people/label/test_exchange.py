"""Labels and whole stores in and out: nothing lost, nothing invented, filters that do what they say."""

import csv
import json
import math
import time
from dataclasses import replace

import pytest
from click.testing import CliRunner

from eg3d_rlhf.core.seeds import HELD_OUT
from eg3d_rlhf.modes.label import main
from eg3d_rlhf.modes.reward_training import train as train_reward
from eg3d_rlhf.people.label.archive import (
    export_judgements,
    export_ranked_seeds,
    import_judgements,
    import_ranked_seeds,
)
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, Kind, Mode, PlannedPair
from eg3d_rlhf.people.label.pairing import PairingOptions
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import (
    LabelFilters,
    export_labels,
    label_source,
    read_preferences,
    store_preferences,
)
from eg3d_rlhf.preferences.labels import load_labels
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from eg3d_rlhf.rewards.training_run import read_labels
from tests.people.label.plans import HASH, QUIET, answer, answer_all, plan, shape
from tests.rejections import raising, rejected


def test_the_published_table_comes_in_within_two_seconds(store, published_labels, tmp_path):
    seconds = []
    for attempt in range(3):  # neighbours on the machine may take a turn
        with Store.open(f"sqlite:///{tmp_path / f'{attempt}.db'}") as other:
            began = time.perf_counter()
            assert import_ranked_seeds(other, published_labels) == 4346
            seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
    import_ranked_seeds(store, published_labels)
    campaign = store.campaign("ranked_seeds")
    assert (
        campaign.pairs == 4346
        and len({s.seed for _, s in store.shapes(campaign.id)}) == len(store.shapes(campaign.id)) == 8692
    )
    labels = store_preferences(store)
    assert [(p.winner, p.loser) for p in labels] == [
        (p.winner, p.loser) for p in load_labels(published_labels)
    ]
    assert {(p.generator, p.psi, p.annotator) for p in labels} == {(None, None, "imported")}
    export_ranked_seeds(store, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == published_labels.read_bytes()
    left = sum(p.extra["side"] == "left" for p in labels)
    assert abs(left - 2173) < 200  # sides are not in the table: drawn, not all on one


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (",rank1,rank2\n0,1,1\n", ("line 2", "seeds", "1")),
        (",rank1,rank2\n0,1\n", ("line 2", "3", "2")),
        ("winner,loser\n1,2\n", ("line 1", "rank1", "rank2", "'winner,loser'")),
        (",rank1,rank2\n", ("line 1", "label")),
        ("a,b\n", ("line 1", "winner", "loser", "['a', 'b']")),
    ],
)
def test_tables_that_do_not_fit_leave_no_files(store, tmp_path, text, names):
    (tmp_path / "bad.csv").write_text(text)
    with raising("bad.csv", *names):
        import_ranked_seeds(store, tmp_path / "bad.csv")
    assert store.campaigns() == [] and list(store.judgements()) == []


VOTES = {"ears": "right", "geometry": "tie"}


@pytest.fixture
def judged(store):
    """Two annotators, 4 pairs and 2 gold pairs each: ann is right on gold, bob is not and fast; a tie, a
    skip, an undo, an open pair.
    """
    clock = store.clock
    asked = ("geometry", "ears=Ears?")
    settings = CampaignSettings(
        name="heads", annotators_per_pair=2, gold_every=2, repeat_share=0, swap_share=0, questions=asked
    )
    campaign = store.create_campaign(settings, plan(5, gold=2))
    for name in ("ann", "bob"):
        store.add_annotator(name)
    for who in store.annotators():
        for k in range(6):
            clock.now += 60
            shown = store.assignments(campaign, who.id)[0]
            left, right = (dict(store.shapes(campaign))[asset] for asset in (shown.left, shown.right))
            better = Choice.LEFT if left.seed < right.seed else Choice.RIGHT
            worse = Choice.RIGHT if better is Choice.LEFT else Choice.LEFT
            choice = {0: Choice.TIE, 1: Choice.SKIP}.get(k, better if who.name == "ann" else worse)
            if left.seed >= 10:  # gold
                choice = better if who.name == "ann" else worse
            sent = answer(
                shown,
                f"k{k}",
                choice,
                milliseconds=900 if who.name == "bob" else 3000,
                views=("front", "left"),
                answered_at=5.0,
            )
            sent = replace(
                sent,
                votes={} if choice is Choice.SKIP else VOTES,
                comment="Ärmel «zu» lang, o/k?" if k == 3 else None,
            )
            store.submit(campaign, who.id, sent)
        store.undo(campaign, who.id, "u")
        store.submit(campaign, who.id, answer(shown, "k again", choice, milliseconds=5000, votes=VOTES))
    return store


def test_labels_say_what_was_judged(judged):
    rows = [row for row in judged.judgements() if row.kind is Kind.PAIR and row.choice is not Choice.SKIP]
    labels = store_preferences(judged)
    assert len(labels) == len(rows) and {row.kind for row in judged.judgements()} == {Kind.PAIR, Kind.GOLD}
    for label, row in zip(labels, rows, strict=True):
        assert (label.generator, label.psi, label.annotator, label.time) == (
            HASH,
            0.7,
            row.annotator,
            row.received_at,
        )
        assert label.tie == (row.choice is Choice.TIE) and {label.winner, label.loser} == {
            row.left.seed,
            row.right.seed,
        }
        assert label.tie or label.winner == (row.right if row.choice == Choice.RIGHT else row.left).seed
        assert label.extra["judgement"] == row.id and label.extra["milliseconds"] == row.milliseconds


FILTERS = {
    "annotator": ({"annotators": ("ann",)}, lambda r: r.annotator == "ann"),
    "fast": ({"min_milliseconds": 1000}, lambda r: r.milliseconds >= 1000),
    "gold": ({"least_gold_accuracy": 0.9}, lambda r: r.annotator == "ann"),
    "zero": ({"least_gold_accuracy": 0.0}, lambda r: True),
    "since": ({"since": 1_750_000_000 + 7 * 60}, lambda r: r.received_at >= 1_750_000_000 + 7 * 60),
    "since text": ({"since": "2025-06-15T15:13:40+00:00"}, lambda r: r.received_at >= 1_750_000_420),
    "campaign": ({"campaign": "heads"}, lambda r: True),
}


@pytest.mark.parametrize("case", FILTERS)
def test_filters(judged, case):
    chosen, keep = FILTERS[case]
    rows = [row for row in judged.judgements() if row.kind is Kind.PAIR and row.choice is not Choice.SKIP]
    expected = [row.id for row in rows if keep(row)]
    assert [p.extra["judgement"] for p in store_preferences(judged, LabelFilters(**chosen))] == expected
    assert 0 < len(expected) < len(rows) or case in ("zero", "campaign")


def test_filters_that_make_no_sense_are_rejected(judged, tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    for chosen, names in [
        ({"campaign": "x"}, ("campaign", "heads", "'x'")),
        ({"annotators": ("eve",)}, ("annotator", "ann", "bob", "eve")),
        ({"since": "soon"}, ("since", "'soon'")),
        ({"least_gold_accuracy": 2}, ("least_gold_accuracy", "0..1", "2")),
        ({"min_milliseconds": -1}, ("min_milliseconds", ">= 0", "-1")),
        ({"min_milliseconds": 10**9}, (url, "filters")),
    ]:
        with raising(*names):
            read_preferences(url, LabelFilters(**chosen))


@pytest.mark.parametrize(
    ("mode", "second", "named", "names"),
    [
        (Mode.STUDY, {"generator": "b" * 64}, "c", ("campaign c", "study")),
        (Mode.LABEL, {"psi": 1.0}, None, ("judgement 1", "campaign c", "seeds")),
    ],
)
def test_a_study_and_pairs_that_seeds_cannot_name_are_no_source_of_labels(store, mode, second, named, names):
    pairs = [PlannedPair(first=shape(0), second=shape(1 if mode is Mode.LABEL else 0, **second))]
    campaign = store.create_campaign(CampaignSettings(name="c", mode=mode, gold_every=0), pairs)
    answer_all(store, campaign, store.annotator_without_token("local", "admin").id)
    assert mode is Mode.LABEL or store_preferences(store) == []
    with raising(*names):
        store_preferences(store, LabelFilters(campaign=named))


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_exported_labels_read_back(judged, tmp_path, ending):
    path = export_labels(judged, tmp_path / f"labels.{ending}", campaign="heads")
    read = load_labels(path)
    expected = store_preferences(judged)
    for field in ("winner", "loser", "generator", "psi", "annotator", "time", "tie"):
        assert [getattr(p, field) for p in read] == [getattr(p, field) for p in expected]
    assert read[0].extra["views"].split() == ["front", "left"] and str(read[0].extra["level"]) == "10.0"
    if ending == "csv":
        with path.open(newline="") as file:
            assert {"campaign", "page_version", "side", "left_seed"} <= set(next(csv.reader(file)))


def test_a_store_moves_to_another_database_whole(judged, tmp_path, database_url):
    path = export_judgements(judged, tmp_path / "all.jsonl")
    target = f"sqlite:///{tmp_path / 'copy.db'}" if database_url.startswith("sqlite") else database_url
    with Store.open(target) as copy:
        assert import_judgements(copy, path) == 16 and import_judgements(copy, path) == 0
        assert export_judgements(copy, tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
        rows = list(judged.judgements(include_undone=True))
        moved = list(copy.judgements(include_undone=True))
        assert all((r.votes == VOTES) == (r.choice is not Choice.SKIP) for r in moved)
        assert [r.comment for r in moved if r.comment] == 2 * ["Ärmel «zu» lang, o/k?"]
        assert [r.__dict__ | {"id": 0, "pair": 0} for r in moved] == [
            r.__dict__ | {"id": 0, "pair": 0} for r in rows
        ]
        assert copy.campaign("heads").settings == judged.campaign("heads").settings
        assert copy.annotators()[0].name == "ann" and all(
            token not in path.read_text() for token in ("token_hash", "expires")
        )
        campaign = copy.campaign("heads").id
        ann = copy.annotators()[0].id
        before = judged.progress(judged.campaign("heads").id, judged.annotators()[0].id)
        assert (copy.progress(campaign, ann).done, copy.progress(campaign, ann).total) == (
            before.done,
            before.total,
        )
        work = copy.assignments(campaign, ann)  # continues at the same place
        there = judged.assignments(1, 1)
        # the same decision on the same past
        assert [(a.left, a.right) for a in work] == [(a.left, a.right) for a in there]
        # those that were open; the third is new
        assert [a.token for a in work[:2]] == [a.token for a in there[:2]]
        copy.submit(campaign, ann, answer(work[0], "later", votes=VOTES))
        assert import_judgements(copy, path) == 0


def test_new_judgements_of_a_known_campaign_are_added(judged, tmp_path):
    first = export_judgements(judged, tmp_path / "first.jsonl", "heads")
    who = judged.annotators()[0].id
    judged.submit(1, who, answer(judged.assignments(1, who)[0], "more", votes=VOTES))
    judged.undo(1, who, "undo more")
    second = export_judgements(judged, tmp_path / "second.jsonl", "heads")
    with Store.open(f"sqlite:///{tmp_path / 'copy.db'}") as copy:
        assert import_judgements(copy, first) == 16 and import_judgements(copy, second) == 2
        assert export_judgements(copy, tmp_path / "again.jsonl").read_bytes() == second.read_bytes()


BAD_LINES = {
    "no json": ("{", (r"'{\n'",)),
    "no record": ("{}", (r"'{}\n'",)),
    "unknown": ('{"record": "table"}', ("record", "'table'")),
    "orphan": ('{"record": "shape", "campaign": "x", "asset": "a"}', ("campaign", "'x'")),
    "text seed": (
        (
            '{"record": "shape", "campaign": "heads", "asset": "z", "position": 9, "generator": "", "source":'
            ' "", "seed": "1"}'
        ),
        ("seed", "int", "'1'"),
    ),
    "no name": ('{"record": "annotator", "role": "admin"}', ("name", "str", "None")),
    "script": (
        '{"record": "annotator", "name": "<script>", "role": "admin"}',
        ("annotator", "'<script>'", "'admin'"),
    ),
    "other campaign": (
        '{"record": "campaign", "name": "heads", "settings": {"name": "heads", "mode": "study"}}',
        ("campaign", "'heads'"),
    ),
    "settings": (
        '{"record": "campaign", "name": "new", "settings": {"colour": 1}}',
        ("settings", "campaign 'new'"),
    ),
    "votes": ("", ("votes", "left", "right", "tie", '{"geometry": "up"}')),
    "no key": (
        '{"record": "judgement", "campaign": "heads", "annotator": "ann", "type": "choice"}',
        ("'key'", "judgement"),
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_damaged_exports_leave_no_rows(judged, tmp_path, case):
    line, names = BAD_LINES[case]
    path = export_judgements(judged, tmp_path / "all.jsonl")
    if case == "votes":
        line = next(
            line for line in path.read_text().splitlines() if "geometry" in line and '"judgement"' in line
        )
        line = json.dumps(json.loads(line) | {"key": "other", "votes": '{"geometry": "up"}'})
    with path.open("a") as file:
        file.write(line + "\n")
    with Store.open(f"sqlite:///{tmp_path / 'copy.db'}") as copy:
        with raising(f"all.jsonl, line {len(path.read_text().splitlines())}", *names):
            import_judgements(copy, path)
        assert copy.campaigns() == []


def test_what_is_no_export_is_rejected(store, tmp_path):
    (tmp_path / "old.jsonl").write_text('{"record": "format", "version": 99}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for name, error, names in (
        ("old", ValueError, ("line 1", "format 1", "99")),
        ("empty", ValueError, ()),
        ("none", FileNotFoundError, (str(tmp_path),)),
    ):
        with raising(f"{name}.jsonl", *names, kind=error):
            import_judgements(store, tmp_path / f"{name}.jsonl")
    with raising("campaign", "'x'"):
        export_judgements(store, tmp_path / "x.jsonl", "x")


# --- nothing that may be learnt from shows held-out seeds: new campaigns, tables and archives that are
# imported; studies may


@pytest.mark.parametrize("held", HELD_OUT, ids=lambda held: held.name)
def test_a_plan_that_would_reach_held_out_seeds_is_rejected(held, tmp_path):
    with raising(f"--first-seed={held.first}", f"seed {held.first} ", held.name):
        PairingOptions(pairs=2, gold=0, training=0, first_seed=held.first)
    result = CliRunner().invoke(
        main,
        ["-n", f"--db=sqlite:///{tmp_path / 'l.db'}", "--pairs=5", f"--first-seed={held.first}"],
    )
    rejected(result, f"--first-seed={held.first}", f"seed {held.first} ", held.name)


def test_campaigns_tables_and_archives_are_rejected_whole_and_a_study_is_not(store, tmp_path):
    with raising("campaign c", "300030", "monitor"):
        store.create_campaign(CampaignSettings(name="c"), plan(3, start=300_030))
    (tmp_path / "table.csv").write_text(",rank1,rank2\n0,5,6\n1,7,200003\n")
    with raising("campaign", "table", "200003", "latents"):
        import_ranked_seeds(store, tmp_path / "table.csv")
    assert store.campaigns() == []
    store.create_campaign(CampaignSettings(name="s", mode=Mode.STUDY), plan(3, start=300_030))
    store.create_campaign(CampaignSettings(name="c"), plan(2))
    records = [
        json.loads(line)
        for line in export_judgements(store, tmp_path / "all.jsonl", "c").read_text().splitlines()
    ]
    records[3]["seed"] = 220_001
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as other:
        with raising("all.jsonl, line 4", "campaign c", "220001", "geometry"):
            import_judgements(other, tmp_path / "all.jsonl")
        assert other.campaigns() == []


# --- tools/train_reward.py --labels=sqlite:///labels.db


def run(*flags):
    return CliRunner().invoke(train_reward, [str(flag) for flag in flags])


def test_filters_reach_the_run_and_are_written_down(tmp_path):
    rare = (
        "annotators=ann",
        "annotators=bob",
        "least_gold_accuracy=0.8",
        "drop_repeats=true",
        "min_milliseconds=500",
        "since=2025-01-01",
    )
    result = run(
        "--dry-run",
        "--labels=sqlite:///labels.db",
        "--campaign=heads",
        *(f"--set={setting}" for setting in rare),
    )
    settings = json.loads(result.stdout)
    assert settings["labels"] == "sqlite:///labels.db"
    assert LabelFilters(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in settings["filters"].items()}
    ) == LabelFilters(
        campaign="heads",
        annotators=("ann", "bob"),
        least_gold_accuracy=0.8,
        drop_repeats=True,
        min_milliseconds=500,
        since="2025-01-01",
    )
    assert "secret" not in run("--dry-run", "--labels=postgresql://ann:secret@host/labels").stdout


@pytest.mark.parametrize(
    "flag",
    [
        "--campaign=x",
        *(
            f"--set={setting}"
            for setting in (
                "annotators=x",
                "drop_repeats=true",
                "since=2025-01-01",
                "min_milliseconds=5",
                "least_gold_accuracy=0",
            )
        ),
    ],
)
def test_filters_of_a_file_and_a_missing_store_are_rejected(flag, tmp_path):
    result = run("--dry-run", f"--labels={BUNDLED_LABELS}", flag)
    name = flag.split("=")[-2].removeprefix("--")
    rejected(result, name, "labels.jsonl", "--labels=sqlite:///")
    result = run(f"--labels=sqlite:///{tmp_path / 'none.db'}", f"--run-dir={tmp_path / 'run'}")
    rejected(result, f"{tmp_path / 'none.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_reward_is_trained_from_a_store(store, tiny_networks, tmp_path):
    from eg3d_rlhf.generators import load_generator

    drawn = {"generator": load_generator(tiny_networks).hash}
    pairs = [PlannedPair(first=shape(2 * i, **drawn), second=shape(2 * i + 1, **drawn)) for i in range(20)]
    campaign = store.create_campaign(CampaignSettings(name="c", **QUIET), pairs)
    who = store.annotator_without_token("local", "admin").id
    answer_all(store, campaign, who)
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    out = tmp_path / "run"
    flags = (
        "--preset=tiny",
        "--epochs=1",
        "--resolution=24",
        "--reference-samples=0",
        f"--network={tiny_networks}",
        f"--run-dir={out}",
    )
    result = run(f"--labels={url}", "--campaign=c", *flags)
    assert result.exit_code == 0, result.output
    assert json.loads((out / "report.json").read_text())["labels_file"] == url
    assert load_labels(out / "labels.jsonl") == store_preferences(store)
    store.undo(campaign, who, "u")  # the store changes; the resumed run uses its own copy
    assert len(read_labels(label_source(url), resumed_folder=out)) == 20
    assert len(read_labels(label_source(url))) == 19
    assert math.isfinite(json.loads((out / "report.json").read_text())["temperature"])
