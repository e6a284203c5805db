"""A blind study of the bundled heads before and after steering, by the simulated annotator and by a judge.

The judge is a fake server that knows each shape by the hash of its render, and answers by the utility of the
simulated annotator. It flips the verdicts of 15 % of the pairs, alike in both orders.
"""

import json

import pytest
from click.testing import CliRunner

from eg3d_rlhf.generators import load_generator
from eg3d_rlhf.modes.steer import main as steer
from eg3d_rlhf.people.judge.labelling import CampaignRenders, label_with_judge
from eg3d_rlhf.people.judge.renders import RenderCache
from eg3d_rlhf.people.judge.rig import Rig
from eg3d_rlhf.people.judge.settings import JudgeSettings
from eg3d_rlhf.people.label.entities import Choice
from eg3d_rlhf.people.label.store import Store
from eg3d_rlhf.people.study import study_report
from eg3d_rlhf.people.study.design import StudyDesign, contender
from eg3d_rlhf.preferences.provenance import ALL
from eg3d_rlhf.preferences.synthetic import evaluate_seeds
from eg3d_rlhf.rewards.settings import BUNDLED_LABELS
from tests.people.judge.fake_server import FakeServer, utilities_of
from tests.people.label.plans import answer_all
from tests.people.study.people import create

TRIALS = 100
FLIP = 0.15


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_panel_of_an_oracle_judge_agrees_with_the_simulated_annotator(tmp_path):
    steered = tmp_path / "steered.safetensors"
    done = CliRunner().invoke(steer, [f"--labels={BUNDLED_LABELS}", f"--out={steered}"])
    assert done.exit_code == 0, done.output
    compare_panels(tmp_path, steered)


def compare_panels(folder, steered) -> None:
    """Run both panels on the same pairs, and compare their win rates."""
    design = StudyDesign(
        name="heads",
        a=contender("before", load_generator()),
        b=contender("after", load_generator(steered)),
        trials=TRIALS,
        annotators=1,
        gold_every=0,
        resolution=48,
        seed=5,
        created="2001-01-01T00:00:00+00:00",
    )
    with Store.open(f"sqlite:///{folder / 'study.db'}") as store:
        campaign = create(store, design)
        shapes = store.plan(campaign).shapes
        utilities = {}
        for side in (design.a, design.b):
            tokens = [token for token, shape in shapes.items() if shape.generator == side.generator]
            generator = load_generator(side.source or None).generator
            seeds = [shapes[token].seed for token in tokens]
            evaluations = evaluate_seeds(generator, seeds, psi=design.psi, resolution=48)
            utilities |= dict(zip(tokens, (evaluation.total for evaluation in evaluations), strict=True))
        utility_of = {(shapes[token].generator, shapes[token].seed): utilities[token] for token in utilities}

        def choose(left, right) -> Choice:
            difference = utility_of[left.generator, left.seed] - utility_of[right.generator, right.seed]
            return Choice.TIE if difference == 0 else Choice.LEFT if difference > 0 else Choice.RIGHT

        who = store.annotator_without_token("simulated").id
        answer_all(store, campaign, who, choose, ahead=1)
        cache = RenderCache(folder / "renders", Rig(resolution=64))
        renders = CampaignRenders(cache)
        by_image = utilities_of({token: renders.views_of(shapes[token]) for token in shapes}, utilities)
        with FakeServer(utilities=by_image, flip=FLIP) as server:
            settings = JudgeSettings(url=server.url, model="oracle", family="fake")
            result = label_with_judge(store, "heads", settings, cache=cache)
        print("\n".join(result.lines()))
        report = study_report.compute(
            design, store.judgements("heads", labels_from=ALL), image_pair_count=0, labels_from=ALL
        )
    (panel,) = report["panels"]
    annotator = report["result"]
    judge = panel["result"]
    print(json.dumps({name: (r["win_rate"], r["interval"], r["wilson"], r["n"]) for name, r in
                      (("annotator", annotator), ("judge", judge))}))  # fmt: skip
    print(json.dumps(panel["people"]), panel["order_flips"])
    assert annotator["n"] == judge["n"] == TRIALS and panel["order_flips"] == 0
    # The two intervals of independent trials contain the win rate of the other panel.
    assert judge["wilson"][0] <= annotator["win_rate"] <= judge["wilson"][1]
    assert annotator["wilson"][0] <= judge["win_rate"] <= annotator["wilson"][1]
    # 15 % of the pairs are flipped
    assert abs(panel["people"]["same"] - (1 - FLIP)) < 0.1
