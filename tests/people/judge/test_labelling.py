"""A judge that answers campaigns: verdicts in the store, resumption, calibration, questions and commands."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trimesh
from click.testing import CliRunner

from eg3d_rlhf.modes.flow_label import label as flow_label
from eg3d_rlhf.modes.flow_next import answered_campaigns, judged_pairs
from eg3d_rlhf.modes.flow_study import check_family, judge_note
from eg3d_rlhf.modes.label import main as label
from eg3d_rlhf.modes.study import main as study
from eg3d_rlhf.people.judge import renders as renders_module
from eg3d_rlhf.people.judge.labelling import label_with_judge, questions_for
from eg3d_rlhf.people.judge.renders import RenderCache
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import QUESTIONS, JudgeSettings
from eg3d_rlhf.people.label.entities import CampaignSettings, Choice, Mode, PlannedPair, Shape
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.preferences.asset_votes import read_asset_pairs
from eg3d_rlhf.preferences.provenance import ALL, JUDGES
from tests.people.judge.fake_server import FakeServer, utilities_of
from tests.people.judge.provenance_stores import answer_as_judge
from tests.people.judge.test_provenance import calibration
from tests.people.label.plans import QUIET, answer_all
from tests.rejections import raising, rejected
from tests.tuning.flow.workspace.test_work_folder import answered, drawn, work
from tests.tuning.flow.workspace.test_work_folder import shape as asset_shape

__all__ = ["work"]
RIG = Rig(resolution=32)
COUNT = 6  # prompts, with an asset of two generators each


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    for generator in ("a", "b"):
        (folder / generator).mkdir()
        for i in range(COUNT):
            box = trimesh.creation.box((1, 1, 0.5 + 0.1 * i + 0.75 * (generator == "b")))
            box.export(folder / generator / f"prompt{i}.glb")
    return folder


@pytest.fixture(scope="module")
def utilities(assets) -> dict[str, float]:
    """Utility by image: the assets of b are better, except for the last two prompts."""
    cache = RenderCache(assets / "cache", RIG)
    paths = [assets / generator / f"prompt{i}.glb" for generator in "ab" for i in range(COUNT)]
    better = {path: (path.parent.name == "b") != (path.stem in ("prompt4", "prompt5")) for path in paths}
    return utilities_of({path: cache.views_of(path) for path in paths}, better)


@pytest.fixture
def small_renders(assets, monkeypatch):
    """Let commands use the small rig and its cache, so that a render takes a tenth of a second."""
    small = functools.partial(RenderCache, assets / "cache", RIG)
    monkeypatch.setattr(renders_module, "RenderCache", small)


def run(command, *args):
    return CliRunner().invoke(command, [str(arg) for arg in args])


def judge_flags(server, model="fake", family="acme"):
    return [f"--judge={server.url}", f"--judge-model={model}", f"--judge-family={family}"]


def test_label_judges_every_pair_once_in_both_orders(assets, utilities, small_renders, tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    base = [f"--assets={assets}", f"--pairs={COUNT}", f"--db={url}", "--set=gold_every=0"]
    with FakeServer(utilities=utilities) as server:
        rejected(run(label, *base, f"--judge={server.url}"), "--judge-model")
        rejected(run(label, *base, *judge_flags(server)[:2]), "--judge-family")
        rejected(run(label, *base, *judge_flags(server), "--port=9000"), "--port")
        rejected(run(label, *base, "--judge-model=m"), "--judge")
        assert server.requests() == [] and not (tmp_path / "labels.db").exists()
        limited = run(label, *base, *judge_flags(server), "--judge-limit=4")
        assert limited.exit_code == 0, limited.output
        assert server.answered() == 4
        done = run(label, *base, *judge_flags(server))
        assert done.exit_code == 0, done.output
        assert server.answered() == 2 * COUNT
        # the answers are in the store, and nothing is asked again
        assert run(label, *base, *judge_flags(server)).exit_code == 0
        assert server.answered() == 2 * COUNT
        # no name of a file is sent
        assert "glb" not in json.dumps(server.requests()) and str(assets) not in json.dumps(server.requests())
    with Store.open(url) as store:
        rows = list(store.judgements(labels_from=ALL))
        assert len(rows) == COUNT and all(row.judge["family"] == "acme" for row in rows)
        for row in rows:
            winner = row.left if row.choice == "left" else row.right
            assert (winner.generator == "b") == (winner.condition not in ("prompt4", "prompt5"))
            assert row.judge["questions"][""]["criterion"] == "geometry_details"
            assert row.judge["calibration"] is None and row.judge["reported"] == ["fake-vl-1"]
        who = store.annotator_without_token("ann").id
        answer_all(store, store.campaign().id, who)
    out = tmp_path / "pairs.jsonl"
    for selection, provenances in (
        ("people", {"people"}),
        ("judges", {"model: fake"}),
        ("all", {"people", "model: fake"}),
    ):
        done = run(label, "export", out, "--kind=pairs-jsonl", f"--db={url}", f"--labels-from={selection}")
        assert done.exit_code == 0, done.output
        pairs = read_asset_pairs(out)
        assert {pair.provenance for pair in pairs} == provenances
        assert len(pairs) == COUNT * len(provenances)


def campaign_of(store: Store, assets: Path, name="c", **settings) -> int:
    from eg3d_rlhf.core.cli import file_hash

    def asset(generator: str, i: int) -> Shape:
        path = assets / generator / f"prompt{i}.glb"
        return Shape.from_asset(
            generator=generator, source=str(path), seed=i, file=file_hash(path), condition=f"prompt{i}"
        )

    pairs = [PlannedPair(first=asset("a", i), second=asset("b", i)) for i in range(COUNT)]
    return store.create_campaign(CampaignSettings(name=name, **{**QUIET, **settings}), pairs)


def test_further_questions_are_asked_by_their_criteria(assets, utilities, tmp_path):
    questions = ("geometry", "texture", "cute=Which is cuter?")
    asked = questions_for(CampaignSettings(name="c", questions=questions), has_files=True)
    assert {name: question.name for name, question in asked.items()} == {
        "": "overall",
        "geometry": "geometry_details",
        "texture": "texture_details",
        "cute": "cute",
    }
    with raising("--judge"):
        questions_for(
            CampaignSettings(name="c", mode=Mode.SINGLE, scale="thumbs", swap_share=0), has_files=True
        )
    settings = {"cache": RenderCache(assets / "cache", RIG), "echo": lambda line: None}
    with FakeServer(utilities=utilities) as server, Store.open(f"sqlite:///{tmp_path / 'l.db'}") as store:
        campaign_of(store, assets, questions=questions)
        judge = JudgeSettings(url=server.url, model="fake", family="acme")
        result = label_with_judge(store, "c", judge, max_pairs=2, **settings)
        assert result.asked == 2 and server.answered() == 2 * 2 * 4
        row = next(store.judgements("c", labels_from=JUDGES))
        assert set(row.votes) == {"geometry", "texture", "cute"}
        assert set(row.votes.values()) == {row.choice.value}
        assert {name: row.provenance_of(name)["criterion"] for name in row.votes} == {
            "geometry": "geometry_details",
            "texture": "texture_details",
            "cute": "cute",
        }
    with FakeServer(answer="first") as server, Store.open(f"sqlite:///{tmp_path / 'b.db'}") as store:
        campaign_of(store, assets)
        judge = JudgeSettings(url=server.url, model="fake", family="acme")
        result = label_with_judge(store, "c", judge, **settings)
        # an answer by the position is a tie, and counted as a flip
        assert (result.asked, result.ties, result.order_flips) == (COUNT, COUNT, COUNT)
    with FakeServer(answer="prose") as server, Store.open(f"sqlite:///{tmp_path / 'p.db'}") as store:
        campaign_of(store, assets)
        judge = JudgeSettings(url=server.url, model="fake", family="acme")
        result = label_with_judge(store, "c", judge, **settings)
        assert result.unreadable == COUNT
        assert {row.choice.value for row in store.judgements("c", labels_from=JUDGES)} == {"skip"}


def test_the_calibration_is_stored_with_each_answer(assets, utilities, tmp_path):
    from eg3d_rlhf.people.judge.calibration import Calibration

    judge = JudgeSettings(url="http://unused", model="fake", family="acme")
    identity = judge.identity(QUESTIONS["geometry_details"], RIG.to_json())
    good = calibration(tmp_path / "good.json", identity=identity)
    good.write_text(good.read_text().replace("acme/vl-7b", "fake"))
    settings = {"cache": RenderCache(assets / "cache", RIG), "echo": lambda line: None}
    with FakeServer(utilities=utilities) as server, Store.open(f"sqlite:///{tmp_path / 'l.db'}") as store:
        campaign_of(store, assets)
        judge = JudgeSettings(url=server.url, model="fake", family="acme")
        label_with_judge(store, "c", judge, calibration=Calibration.read(good), max_pairs=1, **settings)
        (row,) = store.judgements("c", labels_from=JUDGES)
        assert row.judge["calibrated"] is True
        assert row.judge["calibration"] == Calibration.read(good).hash
        # another question of the same model is another judge
        label_with_judge(
            store,
            "c",
            JudgeSettings(url=server.url, model="fake", family="acme", repeats=3),
            calibration=Calibration.read(good),
            max_pairs=1,
            **settings,
        )
        assert [row.judge["calibrated"] for row in store.judgements("c", labels_from=JUDGES)] == [True, False]
    bad = run(label, "--judge=http://h/v1", "--judge-model=x", "--judge-family=f", f"--calibration={good}")
    rejected(bad, "--calibration", "fake")


SCRIPT = """
import sys
from pathlib import Path
from eg3d_rlhf.people.judge.labelling import label_with_judge
from eg3d_rlhf.people.judge.renders import RenderCache
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import JudgeSettings
from eg3d_rlhf.people.label.store import Store
url, server, answers, cache = sys.argv[1:]
settings = JudgeSettings(url=server, model="fake", family="acme", answers=Path(answers), parallel=1)
with Store.open(url) as store:
    label_with_judge(store, "c", settings, cache=RenderCache(Path(cache), Rig(resolution=32)))
"""


@pytest.mark.long
def test_a_killed_labelling_loses_and_doubles_no_call(assets, utilities, tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with Store.open(url) as store:
        campaign_of(store, assets)
    with FakeServer(utilities=utilities, delay=0.15) as server:
        command = [
            sys.executable,
            "-c",
            SCRIPT,
            url,
            server.url,
            tmp_path / "answers.jsonl",
            assets / "cache",
        ]
        for _ in range(2):
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
                stdout=subprocess.DEVNULL,
            )
            before = server.answered()
            while server.answered() < before + 3:
                time.sleep(0.02)
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})
        # at most the call in flight at each kill is asked once more
        assert 2 * COUNT <= server.answered() <= 2 * COUNT + 2
    with Store.open(url) as store:
        rows = list(store.judgements("c", labels_from=JUDGES))
        assert len(rows) == len({row.pair for row in rows}) == COUNT


def test_isosurfaces_of_a_generator_are_judged(tmp_path):
    from eg3d_rlhf.generators import load_generator
    from tests.people.label.plans import SHAPE

    generator = load_generator()
    shapes = [
        replace(SHAPE, generator=generator.hash, seed=seed, level=generator.generator.level)
        for seed in (1, 2)
    ]
    with Store.open(f"sqlite:///{tmp_path / 'l.db'}") as store:
        pair = PlannedPair(first=shapes[0], second=shapes[1])
        store.create_campaign(CampaignSettings(name="c", **QUIET), [pair])
        with FakeServer(answer="constant", winner="tie") as server:
            judge = JudgeSettings(url=server.url, model="fake", family="acme")
            result = label_with_judge(
                store, "c", judge, cache=RenderCache(tmp_path / "cache", RIG), echo=lambda line: None
            )
        assert (result.asked, result.ties, result.order_flips) == (1, 1, 0)


def test_a_study_has_a_panel_of_a_judge(assets, utilities, small_renders, tmp_path):
    folder = tmp_path / "study"
    sides = [f"--a={assets / 'a'}", f"--b={assets / 'b'}", f"--n={COUNT}", "--gold-every=0"]
    with FakeServer(utilities=utilities) as server:
        done = run(study, *sides, f"--outdir={folder}", *judge_flags(server))
        assert done.exit_code == 0, done.output
        assert server.answered() == 2 * COUNT
    done = run(study, "report", f"--outdir={folder}", "--labels-from=all")
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "report.json").read_text())
    (panel,) = report["panels"]
    assert panel["result"]["b_wins"] == COUNT - 2 and panel["result"]["a_wins"] == 2
    assert report["result"]["n"] == 0 and panel["order_flips"] == 0.0
    # people's report alone has no trial
    rejected(run(study, "report", f"--outdir={folder}"), "--interim")


def test_flow_label_exports_both_kinds(work, tmp_path):
    lines = drawn(work)
    pairs = [
        (asset_shape(work, a), asset_shape(work, b)) for a, b in zip(lines[::2], lines[1::2], strict=True)
    ]
    answered(work, pairs, lambda left, right: Choice.LEFT)
    with Store.open(work.database) as store:
        answer_as_judge(store, store.campaign(work.campaign).id, "second")
    out = tmp_path / "pairs.jsonl"
    for selection in ("people", "judges", "all"):
        done = run(flow_label, work.folder, f"--export={out}", f"--labels-from={selection}")
        assert done.exit_code == 0, done.output
        found = {pair.provenance for pair in read_asset_pairs(out)}
        assert found == {"people": {"people"}, "judges": {"model: acme/vl-7b"}}.get(
            selection, {"people", "model: acme/vl-7b"}
        )
    rejected(run(flow_label, work.folder, "--labels-from=all"), "--labels-from", "--export")
    rejected(run(flow_label, work.folder, f"--export={out}", "--pairs=3"), "--pairs")


def test_the_family_that_labelled_is_no_second_panel(work, tmp_path):
    lines = drawn(work)
    with Store.open(work.database) as store:
        pairs = [PlannedPair(first=asset_shape(work, lines[0]), second=asset_shape(work, lines[1]))]
        campaign = store.create_campaign(CampaignSettings(name=work.campaign, **QUIET), pairs)
        answer_as_judge(store, campaign)
    training = work.folder / "tune-00"
    training.mkdir()

    def facts(**values):
        (training / "report.json").write_text(json.dumps({"labels": values}))

    facts(of_people=5, of_judges=0)
    check_family(work, training, "acme", False)  # a judge has labelled, but did not teach
    facts(of_people=5, of_judges=1)
    check_family(work, training, "other", False)
    check_family(work, training, "ACME", True)
    with raising("--judge-family", "--same-judge"):
        check_family(work, training, "ACME", False)
    assert judge_note(training) and "UNCALIBRATED" not in judge_note(training)
    facts(of_people=5, of_judges=1, judges="m", uncalibrated="none has passed")
    assert "UNCALIBRATED" in judge_note(training)
    facts(of_people=5, of_judges=0)
    assert judge_note(training) == ""
    facts(of_people=0, of_judges=1, labels="pairs.jsonl")
    with raising("--judge-family", "--same-judge"):
        check_family(work, training, "other", False)


def test_a_judge_is_rejected_where_it_cannot_answer_and_status_counts_it_apart(work, assets, tmp_path):
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    judge = ["--judge=http://127.0.0.1:9/v1", "--judge-model=m", "--judge-family=f", f"--db={url}"]
    rejected(run(label, f"--assets={assets}", "--single=thumbs", *judge), "--judge", "--single")
    rejected(run(label, "--strategy=active", *judge), "--judge", "--strategy")
    assert not (tmp_path / "labels.db").exists()
    lines = drawn(work)
    with Store.open(work.database) as store:
        pairs = [PlannedPair(first=asset_shape(work, lines[0]), second=asset_shape(work, lines[1]))]
        answer_as_judge(store, store.create_campaign(CampaignSettings(name=work.campaign, **QUIET), pairs))
    assert judged_pairs(work) == [(work.campaign, "judge acme-vl-7b", 1)]
    assert answered_campaigns(work)[work.campaign][:2] == (0, 1)
