"""Labels of a judge never count as labels of people: every reader of labels, on a store with both."""

import ast
import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy.exc import IntegrityError

from eg3d_rlhf.modes.flow_tune import tune_command
from eg3d_rlhf.modes.label import main as label
from eg3d_rlhf.modes.label_files import elo
from eg3d_rlhf.modes.reward_linear import linear
from eg3d_rlhf.modes.reward_training import train as train_reward
from eg3d_rlhf.modes.steer import main as steer
from eg3d_rlhf.modes.study import main as study_command
from eg3d_rlhf.people.judge.calibration import Calibration, CriterionCalibration
from eg3d_rlhf.people.judge.gate import training_gate
from eg3d_rlhf.people.label.archive import export_judgements, import_judgements
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, Kind, PlannedPair
from eg3d_rlhf.people.label.judge_answers import judge_annotator, judge_name, open_pairs, record_answer
from eg3d_rlhf.people.label.quality import agreement, quality_report
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.label.store_labels import LabelFilters, label_source, store_preferences
from eg3d_rlhf.people.study.design import write_design
from eg3d_rlhf.preferences.labels import load_labels
from eg3d_rlhf.preferences.provenance import ALL, JUDGES, PEOPLE, LabelChoice, origin_of, select_labels
from eg3d_rlhf.preferences.unpaired import load_unpaired
from eg3d_rlhf.rewards.stated_accuracy import announce_file
from tests.people.judge.provenance_stores import JUDGE_HASH, MODEL, answer_as_judge
from tests.people.label.conftest import database_url, postgres_server, postgres_url
from tests.people.label.plans import QUIET, answer_all, shape
from tests.people.study.people import Person, create, small_design
from tests.rejections import raising, rejected
from tests.tuning.flow.workspace.test_work_folder import answered, drawn, work
from tests.tuning.flow.workspace.test_work_folder import shape as asset_shape

__all__ = ["database_url", "postgres_server", "postgres_url", "work"]
PACKAGE = Path(__file__).resolve().parents[3] / "eg3d_rlhf"
PAIRS = 30


def both(url: str, generator: str = "a1" * 32, **settings) -> int:
    """People answer left on 30 pairs, and a judge prefers the second shape on 30 pairs."""
    with Store.open(url) as store:
        pairs = [
            PlannedPair(first=shape(2 * i, generator=generator), second=shape(2 * i + 1, generator=generator))
            for i in range(PAIRS)
        ]
        campaign = store.create_campaign(CampaignSettings(name="c", **QUIET, **settings), pairs)
        assert answer_as_judge(store, campaign, "second") == PAIRS
        # a judge uses no slots: people are asked every pair
        assert len(answer_all(store, campaign, store.annotator_without_token("ann").id)) == PAIRS
        return campaign


def calibration(path: Path, identity: str = JUDGE_HASH, criterion="geometry_details", **values) -> Path:
    measured = CriterionCalibration(
        **{
            "n": 60,
            "accuracy": 0.8,
            "kappa": 0.6,
            "kappa_interval": (0.4, 0.75),
            "first_share": 0.5,
            "order_flips": 0.1,
            "ties": 0.1,
            "unreadable": 0,
            **values,
        }
    )
    Calibration(
        model=MODEL, identities={criterion: identity}, pairs=60, criteria={criterion: measured}, gate="passed"
    ).write(path)
    return path


def run(command, *args):
    return CliRunner().invoke(command, [str(arg) for arg in args])


def test_a_judges_answers_are_stored_once_and_yield_no_answers_of_people(database_url):
    campaign = both(database_url)
    with Store.open(database_url) as store:
        counts = {
            origin: len(list(store.judgements("c", labels_from=origin))) for origin in (PEOPLE, JUDGES, ALL)
        }
        assert counts == {PEOPLE: PAIRS, JUDGES: PAIRS, ALL: 2 * PAIRS}
        assert len(list(store.judgements("c"))) == store.answer_count("c") == PAIRS
        (judge,) = [row for row in store.tally() if row.role == "judge"]
        assert (judge.name, judge.judgements) == (judge_name(MODEL), PAIRS)
        row = next(store.judgements("c", labels_from=JUDGES))
        assert row.provenance == {
            "provenance": f"model: {MODEL}",
            "calibration": "c" * 64,
            "judge": JUDGE_HASH,
            "answer": "a" * 64,
            "criterion": "geometry_details",
        }
        # resumable: nothing is open, and the database rejects a second answer to a pair
        who = judge_annotator(store, MODEL).id
        assert open_pairs(store, campaign, who) == []
        pair = next(iter(store.plan(campaign).pairs.values()))
        from tests.people.judge.provenance_stores import JudgeAnswer, origin

        with pytest.raises(IntegrityError):
            record_answer(
                store, campaign, who, pair, JudgeAnswer(verdict="tie", origin=origin({"": "overall"}))
            )
        with raising("annotator"):
            store.new_token(judge_name(MODEL))


def test_stores_of_earlier_versions_are_read_as_labels_of_people(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with Store.open(url) as store:
        pairs = [PlannedPair(first=shape(1), second=shape(2))]
        campaign = store.create_campaign(CampaignSettings(name="c", **QUIET), pairs)
        answer_all(store, campaign, store.annotator_without_token("ann").id)
        with store.database.write() as connection:
            connection.exec_driver_sql("ALTER TABLE judgements DROP COLUMN judge")
            connection.exec_driver_sql("UPDATE schema_versions SET version = 3")
    with Store.open(url, create=False) as store:
        assert [label.annotator for label in store_preferences(store)] == ["ann"]
        assert answer_as_judge(store, campaign) == 1
        assert len(store_preferences(store)) == 1


def test_an_archive_keeps_both_apart(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    both(url)
    with Store.open(url) as store:
        path = export_judgements(store, tmp_path / "all.jsonl")
        before = list(store.judgements("c", labels_from=ALL))
    with Store.open(f"sqlite:///{tmp_path / 'other.db'}") as store:
        assert import_judgements(store, path) == 2 * PAIRS
        after = list(store.judgements("c", labels_from=ALL))
        assert [row.judge for row in after] == [row.judge for row in before]
        assert [row.annotator for row in after] == [row.annotator for row in before]
        # people are still asked as many pairs as the plan has slots
        assert len(list(store.judgements("c"))) == PAIRS


def test_label_sources_select_and_count(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    both(url)
    labels, use = label_source(url).read_counted()
    assert {label.annotator for label in labels} == {"ann"} and len(labels) == PAIRS
    assert (use.used[PEOPLE], use.used[JUDGES], use.judges) == (PAIRS, 0, PAIRS)
    labels, use = label_source(url, choice=LabelChoice(labels_from=JUDGES)).read_counted()
    assert {label.annotator for label in labels} == {judge_name(MODEL)}
    assert all(label.winner == label.loser + 1 for label in labels)  # the judge prefers the second
    labels, use = label_source(url, choice=LabelChoice(labels_from=ALL)).read_counted()
    assert len(labels) == 2 * PAIRS and use.used == {PEOPLE: PAIRS, JUDGES: PAIRS, "unknown": 0}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_exported_files_state_the_origin_and_are_read_as_peoples_by_default(tmp_path, suffix):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    both(url)
    path = tmp_path / f"labels.{suffix}"
    done = run(label, "export", path, f"--db={url}")
    assert done.exit_code == 0 and len(load_labels(path)) == PAIRS
    done = run(label, "export", path, f"--db={url}", "--labels-from=all")
    assert done.exit_code == 0, done.output
    assert len(load_labels(path)) == PAIRS
    assert {label.annotator for label in load_labels(path)} == {"ann"}
    assert len(load_labels(path, LabelChoice(labels_from=ALL))) == 2 * PAIRS
    judged = load_labels(path, LabelChoice(labels_from=JUDGES))
    assert {origin_of(label.extra) for label in judged} == {JUDGES}
    done = run(label, "export", path, f"--db={url}", "--labels-from=judges")
    with raising(path.name, "--labels-from"):
        load_labels(path)
    # labels of single shapes are made from pairs, and follow the same rule
    assert len(load_unpaired(path, LabelChoice(labels_from=JUDGES))) > 0
    with raising(path.name, "--labels-from"):
        load_unpaired(path)


def test_an_unknown_origin_is_used_only_with_all():
    records = [{}, {"provenance": "people"}, {"provenance": "model: m"}, {"provenance": "unknown"}]
    used = {origin: select_labels(records, dict, origin)[0] for origin in (PEOPLE, JUDGES, ALL)}
    assert used == {PEOPLE: records[:2], JUDGES: records[2:3], ALL: records}
    with raising("provenance"):
        select_labels([{"provenance": "robot"}], dict)


def test_the_gate_needs_a_calibration_of_the_same_judge_and_criterion(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    both(url)

    def read(*paths: Path, uncalibrated: bool = False):
        gate = training_gate([str(path) for path in paths], uncalibrated)
        choice = LabelChoice(labels_from=JUDGES, gate=gate, uncalibrated=uncalibrated)
        return label_source(url, choice=choice).read_counted()

    with raising("--calibration", "--uncalibrated"):
        read()
    assert len(read(calibration(tmp_path / "good.json"))[0]) == PAIRS
    assert read(uncalibrated=True)[1].to_dict()["uncalibrated"] is True
    bad = {
        "other judge": calibration(tmp_path / "a.json", identity="8" * 64),
        "few pairs": calibration(tmp_path / "b.json", n=49),
        "low kappa": calibration(tmp_path / "c.json", kappa_interval=(0.2, 0.7)),
        "undefined": calibration(tmp_path / "d.json", kappa=None, kappa_interval=None),
    }
    for path in bad.values():
        with raising("--calibration", MODEL):
            read(path)
    # labels of people pass without any
    assert len(label_source(url, choice=LabelChoice(gate=training_gate([], False))).read()) == PAIRS


def test_reward_train_steer_and_linear_use_peoples_labels_and_say_so(tiny_networks, tmp_path, capsys):
    from eg3d_rlhf.generators import load_generator

    url = f"sqlite:///{tmp_path / 'labels.db'}"
    both(url, load_generator(tiny_networks).hash)
    flags = ["--preset=tiny", "--epochs=1", "--resolution=24", "--reference-samples=0"]
    common = [f"--labels={url}", f"--network={tiny_networks}"]
    for command, more in (
        (train_reward, flags),
        (steer, [f"--out={tmp_path / 's.safetensors'}"]),
        (linear, [f"--out={tmp_path / 'l.safetensors'}"]),
    ):
        for origin in (JUDGES, ALL):
            done = run(command, *common, *more, f"--labels-from={origin}")
            rejected(done, "--calibration", "--uncalibrated")
        rejected(run(command, *common, *more, "--uncalibrated"), "--uncalibrated")
    done = run(train_reward, *common, *flags, f"--run-dir={tmp_path / 'people'}")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "people/report.json").read_text())
    assert report["label_use"]["used"] == {PEOPLE: PAIRS, JUDGES: 0, "unknown": 0}
    assert report["label_use"]["left_out"][JUDGES] == PAIRS
    assert "label_use" not in json.loads((tmp_path / "people/reward.json").read_text())["provenance"]
    done = run(
        train_reward,
        *common,
        *flags,
        f"--run-dir={tmp_path / 'all'}",
        "--labels-from=all",
        "--uncalibrated",
    )
    assert done.exit_code == 0, done.output
    use = json.loads((tmp_path / "all/reward.json").read_text())["provenance"]["label_use"]
    assert use["used"][JUDGES] == PAIRS and use["uncalibrated"] is True and use["judges"] == {MODEL: PAIRS}
    assert len(load_labels(tmp_path / "all/labels.jsonl", LabelChoice(labels_from=ALL))) == 2 * PAIRS
    announce_file(tmp_path / "all/reward.safetensors", "--reward-ckpt")
    assert MODEL in capsys.readouterr().err  # whoever uses the reward reads that it is uncalibrated
    announce_file(tmp_path / "people/reward.safetensors", "--reward-ckpt")
    assert MODEL not in capsys.readouterr().err


def test_flow_tune_learns_from_people_unless_it_is_told_otherwise(work, tmp_path):
    lines = drawn(work)
    pairs = [
        (asset_shape(work, a), asset_shape(work, b)) for a, b in zip(lines[::2], lines[1::2], strict=True)
    ]
    answered(work, pairs, lambda left, right: Choice.LEFT)
    with Store.open(work.database) as store:
        count = answer_as_judge(store, store.campaign(work.campaign).id, "second")
    assert count == len(pairs)
    people = work.labels()
    assert {answer.annotator for answer in people.answers} == {"ann"}
    assert people.use.judges == count and people.use.used[JUDGES] == 0
    gate = training_gate([str(calibration(tmp_path / "good.json"))], False)
    judges = work.labels(choice=LabelChoice(labels_from=JUDGES, gate=gate))
    assert {answer.annotator for answer in judges.answers} == {judge_name(MODEL)}
    assert len(work.labels(choice=LabelChoice(labels_from=ALL)).answers) == len(people.answers) + count
    done = run(tune_command, work.folder, "--labels-from=judges", "--pairs-only")
    rejected(done, "--calibration", "--uncalibrated")


def test_quality_agreement_and_leaderboards_leave_judges_out(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    both(url)
    with Store.open(url) as store:
        people = list(store.judgements("c"))
        rows = list(store.judgements("c", labels_from=ALL, include_undone=True))
    report = quality_report(rows)
    use = report.pop("label_use")
    alone = quality_report(people)
    alone.pop("label_use")
    assert report == alone and [row["name"] for row in report["annotators"]] == ["ann"]
    assert use["used"][PEOPLE] == PAIRS and use["left_out"][JUDGES] == PAIRS
    # two annotators would have an agreement: a judge is none
    assert agreement(people)["alpha_n"] == 0 and report["agreement"]["alpha_n"] == 0
    done = run(label, "status", f"--db={url}", "--json")
    (campaign,) = json.loads(done.output)["campaigns"]
    assert campaign["judgements"] == PAIRS and campaign["annotators"] == {"ann": PAIRS}
    assert campaign["judges"] == {judge_name(MODEL): PAIRS} and json.loads(done.output)["annotators"] == 1
    board = json.loads(run(label, "leaderboard", f"--db={url}", "--json").output)
    assert board["label_use"]["used"] == {PEOPLE: PAIRS, JUDGES: 0, "unknown": 0}


def test_elo_uses_one_origin(tmp_path):
    path = tmp_path / "judgements.jsonl"
    lines = [{"a": "x", "b": "y", "winner": "a", "prompt": f"p{i}"} for i in range(6)]
    lines += [{**line, "winner": "b", "provenance": f"model: {MODEL}"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def best(*flags: str) -> str:
        out = tmp_path / "elo.json"
        done = run(elo, path, f"--out={out}", *flags)
        assert done.exit_code == 0, done.output
        ratings = json.loads(out.read_text())["overall"]["ratings"]
        assert {row["judgements"] for row in ratings.values()} == {12 if "--labels-from=all" in flags else 6}
        return max(ratings, key=lambda name: ratings[name]["elo"])

    assert best() == "x" and best("--labels-from=judges") == "y" and best("--labels-from=all")


def test_a_study_reports_people_and_judges_apart(tmp_path):
    design = small_design(name="study", trials=40, annotators=2)
    folder = tmp_path / "study"
    folder.mkdir()
    write_design(folder / "design.json", design)
    url = f"sqlite:///{folder / 'study.db'}"
    with Store.open(url) as store:
        campaign = create(store, design)
        assert answer_as_judge(store, campaign, "first", same_judge=True) > 10
        people = [Person(f"n{i}", preference=1.0) for i in range(2)]
        # a judge that has answered does not end the study for people
        while sum(person.answer(store, campaign, design, limit=5) for person in people):
            pass
    report = functools.partial(run, study_command, f"--outdir={folder}", "report", "--images=0")
    done = report()
    assert done.exit_code == 0, done.output
    alone = json.loads((folder / "report.json").read_text())
    assert alone["result"]["win_rate"] == 1.0 and alone["panels"] == []
    assert alone["label_use"]["left_out"][JUDGES] > 10
    done = report("--labels-from=all")
    assert done.exit_code == 0, done.output
    whole = json.loads((folder / "report.json").read_text())
    assert whole["result"] == alone["result"]
    (panel,) = whole["panels"]
    assert panel["result"]["win_rate"] == 0.0 and panel["model"] == MODEL and panel["same_judge"] is True
    assert panel["calibrated"] is False and panel["people"]["same"] == 0.0
    assert "SAME JUDGE" in (folder / "report.html").read_text()
    done = report("--labels-from=judges")
    assert done.exit_code == 0 and json.loads((folder / "report.json").read_text())["result"]["n"] == 0


# Functions that read labels. Each selects the labels of people unless its caller selects others.
READERS = {
    "load_labels",
    "read_labels",
    "load_unpaired",
    "read_unpaired",
    "read_judgements",
    "read_counted_judgements",
    "read_goodness",
    "read_counted_goodness",
    "read_label_lines",
    "read_counted_label_lines",
    "kept_judgements",
    "store_preferences",
    "read_preferences",
    "label_source",
    "judgements",
}
# Files that call one of them with another selection, and so must handle labels of judges themselves.
SELECTING = {
    "modes/label.py",
    "modes/study.py",
    "modes/flow_study.py",
    "modes/reward_training.py",
    "modes/reward_linear.py",
    "modes/steer.py",
    "modes/label_files.py",
    "people/label/launch.py",
    "people/label/server/routes.py",
    "people/label/store_labels.py",
    "people/label/store.py",
    "people/label/judgements.py",
    "people/study/planning.py",
    "preferences/labels.py",
    "preferences/unpaired.py",
    "preferences/bradley_terry.py",
    "preferences/label_scores.py",
    "rewards/training_run.py",
    "tuning/flow/base/single_labels.py",
    "tuning/flow/workspace/answers.py",
    "tuning/flow/workspace/work_folder.py",
    "tuning/gan/rounds.py",
}


def test_only_known_files_read_labels_of_judges():
    """A new reader of labels of judges fails here, until somebody has looked how it counts them."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        if name.startswith("people/judge/") or name == "modes/judge.py":
            continue  # a judge reads its own labels, and is calibrated against people's
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in READERS and any(
                keyword.arg in ("labels_from", "choice") for keyword in node.keywords
            ):
                found.add(name)
            names = {getattr(argument, "id", "") for argument in node.args}
            if called in READERS and names & {"choice", "EVERYTHING", "ALL", "labels_from"}:
                found.add(name)
    assert found <= SELECTING, sorted(found - SELECTING)


def test_judges_rows_have_no_gold_and_no_repeats(tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with Store.open(url) as store:
        pairs = [
            PlannedPair(first=shape(2 * i), second=shape(2 * i + 1), kind=kind, expected=expected)
            for i, (kind, expected) in enumerate(
                [(Kind.PAIR, None)] * 3 + [(Kind.GOLD, "first"), (Kind.TRAINING, "first")]
            )
        ]
        campaign = store.create_campaign(CampaignSettings(name="c", **{**QUIET, "gold_every": 2}), pairs)
        assert answer_as_judge(store, campaign) == 3
        filters = LabelFilters(labels_from=JUDGES, least_gold_accuracy=0.9, min_milliseconds=10)
        # checks of attention are of people, and a calibration takes their place
        assert len(store_preferences(store, filters)) == 3
        assert len(store_preferences(store, replace(filters, labels_from=PEOPLE))) == 0
