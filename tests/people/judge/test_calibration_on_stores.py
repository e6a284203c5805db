"""Calibration on a label store: votes of people by all questions, and none of judges."""

import json

from eg3d_rlhf.modes import judge as judge_jobs
from eg3d_rlhf.people.judge import renders as renders_module
from eg3d_rlhf.people.judge.labelled_pairs import pairs_of_store, questions_of
from eg3d_rlhf.people.label.entities import Choice
from eg3d_rlhf.people.label.store import Store
from tests.people.judge.fake_server import FakeServer
from tests.people.judge.provenance_stores import answer_as_judge
from tests.people.judge.test_calibration import run
from tests.people.judge.test_labelling import COUNT, RIG, assets, campaign_of, utilities
from tests.people.label.plans import answer_all
from tests.rejections import rejected

__all__ = ["assets", "utilities"]


def test_a_store_gives_the_votes_of_people_alone(assets, utilities, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(renders_module, "Rig", lambda: RIG)
    url = f"sqlite:///{tmp_path / 'labels.db'}"
    with Store.open(url) as store:
        campaign = campaign_of(store, assets, annotators_per_pair=2)
        for name in ("ann", "bob"):
            answer_all(
                store,
                campaign,
                store.annotator_without_token(name).id,
                # people prefer what the oracle prefers
                lambda left, _: Choice.LEFT if is_better(left) else Choice.RIGHT,
            )
        answer_as_judge(store, campaign, verdict="first")
        labelled = pairs_of_store(store)
    assert len(labelled.votes) == COUNT
    assert [sorted(vote.votes) for vote in labelled.votes] == [["ann", "bob"]] * COUNT
    assert labelled.left_out.total() == COUNT
    questions, skipped = questions_of(labelled.criteria(), {}, page_questions=True)
    assert list(questions) == ["geometry_details"] and skipped == []
    with FakeServer(utilities=utilities) as server:
        flags = [
            f"--labels={url}",
            f"--judge={server.url}",
            "--judge-model=fake",
            f"--outdir={tmp_path / 'out'}",
        ]
        result = run(judge_jobs.calibrate, *flags)
        assert result.exit_code == 0, result.output
        assert len(server.requests()) == 2 * COUNT
        rejected(run(judge_jobs.calibrate, *flags, f"--assets={assets}"), "--assets")
        rejected(run(judge_jobs.calibrate, *flags, "--campaign=none"), "none")
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    measured = record["criteria"]["geometry_details"]
    assert measured["n"] == record["pairs"] == COUNT and measured["accuracy"] == 1.0
    missing = f"sqlite:///{tmp_path / 'missing.db'}"
    rejected(run(judge_jobs.calibrate, f"--labels={missing}", *flags[1:]), "missing.db")


def is_better(shape) -> bool:
    """The rule of `test_labelling.utilities`: b is better, except for the last two prompts."""
    return (shape.generator == "b") != (shape.condition in ("prompt4", "prompt5"))
